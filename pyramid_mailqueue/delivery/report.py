"""
The report of one attempt: to plugins, to the logs, and to the subscribers of an application.

Receivers of ``delivery_failed`` are called before the claim is settled, because they may decide about the message (see
:mod:`~.plugins`); everything else is reported after that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from pyramid_mailqueue.delivery.plugins import MQSignal, PluginMessage, call_receivers, registry
from pyramid_mailqueue.events import MailBuried, MailDeferred, MailDelivered, MailEvent, MailQueued
from pyramid_mailqueue.logs import Log, delivery_log, log_event, queue_log
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import Burial, Reply, SendResult, Settlement

__all__ = ['AttemptRecord', 'ask_plugins', 'has_failed', 'report', 'what_waits']

#: A message that is older than this, in seconds, and still waits is worth a warning.
LONG = 3600

DISCARDED = 'discarded by a plugin'


class AttemptRecord(NamedTuple):
    """
    One attempt at a message, when it is over.

    :param id: the name of the message in its queue; ``''`` if it is in none
    :param envelope: the message, with the recipients that were open
    :param answers: what each transport said, in their order
    :param attempts: how many were made before this one
    :param queued_at: when the message came into the queue, in seconds since the epoch
    :param now: when the attempt was made, likewise
    """

    id: str
    envelope: Envelope
    answers: Sequence[SendResult]
    attempts: int
    queued_at: float
    now: float

    @property
    def age(self) -> float:
        """How long the message has been in the queue, in seconds."""
        return max(self.now - self.queued_at, 0.0)

    @property
    def is_queued_elsewhere(self) -> bool:
        """Whether a transport has put it into another queue."""
        return any(answer.queued for answer in self.answers)


def has_failed(settlement: Settlement) -> bool:
    """Whether a recipient has to wait because of this attempt, or is given up."""
    return bool(settlement.burials or (settlement.waiting and settlement.counted))


def ask_plugins(record: AttemptRecord, result: SendResult, before: Callable[[], None]) -> SendResult:
    """
    Call the receivers of ``delivery_failed``, and return *result* with what follows from their answers.

    They get the result of this attempt alone, so it is false, and not queued, also if the message waits.

    :param result: the outcome, with the intended settlement
    :param before: called before the first of them, if there is any
    """
    if not registry.has_receivers(MQSignal.delivery_failed):
        return result
    before()
    of_attempt = replace(result, queued=False)
    message = _message(record, of_attempt.failed, record.attempts + 1)
    is_unwanted = call_receivers(MQSignal.delivery_failed, message, of_attempt)
    result = replace(result, discarded=is_unwanted)
    settlement = result.settlement
    if not is_unwanted or settlement is None or not settlement.waiting:
        return result
    burials = (*settlement.burials, Burial(settlement.waiting, DISCARDED))
    return replace(
        result,
        settlement=Settlement(counted=settlement.counted, burials=burials),
        queued=record.is_queued_elsewhere,
    )


def _message(record: AttemptRecord, recipients: tuple[str, ...], retries: int) -> PluginMessage:
    envelope = record.envelope
    if recipients != envelope.recipients:
        envelope = replace(envelope, recipients=recipients)
    return PluginMessage(record.id, envelope, retries, record.queued_at)


def report(
    record: AttemptRecord, result: SendResult, settlement: Settlement, notify: Callable[[MailEvent], None] | None
) -> None:
    """
    Report an attempt that is over, and settled.

    :param notify: called with each event; must not raise
    """
    is_kept = bool(record.id)
    if notify is not None or has_failed(settlement) or not is_kept or delivery_log.isEnabledFor(logging.INFO):
        outcomes = [*_outcomes(record, settlement, is_unwritten=result.unwritten is not None)]
        _log(record, outcomes, settlement)
        if notify is not None:
            for event in _events(record, outcomes, settlement):
                notify(event)
    if result.accepted and registry.has_receivers(MQSignal.delivery_successful):
        message = _message(record, result.accepted, record.attempts)
        call_receivers(MQSignal.delivery_successful, message, _success(record, result))


def _success(record: AttemptRecord, result: SendResult) -> SendResult:
    """Return the successful part of *result*."""
    return replace(
        result,
        replies={recipient: result.replies[recipient] for recipient in result.accepted},
        queued=record.is_queued_elsewhere,
        settlement=result.settlement and Settlement(),
    )


# --- what became of each recipient ------------------------------------------


class _Outcome(NamedTuple):
    """
    What became of one recipient.

    :param status: ``sent``, ``queued`` (elsewhere), ``deferred``, ``buried`` or ``discarded``; in the place of the last
        three ``unsettled`` if that cannot be written
    :param via: the transport that replied last
    :param smtp: what a server said
    :param error: what else went wrong
    """

    recipient: str
    status: str
    via: str
    smtp: str = ''
    error: str = ''


def _outcomes(record: AttemptRecord, settlement: Settlement, *, is_unwritten: bool) -> Iterator[_Outcome]:
    said: dict[str, list[tuple[SendResult, Reply]]] = {}
    for answer in record.answers:
        for recipient, reply in answer.replies.items():
            said.setdefault(recipient, []).append((answer, reply))
    fates = {recipient: _status_of(burial) for burial in settlement.burials for recipient in burial.recipients}
    of_waiting = 'unsettled' if is_unwritten else 'deferred' if settlement.counted else ''
    fates |= dict.fromkeys(settlement.waiting, of_waiting)
    troubles = [str(answer.trouble) for answer in record.answers if answer.trouble is not None]
    for recipient in record.envelope.recipients:
        words = said.get(recipient, [])
        # What is neither kept in a queue nor accepted is gone.
        fate = fates.get(recipient, 'discarded')
        if words and words[-1][1].accepted:
            yield _accepted(recipient, words, troubles)
        elif fate:
            yield _failed(recipient, fate, words, troubles or [settlement.last_reply])


def _status_of(burial: Burial) -> str:
    return 'discarded' if burial.reason == DISCARDED else 'buried'


def _accepted(recipient: str, words: Sequence[tuple[SendResult, Reply]], troubles: Sequence[str]) -> _Outcome:
    answer, reply = words[-1]
    if reply.from_server:
        return _Outcome(recipient, 'sent', answer.transport, smtp=str(reply))
    if not answer.queued:
        return _Outcome(recipient, 'sent', answer.transport)
    # Why it could not be sent.
    before = [str(earlier) for _, earlier in words[:-1]] or troubles
    return _Outcome(recipient, 'queued', answer.transport, error=before[-1] if before else '')


def _failed(recipient: str, fate: str, words: Sequence[tuple[SendResult, Reply]], otherwise: Sequence[str]) -> _Outcome:
    if not words:
        return _Outcome(recipient, fate, '', error=otherwise[-1])
    answer, reply = words[-1]
    if reply.from_server:
        return _Outcome(recipient, fate, answer.transport, smtp=str(reply))
    return _Outcome(recipient, fate, answer.transport, error=str(reply))


# --- to the logs ------------------------------------------------------------


def _log(record: AttemptRecord, outcomes: Sequence[_Outcome], settlement: Settlement) -> None:
    envelope = record.envelope
    common = {'id': record.id, 'msgid': envelope.message_id, 'from': f'<{envelope.sender}>'}
    figures: dict[str, object] = {}
    if record.id:
        figures = {'attempts': record.attempts + settlement.counted, 'delay': f'{record.age:.1f}'}

    def log(logger: Log, level: int, status: str, to: Sequence[str], via: str = '', **said: str) -> None:
        log_event(logger, level, status=status, **common, to=','.join(to), via=via, **figures, **said)

    for it in outcomes:
        log(delivery_log, logging.INFO, it.status, [it.recipient], it.via, smtp=it.smtp, error=it.error)
    if settlement.waiting and settlement.counted:
        level = logging.WARNING if record.age >= LONG else logging.INFO
        log(queue_log, level, 'deferred', settlement.waiting, error=settlement.last_reply)
    for burial in settlement.burials:
        log(queue_log, logging.ERROR, _status_of(burial), burial.recipients, error=burial.reason)
    if not record.id:
        for it in outcomes:
            if it.status == 'discarded':
                log(queue_log, logging.WARNING, it.status, [it.recipient], error=it.smtp or it.error)


# --- to the application -----------------------------------------------------


def _events(record: AttemptRecord, outcomes: Sequence[_Outcome], settlement: Settlement) -> Iterator[MailEvent]:
    name, envelope = record.id, record.envelope
    accepted: dict[tuple[str, str], list[str]] = {}
    for it in outcomes:
        if it.status in ('sent', 'queued'):
            accepted.setdefault((it.status, it.via), []).append(it.recipient)
    for (status, via), recipients in accepted.items():
        if status == 'sent':
            yield MailDelivered(id=name, envelope=envelope, recipients=tuple(recipients), via=via)
        else:
            yield MailQueued(id='', envelope=envelope, recipients=tuple(recipients))
    if settlement.waiting and settlement.counted:
        yield MailDeferred(
            id=name,
            envelope=envelope,
            recipients=settlement.waiting,
            reason=settlement.last_reply,
            attempts=record.attempts + 1,
            due=settlement.due,
        )
    for burial in settlement.burials:
        yield MailBuried(id=name, envelope=envelope, recipients=burial.recipients, reason=burial.reason)


def what_waits(id_: str, result: SendResult) -> str:
    """Return what the server's trouble means for the message *id_*, and for the others, in a sentence."""
    if result.trouble is None or not result.trouble.in_message:
        return 'Mail waits in the queue.'
    is_given_up = result.settlement is not None and not result.settlement.waiting
    return f'The message {id_} {"is given up" if is_given_up else "waits"}.'
