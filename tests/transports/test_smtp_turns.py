"""Threads that take turns: who waits for a server is in nobody's way, and neither is anything that hangs."""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager
from queue import SimpleQueue

import pytest

from pyramid_mailqueue.delivery.results import Offer
from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.testing import Close, ScriptedSMTPServer, Wait
from pyramid_mailqueue.transports.smtp import SMTPTransport
from pyramid_mailqueue.transports.smtp_turns import Turns

#: Seconds; for what must happen, on a slow machine too.
LONG = 30


@pytest.fixture(autouse=True)
def turns(monkeypatch):
    """The turns of every transport; the courtesy is long, so that a turn which nobody gives up is seen."""
    turns = Turns()
    monkeypatch.setattr('pyramid_mailqueue.transports.smtp_pool.Turns', lambda: turns)
    monkeypatch.setattr('pyramid_mailqueue.transports.smtp_turns.COURTESY', LONG)
    return turns


@contextmanager
def transport_to(server):
    with closing(SMTPTransport(hostname=server.host, port=server.port, tls='off', local_hostname='c.example')) as it:
        yield it


def offer(name='a'):
    return Offer(f'{name}@site.example', (f'{name}@x.example',), b'Subject: x\r\n\r\nHello\r\n')


def stream(transport, *offers):
    left = list(offers)
    return transport.stream(left.pop(0), lambda: left.pop(0) if left else None)


def is_free(turns):
    turn = turns.new()
    try:
        return turn.take()
    finally:
        turn.give_up()


def test_one_thread_at_a_time_has_its_turn(turns, monkeypatch):
    first, second = turns.new(), turns.new()
    assert first.take()
    monkeypatch.setattr('pyramid_mailqueue.transports.smtp_turns.COURTESY', 0.001)
    assert not second.take()
    second.give_up()
    assert not second.take()
    first.give_up()
    assert second.take()


def test_who_gives_up_twice_takes_nothing_from_others(turns, monkeypatch):
    first, second, third = turns.new(), turns.new(), turns.new()
    assert first.take()
    first.give_up()
    assert second.take()
    first.give_up()
    monkeypatch.setattr('pyramid_mailqueue.transports.smtp_turns.COURTESY', 0.001)
    assert not third.take()


def test_who_waits_for_a_server_lets_others_have_their_turn(turns):
    goes_on = threading.Event()
    with ScriptedSMTPServer({'MAIL': Wait(goes_on)}) as server, transport_to(server) as transport:
        done = SimpleQueue()
        thread = threading.Thread(target=lambda: done.put(list(stream(transport, offer()))))
        thread.start()
        server.wait_for(
            lambda: any(it.commands[-1:] == ['MAIL FROM:<a@site.example> SIZE=21'] for it in server.sessions)
        )
        assert is_free(turns)
        goes_on.set()
        assert len(done.get(timeout=LONG)) == 1
        thread.join()


@pytest.mark.parametrize('answer', [None, '550 5.1.1 no such user', Close('421 4.3.2 bye'), Close()])
def test_a_stream_that_is_over_has_given_up_its_turn(turns, answer):
    with ScriptedSMTPServer({'RCPT': answer}) as server, transport_to(server) as transport:
        try:
            list(stream(transport, offer('a'), offer('b')))
        except ServerTrouble:
            assert isinstance(answer, Close)
        assert is_free(turns)


def test_a_stream_that_is_left_early_has_given_up_its_turn(turns):
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        results = stream(transport, offer('a'), offer('b'), offer('c'))
        next(results)
        results.close()
        assert is_free(turns)


def test_what_hangs_between_two_messages_holds_up_nobody(turns, monkeypatch):
    monkeypatch.setattr('pyramid_mailqueue.transports.smtp_turns.COURTESY', 0.001)
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        hanging = stream(transport, offer('a'), offer('b'))
        next(hanging)
        assert [result.trouble for result in stream(transport, offer('c'), offer('d'))] == [None, None]
        assert [result.trouble for result in hanging] == [None]
    assert {message.sender[0] for message in server.messages} == {'a', 'b', 'c', 'd'}
