"""What the kernel sees of the queue, and what the queue makes of the kernel's errors."""

from __future__ import annotations

import re
import time

import pytest
import transaction

from pyramid_mailqueue.datamanager import MailDataManager
from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.results import Burial, Settlement
from tests.parts.children import Child, no_open_files_are_left
from tests.parts.maildir import ENVELOPE, LATER, OTHER, Told, at, claim, names, put, stage, where
from tests.parts.strace import traced, wait_for_strace
from tests.parts.witnesses import Notes, OnePhase, commit_two

pytestmark = pytest.mark.usefixtures('needs_strace')

RENAME = '?rename,?renameat,?renameat2'
UNLINK = '?unlink,?unlinkat'


@pytest.fixture
def queue(tmp_path):
    return MaildirQueue(tmp_path / 'queue')


@pytest.fixture
def told(caplog):
    return Told(caplog)


def under_strace(options, action, *args):
    """Return what *action* returns in a child that is traced."""

    def live(connection):
        wait_for_strace(connection)
        connection.send(action(*args))

    with Child(live) as child, traced(child, *options):
        return child.hear()


# --- what the kernel sees ---------------------------------------------------


@pytest.fixture
def trace(tmp_path, queue):
    """Return a line for each call that an action makes on the queue; files go by the name of their folder."""

    def trace(calls, action, *args):
        log = tmp_path / 'strace'
        under_strace(['-y', '-o', str(log), '-e', f'trace={calls}'], action, *args)
        *lines, end = log.read_text().splitlines()
        assert end == '+++ exited with 0 +++'
        return [line for line in (readable(line, queue) for line in lines) if line]

    return trace


def readable(line, queue):
    """``rename tmp prepared`` for a line of strace; None if it is about something else."""
    call, arguments = re.match(r'(\w+)\((.*)\) += ', line).groups()
    if call == 'write':
        return re.search(r'"(\w+)\\n"', arguments).group(1) if '/notes>' in arguments else None
    folders = re.findall(rf'{re.escape(queue.path)}/([a-z]+)', arguments)
    if not folders:
        return None
    how = re.findall(r'O_EXCL|\b0[67]\d\d\b', arguments)
    return ' '.join([re.sub('at2?$', '', call), *folders, *how])


def test_a_message_is_durable_before_anybody_relies_on_it(queue, trace, tmp_path):
    found = trace(f'openat,fsync,write,{RENAME}', commit_two, queue, Notes(tmp_path / 'notes'), OnePhase)

    assert found[:11] == [
        'open tmp O_EXCL 0600',
        'fsync tmp',
        'open tmp O_EXCL 0600',
        'fsync tmp',
        'rename tmp prepared',
        'rename tmp prepared',
        'open prepared',
        'fsync prepared',
        # The vote has returned: the database commits.
        'committed',
        'rename prepared new',
        'rename prepared new',
    ]
    # The second phase returns when these are durable too; then the commit returns.
    assert found[11:] == ['open new', 'fsync new', 'acknowledged']


def test_where_nobody_relies_on_the_vote_two_syncs_do(queue, trace):
    def commit_alone():
        with transaction.manager as txn:
            MailDataManager(txn, transaction.manager, queue.staging(), {}).add(ENVELOPE, 'queue')

    assert trace(f'fsync,{RENAME}', commit_alone) == [
        'fsync tmp',
        'rename tmp prepared',
        'rename prepared new',
        'fsync new',
    ]


def test_a_message_that_is_put_is_durable_before_its_sender_goes_on(queue, trace):
    assert trace(f'openat,fsync,{RENAME}', put, queue) == [
        'open tmp O_EXCL 0600',
        'fsync tmp',
        'rename tmp new',
        'open new',
        'fsync new',
    ]


def test_a_message_is_locked_before_it_is_visible(queue, trace):
    assert trace(f'flock,fsync,{RENAME}', put, queue)[:3] == ['flock tmp', 'fsync tmp', 'rename tmp new']


def test_a_dead_letter_and_the_next_version_are_durable_before_they_replace_anything(queue, trace):
    put(queue)

    def settle():
        claim(queue).settle(Settlement(('a@x.example',), due=1, burials=(Burial(('b@x.example',), 'no'),)))
        queue.flush()

    assert trace(f'fsync,{RENAME},{UNLINK}', settle) == [
        'rename new cur',
        'fsync tmp',
        'rename tmp dead',
        'fsync dead',
        'fsync tmp',
        'rename tmp cur',
        'rename cur new',
        'fsync new',
    ]


def test_a_message_that_is_not_due_costs_one_stat(queue, trace):
    for seconds in range(20):
        put(queue, due=time.time() + 1000 + seconds)

    found = trace('%file', lambda: list(queue.claim_due(time.time())))

    assert [line for line in found if line.startswith('open')] == ['open new'], 'the folder'
    assert len(found) <= 20 + 2, 'the folder itself is opened and looked at'


# --- what the kernel answers ------------------------------------------------


@pytest.mark.parametrize(
    ('inject', 'reason'),
    [
        ('writev:error=ENOSPC:when=2', 'No space left on device'),
        ('fsync:error=EIO:when=1', 'Input/output error'),
        ('fsync:error=EIO:when=3', 'Input/output error'),
        ('flock:error=ENOLCK:when=1', 'No locks available'),
        (f'{RENAME}:error=EACCES:when=2', 'Permission denied'),
        (f'{RENAME}:error=EROFS:when=1', 'Read-only file system'),
    ],
)
def test_what_the_kernel_refuses_is_a_no(queue, inject, reason):
    def vote():
        staging = queue.staging()
        staging.add(ENVELOPE, claimed=True)
        staging.add(OTHER, claimed=False)
        with no_open_files_are_left(), pytest.raises(QueueError) as refusal:
            staging.prepare()
        return str(refusal.value)

    text = under_strace(['-o', '/dev/null', '-e', f'inject={inject}'], vote)

    assert text == f'The queue {queue.path} cannot take the message: {reason}'
    assert where(queue) == {}


def test_what_cannot_be_published_is_in_doubt(queue, told):
    def commit():
        claims = stage(queue, (ENVELOPE, True), (OTHER, False)).publish()
        return claims, told(level='CRITICAL')

    claims, (event,) = under_strace(['-o', '/dev/null', '-e', f'inject={RENAME}:error=EACCES:when=3'], commit)

    assert claims == [None, None]
    assert where(queue) == {'prepared': 1, 'new': 1}
    assert event['file'] == queue.place('prepared', *names(queue, 'prepared'))
    assert event['error'] == 'Permission denied'


def test_a_full_disk_while_a_message_is_deferred_leaves_the_old_one_whole_and_waiting(queue, told):
    name = put(queue)
    path = at(queue, 'new', name)
    before = path.read_bytes(), path.stat().st_ino

    def settle():
        claim(queue).settle(Settlement(('b@x.example',), due=12345))
        return told(level='CRITICAL')

    (event,) = under_strace(['-o', '/dev/null', '-e', 'inject=writev:error=ENOSPC'], settle)

    assert where(queue) == {'new': 1}
    assert (path.read_bytes(), path.stat().st_ino) == before
    assert path.stat().st_mtime == 12345
    assert (event['status'], event['id'], event['error']) == ('unsettled', name, 'No space left on device')


def test_a_message_that_cannot_be_opened_does_not_stop_a_run(queue):
    first, second = put(queue, due=1), put(queue, due=2)

    # The kernel counts the calls on this file only.
    options = ['-o', '/dev/null', '-P', queue.place('new', first), '-e', 'inject=openat:error=EIO']
    found = under_strace(options, lambda: [taken.id for taken in queue.claim_due(LATER)])

    assert found == [second]
    assert names(queue, 'new') == [first]
