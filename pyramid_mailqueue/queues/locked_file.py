"""
One message file, held.

To hold a message is to have its file open with an exclusive ``flock``.  The kernel drops the lock when the holder dies,
however it dies: a file that nobody has locked is nobody's, and there are no ages, pid files or timeouts to believe in.

Two rules make this safe, and both live here:

* A file is locked *before* it becomes visible under a name that others look at (:func:`create`).
* After locking a file that was found by its name, the name must still mean the same inode (:func:`take`): between the
  two calls its former holder may have removed it, moved it on, or replaced it by a new version.

A lock belongs to the *open file*, which a forked child shares.  A child therefore closes what it inherited
(:meth:`LockedFile.abandon`), and a parent says ``LOCK_UN`` before it closes, so that a child which has not come to that
yet cannot keep the message locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from typing import BinaryIO

__all__ = ['LockedFile', 'create', 'sync_folder', 'take']

# Gone; a symbolic link; a folder; a fifo or socket.
_NOTHING_TO_TAKE = frozenset({errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENXIO})


class LockedFile:
    """
    An open, locked file at a known place; every change of its state is one ``rename``.

    :param path: where the file is now
    :param fd: its descriptor, which holds the lock
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd

    @property
    def closed(self) -> bool:
        """True once the lock is given up, here or by :meth:`abandon` in a forked child."""
        return self.fd < 0

    @property
    def name(self) -> str:
        """The name of the file without its folder."""
        return os.path.basename(self.path)

    def reader(self) -> BinaryIO:
        """Return the file, opened for reading at its first byte; closing the reader keeps the lock."""
        os.lseek(self.fd, 0, os.SEEK_SET)
        return open(self.fd, 'rb', closefd=False)

    def move(self, path: str) -> None:
        """Rename the file to *path*, on the same file system, and keep it locked.  Raises OSError."""
        os.rename(self.path, path)
        self.path = path

    def remove(self) -> None:
        """Remove the file from its folder and let go of it.  Raises OSError, and then still holds it."""
        os.unlink(self.path)
        self.close()

    def close(self) -> None:
        """Let go of the file where it is.  A second call does nothing."""
        if self.closed:
            return
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)

    def abandon(self) -> None:
        """In a forked child: close the descriptor, and leave the parent its lock."""
        if self.closed:
            return
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):
            os.close(fd)


def create(path: str, pieces: Sequence[bytes], modified: float | None = None) -> LockedFile:
    """
    Write a new file durably and hold it; the caller renames it to where it becomes visible.

    :param path: a new name in the folder for files that nobody looks at
    :param pieces: what to write
    :param modified: the time of modification to give it, in seconds since the epoch; None is now
    :raises OSError: nothing is left behind
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    file = LockedFile(path, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _write_all(fd, pieces)
        if modified is not None:
            os.utime(fd, (modified, modified))
        os.fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        file.close()
        raise
    return file


def _write_all(fd: int, pieces: Sequence[bytes]) -> None:
    rest = [memoryview(piece) for piece in pieces]
    while rest:
        written = os.writev(fd, rest)
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        if rest:
            rest[0] = rest[0][written:]


def take(path: str) -> LockedFile | None:
    """
    Hold the file at *path*.  None if it is gone, if somebody else holds it, or if it is not a regular file.

    :raises OSError: it is there, and cannot be opened
    """
    try:
        # O_RDWR: network file systems grant an exclusive lock only on a file that is open for writing.
        # O_NONBLOCK: opening somebody's fifo must not wait for its other end.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NOTHING_TO_TAKE:
            return None
        raise
    file = LockedFile(path, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.fstat(fd)
        named = os.stat(path, follow_symlinks=False)
    except (BlockingIOError, FileNotFoundError):
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    if not stat.S_ISREG(held.st_mode) or (held.st_ino, held.st_dev) != (named.st_ino, named.st_dev):
        file.close()
        return None
    return file


def sync_folder(path: str) -> None:
    """Make the names in a folder durable: what was renamed into it or removed from it.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
