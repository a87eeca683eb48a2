"""
A move that dies at any of its steps: each message is in exactly one queue, and is delivered exactly once.

It is killed before each system call that changes the directory, and before each statement, COMMIT too.  What was done
before that is what it leaves behind, so "after" a call is "before" the next one.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections import Counter
from functools import partial

import pytest
from sqlalchemy import Engine, event

from pyramid_mailqueue.queues.maildir.queue_file import QueueHeader
from pyramid_mailqueue.wiring import open_move
from tests.parts import faults
from tests.parts.children import Child
from tests.parts.move import Office, Place, break_off

pytestmark = pytest.mark.forks

STEPS = faults.CHANGES | {'fsync', 'open'}

# Every third step is tried; MAILQUEUE_TESTS_LONG=1 tries them all, and takes a few minutes.
STRIDE = 1 if os.environ.get('MAILQUEUE_TESTS_LONG') else 3


class Steps:
    """Calls *at_step* before each step of the move that is made in its block; the disk is not waited for."""

    def __init__(self, at_step):
        self._at_step = at_step

    def __enter__(self):
        self._intercepted = faults.intercepted(self._on_call)
        self._intercepted.__enter__()
        event.listen(Engine, 'before_cursor_execute', self._on_statement)

    def __exit__(self, *exc_info):
        event.remove(Engine, 'before_cursor_execute', self._on_statement)
        self._intercepted.__exit__(*exc_info)

    def _on_call(self, call):
        if call.name in STEPS:
            self._at_step(call)
        return faults.without_sync(call)

    def _on_statement(self, _connection, _cursor, statement, *_):
        self._at_step(statement)


def die_at(number):
    left = itertools.count(1)

    def at_step(_):
        if next(left) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return at_step


def move_and_die(connection, *, settings, to, number):
    """In the child."""
    with Steps(die_at(number)), open_move(settings, to=to) as work:
        work.run()
    connection.send('alive')


def content(name):
    return f'Message-ID: <{name}@site.example>\r\n\r\n{name}\r\n'.encode()


def fill(place, to, trial):
    """One batch of what waits, and a dead letter; return the contents of the former."""
    header = QueueHeader('a@x.example', ('b@x.example', 'c@x.example'), 1_700_000_000, 2, 1_700_000_009, '450 later')
    with without_waiting_for_the_disk():
        for n in range(2):
            place.put(content(f'{trial}.{n}'), header=header, deaths=n)
        place.put(content(f'{trial}.dead'), header=header, state='dead')
        if to == 'maildir':
            place.move('sql')
    return [content(f'{trial}.{n}') for n in range(2)]


def without_waiting_for_the_disk():
    return Steps(lambda _: None)


@pytest.fixture
def place(tmp_path, url):
    return Place(tmp_path / 'queue', url)


OTHER = {'sql': 'maildir', 'maildir': 'sql'}


@pytest.mark.parametrize('to', OTHER)
def test_each_message_is_in_exactly_one_queue_whenever_the_move_dies(place, to):
    """Workers deliver what they find in both queues before the next move, which goes the same way or back, by turns."""
    deaths = 0
    for number in itertools.count(1, STRIDE):
        waiting = fill(place, to, number)
        before = place.kept(OTHER[to])
        assert len(before) == 3
        with Child(partial(move_and_die, settings=place.settings, to=to, number=number)) as child:
            status = child.wait()
        assert status in (0, -signal.SIGKILL)
        office, then = Office(), to if deaths % 3 else OTHER[to]

        with without_waiting_for_the_disk():
            place.run(office, to)
            place.run(office, OTHER[to])
            place.move(then)
        left = [kept for kept in before if kept.content not in office.contents]
        assert place.kept(then) == left
        assert (place.counts(OTHER[then]), place.in_moving()) == ({}, [])

        with without_waiting_for_the_disk():
            place.run(office, then)
            assert Counter(office.contents) == Counter(waiting)
            assert place.counts(then) == {'dead': 1}
            place.delete_all()
        if status == 0:
            break
        deaths += 1
    assert deaths * STRIDE > 50


@pytest.mark.parametrize('to', OTHER)
def test_the_moves_that_settle_what_others_left_may_die_too(place, to):
    """Each of them gets further than the one before, until one comes to its end."""
    waiting = fill(place, to, 0)
    before = place.kept(OTHER[to])
    for step in itertools.count(20, 2 * STRIDE):
        with Child(partial(move_and_die, settings=place.settings, to=to, number=step)) as child:
            if child.wait() == 0:
                break
    assert step > 22
    office = Office()

    assert place.kept(to) == before
    assert (place.counts(OTHER[to]), place.in_moving()) == ({}, [])
    with without_waiting_for_the_disk():
        place.run(office, to)
    assert sorted(office.contents) == sorted(waiting)


# --- power cuts -------------------------------------------------------------


class Noted:
    """The steps that are made in its block, in words; folders are named where they are made durable."""

    def __init__(self, place):
        self._path = place.maildir.path
        self._opened = 'nothing'
        self._steps = Steps(self._note)
        self.words = []

    def __enter__(self):
        self._steps.__enter__()
        return self.words

    def __exit__(self, *exc_info):
        self._steps.__exit__(*exc_info)

    def _note(self, step):
        word = self._of_statement(step) if isinstance(step, str) else self._of_call(step)
        self.words += [word] if word else []

    def _of_statement(self, statement):
        word = statement.split()[0]
        # PostgreSQL picks the rows in a WITH before the UPDATE.
        return {'BEGIN': None, 'SELECT': None, 'PRAGMA': None, 'WITH': 'UPDATE'}.get(word, word)

    def _of_call(self, call):
        if call.name == 'fsync':
            # What was opened last is what is made durable.
            return f'fsync {self._opened}'
        if call.name == 'open':
            self._opened = self._folder(call.args[0])
            return 'decide' if '.decided-' in call.args[0] else None
        if call.name == 'rename' and '.record' not in call.args[1]:
            return ' -> '.join(map(self._folder, call.args))
        if call.name == 'unlink':
            return 'forget' if '.decided-' in call.args[0] else 'unlink'
        return None

    def _folder(self, path):
        return os.path.relpath(path, self._path).split('/')[0]


def steps_of(place, to):
    """The steps of a move of one message."""
    with Noted(place) as words, open_move(place.settings, to=to) as work:
        decisions = work._decisions
        new_batch = decisions.new_batch

        def begin_to_note():
            words.clear()
            return new_batch()

        decisions.new_batch = begin_to_note
        work.run()
    return words


STEPS_OF_MOVE = {
    'sql': """
        new -> moving, fsync moving, fsync new; INSERT, COMMIT;
        decide, fsync moving;
        unlink, fsync moving; UPDATE, COMMIT; forget
    """,
    'maildir': """
        UPDATE, COMMIT; fsync tmp, tmp -> moving, fsync moving;
        decide, fsync moving;
        DELETE, COMMIT; moving -> new, fsync new, fsync moving; forget
    """,
}


@pytest.mark.parametrize('to', STEPS_OF_MOVE)
def test_nothing_is_relied_upon_before_a_power_cut_cannot_undo_it(place, to):
    place.put(content('one'))
    if to == 'maildir':
        place.move('sql')

    made = steps_of(place, to)

    begin = made.index('UPDATE' if to == 'maildir' else 'new -> moving')
    assert made[begin:] == [step.strip() for step in re.split('[,;]', STEPS_OF_MOVE[to])]


@pytest.mark.parametrize('to', OTHER)
def test_what_a_dead_move_has_done_is_durable_before_the_next_one_relies_on_it(place, to):
    """It was killed when its decision was to be seen already, but before a power cut could not undo it."""
    place.put(content('one'))
    if to == 'maildir':
        place.move('sql')
    break_off(place, to, at='decided')

    with Noted(place) as words, open_move(place.settings, to=to) as work:
        words.clear()
        work.run()

    assert words[:2] == ['fsync .', 'fsync moving']
