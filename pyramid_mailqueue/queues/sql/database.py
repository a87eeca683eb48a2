"""
The connections of a queue to its database, at most two for each process, and what is done when one fails.

Every statement is a transaction of its own, but for the few that belong together (:meth:`Database.transact`).  On
SQLite these begin with the right to write: a transaction that has only read until then is refused it if another process
has written meanwhile.  All work has a deadline (:mod:`~.sql.deadlines`).
"""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolExhausted

from pyramid_mailqueue.display import user_name
from pyramid_mailqueue.exceptions import ConfigurationError, MailqueueError, QueueError, translated
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.queues.sql.deadlines import LOOK_SECONDS, STATEMENT_SECONDS, Deadlines
from pyramid_mailqueue.queues.sql.engine import (
    CONNECTIONS,
    OLDEST,
    SQLITE_PATIENCE,
    file_of,
    make_engine,
    shown,
    without_passwords,
)
from pyramid_mailqueue.queues.sql.tables import (
    NOT_NOTED,
    VERSION,
    create_tables,
    current_schema,
    ddl,
    schema_in_sight,
    version_of,
)
from pyramid_mailqueue.queues.sql.trouble import (
    code_of_refusal,
    first_line,
    is_code_of_mistake,
    is_forbidden,
    is_of_memory,
    is_of_statement,
    is_read_only,
    is_rolled_back_for_others,
    is_said_of_mistakes,
    is_strange_to_driver,
    said,
)

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import URL, Connection, Engine

    from pyramid_mailqueue.queues.sql.libpq import Libpq

__all__ = ['Database', 'DatabaseAway', 'NoTables']

T = TypeVar('T')

log = logging.getLogger('mailqueue.delivery')

#: How often a waiting thread looks for turns that were lost, in seconds.
GLANCE = 0.5


class NoTables(ConfigurationError):
    """The tables of the queue are not there: ``mq-queue app.ini init`` creates them."""


class DatabaseAway(QueueError):
    """The database cannot be used now; the same may work later."""


class _TriedOut(Exception):
    """Rolls back what was tried out."""


class Database:
    """
    See the module.

    :param url: as SQLAlchemy takes it; connections are made when they are needed
    :raises ConfigurationError: this is no database for a queue
    """

    def __init__(self, url: str | URL) -> None:
        try:
            self._engine = make_engine(url)
            self._file = file_of(self._engine)
        except (ArgumentError, NoSuchModuleError, ImportError, ValueError) as error:
            raise ConfigurationError(
                'The URL of the database (mailqueue.sql_url, or sqlalchemy.url where that is not set; not shown) '
                f'cannot be used: {first_line(error)}. It is a URL of SQLAlchemy such as '
                'postgresql+psycopg://user@host/database, and needs the driver that it names.'
            ) from error
        self.name = shown(self._engine.url)
        self.dialect = self._engine.dialect.name
        self._pid = os.getpid()
        self._turns = _Turns(CONNECTIONS)
        self._libpq = _libpq() if self._engine.dialect.driver == 'psycopg' else None
        self.deadlines = Deadlines(
            can_cancel=self.dialect == 'postgresql', cancel=None if self._libpq is None else self._libpq.cancel
        )
        if self.dialect == 'postgresql':
            event.listen(self._engine, 'do_connect', self._open)
            event.listen(self._engine, 'close', self.deadlines.forget)
            event.listen(self._engine, 'close_detached', self.deadlines.forget)
        self._is_checked = False
        # What was said of the last refusal whose code was asked for, and that code.
        self._refused: tuple[str, str | None] = ('', None)
        call_in_children(self._forget_connections)

    def __repr__(self) -> str:
        return f'<Database {self.name}>'

    def _forget_connections(self) -> None:
        """In a forked child: the connections are the parent's."""
        self._pid = os.getpid()
        self._turns = _Turns(CONNECTIONS)
        self.deadlines.start_anew()
        self._engine.dispose(close=False)

    @property
    def engine(self) -> Engine:
        """The engine, with connections of this process."""
        if self._pid != os.getpid():
            # Some servers fork without telling Python.
            self._forget_connections()
        return self._engine

    def close(self) -> None:
        """Close the idle connections.  The database may be used again."""
        self.engine.dispose()
        self.deadlines.hurry(math.inf)
        self.deadlines.close()

    @contextmanager
    def connection(self, seconds: float = STATEMENT_SECONDS) -> Iterator[Connection]:
        """
        Lend a connection for this many seconds, to waiting threads in their order.

        Raises SQLAlchemyError, or ConfigurationError; or TimeoutError instead of these, when the time is over.
        """
        engine = self.engine
        with self._turns.one(), self.deadlines.within(seconds) as watched, self._connect(engine) as connection:
            if self.dialect == 'sqlite':
                self._limit_wait_for_locks(connection)
            else:
                self.deadlines.attach(watched, connection.connection.driver_connection)
            try:
                yield connection
            finally:
                if watched.has_passed:
                    # A late cancellation must not hit the next user's statement.
                    with suppress(SQLAlchemyError):
                        connection.invalidate()

    def _limit_wait_for_locks(self, connection: Connection) -> None:
        seconds = min(SQLITE_PATIENCE, self.deadlines.left)
        if connection.info.get('mailqueue_patience', SQLITE_PATIENCE) != seconds:
            connection.info['mailqueue_patience'] = seconds
            connection.exec_driver_sql(f'PRAGMA busy_timeout = {int(seconds * 1000)}')

    def _open(self, dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        """Connect; what SQLAlchemy sends before it lends the connection is watched, too."""
        if self.deadlines.left < math.inf and 'connect_timeout' in options:
            # libpq takes 1 for 2, and 0 for no limit.
            options['connect_timeout'] = max(2, min(int(options['connect_timeout']), int(self.deadlines.left)))
        connection = dialect.connect(*arguments, **options)
        self.deadlines.note(connection)
        return connection

    def _lent(self, engine: Engine) -> Connection:
        try:
            return engine.connect()
        except PoolExhausted:
            # A thread that has its turn finds a connection, unless an interruption has taken one from the pool.
            log.error('The connections to %s were lost when a thread was interrupted; there are new ones.', self.name)
            engine.dispose()
            return engine.connect()

    def _connect(self, engine: Engine) -> Connection:
        try:
            return self._lent(engine)
        except Exception as error:
            if not is_strange_to_driver(error):
                raise
            self.deadlines.abandon()
            options = ', '.join(sorted(engine.url.query)) or 'none'
            raise self._lasting_mistake(
                f'the driver does not accept it, or an option in it ({options}): {type(error).__name__}: '
                f'{first_line(error)}'
            ) from error

    def run(self, work: Callable[[Connection], T], seconds: float = STATEMENT_SECONDS) -> T:
        """
        Run *work*, whose statements are transactions of their own, within this many seconds; return its result.

        *work* is repeated once, so that must do no harm: over another connection if this one turns out to be closed (a
        server that was restarted), or leads to a server that takes no changes (a standby); or after a conflict with
        others (a deadlock).

        Raises QueueError, DatabaseAway, or ConfigurationError for what does not pass by itself; and MemoryError for
        what is too large for this process, or for the server.
        """
        try:
            try:
                return self._try(work, seconds)
            except DBAPIError as error:
                if is_read_only(error):
                    # The name may lead to another server by now.
                    self.engine.dispose()
                elif not (error.connection_invalidated or is_rolled_back_for_others(error)):
                    raise
                return self._try(work, seconds)
        except SQLAlchemyError as error:
            if is_of_memory(error):
                raise MemoryError(first_line(error)) from error
            raise translated(self.refusal(error), error) from error
        except TimeoutError as error:
            raise self._silence() from error

    def _silence(self) -> DatabaseAway:
        return DatabaseAway(f'The queue in {self.name} cannot be used: the database gives no answer.')

    def _try(self, work: Callable[[Connection], T], seconds: float) -> T:
        if not self._is_checked:
            self._check_file()
        with self.connection(seconds) as connection:
            if not self._is_checked:
                self._check_server(connection)
                self._check_tables(connection)
                self._is_checked = True
            return work(connection)

    def transact(self, work: Callable[[Connection], T], seconds: float = STATEMENT_SECONDS) -> T:
        """The same, as one transaction."""
        return self.run(lambda connection: self.in_transaction(connection, work), seconds)

    def try_out(self, work: Callable[[Connection], None]) -> None:
        """Do *work* as one transaction, and roll it back.  Raises as :meth:`run` does, or what *work* raises."""

        def try_out(connection: Connection) -> None:
            work(connection)
            raise _TriedOut

        with suppress(_TriedOut):
            self.transact(try_out)

    def create_tables(self) -> None:
        """Create the missing tables.  Raises as :meth:`run` does."""
        try:
            with self.connection(LOOK_SECONDS) as connection:
                self._check_server(connection)
                self.in_transaction(connection, create_tables)
        except SQLAlchemyError as error:
            raise translated(self.refusal(error), error) from error
        except TimeoutError as error:
            raise self._silence() from error

    def ddl(self) -> str:
        """Return the statements that create the tables."""
        return ddl(self._engine.url)

    def in_transaction(self, connection: Connection, work: Callable[[Connection], T]) -> T:
        """Run *work*, whose statements are one transaction; return its result.  Raises SQLAlchemyError."""
        begin = 'BEGIN IMMEDIATE' if self.dialect == 'sqlite' else 'BEGIN ISOLATION LEVEL READ COMMITTED'
        try:
            # Inside the block, or an interruption would leave it begun.
            connection.exec_driver_sql(begin)
            result = work(connection)
            connection.exec_driver_sql('COMMIT')
        except BaseException:
            with suppress(SQLAlchemyError):
                connection.exec_driver_sql('ROLLBACK')
            raise
        return result

    def check(self) -> None:
        """Raise ConfigurationError if the tables are not there, or are others; DatabaseAway if that is unknown."""
        self.run(lambda _: None)

    def _check_file(self) -> None:
        """Check that the file is there: SQLite would create an empty one."""
        if self._file is not None and not self._file.exists():
            raise self._no_tables(
                f'cannot be used: there is no file {self._file}. Correct the URL, or create the database with the '
                'tables of the queue: mq-queue app.ini init'
            )

    def _check_server(self, connection: Connection) -> None:
        """Raise ConfigurationError if no queue can be in this database, whatever tables it has."""
        oldest, name = OLDEST[self.dialect]
        if (connection.dialect.server_version_info or oldest) < oldest:
            raise self._mistake(f'is too old for the queue: it has to be {name} or later.')
        if self.dialect == 'sqlite':
            return
        encoding = connection.exec_driver_sql('SHOW server_encoding').scalar()
        if encoding != 'UTF8':
            raise self._mistake(
                f'has the encoding {encoding}, which lacks characters that mail and the replies of mail servers '
                "have. Use a database that was created with: CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE "
                'template0'
            )
        if current_schema(connection) is None:
            path = connection.exec_driver_sql('SHOW search_path').scalar()
            raise self._mistake(
                f'has no schema for the queue: none of its search_path ({path}) is there, or its user may use none.'
            )

    def _check_tables(self, connection: Connection) -> None:
        """Raise ConfigurationError if the tables are not there, or are others."""
        version = version_of(connection)
        if version is None:
            schema, elsewhere = current_schema(connection), schema_in_sight(connection)
            if elsewhere not in (None, schema):
                raise self._no_tables(
                    f'has no tables for the queue in the schema {schema}, the first of its search_path; those in the '
                    f'schema {elsewhere} can be the queue of another application. Create your own with: mq-queue '
                    f'app.ini init. If those are meant, let the search_path in mailqueue.sql_url begin with '
                    f'{elsewhere} (see "The queue in your database" in the documentation).'
                )
            raise self._no_tables(
                'has no tables for the queue. Create them with: mq-queue app.ini init (or in a migration, see '
                '"The queue in your database" in the documentation).'
            )
        if version == NOT_NOTED:
            raise self._no_tables(
                'has tables for the queue, but mailqueue_schema, where their version should be, is empty. Write it '
                'with: mq-queue app.ini init'
            )
        if version != VERSION:
            raise self._mistake(
                f'has tables of version {version} for the queue, and this pyramid_mailqueue needs version {VERSION}. '
                'See "The queue in your database" in the documentation, under "Another version".'
            )

    def _mistake(self, problem: str) -> ConfigurationError:
        return ConfigurationError(f'{self.name} {problem}')

    def _no_tables(self, problem: str) -> ConfigurationError:
        return NoTables(f'{self.name} {problem}')

    def refusal(self, error: SQLAlchemyError) -> MailqueueError:
        """Return what to raise because of *error*."""
        if self._file is not None and _is_closed(self._file, error):
            return self._mistake(
                f'cannot be used: {first_line(error)}. The file {self._file} and its directory have to be writable for '
                f'the user that this runs as ({user_name(os.geteuid())}).'
            )
        if self._is_mistake(error):
            return self._lasting_mistake(first_line(error))
        if is_read_only(error):
            return DatabaseAway(
                f'The queue in {self.name} cannot be used: {first_line(error)}. That server takes no changes: it is a '
                'standby, or was the primary before. A URL with several hosts and target_session_attrs=read-write '
                'leads to the primary (see "The queue in your database" in the documentation).'
            )
        kind = QueueError if is_of_statement(error) else DatabaseAway
        return kind(f'The queue in {self.name} cannot be used: {first_line(error)}.')

    def _lasting_mistake(self, problem: str) -> ConfigurationError:
        problem = without_passwords(problem, self._engine.url)
        return self._mistake(
            f'cannot be used: {problem}. Trying again will not help: correct the URL (mailqueue.sql_url, or '
            'sqlalchemy.url where that is not set), or what its user may do (see "The queue in your '
            'database" in the documentation).'
        )

    def _is_mistake(self, error: SQLAlchemyError) -> bool:
        if is_forbidden(error):
            return True
        # After the check the database was good for a queue once, and may be so again.
        return not self._is_checked and (
            is_of_statement(error) or is_said_of_mistakes(error) or is_code_of_mistake(self._code(error))
        )

    def _code(self, error: SQLAlchemyError) -> str | None:
        """Return the code of a refusal; repeated attempts with the same text ask once."""
        words = said(error)
        if words != self._refused[0]:
            self._refused = (words, code_of_refusal(error, self._libpq))
        return self._refused[1]


def _libpq() -> Libpq:
    # It needs psycopg, which only its users have.
    from pyramid_mailqueue.queues.sql.libpq import Libpq

    return Libpq()


def _is_closed(file: Path, error: SQLAlchemyError) -> bool:
    """Whether SQLite cannot write because this user may not: the file, or a journal beside it."""
    if 'readonly database' in said(error):
        return True
    if 'unable to open database file' not in said(error) or not file.exists():
        return False
    return not os.access(file.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


class _Turn:
    """The turn that one thread has, or waits for."""

    def __init__(self) -> None:
        # Not an Event, which an interruption in set() locks for ever.
        self.given = threading.Lock()
        self.given.acquire()


class _Turns:
    """
    Lets this many threads do something at the same time, the waiting ones in their order.

    Without an order, threads that deliver could keep the heartbeat from its turn until its leases have run out.

    A turn belongs to the thread that has it: one that an interruption has taken from there is free again.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._lock = threading.Lock()
        self._taken: WeakSet[_Turn] = WeakSet()
        self._waiting: deque[weakref.ref[_Turn]] = deque()

    @contextmanager
    def one(self) -> Iterator[None]:
        turn = _Turn()
        try:
            with self._lock:
                self._waiting.append(weakref.ref(turn))
            self._give()
            while not turn.given.acquire(timeout=GLANCE):
                self._give()
            yield
        finally:
            with self._lock:
                # Or it is not given to this one any more.
                self._taken.discard(turn)
                with suppress(ValueError):
                    self._waiting.remove(weakref.ref(turn))
            self._give()

    def _give(self) -> None:
        """Give the free turns to waiting threads, in their order."""
        with self._lock:
            while self._waiting and len(self._taken) < self._number:
                turn = self._waiting.popleft()()
                if turn is not None:
                    self._taken.add(turn)
                    turn.given.release()
