"""
Every system call of the queue fails once, or from then on, with every error that it can come back with.

Whatever happens, nothing is lost, no file stays open, no lock is kept, and somebody is told.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import re
import time
from pathlib import Path

import pytest
import transaction

from pyramid_mailqueue.datamanager import MailDataManager
from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.results import Burial, Settlement
from tests.parts.children import no_open_files_are_left
from tests.parts.faults import CAN_FAIL, Fault, intercepted, without_sync
from tests.parts.maildir import (
    CONTENT,
    ENVELOPE,
    LATER,
    OTHER,
    Told,
    at,
    clear,
    dead_recipients,
    leave_everything_behind,
    names,
    put,
    stage,
    where,
)

pytestmark = [
    pytest.mark.parametrize('error', CAN_FAIL),
    pytest.mark.parametrize('lasts', [False, True], ids=['once', 'from then on']),
]


@pytest.fixture
def told(caplog):
    return Told(caplog)


@pytest.fixture
def rounds(tmp_path, told, error, lasts):
    """For each call that can fail: the fault, and an empty queue to meet it; at last a round in which nothing fails."""

    def rounds():
        for number in itertools.count(1):
            with without_faults():
                queue = MaildirQueue(tmp_path)
            clear(queue)
            told.clear()
            fault = Fault(error, number, lasts=lasts)
            yield fault, queue
            if fault.hit is None:
                return

    return rounds()


def without_faults():
    """Nothing fails."""
    return intercepted(without_sync)


def claimed(queue, envelope=ENVELOPE):
    with without_faults():
        return queue.put_claimed(envelope)


def flush(queue):
    """What was removed stays open until its batch is durable."""
    with without_faults():
        queue.flush()


def claim_all(queue, *, in_doubt='send'):
    """What the next runs find, when the trouble is over."""
    with without_faults():
        later = MaildirQueue(queue.path, in_doubt=in_doubt)
        later.recover(time.time())
        return list(later.claim_due(LATER))


def recipients_of(claims):
    return sorted(recipient for claim in claims for recipient in claim.envelope.recipients)


def assert_says(error, text, fault):
    assert str(error) == f'{text}: {os.strerror(fault.error)}'


def assert_says_that_none_can_be_claimed(error, queue, fault):
    """That there is trouble for which no message is to blame, and what a person can do about it."""
    text = rf'The folder {queue.path}(/new)? cannot be (read|used): {os.strerror(fault.error)}(\. This process .*)?$'
    assert re.match(text, str(error))
    assert ('LimitNOFILE' in str(error)) == (fault.error == errno.EMFILE)


def assert_is_refusal(error, queue, fault):
    assert_says(error, f'The queue {queue.path} cannot take the message', fault)


def assert_nothing_is_left_that_nobody_was_told_of(queue, told):
    """What could not be removed is named in the log as CRITICAL, and is not locked."""
    left = {at(queue, folder, name) for folder in ('prepared', 'new', 'cur') for name in names(queue, folder)}
    events = told(level='CRITICAL', problem='must not be delivered, and cannot be removed')
    # What is in tmp/ is never delivered, and is removed by a later run.
    assert left == {path for event in events if (path := Path(event['file'])).parent != at(queue, 'tmp')}
    assert all(queue.take(path.parent.name, path.name) for path in left)


def attempt(fault, action, *args):
    """Return what *action* returns while calls fail, and the QueueError that it raises instead."""
    with intercepted(fault):
        try:
            return action(*args), None
        except QueueError as error:
            return None, error


# --- into the queue ---------------------------------------------------------


def test_a_vote_that_fails_says_no_and_leaves_nothing(rounds, told):
    for fault, queue in rounds:
        staging = queue.staging()
        staging.add(ENVELOPE, claimed=True)
        staging.add(OTHER, claimed=False)
        with no_open_files_are_left():
            _, refusal = attempt(fault, staging.prepare)

            if fault.hit:
                assert_is_refusal(refusal, queue, fault)
                assert_nothing_is_left_that_nobody_was_told_of(queue, told)
            else:
                assert where(queue) == {'prepared': 2}
            assert staging.discard() == [ENVELOPE, OTHER]


def test_publishing_never_raises_and_what_fails_is_in_doubt(rounds, told):
    for fault, queue in rounds:
        with no_open_files_are_left():
            with without_faults():
                staging = stage(queue, (ENVELOPE, True), (OTHER, False))
            with intercepted(fault):
                first, second = staging.publish()

            assert second is None
            in_doubt = [queue.place('prepared', name) for name in names(queue, 'prepared')]
            critical = told(level='CRITICAL')
            assert [event['file'] for event in critical if event['problem'].startswith('is in doubt')] == in_doubt
            assert {event['error'] for event in told()} == ({os.strerror(fault.error)} if told() else set())
            if fault.hit is None:
                assert (where(queue), told()) == ({'new': 2}, [])
            assert staging.discard() == []
            if first is not None:
                assert (first.id in names(queue, 'new')) == first.begin()
                first.release()

        assert recipients_of(claim_all(queue)) == ['a@x.example', 'b@x.example', 'other@x.example']


def test_discarding_never_raises_and_what_stays_is_told_of(rounds, told):
    for fault, queue in rounds:
        with no_open_files_are_left():
            with without_faults():
                staging = stage(queue, (ENVELOPE, True), (OTHER, False))
            with intercepted(fault):
                assert staging.discard() == [ENVELOPE, OTHER]

        assert_nothing_is_left_that_nobody_was_told_of(queue, told)
        assert claim_all(queue, in_doubt='discard') == []
        assert where(queue) == {}


def test_a_message_that_cannot_be_put_is_refused_and_leaves_nothing(rounds, told):
    for fault, queue in rounds:
        with no_open_files_are_left():
            _, refusal = attempt(fault, queue.put, ENVELOPE)

        if refusal:
            assert_is_refusal(refusal, queue, fault)
            assert_nothing_is_left_that_nobody_was_told_of(queue, told)
        else:
            assert where(queue) == {'new': 1}
            assert fault.hit is None or fault.hit.name in {'close', 'flock'}, 'the message is there already'


def test_a_message_that_cannot_be_put_and_claimed_is_refused_and_leaves_nothing(rounds, told):
    for fault, queue in rounds:
        with no_open_files_are_left():
            taken, refusal = attempt(fault, queue.put_claimed, ENVELOPE)
            if taken:
                assert fault.hit is None
                taken.settle(Settlement())
                flush(queue)
                assert where(queue) == {}
            else:
                assert_is_refusal(refusal, queue, fault)
                assert_nothing_is_left_that_nobody_was_told_of(queue, told)


def test_a_directory_that_cannot_be_created_is_named(tmp_path, error, lasts):
    for number in itertools.count(1):
        fault = Fault(error, number, lasts=lasts)
        path = tmp_path / str(number) / 'queue'
        with no_open_files_are_left():
            _, refusal = attempt(fault, MaildirQueue, path)
        if fault.hit is None:
            assert refusal is None
            break
        assert_says(refusal, f'The queue directory {path} cannot be created or used', fault)


# --- out of the queue -------------------------------------------------------


def release_all(queue, found):
    for claim in queue.claim_due(LATER):
        found.append(claim.envelope)
        claim.release()


def test_a_run_that_stumbles_over_a_message_loses_none(rounds, told, lasts):
    for fault, queue in rounds:
        with without_faults():
            for _ in range(3):
                put(queue)
        found = []
        with no_open_files_are_left():
            _, refusal = attempt(fault, release_all, queue, found)
        if refusal:
            assert_says_that_none_can_be_claimed(refusal, queue, fault)
            assert told(problem='cannot be opened') == told(problem='cannot be claimed') == []
        elif len(found) < 3:
            assert told(level='ERROR', status='trouble')
            assert lasts or len(found) == 2, 'one bad file never stops a run'
        assert recipients_of(claim_all(queue)) == sorted(ENVELOPE.recipients * 3)
        assert where(queue) == {'cur': 3}


A, B, C, D = (f'{letter}@x.example' for letter in 'abcd')

SETTLEMENTS = {
    'done': Settlement(),
    'deferred': Settlement((A, B, C, D), due=1, last_reply='451 later'),
    'partly accepted': Settlement((B,), due=1),
    'trouble': Settlement((A, B, C, D), counted=False),
    'refused': Settlement(burials=(Burial((A, B, C, D), '550 no'),)),
    'some of each': Settlement((B,), due=1, burials=(Burial((C,), '550 no'), Burial((D,), '554 no'))),
}


@pytest.mark.parametrize('settlement', SETTLEMENTS.values(), ids=SETTLEMENTS)
def test_a_settlement_that_cannot_be_written_loses_nobody(rounds, told, settlement):
    buried = [recipient for burial in settlement.burials for recipient in burial.recipients]
    for fault, queue in rounds:
        with no_open_files_are_left():
            taken = claimed(queue, dataclasses.replace(ENVELOPE, recipients=(A, B, C, D)))
            with intercepted(fault):
                taken.settle(settlement)
            flush(queue)

        found = claim_all(queue)
        assert len(found) <= 1
        waiting, dead = recipients_of(found), dead_recipients(queue)
        if fault.hit is None:
            assert (waiting, dead, told()) == (sorted(settlement.waiting), sorted(buried), [])
        elif told(level='CRITICAL', status='unsettled'):
            assert waiting == [A, B, C, D]
            assert set(dead) <= set(buried)
        else:
            assert (waiting, dead) == (sorted(settlement.waiting), sorted(buried))
        assert all(claim.envelope.content == CONTENT for claim in found)
        assert all(claim.id == taken.id for claim in found)


def test_a_claim_that_cannot_be_given_back_is_given_back_by_the_next_run(rounds, told):
    for fault, queue in rounds:
        with no_open_files_are_left():
            taken = claimed(queue)
            with intercepted(fault):
                taken.release()

        assert where(queue) == {'new': 1} or told(level='ERROR', status='trouble')
        assert recipients_of(claim_all(queue)) == list(ENVELOPE.recipients)


# --- what dead processes leave ----------------------------------------------


@pytest.mark.parametrize('in_doubt', ['hold', 'send', 'discard'])
def test_a_recovery_that_fails_is_completed_by_the_next_one(rounds, told, in_doubt):
    for fault, queue in rounds:
        with without_faults():
            leave_everything_behind(queue)
        queue.in_doubt = in_doubt
        with no_open_files_are_left():
            recovery, refusal = attempt(fault, queue.recover, time.time())
            flush(queue)
        if refusal:
            folder = Path(str(refusal).split()[2]).name
            assert folder in {'cur', 'prepared', 'tmp', 'moving'}
            reason = os.strerror(fault.error)
            assert str(refusal).startswith(f'The folder {queue.place(folder)} cannot be read: {reason}')
        else:
            assert_is_true(recovery, queue)

        found = sorted(claim.envelope.sender for claim in claim_all(queue, in_doubt=in_doubt))

        expected = {'hold': [], 'send': ['prepared@x.example'] * 2, 'discard': []}[in_doubt]
        if 'deadly@x.example' in found:
            # It could not be read or buried, or not durably, and so waits, as if its deliverer had not died again.
            assert told(status='trouble') or told(level='CRITICAL', status='unsettled')
            found.remove('deadly@x.example')
        else:
            assert dead_recipients(queue) == ['deadly@x.example']
        assert found == ['orphan@x.example', *expected]
        assert len(names(queue, 'prepared')) == (2 if in_doubt == 'hold' else 0)
        assert 'stale' not in names(queue, 'tmp')
        if fault.hit is None:
            assert {name: len(getattr(recovery, name)) for name in recovery.__slots__} == {
                'orphans': 1,
                'buried': 1,
                'in_doubt': 2 if in_doubt == 'hold' else 0,
                'sent': 2 if in_doubt == 'send' else 0,
                'discarded': 2 if in_doubt == 'discard' else 0,
                'swept': 1,
                'half_way': 0,
                'expired': 0,
            }


def assert_is_true(recovery, queue):
    """Every message is where the recovery says it is."""
    new, prepared = names(queue, 'new'), names(queue, 'prepared')
    assert {f'{name},deaths=1' for name in recovery.orphans} | set(recovery.sent) <= set(new)
    assert set(recovery.in_doubt) <= set(prepared)
    assert not set(recovery.discarded) & set(prepared)
    assert not set(recovery.swept) & set(names(queue, 'tmp'))
    assert len(recovery.buried) <= len(names(queue, 'dead'))


def test_making_changes_durable_never_raises(rounds, told):
    for fault, queue in rounds:
        with no_open_files_are_left():
            claimed(queue).settle(Settlement())
            with intercepted(fault):
                queue.flush()
        assert fault.hit is None or told(level='ERROR', status='trouble', file=queue.place('cur'))


# --- the transaction --------------------------------------------------------


class Database:
    """A resource that votes after everybody and knows whether it has committed."""

    transaction_manager = None
    committed = False

    def sortKey(self):
        return '~~'

    def tpc_begin(self, txn): ...

    commit = tpc_vote = abort = tpc_abort = tpc_begin

    def tpc_finish(self, txn):
        self.committed = True


def test_a_transaction_whose_mail_cannot_be_written_does_not_commit(rounds, told):
    for fault, queue in rounds:
        manager = transaction.TransactionManager(explicit=True)
        txn = manager.begin()
        database = Database()
        txn.join(database)
        mail = MailDataManager(txn, manager, queue.staging(), {})
        mail.add(ENVELOPE, 'queue')
        mail.add(OTHER, 'queue')
        with no_open_files_are_left():
            _, refusal = attempt(fault, manager.commit)
        if refusal:
            manager.abort()
            assert_is_refusal(refusal, queue, fault)
            assert not database.committed
            assert_nothing_is_left_that_nobody_was_told_of(queue, told)
        else:
            assert database.committed
            assert recipients_of(claim_all(queue)) == ['a@x.example', 'b@x.example', 'other@x.example']
