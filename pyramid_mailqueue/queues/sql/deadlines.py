"""
Time limits for the statements of the queue: a database that does not answer must not block a process.

A statement over its limit is cancelled; if that does not help (the server is stopped, the network drops everything) its
connection is shut down.  A thread does that, and not a setting of the session: behind a pooler ``statement_timeout``
would apply to the statements of the application too, and it does not apply while a commit waits for a standby.  SQLite
waits for nothing but locks, and has a limit of its own for that.
"""

from __future__ import annotations

import math
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

__all__ = ['CONTENT_SECONDS', 'LONG_SECONDS', 'LOOK_SECONDS', 'NEWS_SECONDS', 'STATEMENT_SECONDS', 'Deadlines']

#: How long a statement about a few messages may take.
STATEMENT_SECONDS = 15

#: The same, with contents.
CONTENT_SECONDS = 120

#: The same, if it reads the whole table.
LOOK_SECONDS = 60

#: The same, if it changes the whole table, or moves contents.
LONG_SECONDS = 600

#: The same, for notifications.
NEWS_SECONDS = 5

#: How long a cancelled statement may take to end before its connection is shut down, in seconds.
GRACE_SECONDS = 1

#: A statement that fails after this many seconds has waited for something; the next ones must not wait one by one.
SLOW_SECONDS = 2

#: How long after that no statement is begun, in seconds.
SILENCE_SECONDS = 0.2

#: How long the thread sleeps at most, in seconds.
IDLE_SECONDS = 60


class _Watched:
    """One piece of work, which has a deadline by :func:`time.monotonic`."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.has_passed = False
        # The connection of the driver; None while it is being made.
        self.raw: Any = None


class Deadlines:
    """
    The deadlines of one database.  Every method may be called from any thread.

    :param can_cancel: whether a statement under way can be ended from another thread
    :param cancel: asks the server for that, given a connection and how many seconds it may take; None if the driver
        cannot, or would block all other threads until the server has answered, as psycopg2
    """

    def __init__(self, *, can_cancel: bool, cancel: Callable[[Any, float], None] | None) -> None:
        self._can_cancel = can_cancel
        self._cancel = cancel
        self.start_anew()

    def start_anew(self) -> None:
        """Start without work, also in a forked child: the work under way is the parent's."""
        # Held under its own name: an interruption may keep a Condition from releasing it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._watched: set[_Watched] = set()
        # The work of each thread.
        self._current: dict[int, _Watched] = {}
        # A second descriptor for each connection: closing the first one does not wait for this thread.
        self._sockets: weakref.WeakKeyDictionary[Any, socket.socket] = weakref.WeakKeyDictionary()
        self._thread: threading.Thread | None = None
        self._wakes_at = math.inf
        self._end = math.inf
        self._silent_until = -math.inf

    def hurry(self, seconds: float) -> None:
        """End all work, under way or begun later, within this many seconds; ``inf`` is the default."""
        with self._lock:
            self._end = time.monotonic() + seconds
            self._silent_until = -math.inf
            self._changed.notify_all()

    @property
    def left(self) -> float:
        """How many seconds are left until the end; ``inf`` without one."""
        return max(0.0, self._end - time.monotonic())

    def close(self) -> None:
        """End the thread; the next work starts another one."""
        with self._lock:
            self._thread = None
            self._changed.notify_all()

    @contextmanager
    def within(self, seconds: float) -> Iterator[_Watched]:
        """
        Watch the work of this thread on one connection, which may take this many seconds.

        Raises TimeoutError: instead of what the work raises when its time is over, or at once if there is no time.
        """
        began = time.monotonic()
        watched = _Watched(began + seconds)
        self._begin(watched, began)
        try:
            yield watched
        except Exception as error:
            if isinstance(error, SQLAlchemyError) and time.monotonic() - began > SLOW_SECONDS:
                self._be_silent()
            if watched.has_passed:
                raise TimeoutError from error
            raise
        finally:
            with self._lock:
                self._watched.discard(watched)
                self._current.pop(threading.get_ident(), None)
            if watched.has_passed:
                self._be_silent()

    def _be_silent(self) -> None:
        self._silent_until = time.monotonic() + SILENCE_SECONDS

    def _begin(self, watched: _Watched, now: float) -> None:
        with self._lock:
            if now < self._silent_until or now >= self._end:
                raise TimeoutError
            # An interruption may have left the previous work here.
            if (left := self._current.get(threading.get_ident())) is not None:
                self._watched.discard(left)
            self._watched.add(watched)
            self._current[threading.get_ident()] = watched
            if self._can_cancel:
                self._see_to_thread(watched)

    def note(self, raw: Any) -> None:
        """Note a new connection of the driver, which the work of this thread uses."""
        # Too many open files: then the work can only be cancelled.
        with suppress(OSError), self._lock:
            self._sockets[raw] = opened = socket.fromfd(raw.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)
            # A connection that SQLAlchemy cannot use is dropped without being closed.
            weakref.finalize(raw, opened.close).atexit = False
        if (watched := self._current.get(threading.get_ident())) is not None:
            self.attach(watched, raw)

    def forget(self, raw: Any, *_: Any) -> None:
        """Forget a connection that is about to be closed."""
        with self._lock:
            opened = self._sockets.pop(raw, None)
            if opened is not None:
                opened.close()

    def attach(self, watched: _Watched, raw: Any) -> None:
        """Note which connection a piece of work uses.  Raises TimeoutError if its time is over."""
        with self._lock:
            if watched.has_passed:
                raise TimeoutError
            # An interruption, again: no other work uses this connection.
            self._watched -= {it for it in self._watched if it.raw is raw and it is not watched}
            watched.raw = raw

    def check(self) -> None:
        """Raise TimeoutError if the time of this thread's work is over, though nothing has failed."""
        if self._current[threading.get_ident()].has_passed:
            raise TimeoutError

    def abandon(self) -> None:
        """Close the connection that this thread has just made: SQLAlchemy cannot use it, and does not close it."""
        raw = self._current[threading.get_ident()].raw
        if raw is not None:
            raw.close()

    def lift(self) -> None:
        """Lift the time limit of the work of this thread."""
        with self._lock:
            self._watched.discard(self._current[threading.get_ident()])

    # -- the thread

    def _see_to_thread(self, watched: _Watched) -> None:
        if self._thread is None or not self._thread.is_alive():
            arguments = weakref.ref(self), self._changed
            thread = threading.Thread(target=_watch, args=arguments, name='mailqueue-deadlines', daemon=True)
            # Too many threads, or the interpreter is about to end: then there is no limit.
            with suppress(RuntimeError):
                thread.start()
                self._thread = thread
        elif min(watched.deadline, self._end) < self._wakes_at:
            self._changed.notify_all()

    def look(self) -> float | None:
        """End overdue work; return in how many seconds to look again, None to end the thread.  Called with the lock."""
        if self._thread is not threading.current_thread():
            return None
        now = time.monotonic()
        for watched in [*self._watched]:
            if now >= min(watched.deadline, math.inf if watched.has_passed else self._end):
                self._cut(watched, now)
        deadlines = (min(it.deadline, math.inf if it.has_passed else self._end) for it in self._watched)
        self._wakes_at = min(now + IDLE_SECONDS, *deadlines, math.inf)
        return self._wakes_at - now

    def _cut(self, watched: _Watched, now: float) -> None:
        if watched.has_passed:
            watched.deadline = math.inf
            # Under the lock: it is not closed meanwhile.
            if (opened := self._sockets.get(watched.raw)) is not None:
                with suppress(OSError):
                    opened.shutdown(socket.SHUT_RDWR)
            return
        watched.has_passed = True
        watched.deadline = now + GRACE_SECONDS
        if watched.raw is not None and self._cancel is not None:
            # In a thread: it asks the server, which may not answer.
            canceller = threading.Thread(
                target=_cancel, args=(self._cancel, watched.raw), name='mailqueue-cancel', daemon=True
            )
            with suppress(RuntimeError):
                canceller.start()


def _watch(reference: weakref.ref[Deadlines], changed: threading.Condition) -> None:
    with changed:
        while (deadlines := reference()) is not None and (seconds := deadlines.look()) is not None:
            del deadlines
            changed.wait(seconds)


def _cancel(cancel: Callable[[Any, float], None], raw: Any) -> None:
    """Ask the server to end a statement.  Where that cannot be done, its connection is shut down a little later."""
    # Errors of the driver do not matter: it was only an attempt.
    with suppress(Exception):
        cancel(raw, GRACE_SECONDS)
