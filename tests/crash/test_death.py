"""
A process is killed before and after each of its system calls, and the next run of mq-run finds what it left.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections import Counter
from functools import partial

import pytest

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.queues.maildir import MaildirQueue
from tests.parts.children import Child, fork
from tests.parts.faults import Death, intercepted, without_sync
from tests.parts.maildir import HOUR, at, clear, dead_recipients, leave_everything_behind, names, where
from tests.parts.strace import CHANGES, traced, wait_for_strace
from tests.parts.witnesses import ENVELOPE_OF_THREE, MIXED, Notes, OnePhase, Recording, TwoPhase, commit_two

pytestmark = pytest.mark.forks

BOTH = ['first@x.example', 'second@x.example']


@pytest.fixture(params=['before', 'after', 'strace'])
def trials(request, tmp_path):
    """One trial for each system call; the last one is not killed."""
    if request.param == 'strace':
        request.getfixturevalue('needs_strace')
        ways = [partial(die_under_strace, call) for call in CHANGES]
    else:
        ways = [partial(die, request.param)]

    def trials():
        deaths = 0
        for way in ways:
            for number in itertools.count(1):
                with intercepted(without_sync):
                    trial = Trial(tmp_path, partial(way, number))
                yield trial
                if not trial.died:
                    break
                deaths += 1
        assert deaths > 5

    return trials()


def die(moment, number, action):
    """Do *action* in a child that is killed right before or after a system call; return its exit status."""

    def live():
        with intercepted(Death(number, moment)):
            action()

    return os.waitstatus_to_exitcode(os.waitpid(fork(live), 0)[1])


def die_under_strace(call, number, action):
    """The same, but the kernel sees the calls, and kills before one of them."""

    def live(connection):
        wait_for_strace(connection)
        action()

    with Child(live) as child:
        with traced(child, '-o', '/dev/null', '-e', f'inject={call}:signal=KILL:when={number}'):
            pass
        return child.wait()


class Trial:
    """An empty queue, and what is to be the death of a process that works on it."""

    died = False

    def __init__(self, path, die):
        self._path = path
        self._die = die
        self.queue = self.open()
        clear(self.queue)
        self.notes = Notes(path / 'notes')

    def open(self, in_doubt='hold'):
        return MaildirQueue(self._path, in_doubt=in_doubt)

    def put(self, envelope):
        with intercepted(without_sync):
            self.queue.put(envelope)

    def die_while(self, action, *args):
        """Do it in a child until its death."""
        status = self._die(partial(action, *args))
        assert status in {0, -signal.SIGKILL}
        self.died = status != 0

    def run(self, transport, *, in_doubt='hold', later=0):
        """What mq-run does in the next minute, or later."""
        with intercepted(without_sync):
            queue = self.open(in_doubt)
            return Runner(queue, MessageHandler([transport]), clock=lambda: time.time() + later).run()

    def run_twice(self, **kwargs):
        """Return what the first run delivers, and its report; the second has nothing left to do."""
        before = self.notes.delivered
        report = self.run(Recording(self.notes), **kwargs)
        delivered = self.notes.delivered
        self.run(Recording(self.notes), **kwargs)
        assert self.notes.delivered == delivered
        return sorted((Counter(delivered) - Counter(before)).elements()), report


# --- a commit ---------------------------------------------------------------


@pytest.mark.usefixtures('files')
@pytest.mark.parametrize('database', [OnePhase, TwoPhase])
@pytest.mark.parametrize('in_doubt', ['hold', 'send', 'discard'])
def test_a_message_leaves_if_and_only_if_its_transaction_has_committed(trials, database, in_doubt):
    fates = Counter()
    for trial in trials:
        trial.die_while(commit_two, trial.queue, trial.notes, database)

        delivered, report = trial.run_twice(in_doubt=in_doubt)

        committed, acknowledged = 'committed' in trial.notes, 'acknowledged' in trial.notes
        fates[committed, acknowledged] += 1
        if acknowledged or (committed and in_doubt == 'send'):
            assert delivered == BOTH
        elif committed:
            unknown = len(report.recovery.in_doubt) + len(report.recovery.discarded)
            assert len(delivered) + unknown == 2
            assert len(set(delivered)) == len(delivered)
        elif in_doubt != 'send':
            assert delivered == []
        assert where(trial.queue).keys() <= {'tmp', 'prepared'}
        assert len(names(trial.queue, 'prepared')) == len(report.recovery.in_doubt)
    # There were deaths at all points, and the last trial survived.
    assert fates[False, False] > 5
    assert fates[True, False] >= 2
    assert fates[True, True] >= 1
    assert fates[False, True] == 0


@pytest.mark.usefixtures('files')
def test_a_committed_message_is_delivered_whenever_its_process_dies_while_it_delivers(trials):
    deaths = 0
    for trial in trials:
        trial.die_while(commit_two, trial.queue, trial.notes, OnePhase, Recording(trial.notes))

        trial.run_twice(in_doubt='send')

        delivered = Counter(trial.notes.delivered)
        if 'committed' in trial.notes:
            assert sorted(delivered) == BOTH
            # Only the message in hand can be repeated, for nobody knows whether the server has it.
            assert sum(delivered.values()) <= 3
        if 'acknowledged' in trial.notes:
            deaths += 1
        assert where(trial.queue).keys() <= {'tmp', 'prepared'}
    assert deaths > 9
    assert sorted(trial.notes.delivered) == BOTH, 'once each, if nobody dies'


# --- a settlement -----------------------------------------------------------


def deliver_all(queue, transport):
    handler = MessageHandler([transport])
    for claim in queue.claim_due(time.time()):
        handler.deliver(claim)
    queue.flush()


def test_a_message_that_was_accepted_deferred_and_refused_loses_nobody(trials):
    for trial in trials:
        trial.put(ENVELOPE_OF_THREE)
        trial.die_while(deliver_all, trial.queue, Recording(trial.notes, MIXED))

        trial.run(Recording(trial.notes, MIXED))

        assert set(trial.notes.delivered) == {'accepted@x.example'}
        # It is repeated if the process died after it was accepted and before this was written down.
        assert len(trial.notes.delivered) <= (2 if trial.died else 1)
        assert dead_recipients(trial.queue) == ['refused@x.example']
        assert {folder: number for folder, number in where(trial.queue).items() if folder != 'tmp'} == {
            'new': 1,
            'dead': 1,
        }

        delivered, _ = trial.run_twice(later=2 * HOUR)

        assert delivered == ['deferred@x.example']
        assert dead_recipients(trial.queue) == ['refused@x.example']
        assert where(trial.queue).keys() <= {'tmp', 'dead'}


def test_a_process_that_dies_without_having_settled_leaves_an_orphan_and_no_copy(trials):
    for trial in trials:
        trial.put(ENVELOPE_OF_THREE)
        trial.put(ENVELOPE_OF_THREE)
        trial.die_while(list, (claim.release() for claim in trial.queue.claim_due(time.time())))

        delivered, _ = trial.run_twice()

        assert delivered == sorted(ENVELOPE_OF_THREE.recipients * 2)
        assert where(trial.queue) == {}


# --- a recovery -------------------------------------------------------------


@pytest.mark.parametrize('in_doubt', ['hold', 'send', 'discard'])
def test_a_recovery_that_dies_is_completed_by_the_next_one(trials, in_doubt):
    for trial in trials:
        with intercepted(without_sync):
            leave_everything_behind(trial.queue)
        trial.die_while(trial.open(in_doubt).recover, time.time())

        delivered, _ = trial.run_twice(in_doubt=in_doubt)

        assert delivered == sorted(['orphan@x.example', *(['prepared@x.example'] * 2 if in_doubt == 'send' else [])])
        assert dead_recipients(trial.queue) == ['deadly@x.example']
        assert len(names(trial.queue, 'prepared')) == (2 if in_doubt == 'hold' else 0)
        assert not at(trial.queue, 'tmp', 'stale').exists()
        assert where(trial.queue).keys() <= {'tmp', 'prepared', 'dead'}
