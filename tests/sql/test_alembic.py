"""The recipe for Alembic in docs/sql.rst, as it stands there, online and offline: it makes the tables of today."""

from __future__ import annotations

import io
import re
import textwrap
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, inspect, make_url, text

from pyramid_mailqueue.queues.sql.schema import metadata
from pyramid_mailqueue.queues.sql.tables import create_tables, ddl

RECIPE = Path(__file__).parents[2].joinpath('docs/sql.rst').read_text().partition('With Alembic\n')[2]

ENV = """
from alembic import context
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase

class Base(DeclarativeBase):
    pass

{recipe}

url = context.config.attributes['url']
if context.is_offline_mode():
    context.configure(url=url, target_metadata=target_metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    engine = create_engine(url)
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=target_metadata)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()
"""


@pytest.fixture(params=['sqlite', 'postgresql+psycopg'])
def url(request, make_database):
    """A database of each kind, with nothing in it."""
    return make_database(request.param)


@pytest.fixture
def config(tmp_path, url):
    """Alembic with one migration: that of the recipe."""
    migration, env = map(textwrap.dedent, re.findall(r'\.\. code-block:: python\n\n((?: {4}.*\n|\n)+)', RECIPE)[:2])
    (tmp_path / 'versions').mkdir()
    (tmp_path / 'versions/one.py').write_text(f"revision = '1'\ndown_revision = None\n{migration}")
    (tmp_path / 'env.py').write_text(ENV.format(recipe=env))
    config = Config(output_buffer=io.StringIO(), attributes={'url': url})
    config.set_main_option('script_location', str(tmp_path))
    config.set_main_option('path_separator', 'os')
    return config


def tables_of(url):
    engine = create_engine(url)
    names = set(inspect(engine).get_table_names())
    engine.dispose()
    return names - {'alembic_version'}


def test_a_migration_creates_the_tables_and_drops_them(config, url, make_queue, envelope):
    command.upgrade(config, 'head')
    queue = make_queue(url)
    queue.check()
    assert queue.claim(queue.put(envelope)).envelope == envelope
    queue.close()
    # Raises if autogenerate would change something.
    command.check(config)

    command.downgrade(config, 'base')

    assert tables_of(url) == set()


def test_offline_it_prints_statements_that_create_the_same(config, url, make_queue, envelope):
    command.upgrade(config, 'head', sql=True)
    assert tables_of(url) == set()

    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in config.output_buffer.getvalue().split(';\n'):
            # Its own transaction is that of the test.
            if statement.strip() and statement.strip() not in ('BEGIN', 'COMMIT'):
                connection.exec_driver_sql(statement)
    engine.dispose()

    assert tables_of(url) == set(metadata.tables)
    queue = make_queue(url)
    queue.check()
    assert queue.claim(queue.put(envelope)).envelope == envelope
    assert ('SET STORAGE EXTERNAL' in config.output_buffer.getvalue()) == ('postgresql' in url)


# What the databases say themselves of the tables of a schema: columns, indexes, constraints, and how they are stored.
CATALOG = {
    'sqlite': """
        SELECT type, tbl_name, name, sql FROM sqlite_master WHERE tbl_name LIKE 'mailqueue%' ORDER BY 1, 2, 3
    """,
    'postgresql': r"""
        SELECT relname, attnum, attname, format_type(atttypid, atttypmod), attnotnull, attstorage, collname,
               pg_get_expr(adbin, adrelid), (SELECT array_agg(indexdef ORDER BY indexname) FROM pg_indexes
                                             WHERE tablename = relname AND schemaname = current_schema())
        FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        LEFT JOIN pg_collation ON pg_collation.oid = attcollation
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE relname LIKE 'mailqueue%' AND relkind = 'r' AND relnamespace = current_schema()\:\:regnamespace
              AND attnum > 0 AND NOT attisdropped
        ORDER BY 1, 2
    """,
}


def described(url):
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = connection.execute(text(CATALOG[engine.dialect.name])).all()
        versions = connection.execute(text('SELECT version FROM mailqueue_schema')).all()
    engine.dispose()
    # SQLAlchemy writes the same statement with other blanks.
    return [[' '.join(cell.split()) if isinstance(cell, str) else cell for cell in row] for row in rows], versions


def test_the_migration_makes_exactly_the_tables_of_today(config, url):
    command.upgrade(config, 'head')
    migrated = described(url)
    command.downgrade(config, 'base')
    engine = create_engine(url)
    with engine.begin() as connection:
        create_tables(connection)
    engine.dispose()

    assert migrated == described(url)


def test_offline_it_prints_exactly_the_statements_of_today(config, url):
    command.upgrade(config, 'head', sql=True)

    def statements(script):
        without_comments = re.sub('(?m)^--.*', '', script)
        found = {' '.join(statement.split()) for statement in without_comments.split(';\n')}
        return {it for it in found if it not in ('', 'BEGIN', 'COMMIT') and 'alembic_version' not in it}

    assert statements(config.output_buffer.getvalue()) == statements(ddl(make_url(url)))


def test_the_migration_takes_nothing_from_the_package(config):
    (path,) = Path(config.get_main_option('script_location'), 'versions').glob('*.py')

    assert 'import pyramid_mailqueue' not in path.read_text()
    assert 'from pyramid_mailqueue' not in path.read_text()
