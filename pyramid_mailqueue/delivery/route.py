"""A transport as the delivery sees it: answers in one form, and a back-off after its server's trouble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pyramid_mailqueue.delivery.backoff import BackOff
from pyramid_mailqueue.exceptions import ServerTrouble, described
from pyramid_mailqueue.interfaces import ISender
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import Burial, Offer, Reply, SendResult
from pyramid_mailqueue.transports.base import as_transport

__all__ = ['Route']

log = Log('mailqueue.delivery')

#: The outcome for a recipient whom a transport that is not in trouble leaves out.  Silence is no success.
_SILENCE = Reply(451, 'the transport said nothing of this recipient', '4.3.0', from_server=False)


class Route:
    """A transport and its back-off.  May be used by any number of threads at once."""

    def __init__(self, sender: ISender, backoff: BackOff | None = None) -> None:
        self.transport = as_transport(sender)
        self.name = self.transport.name
        self.backoff = backoff or BackOff()

    def send(self, offer: Offer) -> SendResult:
        """Call the transport's ``send``.  Raises no Exception."""
        try:
            answer = self.transport.send(offer.sender, offer.recipients, offer.content)
            return self.read(answer, offer.recipients, may_go_on=False)
        except ServerTrouble as trouble:
            return SendResult(transport=self.name, trouble=trouble)
        except Exception as error:  # noqa: BLE001 - it is logged
            return self.failed(error, offer.recipients)

    def failed(self, error: Exception, recipients: tuple[str, ...]) -> SendResult:
        """
        Log a defect of the transport, and return what it means for a message.

        The message may be what causes it, so this counts as an attempt.
        """
        log.error('The transport %s failed', self.name, exc_info=error)
        return self._deferred(recipients, f'the transport failed: {described(error)}')

    def read(self, answer: SendResult | bool | Any, recipients: tuple[str, ...], *, may_go_on: bool) -> SendResult:
        """
        Return what a transport has answered for *recipients* as a whole result.

        A transport may also answer with a plain bool, or with any object that is true if the message was sent.

        :param may_go_on: who is left out is to be offered again
        """
        if isinstance(answer, SendResult):
            if answer.transport and answer.replies.keys() == set(recipients):
                return answer
            replies = {r: answer.replies[r] for r in recipients if r in answer.replies}
            # Who has said nothing of anybody here would not be heard of next time either.
            if answer.trouble is None and not (may_go_on and replies):
                replies = {r: replies.get(r, _SILENCE) for r in recipients}
            return replace(answer, replies=replies, transport=answer.transport or self.name)
        if not answer:
            return self._deferred(recipients, 'the transport did not take the message')
        # Any object that is true may say so, as the result of mailqueue-runner does.
        queued = bool(getattr(answer, 'queued', False))
        reply = Reply(250, 'queued' if queued else 'sent', from_server=False)
        return SendResult(dict.fromkeys(recipients, reply), self.name, queued)

    def _deferred(self, recipients: tuple[str, ...], text: str) -> SendResult:
        return SendResult(dict.fromkeys(recipients, Reply(451, text, '4.3.0', from_server=False)), self.name)

    def still_in_trouble(self, trouble: ServerTrouble) -> SendResult:
        """Return the answer of a transport that is not asked during its back-off."""
        if trouble.in_message:
            # In the midst of another one.
            trouble = ServerTrouble(str(trouble), code=trouble.code)
        return SendResult(transport=self.name, trouble=trouble)

    def bury(self, envelope: Envelope, burials: Sequence[Burial]) -> bool:
        """Keep dead letters of a message here, if that can be done."""
        try:
            return self.transport.bury(envelope.sender, envelope.content, burials)
        except Exception:
            log.exception('The transport %s cannot keep a dead letter', self.name)
            return False
