"""
One run over a queue: take care of what dead processes left, then try whatever is due, oldest first.

A run begins with one deliverer, and so with one connection.  When the first message has had its outcome the server is
known to work, and as many others as there are to be open a session too, and then begin with what is due next; each of
them keeps one session busy.  One whose session cannot be opened, or is one too many for the server, leaves everything
to the others and ends.  One that is still opening its session when everything is done is not waited for.

Each begins in a thread of its own, where it connects; as soon as it waits for the server it goes on in the one thread
that waits for all of them (see :mod:`~.waiting`).  Over a transport that does not say when it waits it stays where it
is.

The run ends when nothing is due any more; when it was told to; or when the server is in trouble: what is left then
waits as it is, because the next message would fare no better.  A server that breaks off in the midst of a message is
given a few others first.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.report import what_waits
from pyramid_mailqueue.delivery.supply import Share, Supply
from pyramid_mailqueue.delivery.waiting import Loop, Wait, Work
from pyramid_mailqueue.exceptions import ConfigurationError, QueueError, ServerTrouble
from pyramid_mailqueue.interfaces import IClaim, IMailQueue
from pyramid_mailqueue.logs import Log, log_event, queue_log
from pyramid_mailqueue.queues.base import has_admin
from pyramid_mailqueue.results import Recovery, SendResult, Settlement

__all__ = ['PATIENCE', 'RunReport', 'Runner', 'Stop']

log = Log('mailqueue.delivery')

#: How long a run that was told to end waits for the messages in hand, in seconds.
PATIENCE = 30

#: So many dead letters are removed in one round, at most; and how long a runner does not look again, in seconds.
MOST_EXPIRED = 1000
EXPIRE_EVERY = 600

#: How long it waits for threads whose connections it has broken off.
LAST_PATIENCE = 2


@dataclass
class RunReport:
    """
    What a run did, in messages.

    :param sent: every recipient that was open has it
    :param deferred: at least one recipient waits because of this attempt
    :param refused: at least one recipient is given up, and in a dead letter
    :param trouble: why the run ended early, or did nothing, if the server could not be used
    :param stopped: the run ended early because it was told to
    :param rate_reached: the run ended early because ``mailqueue.rate_limit`` allows no more for a while
    :param recovery: what dead processes had left
    :param done: how many had an outcome; one message may be both deferred and refused
    """

    sent: int = 0
    deferred: int = 0
    refused: int = 0
    trouble: ServerTrouble | None = None
    stopped: bool = False
    rate_reached: bool = False
    recovery: Recovery = field(default_factory=Recovery)
    done: int = field(default=0, compare=False)

    def count(self, settlement: Settlement) -> None:
        """Count one message."""
        is_deferred = bool(settlement.waiting and settlement.counted)
        is_refused = bool(settlement.burials)
        is_sent = not (settlement.waiting or settlement.burials)
        self.sent += is_sent
        self.deferred += is_deferred
        self.refused += is_refused
        self.done += is_sent or is_deferred or is_refused


class Stop:
    """
    Tells a run to end, and wakes whoever waits here.

    :meth:`request` and :meth:`wake` may be called by a signal handler: they take no lock.

    :param on_news: called by the thread that waits, for each news
    :param on_ending: called when a run has begun to end because of it
    """

    def __init__(
        self, on_news: Callable[[], None] = lambda: None, on_ending: Callable[[], None] = lambda: None
    ) -> None:
        self._on_news = on_news
        self.on_ending = on_ending
        self.requested = False
        self.urgent = False
        # Unlike an Event it may be told something by a signal handler that interrupts its own waiting.
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()

    def request(self) -> None:
        """End when the messages in hand are done; at a second call at once."""
        self.urgent = self.requested
        self.requested = True
        self.wake()

    def wake(self) -> None:
        """Let :meth:`wait` return."""
        self._news.put(None)

    def wait(self, seconds: float | None = None) -> None:
        """Return when there is news, or after so many seconds."""
        with suppress(queue.Empty):
            self._news.get(timeout=seconds)
            self._on_news()


class Runner:
    """
    See the module.

    :param queue: what to work on
    :param handler: who delivers
    :param keep_dead: for how many seconds dead letters are kept; None is for ever
    :param clock: seconds since the epoch
    :raises ConfigurationError: *keep_dead* is set, and this queue cannot remove dead letters
    :ivar report: of the last round, also if that has raised
    """

    def __init__(
        self,
        queue: IMailQueue,
        handler: MessageHandler,
        *,
        keep_dead: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.queue = queue
        self.handler = handler
        if keep_dead is not None and not has_admin(queue):
            raise ConfigurationError('mailqueue.keep_dead: this queue cannot remove dead letters (IQueueAdmin.expire).')
        self._keep_dead = keep_dead
        self._expires_from = -math.inf
        self._clock = clock
        self.report = RunReport()
        self._told_in_doubt: frozenset[str] = frozenset()

    def run(
        self,
        stop: Stop | None = None,
        *,
        max_messages: int | None = None,
        max_seconds: float | None = None,
        on_progress: Callable[[RunReport], None] | None = None,
    ) -> RunReport:
        """Make one round, and let go of connections."""
        try:
            return self.round(stop, max_messages=max_messages, max_seconds=max_seconds, on_progress=on_progress)
        finally:
            self.close()

    def round(
        self,
        stop: Stop | None = None,
        *,
        max_messages: int | None = None,
        max_seconds: float | None = None,
        on_progress: Callable[[RunReport], None] | None = None,
    ) -> RunReport:
        """
        Work until nothing is due any more, or the server cannot be used; keep connections for the next round.

        :param stop: ends the round early, when the messages in hand are done
        :param max_messages: begin with no more messages than that
        :param max_seconds: begin with no more messages after so long
        :param on_progress: called after each message
        :raises QueueError: the queue cannot be read
        """
        self.report = report = RunReport()
        supply = None
        stop = stop or Stop()
        self.queue.hurry(math.inf)
        try:
            now = self._clock()
            report.recovery = self._recover(now)
            report.recovery = replace(report.recovery, expired=self._expire(now))
            supply = Supply(
                self.queue.claim_due(now),
                limit=max_messages,
                take_from_rate=self.handler.take_from_rate,
                is_stopped=lambda: stop.requested,
            )
            crew = _Crew(self.handler, supply, stop, report, on_progress, self.queue.hurry)
            crew.work(max_seconds)
        finally:
            if supply is not None:
                supply.release()
            unwritten = self.queue.flush()
        if unwritten is not None:
            raise unwritten
        return report

    def _recover(self, now: float) -> Recovery:
        """Take care of what dead processes left; who looks again every few seconds tells of a doubt only once."""
        found = self.queue.recover(now)
        before, self._told_in_doubt = self._told_in_doubt, frozenset(found.in_doubt + found.half_way)
        told = replace(
            found,
            in_doubt=tuple(name for name in found.in_doubt if name not in before),
            half_way=tuple(name for name in found.half_way if name not in before),
        )
        _log_recovery(told)
        return told

    def _expire(self, now: float) -> tuple[str, ...]:
        """Remove some of the dead letters that are older than they may be."""
        if self._keep_dead is None or now < self._expires_from:
            return ()
        expired = tuple(self.queue.admin.expire(now - self._keep_dead, MOST_EXPIRED))
        if len(expired) < MOST_EXPIRED:
            self._expires_from = now + EXPIRE_EVERY
        return expired

    def close(self) -> None:
        """Let go of connections.  The runner may be used again."""
        self.handler.close()
        self.queue.close()


class _Crew:
    """Those who deliver in one run, and the thread that waits for them."""

    def __init__(
        self,
        handler: MessageHandler,
        supply: Supply,
        stop: Stop,
        report: RunReport,
        on_progress: Callable[[RunReport], None] | None,
        hurry: Callable[[float], None],
    ) -> None:
        self._handler = handler
        self._hurry = hurry
        self._supply = supply
        self._stop = stop
        self._report = report
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._loop = Loop()
        # How many deliver.
        self._at_work = 0
        self._server_works = False
        self._is_server_lost = False
        self._is_cut_short = False
        self._defect: BaseException | None = None

    def work(self, max_seconds: float | None) -> None:
        """Return when the run is over.  Raises what a thread could not cope with."""
        try:
            self._wait_for_all(max_seconds)
        except BaseException:
            # Nobody is to take a message that one of the threads is still delivering.
            self._supply.end()
            self._break_off()
            raise
        error = self._defect or self._supply.error
        if error is not None:
            raise error
        self._report.rate_reached = self._supply.is_rate_reached
        if self._report.done and not self._is_server_lost:
            # The server could be used; what it stumbled over has been told of.
            self._report.trouble = None

    def _wait_for_all(self, max_seconds: float | None) -> None:
        deadline = None if max_seconds is None else time.monotonic() + max_seconds
        # Nobody connects for nothing.
        if self._supply.has_more():
            try:
                self._start_one(self._supply.share())
            except RuntimeError as error:
                raise QueueError(
                    f'No thread can be started to deliver mail ({error}). Check the limits of the user and of the '
                    'service: ulimit -u, TasksMax.'
                ) from error
        has_started_others = False
        while self._at_work and not (self._stop.requested or _has_passed(deadline)):
            if self._server_works and not has_started_others:
                has_started_others = True
                self._start_others(self._handler.connections - 1)
            if not self._is_anybody_busy and not self._supply.needs_sessions():
                break
            self._stop.wait(_until(deadline))
        if _has_passed(deadline) and self._at_work and not (self._report.done or self._is_anybody_busy):
            self._report.trouble = ServerTrouble(f'No session was opened in the {max_seconds:g} seconds of this run.')
        self._end()

    @property
    def _is_anybody_busy(self) -> bool:
        """Whether there is somebody who does more than to open a session."""
        # In this order: nobody is at work no longer while it is counted as opening.
        return self._at_work > self._supply.opening

    def _start_others(self, number: int) -> None:
        """Start so many threads, if there is something to do for them."""
        for _ in range(self._supply.ready(number)):
            share = self._supply.share()
            try:
                self._start_one(share)
            except RuntimeError as error:
                log.warning('No more threads can be started (%s). The run goes on with fewer connections.', error)
                share.lost()
                return

    def _start_one(self, share: Share) -> None:
        with self._lock:
            self._at_work += 1
        try:
            self._loop.start(self._deliver(share))
        except RuntimeError:
            with self._lock:
                self._at_work -= 1
            raise

    def _end(self) -> None:
        """Wait for the messages in hand, if there are any; who was told to stop does not wait for ever."""
        self._supply.end()
        deadline = None
        while self._is_anybody_busy and not (_has_passed(deadline) or self._stop.urgent):
            if self._stop.requested and deadline is None:
                self._hurry(PATIENCE)
                self._stop.on_ending()
                deadline = time.monotonic() + PATIENCE
            self._stop.wait(_until(deadline))
        if self._at_work:
            if self._stop.requested:
                # What is broken off is given back.
                self._hurry(LAST_PATIENCE)
            self._break_off()
        # Who has nothing left has not been stopped.
        self._report.stopped = self._stop.requested and (self._is_cut_short or self._supply.has_more())
        self._supply.release()

    def _break_off(self) -> None:
        if self._is_anybody_busy:
            self._handler.abort()
        else:
            # The sessions of the others are kept for the next round.
            self._handler.abort_opening()
        deadline = time.monotonic() + LAST_PATIENCE
        while self._at_work and not _has_passed(deadline):
            self._stop.wait(_until(deadline))

    # --- in the threads ---

    def _deliver(self, share: Share) -> Work:
        try:
            with closing(self._handler.work_on(share, {})) as steps:
                for step in steps:
                    if isinstance(step, Wait):
                        yield step
                        continue
                    claim, result = step
                    share.done_with(claim)
                    self._note(share, claim, result)
            self._handler.make_room()
        except GeneratorExit:
            # Nobody goes on with it; what it had in hand is released by now.
            share.lost()
        except BaseException as error:  # noqa: BLE001 - it is raised again where the run was started
            self._defect = error
            self._supply.end()
            share.lost()
        with self._lock:
            self._at_work -= 1
        self._stop.wake()

    def _note(self, share: Share, claim: IClaim, result: SendResult) -> None:
        if result.unwritten is not None:
            self._supply.fail(result.unwritten)
        if result.trouble is None:
            if share.succeeded() and not self._server_works:
                self._server_works = True
                self._stop.wake()
        else:
            if result.trouble.in_message:
                log.warning('%s %s', result.trouble, what_waits(claim.id, result))
            if self._handler.is_paused or not result.trouble.in_message:
                self._is_server_lost = True
                self._supply.end()
        with self._lock:
            self._report.trouble = result.trouble or self._report.trouble
            if result.settlement is not None:
                self._report.count(result.settlement)
                self._is_cut_short |= bool(result.settlement.waiting and not result.settlement.counted)
            if self._on_progress is not None:
                self._on_progress(self._report)


def _has_passed(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _until(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _log_recovery(recovery: Recovery) -> None:
    told = (
        (recovery.orphans, logging.INFO, 'recovered', 'the process that delivered it died'),
        (recovery.buried, logging.ERROR, 'buried', 'too many of the processes that delivered it died'),
        (recovery.in_doubt, logging.CRITICAL, 'in_doubt', 'its commit did not finish; a person must decide'),
        (
            recovery.half_way,
            logging.CRITICAL,
            'in_doubt',
            'its move to another queue was interrupted; run the move again',
        ),
        (recovery.sent, logging.WARNING, 'released', 'it was in doubt, and mailqueue.in_doubt = send'),
        (recovery.discarded, logging.WARNING, 'discarded', 'it was in doubt, and mailqueue.in_doubt = discard'),
        (recovery.swept, logging.INFO, 'swept', 'its transaction never voted for it'),
    )
    for names, level, status, reason in told:
        for name in names:
            log_event(queue_log, level, status=status, id=name, reason=reason)
