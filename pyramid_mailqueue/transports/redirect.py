"""The transport for ``mailqueue.redirect_all_to``: it sends every message to one address."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from zope.interface import implementer

from pyramid_mailqueue.delivery.waiting import Wait
from pyramid_mailqueue.interfaces import ITransport
from pyramid_mailqueue.message.redirect import original_recipients
from pyramid_mailqueue.results import Offer, SendResult

__all__ = ['RedirectingTransport', 'redirecting']

#: Optional members of a transport that send nothing.
_PASSED_ON = frozenset({'abort', 'abort_opening', 'bury', 'leads_to', 'make_room', 'reload'})


def redirecting(transport: Any, to: str) -> ITransport:
    """
    Return *transport* as one that sends everything to the address *to*.

    New messages are redirected before they come into the queue.  This is for those that are in it already.

    :param transport: see `ITransport`; any `ISender` will do
    """
    if isinstance(transport, RedirectingTransport):
        return transport
    kind = RedirectingTransport
    if hasattr(transport, 'stream'):
        kind = _OpeningStream if hasattr(transport, 'open_stream') else _Stream
    return kind(transport, to)


@implementer(ITransport)
class RedirectingTransport:
    """
    See `ITransport`.  Each recipient has the reply that the server gave for the one address.

    Its name says that it redirects, so that no log claims a delivery to the original recipients.
    """

    def __init__(self, transport: Any, to: str) -> None:
        self._transport = transport
        self._to = to
        self.name = self._named(getattr(transport, 'name', None) or type(transport).__name__)

    def __getattr__(self, name: str) -> Any:
        # Only the known ones: another might be one more way to send.
        if name not in _PASSED_ON:
            raise AttributeError(name)
        return getattr(self._transport, name)

    def send(self, sender: str, recipients: tuple[str, ...], content: bytes) -> SendResult | bool:
        """See `ITransport`."""
        offer = self._redirected(Offer(sender, recipients, content))
        return self._for_all(recipients, self._transport.send(offer.sender, offer.recipients, offer.content))

    def close(self) -> None:
        """See `ITransport`."""
        close = getattr(self._transport, 'close', None)
        if close is not None:
            close()

    def _redirected(self, offer: Offer) -> Offer:
        if offer.recipients == (self._to,):
            return offer
        return offer._replace(recipients=(self._to,), content=original_recipients(offer.recipients) + offer.content)

    def _for_all(self, recipients: tuple[str, ...], answer: SendResult | bool) -> SendResult | bool:
        if not isinstance(answer, SendResult):
            return answer
        reply = answer.replies.get(self._to)
        replies = {} if reply is None else dict.fromkeys(recipients, reply)
        return replace(answer, replies=replies, transport=answer.transport and self._named(answer.transport))

    def _named(self, name: str) -> str:
        return f'{name} (redirected to {self._to})'


Stream = Generator[SendResult | bool | Wait]
More = Callable[[], Offer | None]


class _Stream(RedirectingTransport):
    """See `ITransport`."""

    def stream(self, first: Offer, more: More) -> Stream:
        """See `ITransport`."""
        return self._for_each(deque([first]), more, partial(self._transport.stream, self._redirected(first)))

    def _for_each(self, under_way: deque[Offer], more: More, stream: Callable[[More], Stream]) -> Stream:
        def next_offer() -> Offer | None:
            offer = more()
            if offer is None:
                return None
            under_way.append(offer)
            return self._redirected(offer)

        with closing(stream(next_offer)) as answers:
            for answer in answers:
                if isinstance(answer, Wait):
                    yield answer
                else:
                    yield self._for_all(under_way.popleft().recipients, answer)


class _OpeningStream(_Stream):
    """See `ITransport`."""

    def open_stream(self, more: More) -> Stream:
        """See `ITransport`."""
        return self._for_each(deque(), more, self._transport.open_stream)
