"""
Trouble that no message causes: the process, the machine or a whole folder cannot go on.

The next message would fail too, so a run does not try them all, with a line in the log for each.  Trouble that may
concern one file only (a file of another user, a bad spot on the disk) is logged, and the file skipped.
"""

from __future__ import annotations

import errno
import resource

from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.logs import why

__all__ = ['FOR_ALL', 'FOR_ALL_LOOKS', 'FOR_ALL_MOVES', 'cure_of', 'leave_some_files', 'may_stay_open', 'standstill']

#: Errors of opening or locking a file that are not the fault of the file.
FOR_ALL = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOLCK, errno.EROFS})

#: The same, for stat(): the right to search the folder is enough for that.
FOR_ALL_LOOKS = FOR_ALL | {errno.EACCES}

#: The same, for a move from one folder to another: the rights and the room are those of the folders.
FOR_ALL_MOVES = FOR_ALL | {errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.EXDEV}

#: This many of the last descriptors stay free of messages in progress: their outcomes have to be written.
SPARE_FILES = 4

#: Files that only wait may have this part of the descriptors of the process, counted up to :data:`MOST_FILES`:
#: ``select()``, with which many servers watch their connections, handles no more.
WAITING_PART = 1 / 8
MOST_FILES = 1024


def standstill(path: str, error: OSError) -> QueueError:
    """Return the error to raise if nothing can be done in the folder at *path*."""
    return QueueError(f'The folder {path} cannot be used: {why(error)}{cure_of(error)}')


def cure_of(error: OSError) -> str:
    """Return the remedy for *error*, to be appended to its text; '' if that is clear."""
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f'. This process may have {limit} files open: let it have more (LimitNOFILE= for systemd, else ulimit -n).'
        )
    if error.errno == errno.ENFILE:
        return '. That limit is for the whole machine: raise fs.file-max, or find the process that has them open.'
    return ''


def leave_some_files(fd: int) -> None:
    """
    Raise OSError (EMFILE) if *fd*, which was just opened, is one of the last that this process may have.

    The system gives out the lowest free one.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and fd >= limit - SPARE_FILES:
        raise OSError(errno.EMFILE, 'Too many open files')


def may_stay_open(fd: int) -> bool:
    """
    Whether *fd*, a file that only waits, may stay open; the others are opened again when their turn comes.

    The system gives out the lowest free descriptor.  So this bounds the files that all queues of this process keep open
    together; the more files the application has open, the fewer they are.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return fd < WAITING_PART * (MOST_FILES if limit == resource.RLIM_INFINITY else min(limit, MOST_FILES))
