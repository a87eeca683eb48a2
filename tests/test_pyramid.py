"""``config.include('pyramid_mailqueue')``: a Pyramid app with its database, and a real SMTP server."""

from __future__ import annotations

import re
import resource
import threading
from email import message_from_bytes

import pytest
import transaction
import zope.sqlalchemy
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationExecutionError
from pyramid_retry import RetryableException
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table, create_engine, event, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool
from transaction.interfaces import TransientError
from zope.interface import implementer
from zope.interface.verify import verifyObject

from pyramid_mailqueue import ConfigurationError, IMailer, ITransport, Mailer, QueueError, get_mailer, includeme
from pyramid_mailqueue.interfaces import IBindableMailer
from pyramid_mailqueue.testing import ScriptedSMTPServer, Wait

EXPLICIT = {'tm.manager_hook': 'pyramid_tm.explicit_manager'}

both_kinds = pytest.mark.parametrize('manager', [{}, EXPLICIT], ids=['thread', 'explicit'])


@pytest.fixture(autouse=True)
def _no_transaction_of_this_thread():
    transaction.abort()
    yield
    transaction.abort()


def waiting(app):
    counts = app.app.registry.getUtility(IMailer).queue.counts()
    return {state: number for state, number in counts.items() if number}


def subjects(envelopes):
    return [message_from_bytes(envelope.content)['subject'] for envelope in envelopes]


def left_in(queue_dir):
    """Every file of the queue, whatever it is."""
    return sorted(str(path.relative_to(queue_dir)) for path in queue_dir.rglob('*') if path.is_file())


@pytest.fixture
def sender(message):
    """A view that sends one message."""

    def sender(request):
        return request.mailer.send(message('hello'))

    return sender


# --- who delivers, and when -------------------------------------------------


@both_kinds
@pytest.mark.parametrize('delivery', ['background', 'inline'])
def test_mail_reaches_the_server(make_app, make_settings, smtp_server, sender, until, manager, delivery):
    app = make_app(sender, make_settings(smtp_server, delivery=delivery) | manager)
    response = app.get('/')
    (received,) = smtp_server.wait_for(1)

    assert message_from_bytes(received.content)['Message-ID'] == response.text
    until(lambda: waiting(app) == {})


@both_kinds
def test_mail_waits_for_mq_run(make_app, make_settings, smtp_server, sender, manager):
    app = make_app(sender, make_settings(smtp_server, delivery='queue') | manager)
    app.get('/')

    assert (smtp_server.received, waiting(app)) == ([], {'waiting': 1})


def test_a_request_does_not_wait_for_a_server_that_is_slow(make_app, make_settings, make_event, sender, until):
    answer = make_event()
    with ScriptedSMTPServer({'connect': Wait(answer)}) as server:
        app = make_app(sender, make_settings(server))
        for _ in range(3):
            app.get('/', status=200)
        before = list(server.messages), waiting(app)
        answer.set()
        server.wait_for(lambda: len(server.messages) == 3)
        until(lambda: waiting(app) == {})

    assert (before[0], sum(before[1].values())) == ([], 3)


@pytest.mark.parametrize('delivery', ['background', 'inline', 'queue'])
def test_a_request_does_not_fail_because_the_server_is_down(
    make_app, make_settings, smtp_server, sender, until, delivery
):
    smtp_server.stop()
    app = make_app(sender, make_settings(smtp_server, delivery=delivery))
    for _ in range(3):
        app.get('/', status=200)

    until(lambda: waiting(app) == {'waiting': 3})


@pytest.mark.parametrize('answer', ['421 4.3.2 closing down', '451 4.3.0 later', '550 5.1.1 no such user'])
def test_a_request_does_not_fail_because_the_server_says_no(make_app, make_settings, sender, answer):
    with ScriptedSMTPServer({'RCPT': answer}) as server:
        app = make_app(sender, make_settings(server, delivery='inline'))
        app.get('/', status=200)

    assert waiting(app) == ({'dead': 1} if answer[0] == '5' else {'waiting': 1})


def test_requests_in_several_threads_at_once(make_app, make_settings, smtp_server, message, until):
    def view(request):
        request.mailer.send(message(request.params['subject']))
        if 'fail' in request.params:
            request.tm.doom()

    app = make_app(view, make_settings(smtp_server))
    barrier = threading.Barrier(4)

    def work(number):
        barrier.wait(30)
        for turn in range(5):
            app.get('/', {'subject': f'{number}.{turn}'} | ({'fail': '1'} if turn % 2 else {}))

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(subjects(smtp_server.wait_for(12))) == [
        f'{number}.{turn}' for number in range(4) for turn in (0, 2, 4)
    ]
    until(lambda: waiting(app) == {})


# --- retries ----------------------------------------------------------------


class Busy(TransientError):
    pass


@both_kinds
@pytest.mark.parametrize('error', [RetryableException, Busy])
@pytest.mark.parametrize('when', ['in the view', 'in the commit'])
def test_a_request_that_is_retried_sends_once(
    make_app, make_settings, smtp_server, message, queue_dir, manager, error, when
):
    attempts = []

    def fail():
        raise error

    def view(request):
        attempts.append(request.mailer.send(message('order')))
        if len(attempts) < 3:
            if when == 'in the view':
                fail()
            request.tm.get().addBeforeCommitHook(fail)

    app = make_app(
        view, make_settings(smtp_server, delivery='inline') | manager, include=('pyramid_tm', 'pyramid_retry')
    )
    app.get('/')

    assert len(attempts) == 3
    assert [message_from_bytes(received.content)['Message-ID'] for received in smtp_server.received] == attempts[2:]
    assert left_in(queue_dir) == []


# --- the database -----------------------------------------------------------


METADATA = MetaData()
ORDERS = Table('orders', METADATA, Column('id', Integer, primary_key=True))
# SQLite checks such a key when it commits, which is in the vote of the session, after ours.
LINES = Table(
    'order_lines',
    METADATA,
    Column('id', Integer, primary_key=True),
    Column('order_id', ForeignKey('orders.id', deferrable=True, initially='DEFERRED')),
)


class Database:
    def __init__(self, path):
        # No pool: after a commit that failed, one may give the connection with its rows to whoever looks next.
        self.engine = create_engine(f'sqlite:///{path}', poolclass=NullPool)
        event.listen(self.engine, 'connect', lambda connection, _: connection.execute('PRAGMA foreign_keys = ON'))
        METADATA.create_all(self.engine)
        self.make_session = sessionmaker(bind=self.engine)

    def includeme(self, config):
        config.add_request_method(self.session_of, 'dbsession', reify=True)

    def session_of(self, request):
        session = self.make_session()
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    def add(self, request, table, **values):
        request.dbsession.execute(insert(table).values(values))
        zope.sqlalchemy.mark_changed(request.dbsession, request.tm)

    @property
    def rows(self):
        with self.engine.connect() as connection:
            return [*connection.scalars(select(ORDERS.c.id)), *connection.scalars(select(LINES.c.id))]


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path / 'app.sqlite')
    yield database
    database.engine.dispose()


@both_kinds
def test_the_row_and_the_mail_are_one(make_app, make_settings, smtp_server, message, database, queue_dir, manager):
    def view(request):
        database.add(request, ORDERS, id=1)
        request.mailer.send(message('order 1'))
        if 'fail' in request.params:
            request.tm.doom()

    settings = make_settings(smtp_server, delivery='inline') | manager
    app = make_app(view, settings, configure=database.includeme)
    app.get('/?fail')
    after_the_abort = database.rows, subjects(smtp_server.received), left_in(queue_dir)
    app.get('/')

    assert after_the_abort == ([], [], [])
    assert (database.rows, subjects(smtp_server.received), left_in(queue_dir)) == ([1], ['order 1'], [])


def no_folder_for_new_files(queue_dir):
    (queue_dir / 'tmp').rmdir()


def a_file_in_the_place_of_the_folder_for_votes(queue_dir):
    (queue_dir / 'prepared').rmdir()
    (queue_dir / 'prepared').touch()


def no_directory(queue_dir):
    queue_dir.rename(queue_dir.with_name('moved away'))


BROKEN = [no_folder_for_new_files, a_file_in_the_place_of_the_folder_for_votes, no_directory]


@both_kinds
@pytest.mark.parametrize('break_it', BROKEN)
def test_a_queue_that_cannot_be_written_rolls_the_row_back(
    make_app, make_settings, smtp_server, message, database, queue_dir, manager, break_it
):
    def view(request):
        request.mailer.send(message('order 1'))
        database.add(request, ORDERS, id=1)
        request.mailer.send(message('order 1, for the warehouse'))

    app = make_app(view, make_settings(smtp_server) | manager, configure=database.includeme)
    break_it(queue_dir)
    files_before = left_in(queue_dir)

    with pytest.raises(QueueError, match=str(queue_dir)):
        app.get('/')

    assert (database.rows, smtp_server.received, left_in(queue_dir)) == ([], [], files_before)


@pytest.fixture
def small_files():
    """No file can grow beyond 64 KiB: a part of it is written, and then no more, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@both_kinds
def test_a_disk_that_is_full_half_way_rolls_the_row_back(
    make_app, make_settings, small_files, message, database, queue_dir, manager
):
    def view(request):
        database.add(request, ORDERS, id=1)
        request.mailer.send(message('small'))
        large = message('large')
        large.set_content('x' * 70 + '\n' + 'too large\n' * 10000)
        request.mailer.send(large)

    app = make_app(
        view, make_settings(delivery='queue', smtp_hostname='localhost') | manager, configure=database.includeme
    )

    with pytest.raises(QueueError, match=f'{queue_dir}.*File too large'):
        app.get('/')

    assert (database.rows, left_in(queue_dir)) == ([], [])


@both_kinds
def test_a_database_that_says_no_when_it_is_asked_to_commit_takes_the_mail_with_it(
    make_app, make_settings, smtp_server, message, database, queue_dir, manager
):
    def view(request):
        request.mailer.send(message('an order that is not there'))
        database.add(request, LINES, id=1, order_id=99)

    app = make_app(view, make_settings(smtp_server) | manager, configure=database.includeme)

    with pytest.raises(IntegrityError, match='FOREIGN KEY'):
        app.get('/')

    assert (database.rows, smtp_server.received, left_in(queue_dir)) == ([], [], [])


# --- the configuration ------------------------------------------------------


def test_request_mailer_is_made_once_for_a_request(make_app, make_settings, smtp_server):
    seen = []

    def view(request):
        seen.extend([request.mailer, request.mailer, get_mailer(request)])

    app = make_app(view, make_settings(smtp_server))
    app.get('/')
    app.get('/')

    assert seen[0] is seen[1]
    assert seen[0] is not seen[3]
    assert {mailer.queue for mailer in seen} == {app.app.registry.getUtility(IMailer).queue}


def test_settings_may_still_be_changed_after_the_include(make_settings, smtp_server):
    config = Configurator(settings={'mailqueue.delivery': 'no such way'})
    config.include('pyramid_mailqueue')
    config.action('later', lambda: config.registry.settings.update(make_settings(smtp_server, delivery='queue')))
    config.make_wsgi_app()

    assert config.registry.getUtility(IMailer).delivery == 'queue'


def test_a_transport_may_be_registered_in_an_action_after_the_include(make_app, make_settings, recorder, sender):
    def configure(config):
        config.action('later', lambda: config.registry.registerUtility(recorder, ITransport, 'recorder'))

    app = make_app(sender, make_settings(transports='recorder', delivery='inline'), configure=configure)
    app.get('/')

    assert recorder.subjects == ['hello']


def test_transports_are_asked_in_their_order(make_app, make_settings, smtp_server, sender, recorder):
    class Closed:
        def send(self, sender, recipients, content):
            return False

    def configure(config):
        config.registry.registerUtility(Closed(), ITransport, 'closed')
        config.registry.registerUtility(recorder, ITransport, 'recorder')

    settings = make_settings(smtp_server, transports='closed recorder smtp', delivery='inline')
    app = make_app(sender, settings, configure=configure)
    app.get('/')

    assert (recorder.subjects, smtp_server.received, waiting(app)) == (['hello'], [], {})


BAD_SETTINGS = {
    'an unknown key': ({'mailqueue.smtp_hots': 'localhost'}, 'mailqueue.smtp_hots'),
    'a bad value': ({'mailqueue.smtp_port': 'twenty-five'}, 'mailqueue.smtp_port'),
    'no directory': ({'mailqueue.queue_dir': ''}, 'mailqueue.queue_dir'),
    'no server': ({'mailqueue.smtp_hostname': ''}, 'mailqueue.smtp_hostname'),
    'a directory that cannot be made': (
        {'mailqueue.queue_dir': '/dev/null/queue'},
        'mailqueue.queue_dir = /dev/null/queue',
    ),
    'a transport that nobody knows': ({'mailqueue.transports': 'pigeon'}, 'mailqueue.transports = pigeon'),
    'a factory that is not there': ({'mailqueue.transports': 'os.pigeon'}, 'mailqueue.transports = os.pigeon'),
}


@pytest.mark.parametrize(('bad', 'key'), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_setting_that_cannot_be_used_is_told_when_the_app_is_made(make_settings, smtp_server, bad, key):
    config = Configurator(settings=make_settings(smtp_server) | bad)
    config.include('pyramid_mailqueue')

    with pytest.raises(ConfigurationExecutionError) as caught:
        config.make_wsgi_app()

    assert isinstance(caught.value.evalue, ConfigurationError)
    assert key in str(caught.value.evalue)
    assert key in str(caught.value)


@pytest.mark.parametrize('package', ['pyramid_mailqueue', 'pyramid_mailqueue.testing', 'pyramid_mailqueue.dashboard'])
@pytest.mark.parametrize('where', ['in the code', 'in the settings'])
def test_an_error_of_the_configuration_names_the_line_of_the_app(package, where):
    settings = {'mailqueue.smtp_hots': 'localhost'}
    if where == 'in the settings':
        settings['pyramid.includes'] = package
    config = Configurator(settings=settings)
    if where == 'in the code':
        config.include(package)

    with pytest.raises(ConfigurationExecutionError) as caught:
        config.make_wsgi_app()

    *_, place, line = str(caught.value).splitlines()
    assert re.fullmatch(rf'  Line [1-9][0-9]* of file {re.escape(__file__)}:', place)
    assert line.strip() == (
        'config.include(package)' if where == 'in the code' else 'config = Configurator(settings=settings)'
    )


@pytest.mark.parametrize('again', ['pyramid_mailqueue', includeme], ids=['by name', 'by function'])
def test_including_twice_is_including_once(make_app, make_settings, smtp_server, sender, again):
    settings = make_settings(smtp_server, delivery='inline')
    app = make_app(sender, settings, include=(again, 'pyramid_tm'))
    app.get('/')

    assert len(smtp_server.received) == 1


def test_two_apps_in_one_process_do_not_meet(make_app, make_settings, smtp_server, message, tmp_path):
    def settings(name):
        return make_settings(smtp_server, queue_dir=str(tmp_path / name), delivery='queue')

    apps = [make_app(lambda request: request.mailer.send(message('hello')), settings(name)) for name in ('one', 'two')]
    apps[0].get('/')
    apps[0].get('/')
    apps[1].get('/')

    assert [waiting(app) for app in apps] == [{'waiting': 2}, {'waiting': 1}]


def test_an_app_in_an_app_has_its_own_mail(make_app, make_settings, smtp_server, message, tmp_path):
    """The mailer that is registered is called in the inner app while the outer one is at work too."""

    def settings(name):
        return make_settings(smtp_server, queue_dir=str(tmp_path / name), delivery='queue') | EXPLICIT

    def view(request):
        request.registry.getUtility(IMailer).send(message('inner'))

    inner = make_app(view, settings('inner'))

    def outer_view(request):
        request.registry.getUtility(IMailer).send(message('outer'))
        inner.get('/')
        request.registry.getUtility(IMailer).send(message('dropped as well'))
        request.tm.doom()

    outer = make_app(outer_view, settings('outer'))
    outer.get('/')

    assert (waiting(outer), waiting(inner)) == ({}, {'waiting': 1})


# --- a mailer of the application's own --------------------------------------


@implementer(IMailer)
class Wrapping:
    """Has what `IMailer` declares, and nothing else."""

    def __init__(self, wrapped):
        self._wrapped = wrapped

    def send(self, message, sender=None, recipients=None, delivery=None, session=None):
        message.replace_header('Subject', '[shop] ' + message['Subject'])
        return self._wrapped.send(message, sender, recipients, delivery, session)

    def send_immediately(self, message, sender=None, recipients=None):
        return self._wrapped.send_immediately(message, sender, recipients)

    def enqueue(self, message, sender=None, recipients=None):
        return self._wrapped.enqueue(message, sender, recipients)


def wrap_the_mailer(config):
    config.commit()
    config.registry.registerUtility(Wrapping(config.registry.getUtility(IMailer)), IMailer)


@both_kinds
@pytest.mark.parametrize('fails', [False, True])
def test_a_mailer_that_wraps_ours_is_part_of_the_transaction(
    make_app, make_settings, smtp_server, message, queue_dir, manager, fails
):
    def view(request):
        assert isinstance(request.mailer, Wrapping)
        request.mailer.send(message('hello'))
        if fails:
            raise RuntimeError('after the mail')
        return ''

    settings = {**make_settings(smtp_server, delivery='inline'), **manager}
    app = make_app(view, settings, configure=wrap_the_mailer)

    if fails:
        with pytest.raises(RuntimeError, match='after the mail'):
            app.get('/')
        assert left_in(queue_dir) == []
    else:
        app.get('/')
    assert subjects(smtp_server.received) == ([] if fails else ['[shop] hello'])


def test_a_mailer_of_ones_own_is_the_mailer_of_every_request_as_it_is(make_app, sender):
    own = Wrapping(None)
    assert verifyObject(IMailer, own)
    own.send = lambda message: f'sent {message["Subject"]}'
    seen = []

    def view(request):
        seen.append((request.mailer, get_mailer(request)))
        return sender(request)

    # Settings for ours are not needed then.
    app = make_app(view, {}, configure=lambda config: config.registry.registerUtility(own, IMailer))

    assert app.get('/').text == app.get('/').text == 'sent hello'
    assert seen == [(own, own)] * 2


def test_a_mailer_that_has_a_bound_to_and_does_not_declare_it_is_left_alone(make_app):
    class Own(Wrapping):
        def bound_to(self, queue, exchange):
            raise AssertionError

    own = Own(None)
    app = make_app(
        lambda request: str(request.mailer is own),
        {},
        configure=lambda config: config.registry.registerUtility(own, IMailer),
    )

    assert app.get('/').text == 'True'


@both_kinds
def test_a_mailer_that_declares_it_is_told_of_the_transactions_of_the_request(make_app, message, manager):
    @implementer(IBindableMailer)
    class Own(Wrapping):
        def bound_to(self, transactions):
            bound = Own(None)
            bound.transactions = transactions
            return bound

    own = Own(None)
    assert verifyObject(IBindableMailer, own)

    def view(request):
        mine, its = request.mailer.transactions.current(), request.tm.get()
        return str(request.mailer is not own and mine is its)

    app = make_app(view, manager, configure=lambda config: config.registry.registerUtility(own, IMailer))

    assert app.get('/').text == 'True'


def test_a_mailer_that_is_derived_from_ours_may_be_made_in_another_way(make_app, make_settings, smtp_server, sender):
    class Counting(Mailer):
        def __init__(self, original, counted):
            vars(self).update(vars(original))
            self.counted = counted

        def send(self, *args, **options):
            self.counted.append(args)
            return super().send(*args, **options)

    counted = []

    def configure(config):
        config.commit()
        config.registry.registerUtility(Counting(config.registry.getUtility(IMailer), counted), IMailer)

    app = make_app(sender, make_settings(smtp_server, delivery='inline'), configure=configure)
    app.get('/')

    assert len(counted) == 1
    assert subjects(smtp_server.received) == ['hello']
