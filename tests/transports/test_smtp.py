"""The SMTP transport against real servers on real sockets: aiosmtpd where one is to agree, a scripted one elsewhere."""

from __future__ import annotations

import base64
import hmac
import logging
import os
import queue
import re
import select
import socket
import ssl
import struct
import threading
import time
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from itertools import count
from types import SimpleNamespace

import pytest
import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from zope.interface.verify import verifyObject

from pyramid_mailqueue.exceptions import AddressError, ConfigurationError, ServerTrouble
from pyramid_mailqueue.interfaces import ITransport
from pyramid_mailqueue.results import Offer, Reply
from pyramid_mailqueue.testing import Close, Drip, ReceivedMessage, ScriptedSMTPServer, Silence, Wait
from pyramid_mailqueue.transports.base import run
from pyramid_mailqueue.transports.smtp.client import Connector
from pyramid_mailqueue.transports.smtp.server import Server, shut_down
from pyramid_mailqueue.transports.smtp.transport import SMTPTransport, tls_mode

A, B, C = 'a@x.example', 'b@x.example', 'c@x.example'
SENDER = 'sender@site.example'
CONTENT = b'Subject: s\r\n\r\nhello\r\n.\r\n..and goodbye\r\n'

# Far away, as the transport sees it; connections to it come out at a server on this host.
REMOTE = 'mail.example'

#: Seconds; long enough for a slow machine to answer, short enough to wait for.
SHORT = 1


def to_loopback(address, timeout):
    return socket.create_connection(('127.0.0.1', address[1]), timeout)


@contextmanager
def transport_to(server, **options):
    """A transport to *server*, in clear text unless the options say otherwise."""
    options = {'hostname': server.host, 'port': server.port, 'tls': 'off', **options}
    with closing(SMTPTransport(**options)) as transport:
        yield transport


def codes(result):
    return {recipient: reply.code for recipient, reply in result.replies.items()}


def verbs(session):
    return [command.partition(' ')[0].upper() for command in session.commands]


# --- certificates ---


@pytest.fixture(scope='session')
def authority(tmp_path_factory):
    """A private authority: its file, and contexts for servers with certificates good and bad."""
    ca, stranger = trustme.CA(), trustme.CA()
    ca_file = tmp_path_factory.mktemp('authority') / 'ca.pem'
    ca.cert_pem.write_to_path(ca_file)
    past = datetime.now(timezone.utc) - timedelta(days=1)
    certificates = {
        'good': ca.issue_cert(REMOTE, '127.0.0.1'),
        'from another authority': stranger.issue_cert(REMOTE),
        'for another host': ca.issue_cert('other.example'),
        'expired': ca.issue_cert(REMOTE, not_before=past - timedelta(days=1), not_after=past),
    }
    contexts = {}
    for name, certificate in certificates.items():
        contexts[name] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(contexts[name])
    return SimpleNamespace(file=ca_file, contexts=contexts, good=contexts['good'])


def trusting(authority, **options):
    """The options of a transport that reaches a server called mail.example, whose authority it knows."""
    return {'hostname': REMOTE, 'tls': 'starttls', 'tls_ca_file': authority.file, 'connect': to_loopback, **options}


# --- a real server ---


class RealServer(Controller):
    """aiosmtpd on a port that the system chooses."""

    def __init__(self, **options):
        self.messages = []
        self.sessions = set()
        super().__init__(self, hostname='127.0.0.1', port=0, ready_timeout=10, **options)

    @property
    def host(self):
        return self.hostname

    def _trigger_server(self):
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()

    async def handle_DATA(self, server, session, envelope):
        self.sessions.add(session)
        self.messages.append(
            ReceivedMessage(envelope.mail_from.strip('<>'), tuple(envelope.rcpt_tos), envelope.original_content)
        )
        return '250 2.0.0 taken'

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.startswith('nobody'):
            return '550 5.1.1 unknown'
        envelope.rcpt_tos.append(address)
        return '250 2.1.5 ok'


@contextmanager
def real_server(**options):
    server = RealServer(**options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def password_checker(server, session, envelope, mechanism, data):
    good = (data.login, data.password) == (b'user', 'pässword'.encode())
    return AuthResult(success=good, handled=False)


# --- one message ---


def test_the_transport_is_what_its_interface_says():
    assert verifyObject(ITransport, SMTPTransport(hostname='localhost'))


def test_a_message_reaches_a_real_server_byte_for_byte():
    with real_server() as server, transport_to(server) as transport:
        result = transport.send(SENDER, (A, 'nobody@x.example', B), CONTENT)
        null = transport.send('', (A,), b'Subject: null\r\n\r\n')

    assert server.messages == [
        ReceivedMessage(SENDER, (A, B), CONTENT),
        ReceivedMessage('', (A,), b'Subject: null\r\n\r\n'),
    ]
    assert list(result.replies.items()) == [
        (A, Reply(250, 'taken', '2.0.0')),
        ('nobody@x.example', Reply(550, 'unknown', '5.1.1')),
        (B, Reply(250, 'taken', '2.0.0')),
    ]
    assert result.transport == f'smtp:127.0.0.1:{server.port}'
    assert result.trouble is None
    assert null
    assert len(server.sessions) == 1


def test_with_pipelining_a_message_takes_two_round_trips_and_two_writes():
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        transport.send(SENDER, (A, B), CONTENT)
        (session,) = server.sessions
        round_trips, reads = session.round_trips, len(session.reads)
        transport.send(SENDER, (A, B), CONTENT)

        assert session.round_trips - round_trips == 2
        assert len(session.reads) - reads == 2
        assert len(server.messages) == 2


def test_without_pipelining_each_command_takes_a_round_trip():
    with ScriptedSMTPServer(extensions=()) as server, transport_to(server) as transport:
        transport.send(SENDER, (A, B), CONTENT)

    (session,) = server.sessions
    assert session.round_trips == 1 + len(['MAIL', 'RCPT', 'RCPT', 'DATA', 'content']) + 1
    assert server.messages[0].content == CONTENT


def test_a_server_that_knows_only_helo_is_greeted_with_that():
    with ScriptedSMTPServer({'EHLO': '500 what'}) as server, transport_to(server) as transport:
        assert transport.send(SENDER, (A,), CONTENT)

    assert verbs(server.sessions[0]) == ['EHLO', 'HELO', 'MAIL', 'RCPT', 'DATA', 'QUIT']


def test_a_large_message_arrives_whole():
    content = b'Subject: large\r\n\r\n' + (b'.' + b'x' * 996 + b'\r\n') * 25_000
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        assert transport.send(SENDER, (A,), content)

    assert server.messages[0].content == content


def test_a_large_message_arrives_whole_over_tls(authority):
    content = b'Subject: large\r\n\r\n' + (b'.' + b'x' * 996 + b'\r\n') * 25_000
    with (
        ScriptedSMTPServer(tls=authority.good) as server,
        transport_to(server, **trusting(authority)) as transport,
    ):
        assert transport.send(SENDER, (A,), content)

    assert server.messages[0].content == content


def test_an_address_that_could_break_out_of_its_command_is_refused_and_the_session_goes_on():
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        with pytest.raises(AddressError):
            transport.send(SENDER, ('a@x.example\r\nRSET',), CONTENT)
        assert transport.send(SENDER, (A,), CONTENT)

    assert len(server.sessions) == 1
    assert verbs(server.sessions[0]) == ['EHLO', 'MAIL', 'RCPT', 'DATA', 'QUIT']


def test_a_message_that_the_server_cannot_take_by_its_own_word_is_refused_unsaid():
    with ScriptedSMTPServer(extensions=('SIZE 10',)) as server, transport_to(server) as transport:
        result = transport.send(SENDER, (A, B), CONTENT)

    assert codes(result) == {A: 552, B: 552}
    assert verbs(server.sessions[0]) == ['EHLO', 'QUIT']


# --- a connection that is broken off while it is opened ---


@pytest.mark.parametrize(
    ('tls', 'script', 'sockets', 'last_heard'),
    [
        ('off', {'connect': ''}, 1, b''),
        ('off', {'EHLO': ''}, 1, b'EHLO me.example\r\n'),
        ('off', {'AUTH': ''}, 1, b'AUTH PLAIN'),
        # The first bytes of a handshake that the server does not answer (RFC 8446 section 5.1).
        ('implicit', {'connect': ''}, 2, b'\x16\x03'),
        ('starttls', {'STARTTLS': '220 go'}, 2, b'\x16\x03'),
    ],
    ids=['no greeting', 'no answer to EHLO', 'no answer to AUTH', 'no handshake', 'no handshake after STARTTLS'],
)
def test_a_connection_can_be_broken_off_while_it_is_opened(tls, script, sockets, last_heard):
    told, outcome = queue.Queue(), queue.Queue()

    def connect():
        try:
            connector.connect(told.put)
        except ServerTrouble as trouble:
            outcome.put(trouble)

    with ScriptedSMTPServer(script, extensions=('STARTTLS', 'AUTH PLAIN')) as server:
        where = Server(server.host, server.port, 10, 300, 600, time.monotonic, socket.create_connection)
        credentials = ('user', 'secret') if tls == 'off' else None
        connector = Connector(where, tls=tls, local_hostname='me.example', credentials=credentials)
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        for _ in range(sockets):
            sock = told.get(timeout=10)
        server.wait_for(lambda: bool(server.sessions) and last_heard in server.sessions[0].received)
        shut_down(sock)

        assert outcome.get(timeout=10).code is None
        assert told.empty()
        thread.join()
        assert sock.fileno() == -1


def test_a_connection_is_not_opened_if_that_is_vetoed(authority):
    told = []

    def veto(sock):
        told.append(sock)
        if len(told) == 2:
            raise ServerTrouble('not now')

    with ScriptedSMTPServer(tls=authority.good, implicit_tls=True) as server:
        where = Server(REMOTE, server.port, 10, 300, 600, time.monotonic, to_loopback)
        with pytest.raises(ServerTrouble, match='not now'):
            Connector(where, tls='implicit', tls_ca_file=authority.file).connect(veto)

    assert [sock.fileno() for sock in told] == [-1, -1]


def test_a_socket_that_came_too_late_is_shut_down_where_one_is_told_of_it(authority):
    with ScriptedSMTPServer(tls=authority.good) as server:
        where = Server(server.host, server.port, 10, 300, 600, time.monotonic, socket.create_connection)
        with pytest.raises(ServerTrouble):
            Connector(where, tls='opportunistic').connect(shut_down)


def test_nothing_goes_out_in_clear_text_while_a_session_is_broken_off(authority, monkeypatch):
    with (
        ScriptedSMTPServer(tls=authority.good) as server,
        transport_to(server, **trusting(authority)) as transport,
    ):
        session = transport._connect()
        with monkeypatch.context() as patch:
            # The moment before the connection has ended.
            patch.setattr(socket.socket, 'shutdown', lambda sock, how: None)
            session.shut_down()
            session.say_quit()
            server.wait_for(lambda: 'QUIT' in verbs(server.sessions[0]))
        transport._pool.discard(session)


# --- more than one transaction for a message ---


def test_a_message_for_many_is_split_and_the_recipients_keep_their_order():
    recipients = tuple(f'r{number}@x.example' for number in range(7))
    with (
        ScriptedSMTPServer({'RCPT TO:<r4@x.example>': '550 no'}) as server,
        transport_to(server, max_recipients=3) as transport,
    ):
        result = transport.send(SENDER, recipients, CONTENT)

    assert [message.recipients for message in server.messages] == [
        recipients[:3],
        (recipients[3], recipients[5]),
        recipients[6:],
    ]
    assert tuple(result.replies) == recipients
    assert result.refused == (recipients[4],)
    assert len(server.sessions) == 1


def test_recipients_beyond_what_the_server_takes_are_offered_again_at_once():
    too_many = '452 4.5.3 too many recipients'
    script = {'RCPT': [None, None, too_many, too_many, too_many, None, too_many, too_many]}
    recipients = tuple(f'r{number}@x.example' for number in range(5))
    with ScriptedSMTPServer(script) as server, transport_to(server) as transport:
        result = transport.send(SENDER, recipients, CONTENT)

    assert [message.recipients for message in server.messages] == [recipients[:2], recipients[2:3], recipients[3:]]
    assert codes(result) == dict.fromkeys(recipients, 250)
    assert tuple(result.replies) == recipients


def test_too_many_recipients_for_ever_comes_to_an_end():
    with ScriptedSMTPServer({'RCPT': lambda command: '452 4.5.3 no'}) as server, transport_to(server) as transport:
        result = transport.send(SENDER, (A, B), CONTENT)

    assert codes(result) == {A: 452, B: 452}


def test_a_transaction_that_came_to_nothing_does_not_hinder_the_next():
    with ScriptedSMTPServer({'RCPT TO:<a@x.example>': '550 no'}) as server, transport_to(server) as transport:
        assert codes(transport.send(SENDER, (A,), CONTENT)) == {A: 550}
        assert codes(transport.send(SENDER, (B,), CONTENT)) == {B: 250}

    assert verbs(server.sessions[0]).count('RSET') == 1
    assert len(server.sessions) == 1


# --- the server's trouble ---


def test_a_server_that_is_down_is_trouble():
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
        transport = SMTPTransport(hostname='127.0.0.1', port=port)
        with pytest.raises(ServerTrouble, match=rf'Cannot reach 127\.0\.0\.1:{port}: .*refused.*smtp_hostname'):
            transport.send(SENDER, (A,), CONTENT)


@pytest.mark.parametrize('error', [socket.gaierror(-2, 'Name or service not known'), UnicodeError('label too long')])
def test_a_name_without_an_address_is_trouble(error):
    def connect(address, timeout):
        raise error

    with pytest.raises(ServerTrouble, match=r'There is no address for mail\.example:25: .*mailqueue\.smtp_hostname'):
        SMTPTransport(hostname=REMOTE, connect=connect).send(SENDER, (A,), CONTENT)


def test_an_ipv6_address_is_written_in_brackets():
    def connect(address, timeout):
        raise TimeoutError('timed out')

    with pytest.raises(ServerTrouble, match=r'Cannot reach \[::1\]:2525: timed out'):
        SMTPTransport(hostname='::1', port=2525, connect=connect).send(SENDER, (A,), CONTENT)


@pytest.mark.parametrize(
    ('script', 'text', 'code'),
    [
        ({'connect': '554 5.7.1 go away'}, 'takes no mail from us: 554 5.7.1 go away', 554),
        ({'connect': '421 too busy'}, 'takes no mail from us: 421 too busy', 421),
        ({'connect': Close()}, 'it closed the connection', None),
        ({'connect': 'HTTP/1.1 400 Bad Request'}, 'sent what is not an SMTP reply', None),
        ({'connect': '220 hello\n220 hello'}, 'said more than it was asked for', None),
        ({'EHLO': '421 too busy', 'HELO': '250 ok'}, 'takes no mail from us: 421 too busy', 421),
        ({'EHLO': '550 who are you', 'HELO': '550 who are you'}, 'takes no mail from us: 550 who are you', 550),
        ({'EHLO': Close()}, 'it closed the connection', None),
        ({'MAIL': Close('421 4.3.2 bye')}, 'closed the session: 421 4.3.2 bye', 421),
        ({'MAIL': Close()}, 'before it answered MAIL FROM', None),
        ({'RCPT': Close()}, 'before it answered RCPT TO', None),
        ({'DATA': Close('421 bye')}, 'closed the session: 421 bye', 421),
        ({'content': Close('421 bye')}, 'closed the session: 421 bye', 421),
        ({'.': Close('421 bye')}, 'closed the session: 421 bye', 421),
        ({'MAIL': '530 5.7.0 Must issue a STARTTLS command first'}, 'without a login or without TLS: 530', 530),
        ({'MAIL': 'what?'}, 'sent what is not an SMTP reply', None),
    ],
)
def test_what_is_not_the_fault_of_the_message_is_trouble(script, text, code):
    with ScriptedSMTPServer(script) as server, transport_to(server) as transport:
        with pytest.raises(ServerTrouble, match=text) as caught:
            transport.send(SENDER, (A,), CONTENT)

        assert str(server.port) in str(caught.value)
        assert caught.value.code == code
        # It was willing to take mail, and stumbled over this one.
        assert caught.value.in_message == bool({'MAIL', 'RCPT', 'DATA', 'content', '.'} & script.keys())
        assert caught.value.at_mail == ('MAIL' in script)
        assert server.messages == []
        server.wait_for(lambda: server.sessions[0].is_over)


def test_a_session_that_broke_is_not_used_again():
    with ScriptedSMTPServer({'MAIL': ['what?']}) as server, transport_to(server) as transport:
        with pytest.raises(ServerTrouble):
            transport.send(SENDER, (A,), CONTENT)
        assert transport.send(SENDER, (A,), CONTENT)

    assert len(server.sessions) == 2


def test_trouble_after_some_have_their_outcome_is_part_of_the_result():
    script = {'RCPT TO:<b@x.example>': Close()}
    with ScriptedSMTPServer(script) as server, transport_to(server, max_recipients=1) as transport:
        result = transport.send(SENDER, (A, B, C), CONTENT)

    assert codes(result) == {A: 250}
    assert result.open_of((A, B, C)) == (B, C)
    assert 'before it answered RCPT TO' in str(result.trouble)


def test_a_server_that_is_gone_when_the_second_part_is_to_be_sent_is_part_of_the_result_too():
    with (
        ScriptedSMTPServer({'MAIL': [None, Close()], 'connect': [None, '554 no more']}) as server,
        transport_to(server, max_recipients=1) as transport,
    ):
        result = transport.send(SENDER, (A, B), CONTENT)

    assert codes(result) == {A: 250}
    assert result.trouble.code == 554


@pytest.mark.parametrize(
    ('answer', 'why'),
    [
        (Close(), 'connection lost after the end of the data'),
        ('what?', "sent what is not an SMTP reply: 'what?'"),
        ('354 go on', 'sent an unexpected reply to the end of the data: 354 go on'),
    ],
    ids=['closed', 'nonsense', 'unfit'],
)
def test_without_a_fit_reply_to_the_final_dot_the_outcome_is_unknown_and_the_reason_told(answer, why):
    with ScriptedSMTPServer({'.': answer}) as server, transport_to(server) as transport:
        result = transport.send(SENDER, (A,), CONTENT)

    assert why in result.replies[A].text
    assert 'it may have been delivered' in result.replies[A].text
    assert result.replies[A].outcome_unknown
    assert result.deferred == (A,)
    assert result.trouble is not None


def test_a_connection_lost_in_the_midst_of_the_content_is_nothing_that_happened_to_the_message():
    with (
        ScriptedSMTPServer({'content': Close()}) as server,
        transport_to(server) as transport,
        pytest.raises(ServerTrouble, match='while it was sent data'),
    ):
        transport.send(SENDER, (A,), b'x' * 25_000_000)


def test_a_refusal_in_the_midst_of_the_content_counts():
    with ScriptedSMTPServer({'content': Close('552 5.3.4 enough')}) as server, transport_to(server) as transport:
        result = transport.send(SENDER, (A,), b'x' * 25_000_000)

    assert result.replies == {A: Reply(552, 'enough', '5.3.4')}
    assert result.trouble is not None


@contextmanager
def raw_session(then, **options):
    """A session with a server that says hello, calls *then* with its socket, and says nothing more."""
    is_over = threading.Event()
    with socket.create_server(('127.0.0.1', 0)) as listener:

        def serve():
            with listener.accept()[0] as sock:
                sock.sendall(b'220 hello\r\n')
                sock.recv(100)
                sock.sendall(b'250 hello\r\n')
                then(sock)
                is_over.wait()

        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        with closing(SMTPTransport(hostname='127.0.0.1', port=port, tls='off', **options)) as transport:
            session = transport._connect()
            yield session
            session.close()
        is_over.set()
        thread.join()


@pytest.mark.parametrize(
    ('last_words', 'text'), [(b'421 4.3.2 bye\r\n', '421 4.3.2 bye'), (b'', 'broke off the connection')]
)
def test_what_the_server_said_before_the_connection_broke_is_heard(last_words, text):
    with raw_session(lambda sock: sock.sendall(last_words)) as session:
        if last_words:
            select.select([session], [], [], 10)
        # As after a reset: what is to be sent finds no way, what has come before can still be read.
        session._sock.shutdown(socket.SHUT_WR)
        session.submit(Offer(SENDER, (A,), CONTENT))
        result = run(session)

    assert text in str(result.trouble)
    assert result.replies == {}


def test_a_session_that_was_reset_is_not_alive():
    def reset(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        sock.close()

    with raw_session(reset) as session:
        select.select([session], [], [], 10)

        assert not session.is_alive


# --- replies that are too long ---


@pytest.mark.parametrize(
    'reply',
    ['550-spam\n' * 999 + '550 spam', '550 spam' + ' and more' * 100_000],
    ids=['1000 lines', 'a line of 900 kB'],
)
@pytest.mark.parametrize('step', ['MAIL', 'RCPT', 'DATA', '.'])
def test_a_reply_of_whatever_length_is_what_its_code_says(step, reply):
    with ScriptedSMTPServer({step: [reply]}) as server, transport_to(server) as transport:
        refused = transport.send(SENDER, (A,), CONTENT)
        taken = transport.send(SENDER, (B,), CONTENT)

    assert (codes(refused), refused.trouble) == ({A: 550}, None)
    assert refused.replies[A].text.startswith('spam ')
    assert (codes(taken), taken.trouble) == ({B: 250}, None)
    assert len(server.sessions) == 1


def test_a_server_that_offers_more_than_anybody_reads_gets_its_mail():
    offers = ('PIPELINING', *(f'X-{number}' for number in range(1000)))
    with ScriptedSMTPServer(extensions=offers) as server, transport_to(server) as transport:
        assert transport.send(SENDER, (A,), CONTENT)

    assert server.sessions[0].round_trips == len(['EHLO', 'MAIL RCPT DATA', 'content', 'QUIT'])


def endless_reply(beginning, more):
    """What a server says to a command, for as long as the connection is there."""

    def talk(sock):
        with suppress(OSError):
            sock.recv(1000)
            sock.sendall(beginning)
            while True:
                sock.sendall(more)

    return talk


@pytest.mark.parametrize('more', [b'x' * 10_000, b'\r\n250-x' * 1000], ids=['line', 'lines'])
def test_a_reply_without_an_end_ends_at_the_deadline(more):
    # Seconds that pass with each look at the clock.
    clock = count(0, 10).__next__
    with raw_session(endless_reply(b'250-', more), clock=clock) as session:
        session.submit(Offer(SENDER, (A,), CONTENT))
        result = run(session)

    assert 'did not complete its reply within 300 seconds' in str(result.trouble)
    assert result.replies == {}


@pytest.mark.parametrize('more', [b'x' * 10_000, b'\r\n250-x' * 1000], ids=['line', 'lines'])
def test_an_answer_to_ehlo_without_an_end_ends_at_the_deadline_too(more):
    talk = endless_reply(b'250-', more)
    with socket.create_server(('127.0.0.1', 0)) as listener:

        def serve():
            with listener.accept()[0] as sock:
                sock.sendall(b'220 hello\r\n')
                talk(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        clock = count(0, 10).__next__
        where = Server(*listener.getsockname(), 10, 300, 600, clock, socket.create_connection)
        with pytest.raises(ServerTrouble, match='no reply within 300 seconds'):
            Connector(where, tls='off', local_hostname='me.example').connect()
        thread.join()


# --- time ---


@pytest.mark.parametrize('step', ['connect', 'EHLO', 'MAIL', 'RCPT', 'DATA'])
@pytest.mark.parametrize('answer', [Silence(), Drip('250 ' + 'x' * 10_000)], ids=['silent', 'dripping'])
def test_a_server_that_takes_too_long_is_trouble(step, answer):
    with ScriptedSMTPServer({step: answer}) as server, transport_to(server, timeout=SHORT) as transport:
        with pytest.raises(ServerTrouble, match=r'no reply within 1 s|(did nothing for|complete its reply within) 1 s'):
            transport.send(SENDER, (A,), CONTENT)

        assert len(server.sessions) == 1


@pytest.mark.parametrize('answer', [Silence(), Drip('250 ' + 'x' * 10_000)], ids=['silent', 'dripping'])
def test_too_long_at_the_end_of_the_content_leaves_the_outcome_unknown(answer):
    with ScriptedSMTPServer({'.': answer}) as server, transport_to(server, data_timeout=SHORT) as transport:
        result = transport.send(SENDER, (A,), CONTENT)

    assert result.replies[A].outcome_unknown
    assert re.search('(for|in) 1 seconds before it answered the end of the data', str(result.trouble))


def test_every_byte_of_a_greeting_does_not_begin_the_timeout_anew():
    clock = count(0, 200).__next__
    with (
        ScriptedSMTPServer({'connect': Drip('220 ' + 'x' * 1000)}) as server,
        transport_to(server, timeout=300, clock=clock) as transport,
        pytest.raises(ServerTrouble, match='within 300'),
    ):
        transport.send(SENDER, (A,), CONTENT)


def test_the_end_of_the_content_has_a_timeout_of_its_own():
    may_answer = threading.Event()
    with (
        ScriptedSMTPServer({'.': Wait(may_answer)}) as server,
        transport_to(server, timeout=SHORT, data_timeout=60) as transport,
    ):
        timer = threading.Timer(SHORT * 1.5, may_answer.set)
        timer.start()
        assert transport.send(SENDER, (A,), CONTENT)
        timer.join()


def test_a_server_that_reads_no_further_is_trouble():
    with (
        ScriptedSMTPServer({'content': Wait(threading.Event())}) as server,
        transport_to(server, timeout=SHORT) as transport,
        pytest.raises(ServerTrouble, match='did nothing for 1 seconds while it was sent data'),
    ):
        transport.send(SENDER, (A,), b'x' * 25_000_000)


@pytest.mark.parametrize('tls', [False, True], ids=['clear', 'TLS'])
def test_a_long_group_of_commands_with_long_replies_does_not_hang_with_all_buffers_full(authority, tls):
    # The server does not read while we do not read; who writes everything before reading anything waits for ever.
    def connect(address, timeout):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(('127.0.0.1', address[1]))
        return sock

    long_reply = '\n'.join(['250-' + 'x' * 500] * 20 + ['250 ok'])
    recipients = tuple(f'recipient-number-{number}@x.example' for number in range(2000))
    options = {**trusting(authority), 'tls': 'starttls' if tls else 'off', 'connect': connect, 'timeout': 60}
    with ScriptedSMTPServer({'RCPT': lambda command: long_reply}, socket_buffer=4096, tls=authority.good) as server:
        if not tls:
            options.pop('tls_ca_file')
        with transport_to(server, max_recipients=2000, **options) as transport:
            result = transport.send(SENDER, recipients, CONTENT)

    assert result.accepted == recipients
    assert server.messages[0].recipients == recipients


# --- TLS ---


@pytest.mark.parametrize(
    ('tls', 'hostname', 'port', 'has_credentials', 'mode'),
    [
        (None, REMOTE, 25, False, 'starttls'),
        ('auto', REMOTE, 587, False, 'starttls'),
        ('', REMOTE, 465, False, 'implicit'),
        (None, 'localhost', 25, False, 'opportunistic'),
        (None, '127.0.0.1', 25, True, 'opportunistic'),
        (None, '::1', 465, False, 'implicit'),
        ('opportunistic', REMOTE, 25, False, 'opportunistic'),
        ('opportunistic', REMOTE, 25, True, 'starttls'),
        ('off', REMOTE, 25, False, 'off'),
        ('off', 'localhost', 25, True, 'off'),
        ('implicit', REMOTE, 2465, True, 'implicit'),
    ],
)
def test_what_the_setting_for_tls_comes_to(tls, hostname, port, has_credentials, mode):
    assert tls_mode(tls, hostname, port, has_credentials=has_credentials, has_ca_file=False) == mode


@pytest.mark.parametrize('tls', ['opportunistic', 'off'])
def test_authorities_contradict_a_mode_that_verifies_nothing(authority, tls):
    with pytest.raises(ConfigurationError, match=rf'smtp_tls_ca_file is of no use with mailqueue\.smtp_tls = {tls}'):
        SMTPTransport(hostname='localhost', tls=tls, tls_ca_file=authority.file)


@pytest.mark.parametrize(
    ('server_options', 'text'),
    [({}, 'does not offer STARTTLS'), ({'tls': 'from another authority'}, 'could not be verified')],
)
def test_with_authorities_this_host_is_verified_too(authority, server_options, text):
    options = {key: authority.contexts[value] for key, value in server_options.items()}
    with (
        ScriptedSMTPServer(**options) as server,
        transport_to(server, tls=None, tls_ca_file=authority.file) as transport,
        pytest.raises(ServerTrouble, match=text),
    ):
        transport.send(SENDER, (A,), CONTENT)


def test_starttls_and_implicit_tls_reach_a_real_server(authority):
    for mode, options in (
        ('starttls', {'tls_context': authority.good, 'require_starttls': True}),
        ('implicit', {'ssl_context': authority.good}),
    ):
        with real_server(**options) as server, transport_to(server, **trusting(authority, tls=mode)) as transport:
            assert transport.send(SENDER, (A,), CONTENT)
            assert transport.send(SENDER, (B,), CONTENT)

            assert [message.recipients for message in server.messages] == [(A,), (B,)]
            assert len(server.sessions) == 1
            assert transport._pool._idle[0]._sock.version() in ('TLSv1.2', 'TLSv1.3')


def test_an_ip_address_is_verified_too(authority):
    with (
        ScriptedSMTPServer(tls=authority.good) as server,
        transport_to(server, tls='starttls', tls_ca_file=authority.file) as transport,
    ):
        assert transport.send(SENDER, (A,), CONTENT)

    assert server.sessions[0].is_encrypted


@pytest.mark.parametrize('mode', ['starttls', 'implicit'])
@pytest.mark.parametrize(
    ('certificate', 'reason'),
    [
        ('from another authority', 'unable to get local issuer certificate|self.signed certificate'),
        ('for another host', r"[Hh]ostname mismatch, certificate is not valid for 'mail\.example'"),
        ('expired', 'certificate has expired'),
    ],
)
def test_a_forged_certificate_is_trouble_and_nothing_is_sent(authority, certificate, reason, mode):
    tls = authority.contexts[certificate]
    with ScriptedSMTPServer(tls=tls, implicit_tls=mode == 'implicit') as server:
        with (
            transport_to(server, **trusting(authority, tls=mode, username='user', password='secret')) as transport,
            pytest.raises(ServerTrouble, match=reason) as caught,
        ):
            transport.send(SENDER, (A,), CONTENT)

        assert f'mailqueue.smtp_tls = {mode}' in str(caught.value)
        assert 'mailqueue.smtp_tls_ca_file' in str(caught.value)
        assert verbs(server.sessions[0]) == (['EHLO', 'STARTTLS'] if mode == 'starttls' else [])


def test_without_its_authority_the_system_decides_and_knows_nothing_of_a_private_one(authority):
    with (
        ScriptedSMTPServer(tls=authority.good) as server,
        transport_to(server, hostname=REMOTE, tls=None, connect=to_loopback) as transport,
        pytest.raises(ServerTrouble, match='could not be verified'),
    ):
        transport.send(SENDER, (A,), CONTENT)


@pytest.mark.parametrize('options', [{}, {'tls': 'opportunistic', 'username': 'user', 'password': 'secret'}])
def test_a_server_whose_starttls_was_stripped_hears_nothing_but_ehlo(options):
    with ScriptedSMTPServer(extensions=('PIPELINING', 'AUTH PLAIN')) as server:
        with (
            transport_to(server, **{'hostname': REMOTE, 'tls': None, 'connect': to_loopback, **options}) as transport,
            pytest.raises(ServerTrouble, match=r'does not offer STARTTLS, and mailqueue\.smtp_tls = starttls'),
        ):
            transport.send(SENDER, (A,), CONTENT)

        server.wait_for(lambda: server.sessions[0].is_over)
        assert verbs(server.sessions[0]) == ['EHLO']


@pytest.mark.parametrize(
    ('script', 'said', 'text'),
    [
        ({'EHLO': '500 what'}, ['EHLO'], 'takes no mail from us: 500 what'),
        ({'STARTTLS': '454 4.7.0 not now'}, ['EHLO', 'STARTTLS'], 'offers STARTTLS and refuses it: 454 4.7.0 not now'),
        ({'STARTTLS': Close()}, ['EHLO', 'STARTTLS'], 'it closed the connection'),
        # What stands behind this reply in clear text would be read as if it had come over TLS.
        ({'STARTTLS': '220 go\n250 forged'}, ['EHLO', 'STARTTLS'], 'said more than it was asked for'),
        ({'EHLO': [None, '500 what']}, ['EHLO', 'STARTTLS', 'EHLO'], 'takes no mail from us: 500 what'),
    ],
)
def test_where_tls_is_required_nothing_goes_without_it(authority, script, said, text):
    with ScriptedSMTPServer(script, tls=authority.good) as server:
        with transport_to(server, **trusting(authority)) as transport, pytest.raises(ServerTrouble, match=text):
            transport.send(SENDER, (A,), CONTENT)

        server.wait_for(lambda: server.sessions[0].is_over)
        assert verbs(server.sessions[0]) == said
        assert len(server.sessions) == 1


def test_what_was_offered_in_clear_text_does_not_count_after_starttls(authority):
    forged = '250-x\n250-STARTTLS\n250-PIPELINING\n250 SIZE 1'
    with (
        ScriptedSMTPServer({'EHLO': [forged]}, tls=authority.good, extensions=()) as server,
        transport_to(server, **trusting(authority)) as transport,
    ):
        assert transport.send(SENDER, (A,), CONTENT)

    assert verbs(server.sessions[0]) == ['EHLO', 'STARTTLS', 'EHLO', 'MAIL', 'RCPT', 'DATA', 'QUIT']


def test_implicit_tls_with_a_server_that_speaks_first_is_trouble_that_names_the_setting():
    with (
        ScriptedSMTPServer() as server,
        transport_to(server, tls='implicit') as transport,
        pytest.raises(ServerTrouble, match=r'TLS with .* failed: .*mailqueue\.smtp_tls = implicit'),
    ):
        transport.send(SENDER, (A,), CONTENT)


def test_a_ca_file_that_cannot_be_read_is_trouble_that_names_it(tmp_path):
    with (
        ScriptedSMTPServer() as server,
        transport_to(server, tls='implicit', tls_ca_file=tmp_path / 'x') as transport,
        pytest.raises(ServerTrouble, match=r'mailqueue\.smtp_tls_ca_file = .*x cannot be used'),
    ):
        transport.send(SENDER, (A,), CONTENT)


@pytest.mark.parametrize('certificate', ['from another authority', 'for another host', 'expired'])
def test_opportunistic_tls_takes_any_certificate(authority, certificate):
    with ScriptedSMTPServer(tls=authority.contexts[certificate]) as server, transport_to(server, tls=None) as transport:
        assert transport.send(SENDER, (A,), CONTENT)

    assert [session.is_encrypted for session in server.sessions] == [True]


def test_opportunistic_without_an_offer_goes_in_clear_text():
    with ScriptedSMTPServer() as server, transport_to(server, tls=None) as transport:
        assert transport.send(SENDER, (A,), CONTENT)

    assert verbs(server.sessions[0]) == ['EHLO', 'MAIL', 'RCPT', 'DATA', 'QUIT']


@pytest.mark.parametrize('answer', ['454 4.7.0 not now', '220 go\n500 what', Close()])
def test_if_opportunistic_tls_fails_the_server_is_called_again_in_clear_text(authority, answer, caplog):
    caplog.set_level(logging.INFO, 'mailqueue.smtp')
    with (
        ScriptedSMTPServer({'STARTTLS': answer}, tls=authority.good, extensions=('AUTH PLAIN',)) as server,
        transport_to(server, tls=None, username='user', password='secret') as transport,
    ):
        assert transport.send(SENDER, (A,), CONTENT)

    assert [verbs(session)[:3] for session in server.sessions] == [['EHLO', 'STARTTLS'], ['EHLO', 'AUTH', 'MAIL']]
    assert 'TLS failed, going on without' in caplog.text


def test_a_handshake_that_fails_is_opportunistic_too():
    without_certificate = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with ScriptedSMTPServer(tls=without_certificate) as server, transport_to(server, tls=None) as transport:
        assert transport.send(SENDER, (A,), CONTENT)

    assert [session.is_encrypted for session in server.sessions] == [False, False]


# --- logging in ---


@pytest.mark.parametrize('mechanism', ['PLAIN', 'LOGIN'])
def test_a_real_server_lets_us_in_over_tls(authority, mechanism):
    other = {'PLAIN': 'LOGIN', 'LOGIN': 'PLAIN'}[mechanism]
    options = {
        'tls_context': authority.good,
        'authenticator': password_checker,
        'auth_required': True,
        'auth_exclude_mechanism': [other],
    }
    with real_server(**options) as server:
        credentials = {'username': 'user', 'password': 'pässword'}
        with transport_to(server, **trusting(authority, **credentials)) as transport:
            assert transport.send(SENDER, (A,), CONTENT)
        with (
            transport_to(server, **trusting(authority, username='user', password='wrong-one')) as transport,
            pytest.raises(ServerTrouble, match=r"rejected the login of 'user': 535 5\.7\.8") as caught,
        ):
            transport.send(SENDER, (A,), CONTENT)

    assert 'mailqueue.smtp_username' in str(caught.value)
    assert 'wrong-one' not in str(caught.value)
    assert caught.value.code == 535
    assert len(server.messages) == 1


def test_cram_md5_is_answered_where_there_is_nothing_else():
    challenge = b'<1896.697170952@postoffice.example>'
    script = {'AUTH': [f'334 {base64.b64encode(challenge).decode()}', '235 in']}
    with (
        ScriptedSMTPServer(script, extensions=('AUTH CRAM-MD5',)) as server,
        transport_to(server, username='tim', password='tanstaaftanstaaf') as transport,
    ):
        assert transport.send(SENDER, (A,), CONTENT)

    _, command, answer, *_ = server.sessions[0].commands
    assert command == 'AUTH CRAM-MD5'
    digest = hmac.new(b'tanstaaftanstaaf', challenge, 'md5').hexdigest()
    assert base64.b64decode(answer) == f'tim {digest}'.encode()


@pytest.mark.parametrize(
    ('extensions', 'replies', 'said', 'text'),
    [
        ((), [], 0, 'it offers no AUTH'),
        (('AUTH GSSAPI NTLM',), [], 0, 'it offers GSSAPI NTLM'),
        (('AUTH GSSAPI\x1b]0;owned\x07 X\u2028Y',), [], 0, 'it offers GSSAPI ]0;OWNED'),
        # Not with the next mechanism: a third wrong password locks an account.
        (('AUTH PLAIN LOGIN CRAM-MD5',), ['535 5.7.8 wrong'], 1, '535 5.7.8 wrong'),
        (('AUTH PLAIN LOGIN',), [Close()], 1, 'it closed the connection'),
        (('AUTH LOGIN',), ['334 VXNlcm5hbWU6', '535 no'], 1, '535 no'),
        (('AUTH LOGIN',), ['334 VXNlcm5hbWU6', '334 UGFzc3dvcmQ6', '535 no'], 1, '535 no'),
        (('AUTH LOGIN',), ['535 no'], 1, '535 no'),
        (('AUTH CRAM-MD5',), ['334 x', '235 ok'], 1, 'padding|base64'),
        (('AUTH CRAM-MD5',), ['535 no'], 1, '535 no'),
        (('AUTH PLAIN',), ['504 5.5.4 unknown'], 1, 'it offers PLAIN'),
    ],
)
def test_who_is_not_let_in_is_told_what_to_check(extensions, replies, said, text):
    with ScriptedSMTPServer({'AUTH': replies}, extensions=extensions) as server:
        with (
            transport_to(server, username='user', password='secret') as transport,
            pytest.raises(ServerTrouble, match=text) as caught,
        ):
            transport.send(SENDER, (A,), CONTENT)

        assert "'user'" in str(caught.value)
        assert str(caught.value).isprintable()
        assert 'mailqueue.smtp_username' in str(caught.value)
        assert verbs(server.sessions[0]).count('AUTH') == said


def test_a_mechanism_that_the_server_does_not_know_after_all_is_followed_by_the_next():
    script = {'AUTH': ['504 5.5.4 unknown', '334 VXNlcm5hbWU6', '334 UGFzc3dvcmQ6', '235 in']}
    with (
        ScriptedSMTPServer(script, extensions=('AUTH PLAIN LOGIN', 'PIPELINING')) as server,
        transport_to(server, username='user', password='secret') as transport,
    ):
        assert transport.send(SENDER, (A,), CONTENT)

    assert verbs(server.sessions[0])[1:3] == ['AUTH', 'AUTH']


def test_neither_log_nor_error_has_the_password_even_if_the_server_repeats_it(caplog):
    caplog.set_level(logging.DEBUG, 'mailqueue.smtp')
    secret = base64.b64encode(b'\0user\0hunter2').decode()
    replies = [f'504 unknown: {secret} (hunter2)', '334 VXNlcm5hbWU6', f'334 {secret}', f'535 hunter2 {secret}']
    with (
        ScriptedSMTPServer({'AUTH': replies}, extensions=('AUTH PLAIN LOGIN',)) as server,
        transport_to(server, username='user', password='hunter2') as transport,
        pytest.raises(ServerTrouble) as caught,
    ):
        transport.send(SENDER, (A,), CONTENT)

    told = caplog.text + str(caught.value) + repr(transport)
    assert 'AUTH PLAIN [redacted]' in caplog.text
    assert '535 [redacted]' in caplog.text
    for word in ('hunter2', secret, base64.b64encode(b'hunter2').decode()):
        assert word not in told


# --- arguments ---


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'hostname': ''}, r'mailqueue\.smtp_hostname is missing'),
        ({'username': 'user'}, r'mailqueue\.smtp_username and mailqueue\.smtp_password'),
        ({'password': 'secret'}, r'mailqueue\.smtp_username and mailqueue\.smtp_password'),
        ({'tls': 'yes'}, r'mailqueue\.smtp_tls = yes'),
        ({'tls': 'off', 'username': 'u', 'password': 'p'}, r'mailqueue\.smtp_tls = off would send .* in clear text'),
        ({'max_recipients': 0}, r'mailqueue\.max_recipients = 0'),
        ({'local_hostname': 'host name'}, r'mailqueue\.smtp_local_hostname'),
        ({'local_hostname': 'host\r\nRSET'}, r'mailqueue\.smtp_local_hostname'),
        ({'local_hostname': 'host.'}, r'mailqueue\.smtp_local_hostname'),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(options, text):
    with pytest.raises(ConfigurationError, match=text):
        SMTPTransport(**{'hostname': REMOTE, **options})


@pytest.mark.parametrize(
    ('given', 'fqdn', 'argument'),
    [
        ('web.site.example', 'ignored.example', 'web.site.example'),
        ('[IPv6:2001:db8::1]', 'ignored.example', '[IPv6:2001:db8::1]'),
        (None, 'web.site.example', 'web.site.example'),
        # No name that a server can check, or no name at all.
        (None, 'localhost', '[127.0.0.1]'),
        (None, 'my_laptop.site.example', '[127.0.0.1]'),
        (None, 'evil.example\r\nRSET', '[127.0.0.1]'),
    ],
)
def test_ehlo_has_our_name_or_else_our_address(monkeypatch, given, fqdn, argument):
    asked = []
    monkeypatch.setattr(socket, 'getfqdn', lambda: asked.append(1) or fqdn)
    with ScriptedSMTPServer() as server, transport_to(server, local_hostname=given) as transport:
        assert asked == []
        transport.send(SENDER, (A,), CONTENT)
        server.hang_up()
        transport.send(SENDER, (A,), CONTENT)

    assert [session.commands[0] for session in server.sessions] == [f'EHLO {argument}'] * 2
    # The answer may take seconds where the name server is slow.
    assert len(asked) == (given is None)


def test_over_ipv6_the_address_is_written_as_such():
    try:
        listener = socket.create_server(('::1', 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip('this host has no IPv6')
    with listener, transport_to(SimpleNamespace(host='::1', port=listener.getsockname()[1])) as transport:
        heard = []

        def serve():
            with listener.accept()[0] as sock:
                sock.sendall(b'220 x\r\n')
                heard.append(sock.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ServerTrouble):
            transport.send(SENDER, (A,), CONTENT)
        thread.join()

    name = socket.getfqdn()
    assert heard[0] in (b'EHLO [IPv6:::1]\r\n', f'EHLO {name}\r\n'.encode())


# --- sessions are kept ---


def test_the_same_session_is_used_again():
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        for _ in range(3):
            transport.send(SENDER, (A,), CONTENT)
        transport.close()
        server.wait_for(lambda: server.sessions[0].is_over)

    assert len(server.sessions) == 1
    assert verbs(server.sessions[0])[-1] == 'QUIT'


def test_after_close_the_transport_may_be_used_again():
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        transport.close()
        transport.send(SENDER, (A,), CONTENT)
        transport.close()
        transport.close()
        transport.send(SENDER, (A,), CONTENT)

    assert len(server.messages) == len(server.sessions) == 2


def test_close_does_not_wait_for_a_server_that_says_no_goodbye(monkeypatch):
    monkeypatch.setattr('pyramid_mailqueue.transports.smtp.pool.QUIT_PATIENCE', 0.05)
    with ScriptedSMTPServer({'QUIT': Silence()}) as server, transport_to(server) as transport:
        transport.send(SENDER, (A,), CONTENT)
        transport.close()
        server.wait_for(lambda: server.sessions[0].is_over)


def test_an_idle_session_is_closed_in_time_although_nobody_sends():
    with ScriptedSMTPServer() as server, transport_to(server, idle_timeout=0.05) as transport:
        transport.send(SENDER, (A,), CONTENT)
        server.wait_for(lambda: server.sessions[0].is_over)

        assert verbs(server.sessions[0])[-1] == 'QUIT'


def test_an_idle_session_that_is_not_due_when_the_timer_looks_is_closed_later():
    now = [0.0]
    with (
        ScriptedSMTPServer() as server,
        transport_to(server, idle_timeout=0.05, clock=lambda: now[0]) as transport,
    ):
        transport.send(SENDER, (A,), CONTENT)
        with transport._pool._lock:
            timer = transport._pool._timer
        timer.join()
        assert not server.sessions[0].is_over
        now[0] = 0.06
        server.wait_for(lambda: server.sessions[0].is_over)


def test_a_session_that_was_idle_for_too_long_is_not_used_again():
    now = [0.0]
    with ScriptedSMTPServer() as server, transport_to(server, idle_timeout=30, clock=lambda: now[0]) as transport:
        transport.send(SENDER, (A,), CONTENT)
        now[0] = 29.9
        transport.send(SENDER, (A,), CONTENT)
        assert len(server.sessions) == 1
        now[0] = 59.9
        transport.send(SENDER, (A,), CONTENT)

        assert len(server.sessions) == 2
        server.wait_for(lambda: server.sessions[0].is_over)
        assert verbs(server.sessions[0])[-1] == 'QUIT'


def test_the_session_that_was_used_last_is_taken_first_so_that_others_can_grow_old():
    may_go_on = threading.Event()
    with ScriptedSMTPServer({f'RCPT TO:<{A}>': Wait(may_go_on)}) as server, transport_to(server) as transport:
        thread = threading.Thread(target=transport.send, args=(SENDER, (A,), CONTENT))
        thread.start()
        server.wait_for(lambda: server.sessions and f'RCPT TO:<{A}>' in server.sessions[0].commands)
        transport.send(SENDER, (B,), CONTENT)
        may_go_on.set()
        thread.join()
        transport.send(SENDER, (C,), CONTENT)

        assert [verbs(session).count('MAIL') for session in server.sessions] == [2, 1]


def test_a_session_that_the_server_closed_is_replaced_without_notice():
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        transport.send(SENDER, (A,), CONTENT)
        server.hang_up()
        result = transport.send(SENDER, (B,), CONTENT)

    assert codes(result) == {B: 250}
    assert result.trouble is None
    assert len(server.sessions) == 2


def test_a_server_may_be_restarted_between_two_messages():
    with ScriptedSMTPServer() as first, ScriptedSMTPServer() as second:
        ports = iter([first.port, second.port])

        def connect(address, timeout):
            return socket.create_connection(('127.0.0.1', next(ports)), timeout)

        with transport_to(first, connect=connect) as transport:
            transport.send(SENDER, (A,), CONTENT)
            first.close()
            transport.send(SENDER, (B,), CONTENT)

    assert [message.recipients for message in first.messages + second.messages] == [(A,), (B,)]


def test_a_farewell_that_waits_in_an_idle_session_is_not_taken_for_an_answer():
    with ScriptedSMTPServer({'.': ['250 ok\n421 4.4.2 idle too long']}) as server, transport_to(server) as transport:
        transport.send(SENDER, (A,), CONTENT)
        assert codes(transport.send(SENDER, (B,), CONTENT)) == {B: 250}

    assert len(server.sessions) == 2


@pytest.mark.parametrize('farewell', [Close('421 4.4.2 idle too long'), Close()], ids=['421', 'closed'])
@pytest.mark.parametrize('extensions', [('PIPELINING',), ()], ids=['pipelining', 'stepwise'])
def test_a_session_that_ends_just_when_it_is_used_again_is_replaced_too(farewell, extensions):
    with (
        ScriptedSMTPServer({'MAIL': [None, farewell]}, extensions=extensions) as server,
        transport_to(server) as transport,
    ):
        transport.send(SENDER, (A,), CONTENT)
        result = transport.send(SENDER, (B,), CONTENT)

    assert codes(result) == {B: 250}
    assert result.trouble is None
    assert [message.recipients for message in server.messages] == [(A,), (B,)]
    assert len(server.sessions) == 2


def test_a_server_that_takes_one_message_for_each_session_gets_the_parts_of_a_message_so():
    script = {'MAIL': [None, Close('421 enough'), None, Close('421 enough'), None]}
    with ScriptedSMTPServer(script) as server, transport_to(server, max_recipients=1) as transport:
        result = transport.send(SENDER, (A, B, C), CONTENT)

    assert codes(result) == {A: 250, B: 250, C: 250}
    assert result.trouble is None
    assert len(server.sessions) == 3


def test_a_session_is_replaced_once_and_then_it_is_trouble():
    with ScriptedSMTPServer({'MAIL': [None, Close('421 a'), Close('421 b')]}) as server:
        with transport_to(server) as transport:
            transport.send(SENDER, (A,), CONTENT)
            with pytest.raises(ServerTrouble, match='421 b'):
                transport.send(SENDER, (B,), CONTENT)

        assert len(server.sessions) == 2


def test_a_session_that_ends_after_it_has_taken_something_of_the_message_is_trouble():
    with ScriptedSMTPServer({'RCPT': [None, Close('421 bye')]}) as server, transport_to(server) as transport:
        transport.send(SENDER, (A,), CONTENT)
        with pytest.raises(ServerTrouble, match='421 bye'):
            transport.send(SENDER, (B,), CONTENT)

        assert len(server.sessions) == 1


def test_a_new_session_that_is_refused_is_trouble():
    with ScriptedSMTPServer({'MAIL': Close('421 bye')}) as server, transport_to(server) as transport:
        with pytest.raises(ServerTrouble, match='421 bye'):
            transport.send(SENDER, (B,), CONTENT)

        assert len(server.sessions) == 1


def test_whatever_interrupts_a_message_its_session_is_not_used_again(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        transport.send(SENDER, (A,), CONTENT)
        with monkeypatch.context() as patch:
            patch.setattr('pyramid_mailqueue.transports.smtp.session.Session.wait', interrupt)
            with pytest.raises(KeyboardInterrupt):
                transport.send(SENDER, (B,), CONTENT)
        transport.send(SENDER, (C,), CONTENT)

        assert len(server.sessions) == 2


# --- threads and processes ---


def test_threads_send_at_once_over_sessions_of_their_own():
    numbers = range(8)
    meeting = threading.Barrier(len(numbers), timeout=30)
    results = []

    def greet(command):
        meeting.wait()

    with ScriptedSMTPServer({'connect': greet}) as server, transport_to(server) as transport:

        def work(number):
            results.extend(
                transport.send(SENDER, (f'r{number}-{turn}@x.example',), f'Subject: {number}\r\n\r\n'.encode())
                for turn in range(10)
            )

        threads = [threading.Thread(target=work, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(results) == len(server.messages) == 80
    assert all(results)
    assert all(
        message.content == f'Subject: {message.recipients[0][1]}\r\n\r\n'.encode() for message in server.messages
    )
    assert len(server.sessions) == 8


def test_a_process_that_was_forked_without_pythons_knowledge_uses_no_session_of_its_parent():
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        transport.send(SENDER, (A,), CONTENT)
        # What such a child sees: a pool of another process.
        transport._pool._pid = os.getppid()
        transport.send(SENDER, (A,), CONTENT)
        transport.send(SENDER, (A,), CONTENT)

        said = [sum(line.startswith('MAIL') for line in session.commands) for session in server.sessions]
        assert said == [1, 2]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='there is no fork() here')
@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
@pytest.mark.parametrize('tls', [False, True], ids=['clear', 'TLS'])
def test_a_forked_child_leaves_the_sessions_of_its_parent_alone(authority, tls):
    options = trusting(authority) if tls else {}
    with ScriptedSMTPServer(tls=authority.good) as server, transport_to(server, **options) as transport:
        transport.send(SENDER, (A,), CONTENT)
        inherited = transport._pool._idle[0]._sock
        in_use = transport._connect()
        child = os.fork()
        if not child:
            status = 1
            try:
                both_closed = inherited.fileno() == in_use._sock.fileno() == -1
                sent = transport.send(SENDER, (B,), CONTENT)
                transport.close()
                status = 0 if both_closed and sent else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert transport.send(SENDER, (C,), CONTENT)
        transport._pool.give_back(in_use)

        assert [message.recipients for message in server.messages] == [(A,), (B,), (C,)]
        first, _, childs = server.sessions
        assert len(server.sessions) == 3
        assert verbs(first).count('MAIL') == 2
        assert 'QUIT' not in verbs(first)
        server.wait_for(lambda: childs.is_over)
        assert verbs(childs)[-1] == 'QUIT'


def test_without_new_threads_sessions_are_kept_all_the_same(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        server.script['MAIL'] = None
        monkeypatch.setattr(threading.Timer, 'start', refuse)
        transport.send(SENDER, (A,), CONTENT)
        transport.send(SENDER, (B,), CONTENT)

        assert len(server.sessions) == 1


# --- the log ---


def test_the_log_has_the_dialogue_without_the_content(caplog):
    caplog.set_level(logging.DEBUG, 'mailqueue.smtp')
    with (
        ScriptedSMTPServer({'RCPT TO:<b@x.example>': '550 5.1.1 no\x1b[2J'}) as server,
        transport_to(server, local_hostname='web.example') as transport,
    ):
        transport.send(SENDER, (A, B), CONTENT)

    assert [record.getMessage().removeprefix(f'127.0.0.1:{server.port} ') for record in caplog.records] == [
        'S: 220 scripted.test ESMTP',
        'C: EHLO web.example',
        'S: 250 scripted.test',
        'S: 250 PIPELINING',
        'S: 250 SIZE 0',
        'S: 250 8BITMIME',
        'S: 250 SMTPUTF8',
        'S: 250 ENHANCEDSTATUSCODES',
        f'C: MAIL FROM:<{SENDER}> SIZE={len(CONTENT)}',
        f'C: RCPT TO:<{A}>',
        f'C: RCPT TO:<{B}>',
        'C: DATA',
        'S: 250 2.1.0 sender ok',
        'S: 250 2.1.5 recipient ok',
        'S: 550 5.1.1 no [2J',
        'S: 354 go ahead',
        f'C: <{len(CONTENT)} bytes of data>',
        'S: 250 2.0.0 accepted',
    ]
