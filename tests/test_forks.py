"""What a forked child does with what it inherited."""

from __future__ import annotations

import gc
import os
import weakref

import pytest

from pyramid_mailqueue import enqueue_message, forks
from pyramid_mailqueue.forks import call_in_children

# Other tests may have left threads behind; these children do nothing that could wait for one.
pytestmark = pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning')


class Inheritance:
    """Whatever it is told to forget, it tells of."""

    def __init__(self, fd):
        self.fd = fd

    def forget(self):
        os.write(self.fd, f'{os.getpid()} '.encode())


def told_by_a_child():
    """The ids of the processes that told anything while a child was forked and ended, and the id of that child."""
    reader, writer = os.pipe()
    yield writer
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    told = os.read(reader, 1000).decode().split()
    os.close(reader)
    yield told, str(child)


def test_a_method_is_called_in_the_child_and_only_there():
    fork = told_by_a_child()
    inheritance = Inheritance(next(fork))
    call_in_children(inheritance.forget)
    told, child = next(fork)

    assert told == [child]


def test_an_object_that_is_gone_is_not_kept_alive_for_it():
    fork = told_by_a_child()
    inheritance = Inheritance(next(fork))
    call_in_children(inheritance.forget)
    reference = weakref.ref(inheritance)
    del inheritance
    gc.collect()
    told, _ = next(fork)

    assert reference() is None
    assert told == []


def test_there_is_one_hook_for_all_and_it_forgets_what_is_gone(tmp_path, monkeypatch):
    hooks = []
    monkeypatch.setattr(os, 'register_at_fork', lambda **hook: hooks.append(hook))
    before = len(forks._inherited)

    for _ in range(50):
        enqueue_message(b'\r\nHello', tmp_path / 'queue', 'shop@site.example', ['ada@x.example'])

    # Without waiting for the garbage collector.
    assert (hooks, len(forks._inherited)) == ([], before)


def test_one_that_fails_keeps_no_other_from_its_turn():
    fork = told_by_a_child()
    writer = next(fork)
    broken, inheritance = Inheritance('no descriptor'), Inheritance(writer)
    call_in_children(broken.forget)
    call_in_children(inheritance.forget)
    told, child = next(fork)

    assert told == [child]
