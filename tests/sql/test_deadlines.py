"""A database that accepts connections and does not answer: a lock, a missing standby, a server that is stopped."""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from sqlalchemy import create_engine, text

from pyramid_mailqueue.queues.sql import deadlines as sql_deadlines
from pyramid_mailqueue.queues.sql.database import DatabaseAway
from pyramid_mailqueue.queues.sql.deadlines import SILENCE_SECONDS
from pyramid_mailqueue.results import Settlement
from pyramid_mailqueue.testing import ScriptedSMTPServer, Wait
from tests.parts.databases import create_queue_tables

# What is promised for the end of a process, in seconds; and what a loaded machine may add.
PROMISED = 30
SLACK = 5

LATER = 2_000_000_000

EACH_DRIVER = pytest.mark.parametrize('url', ['postgresql+psycopg', 'postgresql+psycopg2'], indirect=True)


@contextlib.contextmanager
def locked(url):
    """Meanwhile somebody has locked the table: whoever asks for it waits."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text('LOCK TABLE mailqueue_message'))
        yield
    engine.dispose()


@contextlib.contextmanager
def without_standby(url):
    """Meanwhile every commit waits for a standby that is not there."""
    engine = create_engine(url, isolation_level='AUTOCOMMIT')
    with engine.connect() as connection:
        # What waits for a standby itself would not return.
        connection.execute(text('SET synchronous_commit = local'))
        connection.execute(text("ALTER SYSTEM SET synchronous_standby_names = 'nobody'"))
        connection.execute(text('SELECT pg_reload_conf()'))
        yield
        connection.execute(text('ALTER SYSTEM RESET synchronous_standby_names'))
        connection.execute(text('SELECT pg_reload_conf()'))
    engine.dispose()


@contextlib.contextmanager
def within(seconds):
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


# --- one statement ----------------------------------------------------------


@EACH_DRIVER
def test_what_waits_for_a_lock_has_its_time(url, make_queue):
    queue = make_queue(url)
    queue.counts()

    with locked(url), within(5), pytest.raises(DatabaseAway, match='the database gives no answer'):
        queue.database.run(lambda connection: connection.execute(text('SELECT * FROM mailqueue_message')), 0.3)

    time.sleep(SILENCE_SECONDS)
    assert queue.database.run(lambda connection: connection.execute(text('SELECT 1')).scalar()) == 1


def test_what_takes_long_and_has_not_failed_silences_nobody(url, make_queue, monkeypatch):
    monkeypatch.setattr(sql_deadlines, 'SLOW_SECONDS', 0)
    queue = make_queue(url)
    queue.check_rights('mq-run')

    assert queue.count_due(time.time()) == 0


def test_what_was_cancelled_is_never_done(postgres_url, make_queue, envelope, sql):
    queue = make_queue(postgres_url)
    queue.put(envelope)

    with locked(postgres_url), within(5), pytest.raises(DatabaseAway):
        queue.database.run(lambda connection: connection.execute(text('DELETE FROM mailqueue_message')), 0.3)

    assert sql(postgres_url, 'SELECT count(*) FROM mailqueue_message') == [(1,)]


@pytest.mark.parametrize('driver', ['psycopg', 'psycopg2'])
def test_a_server_that_is_stopped_keeps_nobody(own_postgres, make_queue, envelope, driver):
    url = own_postgres.url(driver)
    create_queue_tables(url)
    queue = make_queue(url)
    queue.put(envelope)

    with own_postgres.silent():
        with within(5), pytest.raises(DatabaseAway, match='the database gives no answer'):
            queue.database.run(lambda connection: connection.execute(text('SELECT 1')), 0.3)
        with within(0.5), pytest.raises(DatabaseAway):
            # The next ones do not wait one by one.
            queue.counts()

    time.sleep(SILENCE_SECONDS)
    assert queue.counts()['waiting'] == 1


def test_a_message_that_no_standby_has_is_not_said_to_be_durable(own_postgres, make_queue, envelope):
    url = own_postgres.url('psycopg')
    create_queue_tables(url)
    queue = make_queue(url)
    queue.counts()

    def put_until_it_waits():
        # At first the server has not heard that it has to.
        while True:
            queue.hurry(0.5)
            queue.put(envelope)

    with without_standby(url), within(5), pytest.raises(DatabaseAway, match='gives no answer'):
        put_until_it_waits()


def test_a_claim_that_no_standby_has_is_one(own_postgres, make_queue, envelope):
    url = own_postgres.url('psycopg')
    create_queue_tables(url)
    queue = make_queue(url)
    name = queue.put(envelope)

    with without_standby(url):
        queue.hurry(0.5)
        claim = queue.claim(name)
    queue.hurry(math.inf)

    assert claim.is_valid()


class Mute(threading.Thread):
    """Lets PostgreSQL's clients in, and then says nothing: a pooler whose server hangs."""

    def __init__(self, greeting):
        super().__init__(daemon=True)
        self._greeting = greeting
        self._listener = socket.create_server(('127.0.0.1', 0))
        self.port = self._listener.getsockname()[1]
        self._accepted = []

    def run(self):
        while True:
            connection, _ = self._listener.accept()
            self._accepted.append(connection)
            if connection.recv(1000)[4:8] == bytes([4, 210, 22, 47]):
                # It would speak TLS.
                connection.sendall(b'N')
                connection.recv(1000)
            connection.sendall(self._greeting)


GREETINGS = {'nothing': b'', 'come in': b'R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I'}


@pytest.mark.parametrize('driver', ['psycopg', 'psycopg2'])
@pytest.mark.parametrize('greeting', GREETINGS.values(), ids=GREETINGS)
def test_who_says_nothing_from_the_beginning_keeps_nobody(make_queue, driver, greeting):
    mute = Mute(greeting)
    mute.start()
    queue = make_queue(f'postgresql+{driver}://shop@127.0.0.1:{mute.port}/shop')
    queue.hurry(2)

    with within(8), pytest.raises(DatabaseAway):
        queue.counts()


# --- all together -----------------------------------------------------------


def test_who_is_in_a_hurry_waits_for_nothing_longer_all_in_all(postgres_url, make_queue, envelope, caplog):
    queue = make_queue(postgres_url)
    claims = [queue.put_claimed(envelope) for _ in range(20)]

    with locked(postgres_url), within(8):
        queue.hurry(1)
        for claim in claims:
            claim.settle(Settlement(('ada@x.example',), due=LATER))

    assert [record.levelname for record in caplog.records if record.levelname == 'CRITICAL'] == []
    queue.hurry(math.inf)
    assert queue.counts()['in progress'] == 0


def test_what_is_under_way_hurries_too(postgres_url, make_queue):
    queue = make_queue(postgres_url)
    queue.counts()
    ended = []

    def count():
        with contextlib.suppress(DatabaseAway):
            queue.counts()
        ended.append(time.monotonic())

    with locked(postgres_url):
        thread = threading.Thread(target=count)
        thread.start()
        time.sleep(0.2)  # Until it waits.
        queue.hurry(0.1)
        thread.join(5)
        assert ended


def test_on_sqlite_too(make_database, make_queue, envelope):
    url = make_database('sqlite')
    create_queue_tables(url)
    queue = make_queue(url)
    engine = create_engine(url)
    with engine.connect() as connection:
        connection.exec_driver_sql('BEGIN IMMEDIATE')
        queue.hurry(0.5)
        with within(3), pytest.raises(DatabaseAway):
            queue.put(envelope)
        connection.exec_driver_sql('ROLLBACK')
    engine.dispose()
    queue.hurry(math.inf)

    assert queue.put(envelope)


def test_no_statement_of_the_application_has_a_deadline_of_ours(postgres_url, make_queue):
    queue = make_queue(postgres_url)

    with queue.database.connection() as connection:
        settings = [connection.execute(text(f'SHOW {it}')).scalar() for it in ('statement_timeout', 'lock_timeout')]

    assert settings == ['0', '0']


# --- the end of a process ---------------------------------------------------


@pytest.fixture
def smtp():
    with ScriptedSMTPServer() as server:
        yield server


@pytest.fixture
def start(tmp_path, smtp):
    processes = []

    def start(url, *command, **settings):
        ini = tmp_path / 'app.ini'
        own = ''.join(f'mailqueue.{name} = {value}\n' for name, value in settings.items())
        ini.write_text(
            f'[app:main]\nsqlalchemy.url = {url.replace("%", "%%")}\nmailqueue.queue = sql\n'
            f'mailqueue.smtp_hostname = {smtp.host}\nmailqueue.smtp_port = {smtp.port}\nmailqueue.plugins = none\n{own}'
        )
        arguments = [it if it != 'INI' else str(ini) for it in command]
        processes.append(
            subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def has_content(smtp):
    """Whether a message is with the server, which has not said yet what becomes of it."""
    return any('DATA' in session.commands for session in smtp.sessions)


WATCH = ('-m', 'pyramid_mailqueue.cli.run', 'INI', '--watch', '0.2')

SILENT = {
    'a lock': lambda server: locked(server.url('psycopg')),
    'no standby': lambda server: without_standby(server.url('psycopg')),
    'a stopped server': lambda server: server.silent(),
}


@pytest.mark.parametrize('silence', SILENT.values(), ids=SILENT)
def test_a_worker_ends_in_time_and_leaves_what_is_in_hand_to_the_lease(
    own_postgres, make_queue, smtp, start, envelope, until, make_event, silence
):
    url = own_postgres.url('psycopg')
    create_queue_tables(url)
    queue = make_queue(url)
    may_answer = make_event()
    smtp.script['.'] = [Wait(may_answer), None]
    queue.put(envelope)
    queue.put(envelope)
    worker = start(url, *WATCH)
    until(lambda: has_content(smtp))

    with silence(own_postgres), within(PROMISED + SLACK):
        worker.send_signal(signal.SIGTERM)
        may_answer.set()
        assert worker.wait(60) == 0

    assert 'Traceback' not in worker.stdout.read()


SCRIPT = """
import sys
from email.message import EmailMessage

import transaction
import zope.sqlalchemy
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from pyramid_mailqueue import mailer_from_settings

settings = dict(it.split('=', 1) for it in sys.argv[1:])
mailer = mailer_from_settings(settings)
session = Session(create_engine(settings['mailqueue.sql_url']))
zope.sqlalchemy.register(session)
message = EmailMessage()
message['To'], message['From'] = 'ada@x.example', 'shop@site.example'
with transaction.manager:
    for _ in range(5):
        mailer.send(message, session=session)
sys.stdin.read()
"""


def test_a_script_that_sends_in_the_background_ends_in_time(postgres_url, smtp, until, make_event):
    may_answer = make_event()
    smtp.script['.'] = [Wait(may_answer)]
    settings = {
        'mailqueue.queue': 'sql',
        'mailqueue.sql_url': postgres_url,
        'mailqueue.smtp_hostname': smtp.host,
        'mailqueue.smtp_port': smtp.port,
    }
    command = [sys.executable, '-c', SCRIPT, *(f'{name}={value}' for name, value in settings.items())]
    script = subprocess.Popen(command, stdin=subprocess.PIPE)
    until(lambda: has_content(smtp))

    with locked(postgres_url), within(PROMISED):
        script.stdin.close()
        assert script.wait(60) == 0
