"""What is told of one attempt: to the logs first, then to the receivers of signals."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import ModuleType

from pyramid_mailqueue.delivery.logs import delivery_log, log_event, queue_log
from pyramid_mailqueue.delivery.results import Reply, SendResult, Settlement
from pyramid_mailqueue.envelope import Envelope
from pyramid_mailqueue.interfaces import IClaim

__all__ = ['plugins', 'tell']


def plugins() -> ModuleType:
    """Imported with the first message: it takes a good part of the time of a run that has nothing to do."""
    from pyramid_mailqueue.delivery import plugins

    return plugins


def tell(claim: IClaim, envelope: Envelope, answers: Sequence[SendResult], result: SendResult, *, age: float) -> None:
    """
    Tell of an attempt that is over, and settled.

    :param answers: what each transport said
    :param result: all of that together, and the settlement
    :param age: how long the message has been in the queue, in seconds
    """
    assert result.settlement is not None
    _log(claim, envelope, answers, result.settlement, age)
    room = plugins()
    if result.accepted:
        room.notify(room.MQSignal.delivery_successful, claim, result)
    if has_failed(result.settlement):
        room.notify(room.MQSignal.delivery_failed, claim, result)


def has_failed(settlement: Settlement) -> bool:
    """Whether somebody has to wait because of this attempt, or is given up."""
    return bool(settlement.burials or (settlement.waiting and settlement.counted))


def _log(claim: IClaim, envelope: Envelope, answers: Sequence[SendResult], settlement: Settlement, age: float) -> None:
    if not (delivery_log.isEnabledFor(logging.INFO) or has_failed(settlement)):
        return
    common = {'id': claim.id, 'msgid': envelope.message_id, 'from': f'<{envelope.sender}>'}
    figures = {'attempts': claim.attempts + settlement.counted, 'delay': f'{max(age, 0):.1f}'}

    def log(logger: logging.Logger, level: int, status: str, to: Sequence[str], **said: str) -> None:
        log_event(logger, level, status=status, **common, to=','.join(to), **figures, **said)

    for answer in answers:
        for recipient, reply in answer.replies.items():
            said = {'smtp' if reply.from_server else 'reply': str(reply)}
            log(delivery_log, logging.INFO, _status(answer, reply), [recipient], via=answer.transport, **said)
    if settlement.waiting and settlement.counted:
        log(queue_log, logging.INFO, 'deferred', settlement.waiting, error=settlement.last_reply)
    for burial in settlement.burials:
        log(queue_log, logging.ERROR, 'buried', burial.recipients, error=burial.reason)


def _status(answer: SendResult, reply: Reply) -> str:
    if reply.accepted:
        return 'queued' if answer.queued else 'sent'
    return 'refused' if reply.refused else 'deferred'
