"""
The application's own session, into which a :class:`~.sql.SQLQueue` puts its mail, and the checks on it.

Whether it commits with a transaction, whether it writes where the queue looks, and whether a savepoint of it was rolled
back is checked here, without a query for each message.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, event, insert, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session, SessionTransaction, scoped_session
from transaction.interfaces import NoTransaction

from pyramid_mailqueue.exceptions import MailqueueError, QueueError, translated
from pyramid_mailqueue.logs import log_event, queue_log
from pyramid_mailqueue.queues.sql.database import Database
from pyramid_mailqueue.queues.sql.engine import shown
from pyramid_mailqueue.queues.sql.new_message import NewMessage, insert_large
from pyramid_mailqueue.queues.sql.schema import Message
from pyramid_mailqueue.queues.sql.tables import MESSAGES
from pyramid_mailqueue.queues.sql.trouble import first_line, is_rolled_back_for_others

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.pool import Pool

    # The package has no types.
    class TransientError(Exception): ...
else:
    from transaction.interfaces import TransientError

__all__ = ['SameTables', 'insert_into', 'is_rolled_back', 'savepoint_of', 'session_of', 'takes_part', 'unencodable']


class TransactionConflict(QueueError, TransientError):
    """
    The database has given up the transaction in favour of another one: a serialization failure, or a deadlock.

    The whole transaction works when it is repeated; pyramid_retry does that because of the second base.
    """


#: Where a session keeps which of its savepoints were rolled back.
_ROLLED_BACK = 'mailqueue_rolled_back'


def session_of(given: Any) -> Session:
    """Return the session that an application means.  Raises QueueError."""
    if isinstance(given, Session):
        return given
    if isinstance(given, scoped_session):
        # It stands for another one.
        return session_of(given())
    kind = type(given)
    if any(it.__module__.startswith('sqlalchemy.ext.asyncio') for it in kind.__mro__):
        cure = 'With an AsyncSession: await session.run_sync(lambda s: mailer.send(message, session=s)).'
    else:
        cure = 'With an engine: with Session(engine) as s, s.begin(): mailer.send(message, session=s).'
    raise QueueError(
        'Mail is put into a session of SQLAlchemy (sqlalchemy.orm.Session); this is an object of '
        f'{kind.__module__}.{kind.__qualname__}. {cure}'
    )


def takes_part(session: Session, manager: Any, same_tables: SameTables) -> bool:
    """See `ISessionQueue`."""
    with _told_why():
        same_tables.make_sure(session)
        try:
            txn = manager.get()
        except NoTransaction:
            return False
        if _has_joined(session, txn):
            return True
        # A session registered with zope.sqlalchemy joins the transaction when its own begins.
        session.connection(bind_arguments=_destination())
    # If a transaction does not list its resources (not a public attribute), the session is taken to join it.
    return getattr(txn, '_resources', None) is None or _has_joined(session, txn)


def _has_joined(session: Session, txn: Any) -> bool:
    return any(getattr(resource, 'session', None) is session for resource in getattr(txn, '_resources', ()))


def insert_into(session: Session, message: NewMessage) -> None:
    """
    INSERT a message.  The session's own pending objects are left alone.  Raises QueueError.

    Listeners that have to know that the session has changed get the event of an ORM statement.  If there is none but
    zope.sqlalchemy it is told directly: the event costs a tenth of such a transaction.
    """
    statement, values = message.statement, message.values
    with _told_why():
        # The listeners of zope.sqlalchemy are methods of an object that has this one, too.
        listeners = [getattr(it, '__self__', None) for it in session.dispatch.do_orm_execute]
        marks: list[Any] = [getattr(it, 'mark_changed', None) for it in listeners]
        if None in marks:
            session.execute(statement, values)
            if message.large is not None:
                session.execute(insert_large(), message.large, bind_arguments=_destination())
            return
        for mark_changed in marks:
            mark_changed(session)
        connection = session.connection(bind_arguments=_destination())
        # Those of a session are new in SQLAlchemy 2.1.
        options = getattr(session, 'execution_options', {})
        connection.execute(statement, values, execution_options=options)
        if message.large is not None:
            connection.execute(insert_large(), message.large, execution_options=options)


_INSERT = insert(Message)


def _destination() -> dict[str, Any]:
    """Return where a session writes a message: it may have several databases, and may read elsewhere."""
    return {'mapper': Message.__mapper__, 'clause': _INSERT}


@contextmanager
def _told_why() -> Iterator[None]:
    """Raise QueueError, with a text for the developer of the application."""
    try:
        yield
    except AssertionError as error:
        # Raised by zope.sqlalchemy.
        raise QueueError(f'Mail cannot be sent in this session: {error}.') from error
    except UnicodeError as error:
        raise unencodable(error) from error
    except SQLAlchemyError as error:
        hint = ''
        if isinstance(error, DBAPIError) and MESSAGES.name in str(error.orig):
            hint = ' Create the tables in the database of the session: mq-queue app.ini init.'
        problem = f'Mail cannot be put into the session of the application: {first_line(error)}.'
        kind = TransactionConflict if is_rolled_back_for_others(error) else QueueError
        raise translated(kind(problem + hint), error) from error


def unencodable(error: UnicodeError) -> QueueError:
    """Return the error for a message that a driver cannot write in the encoding of its database."""
    return QueueError(f'Mail cannot be put into the database: {error}. The encoding of the database has to be UTF8.')


# --- is it the database of the queue? ---------------------------------------


class SameTables:
    """
    Makes sure that sessions write into the tables that the queue reads: mail elsewhere would never be found.

    Each engine is asked once, with the first message that goes through it.

    :param database: of the queue
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        # An engine that is given options shares its pool with the one that it comes from.  Each pool with the schemas
        # that were translated.
        self._seen: WeakKeyDictionary[Pool, set[str | None]] = WeakKeyDictionary()

    def make_sure(self, session: Session) -> None:
        """Raise QueueError if *session* writes elsewhere; or SQLAlchemyError."""
        bind = session.get_bind(**_destination())
        seen = self._seen.setdefault(bind.engine.pool, set())
        schema = _schema_in(bind)
        if schema not in seen:
            self._compare(session)
            seen.add(schema)

    def _compare(self, session: Session) -> None:
        try:
            ours = self._database.run(_tables_of_queue)
        except MailqueueError as error:
            # Not asked again: the application's mail must not wait for a server that does not answer.
            reason = 'it is unknown whether the session of the application writes into the tables of the queue'
            log_event(queue_log, logging.WARNING, status='trouble', error=error, reason=reason)
            return
        connection = session.connection(bind_arguments=_destination())
        # Where the queue has no tables (any more), the INSERT tells.
        if ours and ours.isdisjoint(_tables_of(connection)):
            raise QueueError(
                'The session of the application writes into '
                f'{shown(connection.engine.url)}, and the queue is in '
                f'{self._database.name} (mailqueue.sql_url): that is another database, or (search_path) another '
                'schema, and mq-run would never find this mail. Name the database of the session.'
            )


_TABLE = text(
    'SELECT CAST(extract(epoch FROM pg_postmaster_start_time()) AS float8), pg_database.oid, pg_class.oid '
    'FROM pg_class, pg_database '
    'WHERE pg_class.oid = to_regclass(CAST(:name AS text)) AND datname = current_database()'
)


def _tables_of(connection: Connection) -> set[tuple[Any, ...]]:
    """
    Return unique keys: of the table into which a message would be put, or of those that it may be.

    URLs cannot be compared: one may name a socket and the other one a host, or a pooler.
    """
    if connection.dialect.name == 'postgresql':
        found = connection.execute(_TABLE, {'name': _name_in(connection)})
        return {tuple(row) for row in found}
    files: set[tuple[Any, ...]] = set()
    if connection.dialect.name == 'sqlite':
        for _, _, path in connection.exec_driver_sql('PRAGMA database_list'):
            # One in memory has no file.
            with suppress(OSError):
                status = os.stat(path)
                files.add((status.st_dev, status.st_ino))
    return files


def _tables_of_queue(connection: Connection) -> set[tuple[Any, ...]]:
    # A process that only sends needs no connection of the queue from here on: this one is closed, and not kept.
    connection.detach()
    return _tables_of(connection)


def _name_in(connection: Connection) -> str:
    """Return the name of the table in statements of this connection; the queue's own translates no schema."""
    schema = _schema_in(connection)
    name = MESSAGES.name
    return name if schema is None else f'{connection.dialect.identifier_preparer.quote_schema(schema)}.{name}'


def _schema_in(bind: Engine | Connection) -> str | None:
    """The schema that the tables are in by ``schema_translate_map``; None if that does not say."""
    schemas = bind.get_execution_options().get('schema_translate_map') or {}
    schema: str | None = schemas.get(None)
    return schema


# --- savepoints -------------------------------------------------------------


def savepoint_of(session: Session) -> SessionTransaction | None:
    """Return the savepoint in which *session* is, for :func:`is_rolled_back`; None if it is in none."""
    savepoint = session.get_nested_transaction()
    if savepoint is not None and not event.contains(session, 'after_soft_rollback', _note_rollback):
        event.listen(session, 'after_soft_rollback', _note_rollback)
    return savepoint


def _note_rollback(session: Session, transaction: SessionTransaction) -> None:
    # A flush that fails reports a transaction of its own, and rolls back the savepoint around it.
    while not transaction.nested and transaction.parent is not None:
        transaction = transaction.parent
    session.info.setdefault(_ROLLED_BACK, WeakSet()).add(transaction)


def is_rolled_back(savepoint: SessionTransaction | None) -> bool:
    """Whether *savepoint*, or one around it, was rolled back."""
    while savepoint is not None:
        if savepoint in savepoint.session.info.get(_ROLLED_BACK, ()):
            return True
        savepoint = savepoint.parent
    return False
