"""A queue is drained on a disk that is really full: a small one, which only one child process can see."""

from __future__ import annotations

import ctypes
import itertools
import os
from functools import partial
from pathlib import Path

import pytest

from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.claim import UNSETTLED_REST
from tests.parts.children import Child
from tests.parts.drain import MAIL, drain, drain_in_runs, everybody, fill, named_in
from tests.parts.maildir import Told, where

# From <sched.h> and <sys/mount.h>.
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000


# Those that have somebody who waits or is given up: each needs room, and none leaves any.
DIFFICULT = [envelope for envelope in MAIL if not all(who.startswith('taken') for who in envelope.recipients)]


def mount_disk(path, options):
    """Mount a small disk at *path* that is there for this process only.  Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function, *args):
        if function(*args) != 0:
            raise OSError(ctypes.get_errno(), f'{function.__name__}: {os.strerror(ctypes.get_errno())}')

    user, group = os.getuid(), os.getgid()
    try:
        call(libc.unshare, CLONE_NEWNS)
    except PermissionError:
        # Where users may be root of a world of their own.
        call(libc.unshare, CLONE_NEWNS | CLONE_NEWUSER)
        Path('/proc/self/setgroups').write_text('deny')
        Path('/proc/self/uid_map').write_text(f'0 {user} 1')
        Path('/proc/self/gid_map').write_text(f'0 {group} 1')
    call(libc.mount, None, b'/', None, MS_REC | MS_PRIVATE, None)
    call(libc.mount, b'tmpfs', os.fsencode(path), b'tmpfs', 0, options.encode())


@pytest.fixture(scope='module')
def _reason_against_mounting(tmp_path_factory):
    path = tmp_path_factory.mktemp('disk')

    def attempt(connection):
        try:
            mount_disk(path, 'size=1m')
        except OSError as error:
            connection.send(f'no disk can be mounted here: {error}')
        else:
            connection.send(None)

    with Child(attempt) as child:
        return child.hear()


@pytest.fixture
def disk(tmp_path, _reason_against_mounting):
    """A folder that a disk can be mounted on."""
    if _reason_against_mounting:
        pytest.skip(_reason_against_mounting)
    return tmp_path


def fill_up(disk):
    """Let nothing more be written."""
    disk.joinpath('filler').mkdir()
    with pytest.raises(OSError, match='No space left on device'):
        write_without_end(disk / 'filler')


def write_without_end(folder):
    for number in itertools.count():
        folder.joinpath(f'{number}').write_bytes(bytes(4096))


def live(disk, options, office, told, connection):
    """Drain a queue on a full disk, and again when there is room; say each time what is where."""
    mount_disk(disk, options)
    queue = MaildirQueue(disk / 'queue')
    fill(queue, DIFFICULT)
    before = everything_in(queue, 'new')
    fill_up(disk)
    drain_in_runs(queue.path, office)
    after = everything_in(queue, 'new')
    connection.send((after.items() <= before.items(), where(queue), told(level='CRITICAL', status='unsettled')))

    connection.recv()
    for path in disk.joinpath('filler').iterdir():
        path.unlink()
    drain(queue.path, office, later=2 * UNSETTLED_REST)
    connection.send((named_in(queue, 'new'), named_in(queue, 'dead'), where(queue)))


def everything_in(queue, folder):
    return {path.name: path.read_bytes() for path in Path(queue.place(folder)).iterdir()}


@pytest.mark.parametrize('options', ['size=256k', 'size=8m,nr_inodes=100'], ids=['no room', 'no room for names'])
def test_on_a_full_disk_the_old_files_stay_whole_and_wait_until_there_is_room(disk, office, caplog, options):
    with Child(partial(live, disk, options, office, Told(caplog))) as child:
        are_whole, found, unsettled = child.hear()
        # That of several transactions may have been between two when the run ended.
        assert {name for name, _ in everybody('taken', DIFFICULT) - office.accepted} <= {'many'}
        child.tell()
        waiting, dead, found_later = child.hear()
        assert child.wait() == 0

    assert are_whole
    assert found == {'new': len(DIFFICULT)}
    assert {event['error'] for event in unsettled} == {'No space left on device'}
    assert len({event['id'] for event in unsettled}) == len(DIFFICULT)
    assert waiting == everybody('grey')
    assert dead == everybody('refused')
    assert found_later == {'new': 3, 'dead': 3}
