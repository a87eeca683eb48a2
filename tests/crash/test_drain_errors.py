"""Files cannot be written or changed while a queue is drained: nobody is lost, the next run goes on with the others."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path

import pytest

from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.claim import UNSETTLED_REST
from tests.parts.children import no_open_files_are_left
from tests.parts.drain import (
    assert_nobody_is_lost,
    blaming,
    drain,
    drain_in_runs,
    everybody,
    fill,
    is_not_due,
    name_of,
)
from tests.parts.faults import CHANGES, Fault, Refusal
from tests.parts.maildir import Told, at, names, where

# A message that comes to an end needs no room.
NEEDS_ROOM = {'mixed', 'many', 'grey', 'refused'}


@pytest.fixture
def queue(tmp_path):
    return MaildirQueue(tmp_path)


@pytest.fixture
def told(caplog):
    return Told(caplog)


def is_sync_of_message(call):
    return call.name == 'fsync' and stat.S_ISREG(os.fstat(call.args[0]).st_mode)


def replaces(call):
    return call.name == 'rename' and Path(call.args[0]).parent.name == 'tmp'


@pytest.mark.parametrize('error', ['ENOSPC', 'EDQUOT', 'EIO', 'EROFS'])
@pytest.mark.parametrize(
    'fails',
    [lambda call: call.creates, lambda call: call.name == 'writev', is_sync_of_message, replaces],
    ids=['to create', 'to write', 'to sync', 'to replace'],
)
def test_what_cannot_be_written_leaves_the_old_files_whole_and_waiting(queue, office, told, error, fails):
    fill(queue)
    before = {name: state_of(at(queue, 'new', name)) for name in names(queue, 'new')}
    refusal = Refusal(error, fails)
    with no_open_files_are_left():
        ended_early = drain_in_runs(queue.path, office, around=refusal)
        accepted = office.accepted

    # A run ends with the first outcome that cannot be written; what it was about rests, and the next one goes on.
    # What was under way, too, had its outcome meanwhile; or waits for its next transaction.
    assert 1 <= ended_early <= len(NEEDS_ROOM)
    # Everybody else who can be reached has the message by now; of some this could not be written down.
    assert {name for name, _ in everybody('taken') - accepted} <= {'many'}
    after = {name: state_of(at(queue, 'new', name)) for name in names(queue, 'new')}
    assert {name_of(content) for _, content in after.values()} == NEEDS_ROOM
    assert after.items() <= before.items()
    assert all(is_not_due(queue, name) for name in after)
    assert where(queue) == {'new': len(NEEDS_ROOM)}
    critical = told(level='CRITICAL', status='unsettled', error=os.strerror(refusal.error))
    assert {event['id'] for event in critical} == after.keys()

    repeated = assert_nobody_is_lost(queue, office, later=2 * UNSETTLED_REST)
    assert {name for name, _ in repeated} == {'mixed', 'many'}


def state_of(path):
    return path.stat().st_ino, path.read_bytes()


def is_change(call):
    return call.creates or call.name in CHANGES or call.name == 'fsync'


@pytest.mark.parametrize('lasts', [False, True], ids=['once', 'from then on'])
def test_a_change_that_fails_at_any_moment_of_a_run_loses_nobody(queue, office, told, lasts):
    for number in itertools.count(1):
        fill(queue)
        office.open_for(1)
        told.clear()
        fault = Fault('EIO', number, lasts=lasts, can_fail=is_change)
        with no_open_files_are_left():
            drain_in_runs(queue.path, office, around=fault, most=1 if lasts else 3)
            accepted = office.accepted

        if fault.hit is None:
            assert accepted == everybody('taken')
            break
        with blaming(f'failure of {fault.hit}'):
            assert told(error=os.strerror(fault.error))
            missing = {name for name, _ in everybody('taken') - accepted}
            repeated = {name for name, _ in assert_nobody_is_lost(queue, office, later=2 * UNSETTLED_REST)}
            # The next message was taken already when it became impossible to take any.
            assert len(repeated) <= (2 if lasts else 1)
            assert lasts or len(missing | repeated) <= 1, 'the next run goes on with the others'
    assert number > 50


@pytest.mark.parametrize('error', ['EPERM', 'EACCES', 'EROFS'])
def test_where_nothing_can_be_removed_one_run_sends_what_it_has_begun_and_the_next_ones_nothing(
    queue, office, told, error
):
    fill(queue)
    # As in a folder with the attribute "append only".
    refusal = Refusal(error, lambda call: call.name in ('unlink', 'rename') and is_in_cur(call.args[0]))

    sent = []
    for _ in range(3):
        with pytest.raises(QueueError, match=os.strerror(refusal.error)):
            drain(queue.path, office, around=refusal)
        sent.append(len({name for name, _ in office.accepted}))

    # One was under way when the first had its outcome.
    assert sent[0] <= 2
    assert sent[1:] == [sent[0]] * 2
    assert told(level='CRITICAL', status='unsettled', error=os.strerror(refusal.error))
    assert not told(status='deferred')
    assert not told(status='buried')


def is_in_cur(path):
    return Path(path).parent.name == 'cur'
