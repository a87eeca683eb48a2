"""The session of an application: what it may be, where it writes, and what becomes of its savepoints."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transaction
import zope.sqlalchemy
from sqlalchemy import UpdateBase, create_engine, event, insert, make_url
from sqlalchemy.exc import IntegrityError, ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from pyramid_mailqueue import QueueError, mailer_from_settings
from pyramid_mailqueue.events import MailQueued
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.sql.schema import metadata
from pyramid_mailqueue.results import Burial, Settlement
from tests.parts.databases import create_queue_tables
from tests.parts.orders import Base, Order

_NUMBERS = itertools.count(1)


@pytest.fixture
def settings(make_settings, smtp_server, url):
    return {'sqlalchemy.url': url, **make_settings(smtp_server, queue='sql', delivery='inline')}


@pytest.fixture
def mailer(settings):
    mailer = mailer_from_settings(settings)
    yield mailer
    mailer.close()


@pytest.fixture
def make_engine():
    """Make engines, as of an application, that are closed in the end."""
    engines = []

    def make_engine(url, **options):
        engines.append(create_engine(url, **options))
        return engines[-1]

    yield make_engine
    for engine in engines:
        engine.dispose()


@pytest.fixture
def engine(make_engine, url):
    engine = make_engine(url)
    Base.metadata.create_all(engine)
    return engine


@pytest.fixture
def states(sql):
    """The states of the messages in a database."""
    return lambda url: [state for (state,) in sql(url, 'SELECT state FROM mailqueue_message')]


# --- what is a session ------------------------------------------------------


NO_SESSIONS = {
    'engine': lambda engine: engine,
    'connection': lambda engine: engine.connect(),
    'sessionmaker': sessionmaker,
    'class': lambda engine: Session,
    'text': lambda engine: 'dbsession',
}


@pytest.mark.parametrize('make', NO_SESSIONS.values(), ids=NO_SESSIONS)
def test_what_is_no_session_is_refused(mailer, message, engine, states, url, make):
    with (
        contextlib.closing(make(engine))
        if make is NO_SESSIONS['connection']
        else contextlib.nullcontext(make(engine)) as given,
        pytest.raises(QueueError, match=r'this is an object of .*with Session\(engine\)') as info,
    ):
        mailer.send(message('one'), session=given)

    kind = type(given)
    assert f'{kind.__module__}.{kind.__qualname__}' in str(info.value)
    assert states(url) == []


@pytest.fixture
def async_url(postgres_url):
    return postgres_url


ASYNC = {
    'session': AsyncSession,
    'scoped session': lambda engine: async_scoped_session(async_sessionmaker(engine), asyncio.current_task),
    'engine': lambda engine: engine,
}


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
@pytest.mark.parametrize('make', ASYNC.values(), ids=ASYNC)
def test_a_session_of_coroutines_is_told_how_to_send(mailer, message, url, make):
    async_engine = create_async_engine(url, poolclass=NullPool)

    with pytest.raises(QueueError, match=r'await session\.run_sync\(lambda s: mailer\.send\(message, session=s\)\)'):
        mailer.send(message('one'), session=make(async_engine))


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
def test_this_is_how_a_session_of_coroutines_sends(mailer, message, engine, url, states, sql):
    async def order(name, *, fails=False):
        async_engine = create_async_engine(url, poolclass=NullPool)
        async with AsyncSession(async_engine) as session, session.begin():
            session.add(Order(name=name))
            await session.run_sync(lambda s: mailer.send(message(name), session=s))
            if fails:
                raise ZeroDivisionError

    asyncio.run(order('one'))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(order('two', fails=True))

    assert states(url) == ['waiting']
    assert sql(url, 'SELECT name FROM orders') == [('one',)]
    assert sql(url, 'SELECT subject FROM mailqueue_message') == [('one',)]


def test_a_session_of_a_class_of_its_own_is_one(mailer, message, engine, states, url):
    class OwnSession(Session):
        pass

    with OwnSession(engine) as session, session.begin():
        mailer.send(message('one'), session=session)

    assert states(url) == ['waiting']


@pytest.mark.parametrize('register', ['nobody', 'zope.sqlalchemy', 'both'])
def test_who_listens_to_the_session_hears_of_the_row(mailer, message, engine, states, url, register):
    heard = []
    factory = sessionmaker(engine)
    if register != 'nobody':
        zope.sqlalchemy.register(factory)
    if register == 'both':
        event.listen(factory, 'do_orm_execute', lambda it: heard.append((it.is_orm_statement, it.is_insert)))

    with transaction.manager:
        session = factory()
        session.add(Order(name='one'))
        mailer.send(message('one'), session=session, delivery='queue')
        assert session.new
        if register == 'nobody':
            session.commit()

    assert states(url) == ['waiting']
    assert heard == ([(True, True)] if register == 'both' else [])


# --- where it writes --------------------------------------------------------


def other_schema(make_database, url, tmp_path):
    return make_database('postgresql+psycopg')


def other_file(make_database, url, tmp_path):
    return f'sqlite:///{tmp_path}/other.sqlite'


OTHERS = {
    'another schema': ('postgresql+psycopg', other_schema),
    'another file': ('sqlite', other_file),
    'a file, and not the server': ('postgresql+psycopg', other_file),
    'the server, and not the file': ('sqlite', other_schema),
}


@pytest.fixture
def other_url(make_database, url, tmp_path, request):
    other = request.param(make_database, url, tmp_path)
    create_queue_tables(other)
    return other


@pytest.mark.parametrize(('url', 'other_url'), OTHERS.values(), ids=OTHERS, indirect=True)
@pytest.mark.parametrize('delivery', ['inline', 'queue'])
def test_mail_that_nobody_would_look_for_is_refused(mailer, message, make_engine, url, other_url, states, delivery):
    zope.sqlalchemy.register(factory := sessionmaker(make_engine(other_url)))

    for _ in range(2):
        with pytest.raises(QueueError, match='mq-run would never find this mail') as info, transaction.manager:
            mailer.send(message('one'), session=factory(), delivery=delivery)

    assert make_url(url).render_as_string() in str(info.value)
    assert make_url(other_url).render_as_string() in str(info.value)
    assert states(url) == states(other_url) == []


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
def test_another_database_of_the_server_is_another_one(make_postgres, mailer, message, make_engine, url):
    other = make_postgres()
    metadata.create_all(make_engine(other))

    with pytest.raises(QueueError, match='mq-run would never find this mail'), Session(make_engine(other)) as session:
        mailer.send(message('one'), session=session)


@pytest.mark.parametrize('url', ['sqlite'], indirect=True)
def test_a_database_in_memory_is_another_one(mailer, message, make_engine):
    engine = make_engine('sqlite://')
    metadata.create_all(engine)

    with pytest.raises(QueueError, match='mq-run would never find this mail'), Session(engine) as session:
        mailer.send(message('one'), session=session)


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
def test_no_password_is_told(mailer, message, make_engine, url, make_database):
    other = make_url(make_database('postgresql+psycopg'))
    create_queue_tables(other)
    engine = make_engine(other.set(password='secret').update_query_dict({'sslpassword': 'secret'}))

    with pytest.raises(QueueError, match=r':\*\*\*@') as info, Session(engine) as session:
        mailer.send(message('one'), session=session)

    assert 'secret' not in str(info.value)


def by_the_other_driver(url, folder):
    return url.set(drivername='postgresql+psycopg2'), {}


def committing_each_statement(url, folder):
    return url, {'isolation_level': 'AUTOCOMMIT'}


def by_a_symbolic_link(url, folder):
    link = folder / 'link.sqlite'
    link.symlink_to(url.database)
    return url.set(database=str(link)), {}


def by_a_relative_path(url, folder):
    return url.set(database=os.path.relpath(url.database)), {}


def by_a_uri(url, folder):
    return f'sqlite:///file:{url.database}?mode=rw&uri=true', {}


ALIASES = {
    'another driver': ('postgresql+psycopg', by_the_other_driver),
    'autocommit on PostgreSQL': ('postgresql+psycopg', committing_each_statement),
    'autocommit on SQLite': ('sqlite', committing_each_statement),
    'a symbolic link': ('sqlite', by_a_symbolic_link),
    'a relative path': ('sqlite', by_a_relative_path),
    'a URI': ('sqlite', by_a_uri),
}


@pytest.mark.parametrize(('url', 'alias'), ALIASES.values(), ids=ALIASES, indirect=['url'])
def test_the_same_tables_may_have_another_url(mailer, message, make_engine, url, states, tmp_path, alias):
    other, options = alias(make_url(url), tmp_path)

    with Session(make_engine(other, **options)) as session, session.begin():
        mailer.send(message('one'), session=session)

    assert states(url) == ['waiting']


@pytest.mark.parametrize('url', ['sqlite'], indirect=True)
def test_the_tables_may_be_in_a_file_that_is_attached(mailer, message, make_engine, url, states, tmp_path):
    engine = make_engine(f'sqlite:///{tmp_path}/data.sqlite')

    @event.listens_for(engine, 'connect')
    def attach(connection, _record):
        connection.execute('ATTACH ? AS mail', (make_url(url).database,))

    with Session(engine) as session, session.begin():
        mailer.send(message('one'), session=session)

    assert states(url) == ['waiting']


class RoutingSession(Session):
    """Reads elsewhere, as SQLAlchemy's documentation has it."""

    leader = follower = None

    def get_bind(self, mapper=None, *, clause=None, **_):
        assert mapper is None or mapper.class_
        return self.leader if self._flushing or isinstance(clause, UpdateBase) else self.follower


def test_a_session_may_read_elsewhere(mailer, message, make_engine, engine, url, states, tmp_path):
    session = RoutingSession()
    session.leader, session.follower = engine, make_engine(f'sqlite:///{tmp_path}/follower.sqlite')

    with session, session.begin():
        mailer.send(message('one'), session=session)

    assert states(url) == ['waiting']


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
def test_an_engine_that_translates_schemas_is_another_one(mailer, message, engine, url, make_database):
    other = make_database('postgresql+psycopg')
    create_queue_tables(other)
    translated = engine.execution_options(schema_translate_map={None: other.rpartition('%3D')[2]})
    with Session(engine) as session, session.begin():
        mailer.send(message('one'), session=session)

    with pytest.raises(QueueError, match='mq-run would never find this mail'), Session(translated) as session:
        mailer.send(message('two'), session=session)


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
def test_no_connection_is_left_of_the_question(settings, message, make_engine, url, sql, until):
    engine, asked = make_engine(url), '%pg_postmaster_start_time%'
    count = 'SELECT count(*) FROM pg_stat_activity WHERE query LIKE :asked AND pid <> pg_backend_pid()'
    mailers = [mailer_from_settings({**settings, 'mailqueue.delivery': 'queue'}) for _ in range(3)]

    def send(mailer):
        with Session(engine) as session, session.begin():
            mailer.send(message('one'), session=session)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(send, mailers * 4))
    engine.dispose()

    until(lambda: sql(url, count, asked=asked) == [(0,)])


def test_a_session_may_be_bound_to_a_connection(mailer, message, engine, url, states):
    with engine.begin() as connection, Session(connection) as session:
        mailer.send(message('one'), session=session)
        session.commit()

    assert states(url) == ['waiting']


def test_each_engine_is_asked_once(mailer, message, engine, url):
    statements = []
    event.listen(engine, 'before_cursor_execute', lambda *it: statements.append(it[2]))
    mailer.queue.check()
    event.listen(mailer.queue.database.engine, 'before_cursor_execute', lambda *it: statements.append(it[2]))
    counts = []
    for bind in (engine, engine, engine.execution_options(logging_token='one')):
        with Session(bind) as session, session.begin():
            mailer.send(message('one'), session=session)
        counts.append(len(statements))
        statements.clear()

    # Ours, the session's, and the INSERT.
    assert counts == [3, 1, 1]


@pytest.fixture
def settings_of_a_queue_elsewhere(settings, tmp_path):
    other = f'sqlite:///{tmp_path}/away/queue.sqlite'
    (tmp_path / 'away').mkdir()
    create_queue_tables(other)
    return settings | {'mailqueue.sql_url': other}


def test_where_the_queue_cannot_be_asked_mail_is_not_refused(
    settings_of_a_queue_elsewhere, message, engine, url, states, tmp_path, caplog
):
    mailer = mailer_from_settings(settings_of_a_queue_elsewhere)
    Path(tmp_path, 'away').rename(tmp_path / 'gone')

    for _ in range(2):
        with Session(engine) as session, session.begin():
            mailer.send(message('one'), session=session)

    assert states(url) == ['waiting', 'waiting']
    (told,) = [record for record in caplog.records if 'it is unknown whether the session' in record.getMessage()]
    assert told.levelname == 'WARNING'
    mailer.close()


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
def test_a_row_that_is_not_there_after_the_commit_is_told(mailer, message, make_engine, url, caplog, smtp_server):
    """Which tables a session means is asked once for each engine, and later sessions may mean others."""
    caplog.set_level(logging.INFO)
    zope.sqlalchemy.register(factory := sessionmaker(make_engine(url)))
    with transaction.manager:
        mailer.send(message('one'), session=factory())
    with transaction.manager:
        session = factory()
        savepoint = session.connection().begin_nested()
        mailer.send(message('two'), session=session)
        savepoint.rollback()

    assert len(smtp_server.received) == 1
    (told,) = [record for record in caplog.records if 'status=discarded' in record.getMessage()]
    assert told.levelname == 'WARNING'
    assert 'not found after the commit' in told.mailqueue['reason']
    assert 'another database or schema than that of mailqueue.sql_url' in told.mailqueue['reason']


# --- savepoints -------------------------------------------------------------


@pytest.fixture
def shop(make_app, settings, engine):
    """Call a view in an app of its own; return what the log and the events have told."""

    def shop(view, **own):
        told = {'queued': [], 'discarded': [], 'events': []}
        subjects = {}

        def get_session(request):
            session = Session(engine)
            zope.sqlalchemy.register(session, transaction_manager=request.tm)
            return session

        def configure(config):
            config.add_request_method(get_session, 'dbsession', reify=True)
            config.add_subscriber(lambda it: told['events'].append(subjects[it.message_id]), MailQueued)

        class Handler(logging.Handler):
            def emit(self, record):
                event = record.mailqueue
                told.get(event['status'], []).append(subjects[event['msgid']])

        def send(request, made):
            subjects[request.mailer.send(made)] = made['subject']

        log, handler = logging.getLogger('mailqueue.queue_log'), Handler()
        log.setLevel(logging.INFO)
        log.addHandler(handler)
        manager = {'tm.manager_hook': 'pyramid_tm.explicit_manager'}
        app = make_app(
            lambda request: view(request, lambda it: send(request, it)), settings | manager | own, configure=configure
        )
        try:
            app.get('/')
        finally:
            log.removeHandler(handler)
        return told

    return shop


def rolled_back(request, send, message):
    savepoint = request.dbsession.begin_nested()
    send(message('gone'))
    savepoint.rollback()


def rolled_back_by_an_error(request, send, message):
    with contextlib.suppress(ZeroDivisionError), request.dbsession.begin_nested():
        send(message('gone'))
        raise ZeroDivisionError


def rolled_back_by_the_database(request, send, message):
    with contextlib.suppress(IntegrityError), request.dbsession.begin_nested():
        send(message('gone'))
        request.dbsession.execute(insert(Order).values(name='before'))


def rolled_back_by_a_flush(request, send, message):
    with contextlib.suppress(IntegrityError), request.dbsession.begin_nested():
        send(message('gone'))
        request.dbsession.expunge_all()
        request.dbsession.add(Order(name='before'))
        request.dbsession.flush()


def rolled_back_after_a_flush(request, send, message):
    savepoint = request.dbsession.begin_nested()
    send(message('gone'))
    request.dbsession.expunge_all()
    request.dbsession.add(Order(name='before'))
    with contextlib.suppress(IntegrityError):
        request.dbsession.flush()
    savepoint.rollback()


def rolled_back_around_it(request, send, message):
    outer = request.dbsession.begin_nested()
    with request.dbsession.begin_nested():
        send(message('gone'))
    outer.rollback()


def rolled_back_while_it_is_open(request, send, message):
    outer = request.dbsession.begin_nested()
    request.dbsession.begin_nested()
    send(message('gone'))
    outer.rollback()


def rolled_back_with_the_transaction(request, send, message):
    savepoint = request.tm.savepoint()
    send(message('gone'))
    savepoint.rollback()


def rolled_back_inside_of_the_transactions(request, send, message):
    request.tm.savepoint()
    with contextlib.suppress(ZeroDivisionError), request.dbsession.begin_nested():
        send(message('gone'))
        raise ZeroDivisionError


ROLLED_BACK = [it for name, it in globals().items() if name.startswith('rolled_back')]


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
@pytest.mark.parametrize('delivery', ['inline', 'queue'])
@pytest.mark.parametrize('roll_back', ROLLED_BACK, ids=lambda it: it.__name__)
def test_mail_that_went_with_a_savepoint_is_told_as_discarded(
    shop, message, url, states, smtp_server, roll_back, delivery
):
    def view(request, send):
        request.dbsession.add(Order(name='before'))
        request.dbsession.flush()
        send(message('before'))
        with request.dbsession.begin_nested():
            send(message('in one that is kept'))
        roll_back(request, send, message)
        send(message('after'))

    told = shop(view, **{'mailqueue.delivery': delivery})

    kept = ['before', 'in one that is kept', 'after']
    assert told == {'queued': kept, 'discarded': ['gone'], 'events': kept}
    assert states(url) == (['waiting'] * 3 if delivery == 'queue' else [])
    assert len(smtp_server.received) == (0 if delivery == 'queue' else 3)


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
def test_after_an_abort_each_message_is_told_once(shop, message, url, states):
    def view(request, send):
        send(message('before'))
        rolled_back(request, send, message)
        request.tm.doom()

    assert shop(view) == {'queued': [], 'discarded': ['before', 'gone'], 'events': []}
    assert states(url) == []


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
def test_a_savepoint_of_one_session_says_nothing_of_another(mailer, message, make_engine, url, states):
    zope.sqlalchemy.register(factory := sessionmaker(make_engine(url)))
    with transaction.manager:
        one, other = factory(), factory()
        savepoint = one.begin_nested()
        mailer.send(message('gone'), session=one, delivery='queue')
        mailer.send(message('kept'), session=other, delivery='queue')
        savepoint.rollback()

    assert states(url) == ['waiting']


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
def test_a_session_that_is_kept_is_listened_to_once(mailer, message, make_engine, url, states):
    registry = scoped_session(sessionmaker(make_engine(url)))
    zope.sqlalchemy.register(registry, keep_session=True)
    for _ in range(3):
        with transaction.manager:
            for _ in range(2):
                with registry.begin_nested():
                    mailer.send(message('kept'), session=registry, delivery='queue')

    assert states(url) == ['waiting'] * 6
    assert len(registry().dispatch.after_soft_rollback) == 1
    registry.remove()


# --- SQLite: what its driver does, and the cure ------------------------------


@pytest.fixture
def cured(engine):
    """The recipe that the docs give for SQLite."""

    @event.listens_for(engine, 'connect')
    def begin_nothing_by_itself(connection, _record):
        connection.isolation_level = None

    @event.listens_for(engine, 'begin')
    def begin(connection):
        connection.exec_driver_sql('BEGIN')

    # What was opened before has not heard of it.
    engine.dispose()


def nested_and_then_failed(engine, mailer, message):
    zope.sqlalchemy.register(factory := sessionmaker(engine))
    with contextlib.suppress(ZeroDivisionError), transaction.manager:
        session = factory()
        with session.begin_nested():
            session.add(Order(name='one'))
            mailer.send(message('one'), session=session, delivery='queue')
        raise ZeroDivisionError


@pytest.mark.parametrize('url', ['sqlite'], indirect=True)
def test_by_itself_sqlite_may_commit_a_savepoint_whose_transaction_fails(mailer, message, engine, url, states, sql):
    """The mail shares the fate of the data, as the docs say: when this changes, change them."""
    nested_and_then_failed(engine, mailer, message)

    assert sql(url, 'SELECT name FROM orders') == [('one',)]
    assert states(url) == ['waiting']


@pytest.mark.usefixtures('cured')
@pytest.mark.parametrize('url', ['sqlite'], indirect=True)
def test_with_the_cure_it_does_not(mailer, message, engine, url, states, sql):
    nested_and_then_failed(engine, mailer, message)

    assert sql(url, 'SELECT name FROM orders') == []
    assert states(url) == []


@pytest.mark.usefixtures('cured')
@pytest.mark.parametrize('url', ['sqlite'], indirect=True)
def test_with_the_cure_savepoints_of_the_session_hold_for_mail(shop, message, url, states):
    def view(request, send):
        with request.dbsession.begin_nested():
            send(message('kept'))
        rolled_back(request, send, message)
        send(message('after'))

    told = shop(view, **{'mailqueue.delivery': 'queue'})

    assert told == {'queued': ['kept', 'after'], 'discarded': ['gone'], 'events': ['kept', 'after']}
    assert states(url) == ['waiting', 'waiting']


@pytest.mark.parametrize('with_mail', [False, True])
def test_a_savepoint_in_one_of_the_session_ends_with_it_with_mail_or_without(
    message, make_engine, postgres_url, make_settings, smtp_server, with_mail
):
    settings = {'sqlalchemy.url': postgres_url, **make_settings(smtp_server, queue='sql', delivery='queue')}
    session = Session(make_engine(postgres_url))
    zope.sqlalchemy.register(session)
    session.connection()
    nested = session.begin_nested()
    if with_mail:
        mailer_from_settings(settings).send(message('1'), session=session)
    savepoint = transaction.savepoint()
    nested.commit()

    with pytest.raises(ResourceClosedError):
        savepoint.rollback()
    transaction.abort()


@pytest.mark.parametrize('url', ['sqlite'], indirect=True)
def test_on_sqlite_the_transaction_has_no_savepoints(mailer, message, engine):
    zope.sqlalchemy.register(factory := sessionmaker(engine))
    with transaction.manager:
        mailer.send(message('one'), session=factory())
        with pytest.raises(TypeError, match='Savepoints unsupported'):
            transaction.savepoint()
        transaction.abort()
        transaction.begin()


# --- a database that has not all characters ----------------------------------


@pytest.fixture
def make_postgres(postgres):
    """Make databases of a server, with ``options`` of ``CREATE DATABASE``, that are dropped in the end."""
    names = []
    admin = create_engine(postgres.url('psycopg'), isolation_level='AUTOCOMMIT')

    def make_postgres(driver='psycopg', options=''):
        names.append(f'mq_{os.getpid()}_database_{next(_NUMBERS)}')
        with admin.connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE {names[-1]} {options}')
        return make_url(postgres.url(driver)).set(database=names[-1]).render_as_string(hide_password=False)

    yield make_postgres
    with admin.connect() as connection:
        for name in names:
            connection.exec_driver_sql(f'DROP DATABASE {name} WITH (FORCE)')
    admin.dispose()


LATIN1 = "ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
# Who says no: the driver, by itself, or the server.
DRIVERS = {
    'psycopg': ('psycopg', {}),
    'psycopg2': ('psycopg2', {}),
    'the server': ('psycopg', {'client_encoding': 'utf8'}),
}
EUROS = Envelope(
    'shop@site.example',
    ('ada@x.example', 'bob@x.example'),
    b'Message-ID: <1@site.example>\r\nSubject: =?utf-8?q?5_=E2=82=AC?=\r\n\r\nHello.\r\n',
)


@pytest.fixture(params=DRIVERS.values(), ids=DRIVERS)
def latin1(request, make_postgres, make_queue, make_engine):
    """A queue in a database whose encoding is LATIN1, as if it had not been checked at its start."""
    driver, options = request.param
    url = make_url(make_postgres(driver, LATIN1)).update_query_dict(options).render_as_string(hide_password=False)
    metadata.create_all(make_engine(url))
    queue = make_queue(url)
    queue.database._is_checked = True
    return queue, url


def test_a_message_that_the_database_cannot_hold_is_refused(latin1, make_engine, states):
    queue, url = latin1

    with Session(make_engine(url)) as session, pytest.raises(QueueError, match=r'(?i)latin-?1'):
        queue.put_in(session, EUROS)
    for put in (queue.put, queue.put_claimed):
        with pytest.raises(QueueError, match=r'(?i)latin-?1'):
            put(EUROS)

    assert states(url) == []


def test_an_outcome_that_the_database_cannot_hold_is_written_in_ascii(latin1, envelope, sql, caplog):
    queue, url = latin1
    ada, bob = EUROS.recipients
    deferred, buried = (queue.put_claimed(Envelope('', EUROS.recipients, envelope.content)) for _ in range(2))

    deferred.settle(Settlement((bob,), due=1, last_reply='450 später: 5 €'))
    buried.settle(Settlement(burials=(Burial((ada,), '550 kein €'), Burial((bob,), '550 schön'))))
    queue.flush()

    rows = sql(url, 'SELECT state, recipients, last_reply FROM mailqueue_message ORDER BY id')
    assert rows == [
        ('waiting', [bob], r'450 sp\xe4ter: 5 \u20ac'),
        ('dead', [ada], r'550 kein \u20ac'),
        ('dead', [bob], r'550 sch\xf6n'),
    ]
    assert [record for record in caplog.records if record.levelname in ('ERROR', 'CRITICAL')] == []


def test_what_it_can_hold_is_written_as_it_is(latin1, envelope, sql):
    queue, url = latin1
    queue.put_claimed(envelope).settle(Settlement(envelope.recipients, due=1, last_reply='450 später'))

    assert sql(url, 'SELECT last_reply FROM mailqueue_message') == [('450 später',)]
