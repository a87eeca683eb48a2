"""Postfix, Exim and OpenSMTPD, as they are in Debian: what they take arrives, and what they say is understood."""

from __future__ import annotations

import re
import smtplib
from email import message_from_bytes

import pytest

from pyramid_mailqueue.transports.smtp import SMTPTransport
from tests.mta.servers import ADA, HOST, LATER, NOBODY, Exim, OpenSMTPD, Postfix

SENDER = 'shop@site.example'

# What a server puts before a message: fields, some of which are folded.
TRACE = rb'(?i)\A((Return-Path|X-Original-To|Delivered-To|Received): .*\n(\t.*\n)*)+'

TRAPS = [
    b'.',
    b'..',
    b'...and so on',
    b'.hidden',
    b'',
    b'From here on',
    b'8 bits: \xc3\xa4\xc3\xb6\xc3\xbc, and in no encoding: \xff\xfe',
    b'long: ' + b'x' * 990,
    b'tab\tand trailing space ',
    b'.',
    b'',
    b'',
]


@pytest.fixture
def transport(request):
    """Make a transport: ``transport(server)``."""

    def transport(server, tls='off', **options):
        made = SMTPTransport(hostname=HOST, port=server.port, tls=tls, **options)
        request.addfinalizer(made.close)
        return made

    return transport


def arrived(server):
    """What was sent to ADA, without what the server has put before it."""
    return sorted(re.sub(TRACE, b'', message).replace(b'\n', b'\r\n') for message in server.take())


# --- one message ------------------------------------------------------------


def send_what_could_go_wrong(transport, content):
    sent = [
        content(1) + b'\r\n'.join(TRAPS),
        content(2, size=70_000) + b'\r\n'.join(TRAPS * 20),
        content(3) + b'.\r\n',
    ]
    for each in sent:
        assert transport.send(SENDER, [ADA], each).accepted == (ADA,)
    return sorted(sent)


def test_a_message_arrives_byte_for_byte(server, transport, content):
    sent = send_what_could_go_wrong(transport(server), content)

    assert arrived(server) == sent


@pytest.mark.parametrize('kind', [Postfix, Exim], ids=lambda kind: kind.name)
def test_a_message_arrives_byte_for_byte_in_a_session_with_tls(kind, start, transport, ca_file, content):
    server = start(kind)

    sent = send_what_could_go_wrong(transport(server, tls='starttls', tls_ca_file=ca_file), content)

    assert arrived(server) == sent


def test_each_recipient_has_the_outcome_that_the_server_gave(server, transport, content):
    result = transport(server).send(SENDER, [LATER, ADA, NOBODY], content(1))

    assert (result.accepted, result.deferred, result.refused) == ((ADA,), (LATER,), (NOBODY,))
    assert result.replies[LATER].code == 450
    assert 'greylisted' in result.replies[LATER].text
    assert all(reply.from_server for reply in result.replies.values())
    assert arrived(server) == [content(1)]


def test_the_session_goes_on_after_a_message_that_nobody_gets(server, transport, content):
    one = transport(server)

    for recipients in ([NOBODY], [LATER, NOBODY], [NOBODY]):
        assert not one.send(SENDER, recipients, content(1))
    assert one.send(SENDER, [ADA], content(2))

    assert arrived(server) == [content(2)]


def test_a_header_in_utf_8_is_sent_where_it_is_taken_and_refused_by_us_elsewhere(server, transport, content):
    unicode = content(1).replace(b'order', 'Bestellung für Ödön'.encode())

    result = transport(server).send(SENDER, [ADA], unicode)

    if isinstance(server, OpenSMTPD):
        assert (result.replies[ADA].code, result.replies[ADA].enhanced) == (550, '5.6.7')
        assert arrived(server) == []
    else:
        assert arrived(server) == [unicode]


def test_the_sender_is_that_of_the_envelope_even_if_that_is_nobody(server, transport, content):
    one = transport(server)

    assert one.send(SENDER, [ADA], content(1))
    (message,) = server.take()
    assert message_from_bytes(message)['Return-Path'] == f'<{SENDER}>'

    assert one.send('', [ADA], content(2))
    (message,) = server.take()
    # Some servers leave it out then.
    assert message_from_bytes(message).get('Return-Path', '<>') == '<>'


def test_a_message_larger_than_the_server_takes_is_refused_before_it_is_sent(server, transport, content):
    one = transport(server)

    result = one.send(SENDER, [ADA], content(1, size=150_000))

    assert (result.replies[ADA].code, result.replies[ADA].from_server) == (552, False)
    assert one.send(SENDER, [ADA], content(2))
    assert arrived(server) == [content(2)]


# --- mq-run -----------------------------------------------------------------


def test_a_run_brings_each_of_many_messages_once_whatever_becomes_of_those_between(server, put, mq_run, left, content):
    for number in range(300):
        put(content(number))
        if number % 100 == 50:
            put(content(1000 + number), ADA, LATER)
            put(content(2000 + number), NOBODY, ADA)
            put(content(3000 + number), NOBODY)
            put(content(4000 + number, size=150_000))

    status, told = mq_run(server)

    assert told == 'mq-run: 300 sent, 3 deferred, 9 refused; 3 waiting\n'
    assert status == 0
    numbers = [*range(300), *(number + group for group in (1000, 2000) for number in (50, 150, 250))]
    assert arrived(server) == sorted(map(content, numbers))
    assert {folder: sorted(recipients) for folder, recipients in left().items()} == {
        'new': [LATER] * 3,
        'dead': [ADA] * 3 + [NOBODY] * 6,
    }


@pytest.mark.parametrize('kind', [Exim, OpenSMTPD], ids=lambda kind: kind.name)
def test_a_server_that_takes_only_so_many_messages_in_a_session_gets_them_in_more_sessions(
    kind, start, put, mq_run, left, content
):
    server = start(kind, max_messages=10)
    for number in range(50):
        put(content(number))

    assert mq_run(server) == (0, 'mq-run: 50 sent; 0 waiting\n')
    assert left() == {}
    assert arrived(server) == sorted(map(content, range(50)))


def test_a_server_that_hangs_up_after_many_wrong_addresses_does_not_end_the_run(start, put, mq_run, left, content):
    server = start(Postfix, max_errors=20)
    for number in range(30):
        put(content(number), NOBODY)
    put(content(99))

    status, told = mq_run(server)

    assert left() == {'dead': [NOBODY] * 30}
    assert arrived(server) == [content(99)]
    assert (status, told) == (0, 'mq-run: 1 sent, 30 refused; 0 waiting\n')


@pytest.mark.parametrize(
    ('kind', 'complaint'),
    [
        pytest.param(Postfix, 'Connection concurrency limit exceeded', id='postfix'),
        pytest.param(Exim, 'too many connections', id='exim'),
    ],
)
def test_a_server_with_room_for_fewer_sessions_than_we_may_open_gets_everything(
    kind, complaint, start, put, mq_run, left, content
):
    server = start(kind, max_sessions=2)
    for number in range(50):
        put(content(number))

    with smtplib.SMTP(HOST, server.port):
        assert mq_run(server, smtp_connections=4) == (0, 'mq-run: 50 sent; 0 waiting\n')

    assert left() == {}
    assert arrived(server) == sorted(map(content, range(50)))
    assert complaint in server.log()


def test_a_server_that_does_not_like_our_name_makes_no_dead_letters(start, put, mq_run, left, content):
    server = start(Postfix, wants_full_names=True)
    for number in range(5):
        put(content(number))

    status, told = mq_run(server, smtp_local_hostname='localhost')
    assert (status, told) == (75, 'mq-run: 0 sent; 5 waiting\n')
    assert left() == {'new': [ADA] * 5}
    assert 'Helo command rejected: need fully-qualified hostname' in server.log()

    assert mq_run(server, smtp_local_hostname='app.example') == (0, 'mq-run: 5 sent; 0 waiting\n')
    assert arrived(server) == sorted(map(content, range(5)))


def test_a_server_that_does_not_like_a_senders_name_refuses_that_message(start, transport, content):
    one = transport(start(Postfix, wants_full_names=True), local_hostname='app.example')

    result = one.send('shop@localhost', [ADA], content(1))

    assert result.refused == (ADA,)
    assert 'Sender address rejected: need fully-qualified address' in result.replies[ADA].text
