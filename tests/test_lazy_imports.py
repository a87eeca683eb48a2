"""Nothing is imported by a thread of the package: a process that forks meanwhile has a child with half a module."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.testing import ScriptedSMTPServer

# A message that is sent, one that is deferred, one that is buried, and one at which the server hangs up.
SENDS = """
import sys, time, transaction
from pyramid_mailqueue import mailer_from_settings

host, port, tls, path, queue = sys.argv[1:]
settings = {
    'mailqueue.smtp_hostname': host, 'mailqueue.smtp_port': port, 'mailqueue.smtp_tls': tls, 'mailqueue.plugins': '*',
    'mailqueue.smtp_connect_timeout': 5, 'mailqueue.queue': queue,
}
session = None
if queue == 'sql':
    import sqlalchemy, sqlalchemy.orm, zope.sqlalchemy
    from pyramid_mailqueue.queues.sql import SQLQueue

    url = settings['sqlalchemy.url'] = f'sqlite:///{path}/queue.sqlite'
    SQLQueue(url).create_tables()
    factory = sqlalchemy.orm.sessionmaker(sqlalchemy.create_engine(url))
    zope.sqlalchemy.register(factory)
    session = factory()
else:
    settings['mailqueue.queue_dir'] = f'{path}/queue'
mailer = mailer_from_settings(settings)
before = set(sys.modules)
for name in ('sent', 'deferred', 'buried', 'broken', 'sent'):
    with transaction.manager:
        mailer.send(b'Subject: hello\\r\\n\\r\\nHello', 'shop@site.example', [f'{name}@x.example'], session=session)
    dispatcher = mailer._dispatchers['background']
    until = time.monotonic() + 20
    while time.monotonic() < until and (dispatcher._delivery is not None or not dispatcher._claims.empty()):
        # The thread has not said that it is done with this one.
        time.sleep(0.01)
time.sleep(0.2)
print(*sorted(set(sys.modules) - before))
mailer.close()
"""


def answer(command):
    if 'deferred' in command:
        return '451 4.3.0 later'
    if 'buried' in command:
        return '550 5.1.1 no'
    return None


def imported_late(host, port, tls, path, queue):
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', SENDS, host, str(port), tls, path, queue],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.parametrize('queue', ['maildir', 'sql'])
@pytest.mark.parametrize('host', ['127.0.0.1', 'localhost', 'nowhere.invalid'])
def test_everything_is_there_before_the_first_mail(tmp_path, host, queue):
    with ScriptedSMTPServer({'RCPT': answer}) as server:
        assert imported_late(host, server.port, 'opportunistic', str(tmp_path), queue) == []
        assert bool(server.sessions) == (host != 'nowhere.invalid')


# --- what a run of cron needs -------------------------------------------------

RUNS = """
import sys
from pyramid_mailqueue.cli import run

try:
    run.main([sys.argv[1]])
except SystemExit as end:
    print(end.code, *sorted(name for name in sys.modules if name.startswith('pyramid_mailqueue')))
"""


@pytest.mark.parametrize('is_idle', [True, False])
def test_what_delivers_is_imported_by_a_run_that_finds_something(tmp_path, is_idle):
    queue = MaildirQueue(tmp_path / 'queue')
    ini = tmp_path / 'app.ini'
    with ScriptedSMTPServer() as server:
        ini.write_text(
            f'[app:main]\nuse = egg:none\nmailqueue.queue_dir = {queue.path}\nmailqueue.smtp_hostname = {server.host}\n'
            f'mailqueue.smtp_port = {server.port}\nmailqueue.smtp_tls = off\n'
        )
        if not is_idle:
            queue.put(Envelope('shop@site.example', ('ada@x.example',), b'Subject: hello\r\n\r\nHello\r\n'))
        done = subprocess.run([sys.executable, '-c', RUNS, str(ini)], capture_output=True, text=True, check=True)

    status, *imported = done.stdout.splitlines()[-1].split()
    assert status == '0'
    delivers = [f'pyramid_mailqueue.delivery.{name}' for name in ('crew', 'dispatch', 'engine', 'handler', 'plugins')]
    assert set(delivers) & set(imported) == (set() if is_idle else {*delivers} - {delivers[1]})
