"""
One run over a queue: take care of what dead processes left, then try whatever is due, oldest first.

One thread delivers, see :mod:`~.engine`; the one that has called waits for it, and so can always be told to stop.

The run ends when nothing is due any more; when it was told to; or when the server is in trouble: what is left then
waits as it is, because the next message would fare no better.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from pyramid_mailqueue.delivery.engine import Engine
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.report import what_waits
from pyramid_mailqueue.exceptions import ConfigurationError, MailqueueError, QueueError, ServerTrouble
from pyramid_mailqueue.interfaces import IClaim, IMailQueue
from pyramid_mailqueue.logs import Log, log_event, queue_log
from pyramid_mailqueue.queues.base import has_admin
from pyramid_mailqueue.results import Recovery, SendResult, Settlement

__all__ = ['STOP_SECONDS', 'RunReport', 'Runner', 'Stop']

log = Log('mailqueue.delivery')

#: How long a run that was told to end waits for the messages in hand.
STOP_SECONDS = 30

#: So many dead letters are removed in one round, at most; and how long a runner does not look again, in seconds.
MOST_EXPIRED = 1000
EXPIRE_EVERY = 600

#: How long it waits for a thread whose connections it has broken off.
ABORT_SECONDS = 2

#: A run waits no longer than this for its rate; what is left waits in the queue, for the next run.
RATE_WAIT_SECONDS = 10


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
        due = None
        stop = stop or Stop()
        self.queue.hurry(math.inf)
        try:
            now = self._clock()
            report.recovery = self._recover(now)
            report.recovery = replace(report.recovery, expired=self._expire(now))
            due = _Due(
                self.queue.claim_due(now),
                limit=max_messages,
                take_from_rate=self.handler.take_from_rate,
                is_stopped=lambda: stop.requested,
            )
            _Crew(self.handler, due, stop, report, on_progress, self.queue.hurry).work(max_seconds)
        finally:
            if due is not None:
                due.release()
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


class _Due:
    """
    What is due, for one run; see `Source`.

    :param claims: asked for the next one when it is needed
    :param limit: how many messages may be begun
    :param take_from_rate: see `MessageHandler`
    :param is_stopped: whether somebody has told the run to end
    :ivar on_ended: called with each claim that was settled, and its result
    :ivar error: what ended the run
    :ivar is_rate_reached: the rate allows no more for a while
    """

    def __init__(
        self,
        claims: Iterator[IClaim],
        *,
        limit: int | None,
        take_from_rate: Callable[[int], float] | None,
        is_stopped: Callable[[], bool],
    ) -> None:
        self.error: BaseException | None = None
        self.is_rate_reached = False
        self._claims = claims
        self._left = limit
        self._take_from_rate = take_from_rate
        self._is_stopped = is_stopped
        self.on_ended: Callable[[IClaim, SendResult], None] = lambda *_: None
        self._has_ended = False
        # Claimed, and not given to anybody yet.
        self._held: deque[IClaim] = deque()
        self._in_hand: dict[str, IClaim] = {}
        # Something was given back when the run was over.
        self._has_left = False
        # Not to ask the rate again before that (``time.monotonic()``).
        self._rate_asked_from = -math.inf

    def end(self) -> None:
        """Begin nothing more.  May be called from any thread."""
        self._has_ended = True

    def fail(self, error: BaseException) -> None:
        """End because of *error*, which is raised where the run was started."""
        self.error = self.error or error
        self.end()

    def lost(self) -> None:
        """
        End because of a defect.

        What it is about stays claimed, so that its deaths are counted; everything else was released.
        """
        self._in_hand.clear()
        self.end()

    def has_more(self) -> bool:
        """Whether there is something that was not begun, or not settled."""
        return self._has_left or bool(self._in_hand) or self._hold(1) > 0

    def release(self) -> None:
        """Give back what is not settled, for threads that do not come back, too."""
        self.end()
        if isinstance(self._claims, Generator):
            # What it has claimed and not given it gives back by itself.
            self._claims.close()
        for claim in (*self._held, *self._in_hand.values()):
            claim.release()

    # --- see `Source` ---

    @property
    def is_over(self) -> bool:
        return self._has_ended or self._is_stopped()

    def look(self, number: int) -> int:
        if self.is_over or not self._hold(number) or not self._rate_allows(0):
            return 0
        return min(number, len(self._held))

    def next(self) -> IClaim | None:
        if self.is_over or not self._hold(1):
            return None
        claim = self._held[0]
        if not self._rate_allows(_number_of_recipients(claim)):
            return None
        self._held.popleft()
        self._in_hand[claim.id] = claim
        return claim

    def pause(self) -> float | None:
        if self.is_over or not self._hold(1):
            return None
        seconds = max(0.0, self._rate_asked_from - time.monotonic())
        self.is_rate_reached = seconds > RATE_WAIT_SECONDS
        return None if self.is_rate_reached else seconds

    def ended(self, claim: IClaim, result: SendResult | None) -> None:
        self._in_hand.pop(claim.id, None)
        if result is not None:
            self.on_ended(claim, result)
        else:
            self._has_left |= self.is_over

    def _hold(self, number: int) -> int:
        """Claim what is due until so many are held; return how many are."""
        while len(self._held) < number and self._left != 0:
            try:
                claim = next(self._claims, None)
            except Exception as error:  # noqa: BLE001 - it is raised again where the run was started
                self.fail(error)
                claim = None
            if claim is None:
                self._left = 0
                break
            if self._left is not None:
                self._left -= 1
            self._held.append(claim)
        return len(self._held)

    def _rate_allows(self, sends: int) -> bool:
        """Whether so many may be sent now; then they are taken from the rate.  Of 0 whether there could be one."""
        if self._take_from_rate is None:
            return True
        if time.monotonic() < self._rate_asked_from:
            return False
        try:
            seconds = self._take_from_rate(sends)
        except (OSError, MailqueueError) as error:
            self.fail(error)
            return False
        self._rate_asked_from = time.monotonic() + seconds
        return not seconds


def _number_of_recipients(claim: IClaim) -> int:
    try:
        return len(claim.recipients)
    except (OSError, MailqueueError):
        # Told of when the message is read.
        return 0


class _Crew:
    """The thread that delivers in one run, and the one that waits for it."""

    def __init__(
        self,
        handler: MessageHandler,
        due: _Due,
        stop: Stop,
        report: RunReport,
        on_progress: Callable[[RunReport], None] | None,
        hurry: Callable[[float], None],
    ) -> None:
        self._handler = handler
        self._hurry = hurry
        self._due = due
        due.on_ended = self._note
        self._stop = stop
        self._report = report
        self._on_progress = on_progress
        self._engine = Engine(handler, connections=handler.connections, has_helpers=True)
        self._thread: threading.Thread | None = None
        self._is_server_lost = False
        self._is_cut_short = False
        self._defect: BaseException | None = None

    def work(self, max_seconds: float | None) -> None:
        """Return when the run is over.  Raises what the thread could not cope with."""
        # Nobody connects for nothing.
        if self._due.has_more():
            self._start()
        try:
            self._wait_for_the_end(max_seconds)
        except BaseException:
            # Nobody is to take a message that is still being delivered.
            self._due.end()
            self._break_off()
            raise
        error = self._defect or self._due.error
        if error is not None:
            raise error
        self._report.rate_reached = self._due.is_rate_reached
        if self._report.done and not self._is_server_lost:
            # The server could be used; its disconnects have been told of.
            self._report.trouble = None

    def _start(self) -> None:
        # A daemon: at the end it may hang in what cannot be broken off.
        thread = threading.Thread(target=self._deliver, name='mailqueue-run', daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise QueueError(
                f'No thread can be started to deliver mail ({error}). Check the limits of the user and of the '
                'service: ulimit -u, TasksMax.'
            ) from error
        self._thread = thread

    @property
    def _is_at_work(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wait_for_the_end(self, max_seconds: float | None) -> None:
        deadline = None if max_seconds is None else time.monotonic() + max_seconds
        while self._is_at_work and not (self._stop.requested or _has_passed(deadline)):
            self._stop.wait(_until(deadline))
        if _has_passed(deadline) and self._is_at_work and not (self._report.done or self._engine.is_sending):
            self._report.trouble = ServerTrouble(f'No session was opened in the {max_seconds:g} seconds of this run.')
        self._end()

    def _end(self) -> None:
        """Wait for the messages in hand, if there are any; after a request to stop not for ever."""
        self._due.end()
        self._engine.wake()
        deadline = None
        while self._is_at_work and not (_has_passed(deadline) or self._stop.urgent):
            if self._stop.requested and deadline is None:
                self._hurry(STOP_SECONDS)
                if self._engine.is_sending:
                    self._stop.on_ending()
                deadline = time.monotonic() + STOP_SECONDS
            self._stop.wait(_until(deadline))
        if self._is_at_work:
            # What is broken off is given back.
            self._hurry(ABORT_SECONDS)
            self._break_off()
        # Where nothing is left nothing was stopped.
        self._report.stopped = self._stop.requested and (self._is_cut_short or self._is_at_work or self._due.has_more())

    def _break_off(self) -> None:
        self._handler.abort()
        deadline = time.monotonic() + ABORT_SECONDS
        while self._is_at_work and not _has_passed(deadline):
            self._stop.wait(_until(deadline))

    # --- in the thread that delivers ---

    def _deliver(self) -> None:
        try:
            self._engine.run(self._due)
        except BaseException as error:  # noqa: BLE001 - it is raised again where the run was started
            self._defect = error
            self._due.lost()
        finally:
            self._stop.wake()

    def _note(self, claim: IClaim, result: SendResult) -> None:
        """Count a message, and learn from it whether to go on."""
        if result.unwritten is not None:
            self._due.fail(result.unwritten)
        trouble, report = result.trouble, self._report
        if trouble is not None:
            if trouble.in_message:
                log.warning('%s %s', trouble, what_waits(claim.id, result))
            if self._handler.is_backing_off or not trouble.in_message:
                self._is_server_lost = True
                self._due.end()
        report.trouble = trouble or report.trouble
        if result.settlement is not None:
            report.count(result.settlement)
            self._is_cut_short |= bool(result.settlement.waiting and not result.settlement.counted)
        if self._on_progress is not None:
            self._on_progress(report)


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
