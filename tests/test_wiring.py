"""From settings to objects."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from pyramid_mailqueue.application import build_mailer
from pyramid_mailqueue.delivery.dispatch import BackgroundDispatcher, InlineDispatcher
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.mailer import Mailer
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.testing import ScriptedSMTPServer
from pyramid_mailqueue.wiring import build_handler, build_queue, build_runner
from tests.parts.databases import create_queue_tables


@pytest.fixture
def settings_of(make_settings):
    def settings_of(server=None, **own):
        return Settings.from_mapping(make_settings(server, **own))

    return settings_of


@pytest.fixture
def sqlite_queue(tmp_path):
    """The settings of a queue in a database."""
    url = f'sqlite:///{tmp_path}/queue.sqlite'
    create_queue_tables(url)
    return {'queue': 'sql', 'sql_url': url, 'smtp_hostname': 'localhost'}


class Kept:
    """A transport that keeps what it is offered, and the settings it was made of."""

    def __init__(self, settings):
        self.settings = settings
        self.contents = []

    def send(self, sender, recipients, content):
        self.contents.append(content)
        return True


class OwnQueue:
    def __init__(self, settings):
        self.settings = settings


no_factory = SimpleNamespace()


def make_something_else(settings):
    return 'not a transport'


def complain(settings):
    raise ConfigurationError('pigeons.loft is missing')


def names_of(handler):
    return [route.name for route in handler.routes]


# --- the queue --------------------------------------------------------------


def test_the_queue_is_a_directory(settings_of, queue_dir):
    settings = settings_of(transports='inbox', in_doubt='send', retry_max='2d')
    queue = build_queue(settings, access='create')

    assert isinstance(queue, MaildirQueue)
    assert (queue.path, queue.in_doubt, queue.horizon) == (str(queue_dir), 'send', 3 * 86400)
    assert queue_dir.is_dir()


def test_a_directory_becomes_a_queue_only_if_that_is_wanted(settings_of, queue_dir):
    settings = settings_of(transports='inbox')

    for build in (build_queue, partial(build_queue, access='look'), build_runner):
        with pytest.raises(ConfigurationError) as info:
            build(settings)
        assert str(info.value) == (
            f'mailqueue.queue_dir = {queue_dir}: there is no such directory. The application creates its queue there '
            'when it starts, and so does: mq-queue app.ini init'
        )
    assert not queue_dir.exists()
    build_mailer(settings)
    assert build_queue(settings).path == str(queue_dir)


@pytest.mark.parametrize('separator', ['.', ':'])
def test_the_queue_of_a_factory(settings_of, separator):
    settings = settings_of(transports='inbox', queue=f'{__name__}{separator}OwnQueue')
    queue = build_queue(settings)

    assert isinstance(queue, OwnQueue)
    assert queue.settings is settings


def test_a_queue_needs_a_directory():
    with pytest.raises(ConfigurationError, match=r'mailqueue\.queue_dir'):
        build_queue(Settings())


def test_a_directory_that_cannot_be_made_is_an_error_that_names_it(settings_of, tmp_path):
    (tmp_path / 'file').touch()

    with pytest.raises(ConfigurationError, match=rf'mailqueue\.queue_dir = {tmp_path}/file/queue: .*Not a directory'):
        build_queue(settings_of(transports='inbox', queue_dir=str(tmp_path / 'file' / 'queue')))


def test_a_queue_in_a_database_needs_one(settings_of):
    with pytest.raises(ConfigurationError, match=r'mailqueue\.sql_url is missing, and so is sqlalchemy\.url'):
        build_queue(settings_of(transports='inbox', queue='sql'))


@pytest.mark.parametrize(
    ('url', 'problem'),
    [
        ('mysql://root:secret@localhost/app', 'neither postgresql nor sqlite'),
        ('nonsense', 'Could not parse'),
        ('sqlite://', 'in memory'),
        ('postgresql+nodriver://localhost/app', 'nodriver'),
    ],
)
def test_a_database_that_cannot_hold_a_queue_is_an_error_without_the_password(settings_of, url, problem):
    with pytest.raises(ConfigurationError, match=rf'mailqueue\.sql_url, .*{problem}') as info:
        build_queue(settings_of(transports='inbox', queue='sql', sql_url=url))

    assert 'secret' not in str(info.value)


def test_a_database_without_the_tables_says_how_to_create_them(settings_of, tmp_path):
    url = f'sqlite:///{tmp_path}/app.sqlite'
    (tmp_path / 'app.sqlite').touch()

    with pytest.raises(ConfigurationError, match=r'has no tables for the queue.*mq-queue app\.ini init'):
        build_queue(settings_of(transports='inbox', queue='sql', sql_url=url))


def test_a_database_with_other_tables_is_refused(settings_of, tmp_path):
    url = f'sqlite:///{tmp_path}/app.sqlite'
    create_queue_tables(url)
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.exec_driver_sql('UPDATE mailqueue_schema SET version = 7')

    with pytest.raises(ConfigurationError, match=r'has tables of version 7 .* needs version 1'):
        build_queue(settings_of(transports='inbox', queue='sql', sql_url=url))


def test_a_database_that_is_away_when_an_application_starts_does_not_keep_it_from_that(settings_of, caplog):
    url = 'postgresql+psycopg://nobody:secret@127.0.0.1:1/app'

    settings = settings_of(transports='inbox', queue='sql', sql_url=url, sql_session='db', sql_lease='1m')

    queue = build_mailer(settings).queue

    assert (queue.session_name, queue.leases.lease) == ('db', 60)
    assert 'cannot be used' in caplog.text
    assert 'secret' not in caplog.text + repr(queue)


# --- the transports ---------------------------------------------------------


def test_transports_of_every_kind_in_their_order(settings_of, recorder):
    settings = settings_of(smtp_hostname='localhost', transports=f'inbox registered smtp {__name__}.Kept')
    handler = build_handler(settings, {'registered': recorder}.get)

    assert names_of(handler) == ['inbox', 'recorder', 'smtp', 'Kept']


def test_a_registered_transport_may_take_the_name_of_one_of_ours(settings_of, recorder):
    handler = build_handler(settings_of(smtp_hostname='localhost'), {'smtp': recorder}.get)

    assert names_of(handler) == ['recorder']


def test_a_factory_is_called_with_the_settings(settings_of):
    settings = settings_of(transports=f'{__name__}:Kept')
    (route,) = build_handler(settings).routes

    assert route.transport.sender.settings is settings


@pytest.mark.parametrize('build', [build_handler, build_runner])
def test_a_rate_without_a_place_for_its_count_is_told_of_though_nothing_is_due(settings_of, sqlite_queue, build):
    settings = replace(settings_of(rate_limit='5/hour', **sqlite_queue), queue_dir=None)

    with pytest.raises(ConfigurationError, match=r'queue_dir is missing: mailqueue\.rate_limit keeps its count'):
        build(settings)


def test_the_inbox_is_in_the_directory_of_the_queue(settings_of, queue_dir, message):
    mailer = build_mailer(settings_of(transports='inbox'))
    mailer.send_immediately(message('for a person'))

    (file,) = (queue_dir / 'inbox').iterdir()
    assert b'Subject: for a person\r\n' in file.read_bytes()


BAD_TRANSPORTS = {
    'nobody knows it': ('pigeon', 'registered'),
    'its module is not there': ('no_such_module.pigeon', 'no_such_module'),
    'its module has no such name': (f'{__name__}.pigeon', 'pigeon'),
    'its name begins with a dot': ('.pigeon', 'registered'),
    'its name is relative': ('.some.pigeon', 'relative'),
    'it is not a factory': (f'{__name__}.no_factory', 'not callable'),
    'what it makes cannot send': (f'{__name__}.make_something_else', 'send'),
}


@pytest.mark.parametrize(('name', 'reason'), BAD_TRANSPORTS.values(), ids=BAD_TRANSPORTS)
def test_a_transport_that_cannot_be_used_is_an_error_that_names_it_and_why(settings_of, name, reason):
    with pytest.raises(ConfigurationError) as caught:
        build_handler(settings_of(transports=name))

    assert str(caught.value).startswith(f'mailqueue.transports = {name}: ')
    assert reason in str(caught.value)


def test_a_factory_whose_module_is_broken_is_an_error_that_says_why(settings_of, tmp_path, monkeypatch):
    (tmp_path / 'broken_by_test_wiring.py').write_text('raise RuntimeError("no licence")')
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ConfigurationError, match=r'mailqueue\.transports = broken_by_test_wiring\.x: .*no licence'):
        build_handler(settings_of(transports='broken_by_test_wiring.x'))


def test_a_factory_may_complain_in_its_own_words(settings_of):
    with pytest.raises(ConfigurationError, match=r'^pigeons\.loft is missing$'):
        build_handler(settings_of(transports=f'{__name__}.complain'))


def test_smtp_needs_a_server():
    with pytest.raises(ConfigurationError, match=r'mailqueue\.smtp_hostname'):
        build_handler(Settings())


def test_the_inbox_needs_a_directory():
    with pytest.raises(ConfigurationError, match=r'mailqueue\.transports = inbox needs mailqueue\.queue_dir'):
        build_handler(Settings(transports=('inbox',)))


def test_the_settings_reach_the_server(settings_of, message):
    with ScriptedSMTPServer(extensions=('AUTH PLAIN',)) as server:
        settings = settings_of(
            server,
            smtp_username='ada',
            smtp_password='secret',
            smtp_local_hostname='shop.site.example',
            max_recipients=1,
            delivery='inline',
        )
        mailer = build_mailer(settings)
        mailer.send_immediately(message('for two'), recipients=['a@x.example', 'b@x.example'])
        mailer.close()

        (session,) = server.sessions
        assert session.commands[0] == 'EHLO shop.site.example'
        assert any(command.startswith('AUTH PLAIN') for command in session.commands)
        assert sorted(received.recipients for received in server.messages) == [('a@x.example',), ('b@x.example',)]


# --- the mailer and the runner ----------------------------------------------


def test_a_mailer_delivers_in_the_background_and_inline(settings_of):
    mailer = build_mailer(settings_of(transports='inbox'))

    assert isinstance(mailer, Mailer)
    assert isinstance(mailer._dispatchers['background'], BackgroundDispatcher)
    assert isinstance(mailer._dispatchers['inline'], InlineDispatcher)


def test_a_mailer_has_the_retry_policy_and_the_plugins_of_the_settings(settings_of, queue_dir, message, caplog):
    with ScriptedSMTPServer({'RCPT': '451 4.3.0 later'}) as server:
        mailer = build_mailer(settings_of(server, retry_first='30m', retry_max='2h', plugins='pigeons'))
        begin = time.time()
        mailer.send_immediately(message('later'))
        mailer.close()

    (file,) = (queue_dir / 'new').iterdir()
    assert 0.8 * 1800 < file.stat().st_mtime - begin < 1.2 * 1800 + 60
    assert 'pigeons' in caplog.text


def test_a_message_id_has_the_name_of_this_host_where_the_sender_has_none(settings_of, message):
    mailer = build_mailer(settings_of(transports='inbox', smtp_local_hostname='shop.site.example'))

    assert mailer.enqueue(message('a bounce'), sender='').endswith('@shop.site.example>')


@pytest.fixture
def uwsgi(monkeypatch):
    """Under uWSGI, with the options of its command line; a thread runs only while a request does, unless asked for."""

    def uwsgi(**options):
        module = ModuleType('uwsgi')
        module.opt = {name.replace('_', '-').encode(): value.encode() for name, value in options.items()}
        monkeypatch.setitem(sys.modules, 'uwsgi', module)

    return uwsgi


def test_where_threads_do_not_run_mail_is_delivered_inline_and_the_log_says_so(settings_of, uwsgi, caplog):
    uwsgi(master='true')
    mailer = build_mailer(settings_of(transports='inbox'))

    assert isinstance(mailer._dispatchers['background'], InlineDispatcher)
    assert 'enable-threads' in caplog.text


@pytest.mark.parametrize('delivery', ['inline', 'queue'])
def test_who_does_not_ask_for_a_thread_is_not_warned_that_there_is_none(settings_of, uwsgi, caplog, delivery):
    uwsgi(master='true')
    build_mailer(settings_of(transports='inbox', delivery=delivery))

    assert caplog.records == []


@pytest.mark.parametrize('option', ['enable_threads', 'threads'])
def test_where_threads_run_under_uwsgi_there_is_one(settings_of, uwsgi, caplog, option):
    uwsgi(**{option: '1'})
    mailer = build_mailer(settings_of(transports='inbox'))

    assert isinstance(mailer._dispatchers['background'], BackgroundDispatcher)
    assert caplog.records == []


def test_a_runner_delivers_what_a_mailer_has_left(settings_of, smtp_server, message):
    settings = settings_of(smtp_server, delivery='queue')
    build_mailer(settings).enqueue(message('left over'))
    runner = build_runner(settings)
    report = runner.run()

    assert isinstance(runner, Runner)
    assert report.sent == 1
    assert len(smtp_server.received) == 1


def test_a_runner_knows_registered_transports_too(settings_of, recorder, message):
    settings = settings_of(transports='recorder')
    build_mailer(settings, lookup={'recorder': recorder}.get).enqueue(message('left over'))
    build_runner(settings, lookup={'recorder': recorder}.get).run()

    assert recorder.subjects == ['left over']


def test_mq_run_does_not_load_what_only_a_web_process_needs():
    code = """
import sys
from pathlib import Path
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.wiring import build_runner
import tempfile
from pyramid_mailqueue.queues.maildir import MaildirQueue
path = Path(tempfile.mkdtemp())
MaildirQueue(path)
build_runner(Settings(queue_dir=path, smtp_hostname='localhost', transports=('smtp', 'inbox')))
print(sorted({name.partition('.')[0] for name in sys.modules} & {'pyramid', 'transaction', 'sqlalchemy', 'webob'}))
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False, timeout=60)

    assert (done.stdout, done.stderr) == ('[]\n', '')
