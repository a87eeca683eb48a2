"""The same errors, from a real kernel."""

from __future__ import annotations

import os
import resource
import subprocess
from functools import partial

import pytest

from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.results import Settlement
from tests.parts.children import no_open_files_are_left, open_files, run_in_child
from tests.parts.drain import fill, letters, mq_run
from tests.parts.maildir import ENVELOPE, LATER, Told, at, names, where

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
        limit = 2 + max(map(int, open_files()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        staging = queue.staging()
        staging.add(ENVELOPE, claimed=True)
        # The first one needs the last file that there is.
        staging.add(ENVELOPE, claimed=True)
        spare = [os.dup(0) for _ in range(limit - 1 - len(open_files()))]
        try:
            return refusal_of(staging)
        finally:
            for fd in spare:
                os.close(fd)

    assert run_in_child(commit) == f'The queue {tmp_path} cannot take the message: Too many open files'
    assert where(queue) == {}


def test_who_may_open_few_files_claims_few_messages_and_can_write_what_becomes_of_them(tmp_path, caplog):
    queue = MaildirQueue(tmp_path)
    told = Told(caplog)

    def claim_and_defer():
        limit = 20 + max(map(int, open_files()))
        fill(queue, letters(limit))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        claims = []
        with pytest.raises(QueueError) as refusal:
            claims.extend(queue.claim_due(LATER))
        for taken in reversed(claims):
            taken.settle(Settlement(taken.envelope.recipients, due=LATER))
        queue.flush()
        return limit, str(refusal.value), told()

    limit, refusal, events = run_in_child(claim_and_defer)

    assert refusal == (
        f'The folder {tmp_path} cannot be used: Too many open files. '
        f'This process may have {limit} files open: let it have more (LimitNOFILE= for systemd, else ulimit -n).'
    )
    assert events == []
    assert where(queue) == {'new': limit}
    due = [at(queue, 'new', name).stat().st_mtime for name in names(queue, 'new')]
    assert 0 < due.count(LATER) < limit


def test_mq_run_that_may_open_too_few_files_says_so_in_one_line(tmp_path, office):
    queue = MaildirQueue(tmp_path / 'queue')
    fill(queue, letters(40))
    # Even the first message would be one of the last files.
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (7, 7))

    run = subprocess.run(mq_run(queue, office), preexec_fn=limit, capture_output=True, text=True, check=False)

    assert run.returncode == 75, run.stderr
    assert run.stderr.startswith(f'mq-run: The folder {queue.path}')
    assert 'Too many open files. This process may have 7 files open: let it have more' in run.stderr
    assert run.stderr.count('\n') == 1
    assert where(queue) == {'new': 40}
