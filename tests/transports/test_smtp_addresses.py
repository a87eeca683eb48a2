"""A relay with several addresses: each is tried once, whatever is wrong with the others (RFC 5321 section 5.1)."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from contextlib import ExitStack

import pytest
import trustme

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.testing import EXTENSIONS, Close, Drip, ScriptedSMTPServer, Silence
from pyramid_mailqueue.transports.smtp.server import VALID_FOR
from tests.transports.stream_parts import ACCEPTED, M1, M2, play, received, transport_to

RELAY = 'relay.example'
LOGIN = {'username': 'shop', 'password': 'secret', 'tls': 'off'}

#: Seconds for all addresses but the last one; long enough for a slow machine to answer.
TIMEOUT = 4


@pytest.fixture
def relay(monkeypatch):
    """Let the name of the relay stand for some servers, in this order: each is an address of its own."""
    resolve = socket.getaddrinfo

    def relay(*servers, repeated=1):
        def of_relay(host, port, *args, **options):
            if host != RELAY:
                return resolve(host, port, *args, **options)
            found = (it for server in servers for it in resolve(server.host, server.port, *args, **options))
            return list(found) * repeated

        monkeypatch.setattr(socket, 'getaddrinfo', of_relay)

    return relay


@pytest.fixture
def serve():
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(ScriptedSMTPServer(*args, **options))


def to_relay(**options):
    return transport_to(None, **{'hostname': RELAY, 'port': 25, 'timeout': TIMEOUT, **options})


BROKEN = {
    '421 at first': {'connect': Close('421 4.3.2 closed')},
    '554 at first': {'connect': '554 5.3.2 no mail here'},
    'hangs up': {'connect': Close()},
    'silent': {'connect': Silence()},
    'no mail server': {'connect': 'HTTP/1.1 400 Bad Request'},
    'refuses EHLO': {'EHLO': '550 5.7.1 not you', 'HELO': '550 5.7.1 not you'},
    '421 to EHLO': {'EHLO': Close('421 4.3.2 closed')},
    'hangs up at EHLO': {'EHLO': Close()},
    'silent at EHLO': {'EHLO': Silence()},
}


@pytest.mark.parametrize('broken', BROKEN)
def test_the_next_address_is_tried_whatever_is_wrong_with_the_first(broken, relay, serve, caplog):
    first, second = serve(BROKEN[broken]), serve()
    relay(first, second)
    began = time.monotonic()
    with to_relay() as transport:
        course = play(transport, M1, M2)

    assert course.outcomes == [{'m1@x.example': ACCEPTED}, {'m2@x.example': ACCEPTED}]
    assert received(second) == [M1, M2]
    assert (len(first.sessions), len(second.sessions)) == (1, 1)
    assert time.monotonic() - began < TIMEOUT
    assert [record.levelname for record in caplog.records if 'the next one is tried' in record.getMessage()] == [
        'WARNING'
    ]


def test_an_address_where_nothing_listens_is_passed_over_without_a_warning(relay, serve, caplog):
    with socket.socket() as bound:
        bound.bind(('127.0.0.1', 0))
        nothing = type('Nothing', (), {'host': '127.0.0.1', 'port': bound.getsockname()[1]})
        second = serve()
        relay(nothing, second)
        with to_relay() as transport:
            play(transport, M1)

    assert received(second) == [M1]
    assert [record for record in caplog.records if record.levelname == 'WARNING'] == []


def test_an_address_that_resets_the_connection_is_passed_over_with_a_warning(relay, serve, caplog):
    with socket.create_server(('127.0.0.1', 0)) as listener:

        def reset():
            with listener.accept()[0] as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))

        thread = threading.Thread(target=reset)
        thread.start()
        first = type('Resetting', (), {'host': '127.0.0.1', 'port': listener.getsockname()[1]})
        second = serve()
        relay(first, second)
        with to_relay() as transport:
            play(transport, M1)
        thread.join()

    assert received(second) == [M1]
    assert [record.levelname for record in caplog.records if 'reset by peer' in record.getMessage()] == ['WARNING']


@pytest.fixture(scope='module')
def certificates(tmp_path_factory):
    """The file of an authority, and contexts for a server: with its certificate, and with that of another one."""
    ca, stranger = trustme.CA(), trustme.CA()
    ca_file = tmp_path_factory.mktemp('ca') / 'ca.pem'
    ca.cert_pem.write_to_path(ca_file)
    contexts = []
    for authority, name in ((ca, RELAY), (stranger, RELAY), (ca, 'other.example')):
        contexts.append(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        authority.issue_cert(name).configure_cert(contexts[-1])
    return ca_file, contexts


@pytest.mark.parametrize('mode', ['starttls', 'implicit'])
@pytest.mark.parametrize('wrong', ['another authority', 'another name', 'no TLS'])
def test_the_next_address_is_tried_after_a_wrong_certificate_and_is_held_to_the_name_too(
    wrong, mode, relay, serve, certificates
):
    ca_file, (good, *bad) = certificates
    is_implicit = mode == 'implicit'
    first = serve() if wrong == 'no TLS' else serve(tls=bad[wrong == 'another name'], implicit_tls=is_implicit)
    second = serve(tls=good, implicit_tls=is_implicit)
    relay(first, second)
    with to_relay(tls=mode, tls_ca_file=ca_file) as transport:
        play(transport, M1)

    assert first.messages == []
    assert received(second) == [M1]
    assert second.sessions[0].is_encrypted


def test_an_address_that_fails_is_not_tried_again_while_another_one_works(relay, serve):
    now = [1000.0]
    first, second = serve({'connect': Close('421 4.3.2 closed')}), serve()
    relay(first, second)
    with to_relay(clock=lambda: now[0]) as transport:
        for _ in range(5):
            play(transport, M1)
            transport.close()
        assert (len(first.sessions), len(second.sessions)) == (1, 5)

        now[0] += VALID_FOR
        play(transport, M1)
    assert (len(first.sessions), len(second.sessions)) == (2, 6)


def test_when_all_have_failed_each_is_tried_once_and_all_are_named(relay, serve):
    first, second = serve({'connect': Close('421 4.3.2 closed')}), serve({'connect': '554 5.3.2 no mail here'})
    relay(first, second)
    with to_relay() as transport:
        for times in (1, 2):
            with pytest.raises(ServerTrouble) as caught:
                transport.send(*M1[:3])
            assert (len(first.sessions), len(second.sessions)) == (times, times)

    assert 'relay.example:25 can be used at none of its addresses.' in str(caught.value)
    assert all(said in str(caught.value) for said in ('421 4.3.2 closed', '554 5.3.2 no mail here'))


def test_what_is_the_same_everywhere_is_said_once(relay, serve):
    servers = [serve({'connect': Close('421 4.3.2 closed')}) for _ in range(3)]
    relay(*servers)
    with to_relay() as transport, pytest.raises(ServerTrouble) as caught:
        transport.send(*M1[:3])

    assert str(caught.value) == 'relay.example:25 takes no mail from us: 421 4.3.2 closed.'
    assert caught.value.code == 421
    assert [len(server.sessions) for server in servers] == [1, 1, 1]


def test_an_address_that_is_named_twice_is_tried_once(relay, serve):
    server = serve({'connect': Close('421 4.3.2 closed')})
    relay(server, repeated=3)
    with to_relay() as transport, pytest.raises(ServerTrouble):
        transport.send(*M1[:3])

    assert len(server.sessions) == 1


def test_all_addresses_that_are_silent_take_less_time_than_two_servers(relay, serve):
    servers = [serve({'connect': Silence()}) for _ in range(8)]
    relay(*servers)
    began = time.monotonic()
    with to_relay(timeout=1) as transport, pytest.raises(ServerTrouble, match='no reply within'):
        transport.send(*M1[:3])

    assert [len(server.sessions) for server in servers] == [1] * 8
    assert 1 < time.monotonic() - began < 1 + 2 * 1


def test_a_server_that_gives_byte_after_byte_holds_up_the_next_address_no_longer_than_a_silent_one(relay, serve):
    first, second = serve({'connect': Drip('220 ' + 60 * 'x', pause=0.1)}), serve()
    relay(first, second)
    with to_relay(timeout=2) as transport:
        play(transport, M1)

    assert received(second) == [M1]


@pytest.mark.parametrize(('said', 'sessions'), [('535 5.7.8 no', (1, 0)), ('454 4.7.0 not now', (1, 1))])
def test_a_wrong_password_is_tried_at_one_address_and_a_login_that_cannot_be_checked_at_the_next(
    said, sessions, relay, serve, monkeypatch
):
    extensions = (*EXTENSIONS, 'AUTH PLAIN')
    first, second = serve({'AUTH': said}, extensions=extensions), serve(extensions=extensions)
    relay(first, second)
    # A login in clear text is for this host only.
    monkeypatch.setattr('pyramid_mailqueue.transports.smtp.server.is_loopback', lambda hostname: True)
    with to_relay(**LOGIN) as transport:
        course = play(transport, M1)

    assert (len(first.sessions), len(second.sessions)) == sessions
    assert (course.trouble is None) == (sessions == (1, 1))


def test_who_breaks_off_while_the_first_address_is_silent_tries_no_other(relay, serve):
    first, second = serve({'connect': Silence()}), serve()
    relay(first, second)
    with to_relay(timeout=60) as transport:
        courses = []
        thread = threading.Thread(target=lambda: courses.append(play(transport, M1)))
        thread.start()
        first.wait_for(lambda: bool(first.sessions))
        while thread.is_alive():
            # The connection may not be known yet.
            transport.abort()
            thread.join(0.05)

    assert courses[0].trouble is not None
    assert (len(first.sessions), second.sessions) == (1, [])
