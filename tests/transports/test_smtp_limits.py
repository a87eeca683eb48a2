"""What a server says of the session, of our name and of our login is not held against the message."""

from __future__ import annotations

from itertools import count

import pytest

from pyramid_mailqueue.results import Reply
from pyramid_mailqueue.testing import EXTENSIONS, ScriptedSMTPServer
from pyramid_mailqueue.transports.smtp.replies import is_about_us
from pyramid_mailqueue.transports.smtp.server import MAX_VAIN, VALID_FOR
from tests.transports.stream_parts import ACCEPTED, M1, M2, OFFERS, letter, play, received, transport_to

STEPS = ('MAIL', 'RCPT', 'DATA', '.')


def after(most, reply):
    """Say *reply* at a step when it was reached so many times in this session."""
    times = count()
    return lambda command: reply if next(times) >= most else None


def limited(step, reply, most, sessions=20):
    """Scripts for sessions that take so many messages each."""
    return {number: {step: after(most, reply)} for number in range(sessions)}


def refused(reply, *names):
    """Say *reply* to each command that names one of these, or each but these with a '!' before them."""
    return lambda command: reply if any(f'<{name}@' in command for name in names) else None


# --- so many messages in each session ---

LIMITS = [
    '451 4.4.5 Maximum number of messages per session exceeded',
    '452 4.4.5 no more',
    '450 enough',
    '550 5.7.1 too many messages in this session',
    '554 Too many messages per connection',
    '503 5.5.1 enough',
    '530 5.7.0 the login has expired',
    '550 5.7.1 Message limit reached',
    '554 5.5.0 Max transactions reached',
]


@pytest.mark.parametrize('extensions', ['all', 'stepwise'])
@pytest.mark.parametrize('step', STEPS)
@pytest.mark.parametrize('reply', LIMITS)
def test_a_limit_of_messages_for_each_session_costs_new_sessions_and_nothing_else(reply, step, extensions):
    letters = [letter(f'm{number}') for number in range(12)]
    with (
        ScriptedSMTPServer(by_session=limited(step, reply, 3), extensions=OFFERS[extensions]) as server,
        transport_to(server) as transport,
    ):
        course = play(transport, *letters)

    assert course.trouble is None
    assert course.outcomes == [{offer.recipients[0]: ACCEPTED} for offer in letters]
    assert received(server) == letters
    assert len(server.sessions) == 4


@pytest.mark.parametrize('reply', ['550 5.7.1 not from you', '554 no', '451 4.7.1 not now'])
def test_a_limit_told_to_mail_may_be_any_refusal(reply):
    letters = [letter(f'm{number}') for number in range(6)]
    with ScriptedSMTPServer(by_session=limited('MAIL', reply, 2)) as server, transport_to(server) as transport:
        course = play(transport, *letters)

    assert course.outcomes == [{offer.recipients[0]: ACCEPTED} for offer in letters]
    assert len(server.sessions) == 3


@pytest.mark.parametrize('reply', ['550 5.1.1 never', '551 5.1.6 moved'])
@pytest.mark.parametrize('step', STEPS[1:])
def test_what_is_refused_for_good_after_mail_costs_no_new_session(step, reply):
    letters = [letter(f'm{number}') for number in range(6)]
    with (
        ScriptedSMTPServer(by_session=limited(step, reply, 2, 1)) as server,
        transport_to(server) as transport,
    ):
        course = play(transport, *letters)

    assert [*map(list, map(dict.values, course.outcomes))] == [[ACCEPTED]] * 2 + [[reply]] * 4
    assert len(server.sessions) == 1


@pytest.mark.parametrize('step', STEPS)
@pytest.mark.parametrize('reply', ['451 4.4.5 Maximum number of messages per session exceeded', '450 4.7.1 greylisted'])
def test_what_a_new_session_says_too_is_the_outcome(step, reply):
    script = {step: [None, *[reply] * 2]}
    with ScriptedSMTPServer(script) as server, transport_to(server) as transport:
        course = play(transport, M1, M2)

    assert course.outcomes == [{'m1@x.example': ACCEPTED}, {'m2@x.example': reply}]
    assert len(server.sessions) == 2


def test_a_session_in_which_nothing_works_any_more_is_replaced_though_new_ones_have_said_the_same():
    wait = '451 4.7.1 not now'
    in_each = {0: [None, wait], 1: [wait, None, wait], 2: [wait, None, wait], 3: [wait, None, *[wait] * 9]}
    letters = [letter(f'm{number}') for number in range(11)]
    by_session = {number: {'RCPT': replies} for number, replies in in_each.items()}
    with ScriptedSMTPServer(by_session=by_session) as server, transport_to(server) as transport:
        course = play(transport, *letters)

    made_to_wait = {'m1', 'm3', 'm5', 'm7', 'm8'}
    assert [{*outcome.values()} for outcome in course.outcomes] == [
        {wait if f'm{number}' in made_to_wait else ACCEPTED} for number in range(11)
    ]
    assert len(server.sessions) == 5


@pytest.mark.parametrize('step', ['MAIL', 'RCPT'])
def test_a_server_that_makes_all_strangers_wait_costs_three_new_sessions_and_not_one_for_each(step):
    now = [0.0]
    strangers = [f's{number}' for number in range(40)]
    script = {step: refused('450 4.2.0 Greylisted, come back', *strangers)}
    letters = [it for stranger in strangers for it in (letter('friend'), letter(stranger))]
    with (
        ScriptedSMTPServer(script) as server,
        transport_to(server, clock=lambda: now[0], idle_timeout=3600) as transport,
    ):
        course = play(transport, *letters)
        assert [next(iter(result.replies.values())).code for result in course.results] == [250, 450] * 40
        assert len(server.sessions) == 1 + MAX_VAIN

        now[0] = VALID_FOR
        play(transport, *letters)
        assert len(server.sessions) == 1 + 2 * MAX_VAIN


def test_the_same_recipient_who_has_to_wait_costs_one_new_session_however_many_messages_it_gets():
    script = {'RCPT': refused('452 4.2.2 mailbox full', 'full')}
    letters = [it for _ in range(20) for it in (letter('friend'), letter('full'))]
    with ScriptedSMTPServer(script) as server, transport_to(server) as transport:
        course = play(transport, *letters)

    assert [next(iter(result.replies.values())).code for result in course.results] == [250, 452] * 20
    assert len(server.sessions) == 2


def test_a_limit_is_found_out_beside_recipients_who_have_to_wait_with_the_same_words():
    said = '451 4.3.0 try again later'

    def session():
        of_limit = after(4, said)
        return {'RCPT': lambda command: said if '<full' in command else of_limit(command)}

    letters = [letter('full0' if number % 3 == 1 else f'm{number}') for number in range(36)]
    with (
        ScriptedSMTPServer(by_session={number: session() for number in range(20)}) as server,
        transport_to(server) as transport,
    ):
        course = play(transport, *letters)

    assert [next(iter(result.replies.values())).code for result in course.results] == [250, 451, 250] * 12
    assert len(server.sessions) == 7


def test_a_recipient_who_is_unknown_does_not_hide_a_limit_told_at_data():
    both = M2._replace(recipients=('nobody@x.example', 'm2@x.example'))
    with (
        ScriptedSMTPServer(
            {'RCPT': refused('550 5.1.1 unknown', 'nobody')}, by_session=limited('DATA', '452 4.4.5 enough', 1)
        ) as server,
        transport_to(server) as transport,
    ):
        course = play(transport, M1, both)

    assert course.outcomes[1] == {'nobody@x.example': '550 5.1.1 unknown', 'm2@x.example': ACCEPTED}
    assert len(server.sessions) == 2


# --- what is about us ---

ABOUT_US = [
    '530 5.7.0 Must issue a STARTTLS command first',
    '530 Authentication required',
    '530 5.1.0 log in',
    '534 5.7.9 Authentication mechanism is too weak',
    '535 5.7.8 credentials invalid',
    '525 5.7.13 User Account Disabled',
    '538 5.7.11 Encryption required for requested authentication mechanism',
    '504 5.5.2 <localhost>: Helo command rejected: need fully-qualified hostname',
    '504 need fully-qualified hostname',
    '501 5.5.2 <_x>: Helo command rejected: Invalid name',
    '550 5.7.1 <localhost>: Helo command rejected: Host not found',
    '550 Access denied - Invalid HELO name (See RFC2821 4.1.1.1)',
    '554 5.7.1 <unknown[192.0.2.1]>: Client host rejected: Access denied',
    '554 5.7.1 Service unavailable; Client host [192.0.2.1] blocked using zen.example',
    '550 5.7.25 the sending IP does not have a PTR record',
    '550 5.7.57 Client was not authenticated to send anonymous mail during MAIL FROM',
    '554 5.7.0 Authentication required',
    '550 5.7.1 Authentication is required for relay',
    '502 5.5.1 command not implemented',
    '503 5.5.1 bad sequence of commands',
    '500 5.5.1 what?',
    '521 mail.example does not accept mail',
    '554 5.3.2 the system takes no messages',
    '550 5.4.5 Daily sending quota exceeded',
    '550 Too many messages in this session',
    '553 5.7.1 <shop@site.example>: Sender address rejected: not logged in',
    '550 SMTP AUTH required',
    '550 please authenticate first',
    '550 5.5.1 You must authenticate',
    '550 5.7.0 Sender not authenticated',
    '550 relaying denied, please log in',
    '550 need fully-qualified hostname',
    '550 5.7.1 Your IP is blacklisted',
    '550 5.7.1 No reverse DNS for your address',
    '550 5.7.64 TenantAttribution; Relay Access Denied',
]

ABOUT_THE_MESSAGE = [
    '550 5.1.1 <bob@x.example>: Recipient address rejected: User unknown',
    '504 5.5.2 <bob>: Recipient address rejected: need fully-qualified address',
    '504 5.5.2 <shop@localhost>: Sender address rejected: need fully-qualified address',
    '501 5.1.3 Bad recipient address syntax',
    '501 5.5.4 Invalid address',
    '500 Line too long',
    '500 5.5.2 Syntax error',
    '521 5.2.1 we will not accept delivery of this message',
    '550 5.7.1 Email rejected per DMARC policy',
    '550 5.7.26 the sender is unauthenticated; all senders must authenticate with SPF or DKIM',
    '550 5.7.23 SPF validation failed',
    '550 5.7.1 the message is not authenticated by DKIM',
    '550 5.7.1 the message names a server that is blacklisted',
    '552 5.3.4 larger than the maximum message size',
    '524 5.2.4 Mailing list expansion problem: <bob@x.example>',
    '552 5.2.2 mailbox full: too many messages in it',
    '552 5.3.4 message too big',
    '552 5.7.0 This message was blocked because its content presents a potential security issue',
    '554 5.7.0 Reject, id=1-01 - SPAM',
    '554 5.7.1 Relay access denied',
    '554 5.6.0 message content rejected',
    '555 5.5.4 Unsupported option: SIZE',
    '556 5.1.10 the domain takes no mail',
]


@pytest.mark.parametrize('step', STEPS)
@pytest.mark.parametrize('reply', ABOUT_US)
def test_what_is_about_us_is_the_servers_trouble_at_every_step(reply, step):
    with ScriptedSMTPServer({step: [reply]}) as server, transport_to(server) as transport:
        course = play(transport, M1)
        assert course.results == []
        assert reply in str(course.trouble)
        assert course.trouble.code == int(reply[:3])
        assert course.trouble.in_message
        assert play(transport, M1).outcomes == [{'m1@x.example': ACCEPTED}]


@pytest.mark.parametrize('step', STEPS)
@pytest.mark.parametrize('reply', ABOUT_THE_MESSAGE)
def test_what_is_about_the_message_is_its_outcome_at_every_step(reply, step):
    with ScriptedSMTPServer({step: [reply]}) as server, transport_to(server) as transport:
        course = play(transport, M1)

    assert course.outcomes == [{'m1@x.example': reply}]


def test_only_a_servers_own_refusal_is_about_us():
    assert not is_about_us(Reply(250, 'helo, nice to meet you'))
    assert not is_about_us(Reply(450, 'Helo command rejected: Host not found', '4.7.1'))
    assert not is_about_us(Reply(530, 'log in', from_server=False))


@pytest.mark.parametrize('extensions', [EXTENSIONS, ()], ids=['all', 'stepwise'])
@pytest.mark.parametrize('first', ['stranger', 'friend'])
def test_a_server_that_wants_a_login_for_some_recipients_gets_the_message_for_the_others(first, extensions):
    names = ['stranger', 'friend'] if first == 'stranger' else ['friend', 'stranger']
    script = {'RCPT': refused('530 5.7.1 Authentication required', 'stranger')}
    with ScriptedSMTPServer(script, extensions=extensions) as server, transport_to(server) as transport:
        course = play(transport, letter('m1', *names), M2)

    replies = course.results[0].replies
    assert [(name, replies[f'{name}@x.example'].code) for name in names] == [
        (name, 250 if name == 'friend' else 451) for name in names
    ]
    assert '530 5.7.1 Authentication required' in replies['stranger@x.example'].text
    assert [message.recipients for message in server.messages] == [('friend@x.example',), M2.recipients]


@pytest.mark.parametrize('wants_data', [True, False])
def test_who_is_unknown_is_refused_although_the_others_are_the_servers_trouble(wants_data):
    script = {
        'RCPT': lambda command: '550 5.1.1 unknown' if 'nobody' in command else '530 5.7.0 log in',
        'DATA': '354 go ahead' if wants_data else '503 5.5.1 no recipients',
    }
    with ScriptedSMTPServer(script) as server, transport_to(server) as transport:
        course = play(transport, letter('m1', 'nobody', 'somebody'))

    assert course.outcomes == [{'nobody@x.example': '550 5.1.1 unknown'}]
    assert '530 5.7.0 log in' in str(course.results[0].trouble)
    assert server.messages == []


def test_what_is_about_us_before_the_content_is_complete_ends_no_message():
    with (
        ScriptedSMTPServer({'content': '530 5.7.0 log in'}) as server,
        transport_to(server) as transport,
    ):
        course = play(transport, letter('m1', body='x' * 25_000_000))

    assert course.results == []
    assert '530 5.7.0 log in' in str(course.trouble)
