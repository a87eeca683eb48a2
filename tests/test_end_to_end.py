"""The way of a message from a view to the server, through everything that happens on it: an app, a relay, mq-run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from email import message_from_bytes

import pytest
from aiosmtpd.controller import Controller

from pyramid_mailqueue import NoActiveTransaction
from pyramid_mailqueue.queues.maildir.queue_file import read_envelope
from pyramid_mailqueue.testing import ScriptedSMTPServer, Wait


@pytest.fixture
def server():
    with ScriptedSMTPServer() as server:
        yield server


@pytest.fixture
def shop(make_app, make_settings, message):
    """An app of one view that sends a mail and returns its Message-ID: ``shop(server, recipients=..., key=...)``."""

    def shop(server, recipients=None, **own):
        def view(request):
            return request.mailer.send(message('Your order'), recipients=recipients)

        return make_app(view, make_settings(server, **own))

    return shop


@pytest.fixture
def mq_run(tmp_path, queue_dir):
    """Run ``mq-run`` with the settings of the app: ``mq_run(server)`` returns what was printed and the exit status."""

    def mq_run(server, **own):
        path = tmp_path / 'shop.ini'
        keys = '\n'.join(f'mailqueue.{key} = {value}' for key, value in own.items())
        path.write_text(
            textwrap.dedent(f"""
                [app:main]
                use = egg:shop
                mailqueue.queue_dir = {queue_dir}
                mailqueue.smtp_hostname = 127.0.0.1
                mailqueue.smtp_port = {server.port}
                """)
            + keys
        )
        command = [sys.executable, '-m', 'pyramid_mailqueue.cli.run', str(path)]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        return ended.stdout + ended.stderr, ended.returncode

    return mq_run


@pytest.fixture
def folders(queue_dir):
    """The messages of the queue by their folder: pairs of what the queue knows of each, and its envelope."""

    def folders():
        found = {}
        for folder in queue_dir.iterdir():
            for path in folder.iterdir():
                with path.open('rb') as file:
                    found.setdefault(folder.name, []).append(read_envelope(file.read()))
        return found

    return folders


@pytest.fixture
def state(queue_dir):
    """How many messages there are in each folder that has any; for a queue at which others are at work."""

    def state():
        return {folder.name: count for folder in queue_dir.iterdir() if (count := len(list(folder.iterdir())))}

    return state


@pytest.fixture
def make_due(queue_dir):
    """Let the time pass until everything that waits is due."""

    def make_due():
        for path in (queue_dir / 'new').iterdir():
            os.utime(path, (1, 1))

    return make_due


def message_ids(server):
    return [message_from_bytes(message.content)['Message-ID'] for message in server.messages]


# --- in good weather --------------------------------------------------------


def test_a_mail_is_sent_when_its_request_is_over(shop, server, state, until):
    message_id = shop(server).get('/').text
    until(lambda: not state())

    assert message_ids(server) == [message_id]


def test_the_request_does_not_wait_for_the_server(shop, server, state, make_event, until):
    taken = make_event()
    server.script['.'] = Wait(taken)

    shop(server).get('/')
    # The thread has it in hand, and waits for the server.
    until(lambda: state() == {'cur': 1})
    taken.set()
    until(lambda: not state())

    assert len(server.messages) == 1


def test_no_message_is_begun_while_the_server_has_not_greeted(shop, server, state, make_event, until):
    greets = make_event()
    server.script['connect'] = Wait(greets)

    shop(server).get('/')
    until(lambda: server.sessions)

    # If the process dies now, that is not counted.
    assert state() == {'new': 1}
    greets.set()
    until(lambda: not state())
    assert len(server.messages) == 1


def test_the_mail_of_a_request_that_fails_never_leaves(make_app, make_settings, message, server, folders):
    def view(request):
        request.mailer.send(message('Your order'))
        raise ZeroDivisionError

    app = make_app(view, make_settings(server, delivery='inline'))
    with pytest.raises(ZeroDivisionError):
        app.get('/')

    assert folders() == {}
    assert server.sessions == []


def test_without_a_transaction_a_view_is_told_what_to_do(make_app, make_settings, message, server):
    def view(request):
        with pytest.raises(NoActiveTransaction, match='send_immediately'):
            request.mailer.send(message('Your order'))
        return str(bool(request.mailer.send_immediately(message('Your order'))))

    app = make_app(view, make_settings(server), include=())

    assert app.get('/').text == 'True'
    assert len(server.messages) == 1


# --- in bad weather ---------------------------------------------------------


class Sink:
    """What a server does that takes everything."""

    def __init__(self):
        self.contents = []

    async def handle_DATA(self, server, session, envelope):
        self.contents.append(envelope.content)
        return '250 2.0.0 taken'


@pytest.mark.parametrize('delivery', ['background', 'inline', 'queue'])
def test_while_the_relay_is_stopped_requests_succeed_and_afterwards_each_mail_arrives_once(
    shop, smtp_server, mq_run, folders, state, until, delivery
):
    app = shop(smtp_server, delivery=delivery)
    smtp_server.stop()
    sent = [app.get('/', status=200).text for _ in range(3)]
    until(lambda: state() == {'new': 3})
    in_vain = mq_run(smtp_server)
    waiting = folders()['new']

    started_again = Controller(Sink(), smtp_server.hostname, smtp_server.port)
    started_again.start()
    try:
        statuses = [mq_run(smtp_server)[1] for _ in range(2)]
        until(lambda: not state())
    finally:
        started_again.stop()

    assert in_vain[1] == 75
    assert [(header.attempts, header.last_attempt) for header, _ in waiting] == [(0, None)] * 3
    assert statuses == [0, 0]
    arrived = [message_from_bytes(content)['Message-ID'] for content in started_again.handler.contents]
    assert sorted(arrived) == sorted(sent)


def test_a_mail_that_is_deferred_is_delivered_by_a_later_run(shop, server, mq_run, folders, make_due):
    server.script['RCPT'] = ['451 4.3.0 come back later']
    app = shop(server, delivery='inline')

    message_id = app.get('/').text
    ((waiting, _),) = folders()['new']
    too_early = mq_run(server)
    make_due()
    in_time = mq_run(server)

    assert (waiting.attempts, waiting.last_reply) == (1, '451 4.3.0 come back later')
    assert too_early == ('', 0)
    assert in_time == ('mq-run: 1 sent; 0 waiting\n', 0)
    assert message_ids(server) == [message_id]
    assert folders() == {}


def test_a_mail_that_is_refused_is_kept_with_the_words_of_the_server(shop, server, mq_run, folders, queue_dir):
    server.script['RCPT'] = '550 5.1.1 no such user here'

    message_id = shop(server, delivery='inline').get('/').text

    ((dead, envelope),) = folders()['dead']
    (path,) = (queue_dir / 'dead').iterdir()
    assert (dead.recipients, dead.attempts) == (('ada@elsewhere.example',), 1)
    assert envelope.message_id == message_id
    # For a person, with any pager.
    assert ' (550 5.1.1 no such user here)\r\n' in path.read_bytes().decode()
    assert mq_run(server) == ('', 0)


def test_each_recipient_of_a_mail_goes_their_own_way(shop, server, mq_run, folders, make_due):
    names = ('ada', 'bob', 'eve')
    server.script |= {
        'RCPT TO:<bob@x.example>': ['451 4.3.0 come back later'],
        'RCPT TO:<eve@x.example>': '550 5.1.1 no such user here',
    }

    shop(server, recipients=[f'{name}@x.example' for name in names], delivery='inline').get('/')
    before = {folder: [header.recipients for header, _ in found] for folder, found in folders().items()}
    make_due()
    mq_run(server)

    assert before == {'new': [('bob@x.example',)], 'dead': [('eve@x.example',)]}
    assert [message.recipients for message in server.messages] == [('ada@x.example',), ('bob@x.example',)]
    assert len(set(message_ids(server))) == 1
    assert folders().keys() == {'dead'}


def test_a_mail_for_many_goes_in_as_many_transactions_as_it_takes(shop, server, folders):
    recipients = [f'{number}@x.example' for number in range(5)]

    shop(server, recipients=recipients, max_recipients=2, delivery='inline').get('/')

    assert [len(message.recipients) for message in server.messages] == [2, 2, 1]
    assert [recipient for message in server.messages for recipient in message.recipients] == recipients
    assert folders() == {}


def test_many_requests_at_once_send_each_mail_once(shop, server, state, until):
    app = shop(server)
    sent = []

    def request_often():
        sent.extend(app.get('/').text for _ in range(10))

    threads = [threading.Thread(target=request_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: not state())

    assert len(sent) == 40
    assert sorted(message_ids(server)) == sorted(sent)


def test_an_app_and_mq_run_at_once_send_each_mail_once(shop, server, mq_run, state, until):
    app = shop(server)
    sent = []
    runs = []
    running = threading.Thread(target=lambda: runs.extend(mq_run(server) for _ in range(4)))
    running.start()
    while running.is_alive():
        sent += [app.get('/').text for _ in range(10)]
    until(lambda: not state())

    assert [status for _, status in runs] == [0] * 4
    assert sorted(message_ids(server)) == sorted(sent)
