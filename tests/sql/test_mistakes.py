"""Databases that cannot be used for a queue: what passes by itself, what a person has to mend, and how it is told."""

from __future__ import annotations

import itertools
import os
import pwd
import re
import shutil
import tempfile
import traceback
from pathlib import Path

import pytest
from psycopg import pq
from sqlalchemy import create_engine, make_url

from pyramid_mailqueue.application import build_mailer
from pyramid_mailqueue.cli import queue as mq_queue_command
from pyramid_mailqueue.cli import run as mq_run_command
from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.sql import trouble as sql_trouble
from pyramid_mailqueue.queues.sql.database import Database, DatabaseAway
from pyramid_mailqueue.queues.sql.engine import shown, without_passwords
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.wiring import build_queue
from tests.parts.databases import create_queue_tables

DRIVERS = ('psycopg', 'psycopg2')

LIBPQ_18 = 180000

NUMBERS = itertools.count(1)


@pytest.fixture(params=DRIVERS)
def url(request, make_database):
    """An empty schema of PostgreSQL, over each of the drivers."""
    return make_database(f'postgresql+{request.param}')


@pytest.fixture
def ini(tmp_path):
    """Write the ini file of an app with this database; return its path."""

    def ini(url):
        path = tmp_path / 'app.ini'
        quoted = url.replace('%', '%%')
        path.write_text(
            '[app:main]\nmailqueue.smtp_hostname = localhost\nmailqueue.queue = sql\n'
            f'mailqueue.delivery = queue\nsqlalchemy.url = {quoted}\n'
        )
        return str(path)

    return ini


@pytest.fixture
def mq_queue(ini, capfd):
    """Call ``mq-queue`` with a database; return its exit status, and what it printed on stderr."""

    def mq_queue(url, *arguments):
        with pytest.raises(SystemExit) as info:
            mq_queue_command.main([ini(url), *arguments])
        return info.value.code, capfd.readouterr().err

    return mq_queue


@pytest.fixture
def mq_run(ini, capfd):
    """The same with ``mq-run``."""

    def mq_run(url):
        with pytest.raises(SystemExit) as info:
            mq_run_command.main([ini(url)])
        return info.value.code, capfd.readouterr().err

    return mq_run


def settings_for(url):
    return Settings.from_mapping(
        {'mailqueue.smtp_hostname': 'localhost', 'mailqueue.queue': 'sql', 'sqlalchemy.url': url}
    )


def with_query(url, **query):
    return make_url(url).update_query_dict(query).render_as_string(hide_password=False)


def with_path(url, *schemas):
    return with_query(url, options=f'-csearch_path={",".join(schemas)}')


def schema_of(url):
    return make_url(url).query['options'].rpartition('=')[2]


# --- mistakes do not pass ---------------------------------------------------


def mistakes(url):
    parsed = make_url(url)
    return {
        'invalid connection option "bogus"': with_query(url, bogus='1'),
        'database "nosuch" does not exist': parsed.set(database='nosuch'),
        'unrecognized configuration parameter "foo"': with_query(url, options='-cfoo=1'),
        'invalid sslmode value': with_query(url, sslmode='bogus'),
        'none of its search_path (nosuch) is there': with_path(url, 'nosuch'),
    }


@pytest.mark.parametrize('problem', mistakes('postgresql://x/y'))
def test_what_only_a_person_can_mend_stops_an_application_and_is_status_78(url, problem, mq_queue, mq_run):
    wrong = str(mistakes(url)[problem])

    with pytest.raises(ConfigurationError) as info:
        build_mailer(settings_for(wrong))

    assert problem in str(info.value)
    for status, err in (mq_queue(wrong, 'list'), mq_queue(wrong, 'init'), mq_run(wrong)):
        assert (status, err.count(problem)) == (78, 1)


def test_an_option_that_a_driver_cannot_read_is_a_mistake(url):
    with pytest.raises(ConfigurationError, match='connect_timeout'):
        Database(with_query(url, connect_timeout='soon')).check()


@pytest.mark.parametrize('option', ['prepare_threshold', 'row_factory', 'cursor_factory', 'connection_factory'])
def test_an_option_at_which_a_driver_stumbles_is_a_mistake_that_shows_no_password(url, option, mq_run):
    wrong = make_url(with_query(url, **{option: 'secret'})).set(password='secret')

    status, err = mq_run(wrong.render_as_string(hide_password=False))

    assert (status, option in err, 'mailqueue.sql_url' in err, 'Traceback' in err) == (78, True, True, False), err
    assert 'secret' not in err.replace(f'{option}=secret', '')


@pytest.fixture
def locked_server(own_postgres):
    engine = create_engine(own_postgres.url('psycopg'), isolation_level='AUTOCOMMIT')
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE ROLE shop LOGIN PASSWORD 'right'")
        connection.exec_driver_sql('CREATE ROLE stranger LOGIN')
        connection.exec_driver_sql('CREATE ROLE many LOGIN CONNECTION LIMIT 0')
        connection.exec_driver_sql('CREATE ROLE nobodys NOLOGIN')
    engine.dispose()
    own_postgres.stop()
    rules = own_postgres._data / 'pg_hba.conf'
    rules.write_text(f'local all shop scram-sha-256\nlocal all stranger reject\n{rules.read_text()}')
    own_postgres.start()
    return own_postgres


USERS = (
    ('shop', 'wrong', 'password authentication failed'),
    ('shop', None, 'no password supplied'),
    ('stranger', None, 'pg_hba.conf'),
    ('nobodys', None, 'not permitted to log in'),
    ('nosuch', None, 'role "nosuch" does not exist'),
)


def test_a_user_who_may_not_connect_is_a_mistake_and_a_server_that_is_full_or_gone_is_not(locked_server, monkeypatch):
    def refusal(driver, user, password=None):
        url = make_url(locked_server.url(driver)).set(username=user, password=password)
        database = Database(url)
        with pytest.raises((ConfigurationError, DatabaseAway)) as info:
            database.check()
        database.close()
        assert 'wrong' not in str(info.value)
        return info.type, str(info.value)

    def check(driver):
        for user, password, problem in USERS:
            kind, said = refusal(driver, user, password)
            assert (kind, problem in said) == (ConfigurationError, True), said
        kind, said = refusal(driver, 'many')
        assert (kind, 'too many connections' in said) == (DatabaseAway, True), said

    for driver in DRIVERS:
        check(driver)
    with monkeypatch.context() as patch:
        # As of a server that speaks another language; what a driver says itself is English everywhere.
        patch.setattr(sql_trouble, '_SAID_OF_MISTAKES', ('no password supplied',))
        if pq.version() >= LIBPQ_18:
            check('psycopg')
    locked_server.stop()
    for driver in DRIVERS:
        assert refusal(driver, 'shop', 'right')[0] is DatabaseAway
    locked_server.start()


@pytest.fixture
def role(sql, url):
    """A user who may do nothing, of a schema; whoever says ``-crole`` is that user."""
    name = f'mq_role_{os.getpid()}_{next(NUMBERS)}'
    sql(url, f'CREATE ROLE {name}')
    yield name
    sql(url, f'DROP OWNED BY {name}')
    sql(url, f'DROP ROLE {name}')


def test_a_user_who_may_not_write_is_told_so_and_may_look(url, role, sql, mq_queue, mq_run, make_queue, envelope):
    schema = schema_of(url)
    create_queue_tables(url)
    make_queue(url).put(envelope)
    as_role = with_query(url, options=f'-csearch_path={schema} -crole={role}')

    status, err = mq_queue(as_role, 'list')
    assert (status, 'has no schema for the queue' in err) == (78, True)
    sql(url, f'GRANT USAGE ON SCHEMA {schema} TO {role}')
    status, err = mq_queue(as_role, 'list')
    assert (status, 'permission denied for table mailqueue_schema' in err) == (78, True)
    tables = (f'{schema}.mailqueue_{name}' for name in ('schema', 'message', 'content'))
    sql(url, f'GRANT SELECT ON {", ".join(tables)} TO {role}')
    assert mq_queue(as_role, 'list') == (0, '')
    status, err = mq_run(as_role)
    assert (status, 'permission denied for table mailqueue_message' in err) == (78, True)


def test_trouble_that_passes_is_told_once_and_does_not_stop_an_application(mq_queue, mq_run, caplog):
    url = 'postgresql+psycopg://nobody@127.0.0.1:1/app'

    for status, err in (mq_queue(url, 'list'), mq_queue(url, 'init'), mq_run(url)):
        assert (status, err.count('Connection refused')) == (75, 1)
    assert caplog.records == []

    build_mailer(settings_for(url))
    assert [record.name for record in caplog.records] == ['mailqueue.delivery']


# --- encodings --------------------------------------------------------------


@pytest.fixture(params=['LATIN1', 'SQL_ASCII'])
def encoded(request, postgres, url):
    """A database with another encoding: the encoding, and its URL."""
    name = f'mq_encoding_{os.getpid()}_{next(NUMBERS)}'
    engine = create_engine(postgres.url('psycopg'), isolation_level='AUTOCOMMIT')
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} ENCODING '{request.param}' TEMPLATE template0 LOCALE 'C'")
    driver = make_url(url).get_driver_name()
    yield request.param, str(make_url(postgres.url(driver)).set(database=name))
    with engine.connect() as connection:
        connection.exec_driver_sql(f'DROP DATABASE {name}')
    engine.dispose()


def test_a_database_that_has_not_every_character_is_refused(encoded, mq_queue):
    encoding, url = encoded

    for command in ('init', 'list'):
        status, err = mq_queue(url, command)

        assert status == 78
        assert f'mailqueue.queue = sql: {make_url(url).render_as_string()} has the encoding {encoding}' in err
        assert "ENCODING 'UTF8'" in err


def test_the_environment_and_the_url_may_say_another_encoding(url, make_queue, monkeypatch):
    create_queue_tables(url)
    monkeypatch.setenv('PGCLIENTENCODING', 'SQL_ASCII')
    euro = Envelope('', ('ada@x.example',), b'Subject: 5 \xe2\x82\xac\r\n\r\nHello.\r\n')

    for strange in (url, with_query(url, client_encoding='latin1')):
        queue = make_queue(strange)
        assert queue.admin.find(queue.put(euro)).subject == '5 \N{EURO SIGN}'


# --- schemas ----------------------------------------------------------------


def test_the_tables_of_another_application_later_in_the_search_path_are_not_ours(
    url, make_database, mq_queue, sql, make_queue, envelope
):
    others = make_database('postgresql+psycopg')
    create_queue_tables(others)
    mine = with_path(url, schema_of(url), schema_of(others))

    status, err = mq_queue(mine, 'list')
    assert status == 78
    assert f'no tables for the queue in the schema {schema_of(url)}, the first of its search_path' in err
    assert f'schema {schema_of(others)} can be the queue of another application' in err

    assert mq_queue(mine, 'init') == (0, '')
    make_queue(mine).put(envelope)
    assert sql(url, 'SELECT count(*) FROM mailqueue_message') == [(1,)]
    assert sql(others, 'SELECT count(*) FROM mailqueue_message') == [(0,)]


def test_the_first_schema_of_the_search_path_is_the_first_that_is_there(url, mq_queue):
    create_queue_tables(url)

    assert mq_queue(with_path(url, 'nosuch', schema_of(url)), 'list') == (0, '')


# --- the version ------------------------------------------------------------


@pytest.mark.parametrize('kind', ['sqlite', 'postgresql+psycopg'])
def test_init_writes_a_version_that_is_lost(kind, make_database, mq_queue, sql):
    url = make_database(kind)
    create_queue_tables(url)
    sql(url, 'DELETE FROM mailqueue_schema')

    status, err = mq_queue(url, 'list')
    assert status == 78
    assert 'mailqueue_schema, where their version should be, is empty' in err
    assert mq_queue(url, 'init') == (0, '')
    assert mq_queue(url, 'list') == (0, '')
    assert sql(url, 'SELECT version FROM mailqueue_schema') == [(1,)]


def test_the_highest_version_counts(make_database, mq_queue, sql):
    url = make_database('sqlite')
    create_queue_tables(url)
    sql(url, 'INSERT INTO mailqueue_schema VALUES (2)')

    for command in ('list', 'init'):
        status, err = mq_queue(url, command)
        assert (status, 'has tables of version 2' in err) == (78, True)


# --- files of SQLite --------------------------------------------------------


@pytest.mark.parametrize('form', ['sqlite:///{}', 'sqlite:///file:{}?uri=true'])
def test_a_file_that_is_not_there_is_named_and_only_init_makes_it(form, tmp_path, mq_queue, mq_run):
    file = tmp_path / 'app.sqlite'
    url = form.format(file)

    for status, err in (mq_queue(url, 'list'), mq_run(url)):
        assert (status, f'there is no file {file}' in err, file.exists()) == (78, True, False)
    assert mq_queue(url, 'init') == (0, '')
    assert file.exists()
    assert mq_queue(url, 'list') == (0, '')


def test_a_file_that_is_no_database_or_cannot_be_made_is_a_mistake(tmp_path, mq_queue):
    (tmp_path / 'notes.txt').write_text('These are my notes, and there is no database in them.')

    status, err = mq_queue(f'sqlite:///{tmp_path}/notes.txt', 'list')
    assert (status, 'file is not a database' in err) == (78, True)
    status, err = mq_queue(f'sqlite:///{tmp_path}/nosuch/app.sqlite', 'init')
    assert (status, 'unable to open database file' in err) == (78, True)


def test_a_file_that_cannot_be_written_is_a_mistake_and_may_be_looked_at(tmp_path, mq_queue, mq_run):
    file = tmp_path / 'app.sqlite'
    assert mq_queue(f'sqlite:///{file}', 'init') == (0, '')
    read_only = f'sqlite:///file:{file}?mode=ro&uri=true'

    assert mq_queue(read_only, 'list') == (0, '')
    status, err = mq_run(read_only)
    assert (status, f'The file {file} and its directory have to be writable' in err) == (78, True), err


@pytest.fixture
def foreign_folder():
    """A folder that the user of the test may read only, who is not root meanwhile."""
    folder = Path(tempfile.mkdtemp(prefix='mq-read-only-'))
    create_queue_tables(f'sqlite:///{folder}/app.sqlite')
    (folder / 'app.sqlite').chmod(0o666)
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(pwd.getpwnam('nobody').pw_uid)
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_file_in_a_folder_that_cannot_be_written_is_a_mistake(foreign_folder, make_queue, envelope):
    file = foreign_folder / 'app.sqlite'
    queue = make_queue(f'sqlite:///{file}')
    queue.check()

    with pytest.raises(ConfigurationError, match=f'The file {file} and its directory have to be writable'):
        queue.put(envelope)


# --- URLs -------------------------------------------------------------------


@pytest.mark.parametrize(
    ('url', 'problem'),
    [
        ('sqlite:///file::memory:?cache=shared&uri=true', 'in memory'),
        ('sqlite:///file:app?mode=memory&cache=shared&uri=true', 'in memory'),
        ('sqlite:///file:/app?vfs=memdb&uri=true', 'in memory'),
        ('postgres://localhost/app', 'SQLAlchemy calls it postgresql://'),
        ('postgresql+psycopg://localhost:secret/app', 'its port is not a number'),
        ('postgresql+psycopg_async://localhost/app', 'is for asyncio'),
        ('postgresql+psycopg://@/app?host=a:1,b:2', 'each is a parameter: ?host=db1.example:5432&host=db2'),
        ('postgresql+psycopg2://@/app?host=a,b:5432', 'each is a parameter: ?host=db1.example:5432&host=db2'),
        ('postgresql+psycopg://a:1,b:2/app', 'each is a parameter: ?host=db1.example:5432&host=db2'),
    ],
)
def test_a_url_that_cannot_be_used_says_why_and_which_settings_it_may_be_from(url, problem):
    with pytest.raises(ConfigurationError) as info:
        build_queue(settings_for(url))

    assert problem in str(info.value)
    assert 'mailqueue.sql_url, or sqlalchemy.url where that is not set' in str(info.value)
    assert 'secret' not in str(info.value)


@pytest.mark.parametrize(
    'option',
    [
        'dsn=host=x password=hush4711',
        'conninfo=postgresql://u:hush4711@h/db',
        'dbname=postgresql://u:hush4711@h/db',
        'oauth_client_secret=hush4711',
        'passwd=hush4711',
    ],
)
def test_an_option_that_may_hold_a_secret_is_not_shown(option):
    key, _, value = option.partition('=')
    url = make_url('postgresql+psycopg://shop@localhost/app').update_query_dict({key: value, 'sslmode': 'prefer'})

    assert 'hush4711' not in shown(url)
    assert 'sslmode=prefer' in shown(url)
    for quote in (value, f'invalid "{value}"', 'host=y password=hush4711 port=1', "password='hush4711'"):
        assert 'hush4711' not in without_passwords(quote, url)


@pytest.mark.parametrize('password', ['p@hush4711', 'p@hush:4711', 'p@hush/4711', 'p@hush?4711', 'p@h@ush@4711'])
def test_no_part_of_a_password_with_an_unescaped_at_sign_is_shown(password):
    for rest in ('localhost/app', 'localhost:5432/app', 'localhost/app?sslmode=prefer', '/app?host=/run'):
        with pytest.raises(ConfigurationError, match='more than one @; in a password it is written %40') as info:
            Database(f'postgresql+psycopg://shop:{password}@{rest}')

        told = ''.join(traceback.format_exception(info.value))
        assert not re.search('h?ush|4711', told.partition('ConfigurationError')[2])


@pytest.mark.parametrize(
    'url',
    [
        'postgresql+psycopg://shop:p%40ss@localhost/app',
        'postgresql+psycopg://shop:pass@localhost/app?application_name=mail@shop',
        'postgresql+psycopg://shop@localhost/app',
        'sqlite:////srv/a@b/c@d.db',
    ],
)
def test_other_at_signs_are_none_of_a_password(url):
    assert Database(url).name


def test_a_password_is_not_shown_wherever_it_stands_in_the_url():
    database = Database('postgresql+psycopg://shop:secret@localhost/app?password=secret&sslmode=prefer')

    assert database.name == 'postgresql+psycopg://shop:***@localhost/app?sslmode=prefer'
