"""Messages that are too large for the memory: they are given up, and keep no other message from being delivered."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from tests.parts.little_memory import run_with_memory

HEADER = (
    b'Return-path: <poison@x.example>\r\nEnvelope-to: a@y.example\r\n'
    b'X-Queue-Date: Tue, 24 Nov 2026 07:28:11 +0000\r\nX-Queue-Meta-End: end\r\n'
)
CONTENT = b'Subject: poison\r\nMessage-ID: <poison@x.example>\r\n\r\n'

#: What a process may have of memory, in octets, that is to need little of it.
ROOM = 256 * 1024 * 1024

#: More than that, and more than one call of the system reads.
TOO_LARGE = 3 * 1024 * 1024 * 1024
TERABYTE = 1 << 40


def put_poison(queue, folder='new', name='1700000000.M1P1Q1R1.host', size=TERABYTE):
    """A file that claims to have *size* octets, of which the disk has a few."""
    with Path(queue.place(folder, name)).open('wb') as file:
        file.write(HEADER + CONTENT)
        file.truncate(size)
    os.utime(queue.place(folder, name), (1, 1))
    return name


def run(code, *arguments):
    """Run a program that has little memory; return what it prints."""
    return run_with_memory(ROOM, code, *arguments)


@pytest.fixture
def queue(tmp_path):
    return MaildirQueue(tmp_path / 'queue')


RUNS = """
import sys, time
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.queues.maildir import MaildirQueue

class Transport:
    def send(self, sender, recipients, content):
        print(sender)
        return True

days = 0
for _ in range(int(sys.argv[2])):
    queue = MaildirQueue(sys.argv[1], clock=lambda: time.time() + days * 86400)
    Runner(queue, MessageHandler([Transport()]), clock=queue.clock).run()
    days += 1
"""


@pytest.mark.parametrize('size', [TOO_LARGE, TERABYTE])
def test_a_run_sends_the_others_and_gives_the_poison_up_after_five_runs(queue, size):
    put_poison(queue, size=size)
    for _ in range(3):
        queue.put(Envelope('good@x.example', ('a@y.example',), b'Hello\r\n'))

    assert run(RUNS, queue.path, 6).split() == ['good@x.example'] * 3

    (dead,) = queue.admin.entries(['dead'])
    assert (dead.sender, dead.subject) == ('poison@x.example', 'poison')
    assert dead.size == size - len(HEADER)
    assert dead.last_reply == 'given up: the process that delivered it died, 5 times'
    assert queue.counts()['waiting'] == queue.counts()['in progress'] == 0
    assert Path(queue.place('dead', dead.id)).stat().st_blocks < 1000, 'what is not there takes no room'


LOOKS = """
import sys
from pyramid_mailqueue.queues.maildir import MaildirQueue
queue = MaildirQueue(sys.argv[1])
admin = queue.admin
name = admin.oldest(['waiting']).id
print([entry.id for entry in admin.entries(['waiting'])], admin.find(name).size, admin.stats(['waiting']).by_domain)
admin.hold(name); admin.unhold(name)
print(queue.counts()['waiting'], admin.content(name, most=20))
admin.delete(name)
"""


def test_looking_at_it_and_changing_it_takes_no_memory(queue):
    name = put_poison(queue)

    first, second = run(LOOKS, queue.path).splitlines()

    assert name in first
    assert str(TERABYTE - len(HEADER)) in first
    assert second == "1 b'Subject: poison\\r\\nMes'"
    assert queue.counts()['waiting'] == 0


def test_a_dead_letter_of_any_size_is_retried_without_being_read(queue):
    name = put_poison(queue, 'dead')

    run('import sys; from pyramid_mailqueue.queues.maildir import MaildirQueue as Q; Q(sys.argv[1]).admin.retry("17")',
        queue.path)  # fmt: skip

    assert queue.admin.find(name).state == 'waiting'
    with Path(queue.place('new', name)).open('rb') as file:
        assert file.read(5000).partition(b'end\r\n')[2].startswith(CONTENT + bytes(100))
