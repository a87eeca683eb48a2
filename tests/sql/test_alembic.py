"""The recipe for Alembic in docs/sql.rst, as it stands there, online and offline."""

from __future__ import annotations

import io
import re
import textwrap
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, inspect

from pyramid_mailqueue.queues.sql_schema import metadata

RECIPE = Path(__file__).parents[2].joinpath('docs/sql.rst').read_text().partition('With Alembic\n')[2]

ENV = """
from alembic import context
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase
from pyramid_mailqueue.queues.sql_schema import metadata

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
