"""
What a power cut can undo while a queue is drained: the changes of a folder that is not synced since.

A change that is undone is a message that is sent again, so there must never be many of them.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.folders import SYNC_EVERY, SYNC_SECONDS
from tests.parts.drain import drain, fill, letter, letters
from tests.parts.faults import without_sync
from tests.parts.maildir import where


class Disk:
    """
    Notes the changes that end a claim, until their folder is synced.

    :ivar story: what has happened, in its order: ``change`` and ``sync``
    :ivar unsynced: where files are now, or were, whose last change a power cut would undo
    :ivar most: how many changes a power cut could have undone at the worst moment
    """

    def __init__(self, seconds=0):
        self._seconds = seconds
        self._lock = threading.Lock()
        self.unsynced = set()
        self.story = []
        self.most = 0

    def __call__(self, call):
        if call.name == 'fsync' and stat.S_ISDIR(os.fstat(*call.args).st_mode):
            self._sync(Path(f'/proc/self/fd/{call.args[0]}').readlink())
            return None
        result = without_sync(call)
        if call.name in {'unlink', 'rename'}:
            path = Path(call.args[-1])
            if (call.name, path.parent.name) in {('unlink', 'cur'), ('rename', 'new')}:
                self._change(path)
        return result

    def _change(self, path):
        with self._lock:
            self.unsynced.add(path)
            self.most = max(self.most, len(self.unsynced))
            self.story.append('change')

    def _sync(self, folder):
        with self._lock:
            durable = {path for path in self.unsynced if path.parent == folder}
            self.story.append('sync')
        time.sleep(self._seconds)
        with self._lock:
            self.unsynced -= durable


@pytest.fixture
def queue(tmp_path):
    return MaildirQueue(tmp_path)


def test_what_a_run_does_is_made_durable_in_batches(queue, office):
    fill(queue, [*letters(SYNC_EVERY + 20), *(letter(f'grey-{n}', f'grey-{n}') for n in range(SYNC_EVERY))])
    disk = Disk()
    drain(queue.path, office, around=disk)

    assert where(queue) == {'new': SYNC_EVERY}
    # One batch may be on its way to the disk, and the next one is filled meanwhile.
    assert disk.most <= 2 * SYNC_EVERY
    assert disk.story.count('change') == 2 * SYNC_EVERY + 20
    assert disk.unsynced == set(), 'everything is durable when a run ends'


def test_a_run_does_not_run_away_from_a_slow_disk(queue, office):
    fill(queue, letters(4 * SYNC_EVERY + 20))
    office.open_for(4)
    disk = Disk(seconds=0.4)
    drain(queue.path, office, connections=4, around=disk)

    # One batch is on its way to the disk, and whoever has filled the next one waits for that.
    assert disk.most <= 2 * SYNC_EVERY
    assert disk.unsynced == set()
    assert where(queue) == {}


def test_a_batch_that_does_not_fill_is_made_durable_after_a_while(queue, office):
    fill(queue, letters(4))
    pauses = iter([0, 0, SYNC_SECONDS, 0])
    office.server.script['.'] = lambda command: office.server.pause(next(pauses))
    disk = Disk()
    drain(queue.path, office, around=disk)

    changes = [index for index, what in enumerate(disk.story) if what == 'change']
    # It is a thread of its own that waits for the disk, and it may come to that after the fourth change.
    begin, *middle, end = disk.story[changes[2] :]
    assert (begin, sorted(middle), end) == ('change', ['change', 'sync'], 'sync')
