"""One thread that waits for several servers, and works that block."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading

import pytest

from pyramid_mailqueue.delivery import waiting
from pyramid_mailqueue.delivery.waiting import ABOUT_TO_BLOCK, Loop, Wait, without_waits

LONG = 60


class Peer:
    """A server of whom a work waits for one octet after the other."""

    def __init__(self):
        self.ours, self.theirs = socket.socketpair()

    def say(self):
        self.theirs.send(b'.')

    def wait(self, seconds=LONG):
        return Wait(self.ours.fileno(), select.POLLIN, seconds)

    def hear(self):
        self.ours.recv(1)

    def close(self):
        self.ours.close()
        self.theirs.close()


class Office:
    """Starts works in a loop, and knows in which threads they went on."""

    def __init__(self, until):
        self.loop = Loop()
        self._until = until
        self.peers = []
        self.threads = {}
        self._others = set(threading.enumerate())
        self._ended = threading.Semaphore(0)
        self._number = 0

    def start(self, steps):
        """Start ``steps(peer)``, which yields waits; return its peer."""
        peer = Peer()
        self.peers.append(peer)
        self._number += 1
        self.loop.start(self._work(steps, peer))
        return peer

    def _work(self, steps, peer):
        try:
            for step in steps(peer):
                yield step
                self.threads.setdefault(peer, []).append(threading.get_ident())
        finally:
            self._ended.release()

    def wait_for_all(self):
        for _ in range(self._number):
            assert self._ended.acquire(timeout=LONG)

    def gather(self):
        """Wait until all that is left is the thread of the loop: everything waits there."""
        self._until(lambda: len(set(threading.enumerate()) - self._others) == 1)

    def is_over(self):
        """Wait until no thread is left; whether the loop has put everything away."""
        self._until(lambda: set(threading.enumerate()) <= self._others)
        return self.loop._bell is None

    def wait_for_steps(self, peer, number):
        self._until(lambda: len(self.threads.get(peer, ())) >= number)

    def close(self):
        for peer in self.peers:
            peer.close()


@pytest.fixture
def office(until):
    office = Office(until)
    yield office
    office.close()


def hears(number):
    """A work that waits for so many octets."""

    def steps(peer):
        for _ in range(number):
            yield peer.wait()
            peer.hear()

    return steps


def test_works_that_wait_go_on_in_one_thread(office):
    peers = [office.start(hears(3)) for _ in range(4)]
    office.gather()
    for _ in range(3):
        for peer in peers:
            peer.say()
    office.wait_for_all()

    assert len({ident for idents in office.threads.values() for ident in idents}) == 1
    assert office.is_over()


def test_each_goes_on_when_its_own_server_has_spoken(office):
    slow, fast = office.start(hears(1)), office.start(hears(5))
    for _ in range(5):
        fast.say()
    office.wait_for_steps(fast, 5)

    assert slow not in office.threads
    slow.say()
    office.wait_for_all()


def test_who_has_waited_long_enough_goes_on(office):
    def steps(peer):
        yield peer.wait(0.05)

    other = office.start(hears(1))
    office.wait_for_steps(office.start(steps), 1)

    assert other not in office.threads
    other.say()
    office.wait_for_all()


def test_a_work_that_blocks_keeps_nobody_waiting(office):
    go_on = threading.Event()

    def blocks(peer):
        yield peer.wait()
        yield ABOUT_TO_BLOCK
        assert go_on.wait(LONG)

    blocked, other = office.start(blocks), office.start(hears(2))
    office.gather()
    blocked.say()
    office.wait_for_steps(blocked, 2)
    other.say()
    office.wait_for_steps(other, 1)
    go_on.set()
    other.say()
    office.wait_for_all()

    (in_loop, by_itself) = office.threads[blocked]
    assert by_itself != in_loop
    assert set(office.threads[other]) == {in_loop}
    assert office.is_over()


def test_the_last_one_blocks_in_the_thread_where_it_is(office):
    def steps(peer):
        for _ in range(3):
            yield peer.wait()
            peer.hear()
            yield ABOUT_TO_BLOCK

    peer = office.start(steps)
    for _ in range(3):
        peer.say()
    office.wait_for_all()

    assert len(set(office.threads[peer])) == 1
    assert office.is_over()


def test_who_comes_back_from_blocking_may_wait_for_something_else(office):
    second = Peer()
    office.peers.append(second)

    def steps(peer):
        yield peer.wait()
        peer.close()
        yield ABOUT_TO_BLOCK
        yield second.wait()
        second.hear()

    other = office.start(hears(1))
    office.start(steps).say()
    second.say()
    other.say()
    office.wait_for_all()
    assert office.is_over()


def test_a_work_may_wait_for_something_else_in_the_loop_too(office):
    second = Peer()
    office.peers.append(second)

    def steps(peer):
        yield peer.wait()
        yield second.wait()
        second.hear()
        yield Wait(second.ours.fileno(), select.POLLOUT, LONG)

    office.start(hears(1))
    office.start(steps).say()
    second.say()
    office.peers[1].say()
    office.wait_for_all()
    assert office.is_over()


def test_where_there_can_be_no_more_threads_who_blocks_is_closed_and_the_others_go_on(office, until, monkeypatch):
    closed = []

    def blocks(peer):
        try:
            yield peer.wait()
            yield ABOUT_TO_BLOCK
        except GeneratorExit:
            closed.append(peer)

    def no_more(work):
        raise RuntimeError("can't start new thread")

    blocked, other = office.start(blocks), office.start(hears(1))
    office.gather()
    monkeypatch.setattr(office.loop, 'start', no_more)
    blocked.say()
    until(lambda: closed)
    other.say()
    office.wait_for_all()

    assert closed == [blocked]
    assert office.is_over()


def test_where_there_are_too_many_open_files_each_waits_in_its_own_thread(office, monkeypatch):
    def too_many():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(waiting.os, 'pipe', too_many)
    peers = [office.start(hears(2)) for _ in range(3)]
    for _ in range(2):
        for peer in peers:
            peer.say()
    office.wait_for_all()

    assert len({ident for idents in office.threads.values() for ident in idents}) == 3


def test_what_is_no_wait_is_given_and_the_rest_waited_for():
    peer, ended = Peer(), []

    def steps():
        try:
            yield 1
            yield ABOUT_TO_BLOCK
            yield peer.wait()
            peer.hear()
            yield 2
            yield 3
        finally:
            ended.append(True)

    peer.say()
    results = without_waits(steps())
    assert [next(results), next(results)] == [1, 2]
    results.close()

    assert ended == [True]
    peer.close()
