"""The same errors, from a real kernel."""

from __future__ import annotations

import resource

import pytest

from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.queues.maildir import MaildirQueue
from tests.crash.children import no_open_files_are_left, open_files, run_in_child
from tests.crash.queue_parts import ENVELOPE, where

LARGE = type(ENVELOPE)('sender@site.example', ('large@x.example',), b'x' * 100_000)


def refusal_of(staging):
    with no_open_files_are_left(), pytest.raises(QueueError) as refusal:
        staging.prepare()
    return str(refusal.value)


def test_a_file_that_can_only_be_written_in_part_is_refused_and_removed(tmp_path):
    queue = MaildirQueue(tmp_path)

    def commit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        staging = queue.staging()
        staging.add(ENVELOPE, claimed=True)
        staging.add(LARGE, claimed=True)
        return refusal_of(staging)

    assert run_in_child(commit) == f'The queue {tmp_path} cannot take the message: File too large'
    assert where(queue) == {}


def test_a_process_that_has_too_many_files_open_says_so(tmp_path):
    queue = MaildirQueue(tmp_path)

    def commit():
        limit = 8 + max(map(int, open_files()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        # The files need all that there are, and leave none for the folder.
        spare = limit - len(open_files())
        staging = queue.staging()
        for _ in range(spare):
            staging.add(ENVELOPE, claimed=True)
        return refusal_of(staging)

    assert run_in_child(commit) == f'The queue {tmp_path} cannot take the message: Too many open files'
    assert where(queue) == {}
