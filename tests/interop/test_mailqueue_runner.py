"""One queue directory, our ``mq-run`` and that of mailqueue-runner 1.0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from email.message import EmailMessage

import pytest

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.queue_file import read_header
from pyramid_mailqueue.testing import ScriptedSMTPServer
from pyramid_mailqueue.transports.smtp import SMTPTransport

OUR_NAME = 'ours.example'
SHOP = 'shop@site.example'
ADA, BOB = 'ada@x.example', 'bob@x.example'
LATER = '451 4.3.0 (greylisted) come back later'
# With what is easily lost on the way: dots, long lines, bytes that are not ASCII, and no line end at the end.
BODY = b'.\r\n..\r\n' + b'x' * 900 + b'\r\nGr\xc3\xbc\xc3\x9fe\r\nFrom here on\r\n'

ENQUEUE = """
import json, sys
from schwarz.mailqueue import enqueue_message
path, content, number = sys.argv[1], json.loads(sys.argv[2]).encode('latin-1'), int(sys.argv[3])
for n in range(number):
    msg = content.replace(b'NUMBER', str(n).encode())
    enqueue_message(msg, path, 'shop@site.example', ['ada@x.example', 'bob@x.example'])
"""

HOLD = """
import sys
from schwarz.mailqueue import enqueue_message
msg = enqueue_message(
    b'Subject: held\\r\\n\\r\\n', sys.argv[1], 'shop@site.example', ['ada@x.example'], in_progress=True, return_msg=True
)
print('held', flush=True)
sys.stdin.read()
"""


@pytest.fixture
def server():
    with ScriptedSMTPServer() as server:
        yield server


@pytest.fixture
def ini(tmp_path, server):
    """One configuration for both."""
    path = tmp_path / 'mqrunner.ini'
    path.write_text(f'[mqrunner]\nsmtp_hostname = 127.0.0.1\nsmtp_port = {server.port}\nplugins = none\n')
    return path


@pytest.fixture
def content():
    """Make the content of a message with a number in its Message-ID: ``content(7)``, or ``content('NUMBER')``."""

    def content(number):
        made = EmailMessage()
        made['From'] = SHOP
        made['Message-ID'] = f'<{number}@site.example>'
        made['Date'] = 'Tue, 24 Nov 2026 07:28:11 +0000'
        made['Subject'] = 'Grüße'
        return made.as_bytes().replace(b'\n', b'\r\n') + BODY

    return content


@pytest.fixture
def queue(queue_dir):
    return MaildirQueue(queue_dir)


@pytest.fixture
def ours(ini, queue_dir):
    """Start our ``mq-run``."""

    def ours():
        name = f'smtp_local_hostname={OUR_NAME}'
        command = [sys.executable, '-m', 'pyramid_mailqueue.cli.run', ini, queue_dir, '--set', name]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return ours


@pytest.fixture
def theirs(their_bin, ini, queue_dir):
    """Start their ``mq-run``."""

    def theirs():
        command = [their_bin / 'mq-run', f'--config={ini}', '--verbose', queue_dir]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return theirs


def finish(process):
    """Wait for a command that has to succeed; return what it has printed."""
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    return out


@pytest.fixture
def put_theirs(their_bin, queue_dir, content):
    """Put so many messages into the queue as mailqueue-runner does it."""

    def put_theirs(number):
        text = json.dumps(content('NUMBER').decode('latin-1'))
        subprocess.run([their_bin / 'python', '-c', ENQUEUE, queue_dir, text, str(number)], check=True, timeout=60)

    return put_theirs


@pytest.fixture
def put_ours(queue, content):
    def put_ours(number, first=0):
        for n in range(first, first + number):
            queue.put(Envelope(SHOP, (ADA, BOB), content(n)))

    return put_ours


@pytest.fixture
def headers(queue_dir):
    """What the queue knows of each waiting message."""

    def headers():
        found = []
        for path in (queue_dir / 'new').iterdir():
            with path.open('rb') as file:
                found.append(read_header(file))
        return found

    return headers


@pytest.fixture
def left(queue_dir):
    """How many files there are, by folder."""
    return lambda: dict(Counter(path.parent.name for path in queue_dir.glob('*/*')))


def expected(content, numbers):
    return sorted((SHOP, (ADA, BOB), content(number)) for number in numbers)


def received(server):
    return sorted((message.sender, message.recipients, message.content) for message in server.messages)


def make_due(queue_dir):
    for path in (queue_dir / 'new').iterdir():
        os.utime(path, (time.time() - 1, time.time() - 1))


# --- what one has written, the other one reads ------------------------------


def test_theirs_drains_what_we_have_queued(theirs, put_ours, content, server, left):
    put_ours(3)

    finish(theirs())

    assert received(server) == expected(content, range(3))
    assert left() == {}


def test_theirs_drains_what_we_have_deferred(theirs, queue, put_ours, content, server, headers, left):
    put_ours(1)
    server.script['RCPT'] = LATER
    (claim,) = queue.claim_due(time.time() + 1)
    handler = MessageHandler([SMTPTransport(hostname=server.host, port=server.port)])
    handler.deliver(claim)
    handler.close()
    (header,) = headers()
    assert (header.attempts, header.last_reply) == (1, '451 4.3.0 [greylisted] come back later')
    del server.script['RCPT']

    finish(theirs())

    assert received(server) == expected(content, [0])
    assert left() == {}


def test_what_we_have_deferred_they_may_defer_once_more(
    theirs, ours, queue, queue_dir, put_ours, content, server, headers
):
    put_ours(1)
    server.script['RCPT'] = LATER
    finish(ours())
    before = headers()

    finish(theirs())
    after = headers()
    make_due(queue_dir)
    del server.script['RCPT']
    finish(ours())

    assert [header.attempts for header in (*before, *after)] == [1, 2]
    assert after[0].queued_at == before[0].queued_at
    assert received(server) == expected(content, [0])


def test_ours_drains_what_they_have_queued(ours, put_theirs, content, server, left):
    put_theirs(3)

    assert finish(ours()) == 'mq-run: 3 sent; 0 waiting\n'
    assert received(server) == expected(content, range(3))
    assert left() == {}


def test_ours_drains_what_they_have_deferred(ours, theirs, put_theirs, content, server, headers, left):
    put_theirs(1)
    server.script['RCPT'] = LATER
    finish(theirs())
    (header,) = headers()
    assert header.attempts == 1
    del server.script['RCPT']

    assert finish(ours()) == 'mq-run: 1 sent; 0 waiting\n'
    assert received(server) == expected(content, [0])
    assert left() == {}


READ = """
import sys
from schwarz.mailqueue.message_utils import parse_message_envelope
with open(sys.argv[1], 'rb') as fp:
    info = parse_message_envelope(fp)
print(ascii((info.from_addr, info.to_addrs, info.retries)))
"""


@pytest.mark.parametrize(
    ('sender', 'recipients', 'retries'),
    [
        (SHOP, '=?utf-8?q?ada=40x=2Eexample?=', '1'),
        (SHOP, '=?utf-8?b?YWRhQHguZXhhbXBsZSxib2JAeC5leGFtcGxl?=', '1'),
        (SHOP, '=?iso-8859-1?q?j=F6rg=40?= =?utf-8?q?x.example?=', '1'),
        ('=?utf-8?q?j=C3=B6rg=40site=2Eexample?=', ADA, '0'),
        (SHOP, f'{ADA},{BOB}', '1234567890'),
    ],
)
def test_both_read_the_same_out_of_an_envelope(their_bin, tmp_path, sender, recipients, retries):
    path = tmp_path / 'message'
    path.write_text(
        f'Return-path: <{sender}>\nEnvelope-to: {recipients}\nX-Queue-Date: Tue, 24 Nov 2026 07:28:11 +0000\n'
        f'X-Retries: {retries}\nX-Queue-Meta-End: end\nSubject: x\n\n'
    )
    command = [their_bin / 'python', '-c', READ, path]
    theirs = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    with path.open('rb') as file:
        header = read_header(file)

    assert ascii((header.sender, header.recipients, header.attempts)) == theirs.strip()


# --- what one holds, the other one leaves alone -----------------------------


def test_theirs_leaves_alone_what_we_hold(theirs, queue, content, server, left):
    claim = queue.put_claimed(Envelope(SHOP, (ADA,), content(1)))
    # For longer than they believe that anybody is at it.
    os.utime(queue.place('cur', claim.id), (0, 0))

    finish(theirs())

    assert (server.messages, left()) == ([], {'cur': 1})
    claim.release()


def test_ours_leaves_alone_what_they_hold(ours, their_bin, queue_dir, server, left):
    command = [their_bin / 'python', '-c', HOLD, queue_dir]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == 'held\n'

        assert finish(ours()) == ''
        assert (server.messages, left()) == ([], {'cur': 1})
        holder.communicate(timeout=60)

    assert finish(ours()) == 'mq-run: 1 recovered, 1 sent; 0 waiting\n'


def test_both_at_once_lose_nothing_and_repeat_nothing(
    ours, theirs, put_ours, put_theirs, content, server, left, make_event
):
    put_theirs(40)
    put_ours(40, first=40)
    both_are_here, names = make_event(), set()

    def meet(command):
        names.add(command == f'EHLO {OUR_NAME}')
        if len(names) == 2:
            both_are_here.set()

    def wait_for_the_other(command):
        assert both_are_here.wait(30)

    server.script |= {'EHLO': meet, 'MAIL': wait_for_the_other}

    processes = [start() for start in (theirs, ours, theirs)]
    for process in processes:
        # Theirs ends with an error where a message is taken between its two looks at it; the next run goes on.
        process.communicate(timeout=60)
    finish(theirs())

    assert names == {True, False}
    assert received(server) == expected(content, range(80))
    assert left() == {}
