"""The command ``mq-run`` is killed by the kernel at some of its system calls."""

from __future__ import annotations

import signal
import subprocess

import pytest

from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.folders import SYNC_EVERY
from tests.parts import drain as drain_parts
from tests.parts.drain import assert_is_made_good, fill, letters
from tests.parts.maildir import names

pytestmark = pytest.mark.usefixtures('needs_strace')


@pytest.fixture
def queue(tmp_path):
    queue = MaildirQueue(tmp_path / 'queue')
    fill(queue)
    return queue


@pytest.fixture
def mq_run(office, queue):
    """Run the command under strace and return its exit status, or, negative, the signal that killed it."""

    def mq_run(*options, connections=1):
        office.open_for(connections)
        strace = ['strace', '-f', '-o', '/dev/null', *options]
        command = drain_parts.mq_run(queue, office, connections=connections)
        status = subprocess.run([*strace, *command], capture_output=True, check=False).returncode
        office.send_home()
        return status

    return mq_run


def die(mq_run, call, number, *options, connections=1):
    """Be killed when a thread makes this call for the *number*-th time."""
    status = mq_run('-e', f'inject={call}:signal=KILL:when={number}', *options, connections=connections)
    assert status == -signal.SIGKILL


SAMPLE = {
    'flock': (7, 18),
    'fsync': (1, 9),
    'poll': (2, 5),
    'recvfrom': (4, 9),
    'rename': (2, 4, 7),
    'sendto': (3, 7),
    'utimensat': (2,),
    'writev': (6,),
}
# Not every architecture has each of them.
ALSO_CALLED = {
    'poll': '?poll,?ppoll',
    'rename': '?rename,?renameat,?renameat2',
    'unlink': '?unlink,?unlinkat',
}


@pytest.mark.parametrize(('call', 'number'), [(call, number) for call, numbers in SAMPLE.items() for number in numbers])
def test_mq_run_that_is_killed_loses_nobody_and_repeats_at_most_the_message_in_hand(
    mq_run, queue, office, call, number
):
    die(mq_run, ALSO_CALLED.get(call, call), number)

    assert_is_made_good(queue, office, in_hand=1)


@pytest.mark.parametrize('call', ['recvfrom', 'rename', 'sendto'])
def test_mq_run_over_three_connections_that_is_killed_repeats_at_most_one_message_for_each(mq_run, queue, office, call):
    die(mq_run, ALSO_CALLED.get(call, call), 3, connections=3)

    assert_is_made_good(queue, office, in_hand=3)


@pytest.mark.parametrize('number', [0, 3])
def test_mq_run_that_is_killed_when_it_opens_a_message_leaves_that_where_it_was(mq_run, queue, office, number):
    name = names(queue, 'new')[number]

    die(mq_run, 'openat', 1, '-P', queue.place('new', name))

    assert name in names(queue, 'new')
    assert_is_made_good(queue, office, in_hand=1)


@pytest.mark.parametrize(('number', 'last'), [(1, ('first', 'taken-1@x.example')), (3, ('last', 'taken-7@x.example'))])
def test_what_is_accepted_and_not_yet_removed_is_repeated(mq_run, queue, office, number, last):
    die(mq_run, ALSO_CALLED['unlink'], number)

    assert list(assert_is_made_good(queue, office, in_hand=1)) == [last]


def test_what_is_delivered_is_removed_durably_in_batches(mq_run, queue, tmp_path):
    fill(queue, letters(4 * SYNC_EVERY + 20))
    log = tmp_path / 'strace'

    assert mq_run('-y', '-o', str(log), '-e', f'trace=fsync,{ALSO_CALLED["unlink"]}') == 0

    batches = ['']
    for line in log.read_text().splitlines():
        if f'{queue.path}/cur/' in line:
            batches[-1] += 'u'
        elif f'{queue.path}/cur>' in line:
            batches.append('')
    assert sum(map(len, batches)) == 4 * SYNC_EVERY + 20
    # While a thread ends one batch the next one may fill, and no more.
    assert max(map(len, batches)) <= 2 * SYNC_EVERY
    assert len(batches[:-1]) >= 5
    assert batches[-1] == ''


def test_mq_run_that_lives_repeats_nothing(mq_run, queue, office):
    assert mq_run('-e', 'trace=none') == 0

    assert not assert_is_made_good(queue, office, in_hand=0)
