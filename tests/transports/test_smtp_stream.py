"""A stream of messages over one session: how they travel, and that what happens to one disturbs neither neighbour."""

from __future__ import annotations

import re
import select
import ssl
import threading
from socket import create_connection

import pytest
import trustme

from pyramid_mailqueue.results import SendResult
from pyramid_mailqueue.testing import Close, ScriptedSMTPServer, Silence, Wait
from pyramid_mailqueue.transports.smtp.server import MAX_KNOWN, VALID_FOR, Objections
from pyramid_mailqueue.transports.smtp.transaction import OUTCOME_UNKNOWN
from tests.transports.stream_parts import (
    ACCEPTED,
    M1,
    M2,
    M3,
    OFFERS,
    Course,
    letter,
    play,
    received,
    stream,
    transport_to,
)

#: Seconds; long enough for a slow machine to answer, short enough to wait for.
SHORT = 1

# How a server may end a session of which it has had enough, at a moment when there is something to answer.
FAREWELLS = {'421': Close('421 4.7.0 enough'), 'closed': Close()}


@pytest.fixture(params=OFFERS)
def extensions(request):
    return OFFERS[request.param]


def of_m2(reply):
    """Say *reply* to a command that is about the second message, and nothing special to the others."""
    return lambda command: reply if '<m2@' in command else None


def verbs(session):
    return [command.partition(' ')[0] for command in session.commands]


def test_an_answer_that_has_come_in_time_counts_however_late_it_is_read():
    now = 0.0
    with ScriptedSMTPServer() as server, transport_to(server, clock=lambda: now) as transport:
        connection = transport.connect()
        poll, results = select.poll(), []
        poll.register(connection.fileno(), select.POLLIN)
        connection.submit(M1)
        while not connection.dialogue.awaits_end_of_data:
            results += connection.advance(select.POLLIN if poll.poll(100) else 0)
        assert results == []
        assert poll.poll(10_000), 'the answer is there'

        now = 10_000.0
        results += connection.advance()
        connection.release()

    assert [(it.trouble, [str(reply) for reply in it.replies.values()]) for it in results] == [(None, [ACCEPTED])]


# --- how they travel --------------------------------------------------------


@pytest.mark.parametrize('number', [1, 2, 3, 40])
def test_with_pipelining_each_message_costs_one_round_trip_and_one_write(number):
    letters = [letter(f'm{index}') for index in range(number)]
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        course = play(transport, *letters)

    assert received(server) == letters
    assert course.outcomes == [{offer.recipients[0]: ACCEPTED} for offer in letters]
    (session,) = server.sessions
    assert session.round_trips == len(session.reads) == number + len(['EHLO', 'MAIL RCPT DATA', 'QUIT'])
    for number_of_next, read in enumerate(session.reads[2:-2], start=1):
        begin = f'MAIL FROM:<m{number_of_next}@site.example>'.encode()
        assert read.startswith(b'Subject: ')
        assert b'\r\n.\r\n' + begin in read
        assert read.endswith(b'\r\nDATA\r\n')


def test_a_large_message_costs_no_more_round_trips_than_a_small_one():
    letters = [letter(f'm{index}', body='x' * 200_000) for index in range(3)]
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        play(transport, *letters)

    assert received(server) == letters
    assert server.sessions[0].round_trips == 3 + len(['EHLO', 'MAIL RCPT DATA', 'QUIT'])


def test_over_tls_a_message_is_one_write_too(tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / 'ca.pem')
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert('127.0.0.1').configure_cert(context)
    letters = [letter(f'm{index}') for index in range(5)]
    with (
        ScriptedSMTPServer(tls=context) as server,
        transport_to(server, tls='starttls', tls_ca_file=tmp_path / 'ca.pem') as transport,
    ):
        play(transport, *letters)

    assert received(server) == letters
    (session,) = server.sessions
    assert session.round_trips == len(session.reads) == 5 + len(['EHLO', 'STARTTLS', 'EHLO', 'MAIL RCPT DATA', 'QUIT'])


def test_without_pipelining_each_command_waits_for_its_reply():
    letters = [M1, M2, M3]
    with ScriptedSMTPServer(extensions=OFFERS['stepwise']) as server, transport_to(server) as transport:
        play(transport, *letters)

    assert received(server) == letters
    (session,) = server.sessions
    assert session.round_trips == 3 * len(['MAIL', 'RCPT', 'DATA', 'content']) + len(['EHLO', 'QUIT'])


def test_of_two_messages_one_is_under_way_and_the_next_is_asked_for_no_sooner():
    left, results, asked_after = [M2, M3], [], []

    def more():
        asked_after.append(len(results))
        return left.pop(0) if left else None

    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        # It appends one by one, so that more() sees how many there are.
        results.extend(stream(transport, M1, more))

    assert asked_after == [0, 1, 2]
    assert len(results) == 3


def test_when_an_outcome_is_told_the_next_message_has_been_announced_and_nothing_of_it_sent():
    left = [M2, M3]
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        for number, _ in enumerate(stream(transport, M1, lambda: left.pop(0) if left else None), start=1):
            announced = min(number + 1, 3)
            server.wait_for(lambda announced=announced: verbs(server.sessions[0]).count('DATA') == announced)
            assert received(server) == [M1, M2, M3][:number]
            assert f'Subject: m{number + 1}'.encode() not in server.sessions[0].received


def test_who_ends_the_stream_early_leaves_the_announced_message_untouched():
    left = [M2]
    with ScriptedSMTPServer() as server, transport_to(server) as transport:
        results = stream(transport, M1, lambda: left.pop(0) if left else None)
        next(results)
        results.close()
        server.wait_for(lambda: server.sessions[0].is_over)
        again = play(transport, M2)

    assert again.outcomes == [{'m2@x.example': ACCEPTED}]
    assert received(server) == [M1, M2]
    assert 'QUIT' not in verbs(server.sessions[0]), 'it would be content'
    assert len(server.sessions) == 2


# --- outcomes in the middle -------------------------------------------------

REFUSALS = {
    'the sender, for now': ({'MAIL': '451 4.7.1 later'}, '451 4.7.1 later'),
    'the sender': ({'MAIL': '550 5.7.1 never'}, '550 5.7.1 never'),
    'the recipient, for now': ({'RCPT': '451 4.7.1 later'}, '451 4.7.1 later'),
    'the recipient': ({'RCPT': '550 5.1.1 never'}, '550 5.1.1 never'),
    'the recipient, and wants data': ({'RCPT': '550 5.1.1 never', 'DATA': '354 go ahead'}, '550 5.1.1 never'),
    'data, for now': ({'DATA': [None, *['451 4.3.0 later'] * 2]}, '451 4.3.0 later'),
    'data': ({'DATA': [None, '554 5.6.0 never']}, '554 5.6.0 never'),
    'the content, for now': ({'.': [None, *['451 4.3.0 later'] * 2]}, '451 4.3.0 later'),
    'the content': ({'.': [None, '554 5.7.1 spam']}, '554 5.7.1 spam'),
}


def with_the_codes_of(extensions, said):
    """Replies without enhanced codes, if the server offers none."""
    if isinstance(said, list):
        return [with_the_codes_of(extensions, reply) for reply in said]
    return said if said is None or 'ENHANCEDSTATUSCODES' in extensions else re.sub(r' \d\.\d\.\d', '', said)


@pytest.mark.parametrize('refused', REFUSALS)
def test_a_refusal_in_the_middle_disturbs_neither_neighbour(refused, extensions):
    steps, outcome = REFUSALS[refused]
    script = {step: with_the_codes_of(extensions, said) for step, said in steps.items()}
    script |= {step: of_m2(script[step]) for step in ('MAIL', 'RCPT') if step in script}
    with ScriptedSMTPServer(script, extensions=extensions) as server, transport_to(server) as transport:
        course = play(transport, M1, M2, M3)

    assert course.outcomes == [
        {'m1@x.example': ACCEPTED},
        {'m2@x.example': with_the_codes_of(extensions, outcome)},
        {'m3@x.example': ACCEPTED},
    ]
    assert received(server) == [M1, M3]
    # Some servers say so when they take no more in this session.
    assert len(server.sessions) == (2 if refused == 'the sender' or 'for now' in refused else 1)


def test_each_recipient_in_the_middle_has_an_outcome_of_its_own(extensions):
    replies = {name: with_the_codes_of(extensions, said) for name, said in
               (('grey', '451 4.7.1 later'), ('gone', '550 5.1.1 never'))}  # fmt: skip
    script = {f'RCPT TO:<{name}@x.example>': reply for name, reply in replies.items()}
    mixed = letter('m2', 'gone', 'm2', 'grey', 'eve')
    with ScriptedSMTPServer(script, extensions=extensions) as server, transport_to(server) as transport:
        course = play(transport, M1, mixed, M3)

    assert course.outcomes[1] == {
        'gone@x.example': replies['gone'],
        'm2@x.example': ACCEPTED,
        'grey@x.example': replies['grey'],
        'eve@x.example': ACCEPTED,
    }
    assert received(server) == [M1, mixed._replace(recipients=('m2@x.example', 'eve@x.example')), M3]
    assert len(server.sessions) == 1


@pytest.mark.parametrize(
    ('refused', 'offered', 'outcome'),
    [
        (letter('m2', body='x' * 980), 'SIZE 900', '552 5.3.4 message of 1000 bytes, and {} takes 900'),
        (letter('m2', 'ü'), '8BITMIME', '553 5.6.7 recipient needs SMTPUTF8, which {} does not offer'),
    ],
)
def test_what_cannot_go_by_the_servers_own_word_is_left_out_in_its_turn(refused, offered, outcome):
    with ScriptedSMTPServer(extensions=('PIPELINING', offered)) as server, transport_to(server) as transport:
        course = play(transport, M1, refused, M3)
        words = outcome.format(f'{server.host}:{server.port}')

    assert course.outcomes == [{'m1@x.example': ACCEPTED}, {refused.recipients[0]: words}, {'m3@x.example': ACCEPTED}]
    assert received(server) == [M1, M3]
    assert b'm2' not in server.sessions[0].received


@pytest.mark.parametrize('too_many', ['452 4.5.3 too many', '452 too many', '552 too many', '550 5.5.3 too many'])
def test_too_many_recipients_in_the_middle_are_left_without_a_reply_to_be_offered_again(too_many, extensions):
    many = letter('m2', 'a', 'b', 'c', 'd', 'e')
    taken, rest = many._replace(recipients=many.recipients[:2]), many._replace(recipients=many.recipients[2:])
    script = {'RCPT': [None, None, None, too_many, too_many, too_many]}
    with ScriptedSMTPServer(script, extensions=extensions) as server, transport_to(server) as transport:
        course = play(transport, M1, many, M3, rest)

    assert [list(outcome) for outcome in course.outcomes] == [list(offer.recipients) for offer in (M1, taken, M3, rest)]
    assert received(server) == [M1, taken, M3, rest]
    assert len(server.sessions) == 1


def test_no_transaction_is_for_more_recipients_than_we_may_name_at_once():
    many = letter('m2', 'a', 'b', 'c')
    with ScriptedSMTPServer() as server, transport_to(server, max_recipients=2) as transport:
        course = play(transport, M1, many, M3)

    assert [list(outcome) for outcome in course.outcomes[1:]] == [['a@x.example', 'b@x.example'], ['m3@x.example']]
    assert received(server) == [M1, many._replace(recipients=many.recipients[:2]), M3]


# --- a server that ends its sessions ----------------------------------------

#: What a server that has taken a message in a session says to the next one, or behind its reply.
ENOUGH = {
    '421 to MAIL': {'MAIL': [None, Close('421 4.7.0 enough')]},
    'closed at MAIL': {'MAIL': [None, Close()]},
    '452 to MAIL': {'MAIL': [None, '452 4.5.3 enough']},
    'closed behind the reply': {'.': Close(ACCEPTED)},
    '421 with the reply': {'.': f'{ACCEPTED}\n421 4.7.0 enough'},
    '421 with the reply, then closed': {'.': Close(f'{ACCEPTED}\n421 4.7.0 enough')},
}


@pytest.mark.parametrize('extensions', ['all', 'stepwise'], indirect=True)
@pytest.mark.parametrize('enough', ENOUGH)
def test_a_server_that_takes_one_message_in_a_session_costs_a_new_session_and_nothing_else(enough, extensions):
    letters = [letter(f'm{index}') for index in range(5)]
    by_session = dict.fromkeys(range(5), ENOUGH[enough])
    with (
        ScriptedSMTPServer(by_session=by_session, extensions=extensions) as server,
        transport_to(server) as transport,
    ):
        course = play(transport, *letters)
        transport.close()
        after = play(transport, M1)

    assert course.trouble is None
    assert [result.trouble for result in course.results] == [None] * 5
    assert course.outcomes == [{offer.recipients[0]: ACCEPTED} for offer in letters]
    assert after.outcomes == [{'m1@x.example': ACCEPTED}]
    assert received(server) == [*letters, M1]
    assert len(server.sessions) == 6


def test_a_session_that_ends_while_an_outcome_is_written_down_is_replaced_if_nothing_was_announced():
    left = [M2, M3]
    with ScriptedSMTPServer(extensions=OFFERS['stepwise']) as server, transport_to(server) as transport:
        results = stream(transport, M1, lambda: left.pop(0) if left else None)
        said = [next(results)]
        server.hang_up()
        said.extend(results)

    assert [list(result.replies) for result in said] == [['m1@x.example'], ['m2@x.example'], ['m3@x.example']]
    assert [result.trouble for result in said] == [None] * 3
    assert received(server) == [M1, M2, M3]
    assert len(server.sessions) == 2


def test_an_idle_session_of_another_thread_is_taken_before_a_new_one_is_opened():
    left = [M3]
    with ScriptedSMTPServer(by_session={0: ENOUGH['421 to MAIL']}) as server, transport_to(server) as transport:
        results = stream(transport, M1, lambda: left.pop(0) if left else None)
        next(results)
        # Not announced yet: the first session is in the middle of a stream, so this opens a second one.
        play(transport, M2)
        said = list(results)

    assert [list(result.replies) for result in said] == [['m3@x.example']]
    assert received(server) == [M1, M2, M3]
    assert len(server.sessions) == 2


@pytest.mark.parametrize('enough', ENOUGH)
@pytest.mark.parametrize('following', [[M2], [M2, M3]], ids=['one', 'two'])
def test_if_no_new_session_can_be_had_nothing_has_happened_to_the_messages_that_follow(enough, following):
    script = {'connect': [None, Close('421 4.3.2 no more')]}
    with (
        ScriptedSMTPServer(script, by_session={0: ENOUGH[enough]}) as server,
        transport_to(server) as transport,
    ):
        course = play(transport, M1, *following)
        transport.close()
        after = play(transport, *following)

    assert course.outcomes == [{'m1@x.example': ACCEPTED}]
    assert (course.trouble.code, course.trouble.in_message) == (421, False)
    assert after.outcomes == [{offer.recipients[0]: ACCEPTED} for offer in following]
    assert received(server) == [M1, *following]
    assert len(server.sessions) == 3


@pytest.mark.parametrize('reply', ['502 5.5.1 what?', '451 4.3.0 not now'])
def test_a_server_that_refuses_rset_costs_a_new_session_for_each_message_that_came_to_nothing(reply, extensions):
    letters = [letter(name) for name in ('m1', 'nobody', 'm2', 'm3', 'nobody', 'nobody', 'm4')]
    script = {'RSET': lambda command: reply, 'RCPT TO:<nobody@x.example>': lambda command: '550 5.1.1 never'}
    with ScriptedSMTPServer(script, extensions=extensions) as server, transport_to(server) as transport:
        course = play(transport, *letters)
        # In the session that is left behind.
        after = play(transport, letters[1], M1)

    assert (course.trouble, after.trouble) == (None, None)
    assert [next(iter(result.replies.values())).code for result in course.results] == [
        250,
        550,
        250,
        250,
        550,
        550,
        250,
    ]
    assert received(server) == [letters[0], letters[2], letters[3], letters[6], M1]
    assert len(server.sessions) == 5


def test_no_new_session_is_opened_for_what_cannot_go():
    large = letter('m2', body='x' * 1000)
    with (
        ScriptedSMTPServer({'.': f'{ACCEPTED}\n421 4.7.0 enough'}, extensions=('PIPELINING', 'SIZE 900')) as server,
        transport_to(server) as transport,
    ):
        course = play(transport, M1, large)

    assert [next(iter(result.replies.values())).code for result in course.results] == [250, 552]
    assert len(server.sessions) == 1


@pytest.mark.parametrize('enough', ENOUGH)
def test_a_server_that_ends_its_session_after_the_last_message_does_not_matter(enough):
    with ScriptedSMTPServer(by_session={0: ENOUGH[enough]}) as server, transport_to(server) as transport:
        course = play(transport, M1)

    assert course == Course([SendResult(course.results[0].replies, f'smtp:127.0.0.1:{server.port}')], None, [])
    assert course.outcomes == [{'m1@x.example': ACCEPTED}]


def test_a_sender_who_has_to_wait_has_that_for_an_outcome_in_a_new_session():
    script = {'MAIL': of_m2('450 4.7.1 slow down')}
    letters = [M1, *[M2._replace(recipients=(f'r{index}@x.example',)) for index in range(4)], M3]
    with ScriptedSMTPServer(script) as server, transport_to(server) as transport:
        course = play(transport, *letters)

    assert [*course.outcomes[0].values(), *course.outcomes[-1].values()] == [ACCEPTED] * 2
    assert [list(outcome.values()) for outcome in course.outcomes[1:-1]] == [['450 4.7.1 slow down']] * 4
    assert len(server.sessions) == 2, 'one more, and not one for each message'


def test_a_sender_who_has_to_wait_costs_one_new_session_however_often_it_comes():
    script = {'MAIL': of_m2('451 4.7.1 over quota')}
    letters = [M1, M2] * 20
    with ScriptedSMTPServer(script) as server, transport_to(server) as transport:
        course = play(transport, *letters)
        # The next one does not come to be known anew either.
        play(transport, M1, M2)

    assert [next(iter(result.replies.values())).code for result in course.results] == [250, 451] * 20
    assert received(server) == [M1] * 21
    assert len(server.sessions) == 2


def test_a_server_that_takes_one_message_in_a_session_does_so_beside_a_sender_who_has_to_wait():
    def answer_of_a_session():
        others = iter([None])
        return {'MAIL': lambda command: '451 4.7.1 no' if '<m2@' in command else next(others, '452 4.5.3 enough')}

    letters = [M1, M2, M3, M2, M1, M3, M2]
    by_session = {number: answer_of_a_session() for number in range(10)}
    with ScriptedSMTPServer(by_session=by_session) as server, transport_to(server) as transport:
        course = play(transport, *letters)

    assert received(server) == [M1, M3, M1, M3]
    assert [next(iter(result.replies.values())).code for result in course.results] == [
        250,
        451,
        250,
        451,
        250,
        250,
        451,
    ]
    assert len(server.sessions) == 4


def test_what_a_new_session_has_said_of_a_sender_is_forgotten_with_time_and_when_it_is_accepted():
    now = [0.0]
    replies = ['451 4.7.1 later'] * 6 + [None] + ['451 4.7.1 later'] * 2
    script = {'MAIL': lambda command: replies.pop(0) if '<m2@' in command else None}
    with (
        ScriptedSMTPServer(script) as server,
        transport_to(server, clock=lambda: now[0], idle_timeout=3600) as transport,
    ):
        play(transport, M1, M2, M1)
        assert len(server.sessions) == 2
        now[0] = VALID_FOR - 1
        play(transport, M2)
        assert len(server.sessions) == 2, 'what the second has said still holds'
        now[0] = VALID_FOR
        play(transport, M2, M1)
        assert len(server.sessions) == 3
        play(transport, M2, M2, M1)
        assert len(server.sessions) == 3, 'it was known for the first, and accepted for the second'
        play(transport, M2)
        assert len(server.sessions) == 4

    assert replies == []


def test_of_how_many_senders_it_is_known_that_they_have_to_wait_is_bounded():
    known = Objections(lambda: 0)
    for number in range(10 * MAX_KNOWN):
        known.add(f'{number}@site.example', number)
        assert known.holds(f'{number}@site.example', 'nothing that was said')

    held = sum(known.holds(f'{number}@site.example', 'nothing that was said') for number in range(10 * MAX_KNOWN))
    assert held <= MAX_KNOWN


# --- trouble in the middle --------------------------------------------------


@pytest.mark.parametrize('extensions', ['all', 'stepwise'], indirect=True)
@pytest.mark.parametrize('step', ['RCPT', 'DATA', 'content'])
@pytest.mark.parametrize('how', [*FAREWELLS.values(), Close('what?')], ids=[*FAREWELLS, 'noise'])
def test_a_session_that_breaks_before_the_final_dot_leaves_that_message_and_the_next_as_they_were(
    step, how, extensions
):
    script = {step: of_m2(how) if step == 'RCPT' else [None, how]}
    # More than all buffers on the way take: the final dot is still with us.
    second = letter('m2', body='x' * 25_000_000) if step == 'content' else M2
    with ScriptedSMTPServer(script, extensions=extensions) as server, transport_to(server) as transport:
        course = play(transport, M1, second, M3)
        after = play(transport, M3)

    assert course.outcomes == [{'m1@x.example': ACCEPTED}]
    assert course.trouble.in_message
    assert after.outcomes == [{'m3@x.example': ACCEPTED}]
    assert received(server) == [M1, M3]
    assert len(server.sessions) == 2
    assert b'Subject: m3' not in server.sessions[0].received


@pytest.mark.parametrize('extensions', ['all', 'stepwise'], indirect=True)
@pytest.mark.parametrize('how', [Close(), 'what?', '354 go on'], ids=['closed', 'noise', 'unfit'])
def test_a_session_that_breaks_after_the_final_dot_leaves_that_outcome_unknown_and_the_next_as_it_was(how, extensions):
    with ScriptedSMTPServer({'.': [None, how]}, extensions=extensions) as server, transport_to(server) as transport:
        course = play(transport, M1, M2, M3)
        after = play(transport, M3)

    assert course.outcomes[0] == {'m1@x.example': ACCEPTED}
    assert course.results[1].replies['m2@x.example'].outcome_unknown
    assert [bool(result.trouble) for result in course.results] == [False, True]
    assert course.results[1].trouble.in_message
    assert course.trouble is None
    assert after.outcomes == [{'m3@x.example': ACCEPTED}]
    assert b'Subject: m3' not in server.sessions[0].received


def test_421_for_an_answer_to_the_final_dot_says_that_nothing_was_taken():
    with ScriptedSMTPServer({'.': [None, Close('421 4.3.2 no')]}) as server, transport_to(server) as transport:
        course = play(transport, M1, M2, M3)

    assert course.outcomes == [{'m1@x.example': ACCEPTED}]
    assert (course.trouble.code, course.trouble.in_message) == (421, True)
    assert b'Subject: m3' not in server.sessions[0].received


@pytest.mark.parametrize(
    ('how', 'extensions'),
    [('what?', 'all'), ('what?', 'stepwise'), ('550 nobody asked', 'stepwise')],
    indirect=['extensions'],
)
def test_noise_behind_a_reply_costs_a_new_session_and_nothing_else(how, extensions):
    script = {'.': [None, f'{ACCEPTED}\n{how}']}
    with ScriptedSMTPServer(script, extensions=extensions) as server, transport_to(server) as transport:
        course = play(transport, M1, M2, M3)

    assert course.outcomes == [{offer.recipients[0]: ACCEPTED} for offer in (M1, M2, M3)]
    assert [result.trouble for result in course.results] == [None] * 3
    assert received(server) == [M1, M2, M3]
    assert len(server.sessions) == 2


@pytest.mark.parametrize('step', ['MAIL', 'RCPT', 'DATA', 'content'])
def test_a_server_that_falls_silent_before_the_final_dot_is_trouble_and_nothing_has_happened(step):
    script = {step: of_m2(Silence()) if step in ('MAIL', 'RCPT') else [None, Silence()]}
    with ScriptedSMTPServer(script) as server, transport_to(server, timeout=SHORT, data_timeout=SHORT) as transport:
        course = play(transport, M1, M2, M3)

    if step == 'content':
        # It has everything, and not said what it makes of it.
        assert course.results[1].replies['m2@x.example'].outcome_unknown
        course = course._replace(trouble=course.results.pop().trouble)
    assert course.outcomes == [{'m1@x.example': ACCEPTED}]
    assert f'did nothing for {SHORT} seconds' in str(course.trouble)
    assert course.trouble.in_message
    assert course.trouble.at_mail == (step == 'MAIL')
    assert received(server) == [M1]


def test_a_refusal_before_the_content_is_complete_counts_and_the_next_message_is_as_it_was():
    large = letter('m2', body='x' * 25_000_000)
    script = {'content': [None, Close('552 5.3.4 too much')]}
    with ScriptedSMTPServer(script) as server, transport_to(server) as transport:
        course = play(transport, M1, large, M3)
        after = play(transport, M3)

    assert course.outcomes == [{'m1@x.example': ACCEPTED}, {'m2@x.example': '552 5.3.4 too much'}]
    assert 'replied before the end of the data' in str(course.results[1].trouble)
    assert after.outcomes == [{'m3@x.example': ACCEPTED}]


# --- broken off by ourselves ------------------------------------------------


@pytest.fixture
def in_thread():
    """Play a stream in a thread: takes what ``play`` takes, and returns a function that waits for the course."""
    threads = []

    def in_thread(*args, **options):
        courses = []
        threads.append(threading.Thread(target=lambda: courses.append(play(*args, **options))))
        threads[-1].start()

        def course():
            threads[-1].join(30)
            return courses[0]

        return course

    yield in_thread
    for thread in threads:
        thread.join(30)


@pytest.mark.parametrize('step', ['MAIL', 'RCPT', '.'])
def test_who_breaks_off_gets_no_new_session_for_what_was_under_way(step, in_thread, make_event):
    go_on, m1_is_done = make_event(), make_event()
    script = {step: of_m2(Wait(go_on)) if step != '.' else [None, Wait(go_on)]}
    with ScriptedSMTPServer(script) as server, transport_to(server) as transport:
        course = in_thread(transport, M1, M2, M3, asked_for_last=m1_is_done)
        assert m1_is_done.wait(30)
        reached = b'Subject: m2' if step == '.' else b'MAIL FROM:<m2@'
        server.wait_for(lambda: any(reached in session.received for session in server.sessions))
        transport.abort()
        ended = course()
        go_on.set()
        after = play(transport, M3)

    unknown = [{'m2@x.example': str(OUTCOME_UNKNOWN)}] if step == '.' else []
    assert ended.outcomes == [{'m1@x.example': ACCEPTED}, *unknown]
    assert bool(ended.trouble) == (step != '.')
    assert after.outcomes == [{'m3@x.example': ACCEPTED}]
    assert len(server.sessions) == 2


def test_who_breaks_off_while_a_session_is_opened_sends_nothing_over_it(in_thread, make_event):
    begun, go_on = make_event(), make_event()

    def connect(address, timeout):
        begun.set()
        assert go_on.wait(30)
        return create_connection(address, timeout)

    with ScriptedSMTPServer() as server, transport_to(server, connect=connect) as transport:
        course = in_thread(transport, M1)
        assert begun.wait(30)
        transport.abort()
        go_on.set()
        ended = course()
        server.wait_for(lambda: server.sessions and server.sessions[0].is_over)
        after = play(transport, M1)

    assert ended.results == []
    assert 'given up by this process' in str(ended.trouble)
    assert verbs(server.sessions[0]) == []
    assert after.outcomes == [{'m1@x.example': ACCEPTED}]


# --- everything at once -----------------------------------------------------


def test_whatever_becomes_of_its_neighbours_each_message_has_the_outcome_that_is_due_to_it(extensions):
    steps, replies = ('MAIL', 'RCPT', 'DATA', '.'), ('550 5.1.1 never', '451 4.7.1 later', None)
    kinds = [(step, with_the_codes_of(extensions, reply)) for step in steps for reply in replies]
    # Each kind comes after each other one.
    order = [kinds[index * distance % len(kinds)] for distance in range(1, len(kinds)) for index in range(len(kinds))]
    letters = [letter(f'm{number}') for number in range(len(order))]
    under_way = []

    def answer_at(step):
        def answer(command):
            if step == 'MAIL':
                under_way.append(order[int(re.search(r'<m(\d+)@', command)[1])])
            refused_at, reply = under_way[-1]
            return reply if refused_at == step else None

        return answer

    script = {step: answer_at(step) for step in steps}
    with ScriptedSMTPServer(script, extensions=extensions) as server, transport_to(server) as transport:
        course = play(transport, *letters)

    assert course.trouble is None
    assert [list(outcome.values()) for outcome in course.outcomes] == [[reply or ACCEPTED] for _, reply in order]
    assert received(server) == [offer for offer, (_, reply) in zip(letters, order, strict=True) if reply is None]
