"""
One run over a queue: take care of what dead processes left, then try whatever is due, oldest first.

The run ends when nothing is due any more, or when the server is in trouble: what is left then waits as it is, because
the next message would fare no better.  A server that breaks off in the midst of a message is given a few others first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.logs import log_event, queue_log
from pyramid_mailqueue.delivery.results import Recovery, SendResult, Settlement
from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.interfaces import IClaim, IMailQueue

__all__ = ['RunReport', 'Runner']

log = logging.getLogger('mailqueue.delivery')


@dataclass
class RunReport:
    """
    What a run did, in messages.

    :param sent: every recipient that was open has it
    :param deferred: at least one recipient waits because of this attempt
    :param refused: at least one recipient is given up, and in a dead letter
    :param trouble: why the run ended early, or did nothing, if the server could not be used
    :param stopped: the run ended early because it was told to
    :param recovery: what dead processes had left
    """

    sent: int = 0
    deferred: int = 0
    refused: int = 0
    trouble: ServerTrouble | None = None
    stopped: bool = False
    recovery: Recovery = field(default_factory=Recovery)

    def count(self, settlement: Settlement) -> None:
        """Count one message."""
        if not settlement.waiting and not settlement.burials:
            self.sent += 1
        if settlement.waiting and settlement.counted:
            self.deferred += 1
        if settlement.burials:
            self.refused += 1


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

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> RunReport:
        """
        Work until nothing is due any more, or the server cannot be used.

        :param should_stop: asked before each message whether the run is to end; a KeyboardInterrupt ends it at once
        """
        now = self._clock()
        report = RunReport()
        try:
            report.recovery = self.queue.recover(now)
            _log_recovery(report.recovery)
            for claim in self.queue.claim_due(now):
                if should_stop():
                    claim.release()
                    report.stopped = True
                    break
                result = self._deliver(claim)
                if result.settlement is not None:
                    report.count(result.settlement)
                if result.trouble is not None:
                    report.trouble = result.trouble
                if self.handler.is_paused:
                    return report
                if result.trouble is not None:
                    log.warning('%s The message %s waits.', result.trouble, claim.id)
            if report.sent or report.deferred or report.refused:
                # The server could be used; what it stumbled over has been told of.
                report.trouble = None
        finally:
            self.queue.flush()
            self.handler.close()
        return report

    def _deliver(self, claim: IClaim) -> SendResult:
        try:
            return self.handler.deliver(claim)
        except KeyboardInterrupt:
            # Unlike a defect, which is left as an orphan, this must not count against the message.
            claim.release()
            raise


def _log_recovery(recovery: Recovery) -> None:
    told = (
        (recovery.orphans, logging.INFO, 'recovered', 'its deliverer died'),
        (recovery.buried, logging.ERROR, 'buried', 'too many deliverers died'),
        (recovery.in_doubt, logging.CRITICAL, 'in_doubt', 'its commit did not come to an end; a person must decide'),
        (recovery.sent, logging.WARNING, 'released', 'it was in doubt, and mailqueue.in_doubt = send'),
        (recovery.discarded, logging.WARNING, 'discarded', 'it was in doubt, and mailqueue.in_doubt = discard'),
        (recovery.swept, logging.INFO, 'swept', 'nobody had voted for it'),
    )
    for names, level, status, reason in told:
        for name in names:
            log_event(queue_log, level, status=status, id=name, reason=reason)
