"""The transport for ``mailqueue.redirect_all_to``: it sends every message to one address."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from zope.interface import implementer

from pyramid_mailqueue.interfaces import IConnection, ISender, ITransport
from pyramid_mailqueue.message.redirect import original_recipients
from pyramid_mailqueue.results import Burial, Offer, SendResult
from pyramid_mailqueue.transports.base import Connection, Transport, as_transport

__all__ = ['RedirectingTransport', 'redirecting']


def redirecting(transport: ISender, to: str) -> RedirectingTransport:
    """
    Return *transport* as one that sends everything to the address *to*.

    New messages are redirected before they come into the queue.  This is for those that are in it already.
    """
    return transport if isinstance(transport, RedirectingTransport) else RedirectingTransport(transport, to)


@implementer(ITransport)
class RedirectingTransport(Transport):
    """
    See `ITransport`.  Each recipient has the reply that the server gave for the one address.

    Its name says that it redirects, so that no log claims a delivery to the original recipients.
    """

    def __init__(self, transport: ISender, to: str) -> None:
        self._transport = as_transport(transport)
        self._to = to
        self.name = self._named(self._transport.name)

    def send(self, sender: str, recipients: tuple[str, ...], content: bytes, /) -> SendResult | bool:
        """See `ITransport`."""
        offer = self.redirected(Offer(sender, recipients, content))
        return self.for_all(recipients, self._transport.send(offer.sender, offer.recipients, offer.content))

    def connect(self, instead_of: IConnection | None = None) -> IConnection | None:
        """See `ITransport`."""
        connection = self._transport.connect(instead_of and _within(instead_of))
        return connection and _RedirectingConnection(connection, self)

    def close(self) -> None:
        """See `ITransport`."""
        self._transport.close()

    def abort(self) -> None:
        """See `ITransport`."""
        self._transport.abort()

    def reload(self) -> None:
        """See `ITransport`."""
        self._transport.reload()

    def leads_to(self, queue: object) -> bool:
        """See `ITransport`."""
        return self._transport.leads_to(queue)

    def bury(self, sender: str, content: bytes, burials: Sequence[Burial]) -> bool:
        """See `ITransport`.  Nothing is sent: a dead letter keeps its recipients."""
        return self._transport.bury(sender, content, burials)

    def redirected(self, offer: Offer) -> Offer:
        """Return *offer* as one to the one address; the original recipients are named in its header."""
        if offer.recipients == (self._to,):
            return offer
        return offer._replace(recipients=(self._to,), content=original_recipients(offer.recipients) + offer.content)

    def for_all(self, recipients: tuple[str, ...], answer: SendResult | bool) -> SendResult | bool:
        """Return the answer for the one address as one for all of *recipients*."""
        if not isinstance(answer, SendResult):
            return answer
        reply = answer.replies.get(self._to)
        replies = {} if reply is None else dict.fromkeys(recipients, reply)
        return replace(answer, replies=replies, transport=answer.transport and self._named(answer.transport))

    def _named(self, name: str) -> str:
        return f'{name} (redirected to {self._to})'


@implementer(IConnection)
class _RedirectingConnection(Connection):
    """See `IConnection`."""

    def __init__(self, connection: IConnection, transport: RedirectingTransport) -> None:
        self.connection = connection
        self._transport = transport
        self._recipients: deque[tuple[str, ...]] = deque()

    def fileno(self) -> int:
        return self.connection.fileno()

    @property
    def is_spent(self) -> bool:
        return self.connection.is_spent

    @property
    def needs_new(self) -> bool:
        return self.connection.needs_new

    @property
    def has_room(self) -> bool:
        return self.connection.has_room

    def submit(self, offer: Offer) -> None:
        self.connection.submit(self._transport.redirected(offer))
        self._recipients.append(offer.recipients)

    def advance(self, events: int = 0) -> Iterator[SendResult | bool]:
        for answer in self.connection.advance(events):
            yield self._transport.for_all(self._recipients.popleft(), answer)

    def wait(self) -> tuple[int, float]:
        return self.connection.wait()

    def release(self) -> None:
        self.connection.release()


def _within(connection: IConnection) -> IConnection:
    return connection.connection if isinstance(connection, _RedirectingConnection) else connection
