"""
The events for subscribers of an application that uses ``config.include('pyramid_mailqueue')``.

::

    @subscriber(MailBuried)
    def tell_support(event): ...

Subscribers are called in the thread of the event.  For most deliveries that is the delivery thread: there is no
request, and no transaction of one.  What a subscriber raises is logged with its name, and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zope.interface import providedBy

from pyramid_mailqueue.logs import Log, name_of
from pyramid_mailqueue.message.envelope import Envelope

__all__ = ['MailBuried', 'MailDeferred', 'MailDelivered', 'MailEvent', 'MailQueued', 'notify']

log = Log('mailqueue.plugins')


@dataclass(frozen=True, kw_only=True)
class MailEvent:
    """
    Something has happened to a message.  Subscribers to this class receive all events.

    :param id: the name of the message in its queue; ``''`` if it is in none, or if the queue does not say
    :param envelope: the message, with its recipients before the event
    :param recipients: the recipients that the event is about
    """

    id: str
    envelope: Envelope
    recipients: tuple[str, ...]

    @property
    def message_id(self) -> str:
        """The ``Message-ID`` with its angle brackets, as ``request.mailer.send()`` has returned it."""
        return self.envelope.message_id


@dataclass(frozen=True, kw_only=True)
class MailQueued(MailEvent):
    """The message is in the queue: its transaction has committed, or it was sent outside of any."""


@dataclass(frozen=True, kw_only=True)
class MailDelivered(MailEvent):
    """
    A server, or another transport, has taken the message.

    :param via: the name of the transport
    """

    via: str


@dataclass(frozen=True, kw_only=True)
class MailDeferred(MailEvent):
    """
    The message was tried, and waits for another attempt.

    :param reason: the reply for one of the recipients
    :param attempts: how many were made, including this one
    :param due: when the next one may be made, in seconds since the epoch
    """

    reason: str
    attempts: int
    due: float | None


@dataclass(frozen=True, kw_only=True)
class MailBuried(MailEvent):
    """
    The message is given up, and is a dead letter.

    :param reason: why
    """

    reason: str


def notify(registry: Any, event: MailEvent) -> None:
    """
    Call the subscribers of *event* in *registry*.  What one of them raises is logged, and the next one called.

    ``registry.notify`` would stop at the first one that raises.
    """
    for subscriber in registry.adapters.subscriptions([providedBy(event)], None):
        try:
            subscriber(event)
        except (Exception, SystemExit):
            log.exception('A subscriber of %s failed: %s', type(event).__name__, name_of(subscriber))
