from __future__ import annotations

import calendar
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramid_mailqueue.exceptions import QueueError, QueueFileError
from pyramid_mailqueue.message.addresses import check_address
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir.queue_file import (
    MAX_HEADER_OCTETS,
    MAX_REPLY_CHARACTERS,
    QueueHeader,
    read_envelope,
    read_header,
    serialize_header,
)
from tests.parts.strategies import addresses

QUEUED = calendar.timegm((2026, 11, 24, 7, 28, 11))
TRIED = calendar.timegm((2026, 11, 24, 7, 33, 12))

# As it stands in the docs.
EXAMPLE = b"""\
Return-path: <sender@site.example>
Envelope-to: a@site.example,b@site.example
X-Queue-Date: Tue, 24 Nov 2026 07:28:11 +0000
X-Last-Attempt: Tue, 24 Nov 2026 07:33:12 +0000 (451 4.3.0 try again later)
X-Retries: 1
X-Queue-Meta-End: end
""".replace(b'\n', b'\r\n')
EXAMPLE_HEADER = QueueHeader(
    sender='sender@site.example',
    recipients=('a@site.example', 'b@site.example'),
    queued_at=QUEUED,
    attempts=1,
    last_attempt=TRIED,
    last_reply='451 4.3.0 try again later',
)


def read(data):
    return read_header(BytesIO(data))


def changed(old, new):
    assert old in EXAMPLE
    return EXAMPLE.replace(old, new)


# --- writing ----------------------------------------------------------------


def test_the_file_looks_as_documented():
    assert serialize_header(EXAMPLE_HEADER) == EXAMPLE


def test_before_the_first_attempt_there_are_four_lines():
    assert serialize_header(QueueHeader('', ('a@site.example',), QUEUED + 0.9)) == (
        b'Return-path: <>\r\n'
        b'Envelope-to: a@site.example\r\n'
        b'X-Queue-Date: Tue, 24 Nov 2026 07:28:11 +0000\r\n'
        b'X-Queue-Meta-End: end\r\n'
    )


def test_a_dead_letter_without_any_attempt_has_its_reason_but_no_number():
    data = serialize_header(QueueHeader('', ('a@site.example',), QUEUED, 0, TRIED, 'discarded by a plugin'))

    assert b'X-Last-Attempt: Tue, 24 Nov 2026 07:33:12 +0000 (discarded by a plugin)\r\n' in data
    assert b'X-Retries' not in data


def test_addresses_that_are_not_ascii_are_utf_8():
    data = serialize_header(QueueHeader('ådå@site.example', ('"å,b"@site.example',), QUEUED))

    assert 'Return-path: <ådå@site.example>\r\nEnvelope-to: "å,b"@site.example\r\n'.encode() in data


@pytest.mark.parametrize(
    ('reply', 'comment'),
    [
        ('', ''),
        ('451 try (much) later', ' (451 try [much] later)'),
        ('550 no\r\nX-Retries: 7', ' (550 no X-Retries: 7)'),
        (r'a\) b', ' (a/] b)'),
        ('größer\x00\x7f', ' (gr??er??)'),
        (' \t a \x1c b ', ' (a b)'),
        ('\u2028', ''),
        ('x' * 400, f' ({"x" * 300})'),
        ('x' * 299 + ' yz', f' ({"x" * 299})'),
    ],
)
def test_the_last_reply_is_a_comment_without_anything_that_could_end_it(reply, comment):
    data = serialize_header(QueueHeader('', ('a@site.example',), QUEUED, 1, TRIED, reply))

    assert f'\r\nX-Last-Attempt: Tue, 24 Nov 2026 07:33:12 +0000{comment}\r\nX-Retries: 1\r\n'.encode() in data


def test_more_recipients_than_can_be_read_back_are_refused():
    recipients = tuple(f'{number:0200}@site.example' for number in range(6000))

    with pytest.raises(QueueError, match='6000 recipients'):
        serialize_header(QueueHeader('', recipients, QUEUED))


def test_as_many_recipients_as_are_accepted_can_be_read_back_after_every_later_attempt():
    recipients = [f'{number:0200}@site.example' for number in range(4000)]
    while True:
        try:
            serialize_header(QueueHeader('', tuple(recipients), QUEUED))
        except QueueError:
            break
        recipients.append(f'{len(recipients):0200}@site.example')
    header = QueueHeader('s' * 240 + '@site.example', tuple(recipients[:-1]), QUEUED, 999_999_999, TRIED, 'x' * 400)

    assert read(serialize_header(header)).recipients == header.recipients


# --- reading ----------------------------------------------------------------


def test_what_was_written_is_read_and_the_message_is_next():
    fp = BytesIO(EXAMPLE + b'Subject: x\r\n\r\nHello')

    assert read_header(fp) == EXAMPLE_HEADER
    assert fp.read() == b'Subject: x\r\n\r\nHello'


def test_line_feeds_alone_are_tolerated():
    data = EXAMPLE.replace(b'\r\n', b'\n') + b'Subject: x\n\nHello\n'

    assert read_envelope(data) == (
        EXAMPLE_HEADER,
        Envelope('sender@site.example', ('a@site.example', 'b@site.example'), b'Subject: x\r\n\r\nHello\r\n'),
    )


def test_the_lines_may_stand_in_any_order():
    *lines, end = EXAMPLE.splitlines(keepends=True)

    assert read(b''.join([*reversed(lines), end])) == EXAMPLE_HEADER


@pytest.mark.parametrize(
    ('date', 'shift'),
    [(b'+0000', 0), (b'-0000', 0), (b'+0200', -7200), (b'-0530', 19800), (b'+1245', -45900)],
)
def test_dates_of_other_time_zones_are_understood(date, shift):
    header = read(EXAMPLE.replace(b'+0000', date))

    assert (header.queued_at, header.last_attempt) == (QUEUED + shift, TRIED + shift)


def test_what_need_not_be_there_has_a_default():
    header = read(changed(b'X-Retries: 1\r\n', b'').replace(b' (451 4.3.0 try again later)', b''))

    assert (header.attempts, header.last_attempt, header.last_reply) == (0, TRIED, '')


def test_a_recipient_that_is_there_twice_is_kept_once():
    assert read(changed(b'b@site.example', b'a@site.example')).recipients == ('a@site.example',)


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (b'', 'cut off'),
        (EXAMPLE[:-2], 'cut off'),
        (EXAMPLE[:60], 'cut off'),
        (changed(b'X-Queue-Meta-End: end\r\n', b''), 'cut off'),
        (changed(b'X-Queue-Meta-End: end\r\n', b'') + b'Subject: x\r\n\r\n', "'Subject: x' does not belong"),
        (changed(b'Meta-End: end', b'Meta-End: no'), 'does not belong'),
        (changed(b'X-Retries: 1', b'X-Retries 1'), 'does not belong'),
        (changed(b'X-Retries: 1\r\n', b'X-Retries:\r\n 1\r\n'), 'does not belong'),
        (changed(b'X-Retries: 1\r\n', b'X-Retries: 1\r\nX-Retries: 1\r\n'), 'X-Retries is there twice'),
        (changed(b'sender', b'send\xe9r'), 'not UTF-8'),
        (changed(b'Return-path: <sender@site.example>\r\n', b''), 'line Return-path is missing'),
        (changed(b'<sender@site.example>', b'sender@site.example'), 'angle brackets'),
        (changed(b'sender@site.example', b'root'), 'Return-path cannot be used.*has no domain'),
        (changed(b'sender@', b'sen der@'), 'Return-path cannot be used'),
        (changed(b'sender@', b'<sender@'), 'Return-path cannot be used'),
        (changed(b'sender@', b'send\0er@'), 'Return-path cannot be used.*control'),
        (changed(b'sender@', b'send\rer@'), 'Return-path cannot be used.*control'),
        (changed(b'sender@', b'send\xc2\x85er@'), 'Return-path cannot be used.*control'),
        (changed(b'Envelope-to: a@site.example,b@site.example\r\n', b''), 'line Envelope-to is missing'),
        (changed(b'a@site.example,b@site.example', b' , '), 'Envelope-to is empty'),
        (changed(b'b@site', b'b <b@site'), 'Envelope-to cannot be used'),
        (changed(b',b', b',"b'), 'Envelope-to cannot be used'),
        (changed(b'b@site.example', b'b@site.example\r'), 'Envelope-to cannot be used.*control'),
        (changed(b'X-Queue-Date: Tue, 24 Nov 2026 07:28:11 +0000\r\n', b''), 'line X-Queue-Date is missing'),
        (changed(b'24 Nov 2026 07:28', b'31 Nov 2026 07:28'), 'X-Queue-Date must be a date'),
        (changed(b'24 Nov 2026 07:28', b'24 Foo 2026 07:28'), 'X-Queue-Date must be a date'),
        (changed(b'07:28:11', b'07:28:60'), 'X-Queue-Date must be a date'),
        (changed(b'07:28:11', b'7 o clock'), 'X-Queue-Date must be a date'),
        (changed(b'07:28:11 +0000', b'07:28:11'), 'X-Queue-Date must be a date'),
        (changed(b'07:33:12 +0000 ', b'07:33 '), 'X-Last-Attempt must be a date'),
        (changed(b'later)', b'later'), 'X-Last-Attempt must be a date'),
        (changed(b'again', b'(again)'), 'X-Last-Attempt must be a date'),
        (changed(b'Retries: 1', b'Retries: -1'), 'X-Retries must be a number'),
        (changed(b'Retries: 1', b'Retries: 1.5'), 'X-Retries must be a number'),
        (changed(b'Retries: 1', b'Retries: '), 'X-Retries must be a number'),
        (changed(b'Retries: 1', 'Retries: \u0661'.encode()), 'X-Retries must be a number'),
    ],
)
def test_anything_else_is_not_a_queue_file(data, reason):
    with pytest.raises(QueueFileError, match=reason):
        read(data)


@pytest.mark.parametrize(
    ('number', 'attempts'),
    [
        ('0', 0),
        ('000', 0),
        ('999999999', 999_999_999),
        ('1234567890', 1_234_567_890),
        ('2000000000', 2_000_000_000),
        # What no column of a database holds is the largest that each does, and some attempts less.
        ('2147483648', 2_000_000_000),
        ('9999999999', 2_000_000_000),
        ('9' * 10_000, 2_000_000_000),
        ('0' * 10_000 + '7', 7),
    ],
    ids=lambda value: str(value)[:12],
)
def test_any_number_of_attempts_is_read(number, attempts):
    header = read(changed(b'Retries: 1', f'Retries: {number}'.encode()))

    assert header.attempts == attempts
    assert read(serialize_header(header._replace(attempts=attempts + 1))).attempts == min(attempts + 1, 2_000_000_000)


@pytest.mark.parametrize(
    ('date', 'seconds'),
    [
        ('Mon, 01 Jan 0001 00:00:00 +0000', -62_135_596_800),
        ('Mon, 01 Jan 0001 00:00:00 +2359', -62_135_596_800),
        ('Fri, 31 Dec 9999 23:59:59 +0000', 253_402_300_799),
        ('Fri, 31 Dec 9999 23:59:59 -9999', 253_402_300_799),
        ('Wed, 31 Dec 1969 23:59:59 +0000', -1),
    ],
)
def test_the_first_and_the_last_date_can_be_read_and_written(date, seconds):
    header = read(EXAMPLE.replace(b'Tue, 24 Nov 2026 07:28:11 +0000', date.encode()))

    assert header.queued_at == seconds
    assert read(serialize_header(header)) == header


@pytest.mark.parametrize(
    ('sender', 'recipients', 'expected'),
    [
        ('=?utf-8?q?m=C3=BCller=40x=2Eexample?=', 'a@x.example', ('m\xfcller@x.example', ('a@x.example',))),
        (
            'a@x.example',
            '=?utf-8?b?YUB4LmV4YW1wbGUsYkB4LmV4YW1wbGU=?=',
            ('a@x.example', ('a@x.example', 'b@x.example')),
        ),
        (
            'a@x.example',
            '=?utf-8?q?a@x.example?= =?utf-8?q?,b@x.example?=',
            ('a@x.example', ('a@x.example', 'b@x.example')),
        ),
        (
            'a@x.example',
            '=?iso-8859-1?Q?m=FCller=40?= =?UTF-8?Q?x.example?=',
            ('a@x.example', ('m\xfcller@x.example',)),
        ),
    ],
)
def test_addresses_that_are_nothing_but_rfc_2047_words_are_decoded(sender, recipients, expected):
    data = EXAMPLE.replace(b'<sender@site.example>', f'<{sender}>'.encode())

    header = read(data.replace(b'a@site.example,b@site.example', recipients.encode()))

    assert (header.sender, header.recipients) == expected
    assert read(serialize_header(header)) == header


@pytest.mark.parametrize(
    'recipients', ['=?utf-8?q?a=40evil.example?=@x.example', '=?utf-8?q?a?=@x.example,b@x.example']
)
def test_an_address_that_only_holds_a_word_is_not_decoded_to_another_one(recipients):
    with pytest.raises(QueueFileError, match='holds an encoded word'):
        read(EXAMPLE.replace(b'a@site.example,b@site.example', recipients.encode()))


@pytest.mark.parametrize(
    ('words', 'reason'),
    [
        ('=?nonsense?q?a=40x=2Eexample?=', 'Envelope-to holds RFC 2047 words that cannot be decoded'),
        ('=?us-ascii?q?m=FCller=40x=2Eexample?=', 'Envelope-to holds RFC 2047 words that cannot be decoded'),
        ('=?utf-8?b?A?=', 'Envelope-to'),
        ('=?utf-8?q?a=40x=2Eexample=0D=0AX-Retries:_1?=', 'Envelope-to cannot be used.*control'),
        ('=?utf-8?q?a=00=40x=2Eexample?=', 'Envelope-to cannot be used.*control'),
        ('=?utf-8?q?nobody?=', 'Envelope-to cannot be used.*has no domain'),
        ('=?utf-8?q??=', 'Envelope-to is empty'),
    ],
)
def test_words_that_do_not_make_an_address_are_refused(words, reason):
    with pytest.raises(QueueFileError, match=reason):
        read(changed(b'a@site.example,b@site.example', words.encode()))


@pytest.mark.parametrize('data', [b'x' * 3_000_000, b'Envelope-to: ' + b'a@x.example,' * 300_000 + b'\r\n'])
def test_a_huge_file_that_is_none_of_ours_is_not_read_to_its_end(data):
    fp = BytesIO(data)

    with pytest.raises(QueueFileError, match=f'missing in the first {MAX_HEADER_OCTETS} octets'):
        read_header(fp)
    assert fp.tell() <= MAX_HEADER_OCTETS


def test_a_line_end_in_an_address_can_not_add_a_recipient():
    with pytest.raises(QueueFileError, match='twice'):
        read(changed(b'a@site.example,', b'a@site.example\r\nEnvelope-to: '))


# --- both -------------------------------------------------------------------

NULL_SENDER = st.just('')


@given(
    sender=NULL_SENDER | addresses(),
    recipients=st.lists(addresses(), min_size=1),
    content=st.binary(),
    queued_at=st.integers(0, 4_000_000_000),
    attempts=st.integers(0, 999_999_999),
    last_attempt=st.none() | st.integers(0, 4_000_000_000),
    last_reply=st.text(),
)
def test_any_envelope_survives_the_file(sender, recipients, content, queued_at, attempts, last_attempt, last_reply):
    envelope = Envelope(sender, tuple(recipients), content)
    header = QueueHeader(envelope.sender, envelope.recipients, queued_at, attempts, last_attempt, last_reply)

    data = serialize_header(header) + envelope.content
    read_back, its_envelope = read_envelope(data)

    assert its_envelope == envelope
    assert (read_back.sender, read_back.recipients) == (envelope.sender, envelope.recipients)
    assert (read_back.queued_at, read_back.attempts, read_back.last_attempt) == (queued_at, attempts, last_attempt)
    assert len(read_back.last_reply) <= MAX_REPLY_CHARACTERS
    assert serialize_header(read_back) + its_envelope.content == data


FRESH = b''.join(
    line for line in EXAMPLE.splitlines(keepends=True) if b'X-Last' not in line and b'X-Retries' not in line
)


@given(st.lists(st.sampled_from(EXAMPLE.splitlines(keepends=True)) | st.binary(max_size=20)))
def test_one_line_more_or_less_changes_nothing_else(lines):
    """What was not tried yet is read in a way of its own: it has to be the same as the other one."""
    fresh, other = b''.join([*FRESH.splitlines(keepends=True)[:-1], *lines]), b'X-Retries: 0\r\n'
    assert read(FRESH) == read(other + FRESH) == read(FRESH.replace(b'\r\n', b'\n'))

    def outcome(data):
        try:
            return read(data)
        except QueueFileError as error:
            return str(error)

    if not any(b'X-Retries' in line for line in lines):
        assert outcome(fresh) == outcome(other + fresh)


@given(st.lists(st.sampled_from(EXAMPLE.splitlines(keepends=True)) | st.binary(max_size=20)))
def test_any_bytes_are_read_or_refused(lines):
    try:
        header = read(b''.join(lines))
    except QueueFileError:
        return
    assert [check_address(address) for address in header.recipients] == list(header.recipients)
