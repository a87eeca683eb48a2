"""
One attempt at one message: offer it to the transports, settle its claim, and only then tell of it.

Settled first: whatever a logger or a plugin does afterwards, the message cannot be delivered a second time because
of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from pyramid_mailqueue.delivery.logs import delivery_log, log_event, queue_log
from pyramid_mailqueue.delivery.pause import Pause
from pyramid_mailqueue.delivery.plugins import MQSignal, load_plugins, notify
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
        self._routes = [_Route(transport, Pause()) for transport in transports]

    @property
    def is_paused(self) -> bool:
        """Whether every transport is resting after its server's trouble: trying a message now would be in vain."""
        return all(route.pause.is_active for route in self._routes)

    def deliver(self, claim: IClaim) -> SendResult:
        """
        Try the message of *claim* now, and settle the claim.

        After a server's trouble (``result.trouble``) the message waits as it was.  Never raises: what cannot be read is
        released, and logged.
        """
        try:
            envelope = claim.envelope
        except (OSError, MailqueueError) as error:
            log.error('%s cannot be read, and is left alone: %s', claim.id, error)
            claim.release()
            return SendResult()
        self._load_plugins()
        attempts, queued_at = claim.attempts, claim.queued_at
        answers = self._answers(envelope)
        result = _merged(answers)
        now = self._clock()
        settlement = self.retry_policy.decide(envelope.recipients, attempts, queued_at, result, now)
        claim.settle(settlement)
        _Report(claim, envelope, attempts + settlement.counted, now - queued_at).tell(answers, result, settlement)
        return SendResult(result.replies, result.transport, bool(settlement.waiting) or result.queued, result.trouble)

    def offer(self, envelope: Envelope) -> SendResult:
        """Offer *envelope* to the transports until nobody is open; queue nothing and log no outcome."""
        return _merged(self._answers(envelope))

    def _answers(self, envelope: Envelope) -> list[SendResult]:
        """What each transport said that was asked."""
        answers = []
        still_open = envelope.recipients
        for route in self._routes:
            answer = route.offer(envelope.with_recipients(still_open))
            answers.append(answer)
            still_open = answer.open_of(still_open)
            if not still_open:
                break
            if answer.trouble is not None and route is not self._routes[-1]:
                log.warning('%s; the next transport is asked instead', answer.trouble)
        return answers

    def _load_plugins(self) -> None:
        """Not before there is a message: looking for plugins takes longer than a run that has nothing to do."""
        names, self._plugins = self._plugins, ()
        if names:
            load_plugins(names)

    def close(self) -> None:
        """Let go of the transports' connections."""
        for route in self._routes:
            route.close()


def _merged(answers: Sequence[SendResult]) -> SendResult:
    return reduce(SendResult.merged_with, answers, SendResult())


class _Route:
    """A transport, and its rest after a server's trouble."""

    def __init__(self, transport: ITransport, pause: Pause) -> None:
        self.transport = transport
        self.name: str = getattr(transport, 'name', None) or type(transport).__name__
        self.pause = pause

    def offer(self, envelope: Envelope) -> SendResult:
        """Offer *envelope*, unless the transport rests.  Never raises."""
        if self.pause.is_active:
            return SendResult(transport=self.name, trouble=self.pause.trouble)
        try:
            result = self._read(self.transport.send(envelope.sender, envelope.recipients, envelope.content), envelope)
        except ServerTrouble as trouble:
            result = SendResult(transport=self.name, trouble=trouble)
        except Exception as error:
            # A defect of the transport.  The message may be what it stumbles over, so this counts as an attempt.
            log.exception('The transport %s failed', self.name)
            result = self._deferred(envelope, f'the transport failed: {type(error).__name__}: {error}')
        self._note(result)
        return result

    def _read(self, answer: SendResult | bool | Any, envelope: Envelope) -> SendResult:
        """A transport may also answer with a plain bool, or with any object that is true if the message was sent."""
        if isinstance(answer, SendResult):
            return answer
        if not answer:
            return self._deferred(envelope, 'the transport did not take the message')
        queued = bool(getattr(answer, 'queued', False))
        reply = Reply(250, 'queued' if queued else 'sent', from_server=False)
        return SendResult(dict.fromkeys(envelope.recipients, reply), self.name, queued)

    def _deferred(self, envelope: Envelope, text: str) -> SendResult:
        return SendResult(dict.fromkeys(envelope.recipients, Reply(451, text, '4.3.0', from_server=False)), self.name)

    def _note(self, result: SendResult) -> None:
        if result.trouble is None:
            self.pause.end()
        else:
            self.pause.begin(result.trouble)

    def close(self) -> None:
        close = getattr(self.transport, 'close', None)
        if close is not None:
            close()


class _Report:
    """What is told of one attempt: to the logs first, then to the receivers of signals."""

    def __init__(self, claim: IClaim, envelope: Envelope, attempts: int, delay: float) -> None:
        self._claim = claim
        self._envelope = envelope
        self._common = {
            'id': claim.id,
            'msgid': envelope.message_id,
            'from': f'<{envelope.sender}>',
        }
        self._figures = {'attempts': attempts, 'delay': f'{max(delay, 0):.1f}'}

    def tell(self, answers: Sequence[SendResult], result: SendResult, settlement: Settlement) -> None:
        for answer in answers:
            for recipient, reply in answer.replies.items():
                status = 'sent' if reply.accepted else 'refused' if reply.refused else 'deferred'
                source = {'smtp': str(reply)} if reply.from_server else {'error': str(reply)}
                self._log(delivery_log, logging.INFO, status, [recipient], via=answer.transport, **source)
        if settlement.waiting and settlement.counted:
            self._log(queue_log, logging.INFO, 'deferred', settlement.waiting, error=settlement.last_reply)
        for burial in settlement.burials:
            self._log(queue_log, logging.ERROR, 'buried', burial.recipients, error=burial.reason)
        if result.accepted:
            notify(MQSignal.delivery_successful, self._claim, result)
        if settlement.burials or (settlement.waiting and settlement.counted):
            notify(MQSignal.delivery_failed, self._claim, result)

    def _log(self, logger: logging.Logger, level: int, status: str, to: Sequence[str], **said: str) -> None:
        log_event(logger, level, status=status, **self._common, to=','.join(to), **self._figures, **said)
