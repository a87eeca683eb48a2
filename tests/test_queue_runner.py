"""A queue directory, for programs that bring their own settings."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyramid_mailqueue.application import init_smtp_mailer
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.exceptions import ConfigurationError, MessageError, QueueError
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queue_runner import enqueue_message, one_shot_queue_run
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.queue_file import read_envelope
from pyramid_mailqueue.testing import ScriptedSMTPServer
from pyramid_mailqueue.transports.maildir import MaildirBackend

ADA, BOB = 'ada@x.example', 'bob@x.example'
SHOP = 'shop@site.example'
CONTENT = b'Subject: hello\r\nMessage-ID: <1@site.example>\r\nDate: Tue, 24 Nov 2026 07:28:11 +0000\r\n\r\nHello.\r\n'
ENVELOPE = Envelope(SHOP, (ADA,), CONTENT)


@pytest.fixture
def server():
    with ScriptedSMTPServer() as server:
        yield server


@pytest.fixture
def smtp(server):
    """Settings for the server, as a program brings them."""
    return {'smtp_hostname': server.host, 'smtp_port': server.port, 'plugins': 'none'}


@pytest.fixture
def state(queue_dir):
    """How many messages there are in each state that has any."""
    return lambda: {state: number for state, number in MaildirQueue(queue_dir).counts().items() if number}


# --- a message into the queue -----------------------------------------------


def test_a_message_waits_and_its_path_is_returned(queue_dir, state):
    path = enqueue_message(CONTENT, queue_dir, SHOP, [ADA, BOB])

    assert Path(path).parent == queue_dir / 'new'
    header, envelope = read_envelope(Path(path).read_bytes())
    assert (header.sender, header.recipients, envelope.content) == (SHOP, (ADA, BOB), CONTENT)
    assert state() == {'waiting': 1}


def test_a_message_can_be_held(queue_dir, state):
    held = enqueue_message(CONTENT, queue_dir, SHOP, [ADA], in_progress=True, return_msg=True)

    assert state() == {'in progress': 1}
    assert held.envelope == ENVELOPE
    assert (held.attempts, held.is_over) == (0, False)
    assert time.time() - held.queued_at < 60
    assert list(MaildirQueue(queue_dir).claim_due(time.time() + 1)) == []
    held.release()
    assert state() == {'waiting': 1}


def test_nobody_can_be_in_progress_whom_nobody_holds(queue_dir):
    with pytest.raises(ValueError, match='in_progress=True needs return_msg=True'):
        enqueue_message(CONTENT, queue_dir, SHOP, [ADA], in_progress=True)

    assert not queue_dir.exists()


def test_a_message_that_is_forgotten_is_taken_up_by_the_next_run(queue_dir, smtp, server, state):
    enqueue_message(CONTENT, queue_dir, SHOP, [ADA], in_progress=True, return_msg=True)

    report = one_shot_queue_run(queue_dir, settings={**smtp, 'basic_logging_configured': True})

    assert (len(report.recovery.orphans), report.sent) == (1, 1)
    assert [message.content for message in server.messages] == [CONTENT]
    assert state() == {}


def test_a_message_without_a_sender_is_refused_before_anything_is_written(queue_dir):
    with pytest.raises(MessageError, match='no sender'):
        enqueue_message(b'Subject: hello\r\n\r\n', queue_dir, recipients=[ADA])

    assert not queue_dir.exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'file').touch()

    with pytest.raises(QueueError, match='cannot be created or used'):
        enqueue_message(CONTENT, tmp_path / 'file' / 'queue', SHOP, [ADA])


DIES_IN_AN_ATTEMPT = """
import os, sys
from pyramid_mailqueue import MessageHandler, enqueue_message

class Server:
    def send(self, sender, recipients, content):
        os._exit(7)

hello = b'Subject: hello\\r\\n\\r\\n'
msg = enqueue_message(hello, sys.argv[1], 'shop@site.example', ['ada@x.example'], in_progress=True, return_msg=True)
MessageHandler([Server()]).send_message(msg)
"""


def test_a_message_outlives_the_process_that_dies_over_it(queue_dir, smtp, server, state):
    assert subprocess.run([sys.executable, '-c', DIES_IN_AN_ATTEMPT, queue_dir], check=False).returncode == 7
    assert state() == {'in progress': 1}

    report = one_shot_queue_run(queue_dir, settings={**smtp, 'basic_logging_configured': True})

    assert (report.sent, len(server.messages), state()) == (1, 1, {})


# --- one run ----------------------------------------------------------------


def test_a_run_delivers_what_is_due_and_says_so(queue_dir, smtp, server, state, capsys):
    for recipient in (ADA, BOB):
        enqueue_message(CONTENT, queue_dir, SHOP, [recipient])
    server.script[f'RCPT TO:<{BOB}>'] = '451 4.3.0 later'

    report = one_shot_queue_run(str(queue_dir), settings={**smtp, 'basic_logging_configured': True})

    assert (report.sent, report.deferred, report.trouble) == (1, 1, None)
    assert state() == {'waiting': 1}
    assert capsys.readouterr() == ('mq-run: 1 sent, 1 deferred; 1 waiting\n', '')


@pytest.mark.parametrize(
    ('options', 'out'),
    [(None, ''), ({'verbose': False}, ''), ({'verbose': True}, 'mq-run: nothing to do; 0 waiting\n')],
)
def test_a_run_without_mail_says_so_if_it_is_told_to(queue_dir, smtp, capsys, options, out):
    MaildirQueue(queue_dir)

    one_shot_queue_run(queue_dir, options=options, settings={**smtp, 'basic_logging_configured': True})

    assert capsys.readouterr() == (out, '')


def test_a_run_may_be_quiet(queue_dir, smtp, server, capsys):
    enqueue_message(CONTENT, queue_dir, SHOP, [ADA])
    server.script['connect'] = '554 no service'

    report = one_shot_queue_run(queue_dir, options={'quiet': True}, settings={**smtp, 'basic_logging_configured': True})

    assert '554 no service' in str(report.trouble)
    assert capsys.readouterr() == ('', '')


def test_a_servers_trouble_is_printed_logged_and_returned(queue_dir, smtp, server, state, capsys, caplog):
    enqueue_message(CONTENT, queue_dir, SHOP, [ADA])
    server.script['connect'] = '554 no service'

    report = one_shot_queue_run(queue_dir, settings={**smtp, 'basic_logging_configured': True})

    out, err = capsys.readouterr()
    assert (out, err) == ('mq-run: 0 sent; 1 waiting\n', f'mq-run: {report.trouble}\n')
    (record,) = [record for record in caplog.records if record.name == 'mailqueue.run']
    assert (record.levelname, record.getMessage()) == ('WARNING', f'{report.trouble} Mail waits in the queue.')
    assert state() == {'waiting': 1}


def test_the_keys_may_have_their_prefix(queue_dir, smtp, server):
    enqueue_message(CONTENT, queue_dir, SHOP, [ADA])
    settings = {f'mailqueue.{key}': value for key, value in smtp.items()}
    settings['mailqueue.queue_dir'] = '/nowhere'

    one_shot_queue_run(queue_dir, settings={**settings, 'basic_logging_configured': True, 'sqlalchemy.url': 'x'})

    assert len(server.messages) == 1


@pytest.mark.parametrize('prefix', ['', 'mailqueue.'])
def test_a_program_may_give_all_the_settings_of_its_app(queue_dir, smtp, server, prefix):
    enqueue_message(CONTENT, queue_dir, SHOP, [ADA])
    settings = {f'{prefix}{key}': value for key, value in smtp.items()}
    of_the_app = {'pyramid.reload_templates': True, 'sqlalchemy.url': 'sqlite://', 'debugtoolbar.hosts': ['x'], 'x': 1}

    report = one_shot_queue_run(queue_dir, settings=settings | of_the_app | {'basic_logging_configured': True})

    assert report.sent == len(server.messages) == 1
    with pytest.raises(ConfigurationError, match=f'^{prefix}smtp_prot = 25: there is no such key'):
        one_shot_queue_run(queue_dir, settings=settings | of_the_app | {f'{prefix}smtp_prot': 25})


def test_a_relative_path_means_where_the_program_is(queue_dir, smtp, server, monkeypatch):
    enqueue_message(CONTENT, queue_dir, SHOP, [ADA])
    monkeypatch.chdir(queue_dir.parent)

    one_shot_queue_run(queue_dir.name, settings={**smtp, 'basic_logging_configured': True})

    assert len(server.messages) == 1


def test_a_handler_of_ones_own_is_used_and_needs_no_server(queue_dir, state):
    enqueue_message(CONTENT, queue_dir, SHOP, [ADA])
    sent = []

    class Pigeons:
        def send(self, sender, recipients, content):
            sent.append((sender, recipients, content))
            return True

    settings = {'mh': MessageHandler([Pigeons()]), 'plugins': 'none', 'basic_logging_configured': True}
    report = one_shot_queue_run(queue_dir, settings=settings)

    assert sent == [(SHOP, (ADA,), CONTENT)]
    assert (report.sent, state()) == (1, {})


def test_the_handler_that_queues_what_it_cannot_send_leaves_it_where_it_is(queue_dir, smtp, server, state):
    server.script['RCPT'] = '451 4.3.0 later'
    name = Path(enqueue_message(CONTENT, queue_dir, SHOP, [ADA])).name
    handler = MessageHandler([init_smtp_mailer(smtp), MaildirBackend(queue_dir)])

    report = one_shot_queue_run(
        queue_dir, settings={'mh': handler, 'plugins': 'none', 'basic_logging_configured': True}
    )

    assert report.deferred == 1
    (path,) = (queue_dir / 'new').iterdir()
    header, _ = read_envelope(path.read_bytes())
    assert (path.name, header.attempts) == (name, 1)
    assert state() == {'waiting': 1}


def test_plugins_are_loaded_for_a_handler_of_ones_own_too(queue_dir, caplog):
    enqueue_message(CONTENT, queue_dir, SHOP, [ADA])

    settings = {'mh': MessageHandler([]), 'plugins': 'pigeons', 'basic_logging_configured': True}
    one_shot_queue_run(queue_dir, settings=settings)

    assert [record.getMessage() for record in caplog.records if record.name == 'mailqueue.plugins'] == [
        'The plugin pigeons is not installed: there is no such entry point in mailqueue.plugins'
    ]


def test_the_logs_of_the_settings_are_written(queue_dir, smtp, tmp_path):
    enqueue_message(CONTENT, queue_dir, SHOP, [ADA])

    one_shot_queue_run(queue_dir, settings={**smtp, 'delivery_log': str(tmp_path / 'delivery.log')})

    assert ' status=sent ' in (tmp_path / 'delivery.log').read_text()


def test_logging_that_is_configured_is_left_alone(queue_dir, smtp):
    MaildirQueue(queue_dir)
    before = list(logging.getLogger().handlers)

    one_shot_queue_run(queue_dir, settings={**smtp, 'basic_logging_configured': True})
    assert logging.getLogger().handlers == before
    one_shot_queue_run(queue_dir, settings=smtp)
    assert len(logging.getLogger().handlers) == len(before) + 1


def test_a_configuration_file_may_be_named_instead(queue_dir, server, tmp_path):
    enqueue_message(CONTENT, queue_dir, SHOP, [ADA])
    ini = tmp_path / 'mqrunner.ini'
    ini.write_text(f'[mqrunner]\nsmtp_hostname = 127.0.0.1\nsmtp_port = {server.port}\nplugins = none\n')

    assert one_shot_queue_run(queue_dir, ini).sent == 1


@pytest.mark.parametrize('both', [{}, {'config_path': 'x.ini', 'settings': {}}])
def test_settings_come_from_one_place(queue_dir, both):
    with pytest.raises(ConfigurationError, match='either config_path or settings'):
        one_shot_queue_run(queue_dir, **both)


def test_a_key_that_is_wrong_is_named(queue_dir, smtp):
    with pytest.raises(ConfigurationError, match=r'^smtp_prot = 25: there is no such key'):
        one_shot_queue_run(queue_dir, settings={**smtp, 'smtp_prot': 25})


def test_root_does_not_work_on_the_queue_of_somebody_else(queue_dir, smtp, monkeypatch):
    queue_dir.mkdir()
    monkeypatch.setattr(os, 'geteuid', lambda: 0)
    if queue_dir.stat().st_uid == 0:
        os.chown(queue_dir, 12345, -1)

    with pytest.raises(ConfigurationError, match='belongs to the user'):
        one_shot_queue_run(queue_dir, settings=smtp)
