"""
Who tries the mail of a transaction that has just committed.

``inline``
    The thread of the request, before it returns.

``background``
    One delivery thread for the process.  It is started with the first mail after a fork, uses a warm SMTP session
    again, and takes at most :data:`MAX_CLAIMS` claims; what is beyond that waits for mq-run.

``queue``
    Nobody; there is no dispatcher for it.

While the server is in trouble, or ``mailqueue.rate_limit`` allows no more, a message is released at once: it waits, as
it was, where mq-run finds it.  The delivery thread comes back to it after that, if nobody else has taken it by then.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence

from zope.interface import implementer

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.interfaces import IClaim, IDispatcher, IMailQueue

__all__ = ['BackgroundDispatcher', 'InlineDispatcher', 'threads_run_here']

log = logging.getLogger('mailqueue.delivery')

#: How many claims may wait for the delivery thread, and how many messages it remembers over a pause.
MAX_CLAIMS = 256

#: How long the end of the process may wait for the message in hand, in seconds.
PATIENCE = 5

#: How long the delivery thread waits for the next message before it ends, in seconds.
IDLE = 60


@implementer(IDispatcher)
class InlineDispatcher:
    """See `IDispatcher`.  Delivers in the calling thread."""

    def __init__(self, handler: MessageHandler, mail_queue: IMailQueue) -> None:
        self._handler = handler
        self._mail_queue = mail_queue

    def dispatch(self, claims: Sequence[IClaim]) -> None:
        """See `IDispatcher`."""
        try:
            for claim in claims:
                try_one(self._handler, claim)
        finally:
            # A request can be cut short in the middle (by the timeout of its server): nobody comes back to the others.
            for claim in claims:
                claim.release()
            self._mail_queue.flush()

    def close(self) -> None:
        """See `IDispatcher`."""
        self._handler.close()


def try_one(handler: MessageHandler, claim: IClaim) -> bool:
    """
    Deliver one claim, or release it if that cannot be done now; return whether it has to wait because of that.

    Raises no Exception.
    """
    try:
        if handler.rests_for or not handler.may_send(claim):
            return True
        result = handler.deliver(claim)
        if result.trouble is not None:
            log.warning('%s Mail waits in the queue.', result.trouble)
            return True
    except (Exception, SystemExit):
        log.critical('A defect of pyramid_mailqueue: %s could not be delivered', claim.id, exc_info=True)
    finally:
        # A settled claim has ended already, and does nothing.
        claim.release()
    return False


@implementer(IDispatcher)
class BackgroundDispatcher:
    """
    See `IDispatcher`.  Delivers in a thread of its own.

    :param max_claims: how many claims may wait for the thread
    :param patience: how long :meth:`close` waits for the message in hand, in seconds
    :param idle: the thread ends when it had nothing to do for so many seconds; the next mail starts another one
    """

    def __init__(
        self,
        handler: MessageHandler,
        mail_queue: IMailQueue,
        *,
        max_claims: int = MAX_CLAIMS,
        patience: float = PATIENCE,
        idle: float = IDLE,
    ) -> None:
        self._handler = handler
        self._mail_queue = mail_queue
        self._max_claims = max_claims
        self._patience = patience
        self._idle = idle
        self._closing = False
        self._make_lock()
        self._start_anew()
        call_in_children(self._make_lock)
        atexit.register(_close, weakref.ref(self))

    def _make_lock(self) -> None:
        # Guards everything but the deliveries themselves.
        self._lock = threading.Lock()

    def _start_anew(self) -> None:
        self._pid = os.getpid()
        # None wakes the thread, to look at what has changed.
        self._claims: queue.SimpleQueue[IClaim | None] = queue.SimpleQueue()
        self._postponed: deque[str] = deque()
        self._thread: threading.Thread | None = None

    def _forget_parent(self) -> None:
        """
        In a forked child: the thread, and what waits for it, are the parent's.

        Seen by the process id, because not every server that forks tells Python of it (uWSGI does not).
        """
        if self._pid != os.getpid():
            self._start_anew()

    def dispatch(self, claims: Sequence[IClaim]) -> None:
        """See `IDispatcher`."""
        for claim in claims:
            if not self._take(claim):
                claim.release()
                self._postpone(claim)

    def _take(self, claim: IClaim) -> bool:
        with self._lock:
            self._forget_parent()
            if self._closing or self._handler.rests_for or self._claims.qsize() >= self._max_claims:
                return False
            if not self._has_thread():
                return False
            self._claims.put(claim)
            return True

    def _postpone(self, claim: IClaim) -> None:
        """Have the thread come back to a released claim after the pause, if it is a pause that made it wait."""
        with self._lock:
            if not self._closing and self._handler.rests_for and self._has_thread():
                self._remember(claim)
                # The thread may be waiting for something new, and for longer than the pause.
                if self._claims.empty():
                    self._claims.put(None)

    def _remember(self, claim: IClaim) -> None:
        # Beyond that the first ones are kept: they have waited longest.
        if len(self._postponed) < self._max_claims:
            self._postponed.append(claim.id)

    def _has_thread(self) -> bool:
        """Start the thread if there is none; False if that cannot be."""
        if self._thread is not None and self._thread.is_alive():
            return True
        # A daemon: the interpreter waits for other threads before it calls what atexit knows, which is where this one
        # is told to end.
        thread = threading.Thread(target=self._run, name='mailqueue-delivery', daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # Too many threads, or the interpreter is about to end.
            log.warning('No delivery thread can be started (%s); mail waits in the queue, for mq-run', error)
            return False
        self._thread = thread
        return True

    def _run(self) -> None:
        try:
            while (claim := self._next_claim()) is not None:
                if try_one(self._handler, claim):
                    self._remember(claim)
                if self._claims.empty():
                    self._mail_queue.flush()
        except BaseException:
            # A thread that does not end by its own decision must not take along what waits for it.
            self._release_waiting()
            raise

    def _next_claim(self) -> IClaim | None:
        """Return what is to be delivered next; None when the thread is to end."""
        while not self._closing:
            if (claim := self._resumed_claim()) is not None:
                return claim
            try:
                claim = self._claims.get(timeout=self._handler.rests_for if self._postponed else self._idle)
            except queue.Empty:
                if self._is_idle():
                    return None
            if claim is not None:
                return claim
        return None

    def _is_idle(self) -> bool:
        """Whether the thread may end; then the next mail starts another one."""
        with self._lock:
            if not self._claims.empty() or self._postponed:
                return False
            self._thread = None
            return True

    def _resumed_claim(self) -> IClaim | None:
        """Return what waits since a server's trouble, if that is over and nobody else has taken it."""
        while self._postponed and not self._handler.rests_for:
            claim = self._mail_queue.claim(self._postponed.popleft())
            if claim is not None:
                return claim
        return None

    def close(self) -> None:
        """
        See `IDispatcher`.

        Waits for the message in hand, but not for ever: what is still claimed when the process ends, the kernel
        releases, and mq-run takes it up at its next run.
        """
        with self._lock:
            self._forget_parent()
            if self._closing:
                return
            self._closing = True
            thread = self._thread
        self._release_waiting()
        self._claims.put(None)
        if thread is not None:
            thread.join(self._patience)
        self._mail_queue.flush()
        if thread is None or not thread.is_alive():
            self._handler.close()

    def _release_waiting(self) -> None:
        while True:
            try:
                claim = self._claims.get_nowait()
            except queue.Empty:
                return
            if claim is not None:
                claim.release()


def _close(reference: weakref.ref[BackgroundDispatcher]) -> None:
    dispatcher = reference()
    if dispatcher is not None:
        dispatcher.close()


def threads_run_here() -> bool:
    """
    Whether a thread that a request starts goes on when the request is over.

    Under uWSGI it may not: without ``enable-threads`` (older versions) or ``threads`` the interpreter runs only while
    a request is in hand.
    """
    uwsgi = sys.modules.get('uwsgi')
    has_threads = getattr(uwsgi, 'has_threads', None)
    if has_threads is not None:
        return bool(has_threads)
    options = getattr(uwsgi, 'opt', None)
    if options is None:
        return True
    names = {name.decode() if isinstance(name, bytes) else name for name in options}
    return bool(names & {'enable-threads', 'threads'})
