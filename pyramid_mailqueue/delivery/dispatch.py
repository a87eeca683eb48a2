"""
Who tries the mail of a transaction that has just committed.

``inline``
    The thread of the request, before it returns.

``background``
    One delivery thread for the process.  It is started with the first mail after a fork, holds a warm SMTP session,
    and takes at most :data:`MAX_CLAIMS` claims; what is beyond that waits for mq-run.

``queue``
    Nobody; there is no dispatcher for it.

While the server is in trouble a message is released at once: it waits, as it was, where mq-run finds it.
"""

from __future__ import annotations

import atexit
import logging
import queue
import sys
import threading
import weakref
from collections.abc import Sequence

from zope.interface import implementer

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.interfaces import IClaim, IDispatcher, IMailQueue

__all__ = ['BackgroundDispatcher', 'InlineDispatcher', 'threads_run_here']

log = logging.getLogger('mailqueue.delivery')

#: How many claims may wait for the delivery thread.
MAX_CLAIMS = 256

#: How long the end of the process may wait for the message in hand, in seconds.
PATIENCE = 5


@implementer(IDispatcher)
class InlineDispatcher:
    """See `IDispatcher`.  Delivers in the calling thread."""

    def __init__(self, handler: MessageHandler, mail_queue: IMailQueue) -> None:
        self._handler = handler
        self._mail_queue = mail_queue

    def dispatch(self, claims: Sequence[IClaim]) -> None:
        """See `IDispatcher`."""
        for claim in claims:
            try_one(self._handler, claim)
        self._mail_queue.flush()

    def close(self) -> None:
        """See `IDispatcher`."""
        self._handler.close()


def try_one(handler: MessageHandler, claim: IClaim) -> None:
    """Deliver one claim, or release it while the server is in trouble.  Never raises."""
    if handler.is_paused:
        claim.release()
        return
    try:
        result = handler.deliver(claim)
        if result.trouble is not None:
            log.warning('%s; mail waits in the queue, for mq-run', result.trouble)
    except Exception:
        log.critical('A defect of pyramid_mailqueue: %s could not be delivered', claim.id, exc_info=True)
        claim.release()


@implementer(IDispatcher)
class BackgroundDispatcher:
    """
    See `IDispatcher`.  Delivers in a thread of its own.

    :param patience: how long :meth:`close` waits for the message in hand, in seconds
    """

    def __init__(
        self,
        handler: MessageHandler,
        mail_queue: IMailQueue,
        *,
        max_claims: int = MAX_CLAIMS,
        patience: float = PATIENCE,
    ) -> None:
        self._handler = handler
        self._mail_queue = mail_queue
        self._max_claims = max_claims
        self._patience = patience
        self._start_anew()
        call_in_children(self._start_anew)
        atexit.register(_close, weakref.ref(self))

    def _start_anew(self) -> None:
        """No thread, and nothing to do: as in a new process, and in a forked child, which has none of our threads."""
        self._lock = threading.Lock()
        self._claims: queue.SimpleQueue[IClaim | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = False

    def dispatch(self, claims: Sequence[IClaim]) -> None:
        """See `IDispatcher`."""
        for claim in claims:
            if self._has_room:
                self._claims.put(claim)
            else:
                claim.release()
        self._start_thread()

    @property
    def _has_room(self) -> bool:
        return not self._closing and not self._handler.is_paused and self._claims.qsize() < self._max_claims

    def _start_thread(self) -> None:
        with self._lock:
            if self._thread is None and not self._closing and not self._claims.empty():
                # A daemon: the interpreter waits for other threads before it calls what atexit knows, which is
                # where this one is told to end.
                self._thread = threading.Thread(target=self._run, name='mailqueue-delivery', daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while (claim := self._claims.get()) is not None:
            if self._closing:
                claim.release()
                continue
            try_one(self._handler, claim)
            if self._claims.empty():
                self._mail_queue.flush()

    def close(self) -> None:
        """
        See `IDispatcher`.

        Waits for the message in hand, but not for ever: what is still claimed when the process ends, the kernel
        releases, and mq-run takes it up at its next run.
        """
        with self._lock:
            thread, self._closing = self._thread, True
        self._claims.put(None)
        if thread is not None:
            thread.join(self._patience)
        self._release_waiting()
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

    Under uWSGI it does not, unless ``enable-threads`` or ``threads`` is set: the interpreter then runs only while a
    request is in hand.
    """
    uwsgi = sys.modules.get('uwsgi')
    options = getattr(uwsgi, 'opt', None)
    if options is None:
        return True
    names = {name.decode() if isinstance(name, bytes) else name for name in options}
    return bool(names & {'enable-threads', 'threads'})
