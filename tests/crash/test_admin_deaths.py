"""A person changes a message, and dies at any system call: there is one message still, where it was or is to be."""

from __future__ import annotations

import itertools
import os

import pytest

from pyramid_mailqueue.queues.entries import STATES
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.queue_file import read_header
from tests.parts.children import fork
from tests.parts.faults import Death, intercepted, without_sync
from tests.parts.maildir import ENVELOPE, LATER, at, clear, forget, put, where
from tests.parts.states import make_dead, make_doubtful, make_held, make_waiting

pytestmark = pytest.mark.forks


@pytest.fixture
def queue(tmp_path):
    return MaildirQueue(tmp_path / 'queue')


def make_orphan(queue):
    left = queue.put_claimed(ENVELOPE)
    forget(left)
    return left.id


def make_waiting_for_later(queue):
    return put(queue, due=LATER)


CHANGES = [
    ('hold', make_waiting, {'held'}),
    ('hold', make_orphan, {'held'}),
    ('unhold', make_held, {'new'}),
    ('retry', make_waiting_for_later, {'new'}),
    ('retry', make_orphan, {'new'}),
    ('retry', make_dead, {'new'}),
    ('release', make_doubtful, {'new'}),
    ('delete', make_waiting, set()),
    ('delete', make_dead, set()),
]


def content_in(queue, folder):
    (path,) = at(queue, folder).iterdir()
    with path.open('rb') as fp:
        read_header(fp)
        return fp.read()


@pytest.mark.parametrize('moment', ['before', 'after'])
@pytest.mark.parametrize(('method', 'make', 'after'), CHANGES)
def test_whoever_dies_at_any_moment_has_neither_lost_nor_doubled_the_message(queue, moment, method, make, after):
    deaths = 0
    for number in itertools.count(1):
        with intercepted(without_sync):
            clear(queue)
            name = make(queue)
            (before,) = where(queue)
            content = content_in(queue, before)

        def live(number=number, name=name):
            with intercepted(Death(number, moment)):
                getattr(queue.admin, method)(name)

        status = os.waitstatus_to_exitcode(os.waitpid(fork(live), 0)[1])
        left = set(where(queue)) - {'tmp'}
        if status == 0:
            assert left == after
            break
        deaths += 1
        assert left in ({before}, after)
        assert sum(number for folder, number in where(queue).items() if folder != 'tmp') == len(left)
        if left:
            (folder,) = left
            assert content_in(queue, folder) == content
            # The next person finds it, and can do the same.
            (entry,) = queue.admin.entries(STATES)
            if folder == before:
                getattr(queue.admin, method)(entry.id)
                assert set(where(queue)) - {'tmp'} == after
    assert deaths > 5
