"""Word for systemd, over a real socket; and log files that were moved away, as logrotate does it."""

from __future__ import annotations

import configparser
import io
import logging
import logging.handlers
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import docutils.core
import docutils.nodes
import pytest

from pyramid_mailqueue.cli import common
from pyramid_mailqueue.cli.service import notify_systemd, reopen_log_files
from pyramid_mailqueue.delivery.crew import ABORT_SECONDS
from pyramid_mailqueue.delivery.run import STOP_SECONDS
from pyramid_mailqueue.queues.maildir import MaildirQueue

DOCS = Path(__file__).parents[2] / 'docs'
EXAMPLES = sorted((DOCS / 'examples').iterdir())
UNITS = [path for path in EXAMPLES if path.suffix in ('.service', '.timer')]
SERVICES = [path for path in UNITS if path.suffix == '.service']

# Seconds; only a test that fails waits that long.
DEADLINE = 30

# --- systemd ----------------------------------------------------------------


@pytest.fixture(params=['path', 'abstract'])
def systemd(request, tmp_path):
    """Listen as systemd does; ``systemd.environ`` is what it gives to a service."""
    if request.param == 'path':
        address = name = str(tmp_path / 'notify')
    else:
        unique = f'mailqueue-test-{os.getpid()}-{time.monotonic_ns()}'
        address, name = f'\0{unique}', f'@{unique}'
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(0)
        yield Systemd(sock, {'NOTIFY_SOCKET': name})


class Systemd:
    def __init__(self, sock, environ):
        self.sock = sock
        self.environ = environ

    def heard(self):
        return self.sock.recv(4096).decode()

    def wait_for(self, state):
        while state not in self.heard().splitlines():
            pass


@pytest.mark.parametrize('state', ['READY=1', 'STOPPING=1', 'STATUS=3 messages wait; the server is away (421 später)'])
def test_systemd_is_told_the_state(systemd, state):
    assert notify_systemd(state, environ=systemd.environ)
    assert systemd.heard() == state


def test_several_assignments_are_one_word(systemd):
    assert notify_systemd('READY=1', 'STATUS=nothing to do', environ=systemd.environ)
    assert systemd.heard() == 'READY=1\nSTATUS=nothing to do'


def test_what_a_server_said_is_no_assignment_of_its_own(systemd):
    assert notify_systemd('STATUS=421 no\r\nMAINPID=1\nSTOPPING=1', environ=systemd.environ)
    assert systemd.heard() == 'STATUS=421 no MAINPID=1 STOPPING=1'


def test_what_is_no_unicode_is_told_all_the_same(systemd):
    assert notify_systemd('STATUS=cannot read \udcff', environ=systemd.environ)
    assert systemd.heard() == 'STATUS=cannot read ?'


def test_a_reload_tells_the_time_that_systemd_asks_for(systemd):
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000

    assert notify_systemd('RELOADING=1', environ=systemd.environ)

    state, _, usec = systemd.heard().partition('\nMONOTONIC_USEC=')
    assert state == 'RELOADING=1'
    assert before <= int(usec) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_the_environment_of_the_process_is_asked(systemd, monkeypatch):
    monkeypatch.delenv('NOTIFY_SOCKET', raising=False)
    code = 'from pyramid_mailqueue.cli.service import notify_systemd; print(notify_systemd("READY=1"))'

    def told():
        return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()

    assert told() == 'False'
    monkeypatch.setenv('NOTIFY_SOCKET', systemd.environ['NOTIFY_SOCKET'])
    assert told() == 'True'
    assert systemd.heard() == 'READY=1'


@pytest.mark.parametrize(
    'address',
    [
        pytest.param(None, id='not set'),
        '',
        '/nowhere/notify',
        '@nobody-listens-here',
        'vsock:2:1234',
        pytest.param(f'/{"x" * 200}', id='too long'),
        pytest.param('/not\0possible', id='NUL'),
        pytest.param('/not\ud800possible', id='no Unicode'),
    ],
)
def test_without_a_socket_to_reach_nothing_happens(address):
    assert not notify_systemd('READY=1', environ={} if address is None else {'NOTIFY_SOCKET': address})


def test_nobody_waits_for_a_systemd_that_does_not_listen(systemd):
    # The kernel keeps a number of datagrams for the receiver, and then makes the sender wait.
    for _ in range(100_000):
        if not notify_systemd('STATUS=busy', environ=systemd.environ):
            break
    else:
        pytest.fail('the socket of the test takes everything')

    assert systemd.heard() == 'STATUS=busy'


# --- log files --------------------------------------------------------------


@pytest.fixture
def attach():
    """Add a handler to the logger of that name, for the time of the test: ``attach('name', handler)``."""
    attached = []

    def attach(name, handler):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        attached.append((logger, handler))
        return logger

    yield attach
    for logger, handler in attached:
        logger.removeHandler(handler)
        handler.close()


FILE_HANDLERS = [
    logging.FileHandler,
    logging.handlers.WatchedFileHandler,
    logging.handlers.RotatingFileHandler,
    logging.handlers.TimedRotatingFileHandler,
]


@pytest.mark.parametrize('name', [None, 'mailqueue.test.reopen'])
@pytest.mark.parametrize('kind', FILE_HANDLERS)
def test_a_log_goes_on_in_a_new_file_once_the_former_was_moved_away(tmp_path, attach, kind, name):
    path = tmp_path / 'mail.log'
    logger = attach(name, kind(path, encoding='utf-8'))
    logger.error('one')
    path.rename(tmp_path / 'mail.log.1')

    reopen_log_files()

    assert path.read_text() == ''
    logger.error('zwei: ä')
    logger.error('three')
    assert (tmp_path / 'mail.log.1').read_text() == 'one\n'
    assert path.read_text('utf-8') == 'zwei: ä\nthree\n'


def test_the_former_file_is_closed(tmp_path, attach):
    handler = logging.FileHandler(tmp_path / 'mail.log')
    attach('mailqueue.test', handler)
    former = handler.stream

    reopen_log_files()

    assert former.closed
    assert not handler.stream.closed


def test_a_file_that_is_not_opened_yet_is_left_to_its_first_record(tmp_path, attach):
    path = tmp_path / 'mail.log'
    logger = attach('mailqueue.test', logging.FileHandler(path, delay=True))

    reopen_log_files()

    assert not path.exists()
    logger.error('one')
    assert path.read_text() == 'one\n'


@pytest.mark.parametrize('mode', ['w', 'x', 'a'])
def test_a_file_that_was_not_moved_keeps_what_is_in_it(tmp_path, attach, mode):
    path = tmp_path / 'mail.log'
    logger = attach('mailqueue.test', logging.FileHandler(path, mode))
    logger.error('one')

    reopen_log_files()

    logger.error('two')
    assert path.read_text() == 'one\ntwo\n'


def test_a_file_behind_a_buffer_is_opened_anew_too(tmp_path, attach):
    path = tmp_path / 'mail.log'
    target = logging.FileHandler(path)
    logger = attach('mailqueue.test', logging.handlers.MemoryHandler(1, target=target))
    logger.error('one')
    path.rename(tmp_path / 'mail.log.1')

    reopen_log_files()

    logger.error('two')
    assert path.read_text() == 'two\n'
    target.close()


def test_a_stream_that_is_no_file_stays_as_it_is(attach):
    stream = io.StringIO()
    logger = attach('mailqueue.test', logging.StreamHandler(stream))

    reopen_log_files()

    logger.error('one')
    assert stream.getvalue() == 'one\n'


def test_a_file_that_cannot_be_opened_is_told_of_and_stops_nothing(tmp_path, attach, capsys):
    lost, kept = tmp_path / 'lost' / 'mail.log', tmp_path / 'mail.log'
    lost.parent.mkdir()
    logger = attach('mailqueue.test.lost', logging.FileHandler(lost))
    attach('mailqueue.test.kept', logging.FileHandler(kept))
    lost.parent.rename(tmp_path / 'moved')
    kept.rename(tmp_path / 'mail.log.1')

    reopen_log_files()

    assert capsys.readouterr().err == (
        f'mq-run: {lost} cannot be reopened (No such file or directory); logging continues in the old file\n'
    )
    assert kept.read_text() == ''
    logger.error('one')
    assert (tmp_path / 'moved' / 'mail.log').read_text() == 'one\n'


def test_a_defect_in_a_handler_of_others_stops_nothing(tmp_path, attach, capsys):
    class Broken(logging.FileHandler):
        def _open(self):
            if self.stream:
                raise LookupError('unknown encoding: klingon')
            return super()._open()

    broken = Broken(tmp_path / 'broken.log', delay=True)
    attach('mailqueue.test.a', broken).error('one')
    path = tmp_path / 'mail.log'
    attach('mailqueue.test.b', logging.FileHandler(path))
    path.unlink()

    reopen_log_files()

    assert 'broken.log cannot be reopened (unknown encoding: klingon)' in capsys.readouterr().err
    assert path.exists()


def test_a_complaint_that_nobody_hears_stops_nothing(tmp_path, attach, monkeypatch):
    stderr = io.StringIO()
    stderr.close()
    monkeypatch.setattr(sys, 'stderr', stderr)
    for name in 'ab':
        (tmp_path / name).mkdir()
        attach(f'mailqueue.test.{name}', logging.FileHandler(tmp_path / name / 'mail.log'))
        (tmp_path / name).rename(tmp_path / f'{name}.moved')

    reopen_log_files()


def test_no_record_of_another_thread_is_lost(tmp_path, attach):
    logger = attach('mailqueue.test', logging.FileHandler(tmp_path / 'mail.log'))
    enough = threading.Event()
    logged = []

    def log():
        while not enough.is_set():
            logger.error('record %d', len(logged))
            logged.append(f'record {len(logged)}')

    thread = threading.Thread(target=log)
    thread.start()
    try:
        for number in range(100):
            (tmp_path / 'mail.log').rename(tmp_path / f'mail.log.{number}')
            reopen_log_files()
    finally:
        enough.set()
        thread.join()

    names = [*(f'mail.log.{number}' for number in range(100)), 'mail.log']
    assert ''.join((tmp_path / name).read_text() for name in names).splitlines() == logged


# --- the sample files -------------------------------------------------------


def section(path, name):
    """A section of a unit, as a dict."""
    unit = configparser.ConfigParser(delimiters='=', comment_prefixes='#', interpolation=None)
    unit.optionxform = str
    unit.read_string(path.read_text())
    return dict(unit[name])


def names(paths):
    return [path.name for path in paths]


@pytest.fixture(scope='module')
def page():
    return docutils.core.publish_doctree((DOCS / 'deployment.rst').read_text('utf-8'))


@pytest.mark.parametrize('path', EXAMPLES, ids=names(EXAMPLES))
def test_the_docs_show_each_sample_file_word_for_word(page, path):
    shown = [block.astext() for block in page.findall(docutils.nodes.literal_block)]
    linked = [node['refuri'] for node in page.findall(docutils.nodes.reference) if 'refuri' in node]

    assert path.read_text().rstrip() in shown
    assert f'examples/{path.name}' in linked


@pytest.mark.parametrize('path', UNITS, ids=names(UNITS))
def test_the_units_are_in_order(path, tmp_path):
    assert section(path, 'Unit')['Description']
    analyze = shutil.which('systemd-analyze')
    if analyze:
        # Where there is systemd it can tell more.  It looks for the programs, and for the service of a timer.
        for unit in UNITS:
            text = unit.read_text().replace('/srv/shop/venv/bin/mq-run', '/bin/true')
            (tmp_path / unit.name).write_text(text)
        command = [analyze, 'verify', '--man=no', tmp_path / path.name]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (told.returncode, told.stdout, told.stderr) == (0, '', '')


def test_the_timer_starts_a_unit_that_is_there():
    timers = {path.stem for path in UNITS if path.suffix == '.timer'}

    assert timers
    assert timers <= {path.stem for path in SERVICES}


def command_lines():
    for path in EXAMPLES:
        for line in path.read_text().splitlines():
            _, found, arguments = line.partition('/srv/shop/venv/bin/mq-run ')
            if found:
                yield pytest.param(shlex.split(arguments), id=path.name)


@pytest.mark.parametrize('arguments', list(command_lines()))
def test_the_commands_are_understood(arguments):
    command = [sys.executable, '-m', 'pyramid_mailqueue.cli.run', *arguments]

    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE)

    # Which is all that is wrong with them here.
    assert ended.stderr == 'mq-run: /srv/shop/production.ini: cannot be read (No such file or directory).\n'
    assert ended.returncode == common.EX_CONFIG


@pytest.mark.parametrize('path', SERVICES, ids=names(SERVICES))
def test_systemd_waits_until_mq_run_has_ended_by_itself(path):
    assert int(section(path, 'Service')['TimeoutStopSec']) > STOP_SECONDS + ABORT_SECONDS


def test_the_units_know_the_exit_statuses():
    assert section(DOCS / 'examples/shop-mail.service', 'Service')['RestartPreventExitStatus'] == str(common.EX_CONFIG)
    assert section(DOCS / 'examples/shop-mail-run.service', 'Service')['SuccessExitStatus'] == str(common.EX_TEMPFAIL)


@pytest.mark.parametrize('systemd', ['path'], indirect=True)
def test_the_service_does_what_its_unit_says(systemd, tmp_path, queue_dir):
    MaildirQueue(queue_dir)
    unit = section(DOCS / 'examples/shop-mail.service', 'Service')
    log = tmp_path / 'queue.log'
    ini = tmp_path / 'production.ini'
    ini.write_text(
        '[app:main]\nmailqueue.queue_dir = %(here)s/queue\nmailqueue.smtp_hostname = localhost\n'
        '[loggers]\nkeys = root\n[handlers]\nkeys = file\n[formatters]\nkeys =\n'
        '[logger_root]\nhandlers = file\n[handler_file]\nclass = FileHandler\nargs = ("%(here)s/queue.log",)\n'
    )
    _, *arguments = shlex.split(unit['ExecStart'].replace('/srv/shop/production.ini', str(ini)))
    systemd.sock.settimeout(DEADLINE)
    command = [sys.executable, '-m', 'pyramid_mailqueue.cli.run', *arguments]
    with subprocess.Popen(command, env={**os.environ, **systemd.environ}) as process:
        try:
            assert unit['Type'] == 'notify'
            systemd.wait_for('READY=1')
            log.rename(tmp_path / 'queue.log.1')
            assert unit['ExecReload'] == '/bin/kill -HUP $MAINPID'
            process.send_signal(signal.SIGHUP)
            systemd.wait_for('RELOADING=1')
            systemd.wait_for('READY=1')
            assert log.exists()
            process.send_signal(signal.Signals[unit['KillSignal']])
            systemd.wait_for('STOPPING=1')
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()
