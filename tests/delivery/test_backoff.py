"""The rest after a server's trouble; the clock of these tests is set by hand."""

from __future__ import annotations

import os

import pytest

from pyramid_mailqueue.delivery.backoff import BackOff
from pyramid_mailqueue.exceptions import ServerTrouble
from tests.parts.clock import Clock

TROUBLE = ServerTrouble('down')


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def pause(clock):
    return BackOff(clock=clock)


def length_of(pause, clock):
    """Go on until the pause is over; return after how many seconds that was."""
    began = clock.now
    while pause.trouble:
        clock.now += 1
    return clock.now - began


def test_without_trouble_there_is_no_pause(pause):
    assert pause.trouble is None


def test_a_pause_knows_its_trouble_until_it_is_over(pause, clock):
    pause.begin(TROUBLE)
    clock.now += 4.999
    during = pause.trouble
    clock.now += 0.001

    assert (during, pause.trouble) == (TROUBLE, None)


def test_each_pause_is_twice_the_last_up_to_five_minutes(pause, clock):
    lengths = []
    for _ in range(9):
        pause.begin(TROUBLE)
        lengths.append(length_of(pause, clock))

    # 5 seconds doubled 6 times would be 320
    assert lengths == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_trouble_during_a_pause_does_not_make_it_longer(pause, clock):
    pause.begin(TROUBLE)
    clock.now += 3
    pause.begin(ServerTrouble('another thread has seen it too'))

    assert pause.trouble is TROUBLE
    assert length_of(pause, clock) == 2


def test_a_success_ends_the_pause_and_the_next_one_is_short(pause, clock):
    for _ in range(3):
        pause.begin(TROUBLE)
        length_of(pause, clock)
    pause.begin(TROUBLE)
    pause.end()
    after_success = pause.trouble
    pause.begin(TROUBLE)

    assert after_success is None
    assert length_of(pause, clock) == 5


def test_the_lengths_can_be_set(clock):
    pause = BackOff(1, 3, clock=clock)
    lengths = []
    for _ in range(4):
        pause.begin(TROUBLE)
        lengths.append(length_of(pause, clock))

    assert lengths == [1, 2, 3, 3]


# A thread of an earlier test may still be there.
@pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning')
def test_a_child_that_is_forked_while_a_thread_looks_can_look_too(pause):
    with pause._lock:
        child = os.fork()
        if not child:
            os._exit(0 if pause.trouble is None else 1)
        status = os.waitpid(child, 0)[1]

    assert status == 0
