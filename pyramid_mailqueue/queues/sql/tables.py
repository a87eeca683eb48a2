"""
The tables of the queue in a database.

:data:`metadata` holds them, for Alembic and for applications that create their tables themselves; ``mq-queue init``
does it for the others.  Times are in seconds since the epoch, so that both databases represent and compare them alike.
Nothing here needs the ORM of SQLAlchemy: importing that would take a fifth of the time of an mq-run with nothing to do.

A message is one row.  A small content is the last column of it, which claiming and listing do not read.  A large one is
a row of another table: for any change in a row SQLite has all of it in memory, and writes it.  PostgreSQL keeps a
content of more than 2 KB outside of the row, uncompressed, and does not touch it then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    Column,
    ColumnElement,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    and_,
    cast,
    create_mock_engine,
    event,
    func,
    insert,
    inspect,
    or_,
    select,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

__all__ = [
    'ASIDE',
    'CONTENT',
    'CONTENTS',
    'INLINE',
    'MESSAGES',
    'NOT_NOTED',
    'RECIPIENTS',
    'SIZE',
    'VERSION',
    'VERSIONS',
    'create_tables',
    'current_schema',
    'database_time',
    'ddl',
    'has_run_out',
    'has_time',
    'is_time',
    'metadata',
    'part_of_content',
    'recipients_of',
    'schema_in_sight',
    'version_of',
]

#: Increased with each change of the tables.
VERSION = 1

#: Below all versions: that of tables whose version was not recorded.
NOT_NOTED = 0

#: The states in which a message stays until a person, or a move, acts on it.
ASIDE = ('held', 'dead', 'in doubt', 'corrupt')

#: "mailqueu", as eight bytes fit: the advisory lock under which the tables are created.
_LOCK = 0x6D61_696C_7175_6575

# Ids are compared byte by byte, whatever the language of the database: the order of ids is that of time.
_Id = Text().with_variant(Text(collation='C'), 'postgresql')


#: The tables, for applications that create them themselves.
metadata = MetaData()

#: One message in each row:
#:
#: * id: begins with the time at which the message first came, so that messages sort by it
#: * state: one of :data:`~.entries.STATES`; *in doubt* is only a message that is being moved (:mod:`~.sql.moving`)
#: * due: when it may be tried again
#: * claim: the token of the claim, by which alone it may be changed while it is in progress
#: * claimed_by: the host and the process of the claim, for people
#: * lease: until when the claim holds, by the clock of the database
#: * deaths: how many processes crashed while delivering it, since its last completed attempt.  Counted when a process
#:   begins with the message, and taken back when its claim ends: a crash cannot be counted when it happens
MESSAGES = Table(
    'mailqueue_message',
    metadata,
    Column('id', _Id, primary_key=True),
    Column('state', Text, nullable=False),
    Column('due', Float(53), nullable=False),
    Column('attempts', Integer, nullable=False, default=0),
    Column('deaths', Integer, nullable=False, default=0),
    Column('claim', Text),
    Column('claimed_by', Text),
    Column('lease', Float(53)),
    Column('queued_at', Float(53), nullable=False),
    Column('last_attempt', Float(53)),
    Column('last_reply', Text, nullable=False, default=''),
    Column('sender', Text, nullable=False),
    Column('recipients', JSON, nullable=False),
    Column('message_id', Text, nullable=False),
    Column('subject', Text, nullable=False),
    Column('content', LargeBinary),
)

#: The contents of more than :data:`INLINE` octets, stored here instead of in the row of the message.
CONTENTS = Table(
    'mailqueue_content',
    metadata,
    Column('id', _Id, ForeignKey(MESSAGES.c.id, ondelete='CASCADE'), primary_key=True),
    Column('content', LargeBinary, nullable=False),
)

#: How many octets of content are in the row of the message, at most.
INLINE = 64 * 1024


# --- what may be damaged -----------------------------------------------------

# Rows may be written by other programs.  A value that a driver cannot convert fails all rows of the statement, so these
# are read unconverted.

#: The recipients of a row, for :func:`recipients_of`.
RECIPIENTS = cast(MESSAGES.c.recipients, Text).label('recipients')


def _of_content(value: Callable[[Any], Any]) -> ColumnElement[Any]:
    """Return *value* of the content of a message, wherever that is; NULL if it is nowhere."""
    elsewhere = select(value(CONTENTS.c.content)).where(CONTENTS.c.id == MESSAGES.c.id).scalar_subquery()
    return func.coalesce(value(MESSAGES.c.content), elsewhere)


#: The content of a row: octets, also where SQLite has a text.
CONTENT = _of_content(lambda content: cast(content, LargeBinary)).label('content')

#: Its size in octets.  Neither database reads a content to know its length.
SIZE = func.coalesce(_of_content(func.length), 0).label('size')


def part_of_content(start: int, most: int) -> ColumnElement[bytes]:
    """Return the octets of the content from *start* on, *most* of them."""
    return _of_content(lambda content: func.substr(cast(content, LargeBinary), start + 1, most, type_=LargeBinary()))


def recipients_of(written: str) -> tuple[str, ...]:
    """Return the recipients of a row; addresses are not checked.  Raises ValueError."""
    try:
        recipients = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'its recipients are not JSON: {error}') from error
    if not isinstance(recipients, list) or not all(isinstance(recipient, str) for recipient in recipients):
        raise ValueError(f'its recipients are not a list of addresses: {ascii(written[:100])}')
    return tuple(recipients)


def is_time(value: object) -> bool:
    """Whether *value* can be seconds since the epoch: databases have NaN and Infinity too, and SQLite has texts."""
    return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < _END_OF_TIME


# Nineteen hundred years before and after 1970, which every calendar can show.
_END_OF_TIME = 6e10


def has_time(column: Any) -> ColumnElement[bool]:
    """The same for a column, in SQL: PostgreSQL sorts NaN after all numbers, and SQLite sorts texts there."""
    is_one: ColumnElement[bool] = and_(column > -_END_OF_TIME, column < _END_OF_TIME)
    return is_one


def has_run_out() -> ColumnElement[bool]:
    """The rows whose lease is over, missing, or no time at all: such a lease would never end."""
    lease = MESSAGES.c.lease
    return or_(lease < database_time(), lease >= _END_OF_TIME, lease.is_(None))


# --- which tables there are --------------------------------------------------


#: The version of these tables, in one row.
VERSIONS = Table('mailqueue_schema', metadata, Column('version', Integer, primary_key=True, autoincrement=False))


def _index(name: str, *columns: Any, where: str) -> Index:
    # Partial: a search for due messages reads no dead letters, and a state with few messages is counted by itself.
    return Index(f'mailqueue_message_{name}', *columns, postgresql_where=text(where), sqlite_where=text(where))


_index('due', MESSAGES.c.due, MESSAGES.c.id, where="state = 'waiting'")
_index('lease', MESSAGES.c.lease, where="state = 'in progress'")
_index('aside', MESSAGES.c.state, MESSAGES.c.id, where=f'state IN {ASIDE}')


@event.listens_for(MESSAGES, 'after_create')
@event.listens_for(CONTENTS, 'after_create')
def _keep_contents_apart(table: Table, connection: Connection, **_: Any) -> None:
    if connection.dialect.name == 'postgresql':
        # A row that is claimed and deleted within seconds is not worth compressing.
        connection.execute(text(f'ALTER TABLE {table.fullname} ALTER COLUMN content SET STORAGE EXTERNAL'))


@event.listens_for(VERSIONS, 'after_create')
def _note_version(table: Table, connection: Connection, **_: Any) -> None:
    connection.execute(text(f'INSERT INTO {table.fullname} (version) VALUES ({VERSION})'))  # noqa: S608 - all of it is ours


class database_time(FunctionElement[float]):  # noqa: N801 - it is written as a function of SQL
    """The time of the database: the one clock that all hosts have in common."""

    type = Float(53)
    inherit_cache = True


@compiles(database_time, 'postgresql')
def _on_postgresql(element: Any, compiler: Any, **options: Any) -> str:
    # Not now(), which is when the transaction began.
    return 'CAST(extract(epoch FROM clock_timestamp()) AS double precision)'


@compiles(database_time, 'sqlite')
def _on_sqlite(element: Any, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


def current_schema(connection: Connection) -> str | None:
    """Return the schema for the tables: the first existing one of the search path; None if there is none."""
    if connection.dialect.name == 'sqlite':
        return 'main'
    return connection.scalar(select(func.current_schema(type_=Text())))


def schema_in_sight(connection: Connection) -> str | None:
    """Return the schema in which the search path of PostgreSQL finds a table of this name first; None if in none."""
    if connection.dialect.name == 'sqlite':
        return None
    found = text(
        'SELECT nspname FROM pg_namespace JOIN pg_class ON relnamespace = pg_namespace.oid '
        'WHERE pg_class.oid = to_regclass(:name)'
    )
    schema: str | None = connection.scalar(found, {'name': MESSAGES.name})
    return schema


def _missing(connection: Connection) -> list[Table]:
    """Return the missing tables: those in another schema are not ours, even if the search path leads there."""
    there, schema = inspect(connection), current_schema(connection)
    return [table for table in metadata.sorted_tables if not there.has_table(table.name, schema=schema)]


def create_tables(connection: Connection) -> None:
    """Create the missing tables.  Called in a transaction; several processes may do it at the same time."""
    if connection.dialect.name == 'postgresql':
        connection.exec_driver_sql(f'SELECT pg_advisory_xact_lock({_LOCK})')
    metadata.create_all(connection, tables=_missing(connection), checkfirst=False)
    if version_of(connection) == NOT_NOTED:
        connection.execute(insert(VERSIONS).values(version=VERSION))


def ddl(url: URL) -> str:
    """Return the statements that create the tables, for the database of *url*."""
    statements: list[str] = []

    def note(statement: Any, *_: Any, **__: Any) -> None:
        statements.append(f'{str(statement.compile(dialect=engine.dialect)).strip()};\n')

    engine = create_mock_engine(url, note)
    metadata.create_all(engine, checkfirst=False)
    return '\n'.join(statements)


def version_of(connection: Connection) -> int | None:
    """Return the version of the tables in the current schema; None if they are not there, or not all of them."""
    if _missing(connection):
        return None
    return connection.scalar(select(func.coalesce(func.max(VERSIONS.c.version), NOT_NOTED)))
