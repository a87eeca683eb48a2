"""A queue as a transport: what is "sent" to it waits for mq-run."""

from __future__ import annotations

import os
from collections.abc import Sequence

from zope.interface import implementer

from pyramid_mailqueue.interfaces import ITransport
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.results import Burial, Reply, SendResult, Settlement
from pyramid_mailqueue.transports.base import Transport

__all__ = ['MaildirBackend']


@implementer(ITransport)
class MaildirBackend(Transport):
    """
    See `ITransport`.  As the last transport it catches what the others could not deliver.

    :param path: the queue directory; it is created if it is missing
    :raises QueueError: the directory cannot be created or used
    """

    name = 'maildir'

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._queue = MaildirQueue(path)

    def send(self, sender: str, recipients: tuple[str, ...], content: bytes) -> SendResult:
        """See `ITransport`.  Raises QueueError if the queue cannot take the message."""
        name = self._queue.put(Envelope(sender, tuple(recipients), content))
        reply = Reply(250, f'queued as {name}', '2.0.0', from_server=False)
        return SendResult(dict.fromkeys(recipients, reply), self.name, queued=True)

    def leads_to(self, queue: object) -> bool:
        """See `ITransport`."""
        return isinstance(queue, MaildirQueue) and queue.path == self._queue.path

    def bury(self, sender: str, content: bytes, burials: Sequence[Burial]) -> bool:
        """See `ITransport`.  Raises QueueError if the queue cannot take them."""
        recipients = tuple(recipient for burial in burials for recipient in burial.recipients)
        claim = self._queue.put_claimed(Envelope(sender, recipients, content))
        claim.settle(Settlement(burials=tuple(burials)))
        return True

    def close(self) -> None:
        """See `ITransport`."""
        self._queue.flush()
