"""``mq-queue init``: the tables of the queue."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import create_engine, inspect
from sqlalchemy.orm import DeclarativeBase

from pyramid_mailqueue.cli import queue as command
from pyramid_mailqueue.queues.sql.database import Database
from pyramid_mailqueue.queues.sql.schema import metadata

KINDS = ('sqlite', 'postgresql+psycopg', 'postgresql+psycopg2')


@pytest.fixture(params=KINDS)
def url(request, make_database):
    """A database of each kind, with nothing in it."""
    return make_database(request.param)


@pytest.fixture
def mq_queue(tmp_path, capfd):
    """Call ``mq-queue`` for an app of these settings; return its exit status, and what it printed."""

    def mq_queue(settings, *arguments):
        ini = tmp_path / 'app.ini'
        lines = [f'{key} = {value}'.replace('%', '%%') for key, value in settings.items()]
        ini.write_text('\n'.join(['[app:main]', 'mailqueue.smtp_hostname = localhost', *lines]))
        with pytest.raises(SystemExit) as info:
            command.main([str(ini), *arguments])
        return info.value.code, *capfd.readouterr()

    return mq_queue


def tables_of(url):
    engine = create_engine(url)
    names = set(inspect(engine).get_table_names())
    engine.dispose()
    return names


def test_init_creates_the_tables_and_may_be_repeated(mq_queue, url):
    settings = {'mailqueue.queue': 'sql', 'sqlalchemy.url': url}
    before = mq_queue(settings, 'list')

    once, again = mq_queue(settings, 'init'), mq_queue(settings, 'init')

    assert before[0] == 78
    assert 'mq-queue app.ini init' in before[2]
    assert once == again
    assert (once[0], once[1].endswith('is ready\n'), once[2]) == (0, True, '')
    assert set(metadata.tables) <= tables_of(url)
    assert mq_queue(settings, 'list')[0] == 0


def test_the_statements_that_are_printed_create_the_same(mq_queue, url, make_queue, envelope):
    status, out, _ = mq_queue({'mailqueue.queue': 'sql', 'mailqueue.sql_url': url}, 'init', '--sql')
    assert (status, tables_of(url)) == (0, set())

    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in filter(str.strip, out.split(';\n')):
            connection.exec_driver_sql(statement)
    engine.dispose()

    queue = make_queue(url)
    queue.check()
    assert queue.claim(queue.put(envelope)).envelope == envelope
    assert (' SET STORAGE EXTERNAL' in out) == ('postgresql' in url)


def test_several_may_create_the_tables_at_the_same_time(url):
    databases = [Database(url) for _ in range(4)]
    failures = []

    def create(database):
        try:
            database.create_tables()
            database.check()
        except Exception as error:  # noqa: BLE001 - told in the thread of the test
            failures.append(error)

    threads = [threading.Thread(target=create, args=[database]) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for database in databases:
        database.close()

    assert failures == []


def test_an_application_may_create_the_tables_with_its_own(url, make_queue, envelope):
    class Base(DeclarativeBase):
        pass

    engine = create_engine(url)
    for own in (Base.metadata, metadata):
        own.create_all(engine)
    engine.dispose()

    assert make_queue(url).put(envelope)


def test_with_a_directory_init_creates_that(mq_queue, tmp_path):
    settings = {'mailqueue.queue_dir': tmp_path / 'queue'}

    assert mq_queue(settings, 'init')[:2] == (0, f'{tmp_path}/queue is ready\n')
    assert (tmp_path / 'queue/new').is_dir()
    status, _, err = mq_queue(settings, 'init', '--sql')
    assert status == 78
    assert 'mailqueue.queue = maildir: --sql is for a queue in a database' in err


def test_a_database_that_is_away_is_status_75_without_the_password(mq_queue):
    url = 'postgresql+psycopg://nobody:secret@127.0.0.1:1/app'

    status, _, err = mq_queue({'mailqueue.queue': 'sql', 'mailqueue.sql_url': url}, 'init')

    assert status == 75
    assert 'cannot be used' in err
    assert 'secret' not in err
