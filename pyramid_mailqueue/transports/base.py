"""
Base classes for transports and their connections, with defaults for the members that most of them do not need.

A transport that has more than one method to write is a server with a dialogue of its own: it returns connections, over
which the delivery engine sends, any number of them in one thread.  All others have :meth:`Transport.send`.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import Any

from zope.interface import implementer

from pyramid_mailqueue.interfaces import IConnection, ISender, ITransport
from pyramid_mailqueue.results import Burial, SendResult

__all__ = ['Connection', 'Transport', 'as_transport', 'run']


class Connection:
    """A base class for connections; see `IConnection`.  Each has to implement what is missing here."""

    @property
    def is_spent(self) -> bool:
        """See `IConnection`."""
        return False

    @property
    def needs_new(self) -> bool:
        """See `IConnection`."""
        return False


class Transport:
    """A base class for transports; see `ITransport`.  A transport has to implement :meth:`send`, and has a name."""

    name = ''

    def send(self, sender: str, recipients: tuple[str, ...], content: bytes, /) -> SendResult | bool:
        """See `ITransport`."""
        raise NotImplementedError

    def connect(self, instead_of: IConnection | None = None) -> IConnection | None:
        """See `ITransport`.  There are no connections."""
        return None

    def close(self) -> None:
        """See `ITransport`."""

    def abort(self) -> None:
        """See `ITransport`."""

    def reload(self) -> None:
        """See `ITransport`."""

    def leads_to(self, queue: object) -> bool:
        """See `ITransport`."""
        return False

    def bury(self, sender: str, content: bytes, burials: Sequence[Burial]) -> bool:
        """See `ITransport`."""
        return False


@implementer(ITransport)
class _Completed(Transport):
    """An object of an application, with the members that it lacks."""

    def __init__(self, sender: Any) -> None:
        self.sender = sender
        self.name = getattr(sender, 'name', None) or type(sender).__name__
        names = ['abort', 'close', 'leads_to', 'reload']
        if ITransport.providedBy(sender):
            # Any other sender may have a method of this name for itself.
            names.append('connect')
        for name in names:
            if hasattr(sender, name):
                setattr(self, name, getattr(sender, name))

    def send(self, sender: str, recipients: tuple[str, ...], content: bytes, /) -> SendResult | bool:
        """See `ITransport`."""
        answer: SendResult | bool = self.sender.send(sender, recipients, content)
        return answer

    def bury(self, sender: str, content: bytes, burials: Sequence[Burial]) -> bool:
        """See `ITransport`.  If it returns nothing and raises nothing it was done."""
        bury = getattr(self.sender, 'bury', None)
        if bury is None:
            return False
        is_kept = bury(sender, content, burials)
        return is_kept is None or bool(is_kept)


def as_transport(sender: ISender) -> ITransport:
    """Return *sender* as a whole `ITransport`: itself if it is a :class:`Transport`."""
    return sender if isinstance(sender, Transport) else _Completed(sender)


def run(connection: IConnection) -> SendResult | bool | None:
    """Wait in this thread until the oldest offer in hand has its result, and return that; None if there is none."""
    poll = select.poll()
    events = 0
    while True:
        for result in connection.advance(events):
            return result
        if connection.is_spent:
            return None
        mask, seconds = connection.wait()
        poll.register(connection.fileno(), mask)
        events = sum(ready for _, ready in poll.poll(max(0, seconds) * 1000))
