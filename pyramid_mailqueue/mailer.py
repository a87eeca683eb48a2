"""
Sending mail: in the transaction, at once, or later.

A :class:`Mailer` builds the envelope, so that a wrong message is refused where it is sent, and hands it to the data
manager of the current transaction.  Everything else happens when that commits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zope.interface import implementer

# Not on first use: a server may fork while another thread imports it, and the child would wait for that.
import pyramid_mailqueue.message.outgoing  # noqa: F401
from pyramid_mailqueue.datamanager import MailDataManager
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.events import MailEvent, MailQueued
from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.interfaces import IBindableMailer, IDispatcher, IMailQueue, ISessionQueue
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import SendResult
from pyramid_mailqueue.transactions import ITransactionSource, ManagerTransaction

__all__ = ['Mailer']

DELIVERIES = ('background', 'inline', 'queue')


@implementer(IBindableMailer)
class Mailer:
    """
    See `IMailer` and `IBindableMailer`.

    :param queue: where messages are durable
    :param handler: delivers what is sent immediately
    :param dispatchers: deliver after a commit: one for ``'background'`` and one for ``'inline'``
    :param compose: makes an envelope of a message, a sender and recipients
    :param delivery: the way of delivery for messages that do not name one
    :param transactions: knows the transaction to join; None is the manager of the thread, ``transaction.manager``
    :param notify: called with a :class:`~.events.MailQueued` for each message; must not raise
    """

    def __init__(
        self,
        queue: IMailQueue,
        handler: MessageHandler,
        dispatchers: Mapping[str, IDispatcher],
        compose: Callable[..., Envelope],
        *,
        delivery: str = 'background',
        transactions: ITransactionSource | None = None,
        notify: Callable[[MailEvent], None] | None = None,
    ) -> None:
        self.queue = queue
        self.handler = handler
        self.delivery = delivery
        self._dispatchers = dispatchers
        self._compose = compose
        self.transactions = transactions or ManagerTransaction()
        self._notify = notify

    def bound_to(self, transactions: ITransactionSource) -> Mailer:
        """See `IBindableMailer`."""
        # A copy, because a derived class may have another constructor.
        bound = copy.copy(self)
        bound.transactions = transactions
        return bound

    def send(
        self,
        message: Any,
        sender: str | None = None,
        recipients: Sequence[str] | str | None = None,
        delivery: str | None = None,
        session: Any = None,
    ) -> str:
        """See `IMailer`."""
        delivery = self._checked(delivery)
        if ISessionQueue.providedBy(self.queue):
            return self._send_in_session(self.queue, (message, sender, recipients), delivery, session)
        data_manager = self._data_manager()
        envelope = self._compose(message, sender, recipients)
        data_manager.add(envelope, delivery)
        return envelope.message_id

    def _send_in_session(
        self, queue: ISessionQueue, parts: tuple[Any, str | None, Any], delivery: str, session: Any
    ) -> str:
        if session is None:
            self.transactions.current()
            session = self.transactions.of_request(queue.session_name)
        if session is None:
            raise QueueError(
                "The sql queue puts mail into the application's database session, and there is none: "
                f'request.{queue.session_name} (mailqueue.sql_session) is missing. In a script, pass session=.'
            )
        envelope = self._compose(*parts)
        if queue.takes_part(session, self.transactions.manager):
            self._data_manager().add(envelope, delivery, session)
        else:
            queue.put_in(session, envelope)
        return envelope.message_id

    def send_immediately(
        self, message: Any, sender: str | None = None, recipients: Sequence[str] | str | None = None
    ) -> SendResult:
        """See `IMailer`."""
        envelope = self._compose(message, sender, recipients)
        claim = self.queue.put_claimed(envelope)
        try:
            self._tell_queued(claim.id, envelope)
            return self.handler.send_message(claim)
        finally:
            claim.release()
            self.queue.flush()

    def enqueue(self, message: Any, sender: str | None = None, recipients: Sequence[str] | str | None = None) -> str:
        """See `IMailer`."""
        envelope = self._compose(message, sender, recipients)
        self._tell_queued(self.queue.put(envelope), envelope)
        return envelope.message_id

    def _tell_queued(self, id: str, envelope: Envelope) -> None:
        if self._notify is not None:
            self._notify(MailQueued(id=id, envelope=envelope, recipients=envelope.recipients))

    def close(self) -> None:
        """Stop the deliveries of this process; what is not delivered yet waits in the queue."""
        for dispatcher in self._dispatchers.values():
            dispatcher.close()
        self.queue.close()

    def _checked(self, delivery: str | None) -> str:
        if delivery is None:
            return self.delivery
        if delivery not in DELIVERIES:
            raise ValueError(f'delivery must be one of {", ".join(DELIVERIES)}, not {delivery!r}')
        return delivery

    def _data_manager(self) -> MailDataManager:
        """The data manager of this queue in the current transaction; a new one joins with its first message."""
        txn = self.transactions.current()
        try:
            found: MailDataManager = txn.data(self.queue)
        except KeyError:
            manager, staging = self.transactions.manager, self.queue.staging()
            found = MailDataManager(txn, manager, staging, self._dispatchers, self._tell_queued)
            txn.set_data(self.queue, found)
        return found
