"""
How one thread waits for several servers.

Work that has to wait is a generator, and says so: it yields a :class:`Wait`, and goes on when it is resumed.  Whoever
has nothing else to do waits right there (:func:`without_waits`).  A :class:`Loop` has other works to go on with::

    start --> a thread of its own --Wait--> the loop --ready, or too late--+
                      ^                       |  ^                         |
                      +----ABOUT_TO_BLOCK-----+  +-------------------------+

What cannot be waited for in this way, such as opening a connection, is announced with :data:`ABOUT_TO_BLOCK`, and done
in a thread.

One thread for all, because Python executes one at a time anyway.  Threads that do the same let go of its lock with each
system call, for another one that has to be woken on another processor: near a fast server that takes about as long as
the work.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import closing
from typing import NamedTuple, TypeVar

__all__ = ['ABOUT_TO_BLOCK', 'Loop', 'Wait', 'Work', 'without_waits']

T = TypeVar('T')


class Wait(NamedTuple):
    """
    Resume when a descriptor is ready, or after some time.

    :param fd: the descriptor; -1 if there is none, as in :data:`ABOUT_TO_BLOCK`
    :param events: what it has to be ready for, as of :class:`select.poll`
    :param seconds: how long to wait at most
    """

    fd: int
    events: int
    seconds: float

    def here(self) -> None:
        """Wait in this thread."""
        if self.fd >= 0:
            poll = select.poll()
            poll.register(self.fd, self.events)
            poll.poll(max(0, self.seconds) * 1000)


#: What comes next may take its time, and is nothing that a descriptor could tell of.
ABOUT_TO_BLOCK = Wait(-1, 0, 0)

#: Yields nothing but waits.
Work = Generator[Wait, None, None]


def without_waits(steps: Generator[T | Wait]) -> Generator[T]:
    """Yield what is no wait, and wait in this thread."""
    with closing(steps):
        for step in steps:
            if isinstance(step, Wait):
                step.here()
            else:
                yield step


class Loop:
    """
    Goes on with any number of works in one thread: that of the first of them that has to wait.

    A work that is about to block, beside others, and can have no thread for that, is closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived: deque[tuple[Work, Wait]] = deque()
        # An octet in this pipe wakes the thread that goes on with them; None if there is no such thread.
        self._bell: int | None = None

    def start(self, work: Work) -> None:
        """
        Begin with *work*, or go on with it, in a thread of its own.

        :param work: must not raise
        :raises RuntimeError: there can be no more threads
        """
        # A daemon: at the end it may hang in what cannot be broken off.
        threading.Thread(target=self._go_on, args=(work,), name='mailqueue-run', daemon=True).start()

    def _go_on(self, work: Work | None) -> None:
        while work is not None:
            wait = next((step for step in work if step.fd >= 0), None)
            if wait is None:
                return
            try:
                ear = self._join(work, wait)
            except OSError:
                # Too many open files: then this thread goes on with this one alone.
                wait.here()
                continue
            if ear is None:
                return
            try:
                work = _Turns(self, ear).take()
            finally:
                os.close(ear)

    def _join(self, work: Work, wait: Wait) -> int | None:
        """
        Let the loop go on with *work*; return where to listen for more if this thread is the loop from now on.

        Raises OSError.
        """
        with self._lock:
            ear = None
            if self._bell is None:
                ear, self._bell = os.pipe()
            else:
                os.write(self._bell, b'!')
            self._arrived.append((work, wait))
            return ear

    def arrivals(self) -> list[tuple[Work, Wait]]:
        """Return what has come to the loop since the last call."""
        with self._lock:
            arrived = [*self._arrived]
            self._arrived.clear()
        return arrived

    def leave(self) -> bool:
        """End the loop if nothing more has come; whether that is so."""
        with self._lock:
            if self._arrived or self._bell is None:
                return False
            os.close(self._bell)
            self._bell = None
            return True


class _Waiting(NamedTuple):
    """
    A work that waits for a descriptor.

    :param until: and no longer than that (``time.monotonic()``)
    """

    work: Work
    events: int
    until: float


class _Turns:
    """
    What the thread of a loop does.

    :param ear: a descriptor that tells of arrivals
    """

    def __init__(self, loop: Loop, ear: int) -> None:
        self._loop = loop
        self._ear = ear
        self._poll = select.poll()
        self._poll.register(ear, select.POLLIN)
        # By their descriptors.
        self._waiting: dict[int, _Waiting] = {}
        # None of them has to be resumed before that (``time.monotonic()``).
        self._earliest = math.inf
        # About to block, and not yet in threads of their own.
        self._leaving: deque[Work] = deque()

    def take(self) -> Work | None:
        """Go on until everything has ended, or until all that is left is one work that is about to block."""
        self._admit()
        while True:
            if not self._waiting and len(self._leaving) < 2 and self._loop.leave():
                return self._leaving.popleft() if self._leaving else None
            self._let_go()
            for fd, _ in self._poll.poll(max(0.0, self._earliest - time.monotonic()) * 1000 if self._waiting else 0):
                if fd == self._ear:
                    os.read(fd, 1000)
                    self._admit()
                else:
                    self._resume(fd)
            if self._earliest <= time.monotonic():
                self._resume_late()

    def _resume_late(self) -> None:
        now = time.monotonic()
        for fd in [fd for fd, waiting in self._waiting.items() if waiting.until <= now]:
            self._resume(fd)
        self._earliest = min((waiting.until for waiting in self._waiting.values()), default=math.inf)

    def _admit(self) -> None:
        for work, wait in self._loop.arrivals():
            self._note(work, wait)

    def _resume(self, fd: int) -> None:
        work, events, _ = self._waiting[fd]
        wait = next(work, None)
        if wait is not None and wait.fd == fd:
            self._wait(work, wait)
            if wait.events != events:
                self._poll.modify(fd, wait.events)
            return
        del self._waiting[fd]
        self._poll.unregister(fd)
        if wait is not None:
            self._note(work, wait)

    def _note(self, work: Work, wait: Wait) -> None:
        if wait.fd < 0:
            self._leaving.append(work)
            return
        self._wait(work, wait)
        self._poll.register(wait.fd, wait.events)

    def _wait(self, work: Work, wait: Wait) -> None:
        until = time.monotonic() + wait.seconds
        self._waiting[wait.fd] = _Waiting(work, wait.events, until)
        self._earliest = min(self._earliest, until)

    def _let_go(self) -> None:
        while len(self._leaving) + len(self._waiting) > 1 and self._leaving:
            work = self._leaving.popleft()
            try:
                self._loop.start(work)
            except RuntimeError:
                # There can be no more threads, and here it would keep the others waiting.
                work.close()
