"""What is special about the queue in memory; what it shares with every queue is in ``test_contract.py``."""

from __future__ import annotations

import logging

from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.memory import MemoryQueue
from tests.parts.children import run_in_child

ENVELOPE = Envelope('shop@site.example', ('ada@x.example',), b'Message-ID: <1@site.example>\r\n\r\nHello\r\n')
LATER = 1 << 33


def test_a_forked_child_has_a_queue_of_its_own(caplog):
    queue = MemoryQueue()
    queue.put(ENVELOPE)

    def work():
        for claim in queue.claim_due(LATER):
            claim.release()
        return queue.put(ENVELOPE), queue.count_due(LATER)

    # As if another thread had been in the midst of a change at the moment of the fork.
    with queue._messages.lock:
        name, count = run_in_child(work)

    assert (name, count) == ('000002', 2)
    assert queue.count_due(LATER) == 1


def test_a_message_that_was_in_doubt_may_still_be_sent(caplog):
    queue = MemoryQueue(in_doubt='send')
    staging = queue.staging()
    staging.add(ENVELOPE, claimed=False)
    staging.prepare()
    staging.leave_in_doubt()

    (name,) = queue.recover(LATER).sent

    (claim,) = queue.claim_due(LATER)
    assert claim.id == name
    assert repr(claim) == f'<MemoryClaim {name}>'


def test_it_is_told_what_happens_to_a_message(caplog):
    caplog.set_level(logging.INFO, 'mailqueue.queue_log')
    queue = MemoryQueue()
    name = queue.put(ENVELOPE)
    queue.admin.hold(name)

    queued, held = (record.mailqueue for record in caplog.records)
    assert queued == {
        'status': 'queued',
        'id': name,
        'msgid': '<1@site.example>',
        'from': '<shop@site.example>',
        'to': 'ada@x.example',
    }
    assert held == {'status': 'held', 'id': name, 'state': 'held', 'msgid': '<1@site.example>'}
