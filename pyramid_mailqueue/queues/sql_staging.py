"""
The mail of one transaction, on its way into the tables of a :class:`~.sql.SQLQueue` by the application's own session.

Each message is INSERTed when it is added: it is the database that commits it with the application's data, rolls it back
with a savepoint, or drops it.  So there is nothing to prepare, to publish or to discard here, and nothing can be in
doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from transaction.interfaces import NoTransaction
from zope.interface import implementer

from pyramid_mailqueue.delivery.logs import log_queued
from pyramid_mailqueue.envelope import Envelope
from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.interfaces import IClaim, ISessionStaging
from pyramid_mailqueue.queues.sql_claim import NewMessage
from pyramid_mailqueue.queues.sql_database import first_line
from pyramid_mailqueue.queues.sql_leases import Leases
from pyramid_mailqueue.queues.sql_schema import Message

__all__ = ['SQLStaging', 'insert_into', 'takes_part']


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
        self._added: list[NewMessage] = []

    def join(self, session: Any) -> None:
        """See `ISessionStaging`."""
        self._session = session

    def add(self, envelope: Envelope, claimed: bool) -> None:
        """See `IStaging`."""
        message = NewMessage.made_of(envelope, self._leases, claimed=claimed)
        insert_into(self._session, message)
        self._added.append(message)

    def mark(self) -> int:
        """See `IStaging`.  The mark is the number of messages."""
        return len(self._added)

    def rollback(self, mark: object) -> list[Envelope]:
        """See `IStaging`.  Their rows are gone with the savepoint of the session."""
        assert isinstance(mark, int)
        dropped = [message.envelope for message in self._added[mark:]]
        del self._added[mark:]
        return dropped

    def prepare(self, alone: bool = False) -> None:
        """See `IStaging`."""

    def publish(self) -> Sequence[IClaim | None]:
        """See `IStaging`."""
        added, self._added = self._added, []
        claims = [message.claim for message in added]
        for message in added:
            log_queued(message.id, message.envelope)
            if message.claim is not None:
                # A savepoint may have taken the row along, which nobody but the database knows.
                message.claim.is_confirmed = False
        self._leases.hold([claim for claim in claims if claim is not None])
        if None in claims:
            self._tell_news()
        return claims

    def discard(self) -> list[Envelope]:
        """See `IStaging`."""
        added, self._added = self._added, []
        return [message.envelope for message in added]

    def leave_in_doubt(self) -> None:
        """See `IStaging`.  The database knows; if the rows are there mq-run takes them up when their lease is over."""
        self._added = []


def takes_part(session: Any, manager: Any) -> bool:
    """See `ISessionQueue`."""
    try:
        txn = manager.get()
    except NoTransaction:
        return False
    # A scoped_session stands for another one.
    real = session() if callable(session) else session
    if _has_joined(real, txn):
        return True
    with _told_why():
        # What zope.sqlalchemy has registered joins the transaction when its own begins.
        session.connection(bind_arguments={'mapper': Message})
    # Of a transaction that does not tell (it is not public) we think that the application means this one.
    return getattr(txn, '_resources', None) is None or _has_joined(real, txn)


def _has_joined(session: Any, txn: Any) -> bool:
    return any(getattr(resource, 'session', None) is session for resource in getattr(txn, '_resources', ()))


def insert_into(session: Any, message: NewMessage) -> None:
    """
    INSERT a row in a session of SQLAlchemy.

    The session's own pending objects are left alone.
    """
    with _told_why():
        session.execute(message.statement, message.values)


@contextmanager
def _told_why() -> Iterator[None]:
    """Raise QueueError, in words for the developer of the application."""
    try:
        yield
    except AssertionError as error:
        # This is how zope.sqlalchemy says it.
        raise QueueError(f'Mail cannot be sent in this session: {error}.') from error
    except SQLAlchemyError as error:
        hint = ''
        if isinstance(error, DBAPIError) and Message.__tablename__ in str(error.orig):
            hint = ' Create the tables in the database of the session: mq-queue app.ini init.'
        problem = f'Mail cannot be put into the session of the application: {first_line(error)}.'
        raise QueueError(problem + hint) from error
