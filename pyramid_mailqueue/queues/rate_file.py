"""
The record of recent sends: it enforces ``mailqueue.rate_limit`` for all processes that send from one queue.

The file is a ring of times, one for each of the last sends (in seconds since the epoch; minus infinity where there was
none), after a header::

    magic | places in the ring | place of the oldest time | the last take: how many sends | when

A limit of 14 per second holds if, at each send, the 14th last one before it is a second old.  So a take reads one place
of the ring, however long that is, and there is no fixed window at whose edge twice as many could pass.

Write order: a take puts the times of the take *before* it into the ring, and then itself into the header, in one write.
A process killed in between has taken nothing, and the next take writes the same again.

Takes are not synced.  What a killed process has written is kept; only a power cut loses the takes of the last half
minute or so, and then the machine has to start first.  The whole file is written and synced when it is created, so that
later there is room for every take.

The file is replaced, by a ``rename``, when it is damaged, when the clock was set back, and when a limit has more sends
than it has places.  It never shrinks: processes with different limits (during a change of settings) can share it, and
each applies its own limit to the sends of all of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import struct
import threading
import time
from collections.abc import Callable

from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.logs import log_event, queue_log, why
from pyramid_mailqueue.queues.maildir.locked_file import Holder, LockedFile
from pyramid_mailqueue.settings import Rate

__all__ = ['RateFile']

_MAGIC = b'mqrate1\n'
_HEADER = struct.Struct('<8sQQQd')
_TIME = struct.Struct('<d')


class RateFile:
    """
    A rate limit shared by all processes and threads that use the same file.

    :param path: the file, in an existing folder; the first take creates it
    :param rate: the limit: never more than *count* sends in any *seconds*
    :param clock: seconds since the epoch
    """

    def __init__(self, path: str | os.PathLike[str], rate: Rate, *, clock: Callable[[], float] = time.time) -> None:
        self.path = os.fspath(path)
        self.rate = rate
        self._clock = clock
        self._holder = Holder()
        self._file: LockedFile | None = None
        self._let_go()
        call_in_children(self._let_go)

    def _let_go(self) -> None:
        """Start without an open file, also in a forked child: the open file and its lock are the parent's."""
        self._lock = threading.Lock()
        if self._file is not None:
            self._file.abandon()
            self._file = None

    def take(self, count: int = 1) -> float:
        """
        Take *count* sends now and return 0.0; or take nothing, and return in how many seconds to ask again.

        The wait is never longer than the period of the limit.  A take of more sends than the whole limit needs a period
        without any, and then uses all of it: otherwise a message with so many recipients could never be sent.  A clock
        that is set forward is believed.

        The time of the take counts, so the caller sends at once.

        :param count: how many; providers count each recipient of a message.  0 asks whether one could be taken
        :raises QueueError: the file cannot be created or used, and nothing was taken
        """
        if count < 0:
            raise ValueError(f'{count} sends cannot be taken')
        # A file lock belongs to the open file: it excludes other processes, but not other threads of this one.
        with self._lock:
            try:
                wait, damage = self._take(count)
            except OSError as error:
                self._close()
                raise QueueError(
                    f'The file {self.path}, in which sends are counted for mailqueue.rate_limit, cannot be created or '
                    f'used: {why(error)}'
                ) from error
            finally:
                self._unlock()
        if damage:
            # Outside the lock: a log handler may send its records by mail.
            problem = f'was damaged ({damage}), and is replaced by one without the sends so far'
            log_event(queue_log, logging.WARNING, status='trouble', file=self.path, problem=problem)
        return wait

    def _take(self, count: int) -> tuple[float, str]:
        """Return what :meth:`take` returns, and what was wrong with the file."""
        file, size = self._locked_file()
        # Read under the lock, so that the times in the ring are in order.
        now = self._clock()
        # The send that must be a period old to leave room for so many others.
        number = self.rate.count - min(count or 1, self.rate.count) + 1
        ring, damage = None, ''
        # An empty file is new: nothing has been written since it was created.
        if size:
            try:
                ring = _Ring.read(file, size)
            except _DamagedError as error:
                damage = str(error)
        when = self._time_of(ring, number, now)
        # Not ">": in a damaged file it may be NaN.
        if ring is None or not when <= now:
            ring = self._replace(ring, now)
            when = ring.time(number)
        wait = self.rate.seconds - (now - when)
        if wait > 0:
            return wait, damage
        if count:
            ring.add(count, now)
        return 0.0, damage

    def _time_of(self, ring: _Ring | None, number: int, now: float) -> float:
        """
        Return the time of the *number*-th last send; a time after *now* if this ring cannot tell.

        It cannot if the clock was set back.  Times in the future are replaced by *now* once, in the file: replaced anew
        at each take, they would never grow older.
        """
        if ring is None or ring.places < self.rate.count or not ring.time(1) <= now:
            return math.inf
        return ring.time(number)

    def _replace(self, ring: _Ring | None, now: float) -> _Ring:
        """Replace the locked file by a new one, and hold that; *ring* has the times to keep."""
        # In this order min() turns NaN, in a damaged file, into *now*, too.
        times = sorted(min(now, when) for when in (ring.times() if ring else ()))
        times[:0] = [-math.inf] * (self.rate.count - len(times))
        draft = f'{self.path}.new'
        # Left by a process killed here: any other writer waits for our lock.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        file = self._holder.create(
            draft, [_header(len(times), 0, 1, times[-1]), struct.pack(f'<{len(times)}d', *times)]
        )
        try:
            file.move(self.path)
        except OSError:
            file.close()
            raise
        # A process that locks the old file now sees that it has lost its name.
        self._close()
        self._file = file
        return _Ring(file, len(times), 0, 1, times[-1])

    # -- the lock

    def _locked_file(self) -> tuple[LockedFile, int]:
        """Wait for the lock on the file at :attr:`path`; return the file and its size in bytes."""
        while True:
            if self._file is None:
                self._file = LockedFile(self.path, os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            file = self._file
            fcntl.flock(file.fd, fcntl.LOCK_EX)
            named = self._named()
            if named and os.path.samestat(named, os.fstat(file.fd)):
                return file, named.st_size
            self._close()

    def _named(self) -> os.stat_result | None:
        try:
            return os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _unlock(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file.fd, fcntl.LOCK_UN)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _DamagedError(Exception):
    """The file was not written by this module; the text says how that shows."""


class _Ring:
    """
    The ring in a locked file.

    :param places: how many times it holds
    :param oldest: the place of the oldest one, which is the next to be written
    :param last_count: how many sends the last take took; their places are not written yet
    :param last_time: when that was
    """

    def __init__(self, file: LockedFile, places: int, oldest: int, last_count: int, last_time: float) -> None:
        self.places = places
        self._fd = file.fd
        self._oldest = oldest
        self._last_count = last_count
        self._last_time = last_time

    @classmethod
    def read(cls, file: LockedFile, size: int) -> _Ring:
        """Read the header of a file of *size* bytes.  Raises _DamagedError; OSError."""
        header = os.pread(file.fd, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            raise _DamagedError('it is too short')
        magic, places, oldest, last_count, last_time = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise _DamagedError('it begins with something else')
        if size != _offset(places) or oldest >= places or not 1 <= last_count <= places:
            raise _DamagedError('its numbers do not fit together')
        return cls(file, places, oldest, last_count, last_time)

    def time(self, number: int) -> float:
        """Return the time of the *number*-th last send; 1 is the last.  Raises OSError."""
        if number <= self._last_count:
            return self._last_time
        return self._read((self._oldest - number) % self.places, 1)[0]

    def times(self) -> list[float]:
        """Return all times, beginning with the oldest.  Raises OSError."""
        times = self._read(0, self.places)
        in_order = [*times[self._oldest :], *times[: self._oldest]]
        return in_order[: self.places - self._last_count] + [self._last_time] * self._last_count

    def add(self, count: int, now: float) -> None:
        """Take *count* sends, or as many as there are places.  Raises OSError, and then nothing was taken."""
        self._write_last_take()
        count = min(count, self.places)
        _write(self._fd, 0, _header(self.places, (self._oldest + count) % self.places, count, now))

    def _write_last_take(self) -> None:
        begin = (self._oldest - self._last_count) % self.places
        to_the_end = min(self._last_count, self.places - begin)
        from_the_beginning = self._last_count - to_the_end
        _write(self._fd, _offset(begin), _TIME.pack(self._last_time) * to_the_end)
        if from_the_beginning:
            _write(self._fd, _offset(0), _TIME.pack(self._last_time) * from_the_beginning)

    def _read(self, place: int, count: int) -> tuple[float, ...]:
        content = os.pread(self._fd, count * _TIME.size, _offset(place))
        if len(content) < count * _TIME.size:
            raise OSError(errno.EIO, 'not all of it can be read')
        return struct.unpack(f'<{count}d', content)


def _header(places: int, oldest: int, last_count: int, last_time: float) -> bytes:
    return _HEADER.pack(_MAGIC, places, oldest, last_count, last_time)


def _offset(place: int) -> int:
    return _HEADER.size + place * _TIME.size


def _write(fd: int, offset: int, content: bytes) -> None:
    if os.pwrite(fd, content, offset) < len(content):
        raise OSError(errno.EIO, 'not all of it can be written')
