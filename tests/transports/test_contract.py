"""What every transport and every connection has to do; see `ITransport` and `IConnection`."""

from __future__ import annotations

import select
import threading
from types import SimpleNamespace

import pytest
from zope.interface.verify import verifyObject

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.interfaces import IConnection, ITransport
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.results import Burial, Offer, Reply, SendResult
from pyramid_mailqueue.testing import Close, ScriptedSMTPServer
from pyramid_mailqueue.testing.outbox import AcceptingTransport
from pyramid_mailqueue.transports.base import as_transport, run
from pyramid_mailqueue.transports.debug import DebugInbox
from pyramid_mailqueue.transports.maildir import MaildirBackend
from pyramid_mailqueue.transports.redirect import redirecting
from pyramid_mailqueue.transports.smtp import SMTPTransport
from tests.parts.connections import Streams

ADA, BOB = 'ada@x.example', 'bob@x.example'
CONTENT = b'Subject: hello\r\nMessage-ID: <1@site.example>\r\n\r\nHello\r\n'

WITHOUT_CONNECTIONS = ['inbox', 'maildir', 'testing', 'plain', 'redirected inbox']
WITH_CONNECTIONS = ['smtp', 'redirected smtp', 'a whole one']

over_smtp = pytest.mark.parametrize('name', ['smtp', 'redirected smtp'])


def offer(*recipients, sender='shop@site.example', is_valid=lambda: True):
    return Offer(sender, recipients or (ADA,), CONTENT, is_valid)


def used(transport):
    """A connection that has sent a message."""
    connection = transport.connect()
    connection.submit(offer())
    assert run(connection)
    return connection


@pytest.fixture
def server():
    with ScriptedSMTPServer() as server:
        yield server


@pytest.fixture
def make_transport(server, tmp_path):
    made = []

    def make_transport(name):
        def smtp():
            return SMTPTransport(hostname=server.host, port=server.port, tls='off', local_hostname='c.example')

        transport = {
            'smtp': smtp,
            'redirected smtp': lambda: redirecting(smtp(), 'me@site.example'),
            'a whole one': lambda: Streams(SendResult({ADA: Reply(250, 'ok')})),
            'inbox': lambda: DebugInbox(tmp_path / 'inbox'),
            'redirected inbox': lambda: redirecting(DebugInbox(tmp_path / 'inbox'), 'me@site.example'),
            'maildir': lambda: MaildirBackend(tmp_path / 'queue'),
            'testing': AcceptingTransport,
            'plain': lambda: as_transport(SimpleNamespace(send=lambda *message: True)),
        }[name]()
        made.append(transport)
        return transport

    yield make_transport
    for transport in made:
        transport.close()


@pytest.fixture(params=[*WITHOUT_CONNECTIONS, *WITH_CONNECTIONS])
def transport(request, make_transport):
    return make_transport(request.param)


@pytest.fixture(params=WITHOUT_CONNECTIONS)
def plain(request, make_transport):
    return make_transport(request.param)


@pytest.fixture(params=WITH_CONNECTIONS)
def connecting(request, make_transport):
    return make_transport(request.param)


# --- a transport ------------------------------------------------------------


def test_it_has_every_member(transport):
    assert verifyObject(ITransport, transport, tentative=True)
    assert transport.name
    assert '\n' not in transport.name


def test_one_without_connections_sends(plain):
    assert plain.connect() is None
    assert plain.send('shop@site.example', (ADA, BOB), CONTENT)


@over_smtp
def test_one_with_connections_may_also_be_asked_to_send(make_transport, server, name):
    result = make_transport(name).send('shop@site.example', (ADA, BOB), CONTENT)

    assert result.replies.keys() == {ADA, BOB}
    assert len(server.messages) == 1


def test_it_can_be_used_again_when_it_was_closed_reloaded_or_aborted(transport):
    for _ in range(2):
        transport.reload()
        transport.abort()
        transport.close()

    connection = transport.connect()
    if connection is None:
        assert transport.send('shop@site.example', (ADA,), CONTENT)
    else:
        connection.submit(offer())
        assert run(connection)
        connection.release()


def test_it_leads_to_its_own_queue_and_to_no_other(transport, tmp_path):
    own = isinstance(transport, MaildirBackend)

    assert transport.leads_to(MaildirQueue(tmp_path / 'queue')) is own
    assert transport.leads_to(MaildirQueue(tmp_path / 'another one')) is False


def test_it_says_whether_it_keeps_a_dead_letter(transport, tmp_path):
    burials = (Burial((ADA,), '550 5.1.1 no such user'),)

    is_kept = transport.bury('shop@site.example', CONTENT, burials)

    assert is_kept is isinstance(transport, MaildirBackend)
    assert MaildirQueue(tmp_path / 'queue').counts()['dead'] == is_kept


def test_several_threads_may_send_at_once(plain):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(plain.send('shop@site.example', (ADA,), CONTENT)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [bool(result) for result in results] == [True] * 4


# --- a connection -----------------------------------------------------------


@pytest.fixture
def connection(connecting):
    connection = connecting.connect()
    yield connection
    connection.release()


def test_a_connection_has_every_member(connection):
    assert verifyObject(IConnection, connection, tentative=True)
    assert connection.fileno() >= 0
    assert connection.has_room
    assert (connection.is_spent, connection.needs_new) == (False, False)


def test_it_says_what_it_waits_for(connection):
    connection.submit(offer())
    assert list(connection.advance()) == []

    events, seconds = connection.wait()

    assert events & select.POLLIN
    assert 0 < seconds <= 600


def test_the_results_come_in_the_order_of_the_offers_each_when_it_is_there(connection):
    connection.submit(offer())
    connection.submit(offer(sender='other@site.example'))
    assert not connection.has_room, 'one is under way, and one announced'

    results = [run(connection)]
    assert connection.has_room
    connection.submit(offer())
    results += [run(connection), run(connection)]

    assert [result.accepted for result in results] == [(ADA,)] * 3


@over_smtp
def test_what_is_announced_has_not_been_sent_when_the_result_before_it_is_there(make_transport, server, name):
    connection = make_transport(name).connect()
    connection.submit(offer())
    connection.submit(offer(BOB))

    assert run(connection).accepted == (ADA,)
    connection.release()

    server.wait_for(lambda: server.sessions[0].is_over)
    assert len(server.messages) == 1


@over_smtp
def test_trouble_is_in_the_last_result_and_what_was_announced_is_untouched(make_transport, server, name):
    server.script['DATA'] = Close('421 4.3.2 going down')
    connection = make_transport(name).connect()
    connection.submit(offer())
    connection.submit(offer(BOB))

    result = run(connection)

    assert (result.replies, result.trouble.code, result.trouble.in_message) == ({}, 421, True)
    assert not connection.has_room
    assert server.messages == []
    connection.release()


@over_smtp
def test_a_session_that_the_server_has_ended_between_two_messages_is_spent_and_replaced(make_transport, server, name):
    server.script['MAIL'] = [None, Close('421 4.7.0 that is enough')]
    transport = make_transport(name)
    connection = used(transport)
    connection.submit(offer(BOB))

    assert run(connection) is None
    assert (connection.is_spent, connection.needs_new, connection.has_room) == (True, False, False)
    connection.release()

    another = transport.connect(connection)
    another.submit(offer(BOB))
    assert run(another).accepted == (BOB,)
    another.release()


@over_smtp
def test_a_refusal_that_may_be_about_the_session_needs_a_new_one(make_transport, server, name):
    server.script['MAIL'] = [None, '451 4.7.0 too many messages in this session']
    transport = make_transport(name)
    connection = used(transport)
    connection.submit(offer(BOB))

    assert run(connection) is None
    assert (connection.is_spent, connection.needs_new) == (True, True)
    connection.release()


@over_smtp
def test_a_message_that_is_not_ours_any_more_is_not_completed(make_transport, server, name):
    connection = make_transport(name).connect()
    connection.submit(offer(is_valid=lambda: False))

    result = run(connection)
    connection.release()

    assert (result.replies, result.trouble is None) == ({}, False)
    server.wait_for(lambda: server.sessions[0].is_over)
    assert server.messages == []


@over_smtp
def test_abort_ends_what_is_under_way_and_keeps_what_is_idle(make_transport, server, make_event, name):
    go_on = make_event()
    transport = make_transport(name)
    busy, idle = transport.connect(), used(transport)
    idle.release()
    server.script['.'] = lambda command: go_on.wait(30) and None
    busy.submit(offer(BOB))
    timer = threading.Timer(0.2, transport.abort)
    timer.start()

    result = run(busy)
    go_on.set()
    busy.release()
    timer.join()

    assert result.trouble is not None
    del server.script['.']
    used(transport).release()
    assert len(server.sessions) == 2


@over_smtp
def test_a_server_that_cannot_be_used_is_trouble(make_transport, server, name):
    server.script['connect'] = Close('421 4.3.2 closed')

    with pytest.raises(ServerTrouble, match='421'):
        make_transport(name).connect()


@over_smtp
def test_a_released_connection_is_used_for_the_next_message(make_transport, server, name):
    transport = make_transport(name)
    for _ in range(3):
        used(transport).release()

    assert len(server.sessions) == 1
