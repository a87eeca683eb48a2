from __future__ import annotations

import subprocess
import sys

import pytest
import trustme

from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.queue_file import read_envelope
from tests.mta.servers import ADA, HOST, Exim, OpenSMTPD, Postfix, why_not

SERVERS = pytest.StashKey[list]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        for server in item.stash.get(SERVERS, ()):
            last = server.log().splitlines()[-100:]
            report.sections.append((f'The last that {server.name} has logged', '\n'.join(last)))
    return report


@pytest.fixture(scope='session')
def authority():
    return trustme.CA()


@pytest.fixture(scope='session')
def ca_file(authority, tmp_path_factory):
    path = tmp_path_factory.mktemp('authority') / 'ca.pem'
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture(scope='session')
def _start(authority):
    def _start(kind, **settings):
        if reason := why_not(kind.name):
            pytest.skip(reason)
        return kind(authority.issue_cert(HOST), **settings)

    return _start


@pytest.fixture(scope='session', params=[Postfix, Exim, OpenSMTPD], ids=lambda kind: kind.name)
def _server(request, _start):
    server = _start(request.param)
    yield server
    server.stop()


@pytest.fixture
def server(_server, request):
    """Each of the servers, without limits that we could hit; whatever was sent to it before is forgotten."""
    request.node.stash[SERVERS] = [_server]
    _server.take()
    return _server


@pytest.fixture
def start(_start, request):
    """Start a server with settings of its own: ``start(Exim, max_messages=20)``."""
    servers = request.node.stash[SERVERS] = []

    def start(kind, **settings):
        servers.append(_start(kind, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def content():
    """Make the content of a message: ``content(7)``."""

    def content(number, size=0):
        header = f'Message-ID: <{number}@site.example>\r\nDate: Tue, 24 Nov 2026 07:28:11 +0000\r\n'
        header += f'From: shop@site.example\r\nSubject: order {number}\r\n\r\n'
        return header.encode() + b'Thank you.\r\n' * (1 + size // 12)

    return content


@pytest.fixture
def put(queue_dir):
    """Put a message into the queue: ``put(content)``, ``put(content, NOBODY)``."""
    queue = MaildirQueue(queue_dir)

    def put(content, *recipients):
        queue.put(Envelope('shop@site.example', recipients or (ADA,), content))

    return put


@pytest.fixture
def mq_run(tmp_path, queue_dir):
    """Run ``mq-run``: ``mq_run(server, key=value)`` returns its exit status and what it has printed."""

    def mq_run(server, **own):
        path = tmp_path / 'shop.ini'
        settings = {'queue_dir': queue_dir, 'smtp_hostname': HOST, 'smtp_port': server.port, **own}
        keys = '\n'.join(f'mailqueue.{key} = {value}' for key, value in settings.items())
        path.write_text(f'[app:main]\nuse = egg:shop\n{keys}\n')
        command = [sys.executable, '-m', 'pyramid_mailqueue.cli.run', str(path)]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        return ended.returncode, ended.stdout

    return mq_run


@pytest.fixture
def left(queue_dir):
    """Who is still to get a message, or is given up, by the folder of the queue."""

    def left():
        found = {}
        for path in queue_dir.glob('*/*'):
            with path.open('rb') as file:
                _, envelope = read_envelope(file.read())
            found.setdefault(path.parent.name, []).extend(envelope.recipients)
        return found

    return left
