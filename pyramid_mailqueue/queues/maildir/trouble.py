"""
Trouble for which no message is to blame: the process, the machine or a whole folder is at its end.

The next message would fare no better, so nobody goes through all of them, with a line in the log for each.  What may be
the trouble of one file (one that belongs to somebody else, a bad spot on the disk) is told of, and passed over.
"""

from __future__ import annotations

import errno
import resource

from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.logs import why

__all__ = ['FOR_ALL', 'FOR_ALL_LOOKS', 'FOR_ALL_MOVES', 'cure_of', 'leave_some_files', 'may_stay_open', 'standstill']

#: What a file cannot be opened or locked for without being to blame.
FOR_ALL = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOLCK, errno.EROFS})

#: The same, for a look at it: who may search the folder may look at what is in there.
FOR_ALL_LOOKS = FOR_ALL | {errno.EACCES}

#: The same, for a move from one folder to another: the rights and the room are those of the folders.
FOR_ALL_MOVES = FOR_ALL | {errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.EXDEV}

#: So many files fewer than there may be are open for messages that are in hand: their ends have to be written.
SPARE_FILES = 4

#: What only waits may have this part of the files that the process may have open, and of so many at most: ``select()``,
#: with which many servers watch their connections, knows no more.
WAITING_PART = 1 / 8
MOST_FILES = 1024


def standstill(path: str, error: OSError) -> QueueError:
    """Return what to raise if nothing can be done in the folder at *path*."""
    return QueueError(f'The folder {path} cannot be used: {why(error)}{cure_of(error)}')


def cure_of(error: OSError) -> str:
    """Return what a person can do about it, to be put behind what the system said; '' if that is clear."""
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f'. This process may have {limit} files open: let it have more (LimitNOFILE= for systemd, else ulimit -n).'
        )
    if error.errno == errno.ENFILE:
        return '. That is for all processes of this machine together: raise fs.file-max, or find out who has them open.'
    return ''


def leave_some_files(fd: int) -> None:
    """
    Raise OSError (EMFILE) if *fd*, which was just opened, is one of the last that this process may have.

    The system gives out the lowest one that is free.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and fd >= limit - SPARE_FILES:
        raise OSError(errno.EMFILE, 'Too many open files')


def may_stay_open(fd: int) -> bool:
    """
    Whether *fd*, a file that only waits, may stay open; the others are opened again when their turn comes.

    The system gives out the lowest descriptor that is free.  So this bounds what all queues of this process keep open
    together, and it keeps the less the more the application has open.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return fd < WAITING_PART * (MOST_FILES if limit == resource.RLIM_INFINITY else min(limit, MOST_FILES))
