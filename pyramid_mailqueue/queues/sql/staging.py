"""
The mail of one transaction, on its way into the tables of a :class:`~.sql.SQLQueue`, in the application's own session.

Each message is INSERTed when it is added: the database commits it with the application's data, rolls it back with a
savepoint, or drops it.  So there is nothing to prepare, to publish or to discard here, and nothing can be in doubt.
Only if the session has ended before the transaction was aborted, the database is asked what it has committed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from pyramid_mailqueue.exceptions import MailqueueError
from pyramid_mailqueue.interfaces import IClaim, ISessionStaging
from pyramid_mailqueue.logs import log_event, log_queued, queue_log
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.sql.claim import SQLClaim
from pyramid_mailqueue.queues.sql.leases import Leases
from pyramid_mailqueue.queues.sql.new_message import NewMessage
from pyramid_mailqueue.queues.sql.session import insert_into, is_rolled_back, savepoint_of, session_of
from pyramid_mailqueue.results import DROPPED, Dropped

if TYPE_CHECKING:
    from sqlalchemy.orm import SessionTransaction

__all__ = ['SQLStaging']


@implementer(ISessionStaging)
class SQLStaging:
    """
    See `ISessionStaging`.

    :param tell_news: called when there is mail that is not claimed by this process
    """

    def __init__(self, leases: Leases, tell_news: Callable[[], None]) -> None:
        self._leases = leases
        self._tell_news = tell_news
        self._session: Any = None
        # The transaction of the session to which they were added, and not a savepoint.
        self._transaction: SessionTransaction | None = None
        # Each with the savepoint of the session in which it was added.
        self._added: list[tuple[NewMessage, SessionTransaction | None]] = []
        self._is_prepared = False

    def join(self, session: Any) -> None:
        """See `ISessionStaging`."""
        self._session = session_of(session)

    def add(self, envelope: Envelope, claimed: bool) -> None:
        """See `IStaging`."""
        message = NewMessage.made_of(envelope, self._leases, claimed=claimed)
        insert_into(self._session, message)
        self._transaction = self._session.get_transaction()
        self._added.append((message, savepoint_of(self._session)))

    def mark(self) -> int:
        """See `IStaging`.  The mark is the number of messages."""
        return len(self._added)

    def rollback(self, mark: object) -> list[Envelope]:
        """See `IStaging`.  Their rows are gone with the savepoint of the session."""
        assert isinstance(mark, int)
        dropped = [message.envelope for message, _ in self._added[mark:]]
        del self._added[mark:]
        return dropped

    def prepare(self, alone: bool = False) -> None:
        """See `IStaging`.  From here on the session may commit the rows."""
        if claims := self._claims:
            for claim in claims:
                claim.is_open = True
            self._leases.watch()
        self._is_prepared = True

    @property
    def _claims(self) -> list[SQLClaim]:
        return [message.claim for message, _ in self._added if message.claim is not None]

    def publish(self) -> Sequence[IClaim | Dropped | None]:
        """See `IStaging`."""
        published = [self._publish(message, savepoint) for message, savepoint in self._added]
        self._leases.hold([claim for claim in published if isinstance(claim, SQLClaim)])
        # Only now: until then an interruption leaves them here.
        self._added = []
        if None in published:
            self._tell_news()
        return published

    def _publish(self, message: NewMessage, savepoint: SessionTransaction | None) -> SQLClaim | Dropped | None:
        if is_rolled_back(savepoint):
            if message.claim is not None:
                message.claim.is_open = False
            return DROPPED
        log_queued(message.id, message.envelope)
        if message.claim is not None:
            # A savepoint that is not the session's may have taken the row along, which only the database knows.
            message.claim.is_confirmed = False
        return message.claim

    def discard(self) -> list[Envelope]:
        """See `IStaging`."""
        added = [message for message, _ in self._added]
        # A transaction that is aborted before prepare() has nothing in the database.
        has_ended = self._is_prepared and self._session.get_transaction() is not self._transaction
        there = self._committed(added) if added and has_ended else ()
        self._let_go()
        self._added = []
        return [message.envelope for message in added if message not in there]

    def _committed(self, messages: Sequence[NewMessage]) -> Sequence[NewMessage]:
        """
        Return the messages whose rows are there, or may be; release those for a run, and log them.

        Their session has ended already: one that commits in its vote may be followed by a resource that votes "no".
        """
        try:
            ids = self._leases.present([message.id for message in messages])
        except MailqueueError as error:
            reason = 'it is unknown whether the session of its failed transaction had committed; if so, it will be sent'
            for message in messages:
                log_event(queue_log, logging.WARNING, status='trouble', id=message.id, error=error, reason=reason)
            return messages
        there = [message for message in messages if message.id in ids]
        reason = 'its transaction has failed, but its session had committed before: it will be sent'
        for message in there:
            log_queued(message.id, message.envelope)
            log_event(queue_log, logging.WARNING, status='trouble', id=message.id, reason=reason)
        claims = [message.claim for message in there if message.claim is not None]
        self._leases.hold(claims)
        self._leases.release(claims)
        return there

    def _let_go(self) -> None:
        """Let the heartbeat end the claims: the session may have committed by then, which is not known here."""
        if self._is_prepared and (claims := self._claims):
            self._leases.let_go(claims)
            self._leases.watch()

    def leave_in_doubt(self) -> None:
        """See `IStaging`.  The database decides; if the rows are there they wait."""
        self._let_go()
        self._added = []
