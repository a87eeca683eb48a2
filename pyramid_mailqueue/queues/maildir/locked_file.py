"""
Message files, and the locks that hold them.

To hold a message is to have its file open with an exclusive ``flock``.  The kernel drops the lock when the holder dies,
however it dies: an unlocked file is free, and there are no ages, pid files or timeouts to rely on.

Two rules make this safe, and both live here:

* A file is locked *before* it becomes visible under a name that others look at (:meth:`Holder.create`).
* After locking a file that was found by its name, the name must still mean the same inode (:meth:`Holder.take`):
  between the two calls its former holder may have removed it, moved it on, or replaced it by a new version.

A lock belongs to the *open file*, which a forked child shares.  So a child closes what it inherited, without unlocking
it; and a parent says ``LOCK_UN`` before it closes, so that a child which has not closed it yet cannot keep the message
locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import weakref
from collections.abc import Iterable, Sequence

from pyramid_mailqueue.forks import call_in_children

__all__ = ['Holder', 'LockedFile', 'abandon_all', 'sync_folder']

#: How many octets one call of Linux reads, at most.
MOST_AT_ONCE = 0x7FFFF000

#: How many octets are copied at once.
CHUNK = 1024 * 1024

# Gone; a symbolic link; a folder; a fifo or socket.
_NOTHING_TO_TAKE = frozenset({errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENXIO})


class LockedFile:
    """
    An open, locked file at a known place; every change of its state is one ``rename``.

    A file without any reference is closed too, so that the message is an orphan, and not locked for as long as the
    process lives.

    :param path: where the file is now
    :param fd: its descriptor, which holds the lock
    """

    # For ``__del__``, if ``__init__`` was interrupted.
    fd = -1

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        # Where it may be instead, if a move was interrupted (Ctrl-C) before its end was noted.
        self._goal: str | None = None
        # Read when the file was locked: no other process changes it from then on.
        self._stat: os.stat_result | None = None

    @property
    def closed(self) -> bool:
        """True once the file is closed, by :meth:`close` or :meth:`abandon`."""
        return self.fd < 0

    @property
    def name(self) -> str:
        """The name of the file without its folder."""
        return self.path.rpartition('/')[2]

    @property
    def folder(self) -> str:
        """The name of the folder in which the file is."""
        return self.path.rpartition('/')[0].rpartition('/')[2]

    @property
    def modified(self) -> float:
        """The time of modification, in seconds since the epoch.  Raises OSError."""
        return (self._stat or os.fstat(self.fd)).st_mtime

    def lock(self) -> bool:
        """
        Lock a file that was opened by its name; False if it is locked elsewhere, or if the name means another file now.

        :raises OSError: there are no locks on this file system
        """
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            opened, named = os.fstat(self.fd), os.stat(self.path, follow_symlinks=False)
        except (BlockingIOError, FileNotFoundError):
            return False
        self._stat = opened
        is_named = opened.st_ino == named.st_ino and opened.st_dev == named.st_dev
        return is_named and stat.S_ISREG(opened.st_mode)

    @property
    def size(self) -> int:
        """The size of the file, in octets.  Raises OSError."""
        return (self._stat or os.fstat(self.fd)).st_size

    def head(self, most: int) -> bytes:
        """Return the first *most* octets of the file, or all of it if it has no more.  Raises OSError."""
        return self._read(0, min(self.size, most))

    def read(self, start: int = 0) -> bytes:
        """Return the content of the file from *start* on.  Raises OSError, and MemoryError."""
        size = self.size - start
        if size > CHUNK and size > os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'):
            # Some systems kill a process instead of refusing the memory.
            raise MemoryError(f'{size} octets are more than the memory of this machine')
        return self._read(start, size)

    def _read(self, start: int, size: int) -> bytes:
        content = os.pread(self.fd, size, start)
        if MOST_AT_ONCE <= len(content) < size:
            # One call returns no more.
            content = b''.join((content, self._read(start + len(content), size - len(content))))
        if len(content) < size:
            raise OSError(errno.EIO, f'only {len(content)} of {size} octets can be read')
        return content

    def move(self, path: str) -> None:
        """Rename the file to *path*, on the same file system, and keep it locked.  Raises OSError."""
        self.find()
        self._goal = path
        os.rename(self.path, path)
        self.path = path
        self._goal = None

    def find(self) -> None:
        """See where the file is, if a move was interrupted: no other process moves it."""
        goal, self._goal = self._goal, None
        if goal is not None and not os.path.lexists(self.path):
            self.path = goal

    def remove(self) -> bool:
        """Remove the file from its folder, and keep it locked; False if it is gone already.  Raises OSError."""
        self.find()
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            return False
        return True

    def close(self) -> None:
        """Unlock and close the file where it is.  A second call does nothing."""
        if self.closed:
            return
        with contextlib.suppress(OSError):
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        self.abandon()

    def abandon(self) -> None:
        """Close the file without unlocking it: a process that shares the open file keeps the lock."""
        if self.closed:
            return
        fd, self.fd = self.fd, -1
        # Nothing can be lost: what was written is synced.
        with contextlib.suppress(OSError):
            os.close(fd)

    __del__ = abandon


class Holder:
    """Opens files and holds them for this process; a forked child closes them."""

    def __init__(self) -> None:
        self._held: weakref.WeakSet[LockedFile] = weakref.WeakSet()
        call_in_children(self._abandon_all)

    def create(
        self,
        path: str,
        pieces: Sequence[bytes],
        modified: float | None = None,
        *,
        rest_of: tuple[LockedFile, int] | None = None,
    ) -> LockedFile:
        """
        Write a new file durably and hold it; the caller renames it to where it becomes visible.

        :param path: a new name that no other process looks at
        :param pieces: what to write
        :param modified: the time of modification to give it, in seconds since the epoch; None is now
        :param rest_of: a file, and the offset in it from which the rest is copied, however much that is
        :raises OSError: nothing is left behind
        """
        file = self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            # A umask may remove more rights than 0600 does.
            os.fchmod(file.fd, 0o600)
            fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_all(file.fd, pieces)
            if rest_of is not None:
                _append(file.fd, *rest_of)
            if modified is not None:
                os.utime(file.fd, (modified, modified))
            os.fsync(file.fd)
        except BaseException:
            with contextlib.suppress(OSError):
                file.remove()
            file.close()
            raise
        return file

    def take(self, path: str) -> LockedFile | None:
        """
        Hold the file at *path*.  None if it is gone, held elsewhere, or not a regular file.

        :raises OSError: it is there, and cannot be opened
        """
        try:
            # O_RDWR: network file systems grant an exclusive lock only on a file that is open for writing.
            file = self._open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in _NOTHING_TO_TAKE:
                return None
            raise
        try:
            is_ours = file.lock()
        except BaseException:
            file.close()
            raise
        if not is_ours:
            file.close()
            return None
        return file

    def is_held(self, path: str) -> bool:
        """Whether the file at *path* is held.  Raises OSError."""
        try:
            file = self._open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            # Shared: two callers that only ask do not take each other for its holder.
            fcntl.flock(file.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            file.close()
        return False

    def take_over(self, file: LockedFile) -> LockedFile:
        """Return a new object that holds what *file* held; *file* is closed by that."""
        fd, file.fd = file.fd, -1
        return self._hold(LockedFile(file.path, fd))

    def _open(self, path: str, flags: int) -> LockedFile:
        return self._hold(LockedFile(path, os.open(path, flags, 0o600)))

    def _hold(self, file: LockedFile) -> LockedFile:
        self._held.add(file)
        return file

    def _abandon_all(self) -> None:
        abandon_all(self._held)


def abandon_all(files: Iterable[LockedFile]) -> None:
    """Abandon files, those with consecutive descriptors with one system call."""
    descriptors = []
    for file in files:
        if not file.closed:
            descriptors.append(file.fd)
            file.fd = -1
    descriptors.sort()
    while descriptors:
        first = descriptors[0]
        number = next((n for n, fd in enumerate(descriptors) if fd != first + n), len(descriptors))
        os.closerange(first, first + number)
        del descriptors[:number]


def _write_all(fd: int, pieces: Sequence[bytes]) -> None:
    rest = [memoryview(piece) for piece in pieces]
    while rest:
        written = os.writev(fd, rest)
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        if rest:
            rest[0] = rest[0][written:]


def _append(fd: int, source: LockedFile, start: int) -> None:
    """Copy the content of *source* from *start* on.  Takes no memory, and no disk space for holes."""
    size, shift = source.size, os.fstat(fd).st_size - start
    while start < size:
        try:
            begin = os.lseek(source.fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            # A hole up to the end.
            break
        start = os.lseek(source.fd, begin, os.SEEK_HOLE)
        for offset in range(begin, start, CHUNK):
            os.lseek(fd, offset + shift, os.SEEK_SET)
            _write_all(fd, [os.pread(source.fd, min(CHUNK, start - offset), offset)])
    os.ftruncate(fd, size + shift)


def sync_folder(path: str) -> None:
    """Make the names in a folder durable: what was renamed into it or removed from it.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
