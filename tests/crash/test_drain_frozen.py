"""A run is stopped (SIGSTOP) while another one works on the same queue, and goes on afterwards."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess

import pytest

from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.results import Recovery
from tests.parts.children import DEADLINE, fork
from tests.parts.drain import assert_is_made_good, blaming, drain, fill, mq_run, named_in
from tests.parts.faults import Freeze

pytestmark = pytest.mark.forks


@pytest.fixture
def queue(tmp_path):
    return MaildirQueue(tmp_path / 'queue')


def test_a_run_that_is_frozen_at_any_call_keeps_its_messages_and_takes_none_that_are_done(queue, office):
    # Those with which it learns how things are, or changes them for others.
    calls = {'flock', 'open', 'rename', 'scandir', 'send', 'stat', 'unlink'}
    for number in itertools.count(1):
        fill(queue)
        office.open_for(1)
        freeze = Freeze(number, calls)
        child = fork(lambda freeze=freeze: drain(queue.path, office, around=freeze))
        with blaming(freeze):
            was_frozen = meanwhile(child, lambda: drain(queue.path, office))
            assert_is_made_good(queue, office, in_hand=0)
        if not was_frozen:
            break
    assert number > 80


def meanwhile(child, run):
    """Run while a child is frozen, and let it live to its end; return False if it is never frozen."""
    _, status = os.waitpid(child, os.WUNTRACED)
    is_frozen = os.WIFSTOPPED(status)
    if is_frozen:
        try:
            assert run().recovery == Recovery(), 'who is frozen is not dead'
        finally:
            os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, 0)
    assert status == 0
    return is_frozen


def test_mq_run_that_is_frozen_over_a_message_delivers_it_when_it_goes_on(queue, office, make_event):
    fill(queue)
    reached, go_on = make_event(), make_event()
    contents = itertools.count(1)

    def answer(command):
        if next(contents) == 2:
            reached.set()
            go_on.wait()

    office.server.script['.'] = answer
    first = subprocess.Popen(mq_run(queue, office))
    try:
        assert reached.wait(DEADLINE)
        first.send_signal(signal.SIGSTOP)
        os.waitpid(first.pid, os.WUNTRACED)

        subprocess.run(mq_run(queue, office), check=True)

        # One is with the server, and the next one was spoken of.
        assert {name for name, _ in named_in(queue, 'cur')} == {'mixed', 'bounce'}
        go_on.set()
        first.send_signal(signal.SIGCONT)
        assert first.wait(DEADLINE) == 0
    finally:
        first.kill()
        first.wait()

    assert_is_made_good(queue, office, in_hand=0)
