"""
What delivers the mail of a transaction that has just committed.

``inline``
    The thread of the request, before it returns.

``background``
    One delivery thread for each mailer of the process.  It is started with the first mail after a fork, reuses a warm
    SMTP session, streams messages that come fast, and takes at most :data:`MAX_CLAIMS` claims; more than that wait for
    mq-run.  It ends after :data:`IDLE` seconds without work, or when its mailer is gone.  A message is begun when its
    turn comes: what only waits for the thread is no orphan if the process dies.

``queue``
    Nothing; there is no dispatcher for it.

When the process ends, a line of the log says how many messages its thread leaves to mq-run.

While the server is in trouble, or ``mailqueue.rate_limit`` allows no more, a message is released at once: it waits, as
it was, where mq-run finds it.  The delivery thread claims it again after that, if it still waits then.
"""

from __future__ import annotations

import atexit
import math
import os
import queue
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from zope.interface import implementer

from pyramid_mailqueue.delivery.backoff import BackOff
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.report import what_waits
from pyramid_mailqueue.exceptions import MailqueueError, ServerTrouble
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.interfaces import IClaim, IDispatcher, IMailQueue
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.results import SendResult

__all__ = ['BackgroundDispatcher', 'InlineDispatcher', 'threads_run_here']

log = Log('mailqueue.delivery')

#: How many claims may wait for the delivery thread, and how many messages it remembers over a pause.
MAX_CLAIMS = 256

#: How long the end of the process may wait for the message in hand, in seconds.
STOP_SECONDS = 5

#: And how long, when its connection was broken off, for the thread to release what it has, in seconds.
ABORT_SECONDS = 1

#: How long the end of the process waits for a queue that does not answer, when the thread has ended, in seconds.
QUEUE_SECONDS = 3

#: How long the delivery thread waits for the next message before it ends, in seconds.
IDLE = 5


@implementer(IDispatcher)
class InlineDispatcher:
    """See `IDispatcher`.  Delivers in the calling thread."""

    def __init__(self, handler: MessageHandler, mail_queue: IMailQueue) -> None:
        self._handler = handler
        self._mail_queue = mail_queue

    def dispatch(self, claims: Sequence[IClaim]) -> None:
        """See `IDispatcher`."""
        left = deque(claims)
        try:
            _Delivery(self._handler, lambda: left.popleft() if left else None).work()
        finally:
            # A request can be cut short in the middle (by the timeout of its server): the other claims end, too.
            for claim in claims:
                claim.release()
            self._mail_queue.flush()

    def close(self) -> None:
        """See `IDispatcher`."""
        self._handler.close()


def _do_nothing(*_: object) -> None:
    return None


class _Delivery:
    """
    What one thread of a dispatcher delivers; see `Source`.

    :param next_claim: returns None if there is no more at once
    :param postpone: called with a claim that has ended because its message could not be tried now
    :param at_rest: called when an attempt is over and nothing else is in hand
    :param is_over: whether to end as soon as the message in hand is done
    """

    def __init__(
        self,
        handler: MessageHandler,
        next_claim: Callable[[], IClaim | None],
        *,
        postpone: Callable[[IClaim], None] = _do_nothing,
        at_rest: Callable[[], None] = _do_nothing,
        is_over: Callable[[], bool] = bool,
    ) -> None:
        self._handler = handler
        self._next_claim = next_claim
        self._postpone = postpone
        self._at_rest = at_rest
        self._is_over = is_over
        # Not begun: a connection is opened for it.
        self._first: IClaim | None = None
        self._in_hand: dict[str, IClaim] = {}
        self._left = 0
        self._told: ServerTrouble | None = None

    def work(self) -> None:
        """
        Deliver until there is nothing more to do.  A defect ends only the attempts at what is in hand.

        What is no Exception (Ctrl-C, the time limit of a server) is a request to end, and ends this.
        """
        while True:
            try:
                self._handler.engine().run(self)
            except Exception:
                if not self._in_hand:
                    raise
                names = ', '.join(self._in_hand)
                log.critical('A defect of pyramid_mailqueue: %s could not be delivered', names, exc_info=True)
            else:
                return
            finally:
                self._release()

    def _release(self) -> None:
        if self._first is not None:
            self._in_hand[self._first.id] = self._first
            self._first = None
        for claim in self._in_hand.values():
            claim.release()
        self._left += len(self._in_hand)
        self._in_hand.clear()

    @property
    def left(self) -> int:
        """How many messages were released undelivered, or are in hand."""
        return self._left + len(self._in_hand) + (self._first is not None)

    # --- see `Source` ---

    @property
    def is_over(self) -> bool:
        return self._is_over()

    @property
    def rate_seconds(self) -> float:
        # What has to wait for it is postponed.
        return 0.0

    def look(self, number: int) -> int:
        while self._handler.backoff_seconds and (claim := self._given()) is not None:
            claim.release()
            self._postpone(claim)
        if self._first is None:
            self._first = self._given()
        return 0 if self._first is None else 1

    def next(self) -> IClaim | None:
        while (claim := self._given()) is not None:
            self._in_hand[claim.id] = claim
            if not self._handler.backoff_seconds and claim.begin() and self._handler.may_send(claim):
                return claim
            claim.release()
            del self._in_hand[claim.id]
            self._postpone(claim)
        return None

    def _given(self) -> IClaim | None:
        claim, self._first = self._first, None
        return claim or self._next_claim()

    def pause(self) -> float | None:
        return None

    def ended(self, claim: IClaim, result: SendResult | None) -> None:
        self._in_hand.pop(claim.id, None)
        if result is None:
            self._left += self.is_over
        elif result.trouble is not None:
            self._tell(claim, result, result.trouble)
        elif self.is_over and result.deferred:
            self._left += 1
        if not self._in_hand:
            self._at_rest()

    def _tell(self, claim: IClaim, result: SendResult, trouble: ServerTrouble) -> None:
        # When this process ends it may have broken off the connection itself.
        if trouble is not self._told and not self.is_over:
            log.warning('%s %s', trouble, what_waits(claim.id, result))
        self._told = trouble
        # A message during which the server broke off is left to mq-run, which tries it behind all others.
        if self._handler.backoff_seconds or not trouble.in_message:
            self._postpone(claim)
        else:
            self._left += 1


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
        patience: float = STOP_SECONDS,
        idle: float = IDLE,
    ) -> None:
        self._handler = handler
        self._mail_queue = mail_queue
        self._max_claims = max_claims
        self._patience = patience
        self._idle = idle
        self._closing = False
        self._make_lock()
        # While the queue cannot be asked for what was postponed.
        self._queue_backoff = BackOff()
        self._start_anew()
        call_in_children(self._make_lock)
        at_exit = partial(_close, weakref.ref(self))
        atexit.register(at_exit)
        weakref.finalize(self, atexit.unregister, at_exit).atexit = False

    def _make_lock(self) -> None:
        # Guards everything but the deliveries themselves.
        self._lock = threading.Lock()

    def _start_anew(self) -> None:
        self._pid = os.getpid()
        # What waits keeps its dispatcher alive; None wakes the thread, to look at what has changed.
        self._claims: _Waiting = queue.SimpleQueue()
        self._next: IClaim | None = None
        self._postponed: deque[str] = deque()
        self._thread: threading.Thread | None = None
        self._delivery: _Delivery | None = None
        # How many messages are left to mq-run, besides those that are remembered; since the thread was idle.
        self._left = 0

    def _forget_parent(self) -> None:
        """
        In a forked child: the thread, and what waits for it, are the parent's.

        Seen by the process id, because not every server that forks notifies Python (uWSGI does not).
        """
        if self._pid != os.getpid():
            self._start_anew()

    def dispatch(self, claims: Sequence[IClaim]) -> None:
        """See `IDispatcher`."""
        left = deque(claims)
        try:
            while left:
                claim = left.popleft()
                if not self._take(claim):
                    claim.release()
                    self._postpone(claim)
        except BaseException:
            # A request can be cut short here.  What was put into the queue is the thread's.
            for claim in left:
                claim.release()
            raise

    def _take(self, claim: IClaim) -> bool:
        with self._lock:
            self._forget_parent()
            if self._closing or self._handler.backoff_seconds or self._claims.qsize() >= self._max_claims:
                return False
            if not self._has_thread():
                return False
            self._claims.put((self, claim))
            return True

    def _postpone(self, claim: IClaim) -> None:
        """Have the thread claim a released message again after the pause, if it is a pause that made it wait."""
        with self._lock:
            if self._closing or not self._handler.backoff_seconds or not self._has_thread():
                self._left += 1
                return
            self._remember(claim)
            # The thread may be waiting for something new, and for longer than the pause.
            if self._claims.empty():
                self._claims.put(None)

    def _put_off(self, claim: IClaim) -> None:
        with self._lock:
            self._remember(claim)

    def _remember(self, claim: IClaim) -> None:
        # Beyond that the first ones are kept: they have waited longest.
        if len(self._postponed) < self._max_claims:
            self._postponed.append(claim.id)
        else:
            self._left += 1

    def _has_thread(self) -> bool:
        """Start the thread if there is none; False if that fails."""
        if self._thread is not None and self._thread.is_alive():
            return True
        # A daemon: the interpreter waits for other threads before it runs the functions of atexit, which end this one.
        claims = self._claims
        reference = weakref.ref(self, lambda _: claims.put(None))
        arguments = (reference, claims, self._handler)
        thread = threading.Thread(target=_run, args=arguments, name='mailqueue-delivery', daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # Too many threads, or the interpreter is about to end.
            log.warning('No delivery thread can be started (%s); mail waits in the queue, for mq-run', error)
            return False
        self._thread = thread
        return True

    def work(self, claim: IClaim | None) -> float:
        """
        Deliver *claim*, and what else there is; return how many seconds to wait for more.

        Called by the delivery thread, which goes on with what waits, whatever happens here.
        """
        self._next = claim
        self._delivery = delivery = _Delivery(
            self._handler,
            self._next_claim,
            postpone=self._put_off,
            at_rest=self._flush_if_idle,
            is_over=lambda: self._closing,
        )
        try:
            delivery.work()
        except BaseException:
            log.critical('The delivery thread was about to end, and goes on', exc_info=True)
        with self._lock:
            self._left += delivery.left
            # It refers to this object, which may not be needed any more.
            self._delivery = None
        return max(self._handler.backoff_seconds, self._queue_backoff.seconds) if self._postponed else self._idle

    def _flush_if_idle(self) -> None:
        if self._claims.empty():
            self._mail_queue.flush()

    def _next_claim(self) -> IClaim | None:
        """Return what is to be delivered next, if there is something at once."""
        claim, self._next = self._next, None
        if claim is not None or self._closing:
            return claim
        if (claim := self._resumed_claim()) is not None:
            return claim
        with suppress(queue.Empty):
            while True:
                if (waiting := self._claims.get_nowait()) is not None:
                    return waiting[1]
        return None

    def may_end(self, *, is_idle: bool) -> bool:
        """Whether the delivery thread may end; then the next mail starts another one."""
        with self._lock:
            if self._closing:
                return True
            if not is_idle or not self._claims.empty() or self._postponed:
                return False
            self._thread = None
            self._left = 0
            return True

    def _resumed_claim(self) -> IClaim | None:
        """Return a claim of what waits since a server's trouble, if that is over and it can still be claimed."""
        while self._postponed and not (self._handler.backoff_seconds or self._queue_backoff.seconds):
            try:
                claim = self._mail_queue.claim(self._postponed[0])
            except MailqueueError as error:
                if not self._queue_backoff.is_in_trouble:
                    log.error('%s Postponed mail waits in it, until it is back.', error)
                self._queue_backoff.begin(ServerTrouble(str(error)))
                return None
            self._queue_backoff.end()
            self._postponed.popleft()
            if claim is not None:
                return claim
        return None

    def close(self) -> None:
        """
        See `IDispatcher`.

        Waits for the message in hand, but not for ever: then its connection is broken off.  With a transport that
        cannot be broken off it stays claimed until the process has ended, and the next mq-run claims it.
        """
        with self._lock:
            self._forget_parent()
            if self._closing:
                return
            self._closing = True
            thread = self._thread
        self._mail_queue.hurry(self._patience + ABORT_SECONDS)
        self._release_waiting()
        self._claims.put(None)
        if thread is not None:
            thread.join(self._patience)
            if thread.is_alive():
                self._handler.abort()
                thread.join(ABORT_SECONDS)
        self._mail_queue.hurry(QUEUE_SECONDS)
        self._mail_queue.flush()
        # The queue may still be in use.
        self._mail_queue.hurry(math.inf)
        if thread is None or not thread.is_alive():
            self._handler.close()
        self._tell_left()

    def _tell_left(self) -> None:
        left = self._left + len(self._postponed)
        if self._delivery is not None:
            left += self._delivery.left
        if left:
            log.warning(
                'Messages left in the queue for mq-run, because this process stops delivering: %d. In a script set '
                'mailqueue.delivery = inline, which delivers them before the commit returns.',
                left,
            )

    def _release_waiting(self) -> None:
        released = 0
        while True:
            try:
                waiting = self._claims.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting[1].release()
                released += 1
        with self._lock:
            self._left += released


_Waiting = queue.SimpleQueue[tuple[BackgroundDispatcher, IClaim] | None]


def _run(reference: weakref.ref[BackgroundDispatcher], claims: _Waiting, handler: MessageHandler) -> None:
    """
    Run the delivery thread.

    It keeps its dispatcher alive only while there is something to do, and ends when the dispatcher is gone.
    """
    waiting: tuple[BackgroundDispatcher | None, IClaim | None] | None = (reference(), None)
    while True:
        dispatcher, claim = waiting or (reference(), None)
        if dispatcher is None:
            for route in handler.routes:
                route.transport.close()
            return
        seconds = dispatcher.work(claim)
        if dispatcher.may_end(is_idle=False):
            return
        waiting = dispatcher = claim = None
        try:
            waiting = claims.get(timeout=seconds)
        except queue.Empty:
            found = reference()
            if found is not None and found.may_end(is_idle=True):
                return
            del found


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
