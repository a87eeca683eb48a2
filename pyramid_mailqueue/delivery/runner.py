"""
One run over a queue: take care of what dead processes left, then try whatever is due, oldest first.

The run ends when nothing is due any more, or when the server is in trouble: what is left then waits as it is, because
the next message would fare no better.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.logs import log_event, queue_log
from pyramid_mailqueue.delivery.results import Recovery, SendResult
from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.interfaces import IMailQueue

__all__ = ['RunReport', 'Runner']


@dataclass
class RunReport:
    """
    What a run did, in messages.

    :param sent: every recipient that was open has it
    :param deferred: at least one recipient waits for a later attempt
    :param refused: at least one recipient is given up, and in a dead letter
    :param trouble: why the run ended early, if the server could not be used
    :param recovery: what dead processes had left
    """

    sent: int = 0
    deferred: int = 0
    refused: int = 0
    trouble: ServerTrouble | None = None
    recovery: Recovery = field(default_factory=Recovery)

    def count(self, result: SendResult) -> None:
        """Count one message."""
        if result.refused:
            self.refused += 1
        if result.deferred:
            self.deferred += 1
        if result.accepted and not result.deferred and not result.refused:
            self.sent += 1


class Runner:
    """
    See the module.

    :param queue: what to work on
    :param handler: who delivers
    :param clock: seconds since the epoch
    """

    def __init__(self, queue: IMailQueue, handler: MessageHandler, *, clock: Callable[[], float] = time.time) -> None:
        self.queue = queue
        self.handler = handler
        self._clock = clock

    def run(self) -> RunReport:
        """Work until nothing is due any more, or the server cannot be used."""
        now = self._clock()
        report = RunReport(recovery=self.queue.recover(now))
        _log_recovery(report.recovery)
        try:
            for claim in self.queue.claim_due(now):
                result = self.handler.deliver(claim)
                report.count(result)
                if result.trouble is not None:
                    report.trouble = result.trouble
                    break
        finally:
            self.queue.flush()
            self.handler.close()
        return report


def _log_recovery(recovery: Recovery) -> None:
    told = (
        (recovery.orphans, logging.INFO, 'recovered', 'its deliverer died'),
        (recovery.buried, logging.ERROR, 'buried', 'too many deliverers died'),
        (recovery.in_doubt, logging.CRITICAL, 'in_doubt', 'its process died while it committed; a person must decide'),
        (recovery.sent, logging.WARNING, 'released', 'it was in doubt, and mailqueue.in_doubt = send'),
        (recovery.discarded, logging.WARNING, 'discarded', 'it was in doubt, and mailqueue.in_doubt = discard'),
        (recovery.swept, logging.INFO, 'swept', 'nobody had voted for it'),
    )
    for names, level, status, reason in told:
        for name in names:
            log_event(queue_log, level, status=status, id=name, reason=reason)
