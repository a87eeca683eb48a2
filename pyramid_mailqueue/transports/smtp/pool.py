"""The sessions of this process with one mail server."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.transports.smtp.server import shut_down

if TYPE_CHECKING:
    import socket

    from pyramid_mailqueue.transports.smtp.session import Session

__all__ = ['Opening', 'Pool']

#: How long a server may take to answer QUIT, in seconds.
QUIT_PATIENCE = 1.0


class Opening:
    """
    A connection that is being opened.

    :ivar socket: its present socket, if there is one
    :ivar is_given_up: it was broken off
    """

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.is_given_up = False


class Pool:
    """
    The sessions of this process, in use and idle; the one that was used last is taken first.

    A timer closes those that are idle for too long.  A forked child closes its copies of the sockets and sends nothing:
    the sessions are its parent's.
    """

    def __init__(self, idle_timeout: float, clock: Callable[[], float]) -> None:
        self._idle_timeout = idle_timeout
        self._clock = clock
        self._start_anew()
        call_in_children(self._drop_inherited)

    def _start_anew(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._openings: set[Opening] = set()
        self._open: set[Session] = set()
        self._idle: list[Session] = []
        self._timer: threading.Timer | None = None

    def _drop_inherited(self) -> None:
        sessions, openings = self._open, self._openings
        self._start_anew()
        for session in sessions:
            session.close()
        for opening in openings:
            if opening.socket is not None:
                opening.socket.close()

    @contextmanager
    def opening(self) -> Iterator[Opening]:
        """While in this block, a connection is opened, and may be broken off by :meth:`abort`."""
        opening = Opening()
        with self._lock:
            self._openings.add(opening)
        try:
            yield opening
        finally:
            with self._lock:
                self._openings.discard(opening)

    def note(self, opening: Opening, sock: socket.socket) -> None:
        """Note the socket of a connection that is being opened.  Raises ServerTrouble if it was broken off."""
        with self._lock:
            if opening.is_given_up:
                raise ServerTrouble('The connection was given up by this process.')
            opening.socket = sock

    def add(self, session: Session, opening: Opening) -> bool:
        """Add a new session, in use; False if it was broken off while it was opened."""
        with self._lock:
            if opening.is_given_up:
                return False
            self._open.add(session)
            return True

    def take(self) -> Session | None:
        """Return a session that was idle and is alive, if there is one."""
        if self._pid != os.getpid():
            # Not every server that forks notifies Python (uWSGI does not).
            self._drop_inherited()
        self._close_expired()
        while True:
            with self._lock:
                if not self._idle:
                    return None
                session = self._idle.pop()
            if session.is_alive:
                return session
            self.discard(session)

    def give_back(self, session: Session) -> None:
        """Keep *session* for the next message, if it is fit for that."""
        with self._lock:
            # Not one that was discarded, and that no new session could replace.
            if session in self._open and session.is_idle:
                session.idle_since = self._clock()
                self._idle.append(session)
                self._start_timer()
                return
        self.discard(session)

    def discard(self, session: Session) -> None:
        """Close a session that broke, or is of no use any more."""
        with self._lock:
            self._open.discard(session)
        session.close()

    def abort(self) -> None:
        """Break off the connections that other threads open or use; those that are idle are kept."""
        with self._lock:
            for opening in self._openings:
                opening.is_given_up = True
                # With the lock held, so that this is no other connection's by now.
                if opening.socket is not None:
                    shut_down(opening.socket)
            in_use = self._open.difference(self._idle)
        for session in in_use:
            session.shut_down()

    def close(self) -> None:
        """Close all idle sessions."""
        with self._lock:
            idle, self._idle = self._idle, []
            timer, self._timer = self._timer, None
        if timer:
            timer.cancel()
        self._quit(idle)

    def _close_expired(self) -> None:
        with self._lock:
            oldest = self._clock() - self._idle_timeout
            expired = [session for session in self._idle if session.idle_since <= oldest]
            self._idle = [session for session in self._idle if session.idle_since > oldest]
        self._quit(expired)

    def _start_timer(self) -> None:
        """Called with the lock held."""
        if self._timer is not None or not self._idle:
            return
        timer = threading.Timer(self._idle[0].idle_since + self._idle_timeout - self._clock(), self._on_timer)
        timer.daemon = True
        # While the interpreter ends there are no new threads, and soon no sessions either.
        with suppress(RuntimeError):
            timer.start()
            self._timer = timer

    def _on_timer(self) -> None:
        self._close_expired()
        with self._lock:
            # Not the timer of close(), which may have been too late to stop this one.
            if self._timer is threading.current_thread():
                self._timer = None
                self._start_timer()

    def _quit(self, sessions: Iterable[Session]) -> None:
        """Send QUIT to all before waiting for any."""
        sessions = list(sessions)
        for session in sessions:
            session.say_quit()
        deadline = self._clock() + QUIT_PATIENCE
        for session in sessions:
            session.hear_out(deadline - self._clock())
        with self._lock:
            self._open.difference_update(sessions)
