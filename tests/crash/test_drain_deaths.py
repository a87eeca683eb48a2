"""
A run is killed at each of its calls to the file system and to the network, and the next run finds what it left.

The server has whatever had left the process by then, and goes on with it.
"""

from __future__ import annotations

import itertools
import os
import random
import signal

import pytest

from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.claim import MAX_DEATHS, FileName
from pyramid_mailqueue.testing import smtp_server
from tests.parts.children import fork
from tests.parts.drain import (
    MAX_RECIPIENTS,
    assert_is_made_good,
    blaming,
    drain,
    everybody,
    fill,
    letter,
    letters,
)
from tests.parts.faults import Death, DeathInSend, Log
from tests.parts.maildir import names, where

pytestmark = pytest.mark.forks


@pytest.fixture
def queue(tmp_path):
    return MaildirQueue(tmp_path)


@pytest.fixture
def die(queue, office):
    """Kill a run, and let others make it good; return who has got a message twice, or None if it was not killed."""

    def die(around, connections=1):
        fill(queue)
        office.open_for(connections)
        child = fork(lambda: drain(queue.path, office, connections=connections, around=around))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        office.send_home()
        assert status in {0, -signal.SIGKILL}
        with blaming(around):
            repeated = assert_is_made_good(queue, office, in_hand=connections if status else 0)
        return repeated if status else None

    return die


def until_one_lives(ways, die):
    """Die in all these ways but the last, which is no death any more; return what each of them repeats."""
    return list(itertools.takewhile(lambda repeated: repeated is not None, map(die, ways)))


def waits(call):
    """Whether this is one of those calls of which a run needs more or fewer, as the server's replies come in."""
    return call.name in {'poll', 'recv'}


def acts(call):
    return not waits(call)


def test_a_run_that_is_killed_at_any_call_loses_nobody_and_repeats_at_most_the_message_in_hand(die):
    # Before a call is after the one before it, too: nobody else can see what is done between them.
    repeated = until_one_lives((Death(number, 'before', acts) for number in itertools.count(1)), die)

    assert len(repeated) > 150
    assert set().union(*repeated) == set(everybody('taken')), 'each message was in hand at some death'


def test_a_run_that_is_killed_while_it_waits_for_the_server_loses_nobody(die):
    repeated = until_one_lives((Death(number, 'before', waits) for number in itertools.count(1)), die)

    assert len(repeated) > 20


@pytest.mark.parametrize(
    'cut',
    [
        lambda octets: len(octets) // 2,
        # The next message is spoken of in the same write.
        lambda octets: octets.find(b'\r\n.\r\nMAIL') + 5,
        lambda octets: len(octets) - 1,
    ],
    ids=['in the middle', 'behind a message', 'before the last octet'],
)
def test_a_run_that_is_killed_when_a_part_of_its_words_has_left_loses_nobody(die, cut):
    repeated = until_one_lives((DeathInSend(number, cut) for number in itertools.count(1)), die)

    assert len(repeated) > 9


def test_a_run_over_three_connections_that_is_killed_repeats_at_most_one_message_for_each(die, queue, office):
    fill(queue)
    office.open_for(3)
    log = Log()
    drain(queue.path, office, connections=3, around=log)
    # One more if the message that is deferred comes behind one that was sent: that could be about the session.
    assert len(office.server.sessions) in (3, 4)
    assert office.accepted == everybody('taken')
    sample = random.Random(3).sample(range(1, len(log.calls)), 40)

    repeated = [die(Death(number, 'before'), connections=3) for number in sample]

    # Which of them are repeated is for the scheduler to say.
    assert any(repeated)


@pytest.fixture
def kill_over(queue, office):
    """Start a run, and kill it when the server has as many contents as that, and says nothing more."""

    def kill_over(contents):
        heard = itertools.count(1)

        def answer(command):
            if next(heard) < contents:
                return None
            os.kill(child, signal.SIGKILL)
            return smtp_server.Silence()

        # The server may have the content before this process knows whose it is.
        reading, writing = os.pipe()
        office.server.script['.'] = answer
        child = fork(lambda: (os.read(reading, 1), drain(queue.path, office)))
        os.write(writing, b'x')
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(reading)
        os.close(writing)

    return kill_over


def test_runs_that_are_killed_over_a_server_that_hangs_have_others_in_hand_each_time(queue, office, kill_over):
    fill(queue, letters(4 * MAX_DEATHS))

    for _ in range(MAX_DEATHS + 1):
        kill_over(1)
    queue.recover(0)

    assert where(queue) == {'new': 4 * MAX_DEATHS}
    assert {FileName.parse(name).deaths for name in names(queue, 'new')} == {0, 1}


def test_a_message_in_many_parts_is_not_given_up_while_each_run_brings_some_of_them(queue, office, kill_over):
    parts = MAX_DEATHS + 2
    fill(queue, [letter('many', *(f'taken-{n}' for n in range(parts * MAX_RECIPIENTS)))])

    for _ in range(parts - 1):
        kill_over(2)
    queue.recover(0)

    assert {FileName.parse(name).deaths for name in names(queue, 'new')} == {1}
    (entry,) = queue.admin.entries(['waiting'])
    assert len(entry.recipients) == MAX_RECIPIENTS
