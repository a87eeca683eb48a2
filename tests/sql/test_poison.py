"""Messages that are too large for the memory of a process, in a database: given up, and in nobody's way."""

from __future__ import annotations

import pytest

from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.sql.tables import INLINE
from pyramid_mailqueue.results import Burial, Settlement
from tests.parts.little_memory import run_with_memory

ADA, BOB = 'ada@x.example', 'bob@x.example'
MIB = 1024 * 1024

#: A content, and what a process may have of memory beside it: too little for it, and enough for all else.
SIZE = 100 * MIB
ROOM = 260 * MIB

RUNS = """
import sys
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.queues.sql import SQLQueue

class Transport:
    def send(self, sender, recipients, content):
        print(sender)
        return True

queue = SQLQueue(sys.argv[1])
Runner(queue, MessageHandler([Transport()])).run()
"""


def run(url):
    """Make a run in a process that has little memory; return who the senders were of what it has sent."""
    return run_with_memory(ROOM, RUNS, url).split()


def test_a_run_sends_the_others_and_gives_the_poison_up_in_the_end(url, make_queue, envelope, sql):
    queue = make_queue(url)
    poison = queue.put(Envelope('poison@x.example', (ADA,), b'Subject: poison\r\n\r\n' + bytes(SIZE)))
    # As if it had ended four processes already; and as if its lease were over by now.
    sql(url, 'UPDATE mailqueue_message SET deaths = 4')
    queue.put(envelope)

    sent = run(url)
    assert queue.counts()['in progress'] == 1
    sql(url, "UPDATE mailqueue_message SET lease = 0 WHERE state = 'in progress'")
    sent += run(url)

    assert sent == [envelope.sender]
    (dead,) = queue.admin.entries(['dead'])
    assert (dead.id, dead.subject, dead.size) == (poison, 'poison', SIZE + len(b'Subject: poison\r\n\r\n'))


def large(octets=INLINE + 1):
    return Envelope('', (ADA, BOB), b'Message-ID: <1@site.example>\r\n\r\n' + b'x' * octets)


def contents(url, sql):
    return sql(url, 'SELECT count(*) FROM mailqueue_content')[0][0]


@pytest.mark.parametrize('end', ['settled', 'deleted', 'expired'])
def test_a_large_content_goes_with_its_message(url, make_queue, sql, end):
    queue = make_queue(url)
    name = queue.put(large())
    assert contents(url, sql) == 1
    assert sql(url, 'SELECT content FROM mailqueue_message') == [(None,)]
    assert queue.claim(name).envelope == large()
    sql(url, "UPDATE mailqueue_message SET state = 'waiting', claim = NULL")

    if end == 'settled':
        queue.claim(name).settle(Settlement())
        queue.flush()
    elif end == 'deleted':
        queue.admin.delete(name)
    else:
        sql(url, "UPDATE mailqueue_message SET state = 'dead'")
        assert queue.admin.expire(1e10, 10) == [name]

    assert contents(url, sql) == 0


def test_each_dead_letter_has_its_own_large_content(url, make_queue):
    queue = make_queue(url)
    queue.put_claimed(large()).settle(Settlement(burials=(Burial((ADA,), 'no'), Burial((BOB,), 'no'))))

    one, other = [entry.id for entry in queue.admin.entries(['dead'])]
    queue.admin.delete(one)

    assert queue.admin.content(other) == large().content


def test_a_part_of_a_content_can_be_read(url, make_queue, envelope):
    queue = make_queue(url)
    for message in (large(), envelope):
        name = queue.put(message)
        assert queue.admin.content(name, 3, 7) == message.content[3:10]
        assert queue.admin.content(name, 3) == message.content[3:]
        assert queue.admin.content(name, len(message.content), 7) == b''


def test_a_message_whose_large_content_is_gone_is_put_aside(url, make_queue, sql):
    queue = make_queue(url)
    name = queue.put(large())
    sql(url, 'DELETE FROM mailqueue_content')

    with pytest.raises(ValueError, match='damaged'):
        _ = queue.claim(name).envelope

    assert queue.admin.find(name).state == 'corrupt'


def test_messages_whose_claims_have_run_out_are_named(url, make_queue, envelope, sql):
    queue = make_queue(url)
    names = [queue.put(envelope) for _ in range(3)]
    for deaths, name in enumerate(names):
        sql(url, 'UPDATE mailqueue_message SET deaths = :deaths WHERE id = :name', deaths=deaths, name=name)

    assert queue.admin.crashing(2, 10) == names[2:]
    assert len(queue.admin.crashing(1, 1)) == 1
