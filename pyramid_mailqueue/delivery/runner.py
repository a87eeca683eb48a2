"""
One run over a queue: take care of what dead processes left, then try whatever is due, oldest first.

What delivers is imported when there is something to deliver: most runs of cron find nothing.

The run ends when nothing is due any more; when it was told to; or when the server is in trouble: what is left then
waits as it is, because the next message would fare no better.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from pyramid_mailqueue.delivery.run import STOP_SECONDS, Due, RunReport, Stop
from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.interfaces import IMailQueue
from pyramid_mailqueue.logs import log_event, queue_log
from pyramid_mailqueue.queues.base import has_admin
from pyramid_mailqueue.results import Recovery

if TYPE_CHECKING:
    from pyramid_mailqueue.delivery.handler import MessageHandler

__all__ = ['STOP_SECONDS', 'RunReport', 'Runner', 'Stop']

#: So many dead letters are removed in one round, at most; and how long a runner does not look again, in seconds.
MOST_EXPIRED = 1000
EXPIRE_EVERY = 600


class Runner:
    """
    See the module.

    :param queue: what to work on
    :param handler: who delivers, or what makes that when there is something to deliver
    :param keep_dead: for how many seconds dead letters are kept; None is for ever
    :param clock: seconds since the epoch
    :raises ConfigurationError: *keep_dead* is set, and this queue cannot remove dead letters
    :ivar report: of the last round, also if that has raised
    """

    def __init__(
        self,
        queue: IMailQueue,
        handler: MessageHandler | Callable[[], MessageHandler],
        *,
        keep_dead: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.queue = queue
        self._handler = handler
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
            due = Due(self.queue.claim_due(now), limit=max_messages, is_stopped=lambda: stop.requested)
            self._deliver(due, stop, on_progress, max_seconds)
        finally:
            if due is not None:
                due.release()
            unwritten = self.queue.flush()
        if unwritten is not None:
            raise unwritten
        return report

    def _deliver(
        self, due: Due, stop: Stop, on_progress: Callable[[RunReport], None] | None, max_seconds: float | None
    ) -> None:
        if due.has_more():
            crew = self.handler.crew(due, stop, self.report, on_progress, self.queue.hurry)
            crew.work(max_seconds)
        elif due.error is not None:
            raise due.error

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

    @cached_property
    def handler(self) -> MessageHandler:
        """Who delivers."""
        return self._handler() if callable(self._handler) else self._handler

    @property
    def backoff_seconds(self) -> float:
        """In how many seconds a message can be tried again; 0 if one can be tried now."""
        return self.handler.backoff_seconds if 'handler' in vars(self) else 0.0

    def reload(self) -> None:
        """Have the transports read again what may have changed outside."""
        self.handler.reload()

    def close(self) -> None:
        """Let go of connections.  The runner may be used again."""
        if 'handler' in vars(self) or not callable(self._handler):
            self.handler.close()
        self.queue.close()


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
