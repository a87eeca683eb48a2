"""The dialogue without a socket: bytes are pushed in, bytes come out."""

from __future__ import annotations

import re
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyramid_mailqueue.exceptions import AddressError, NoRecipients, ServerTrouble
from pyramid_mailqueue.message.addresses import check_address
from pyramid_mailqueue.results import Reply
from pyramid_mailqueue.transports.smtp.transaction import (
    CHUNK,
    MAX_REPLY_LINE,
    MAX_REPLY_LINES,
    Capabilities,
    Dialogue,
    ReplyReader,
)

A, B, C = 'a@x.example', 'b@x.example', 'c@x.example'
SENDER = 'sender@site.example'
MAIL = b'MAIL FROM:<sender@site.example>\r\n'
CONTENT = b'Subject: s\r\n\r\nhello\r\n'

PIPELINING = Capabilities(pipelining=True)
STEPWISE = Capabilities()

OK = b'250 ok\r\n'
GO = b'354 go\r\n'


def rcpt(*recipients):
    return b''.join(f'RCPT TO:<{recipient}>\r\n'.encode() for recipient in recipients)


def said(dialogue):
    """Everything that the dialogue has to say now; it is with the network then."""
    spoken = bytearray()
    while chunk := dialogue.data_to_send():
        spoken += chunk
        dialogue.sent(len(chunk))
    return bytes(spoken)


def codes(transaction):
    return {recipient: reply.code for recipient, reply in transaction.replies.items()}


def started(capabilities=PIPELINING, recipients=(A, B), content=CONTENT):
    """A dialogue that has said as much of one message as it can."""
    dialogue = Dialogue(capabilities, 'mx.example:25')
    transaction = dialogue.submit(SENDER, recipients, content)
    said(dialogue)
    return dialogue, transaction


# --- one message with PIPELINING ---


def test_with_pipelining_everything_up_to_the_data_goes_at_once_and_the_content_with_its_dot():
    dialogue = Dialogue(PIPELINING)
    transaction = dialogue.submit(SENDER, [A, B], CONTENT)

    assert said(dialogue) == MAIL + rcpt(A, B) + b'DATA\r\n'
    assert dialogue.receive_data(OK + OK + OK + GO) == 4
    assert said(dialogue) == CONTENT + b'.\r\n'
    assert dialogue.awaits_end_of_data
    assert not transaction.done

    dialogue.receive_data(b'250 2.0.0 queued as 1\r\n')

    assert transaction.done
    assert transaction.replies == dict.fromkeys([A, B], Reply(250, 'queued as 1', '2.0.0'))
    assert dialogue.is_idle


def test_replies_may_come_byte_by_byte_and_over_several_lines():
    dialogue, transaction = started(recipients=[A])
    for byte in b'250 ok\r\n250-2.1.5 it\r\n250 2.1.5 is ok\r\n354 go\r\n':
        dialogue.receive_data(bytes([byte]))
    said(dialogue)
    for byte in b'250-2.0.0 first\r\n250 2.0.0 second\r\n':
        dialogue.receive_data(bytes([byte]))

    assert transaction.replies == {A: Reply(250, 'first second', '2.0.0')}


def test_each_recipient_has_an_outcome_of_its_own():
    dialogue, transaction = started(recipients=[A, B, C])
    dialogue.receive_data(OK + b'550 5.1.1 unknown\r\n' + OK + b'450 4.2.1 full\r\n' + GO)
    said(dialogue)
    dialogue.receive_data(OK)

    assert codes(transaction) == {A: 550, B: 250, C: 450}
    assert transaction.untried == ()


@pytest.mark.parametrize('code', [250, 451, 552])
def test_the_reply_to_the_content_is_the_outcome_of_those_who_were_accepted(code):
    dialogue, transaction = started()
    dialogue.receive_data(OK + b'550 no\r\n' + OK + GO)
    said(dialogue)
    dialogue.receive_data(f'{code} so be it\r\n'.encode())

    assert codes(transaction) == {A: 550, B: code}
    assert dialogue.is_idle


def test_a_refused_sender_is_the_outcome_of_everybody_and_the_replies_to_the_rest_count_for_nothing():
    dialogue, transaction = started()
    dialogue.receive_data(b'451 4.3.0 not now\r\n503 mail first\r\n')
    assert not transaction.done
    dialogue.receive_data(b'250 whatever\r\n503 mail first\r\n')

    assert codes(transaction) == {A: 451, B: 451}
    assert transaction.done
    assert dialogue.is_idle


def test_the_reply_to_data_is_the_outcome_of_those_who_were_accepted():
    dialogue, transaction = started()
    dialogue.receive_data(OK + OK + b'550 no\r\n' + b'451 not now\r\n')

    assert codes(transaction) == {A: 451, B: 550}
    assert transaction.done


@pytest.mark.parametrize('mail', [OK, b'550 not you\r\n'], ids=['nobody accepted', 'sender refused'])
def test_a_server_that_wants_a_message_for_nobody_gets_a_lone_dot(mail):
    dialogue, transaction = started()
    dialogue.receive_data(mail + b'550 no\r\n550 no\r\n' + GO)
    assert said(dialogue) == b'.\r\n'
    assert not transaction.done
    dialogue.receive_data(b'250 a message for nobody\r\n')

    assert transaction.done
    assert codes(transaction) == {A: 550, B: 550}
    dialogue.submit(SENDER, [A], CONTENT)
    assert said(dialogue).startswith(MAIL)


def test_the_same_recipient_is_named_once():
    dialogue = Dialogue(PIPELINING)
    dialogue.submit(SENDER, [A, B, A], CONTENT)

    assert said(dialogue) == MAIL + rcpt(A, B) + b'DATA\r\n'


def test_the_null_sender_is_written_as_empty_brackets():
    dialogue = Dialogue(PIPELINING)
    dialogue.submit('', [A], CONTENT)

    assert said(dialogue).startswith(b'MAIL FROM:<>\r\n')


def test_a_recipient_with_a_domain_in_another_script_is_reported_as_it_was_given():
    dialogue = Dialogue(PIPELINING)
    transaction = dialogue.submit(SENDER, ['a@bücher.example'], CONTENT)
    assert rcpt('a@xn--bcher-kva.example') in said(dialogue)
    dialogue.receive_data(OK + OK + GO)
    said(dialogue)
    dialogue.receive_data(OK)

    assert codes(transaction) == {'a@bücher.example': 250}


# --- one message without PIPELINING ---


def test_without_pipelining_each_command_waits_for_the_reply_to_the_last():
    dialogue = Dialogue(STEPWISE)
    transaction = dialogue.submit(SENDER, [A, B], CONTENT)
    story = []
    for reply in (OK, OK, b'550 no\r\n', GO, OK):
        story.append(said(dialogue))
        dialogue.receive_data(reply)

    assert story == [MAIL, rcpt(A), rcpt(B), b'DATA\r\n', CONTENT + b'.\r\n']
    assert codes(transaction) == {A: 250, B: 550}
    assert dialogue.is_idle


def test_without_pipelining_nothing_is_said_after_a_refused_sender():
    dialogue, transaction = started(STEPWISE)
    dialogue.receive_data(b'550 not you\r\n')

    assert codes(transaction) == {A: 550, B: 550}
    assert said(dialogue) == b''
    assert dialogue.is_idle


def test_without_pipelining_data_is_left_out_if_nobody_was_accepted():
    dialogue, transaction = started(STEPWISE)
    for reply in (OK, b'550 no\r\n', b'450 not now\r\n'):
        said(dialogue)
        dialogue.receive_data(reply)

    assert codes(transaction) == {A: 550, B: 450}
    assert transaction.done
    assert said(dialogue) == b''


# --- a stream of messages ---


def test_the_next_message_begins_in_the_same_write_as_the_end_of_the_content_before_it():
    dialogue, first = started(recipients=[A])
    second = dialogue.submit('two@site.example', [B], b'two\r\n')
    third = dialogue.submit('three@site.example', [C], b'three\r\n')
    assert said(dialogue) == b''

    dialogue.receive_data(OK + OK + GO)
    assert bytes(dialogue.data_to_send()) == (
        CONTENT + b'.\r\nMAIL FROM:<two@site.example>\r\n' + rcpt(B) + b'DATA\r\n'
    )
    said(dialogue)
    dialogue.receive_data(OK + OK + OK + GO)
    assert first.done
    assert not second.done
    assert said(dialogue) == b'two\r\n.\r\nMAIL FROM:<three@site.example>\r\n' + rcpt(C) + b'DATA\r\n'
    dialogue.receive_data(OK + OK + OK + GO)
    assert said(dialogue) == b'three\r\n.\r\n'
    dialogue.receive_data(OK)

    assert [codes(first), codes(second), codes(third)] == [{A: 250}, {B: 250}, {C: 250}]
    assert dialogue.is_idle


@pytest.mark.parametrize(
    ('replies_to_the_second', 'outcome', 'goes_before_the_third'),
    [
        # MAIL is refused: nothing is open at the server.
        (b'451 no\r\n503 no\r\n503 no\r\n503 no\r\n', {A: 451, B: 451}, b''),
        # Nobody is accepted: the server has seen a MAIL, and no data.
        (b'250 ok\r\n550 no\r\n551 no\r\n503 no\r\n', {A: 550, B: 551}, b'RSET\r\n'),
        # DATA is refused: the same.
        (b'250 ok\r\n250 ok\r\n551 no\r\n452 no\r\n', {A: 452, B: 551}, b'RSET\r\n'),
        # Nobody is accepted, but the server wants data: the lone dot ends that.
        (b'250 ok\r\n550 no\r\n551 no\r\n354 go\r\n', {A: 550, B: 551}, b'.\r\n'),
    ],
)
def test_a_refusal_in_the_middle_disturbs_neither_neighbour(replies_to_the_second, outcome, goes_before_the_third):
    dialogue, first = started(recipients=[A])
    second = dialogue.submit('two@site.example', [A, B], b'two\r\n')
    third = dialogue.submit('three@site.example', [C], b'three\r\n')
    dialogue.receive_data(OK + OK + GO)
    said(dialogue)

    dialogue.receive_data(b'250 one\r\n' + replies_to_the_second)
    group = b'MAIL FROM:<three@site.example>\r\n' + rcpt(C) + b'DATA\r\n'
    assert said(dialogue) == goes_before_the_third + group
    dialogue.receive_data((OK if goes_before_the_third else b'') + OK + OK + GO)
    assert said(dialogue) == b'three\r\n.\r\n'
    dialogue.receive_data(b'250 three\r\n')

    assert (first.done, second.done, third.done) == (True, True, True)
    assert first.replies == {A: Reply(250, 'one')}
    assert codes(second) == outcome
    assert third.replies == {C: Reply(250, 'three')}


def test_a_refused_content_does_not_disturb_the_next_message():
    dialogue, first = started(recipients=[A])
    second = dialogue.submit(SENDER, [B], b'two\r\n')
    dialogue.receive_data(OK + OK + GO)
    said(dialogue)
    dialogue.receive_data(b'554 spam\r\n' + OK + OK + GO)
    said(dialogue)
    dialogue.receive_data(OK)

    assert (codes(first), codes(second)) == ({A: 554}, {B: 250})


def test_a_message_that_comes_while_the_reply_to_the_last_is_awaited_goes_at_once():
    dialogue, _ = started(recipients=[A])
    dialogue.receive_data(OK + OK + GO)
    said(dialogue)
    dialogue.submit(SENDER, [B], b'two\r\n')

    assert said(dialogue) == MAIL + rcpt(B) + b'DATA\r\n'


def test_without_pipelining_a_stream_is_sent_message_by_message():
    dialogue, first = started(STEPWISE, recipients=[A])
    second = dialogue.submit('two@site.example', [B], b'two\r\n')
    story = []
    for reply in (OK, b'550 no\r\n', OK, OK, OK, GO, OK):
        story.append(said(dialogue))
        dialogue.receive_data(reply)

    two = b'MAIL FROM:<two@site.example>\r\n'
    assert story == [b'', rcpt(A), b'RSET\r\n', two, rcpt(B), b'DATA\r\n', b'two\r\n.\r\n']
    assert (codes(first), codes(second)) == ({A: 550}, {B: 250})


def test_after_rset_the_session_is_as_new():
    dialogue, _ = started(recipients=[A])
    dialogue.receive_data(OK + b'550 no\r\n503 no\r\n')
    dialogue.submit(SENDER, [A], CONTENT)
    assert said(dialogue).startswith(b'RSET\r\nMAIL')
    dialogue.receive_data(OK + b'550 no\r\n503 no\r\n503 no\r\n')
    dialogue.submit(SENDER, [A], CONTENT)

    assert said(dialogue).startswith(b'MAIL')


# --- too many recipients ---


@pytest.mark.parametrize(
    'reply', ['452 too many', '452 4.5.3 too many', '452 5.5.3 too many', '552 too many', '451 4.5.3 too many']
)
def test_recipients_beyond_what_the_server_takes_are_left_untried(reply):
    dialogue, transaction = started(recipients=[A, B, C])
    dialogue.receive_data(OK + OK + f'{reply}\r\n'.encode() * 2 + GO)
    said(dialogue)
    dialogue.receive_data(OK)

    assert transaction.done
    assert codes(transaction) == {A: 250}
    assert transaction.untried == (B, C)


@pytest.mark.parametrize('reply', ['452 4.2.2 mailbox full', '552 5.2.2 mailbox full', '450 4.2.1 slow down'])
def test_a_full_mailbox_is_not_too_many_recipients(reply):
    dialogue, transaction = started()
    dialogue.receive_data(OK + OK + f'{reply}\r\n'.encode() + GO)
    said(dialogue)
    dialogue.receive_data(OK)

    assert codes(transaction) == {A: 250, B: int(reply[:3])}


def test_too_many_before_anybody_was_accepted_is_an_outcome_or_there_would_be_no_end():
    dialogue, transaction = started()
    dialogue.receive_data(OK + b'452 full\r\n452 full\r\n503 no\r\n')

    assert codes(transaction) == {A: 452, B: 452}
    assert transaction.untried == ()


# --- what cannot go is never said ---


def test_a_message_larger_than_the_server_takes_is_refused_unsaid():
    size = len(CONTENT)
    dialogue = Dialogue(Capabilities(size=size), 'mx.example:25')
    assert not dialogue.submit(SENDER, [A], CONTENT).done
    said(dialogue)

    dialogue = Dialogue(Capabilities(size=size - 1), 'mx.example:25')
    transaction = dialogue.submit(SENDER, [A, B], CONTENT)

    assert transaction.done
    assert said(dialogue) == b''
    assert dialogue.is_idle
    assert codes(transaction) == {A: 552, B: 552}
    reply = transaction.replies[A]
    assert (reply.enhanced, reply.from_server) == ('5.3.4', False)
    assert str(size) in reply.text
    assert 'mx.example:25' in reply.text


def test_the_size_counts_the_line_end_that_will_be_added_and_not_the_dots():
    dialogue = Dialogue(Capabilities(size=0))
    dialogue.submit(SENDER, [A], b'.\r\n.')

    assert said(dialogue) == MAIL[:-2] + b' SIZE=6\r\n'


@pytest.mark.parametrize(
    ('capabilities', 'sender', 'recipient', 'content', 'parameters'),
    [
        (Capabilities(), SENDER, A, 'Subject: s\r\n\r\nü\r\n', ''),
        (Capabilities(eight_bit_mime=True), SENDER, A, 'Subject: s\r\n\r\nü\r\n', ' BODY=8BITMIME'),
        (Capabilities(eight_bit_mime=True), SENDER, A, 'Subject: s\r\n\r\nu\r\n', ''),
        (Capabilities(smtputf8=True), SENDER, A, 'Subject: s\r\n\r\nü\r\n', ''),
        (Capabilities(smtputf8=True), SENDER, A, 'Subject: ü\r\n\r\nu\r\n', ' SMTPUTF8'),
        (Capabilities(smtputf8=True), SENDER, A, 'Subject: ü', ' SMTPUTF8'),
        (Capabilities(smtputf8=True), 'ü@x.example', A, 'Subject: s\r\n\r\nu\r\n', ' SMTPUTF8'),
        (Capabilities(smtputf8=True), SENDER, 'ü@x.example', 'Subject: s\r\n\r\nu\r\n', ' SMTPUTF8'),
        (Capabilities(smtputf8=True), SENDER, 'u@bücher.example', 'Subject: s\r\n\r\nu\r\n', ''),
        (
            Capabilities(size=1000, eight_bit_mime=True, smtputf8=True),
            SENDER, A, 'Subject: ü\r\n\r\nu\r\n', ' SIZE=18 BODY=8BITMIME SMTPUTF8',
        ),
    ],
)  # fmt: skip
def test_mail_has_the_parameters_that_are_offered_and_needed(capabilities, sender, recipient, content, parameters):
    dialogue = Dialogue(capabilities)
    dialogue.submit(sender, [recipient], content.encode())

    assert said(dialogue).decode() == f'MAIL FROM:<{sender}>{parameters}\r\n'


@pytest.mark.parametrize(
    ('sender', 'content', 'code', 'what'),
    [('ü@x.example', b'Subject: s\r\n\r\n', 553, 'sender'), (SENDER, b'Subject: \xc3\xbc\r\n\r\n', 550, 'header')],
)
def test_without_smtputf8_a_sender_or_header_that_needs_it_is_refused_unsaid(sender, content, code, what):
    dialogue = Dialogue(PIPELINING)
    transaction = dialogue.submit(sender, [A, B], content)

    assert said(dialogue) == b''
    assert codes(transaction) == {A: code, B: code}
    assert transaction.replies[A].enhanced == '5.6.7'
    assert transaction.replies[A].text.startswith(what)
    assert not transaction.replies[A].from_server


@pytest.mark.parametrize('smtputf8', [True, False])
@pytest.mark.parametrize('content', ['Subject: Grüße\r\n\r\nu\r\n', 'Subject: Grüße', 'To: ü\r\n\r\nü\r\n'])
def test_a_header_in_another_encoding_than_utf8_goes_as_it_is(content, smtputf8):
    latin = content.encode('latin-1')
    dialogue = Dialogue(Capabilities(eight_bit_mime=True, smtputf8=smtputf8))
    transaction = dialogue.submit(SENDER, [A], latin)
    sent = said(dialogue)
    for reply in (OK, OK, GO, OK):
        dialogue.receive_data(reply)
        sent += said(dialogue)

    assert sent.startswith(MAIL[:-2] + b' BODY=8BITMIME\r\n')
    assert latin in sent
    assert codes(transaction) == {A: 250}


def test_the_encoding_of_the_body_does_not_matter_to_the_header():
    dialogue = Dialogue(Capabilities(smtputf8=True))
    dialogue.submit(SENDER, [A], 'Subject: ü\r\n\r\n'.encode() + b'\xfc')

    assert said(dialogue) == MAIL[:-2] + b' SMTPUTF8\r\n'


def test_without_smtputf8_only_the_recipients_that_need_it_are_refused():
    dialogue = Dialogue(PIPELINING)
    transaction = dialogue.submit(SENDER, [A, 'ü@x.example', B], CONTENT)
    assert said(dialogue) == MAIL + rcpt(A, B) + b'DATA\r\n'
    dialogue.receive_data(OK + OK + OK + GO)
    said(dialogue)
    dialogue.receive_data(OK)

    assert codes(transaction) == {'ü@x.example': 553, A: 250, B: 250}


@pytest.mark.parametrize(
    ('features', 'capabilities'),
    [
        ({}, Capabilities()),
        ({'pipelining': '', 'help': ''}, Capabilities(pipelining=True)),
        ({'pipelining': '', '8bitmime': ''}, Capabilities(pipelining=True, eight_bit_mime=True)),
        ({'size': '35882577'}, Capabilities(size=35882577)),
        ({'size': '1000 and a word'}, Capabilities(size=1000)),
        # RFC 1870 section 4: no limit is named.
        ({'size': '0'}, Capabilities(size=0)),
        ({'size': ''}, Capabilities(size=0)),
        ({'size': 'much'}, Capabilities(size=0)),
        ({'smtputf8': '', 'enhancedstatuscodes': ''}, Capabilities(smtputf8=True, enhanced_status_codes=True)),
    ],
)
def test_capabilities_are_read_from_the_reply_to_ehlo(features, capabilities):
    assert Capabilities.from_ehlo(features) == capabilities


# --- the server's trouble ---


@pytest.mark.parametrize('heard', [b'', OK, OK + OK, OK + OK + OK], ids=['MAIL', 'first RCPT', 'second RCPT', 'DATA'])
def test_421_is_trouble_wherever_it_comes(heard):
    dialogue, transaction = started()
    if heard:
        dialogue.receive_data(heard)
    with pytest.raises(ServerTrouble, match=r'mx\.example:25 closed the session: 421 4\.3\.2 shut') as caught:
        dialogue.receive_data(b'421 4.3.2 shutting down\r\n')

    assert caught.value.code == 421
    assert not dialogue.is_idle
    assert transaction.replies == {}
    assert transaction.untried == (A, B)
    assert transaction.answered == bool(heard)


def test_421_for_an_answer_to_the_content_says_that_it_was_not_accepted():
    dialogue, transaction = started()
    dialogue.receive_data(OK + b'550 no\r\n' + OK + GO)
    said(dialogue)
    with pytest.raises(ServerTrouble):
        dialogue.receive_data(b'421 too busy\r\n')

    assert codes(transaction) == {A: 550}


@pytest.mark.parametrize('code', [530, 534, 535, 538])
def test_a_server_that_wants_a_login_first_is_not_the_fault_of_the_message(code):
    dialogue, transaction = started()
    with pytest.raises(ServerTrouble, match=r'mailqueue\.smtp_username') as caught:
        dialogue.receive_data(f'{code} 5.7.0 authentication required\r\n'.encode())

    assert caught.value.code == code
    assert transaction.replies == {}


def test_a_session_that_ended_takes_no_more_messages():
    dialogue, _ = started()
    with pytest.raises(ServerTrouble):
        dialogue.receive_data(b'421 bye\r\n')

    with pytest.raises(RuntimeError, match='421 bye'):
        dialogue.submit(SENDER, [A], CONTENT)


NO_REPLIES = [
    b'HTTP/1.1 400 Bad Request\r\n',
    b'SSH-2.0-OpenSSH_9.2\r\n',
    b'\x15\x03\x01\x00\x02\x02\x46\r\n',
    b'25 ok\r\n',
    b'2500 ok\r\n',
    b'250+ok\r\n',
    b'150 wait\r\n',
    b'650 what\r\n',
    b'\r\n',
    b'250-one\r\n251 other\r\n',
    b'250-x\r\n' * 2 * MAX_REPLY_LINES + b'550 x\r\n',
    b'x' * MAX_REPLY_LINE,
    b'250-x\r\n550 ' + b'x' * MAX_REPLY_LINE,
]


@pytest.mark.parametrize('heard', NO_REPLIES, ids=[text[:12].hex() for text in NO_REPLIES])
def test_what_is_no_reply_is_trouble(heard):
    dialogue, transaction = started()
    with pytest.raises(ServerTrouble, match=r'mx\.example:25 sent .*mailqueue\.smtp_hostname'):
        dialogue.receive_data(heard)

    assert transaction.replies == {}


@pytest.mark.parametrize('heard', [b'250\r\n', b'250 \r\n', b'250 ok\n', b'250-\r\n250\r\n', b'299 odd\r\n'])
def test_replies_are_read_liberally(heard):
    reader = ReplyReader()
    reader.feed(heard)

    code, _ = reader.next_reply()
    assert code in (250, 299)
    assert reader.next_reply() is None
    assert reader.is_empty


@pytest.mark.parametrize('number', [1, MAX_REPLY_LINES, 10 * MAX_REPLY_LINES])
@pytest.mark.parametrize('length', [1, MAX_REPLY_LINE, 10 * MAX_REPLY_LINE])
def test_a_reply_of_any_size_has_its_code_and_as_much_of_its_text_as_is_kept(number, length):
    reader = ReplyReader()
    text = b'x' * length
    for _ in range(number - 1):
        reader.feed(b'550-' + text)
        assert reader.next_reply() is None
        reader.feed(b'\r\n')
    reader.feed(b'550 ' + text + b'\r\n' + OK)

    code, lines = reader.next_reply()
    assert code == 550
    assert lines == [text[: MAX_REPLY_LINE - 4]] * min(number, MAX_REPLY_LINES)
    assert reader.next_reply() == (250, [b'ok'])
    assert reader.is_empty


@pytest.mark.parametrize('heard', [b'x' * 10_000, b'250-x\r\n' * 1500], ids=['line', 'lines'])
def test_a_reply_without_an_end_does_not_fill_the_memory(heard):
    reader = ReplyReader()
    reader.feed(b'250-')
    tracemalloc.start()
    try:
        for _ in range(500):
            reader.feed(heard)
            assert reader.next_reply() is None
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_server_that_comes_to_no_end_has_not_done_nothing():
    dialogue, transaction = started(recipients=[A])
    dialogue.receive_data(OK + OK + GO)
    said(dialogue)
    assert dialogue.receive_data(b'250-x\r\n' * 1000) == 0

    trouble = dialogue.timed_out(600)
    assert (
        str(trouble)
        == 'mx.example:25 did not complete its reply within 600 seconds before it answered the end of the data.'
    )
    assert transaction.replies[A].text == f'it may have been delivered: {trouble}'


def test_controls_in_replies_do_not_reach_logs_and_files():
    dialogue, transaction = started(recipients=[A])
    dialogue.receive_data(OK + '550 5.1.1 no\x1b[31m\x07 user\tü\r\n503 no\r\n'.encode() + b'')

    assert transaction.replies[A].text.isprintable()
    assert transaction.replies[A].text == 'no [31m  user ü'


@pytest.mark.parametrize(
    ('heard', 'reply', 'asked'),
    [
        (b'', b'354 go\r\n', 'MAIL FROM'),
        (OK, b'354 go\r\n', 'RCPT TO'),
        (OK + OK, b'250 ok\r\n', 'DATA'),
        (OK + OK, b'334 go\r\n', 'DATA'),
    ],
)
def test_an_answer_that_does_not_fit_the_question_is_trouble(heard, reply, asked):
    dialogue, transaction = started(recipients=[A])
    with pytest.raises(ServerTrouble, match=f'unexpected reply to {asked}'):
        dialogue.receive_data(heard + reply)

    assert transaction.replies == {}


@pytest.mark.parametrize(
    ('heard', 'why'),
    [
        (GO, 'sent an unexpected reply to the end of the data: 354 go.'),
        (b'hello\r\n', "sent what is not an SMTP reply: 'hello'."),
        (b'250-taken\r\n550 spam\r\n', "sent what is not an SMTP reply: '550 spam'."),
    ],
)
def test_an_answer_to_the_content_that_does_not_fit_leaves_the_outcome_unknown_and_is_told(heard, why):
    dialogue, transaction = started(recipients=[A])
    dialogue.receive_data(OK + OK + GO)
    said(dialogue)
    with pytest.raises(ServerTrouble, match=re.escape(why)):
        dialogue.receive_data(heard)

    reply = transaction.replies[A]
    assert reply.deferred
    assert reply.outcome_unknown
    assert not reply.from_server
    assert str(reply).startswith(f'451 4.5.0 it may have been delivered: mx.example:25 {why}')


@pytest.mark.parametrize('code', [451, 502])
def test_after_a_refused_rset_there_is_nothing_more_to_be_had_from_the_session(code):
    dialogue, _ = started(recipients=[A])
    dialogue.receive_data(OK + b'550 no\r\n503 no\r\n')
    next_one = dialogue.submit(SENDER, [B], CONTENT)
    said(dialogue)

    with pytest.raises(ServerTrouble, match=rf'mx\.example:25 refused RSET: {code} what\.') as caught:
        dialogue.receive_data(f'{code} what\r\n'.encode() + OK)
    assert caught.value.code == code
    assert not dialogue.is_idle
    assert not next_one.answered


def test_nonsense_in_answer_to_rset_is_trouble():
    dialogue, _ = started(recipients=[A])
    dialogue.receive_data(OK + b'550 no\r\n503 no\r\n')
    dialogue.submit(SENDER, [B], CONTENT)
    said(dialogue)

    with pytest.raises(ServerTrouble, match='unexpected reply to RSET'):
        dialogue.receive_data(GO)


def test_an_answer_before_the_question_is_trouble():
    dialogue = Dialogue(PIPELINING)
    transaction = dialogue.submit(SENDER, [A], CONTENT)
    chunk = dialogue.data_to_send()
    dialogue.sent(len(chunk) - 1)
    dialogue.receive_data(OK + OK)

    with pytest.raises(ServerTrouble, match='an unsolicited reply: 354 go'):
        dialogue.receive_data(GO)
    assert transaction.replies == {}


@pytest.mark.parametrize('reply', [OK, b'550 what\r\n', GO])
def test_a_reply_between_two_messages_is_trouble(reply):
    dialogue = Dialogue(PIPELINING)

    with pytest.raises(ServerTrouble, match='an unsolicited reply'):
        dialogue.receive_data(reply)


def test_an_acceptance_before_the_end_of_the_content_is_not_believed():
    dialogue, transaction = started(recipients=[A])
    with pytest.raises(ServerTrouble, match='an unsolicited reply: 250 ok'):
        dialogue.receive_data(OK + OK + GO + OK)

    assert transaction.replies == {}


@pytest.mark.parametrize('code', [452, 552])
def test_a_refusal_before_the_end_of_the_content_counts_and_ends_the_session(code):
    dialogue, transaction = started(content=b'x' * 3 * CHUNK)
    dialogue.receive_data(OK + b'550 no\r\n' + OK + GO)
    dialogue.sent(len(dialogue.data_to_send()))
    with pytest.raises(ServerTrouble, match=f'replied before the end of the data: {code} too big'):
        dialogue.receive_data(f'{code} too big\r\n'.encode())

    assert codes(transaction) == {A: 550, B: code}


def test_421_before_the_end_of_the_content_is_no_outcome():
    dialogue, transaction = started(recipients=[A], content=b'x' * 3 * CHUNK)
    dialogue.receive_data(OK + OK + GO)
    dialogue.sent(len(dialogue.data_to_send()))
    with pytest.raises(ServerTrouble):
        dialogue.receive_data(b'421 bye\r\n')

    assert transaction.replies == {}


# --- the connection breaks ---


@pytest.mark.parametrize(
    ('heard', 'doing'),
    [
        (b'', 'before it answered MAIL FROM'),
        (OK, 'before it answered RCPT TO'),
        (OK + OK, 'before it answered DATA'),
        (OK + OK + GO, 'while it was sent data'),
    ],
)
def test_a_connection_lost_before_the_final_dot_is_nothing_that_happened_to_the_message(heard, doing):
    dialogue, transaction = started(recipients=[A])
    if heard:
        dialogue.receive_data(heard)
    with pytest.raises(ServerTrouble, match=f'mx.example:25 closed the connection {doing}'):
        dialogue.receive_data(b'')

    assert transaction.replies == {}


def test_a_connection_lost_while_a_command_is_half_said_says_so():
    dialogue = Dialogue(PIPELINING, 'mx.example:25')
    dialogue.submit(SENDER, [A], CONTENT)
    dialogue.data_to_send()
    dialogue.sent(3)

    assert 'broke off while it was sent MAIL FROM.' in str(dialogue.connection_lost('broke off'))


def test_a_connection_lost_between_two_messages_says_so():
    assert 'between two messages' in str(Dialogue(PIPELINING).connection_lost('broke off'))


@pytest.mark.parametrize('lost', [1, 2, 3])
def test_without_the_last_byte_of_the_final_dot_nothing_happened(lost):
    dialogue, transaction = started(recipients=[A])
    dialogue.receive_data(OK + OK + GO)
    dialogue.sent(len(dialogue.data_to_send()) - lost)
    dialogue.connection_lost('broke off the connection')

    assert transaction.replies == {}


LOST = 'connection lost after the end of the data and before the reply: it may have been delivered'
LATE = 'did nothing for 600 seconds before it answered the end of the data.'


@pytest.mark.parametrize(
    ('end', 'outcome'),
    [
        ('closed', f'451 4.4.2 {LOST}'),
        ('broken', f'451 4.4.2 {LOST}'),
        ('timed out', f'451 4.4.2 it may have been delivered: mx.example:25 {LATE}'),
    ],
)
def test_after_the_final_dot_the_outcome_is_unknown_until_its_reply(end, outcome):
    dialogue, transaction = started(recipients=[A, B])
    next_one = dialogue.submit(SENDER, [C], CONTENT)
    dialogue.receive_data(OK + b'550 no\r\n' + OK + GO)
    said(dialogue)
    if end == 'broken':
        dialogue.connection_lost('broke off the connection')
    elif end == 'timed out':
        dialogue.timed_out(600)
    else:
        with pytest.raises(ServerTrouble):
            dialogue.receive_data(b'')

    assert {recipient: str(reply) for recipient, reply in transaction.replies.items()} == {A: '550 no', B: outcome}
    assert transaction.replies[B].outcome_unknown
    assert not transaction.replies[B].from_server
    assert next_one.replies == {}


def test_the_end_of_data_is_awaited_when_the_dot_has_left_and_not_before():
    dialogue, _ = started(recipients=[A])
    assert not dialogue.awaits_end_of_data
    dialogue.receive_data(OK + OK + GO)
    dialogue.sent(len(dialogue.data_to_send()) - 1)
    assert not dialogue.awaits_end_of_data
    dialogue.sent(1)
    assert dialogue.awaits_end_of_data


# --- the caller's mistakes ---

BAD_ADDRESSES = [
    'a@x.example\r\nRCPT TO:<b@x.example>',
    'a@x.example\nDATA',
    'a@x.example\rDATA',
    'a@x.example>\r\n',
    'a@x.example> SIZE=1',
    '<a@x.example>',
    'a b@x.example',
    'a@x.example BODY=8BITMIME',
    'a\0@x.example',
    'a\x7f@x.example',
    'a\x85@x.example',
    'a\udc0a@x.example',
    '"a\r\nb"@x.example',
    'a@x.ex\u2028ample',
]


@pytest.mark.parametrize('address', BAD_ADDRESSES, ids=ascii)
def test_an_address_that_could_break_out_of_its_command_is_refused_and_the_session_is_as_it_was(address):
    dialogue = Dialogue(PIPELINING)
    with pytest.raises(AddressError):
        dialogue.submit(address, [A], CONTENT)
    with pytest.raises(AddressError):
        dialogue.submit(SENDER, [A, address], CONTENT)

    assert dialogue.is_idle
    assert said(dialogue) == b''


@pytest.mark.parametrize('recipients', [[], ['']])
def test_a_message_without_recipients_is_refused(recipients):
    dialogue = Dialogue(PIPELINING)

    with pytest.raises((NoRecipients, AddressError)):
        dialogue.submit(SENDER, recipients, CONTENT)
    assert dialogue.is_idle


# --- content on the wire ---


@pytest.mark.parametrize(
    ('content', 'wire'),
    [
        (b'', b'.\r\n'),
        (b'x', b'x\r\n.\r\n'),
        (b'x\r\n', b'x\r\n.\r\n'),
        (b'x\r\n\r\n', b'x\r\n\r\n.\r\n'),
        (b'.', b'..\r\n.\r\n'),
        (b'.\r\n', b'..\r\n.\r\n'),
        (b'..x\r\n', b'...x\r\n.\r\n'),
        (b'x.\r\n', b'x.\r\n.\r\n'),
        (b'x\r\n.\r\ny', b'x\r\n..\r\ny\r\n.\r\n'),
        # Bare line ends, with which a second message could be smuggled past a server that takes them for line ends.
        (b'x\n.\ny', b'x\r\n..\r\ny\r\n.\r\n'),
        (b'x\r\n.\ny', b'x\r\n..\r\ny\r\n.\r\n'),
        (b'x\n.\r\ny', b'x\r\n..\r\ny\r\n.\r\n'),
        (b'x\r.\ry', b'x\r\n..\r\ny\r\n.\r\n'),
        (b'x\r\r\n.\r\r\ny', b'x\r\n\r\n..\r\n\r\ny\r\n.\r\n'),
        (b'x\r', b'x\r\n.\r\n'),
        # As many of each, and yet bare.
        (b'\n\r', b'\r\n\r\n.\r\n'),
        (b'a\nb\rc\r\n', b'a\r\nb\r\nc\r\n.\r\n'),
    ],
)
def test_content_is_dot_stuffed_with_crlf_line_ends(content, wire):
    dialogue, _ = started(recipients=[A], content=content)
    dialogue.receive_data(OK + OK + GO)

    assert said(dialogue) == wire


@pytest.mark.parametrize('offset', range(-3, 4))
@pytest.mark.parametrize('end', [b'\r\n.', b'\r\n.\r\n', b'\r\n..\r\n.\r\n'])
def test_dots_are_stuffed_wherever_a_piece_ends(offset, end):
    content = b'x' * (CHUNK + offset) + end + b'rest\r\n'
    dialogue, _ = started(recipients=[A], content=content)
    dialogue.receive_data(OK + OK + GO)

    assert said(dialogue) == content.replace(b'\r\n.', b'\r\n..') + b'.\r\n'


def test_a_large_content_is_handed_out_in_pieces_and_never_copied_as_a_whole():
    content = (b'x' * 998 + b'\r\n') * 25_000
    dialogue, _ = started(recipients=[A], content=content)
    dialogue.receive_data(OK + OK + GO)
    total = 0
    tracemalloc.start()
    while chunk := dialogue.data_to_send():
        total += len(chunk)
        dialogue.sent(len(chunk))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert total == len(content) + 3
    assert peak < 8 * CHUNK


def test_a_chunk_stays_the_same_until_it_is_sent():
    dialogue = Dialogue(PIPELINING)
    dialogue.submit(SENDER, [A], CONTENT)
    whole = bytes(dialogue.data_to_send())
    dialogue.submit(SENDER, [B], CONTENT)
    assert bytes(dialogue.data_to_send()) == whole
    dialogue.sent(7)

    assert bytes(dialogue.data_to_send()) == whole[7:]


def test_the_trace_has_the_dialogue_and_not_the_content():
    lines = []
    dialogue = Dialogue(PIPELINING, trace=lines.append)
    dialogue.submit(SENDER, [A], CONTENT)
    said(dialogue)
    dialogue.receive_data(OK + b'250-2.1.5 yes\r\n250 2.1.5 indeed\r\n' + GO)
    said(dialogue)
    dialogue.receive_data(OK)

    assert lines == [
        'C: MAIL FROM:<sender@site.example>', 'C: RCPT TO:<a@x.example>', 'C: DATA',
        'S: 250 ok', 'S: 250 2.1.5 yes indeed', 'S: 354 go',
        'C: <21 bytes of data>', 'S: 250 ok',
    ]  # fmt: skip


# --- no input puts a second command on the wire ---


class StrictReader:
    """
    An SMTP server's reading of a stream: lines end in CRLF and nothing else is a line end.

    Independent of the package: it knows the grammar of RFC 5321 only.
    """

    COMMAND = re.compile(
        rb'MAIL FROM:<(?P<sender>[^\r\n]*)>(?: (?:SIZE=[0-9]+|BODY=8BITMIME|SMTPUTF8))*'
        rb'|RCPT TO:<(?P<recipient>[^\r\n]*)>|DATA|RSET'
    )

    def __init__(self, stream):
        assert b'\n' not in stream.replace(b'\r\n', b''), 'a bare LF'
        assert b'\r' not in stream.replace(b'\r\n', b''), 'a bare CR'
        assert b'\0' not in stream.partition(b'DATA\r\n')[0], 'a NUL'
        assert not stream or stream.endswith(b'\r\n')
        self.lines = iter(stream.split(b'\r\n')[:-1])
        self.messages = []
        for line in self.lines:
            command = self.COMMAND.fullmatch(line)
            assert command, f'not a command: {line!r}'
            if line.startswith(b'MAIL'):
                sender, recipients = command['sender'].decode(), []
            elif line.startswith(b'RCPT'):
                recipients.append(command['recipient'].decode())
            elif line == b'DATA':
                self.messages.append((sender, recipients, self.content()))

    def content(self):
        lines = []
        for line in self.lines:
            if line == b'.':
                return b''.join(line + b'\r\n' for line in lines)
            lines.append(line[1:] if line.startswith(b'.') else line)
        raise AssertionError('no final dot')


FRAGMENTS = [
    '\r',
    '\n',
    '\0',
    '.',
    '<',
    '>',
    '"',
    '\\',
    ' ',
    '@',
    ',',
    'a',
    'ü',
    '\u2028',
    '\x85',
    'DATA',
    'RCPT TO:<b@x>',
]
addresses = st.one_of(
    st.builds('{}@{}'.format, st.text('ab.-+', min_size=1, max_size=5), st.just('x.example')),
    st.builds('{}@x.example'.format, st.lists(st.sampled_from(FRAGMENTS), max_size=6).map(''.join)),
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map(''.join),
    st.text(max_size=12),
)
contents = st.one_of(
    st.lists(
        st.sampled_from([b'\r', b'\n', b'\r\n', b'.', b'x', b'\0', b'\xff', b'MAIL FROM:<>', b'DATA']), max_size=20
    ).map(b''.join),
    st.binary(max_size=30),
)


def talk(dialogue, replies):
    """Let the dialogue speak to a server that answers each line as *replies* say, and return all that was said."""
    stream = bytearray()
    replies = iter(replies)
    in_data = False
    while spoken := said(dialogue):
        stream += spoken
        answers = b''
        for line in spoken.split(b'\r\n')[:-1]:
            if in_data:
                in_data = line != b'.'
                answers += b'' if in_data else OK
            elif line == b'DATA':
                in_data = True
                answers += GO
            else:
                answers += next(replies, OK) if line.startswith((b'MAIL', b'RCPT')) else OK
        dialogue.receive_data(answers)
    return bytes(stream)


def lines_of(content):
    lines = re.split(rb'\r\n|\r|\n', content)
    return lines[:-1] if lines[-1] == b'' else lines


def is_good(address):
    try:
        check_address(address)
    except AddressError:
        return False
    return True


@given(
    sender=addresses,
    recipients=st.lists(addresses, min_size=1, max_size=3),
    content=contents,
    pipelining=st.booleans(),
)
@example(sender='', recipients=['"a> b"@x.example'], content=b'x\n.\nMAIL FROM:<evil@x.example>\n', pipelining=True)
@example(sender=SENDER, recipients=['a\\@x.example'], content=b'\r\n.\r', pipelining=False)
def test_no_address_and_no_content_puts_a_second_command_on_the_wire(sender, recipients, content, pipelining):
    capabilities = Capabilities(pipelining=pipelining, size=0, eight_bit_mime=True, smtputf8=True)
    dialogue = Dialogue(capabilities)
    try:
        dialogue.submit(sender, recipients, content)
    except AddressError:
        assert not (is_good(sender) or not sender) or not all(map(is_good, recipients))
        assert said(dialogue) == b''
        return
    messages = StrictReader(talk(dialogue, [])).messages

    assert [(one, many) for one, many, _ in messages] == [
        (sender and check_address(sender), [check_address(recipient) for recipient in dict.fromkeys(recipients)])
    ]
    assert [lines_of(text) for _, _, text in messages] == [lines_of(content)]


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from([A, B, C]), min_size=1, unique=True), contents), min_size=1, max_size=4
    ),
    st.lists(st.sampled_from([OK, OK, b'450 later\r\n', b'550 no\r\n', b'452 too many\r\n'])),
    st.booleans(),
)
def test_in_a_stream_of_messages_each_content_reaches_those_and_only_those_who_were_accepted(
    messages, replies, pipelining
):
    dialogue = Dialogue(Capabilities(pipelining=pipelining))
    transactions = [
        dialogue.submit(f'{number}@site.example', recipients, content.replace(b'\xff', b''))
        for number, (recipients, content) in enumerate(messages)
    ]
    stream = talk(dialogue, replies)
    heard = {sender: content for sender, _, content in StrictReader(stream).messages}

    assert dialogue.is_idle
    for transaction in transactions:
        accepted = [recipient for recipient, reply in transaction.replies.items() if reply.accepted]
        assert transaction.done
        assert set(transaction.replies) | set(transaction.untried) == set(transaction.recipients)
        if accepted:
            assert lines_of(heard[transaction.sender]) == lines_of(transaction.content)
        # Who is left untried is so because somebody else was accepted.
        assert accepted or not transaction.untried


@given(
    st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=20),
            st.sampled_from(
                [OK, OK, OK, GO, b'550 no\r\n', b'450-not\r\n450 now\r\n', b'421 bye\r\n', b'250-', b'\r\n']
            ),
        ),
        max_size=20,
    )
)
def test_nothing_that_a_server_sends_is_more_than_trouble(pieces):
    dialogue, transaction = started()
    with suppress(ServerTrouble):
        for piece in pieces:
            dialogue.receive_data(piece)
            said(dialogue)
    assert set(transaction.replies) <= {A, B}
    assert transaction.done <= (transaction.replies.keys() == {A, B})


@given(st.binary(max_size=200), st.data())
def test_how_the_bytes_of_a_reply_are_cut_does_not_matter(data, draw):
    def read(pieces):
        reader, replies = ReplyReader(), []
        try:
            for piece in pieces:
                reader.feed(piece)
                while reply := reader.next_reply():
                    replies.append(reply)
        except ServerTrouble as trouble:
            replies.append(str(trouble))
        return replies

    data = b'250-a\r\n250 b\r\n' + data
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(data)))))
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]

    assert read(pieces) == read([data])
