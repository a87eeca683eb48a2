"""
Is this directory a queue?  Checked before anything is created in it, or moved.

A directory with the folders of mailqueue-runner (``tmp/``, ``new/`` and ``cur/``) is a queue.  But it may also be a
queue of zope.sendmail, repoze.sendmail or pyramid_mailer, or a mailbox: all of these are maildirs, and a run would move
every message in them to ``corrupt/``.  So unless a folder of this package is beside these three, a few of the files in
them are checked, and what else is there: with a handful of system calls, however much that is.

Nothing is changed here.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterator, Sequence

from pyramid_mailqueue.display import printable, user_name
from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.logs import why
from pyramid_mailqueue.queues.maildir.queue_file import is_queue_file, writer_of

__all__ = ['FOLDERS', 'MOVING', 'NoQueue', 'check_access', 'lack_of_queue']

FOLDERS = ('tmp', 'prepared', 'new', 'cur', 'held', 'dead', 'corrupt')

#: The messages half-way to or from another queue (see :mod:`~.queues.moving`); the first move creates this folder.
MOVING = 'moving'

#: The folders of every maildir.
_OF_MAILDIR = frozenset({'tmp', 'new', 'cur'})

#: What else this package keeps in the directory.
_BESIDE = frozenset({MOVING, 'inbox', 'rate', 'rate.new'})

#: No other program has this many folders of these names.
ENOUGH_FOLDERS = len(_OF_MAILDIR) + 1

#: How many files of a folder are read, and how much of each, in octets.
SOME_FILES = 10
HEAD = 64 * 1024

#: How many names of foreign files are collected; one less is shown.
SOME_NAMES = 4

_OWN_DIRECTORY = 'A queue needs a directory of its own: name another one, which need not be there yet.'


class NoQueue(QueueError):
    """There is no queue yet where one has to be; *lack* says why."""

    def __init__(self, path: str, lack: str) -> None:
        super().__init__(f'There is no queue in {path}: {lack}.')
        self.lack = lack


def lack_of_queue(path: str) -> str:
    """
    Return why there is no queue at *path* yet, or ``''`` if there is one.

    :raises QueueError: something else is there, which must not become a queue; or it cannot be read
    """
    try:
        status = os.stat(path)
        if not stat.S_ISDIR(status.st_mode):
            raise QueueError(f'{_unusable(path)}File exists, and is no directory. {_OWN_DIRECTORY}')
        check_access(path, os.R_OK | os.X_OK)
        return _lack_of_queue(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise QueueError(f'{_unusable(path)}It is a link to {os.readlink(path)}, which is not there.') from None
        return 'there is no such directory'
    except (OSError, ValueError) as error:
        # A path with a NUL in it is a ValueError.
        raise QueueError(f'{_unusable(path)}{why(error)}') from error


def _unusable(path: str) -> str:
    return f'The queue directory {path} cannot be created or used: '


def check_access(path: str, mode: int) -> None:
    """Raise PermissionError, naming both users, unless this one has the rights of *mode* (`os.access`)."""
    if os.access(path, mode):
        return
    rights = 'read and write' if mode & os.W_OK else 'read'
    owner = user_name(os.stat(path).st_uid)
    raise PermissionError(
        errno.EACCES, f'the user {user_name(os.geteuid())} may not {rights} {path}, which belongs to {owner}'
    )


def _lack_of_queue(path: str) -> str:
    ours = frozenset(folder for folder in FOLDERS if os.path.isdir(f'{path}/{folder}'))
    if len(ours) >= ENOUGH_FOLDERS or _has_messages(path, ours):
        return ''
    if others := list(itertools.islice(_others(path), SOME_NAMES)):
        raise QueueError(f'{path} is no queue: there is {_named(others)} in it. {_OWN_DIRECTORY}')
    if ours == _OF_MAILDIR:
        return ''
    return 'there is only a part of a queue' if ours else 'the directory is empty'


def _has_messages(path: str, folders: frozenset[str]) -> bool:
    """Whether messages of a queue are among the first files in these folders.  Raises QueueError for other files."""
    found, other = False, ''
    for file in itertools.chain.from_iterable(_first_files(f'{path}/{folder}') for folder in folders - {'corrupt'}):
        head = _head(file)
        if writer := writer_of(head):
            raise QueueError(
                f'{path} is the queue of {writer}: {_inside(path, file)} is one of its messages. Nothing was changed. '
                f'Let {writer} deliver what waits there, and name another directory, which need not be there yet.'
            )
        is_message = is_queue_file(head)
        found = found or is_message is True
        other = file if is_message is False else other
    if other and not found:
        raise QueueError(
            f'{path} is no queue: {_inside(path, other)} is no message of one. Nothing was changed. {_OWN_DIRECTORY}'
        )
    return found


def _first_files(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        files = (entry.path for entry in entries if _is_shown(entry.name) and entry.is_file(follow_symlinks=False))
        yield from itertools.islice(files, SOME_FILES)


def _inside(path: str, file: str) -> str:
    return printable(os.path.relpath(file, path))


def _head(path: str) -> bytes:
    """Return the first octets of a file; none if it cannot be read, or is gone."""
    try:
        with open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as fp:
            return fp.read(HEAD)
    except OSError:
        return b''


def _others(path: str) -> Iterator[str]:
    """Yield the names that no queue has in its directory."""
    with os.scandir(path) as entries:
        for entry in entries:
            is_ours = entry.name in _BESIDE or (entry.name in FOLDERS and entry.is_dir())
            if _is_shown(entry.name) and not is_ours:
                yield entry.name


def _is_shown(name: str) -> bool:
    # The root of a file system may have the one, a directory in a repository the others (.gitkeep).
    return name != 'lost+found' and not name.startswith('.')


def _named(names: Sequence[str]) -> str:
    shown = ', '.join(map(printable, sorted(names)[: SOME_NAMES - 1]))
    return f'{shown}, ...' if len(names) == SOME_NAMES else shown
