"""
How mail comes into a :class:`~.sql.SQLQueue`: in the session of the application, or by itself.

This half of the queue needs the ORM of SQLAlchemy, and is imported by processes that send.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pyramid_mailqueue.logs import log_queued
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.sql.database import Database
from pyramid_mailqueue.queues.sql.deadlines import STATEMENT_SECONDS
from pyramid_mailqueue.queues.sql.leases import Leases
from pyramid_mailqueue.queues.sql.new_message import NewMessage, insert_large
from pyramid_mailqueue.queues.sql.session import SameTables, insert_into, session_of, takes_part, unencodable
from pyramid_mailqueue.queues.sql.staging import SQLStaging

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ['Intake']

#: The slowest speed of an INSERT to allow for, in octets per second.
SLOWEST = 100_000


class Intake:
    """See the module."""

    def __init__(self, database: Database, leases: Leases) -> None:
        self._database = database
        self._leases = leases
        self._same_tables = SameTables(database)

    def staging(self, tell_news: Callable[[], None]) -> SQLStaging:
        """Return the mail of one transaction."""
        return SQLStaging(self._leases, tell_news)

    def takes_part(self, session: Any, manager: Any) -> bool:
        """See `ISessionQueue`."""
        return takes_part(session_of(session), manager, self._same_tables)

    def put_in(self, session: Any, envelope: Envelope) -> str:
        """See `ISessionQueue`."""
        message = NewMessage.made_of(envelope, self._leases, claimed=False)
        insert_into(session_of(session), message)
        return message.id

    def put(self, envelope: Envelope, *, claimed: bool) -> NewMessage:
        """Put a message in, *claimed* or not, in a transaction of its own.  Raises QueueError."""
        message = NewMessage.made_of(envelope, self._leases, claimed=claimed, has_begun=claimed)
        seconds = STATEMENT_SECONDS + len(envelope.content) / SLOWEST
        try:
            self._database.run(partial(self._insert, message), seconds)
        except UnicodeError as error:
            raise unencodable(error) from error
        log_queued(message.id, envelope)
        return message

    def _insert(self, message: NewMessage, connection: Connection) -> None:
        def insert_both(connection: Connection) -> None:
            connection.execute(message.statement, message.values)
            connection.execute(insert_large(), message.large)

        if message.large is None:
            connection.execute(message.statement, message.values)
        else:
            self._database.in_transaction(connection, insert_both)
        # A commit that waits for a standby is not undone when it is cancelled: it may be durable or not.
        self._database.deadlines.check()
