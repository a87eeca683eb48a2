"""Mail in the database session of an application: real applications with pyramid_tm and zope.sqlalchemy."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import partial

import pytest
import transaction
import zope.sqlalchemy
from sqlalchemy import create_engine, insert, select
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool
from zope.sqlalchemy.datamanager import STATUS_READONLY

from pyramid_mailqueue import QueueError, mailer_from_settings
from pyramid_mailqueue.exceptions import NoActiveTransaction
from pyramid_mailqueue.queues.sql.schema import Message
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.wiring import build_runner
from tests.parts.databases import create_queue_tables, postgres_schema
from tests.parts.orders import Base, Order


@pytest.fixture
def factory(url):
    engine = create_engine(url, poolclass=NullPool)
    Base.metadata.create_all(engine)
    return sessionmaker(bind=engine)


@pytest.fixture
def settings(make_settings, smtp_server, url):
    return {
        'sqlalchemy.url': url,
        'tm.manager_hook': 'pyramid_tm.explicit_manager',
        **make_settings(smtp_server, queue='sql', delivery='inline'),
    }


@pytest.fixture
def make_shop(make_app, settings, factory):
    """Make an app whose view is called with ``request``; keywords are those of ``zope.sqlalchemy.register``."""

    def make_shop(view, *, session=None, name='dbsession', own=(), include=('pyramid_tm',), **register):
        def get_session(request):
            made = (session or factory)()
            zope.sqlalchemy.register(made, transaction_manager=request.tm, **register)
            return made

        def configure(config):
            config.add_request_method(get_session, name, reify=True)

        return make_app(view, settings | dict(own), configure=configure, include=include)

    return make_shop


@pytest.fixture
def there_is(factory, url, make_queue):
    """What is in the database: the names of orders, and the mail in the queue."""

    def there_is():
        with factory() as session:
            orders = sorted(session.scalars(select(Order.name)))
        return orders, {state: number for state, number in make_queue(url).counts().items() if number}

    return there_is


def subjects(server, count):
    return sorted(parsed_subject(message) for message in server.wait_for(count))


def parsed_subject(message):
    return message.content.decode().partition('Subject: ')[2].partition('\r\n')[0]


# --- the row and the data ---------------------------------------------------


EACH_DRIVER = pytest.mark.parametrize('url', ['sqlite', 'postgresql+psycopg', 'postgresql+psycopg2'], indirect=True)


@EACH_DRIVER
@pytest.mark.parametrize('delivery', ['inline', 'background'])
def test_mail_is_sent_when_the_data_is_committed(make_shop, message, smtp_server, there_is, until, delivery):
    def view(request):
        request.dbsession.add(Order(name='one'))
        return request.mailer.send(message('order one'))

    answer = make_shop(view, own={'mailqueue.delivery': delivery}).get('/')

    assert subjects(smtp_server, 1) == ['order one']
    assert answer.text in smtp_server.received[0].content.decode()
    until(lambda: there_is() == (['one'], {}))


@EACH_DRIVER
def test_neither_is_there_after_an_abort(make_shop, message, smtp_server, there_is):
    def view(request):
        request.dbsession.add(Order(name='one'))
        request.mailer.send(message('order one'))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_shop(view).get('/')

    assert there_is() == ([], {})
    assert smtp_server.received == []


def test_a_session_that_has_done_nothing_else_commits_the_mail(make_shop, message, smtp_server, there_is):
    app = make_shop(lambda request: request.mailer.send(message('alone')))
    app.get('/')
    app.get('/')

    assert subjects(smtp_server, 2) == ['alone', 'alone']
    assert there_is() == ([], {})


def test_a_commit_that_fails_takes_the_mail_along(make_shop, message, smtp_server, there_is, factory):
    with factory.begin() as session:
        session.add(Order(name='one'))

    def view(request):
        request.mailer.send(message('order one'))
        request.dbsession.add(Order(name='one'))

    with pytest.raises(Exception, match=r'(?i)unique|duplicate'):
        make_shop(view).get('/')

    assert there_is() == (['one'], {})
    assert smtp_server.received == []


# Refuses the first statement: what a sequence has counted is not rolled back.
REFUSE_THE_FIRST = """
CREATE SEQUENCE inserts;
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN IF nextval('inserts') = 1 THEN RAISE 'not now' USING ERRCODE = '{code}'; END IF; RETURN NEW; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON mailqueue_message FOR EACH ROW EXECUTE FUNCTION refuse()
"""


@pytest.mark.parametrize('code', ['40001', '40P01'])
@pytest.mark.parametrize('url', ['postgresql+psycopg', 'postgresql+psycopg2'], indirect=True)
def test_a_request_whose_mail_met_a_deadlock_is_repeated_as_if_it_were_the_data(
    make_shop, message, smtp_server, there_is, url, sql, code
):
    sql(url, REFUSE_THE_FIRST.format(code=code))
    errors = []

    def view(request):
        request.dbsession.add(Order(name='one'))
        try:
            request.mailer.send(message('order one'))
        except QueueError as error:
            errors.append(error)
            raise
        return 'done'

    make_shop(view, include=('pyramid_tm', 'pyramid_retry')).get('/')

    assert subjects(smtp_server, 1) == ['order one']
    assert there_is() == (['one'], {})
    assert [error.sqlstate for error in errors] == [code]
    assert isinstance(errors[0].orig, Exception)


def test_what_only_a_person_can_mend_is_not_repeated(make_shop, message, url, sql):
    sent = []

    def view(request):
        sent.append(1)
        request.mailer.send(message('order one'))

    app = make_shop(view, include=('pyramid_tm', 'pyramid_retry'))
    sql(url, 'DROP TABLE mailqueue_content')
    sql(url, 'DROP TABLE mailqueue_message')
    with pytest.raises(QueueError):
        app.get('/')

    assert sent == [1]


@EACH_DRIVER
def test_mail_may_be_left_to_a_later_run(make_shop, message, smtp_server, there_is, settings):
    make_shop(lambda request: request.mailer.send(message('later'), delivery='queue')).get('/')

    assert there_is() == ([], {'waiting': 1})
    runner = build_runner(Settings.from_mapping(settings))
    assert runner.run().sent == 1
    assert subjects(smtp_server, 1) == ['later']
    assert there_is() == ([], {})


def test_sending_leaves_the_other_work_of_the_session_alone(make_shop, message, smtp_server):
    flushed = []

    def view(request):
        request.dbsession.add(Order(name='one'))
        request.mailer.send(message('one'))
        flushed.append(not request.dbsession.new)

    make_shop(view).get('/')

    assert flushed == [False]


def test_while_the_server_is_away_mail_waits(make_shop, message, smtp_server, there_is):
    smtp_server.stop()

    make_shop(lambda request: request.mailer.send(message('one'))).get('/')

    assert there_is() == ([], {'waiting': 1})


def test_mail_outside_of_a_transaction_needs_no_session(make_shop, message, smtp_server, there_is, settings):
    mailer = mailer_from_settings(settings)

    assert mailer.send_immediately(message('at once')).accepted
    mailer.enqueue(message('later'))

    assert subjects(smtp_server, 1) == ['at once']
    assert there_is() == ([], {'waiting': 1})
    mailer.close()


# --- savepoints -------------------------------------------------------------


@pytest.mark.parametrize('delivery', ['inline', 'background'])
def test_a_savepoint_that_is_rolled_back_takes_its_mail_along(
    make_shop, message, smtp_server, there_is, until, delivery, caplog, url
):
    caplog.set_level(logging.INFO)

    def view(request):
        send, session = request.mailer.send, request.dbsession
        session.add(Order(name='kept'))
        send(message('before'))
        with session.begin_nested():
            send(message('in one that is kept'))
        nested = session.begin_nested()
        session.add(Order(name='dropped'))
        send(message('in one that is dropped'))
        nested.rollback()
        send(message('after'))

    make_shop(view, own={'mailqueue.delivery': delivery}).get('/')

    assert subjects(smtp_server, 3) == ['after', 'before', 'in one that is kept']
    until(lambda: there_is() == (['kept'], {}))
    assert 'status=discarded' in caplog.text


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
def test_a_savepoint_of_the_transaction_holds_for_mail(make_shop, message, smtp_server, there_is):
    def view(request):
        request.dbsession.add(Order(name='kept'))
        request.mailer.send(message('before'))
        savepoint = request.tm.savepoint()
        request.dbsession.add(Order(name='dropped'))
        request.mailer.send(message('in it'))
        savepoint.rollback()
        request.mailer.send(message('after'))

    make_shop(view).get('/')

    assert subjects(smtp_server, 2) == ['after', 'before']
    assert there_is() == (['kept'], {})


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
def test_mail_may_begin_after_a_savepoint_that_is_rolled_back(make_shop, message, smtp_server, there_is):
    def view(request):
        request.dbsession.add(Order(name='kept'))
        request.dbsession.flush()
        savepoint = request.tm.savepoint()
        request.mailer.send(message('in it'))
        savepoint.rollback()
        request.mailer.send(message('after'))

    make_shop(view).get('/')

    assert subjects(smtp_server, 1) == ['after']
    assert there_is() == (['kept'], {})


# --- sessions of every kind -------------------------------------------------


class SaysNo:
    """Votes after the session, which has committed by then."""

    transaction_manager = None

    def sortKey(self):
        return '~~~'

    def tpc_vote(self, txn):
        raise ZeroDivisionError

    def _do_nothing(self, txn):
        pass

    abort = tpc_begin = commit = tpc_finish = tpc_abort = _do_nothing


@pytest.mark.parametrize('delivery', ['inline', 'queue'])
def test_what_was_committed_though_somebody_said_no_is_not_called_discarded(
    make_shop, message, smtp_server, there_is, settings, caplog, until, delivery
):
    caplog.set_level(logging.INFO)

    def view(request):
        request.dbsession.add(Order(name='one'))
        request.mailer.send(message('order one'))
        request.tm.get().join(SaysNo())

    with pytest.raises(ZeroDivisionError):
        make_shop(view, own={'mailqueue.delivery': delivery}).get('/')

    # At once, and not when a lease has run out.
    until(lambda: there_is() == (['one'], {'waiting': 1}))
    told = [record.getMessage() for record in caplog.records if hasattr(record, 'mailqueue')]
    assert [line.split()[0] for line in told] == ['status=queued', 'status=trouble']
    assert 'its session had committed before: it will be sent' in told[1]
    build_runner(Settings.from_mapping(settings)).run()
    assert subjects(smtp_server, 1) == ['order one']


def test_what_was_rolled_back_by_the_application_is_discarded(make_shop, message, there_is, caplog):
    caplog.set_level(logging.INFO)

    def view(request):
        request.mailer.send(message('order one'))
        request.dbsession.rollback()
        request.tm.doom()

    make_shop(view).get('/')

    assert there_is() == ([], {})
    assert [record.mailqueue['status'] for record in caplog.records if hasattr(record, 'mailqueue')] == ['discarded']


@pytest.mark.parametrize('url', ['postgresql+psycopg', 'postgresql+psycopg2'], indirect=True)
def test_a_session_may_commit_in_two_phases(make_shop, message, smtp_server, there_is, factory):
    def view(request):
        request.dbsession.add(Order(name='one'))
        request.mailer.send(message('order one'))
        if request.params:
            raise ZeroDivisionError

    app = make_shop(view, session=partial(factory, twophase=True))
    app.get('/')
    with pytest.raises(ZeroDivisionError):
        app.get('/?fail=1')

    assert subjects(smtp_server, 1) == ['order one']
    assert there_is() == (['one'], {})


def test_a_session_may_be_kept(mailer, message, smtp_server, there_is, factory):
    zope.sqlalchemy.register(factory, keep_session=True)
    session = factory()
    for name in ('one', 'two'):
        with transaction.manager:
            session.add(Order(name=name))
            mailer.send(message(name), session=session)

    assert subjects(smtp_server, 2) == ['one', 'two']
    session.close()


def test_a_scoped_session_stands_for_its_own(mailer, message, smtp_server, factory):
    registry = scoped_session(factory)
    zope.sqlalchemy.register(registry)

    with transaction.manager:
        mailer.send(message('scoped'), session=registry)

    assert subjects(smtp_server, 1) == ['scoped']


def test_another_attribute_of_the_request_may_be_the_session(make_shop, message, smtp_server):
    app = make_shop(lambda request: request.mailer.send(message('one')), name='db', own={'mailqueue.sql_session': 'db'})
    app.get('/')

    assert subjects(smtp_server, 1) == ['one']


def test_a_request_without_a_session_is_told_so(make_shop, message):
    app = make_shop(lambda request: request.mailer.send(message('one')), name='db')

    with pytest.raises(QueueError, match=r'request\.dbsession \(mailqueue\.sql_session\) is missing'):
        app.get('/')


@EACH_DRIVER
def test_a_session_that_is_read_only_is_told_so(make_shop, message, there_is):
    app = make_shop(lambda request: request.mailer.send(message('one')), initial_state=STATUS_READONLY)

    with pytest.raises(QueueError, match=r'cannot be sent in this session: .*read only'):
        app.get('/')

    assert there_is() == ([], {})


@pytest.mark.parametrize('url', ['postgresql+psycopg'], indirect=True)
def test_a_transaction_that_the_database_holds_for_read_only_is_told_so(make_shop, message):
    def view(request):
        request.dbsession.connection().exec_driver_sql('SET TRANSACTION READ ONLY')
        request.mailer.send(message('one'))

    with pytest.raises(QueueError, match='read-only transaction'):
        make_shop(view).get('/')


def test_a_session_of_a_database_without_the_tables_is_told_so(make_shop, message, sql, url):
    app = make_shop(lambda request: request.mailer.send(message('one')))
    sql(url, 'DROP TABLE mailqueue_content')
    sql(url, 'DROP TABLE mailqueue_message')

    with pytest.raises(QueueError, match=r'mq-queue app\.ini init'):
        app.get('/')


def test_a_session_with_several_databases_has_to_know_which_one_has_the_mail(mailer, message, url, there_is):
    engine = create_engine(url, poolclass=NullPool)

    with Session(binds={Base: engine}) as session, pytest.raises(QueueError) as info:
        mailer.send(message('one'), session=session)
    assert 'Could not locate a bind configured on mapper' in str(info.value)
    assert '..' not in str(info.value)

    with Session(binds={Base: engine, Message: engine}) as session, session.begin():
        session.add(Order(name='one'))
        mailer.send(message('one'), session=session)
    assert there_is() == (['one'], {'waiting': 1})


def test_a_schema_that_the_session_translates_holds_for_mail(postgres, message, make_settings, smtp_server):
    with postgres_schema(postgres) as url:
        create_queue_tables(url)
        schema = url.rpartition('%3D')[2]
        elsewhere = create_engine(postgres.url('psycopg'), poolclass=NullPool)
        engine = elsewhere.execution_options(schema_translate_map={None: schema})
        settings = {'sqlalchemy.url': url, **make_settings(smtp_server, queue='sql', delivery='queue')}

        with Session(engine) as session, session.begin():
            mailer_from_settings(settings).send(message('one'), session=session)

        assert build_runner(Settings.from_mapping(settings)).run().sent == 1


def test_where_nobody_will_commit_mail_is_refused(make_app, settings, factory, message):
    def configure(config):
        config.add_request_method(lambda _: factory(), 'dbsession', reify=True)

    app = make_app(lambda request: request.mailer.send(message('one')), settings, include=(), configure=configure)

    with pytest.raises(NoActiveTransaction):
        app.get('/')


def test_a_session_that_the_application_commits_by_itself_leaves_the_mail_to_a_later_run(
    make_app, settings, factory, message, there_is
):
    def view(request):
        request.mailer.send(message('one'))
        request.dbsession.commit()

    def configure(config):
        config.add_request_method(lambda _: factory(), 'dbsession', reify=True)

    make_app(view, settings, configure=configure).get('/')

    assert there_is() == ([], {'waiting': 1})


# --- scripts ----------------------------------------------------------------


@pytest.fixture
def mailer(settings):
    mailer = mailer_from_settings(settings)
    yield mailer
    mailer.close()


def test_a_script_sends_in_its_own_session(mailer, message, factory, there_is):
    with factory.begin() as session:
        session.add(Order(name='one'))
        mailer.send(message('one'), session=session)
    with factory() as session:
        mailer.send(message('two'), session=session)
        session.rollback()

    assert there_is() == (['one'], {'waiting': 1})


def test_a_script_with_transactions_has_its_mail_tried_at_once(mailer, message, factory, there_is, smtp_server):
    zope.sqlalchemy.register(factory)

    with transaction.manager:
        session = factory()
        session.add(Order(name='one'))
        mailer.send(message('one'), session=session)
    transaction.begin()
    mailer.send(message('two'), session=factory())
    transaction.abort()

    assert subjects(smtp_server, 1) == ['one']
    transaction.begin()
    assert there_is() == (['one'], {})
    transaction.abort()


def test_a_script_without_a_session_is_told_so(mailer, message):
    with pytest.raises(QueueError, match=r'In a script, pass session='):
        mailer.send(message('one'))
    transaction.abort()


def test_a_core_insert_would_be_lost(url, factory):
    """Why the session is told of the row: zope.sqlalchemy takes no notice of one that is only inserted."""
    zope.sqlalchemy.register(factory)
    with transaction.manager:
        factory().execute(insert(Order.__table__).values(name='core'))
    with transaction.manager:
        factory().execute(insert(Order).values(name='orm'))

    with Session(create_engine(url, poolclass=NullPool)) as session:
        assert [*session.scalars(select(Order.name))] == ['orm']


def test_other_queues_take_no_notice_of_a_session(make_settings, smtp_server, message):
    mailer = mailer_from_settings(make_settings(smtp_server, delivery='inline'))

    with transaction.manager:
        mailer.send(message('one'), session=object())

    assert subjects(smtp_server, 1) == ['one']
    mailer.close()


def test_the_library_is_loaded_for_this_queue_only():
    program = (
        'import sys, pyramid_mailqueue.wiring, pyramid_mailqueue.mailer, pyramid_mailqueue.cli.run, '
        'pyramid_mailqueue.cli.queue; sys.exit("sqlalchemy" in sys.modules)'
    )

    assert subprocess.run([sys.executable, '-c', program], check=False).returncode == 0


def test_the_orm_is_loaded_by_who_sends_only(url, tmp_path):
    ini = tmp_path / 'app.ini'
    quoted = url.replace('%', '%%')
    ini.write_text(f'[app:main]\nmailqueue.queue = sql\nmailqueue.smtp_hostname = x\nsqlalchemy.url = {quoted}\n')
    program = (
        'import sys\nfrom pyramid_mailqueue.cli import queue, run\n'
        'for main, argv in ((run.main, []), (queue.main, ["check"])):\n'
        '    try: main([sys.argv[1], *argv])\n'
        '    except SystemExit as end: assert end.code == 0, end.code\n'
        'sys.exit("sqlalchemy.orm" in sys.modules)'
    )

    assert subprocess.run([sys.executable, '-c', program, ini], check=False).returncode == 0
