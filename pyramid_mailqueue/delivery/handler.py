"""
One attempt at one message: offer it to the transports, settle its claim, and only then tell of it.

Settled first: whatever a logger or a plugin does afterwards, the message cannot be delivered a second time because
of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from types import ModuleType
from typing import Any

from pyramid_mailqueue.delivery.logs import delivery_log, log_event, queue_log
from pyramid_mailqueue.delivery.pause import Pause
from pyramid_mailqueue.delivery.results import Reply, SendResult, Settlement
from pyramid_mailqueue.delivery.retry import ExponentialBackoff
from pyramid_mailqueue.envelope import Envelope
from pyramid_mailqueue.exceptions import MailqueueError, ServerTrouble
from pyramid_mailqueue.interfaces import IClaim, IRetryPolicy, ITransport

__all__ = ['MessageHandler']

log = logging.getLogger('mailqueue.delivery')


class MessageHandler:
    """
    Deliver messages over transports, in their order: who is still open after the first is offered to the next.

    :param transports: what to offer messages to; any object with a fitting ``send`` will do (see `ITransport`)
    :param retry_policy: see `IRetryPolicy`
    :param plugins: the names of plugins to load before the first delivery; ``'*'`` is every one that is installed
    :param clock: seconds since the epoch
    """

    def __init__(
        self,
        transports: Sequence[ITransport],
        *,
        retry_policy: IRetryPolicy | None = None,
        plugins: Sequence[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.retry_policy = retry_policy or ExponentialBackoff()
        self._clock = clock
        self._plugins = tuple(plugins)
        self._has_loaded_plugins = False
        self._routes = [_Route(transport, Pause()) for transport in transports]

    @property
    def is_paused(self) -> bool:
        """Whether every transport is resting after its server's trouble: trying a message now would be in vain."""
        return bool(self._routes) and all(route.pause.trouble for route in self._routes)

    @property
    def rests_for(self) -> float:
        """In how many seconds a transport can be used again; 0 if one can be used now."""
        return min((route.pause.remaining for route in self._routes), default=0.0)

    def deliver(self, claim: IClaim) -> SendResult:
        """
        Try the message of *claim* now, and settle the claim.

        ``result.trouble`` is set if no transport could be used: the next message would fare no better, and this one
        waits as it was.  What cannot be read is released and logged, and has no settlement.
        """
        try:
            envelope, attempts, queued_at = claim.envelope, claim.attempts, claim.queued_at
        except (OSError, MailqueueError) as error:
            log.error('%s cannot be read, and is left alone: %s', claim.id, error)
            claim.release()
            return SendResult()
        self._load_plugins()
        answers = self._answers(envelope)
        result = _merged(answers)
        now = self._clock()
        settlement = self.retry_policy.decide(envelope.recipients, attempts, queued_at, result, now)
        claim.settle(settlement)
        result = replace(result, queued=result.queued or bool(settlement.waiting), settlement=settlement)
        _Report(claim, envelope, attempts + settlement.counted, now - queued_at).tell(answers, result, settlement)
        return result

    def offer(self, envelope: Envelope) -> SendResult:
        """Offer *envelope* to the transports until nobody is open; queue nothing and log no outcome."""
        return _merged(self._answers(envelope))

    def _answers(self, envelope: Envelope) -> list[SendResult]:
        """What each transport said that was asked."""
        answers: list[SendResult] = []
        still_open = envelope.recipients
        for route in self._routes:
            if not still_open:
                break
            resting = route.pause.trouble
            answer = route.still_resting(resting) if resting else route.offer(envelope, still_open)
            # If this is the only transport, whoever called us tells of its trouble.
            if answer.trouble is not None and not resting and len(self._routes) > 1:
                log.warning('The transport %s rests: %s', route.name, answer.trouble)
            answers.append(answer)
            still_open = answer.open_of(still_open)
        return answers

    def _load_plugins(self) -> None:
        if self._plugins:
            self._has_loaded_plugins = True
            _plugins().registry.load(self._plugins)

    def close(self) -> None:
        """Let go of the transports' connections, and let the plugins finish.  The handler may be used again."""
        for route in self._routes:
            route.close()
        if self._has_loaded_plugins:
            _plugins().registry.terminate()


def _plugins() -> ModuleType:
    """Imported with the first message: it takes a good part of the time of a run that has nothing to do."""
    from pyramid_mailqueue.delivery import plugins

    return plugins


def _merged(answers: Sequence[SendResult]) -> SendResult:
    """Everything that was said; the trouble of one transport is none if another one could be used."""
    result = reduce(SendResult.merged_with, answers, SendResult())
    return result if all(answer.trouble for answer in answers) else replace(result, trouble=None)


#: What is understood where a transport that is not in trouble leaves somebody out.  Silence is no success.
_SILENCE = Reply(451, 'the transport said nothing of this recipient', '4.3.0', from_server=False)


#: So often in a row a server may break off in the midst of a message before its transport rests.  One message that it
#: cannot stand must not keep all others from it.
MAX_STUMBLES = 2


class _Route:
    """A transport, and its rest after a server's trouble."""

    def __init__(self, transport: ITransport, pause: Pause) -> None:
        self._stumbles = 0
        self.transport = transport
        self.name: str = getattr(transport, 'name', None) or type(transport).__name__
        self.pause = pause

    def offer(self, envelope: Envelope, recipients: tuple[str, ...]) -> SendResult:
        """Offer *envelope* for some of its *recipients*.  Never raises."""
        try:
            result = self._read(self.transport.send(envelope.sender, recipients, envelope.content), recipients)
        except ServerTrouble as trouble:
            result = SendResult(transport=self.name, trouble=trouble)
        except Exception as error:
            # A defect of the transport.  The message may be what it stumbles over, so this counts as an attempt.
            log.exception('The transport %s failed', self.name)
            result = self._deferred(recipients, f'the transport failed: {type(error).__name__}: {error}')
        self._note(result.trouble)
        return result

    def still_resting(self, trouble: ServerTrouble) -> SendResult:
        """The answer of a transport that is not asked."""
        if trouble.in_message:
            # In the midst of another one.
            trouble = ServerTrouble(str(trouble), code=trouble.code)
        return SendResult(transport=self.name, trouble=trouble)

    def _note(self, trouble: ServerTrouble | None) -> None:
        if trouble is not None and trouble.in_message and self._stumbles < MAX_STUMBLES:
            self._stumbles += 1
            return
        self._stumbles = 0
        if trouble is None:
            self.pause.end()
        else:
            self.pause.begin(trouble)

    def _read(self, answer: SendResult | bool | Any, recipients: tuple[str, ...]) -> SendResult:
        """A transport may also answer with a plain bool, or with any object that is true if the message was sent."""
        if isinstance(answer, SendResult):
            asked = recipients if answer.trouble is None else [r for r in recipients if r in answer.replies]
            replies = {recipient: answer.replies.get(recipient, _SILENCE) for recipient in asked}
            return replace(answer, replies=replies, transport=answer.transport or self.name)
        if not answer:
            return self._deferred(recipients, 'the transport did not take the message')
        queued = bool(getattr(answer, 'queued', False))
        reply = Reply(250, 'queued' if queued else 'sent', from_server=False)
        return SendResult(dict.fromkeys(recipients, reply), self.name, queued)

    def _deferred(self, recipients: tuple[str, ...], text: str) -> SendResult:
        return SendResult(dict.fromkeys(recipients, Reply(451, text, '4.3.0', from_server=False)), self.name)

    def close(self) -> None:
        close = getattr(self.transport, 'close', None)
        if close is not None:
            close()


class _Report:
    """What is told of one attempt: to the logs first, then to the receivers of signals."""

    def __init__(self, claim: IClaim, envelope: Envelope, attempts: int, delay: float) -> None:
        self._claim = claim
        self._common = {
            'id': claim.id,
            'msgid': envelope.message_id,
            'from': f'<{envelope.sender}>',
        }
        self._figures = {'attempts': attempts, 'delay': f'{max(delay, 0):.1f}'}

    def tell(self, answers: Sequence[SendResult], result: SendResult, settlement: Settlement) -> None:
        for answer in answers:
            for recipient, reply in answer.replies.items():
                said = {'smtp' if reply.from_server else 'reply': str(reply)}
                self._log(delivery_log, logging.INFO, _status(answer, reply), [recipient], via=answer.transport, **said)
        has_failed = bool(settlement.burials or (settlement.waiting and settlement.counted))
        if settlement.waiting and settlement.counted:
            self._log(queue_log, logging.INFO, 'deferred', settlement.waiting, error=settlement.last_reply)
        for burial in settlement.burials:
            self._log(queue_log, logging.ERROR, 'buried', burial.recipients, error=burial.reason)
        plugins = _plugins()
        if result.accepted:
            plugins.notify(plugins.MQSignal.delivery_successful, self._claim, result)
        if has_failed:
            plugins.notify(plugins.MQSignal.delivery_failed, self._claim, result)

    def _log(self, logger: logging.Logger, level: int, status: str, to: Sequence[str], **said: str) -> None:
        log_event(logger, level, status=status, **self._common, to=','.join(to), **self._figures, **said)


def _status(answer: SendResult, reply: Reply) -> str:
    if reply.accepted:
        return 'queued' if answer.queued else 'sent'
    return 'refused' if reply.refused else 'deferred'
