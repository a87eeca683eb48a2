"""
The connections of a queue to its database, at most two for each process, and what is done when one fails.

Every statement is a transaction of its own, but for the few that belong together (:meth:`Database.transact`).  On
SQLite such a one begins with the right to write: a transaction that has only read until then is refused it when
somebody else has written meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.pool import QueuePool

from pyramid_mailqueue.exceptions import ConfigurationError, QueueError
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.queues.sql_schema import VERSION, create_tables, ddl, version_of

__all__ = ['AS_BYTES', 'CONNECTIONS', 'Database', 'DatabaseAway', 'first_line']

T = TypeVar('T')

#: The option of a statement whose result is to come as bytes, where the driver can: contents would come as digits.
AS_BYTES = 'mailqueue_as_bytes'

#: How many connections one process has, at most.
CONNECTIONS = 2

#: How long somebody waits for a lock of SQLite, in seconds.
SQLITE_PATIENCE = 30

_OLDEST = {'postgresql': ((12,), 'PostgreSQL 12'), 'sqlite': ((3, 35), 'SQLite 3.35')}

# What a host that is gone without a farewell may cost, or a lock of SQLite: in seconds, but for tcp_user_timeout.
_CONNECT: Mapping[str, Mapping[str, Any]] = {
    'postgresql': {'connect_timeout': 10, 'keepalives_idle': 30, 'keepalives_interval': 10, 'tcp_user_timeout': 60_000},
    'sqlite': {'timeout': SQLITE_PATIENCE},
}

# Whatever else fails may work in a moment: a server that starts, a lock, a full disk.
_OUR_FAULT = (DataError, IntegrityError, ProgrammingError)


class DatabaseAway(QueueError):
    """The database cannot be used now; the same may work later."""


class Database:
    """
    See the module.

    :param url: as SQLAlchemy takes it; connections are made when they are needed
    :raises ConfigurationError: this is no database for a queue
    """

    def __init__(self, url: str | URL) -> None:
        try:
            parsed = make_url(url)
            self._engine = _engine(parsed)
        except (ArgumentError, NoSuchModuleError, ImportError, ValueError) as error:
            raise ConfigurationError(
                f'mailqueue.sql_url (not shown) cannot be used: {error}. It is a URL of SQLAlchemy such as '
                'postgresql+psycopg://user@host/database, and needs the driver that it names.'
            ) from error
        self.name = parsed.render_as_string(hide_password=True)
        self.dialect = self._engine.dialect.name
        self._pid = os.getpid()
        self._turns = _Turns(CONNECTIONS)
        self._is_checked = False
        call_in_children(self._forget_connections)

    def __repr__(self) -> str:
        return f'<Database {self.name}>'

    def _forget_connections(self) -> None:
        """In a forked child: the connections are the parent's."""
        self._pid = os.getpid()
        self._turns = _Turns(CONNECTIONS)
        self._engine.dispose(close=False)

    @property
    def engine(self) -> Engine:
        """The engine, with connections of this process."""
        if self._pid != os.getpid():
            # Not every server that forks tells Python of it.
            self._forget_connections()
        return self._engine

    def close(self) -> None:
        """Close the connections that nobody uses.  The database may be used again."""
        self.engine.dispose()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Lend a connection, to those who wait in their order.  Raises SQLAlchemyError."""
        engine = self.engine
        with self._turns.one(), engine.connect() as connection:
            yield connection

    def run(self, work: Callable[[Connection], T]) -> T:
        """
        Return what *work* returns, whose statements are transactions of their own.

        A connection that turns out to be closed (a server that was restarted) is replaced once, and *work* done again:
        it has to be such that this does no harm.  Raises QueueError, or DatabaseAway.
        """
        try:
            try:
                return self._try(work)
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                return self._try(work)
        except SQLAlchemyError as error:
            raise self.refusal(error) from error

    def _try(self, work: Callable[[Connection], T]) -> T:
        with self.connection() as connection:
            if not self._is_checked:
                self._check(connection)
            return work(connection)

    def transact(self, work: Callable[[Connection], T]) -> T:
        """The same, as one transaction."""
        return self.run(lambda connection: self._in_transaction(connection, work))

    def create_tables(self) -> None:
        """Create those that are missing.  Raises QueueError, or DatabaseAway."""
        try:
            with self.connection() as connection:
                self._in_transaction(connection, create_tables)
        except SQLAlchemyError as error:
            raise self.refusal(error) from error

    def ddl(self) -> str:
        """Return the statements that create the tables."""
        return ddl(self._engine.url)

    def _in_transaction(self, connection: Connection, work: Callable[[Connection], T]) -> T:
        begin = 'BEGIN IMMEDIATE' if self.dialect == 'sqlite' else 'BEGIN ISOLATION LEVEL READ COMMITTED'
        connection.exec_driver_sql(begin)
        try:
            result = work(connection)
            connection.exec_driver_sql('COMMIT')
        except BaseException:
            with suppress(SQLAlchemyError):
                connection.exec_driver_sql('ROLLBACK')
            raise
        return result

    def check(self) -> None:
        """Raise ConfigurationError if the tables are not there, or are others; DatabaseAway if nobody knows."""
        self.run(lambda _: None)

    def _check(self, connection: Connection) -> None:
        oldest, name = _OLDEST[self.dialect]
        if (connection.dialect.server_version_info or oldest) < oldest:
            raise ConfigurationError(f'{self.name} is too old for the queue: it has to be {name} or later.')
        version = version_of(connection)
        if version is None:
            raise ConfigurationError(
                f'{self.name} has no tables for the queue. Create them with: mq-queue app.ini init (or in a migration, '
                'see docs/sql.rst).'
            )
        if version != VERSION:
            raise ConfigurationError(
                f'{self.name} has tables of version {version} for the queue, and this pyramid_mailqueue needs version '
                f'{VERSION}. See docs/sql.rst.'
            )
        self._is_checked = True

    def refusal(self, error: SQLAlchemyError) -> QueueError:
        """Return what to raise because of *error*."""
        kind = QueueError if isinstance(error, _OUR_FAULT) else DatabaseAway
        return kind(f'The queue in {self.name} cannot be used: {first_line(error)}')


class _Turns:
    """
    Lets so many threads do something at the same time, and those who wait in their order.

    Without an order, threads that deliver could keep the heartbeat from its turn until its leases have run out.
    """

    def __init__(self, number: int) -> None:
        self._free = number
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    @contextmanager
    def one(self) -> Iterator[None]:
        self._take()
        try:
            yield
        finally:
            self._give()

    def _take(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            # Until it is handed over.
            turn.acquire()
        except BaseException:
            # A worker can be cut short here, by the timeout of its server.
            if not self._leave(turn):
                self._give()
            raise

    def _leave(self, turn: threading.Lock) -> bool:
        """Wait no more; False if it was handed over meanwhile."""
        with self._lock:
            if turn not in self._waiting:
                return False
            self._waiting.remove(turn)
            return True

    def _give(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1


def first_line(error: SQLAlchemyError) -> str:
    """What the database said, without the statement."""
    said = str(error.orig if isinstance(error, DBAPIError) and error.orig else error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def _engine(url: URL) -> Engine:
    dialect = url.get_backend_name()
    if dialect not in _OLDEST:
        raise ValueError(f'{dialect} is neither postgresql nor sqlite')
    if dialect == 'sqlite' and url.database in (None, '', ':memory:'):
        raise ValueError('a database in memory cannot be shared with mq-run')
    options = dict(_CONNECT[dialect])
    if url.get_driver_name() == 'psycopg':
        # A statement that the server has prepared on one connection is not there on another one, which a pooler between
        # may give us; and it may be planned for a table that was empty then.
        options['prepare_threshold'] = None
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=CONNECTIONS,
        max_overflow=0,
        isolation_level='AUTOCOMMIT',
        # What the URL says goes first.
        connect_args={key: value for key, value in options.items() if key not in url.query},
    )
    if dialect == 'postgresql':
        event.listen(engine, 'connect', _read_committed)
    if engine.dialect.driver == 'psycopg':
        event.listen(engine, 'before_cursor_execute', _ask_for_bytes)
    return engine


def _ask_for_bytes(_connection: Any, cursor: Any, _statement: str, _values: Any, context: Any, _many: bool) -> None:
    if context.execution_options.get(AS_BYTES):
        cursor.format = 1


def _read_committed(connection: Any, _record: Any) -> None:
    """A claim passes over what others have changed meanwhile; with more isolation it would fail because of that."""
    with connection.cursor() as cursor:
        cursor.execute('SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED')
    connection.commit()
