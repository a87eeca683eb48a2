"""The handshake without a socket: bytes are pushed in, bytes come out."""

from __future__ import annotations

import base64
import hmac
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.transports.smtp import handshake as module
from pyramid_mailqueue.transports.smtp.handshake import (
    MECHANISMS,
    TRANSITIONS,
    Handshake,
    LoginRefused,
    StartTLS,
    State,
)

NEVER, IF_OFFERED, REQUIRED = StartTLS
CREDENTIALS = ('tim', 'tanstaaftanstaaf')

#: What stands among the commands where the owner has encrypted the connection.
TLS = '(TLS)'

GREETING = '220 mx.example ESMTP'


def b64(text):
    return base64.b64encode(text.encode()).decode()


PLAIN = b64('\0tim\0tanstaaftanstaaf')
CHALLENGE = '<1896.697170952@postoffice.example>'
DIGEST = hmac.new(CREDENTIALS[1].encode(), CHALLENGE.encode(), 'md5').hexdigest()


def offering(*extensions):
    """The reply to EHLO of a server with these extensions."""
    *others, last = ('mx.example', *extensions)
    return ''.join(f'250-{line}\r\n' for line in others) + f'250 {last}'


def new(**options):
    return Handshake('mx.example:25', 'me.example', **options)


def said(handshake):
    """What the handshake has to say now, as lines; it is with the network then."""
    data = handshake.data_to_send()
    handshake.sent(len(data))
    return data.decode().splitlines()


def whole(reply):
    return [f'{reply}\r\n'.encode()]


def by_bytes(reply):
    return [bytes([byte]) for byte in f'{reply}\r\n'.encode()]


def play(handshake, *replies, cut=whole):
    """Let the server say *replies*, each when it is its turn; return what it heard meanwhile."""
    heard = []
    for reply in replies:
        *pieces, last = cut(reply)
        assert not any(map(handshake.receive_data, pieces))
        assert handshake.receive_data(last)
        if handshake.state is State.TLS:
            handshake.tls_started()
            heard.append(TLS)
        heard += said(handshake)
    return heard


TO_AUTH = [GREETING, offering('AUTH PLAIN LOGIN CRAM-MD5')]


# --- the ways through ---

WAYS = {
    'EHLO': ({}, [GREETING, offering()], ['EHLO me.example']),
    'a greeting of many lines': ({}, ['220-mx.example\r\n220 hello', offering()], ['EHLO me.example']),
    'HELO': ({}, [GREETING, '500 what', '250 mx.example'], ['EHLO me.example', 'HELO me.example']),
    'STARTTLS': (
        {'starttls': REQUIRED},
        [GREETING, offering('STARTTLS'), '220 go', offering()],
        ['EHLO me.example', 'STARTTLS', TLS, 'EHLO me.example'],
    ),
    'STARTTLS, where it is offered': (
        {'starttls': IF_OFFERED},
        [GREETING, offering('PIPELINING', 'starttls'), '220 go', offering()],
        ['EHLO me.example', 'STARTTLS', TLS, 'EHLO me.example'],
    ),
    'no STARTTLS, where it is not offered': ({'starttls': IF_OFFERED}, [GREETING, offering()], ['EHLO me.example']),
    'no STARTTLS, where only HELO is known': (
        {'starttls': IF_OFFERED},
        [GREETING, '502 what', '250 mx.example'],
        ['EHLO me.example', 'HELO me.example'],
    ),
    'no STARTTLS, although it is offered': ({}, [GREETING, offering('STARTTLS')], ['EHLO me.example']),
    'PLAIN': (
        {'credentials': CREDENTIALS},
        [GREETING, offering('AUTH CRAM-MD5 LOGIN plain'), '235 in'],
        ['EHLO me.example', f'AUTH PLAIN {PLAIN}'],
    ),
    'LOGIN': (
        {'credentials': CREDENTIALS},
        [GREETING, offering('AUTH CRAM-MD5 LOGIN'), f'334 {b64("Username:")}', '334 not in base64!', '235 in'],
        ['EHLO me.example', 'AUTH LOGIN', b64('tim'), b64('tanstaaftanstaaf')],
    ),
    'CRAM-MD5': (
        {'credentials': CREDENTIALS},
        [GREETING, offering('AUTH CRAM-MD5'), f'334 {b64(CHALLENGE)}', '235 in'],
        ['EHLO me.example', 'AUTH CRAM-MD5', b64(f'tim {DIGEST}')],
    ),
    'the next mechanism': (
        {'credentials': CREDENTIALS},
        [*TO_AUTH, '504 no', '334 x', '504 no', f'334 {b64(CHALLENGE)}', '235 in'],
        ['EHLO me.example', f'AUTH PLAIN {PLAIN}', 'AUTH LOGIN', b64('tim'), 'AUTH CRAM-MD5', b64(f'tim {DIGEST}')],
    ),
    'what is not ASCII': (
        {'credentials': ('jürgen', 'pässword')},
        [GREETING, offering('AUTH PLAIN'), '235 in'],
        ['EHLO me.example', f'AUTH PLAIN {b64(chr(0) + "jürgen" + chr(0) + "pässword")}'],
    ),
    'everything': (
        {'starttls': REQUIRED, 'credentials': CREDENTIALS},
        [GREETING, offering('STARTTLS', 'AUTH LOGIN'), '220 go', offering('AUTH PLAIN'), '235 in'],
        ['EHLO me.example', 'STARTTLS', TLS, 'EHLO me.example', f'AUTH PLAIN {PLAIN}'],
    ),
}  # fmt: skip


@pytest.mark.parametrize('cut', [whole, by_bytes])
@pytest.mark.parametrize('way', WAYS)
def test_each_way_leads_to_where_mail_can_be_sent(way, cut):
    options, replies, commands = WAYS[way]
    handshake = new(**options)
    assert handshake.data_to_send() == b''

    assert play(handshake, *replies[:-1], cut=cut) == commands
    assert handshake.state is not State.READY
    assert play(handshake, replies[-1], cut=cut) == []
    assert handshake.state is State.READY


def test_a_command_may_leave_in_pieces():
    handshake = new()
    handshake.receive_data(b'220 hello\r\n')

    handshake.sent(len('EHLO '))
    assert handshake.data_to_send() == b'me.example\r\n'
    handshake.sent(len('me.example\r\n'))
    assert handshake.data_to_send() == b''


def test_the_table_of_transitions_has_a_way_into_and_out_of_each_state():
    reached = {state for transition in TRANSITIONS.values() for state in (*transition.to, transition.detour)}

    assert reached - {None} == {*State} - {State.GREETING}
    assert TRANSITIONS.keys() == {*State} - {State.READY}


# --- what a server offers ---


@pytest.mark.parametrize(
    ('lines', 'features'),
    [
        ([], {}),
        (['SIZE 1000', '8BITMIME', 'Pipelining'], {'size': '1000', '8bitmime': '', 'pipelining': ''}),
        (['SIZE  1000 '], {'size': '1000'}),
        (['AUTH PLAIN', 'AUTH=LOGIN PLAIN', 'auth CRAM-MD5'], {'auth': 'PLAIN LOGIN PLAIN CRAM-MD5'}),
        (['SIZE 1', 'SIZE 2'], {'size': '2'}),
        (['AUTH PLAIN\x1b[2J'], {'auth': 'PLAIN [2J'}),
        (['', ' SIZE 1', '-X', '\xff'], {}),
    ],
)
def test_what_is_offered_is_read_from_the_reply_to_ehlo(lines, features):
    handshake = new()
    play(handshake, GREETING, offering(*lines))

    assert handshake.esmtp_features == features


def test_the_name_of_the_server_is_no_offer():
    handshake = new(starttls=IF_OFFERED)

    assert play(handshake, GREETING, '250-STARTTLS\r\n250 HELP') == ['EHLO me.example']
    assert handshake.esmtp_features == {'help': ''}


def test_with_helo_nothing_is_offered():
    handshake = new()
    play(handshake, GREETING, '500-what\r\n500 SIZE 1', '250-mx.example\r\n250 SIZE 1')

    assert handshake.esmtp_features == {}


def test_what_was_offered_in_clear_text_is_forgotten():
    handshake = new(starttls=REQUIRED, credentials=CREDENTIALS)
    play(handshake, GREETING, offering('STARTTLS', 'SIZE 1', 'AUTH PLAIN'), '220 go')
    assert handshake.esmtp_features == {}

    with pytest.raises(ServerTrouble, match='it offers no AUTH'):
        play(handshake, offering('SIZE 2'))
    assert handshake.esmtp_features == {'size': '2'}


# --- refusals ---

TO_STARTTLS = [GREETING, offering('STARTTLS')]
OVER_TLS = [*TO_STARTTLS, '220 go']
MAIL_REFUSED = 'mx.example:25 takes no mail from us: {}.'
STARTTLS_REFUSED = 'mx.example:25 offers STARTTLS and refuses it: {}.'
LOGIN_REFUSED = (
    "mx.example:25 rejected the login of 'tim': {}. Check mailqueue.smtp_username, smtp_password and smtp_tls."
)
UNREACHABLE = (
    'Cannot reach mx.example:25: {}. Check mailqueue.smtp_hostname, smtp_port and smtp_tls, and that a mail server '
    'runs there.'
)


@pytest.mark.parametrize(
    ('options', 'before', 'reply', 'text'),
    [
        ({}, [], '554 5.7.1 go away', MAIL_REFUSED),
        ({}, [], '421 too busy', MAIL_REFUSED),
        ({}, [], '250 odd', MAIL_REFUSED),
        ({}, [GREETING], '421 too busy', MAIL_REFUSED),
        ({}, [GREETING, '550 not you'], '550 nor so', MAIL_REFUSED),
        ({}, [GREETING, '550 not you'], '421 bye', MAIL_REFUSED),
        ({'starttls': REQUIRED}, [GREETING], '500 what', MAIL_REFUSED),
        ({'starttls': REQUIRED}, TO_STARTTLS, '454 4.7.0 not now', STARTTLS_REFUSED),
        ({'starttls': IF_OFFERED}, TO_STARTTLS, '421 bye', STARTTLS_REFUSED),
        ({'starttls': REQUIRED}, TO_STARTTLS, '250 odd', STARTTLS_REFUSED),
        ({'starttls': REQUIRED}, OVER_TLS, '500 what', MAIL_REFUSED),
        ({'starttls': IF_OFFERED}, OVER_TLS, '500 what', MAIL_REFUSED),
        ({'credentials': CREDENTIALS}, TO_AUTH, '535 5.7.8 wrong', LOGIN_REFUSED),
        ({'credentials': CREDENTIALS}, TO_AUTH, '454 4.7.0 not now', LOGIN_REFUSED),
        ({'credentials': CREDENTIALS}, TO_AUTH, '421 bye', LOGIN_REFUSED),
        ({'credentials': CREDENTIALS}, TO_AUTH, '250 odd', LOGIN_REFUSED),
        ({'credentials': CREDENTIALS}, TO_AUTH, '334 more', LOGIN_REFUSED),
        ({'credentials': CREDENTIALS}, [*TO_AUTH, '504 no'], '535 no', LOGIN_REFUSED),
        ({'credentials': CREDENTIALS}, [*TO_AUTH, '504 no', '334 x'], '535 no', LOGIN_REFUSED),
        ({'credentials': CREDENTIALS}, [*TO_AUTH, '504 no', '334 x', '334 x'], '535 no', LOGIN_REFUSED),
        ({'credentials': CREDENTIALS}, [*TO_AUTH, '504 no', '334 x', '334 x'], '334 more', LOGIN_REFUSED),
        ({'credentials': CREDENTIALS}, [*TO_AUTH, '504 no', '504 no'], '535 no', LOGIN_REFUSED),
        ({'credentials': CREDENTIALS}, [*TO_AUTH, '504 no', '504 no', '334 eA=='], '535 no', LOGIN_REFUSED),
    ],
)
def test_a_refusal_is_trouble_with_what_the_server_said(options, before, reply, text):
    handshake = new(**options)
    play(handshake, *before)
    state = handshake.state
    with pytest.raises(ServerTrouble) as caught:
        play(handshake, reply)

    code = int(reply[:3])
    assert str(caught.value) == text.format(reply)
    assert caught.value.code == code
    assert caught.value.__cause__ is None
    # It keeps other addresses from being tried.
    assert isinstance(caught.value, LoginRefused) == (text is LOGIN_REFUSED and code >= 500)
    assert handshake.data_to_send() == b''
    # Then opportunistic TLS has failed.
    assert handshake.is_starting_tls == (state in (State.STARTTLS, State.EHLO_OVER_TLS))


def test_starttls_that_is_not_offered_is_trouble_and_nothing_is_said():
    handshake = new(starttls=REQUIRED, credentials=CREDENTIALS)
    with pytest.raises(ServerTrouble) as caught:
        play(handshake, GREETING, offering('AUTH PLAIN'))

    assert str(caught.value) == (
        'mx.example:25 does not offer STARTTLS, and mailqueue.smtp_tls = starttls requires it. If it should, the offer '
        'may have been removed on the way; nothing was sent.'
    )
    assert handshake.data_to_send() == b''


@pytest.mark.parametrize(
    ('offers', 'replies', 'text'),
    [
        ([], [], 'it offers no AUTH, and we know PLAIN, LOGIN and CRAM-MD5'),
        (['AUTH'], [], 'it offers no AUTH, and'),
        (['AUTH GSSAPI ntlm'], [], 'it offers GSSAPI NTLM, and'),
        (['AUTH PLAIN'], ['504 no'], 'it offers PLAIN, and'),
    ],
)
def test_a_login_without_a_mechanism_in_common_is_trouble(offers, replies, text):
    handshake = new(credentials=CREDENTIALS)
    with pytest.raises(ServerTrouble) as caught:
        play(handshake, GREETING, offering(*offers), *replies)

    assert str(caught.value).startswith(f"mx.example:25 rejected the login of 'tim': {text}")
    assert caught.value.code is None
    assert handshake.data_to_send() == b''


def test_a_challenge_that_cannot_be_read_is_trouble():
    handshake = new(credentials=CREDENTIALS)
    with pytest.raises(ServerTrouble, match=r"rejected the login of 'tim': .*(padding|base64)") as caught:
        play(handshake, GREETING, offering('AUTH CRAM-MD5'), '334 x')

    assert isinstance(caught.value.__cause__, ValueError)
    assert not isinstance(caught.value, LoginRefused)


# --- what was not asked for ---

EVERYTHING = {'starttls': REQUIRED, 'credentials': CREDENTIALS}
ALL_REPLIES = [
    GREETING,
    offering('STARTTLS', 'AUTH PLAIN'),
    '220 go',
    offering('AUTH LOGIN'),
    '334 x',
    '334 x',
    '235 in',
]
MORE = ['250 forged', '250', '2', '\n']


@pytest.mark.parametrize('more', MORE)
@pytest.mark.parametrize('number', range(len(ALL_REPLIES)))
def test_more_than_one_reply_is_trouble_at_each_step(number, more):
    handshake = new(**EVERYTHING)
    play(handshake, *ALL_REPLIES[:number])
    state = handshake.state
    with pytest.raises(ServerTrouble) as caught:
        handshake.receive_data(f'{ALL_REPLIES[number]}\r\n{more}'.encode())

    assert str(caught.value) == 'mx.example:25 said more than it was asked for; that may have been added on the way.'
    assert handshake.state is state
    assert handshake.data_to_send() == b''


@pytest.mark.parametrize('number', range(len(ALL_REPLIES)))
def test_what_comes_before_the_next_command_has_left_is_trouble(number):
    handshake = new(**EVERYTHING)
    play(handshake, *ALL_REPLIES[:number])
    handshake.receive_data(f'{ALL_REPLIES[number]}\r\n'.encode())
    with pytest.raises(ServerTrouble, match='said more than it was asked for'):
        handshake.receive_data(b'250 forged\r\n')


def test_tls_that_begins_out_of_turn_is_an_error_of_the_owner():
    handshake = new(starttls=REQUIRED)
    play(handshake, GREETING)

    with pytest.raises(RuntimeError, match='waits for the reply to EHLO'):
        handshake.tls_started()


@pytest.mark.parametrize('number', range(len(ALL_REPLIES) - 3))
def test_what_is_no_reply_is_shown(number):
    handshake = new(**EVERYTHING)
    play(handshake, *ALL_REPLIES[:number])
    with pytest.raises(ServerTrouble, match=r"mx\.example:25 sent what is not an SMTP reply: 'HTTP/1\.1 400'\."):
        play(handshake, 'HTTP/1.1 400')


# --- a connection that breaks ---


@pytest.mark.parametrize(
    ('number', 'text'),
    [(0, UNREACHABLE), (1, UNREACHABLE), (2, UNREACHABLE), (3, UNREACHABLE), (4, LOGIN_REFUSED), (6, LOGIN_REFUSED)],
)
@pytest.mark.parametrize('begun', [b'', b'250-'])
def test_a_connection_that_breaks_is_trouble_and_says_how(number, text, begun):
    def interrupted():
        handshake = new(**EVERYTHING)
        play(handshake, *ALL_REPLIES[:number])
        assert not (begun and handshake.receive_data(begun))
        return handshake

    with pytest.raises(ServerTrouble) as caught:
        interrupted().receive_data(b'')
    closed, late = caught.value, interrupted().timed_out(299.96)
    reset = interrupted().connection_lost(ConnectionResetError('Connection reset by peer'))

    assert str(closed) == text.format('it closed the connection')
    assert str(late) == text.format('no reply within 300 seconds')
    assert str(reset) == text.format('Connection reset by peer')
    # mq-send-test finds its advice by these.
    kinds = [type(trouble.__cause__) for trouble in (closed, late, reset)]
    assert kinds == [EOFError, TimeoutError, ConnectionResetError]
    assert {type(trouble) for trouble in (closed, late, reset)} == {ServerTrouble}


# --- secrets ---


def test_the_trace_has_everything_but_secrets():
    lines = []
    handshake = new(credentials=CREDENTIALS, trace=lines.append)
    play(
        handshake,
        GREETING,
        offering('AUTH PLAIN LOGIN'),
        f'504-unknown: {PLAIN}\r\n504 {CREDENTIALS[1]}',
        f'334 {b64("Username:")}',
        f'334 {PLAIN}',
        '235 in',
    )

    assert lines == [
        'S: 220 mx.example ESMTP',
        'C: EHLO me.example',
        'S: 250 mx.example',
        'S: 250 AUTH PLAIN LOGIN',
        'C: AUTH PLAIN [redacted]',
        'S: 504 [redacted]',
        'S: 504 [redacted]',
        'C: AUTH LOGIN',
        f'S: 334 {b64("Username:")}',
        'C: [redacted]',
        'S: 334 [redacted]',
        'C: [redacted]',
        'S: 235 [redacted]',
    ]


def test_the_trace_has_no_controls():
    lines = []
    handshake = new(trace=lines.append)
    play(handshake, '220-mx\x1b[2J\r\n220  hello\t there\x00', '500 what', '250 mx')

    assert lines == [
        'S: 220 mx [2J',
        'S: 220 hello there',
        'C: EHLO me.example',
        'S: 500 what',
        'C: HELO me.example',
        'S: 250 mx',
    ]


@pytest.mark.parametrize('number', [2, 3, 4, 5])
@pytest.mark.parametrize('form', ['{}', '535 no: {}', '334 {}', '504 {}'])
@pytest.mark.parametrize('secret', [PLAIN, '\0tim\0tanstaaftanstaaf', CREDENTIALS[1], b64(CREDENTIALS[1])])
def test_no_error_and_no_trace_has_a_secret_that_the_server_repeats(number, form, secret):
    lines = []
    handshake = new(credentials=CREDENTIALS, trace=lines.append)
    play(handshake, *[*TO_AUTH, '504 no', '334 x', '334 x'][:number])
    try:
        play(handshake, form.format(secret), '504 no', '535 no')
    except ServerTrouble as trouble:
        lines.append(str(trouble))

    told = '\n'.join(lines)
    for word in (CREDENTIALS[1], b64(CREDENTIALS[1]), PLAIN):
        assert word not in told


def test_a_password_that_stands_in_the_response_by_chance_leaves_nothing_of_it():
    password = 'HRp'
    response = b64(f'\0tim\0{password}')
    assert password in response
    handshake = new(credentials=('tim', password))

    with pytest.raises(ServerTrouble, match=r"'tim': 535 \[redacted\]\."):
        play(handshake, *TO_AUTH, f'535 {response}')


def test_the_name_of_the_user_is_no_secret():
    handshake = new(credentials=CREDENTIALS)
    with pytest.raises(ServerTrouble, match=r"'tim': 535 tim unknown\."):
        play(handshake, GREETING, offering('AUTH LOGIN'), '334 x', '535 tim unknown')


# --- a mechanism more ---


def bearer(username, token):
    """As XOAUTH2: the server explains a refusal in a challenge, and wants an empty response before it says so."""
    yield b'user=%s\1auth=Bearer %s\1\1' % (username, token)
    yield b''


def nothing_at_first(username, password):
    yield b''


@pytest.fixture
def add_mechanism(monkeypatch):
    def add(name, mechanism):
        monkeypatch.setattr(module, 'MECHANISMS', {name: mechanism, **MECHANISMS})

    return add


def test_a_mechanism_is_one_entry_of_the_table(add_mechanism):
    add_mechanism('XOAUTH2', bearer)
    initial = b64(f'user=tim\1auth=Bearer {CREDENTIALS[1]}\1\1')
    handshake = new(credentials=CREDENTIALS)

    assert play(handshake, GREETING, offering('AUTH PLAIN XOAUTH2'), '235 in')[1:] == [f'AUTH XOAUTH2 {initial}']


def test_a_response_may_be_empty(add_mechanism):
    add_mechanism('XOAUTH2', bearer)
    lines = []
    handshake = new(credentials=CREDENTIALS, trace=lines.append)

    assert play(handshake, GREETING, offering('AUTH XOAUTH2'), f'334 {b64("{}")}')[2:] == ['']
    assert lines[-3:] == ['C: AUTH XOAUTH2 [redacted]', 'S: 334 [redacted]', 'C: [redacted]']
    with pytest.raises(LoginRefused, match=r"'tim': 535 5\.7\.8 no\.") as caught:
        play(handshake, '535 5.7.8 no')
    assert caught.value.code == 535


def test_an_initial_response_that_is_empty_is_an_equals_sign(add_mechanism):
    add_mechanism('ANONYMOUS', nothing_at_first)
    handshake = new(credentials=CREDENTIALS)

    assert play(handshake, GREETING, offering('AUTH ANONYMOUS'), '235 in')[1:] == ['AUTH ANONYMOUS =']


# --- any server ---

GOOD = {
    State.GREETING: [GREETING],
    State.EHLO: [offering('STARTTLS', 'AUTH PLAIN LOGIN CRAM-MD5'), offering('AUTH LOGIN'), '500 what'],
    State.HELO: ['250 mx'],
    State.STARTTLS: ['220 go'],
    State.EHLO_OVER_TLS: [offering('AUTH PLAIN'), offering('AUTH CRAM-MD5 LOGIN'), offering()],
    State.AUTH: ['235 in', '504 no', '334 eA==', '334 x'],
}
ANY = ['220 x', '250 x', '235 x', '334 x', '421 bye', '454 no', '500 no', '535 no', '250-x\r\n251 y', 'x']


@st.composite
def conversations(draw):
    """A handshake with a server that says anything, in any pieces, as long as it is asked; and all that was told."""
    starttls, credentials = draw(st.sampled_from(StartTLS)), draw(st.sampled_from([None, CREDENTIALS]))
    lines, heard = [], []
    handshake = new(starttls=starttls, credentials=credentials, trace=lines.append)
    asked = b''
    try:
        while handshake.state is not State.READY:
            if handshake.state is State.TLS:
                handshake.tls_started()
                heard.append(TLS)
            asked = handshake.data_to_send()
            heard += said(handshake)
            good = GOOD[handshake.state]
            reply = draw(st.sampled_from([*good, *good, *ANY])).encode()
            # Some servers repeat what they were asked.
            reply += draw(st.sampled_from([b'', b'', b' ' + asked.strip()])) + b'\r\n'
            cuts = sorted(draw(st.sets(st.integers(1, len(reply) - 1), max_size=3)))
            for start, end in zip([0, *cuts], [*cuts, len(reply)], strict=True):
                handshake.receive_data(reply[start:end])
    except ServerTrouble as trouble:
        lines.append(str(trouble))
    return handshake, starttls, credentials, heard, '\n'.join(lines)


@given(conversations())
def test_whatever_a_server_says_the_password_goes_where_it_may_and_no_further(conversation):
    handshake, starttls, credentials, heard, told = conversation
    clear = heard[: heard.index(TLS)] if TLS in heard else heard

    if starttls is REQUIRED:
        assert {command.partition(' ')[0] for command in clear} <= {'EHLO', 'STARTTLS'}
    if starttls is NEVER or not credentials:
        assert not {'STARTTLS' if starttls is NEVER else 'AUTH'} & {line.partition(' ')[0] for line in heard}
    for word in (CREDENTIALS[1], b64(CREDENTIALS[1]), PLAIN):
        assert word not in told
    if handshake.state is State.READY:
        assert bool(credentials) == any(line.startswith('AUTH ') for line in heard)
        assert starttls is not REQUIRED or TLS in heard


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=20), st.sampled_from([f'{it}\r\n'.encode() for it in ANY]))))
def test_nothing_that_a_server_sends_is_more_than_trouble(pieces):
    handshake = new(starttls=IF_OFFERED, credentials=CREDENTIALS)
    with suppress(ServerTrouble):
        for piece in [b'220 x\r\n', offering('AUTH CRAM-MD5').encode(), b'\r\n', *pieces]:
            said(handshake)
            handshake.receive_data(piece)
