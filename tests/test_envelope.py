from __future__ import annotations

import email
import email.policy
import io
import pickle
import socket
import tracemalloc
from dataclasses import FrozenInstanceError, dataclass, field
from datetime import datetime, timedelta, timezone
from email.message import EmailMessage, Message
from email.mime.text import MIMEText

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramid_mailqueue.exceptions import AddressError, MessageError, MessageTooLarge, NoRecipients, TooManyRecipients
from pyramid_mailqueue.message.addresses import check_address
from pyramid_mailqueue.message.envelope import MAX_RECIPIENTS_OCTETS, Envelope
from pyramid_mailqueue.queues.maildir.queue_file import QueueHeader, serialize_header
from tests.parts.strategies import addresses

NOW = datetime(2026, 11, 24, 8, 28, 11, tzinfo=timezone(timedelta(hours=1)))

# A message with nothing to be added.
COMPLETE = (
    b'Date: Mon, 23 Nov 2026 10:00:00 +0000\r\n'
    b'Message-ID: <1@site.example>\r\n'
    b'From: Shop <shop@site.example>\r\n'
    b'To: ada@x.example\r\n'
    b'\r\n'
    b'Hello\r\n'
)


def make(**fields):
    """An EmailMessage with *fields*; an underscore in a name stands for a hyphen."""
    message = EmailMessage()
    for name, value in {'From': 'shop@site.example', 'To': 'ada@x.example', **fields}.items():
        if value is not None:
            message[name.replace('_', '-')] = value
    message.set_content('Hello\n')
    return message


def header(text):
    """Bytes of a message with the header *text* and nothing to be added."""
    return f'Date: today\nMessage-ID: <1@x>\n{text}\n\nHello\n'.encode()


def fields_of(envelope):
    return envelope.content.partition(b'\r\n\r\n')[0].decode().split('\r\n')


# --- the envelope itself ----------------------------------------------------


def test_an_envelope_is_frozen_and_a_value():
    envelope = Envelope('a@x.example', ('b@x.example',), b'x')

    with pytest.raises(FrozenInstanceError):
        envelope.sender = 'c@x.example'
    assert envelope == Envelope('a@x.example', ['b@x.example'], b'x')
    assert hash(envelope) == hash(Envelope('a@x.example', ('b@x.example',), b'x'))
    assert pickle.loads(pickle.dumps(envelope)) == envelope


def test_its_representation_does_not_show_the_content():
    assert repr(Envelope('', ('b@x.example',), b'secret')) == "Envelope(sender='', recipients=('b@x.example',))"


def test_addresses_are_normalised_and_each_recipient_is_kept_once():
    envelope = Envelope('a@bücher.example', ('b@x.example', 'c@bücher.example', 'b@x.example', 'B@x.example'), b'')

    assert envelope.sender == 'a@xn--bcher-kva.example'
    assert envelope.recipients == ('b@x.example', 'c@xn--bcher-kva.example', 'B@x.example')


@pytest.mark.parametrize(
    'bad', ['root', 'a b@x.example', 'A <a@x.example>', 'a@x.example\r\nDATA', None, b'a@x.example']
)
def test_an_envelope_cannot_hold_an_address_that_must_not_reach_a_server(bad):
    with pytest.raises(AddressError):
        Envelope(bad, ('b@x.example',), b'')
    with pytest.raises(AddressError):
        Envelope('', ('b@x.example', bad), b'')


def test_an_envelope_has_recipients():
    with pytest.raises(NoRecipients):
        Envelope('', (), b'')


def test_one_text_is_not_several_recipients():
    with pytest.raises(AddressError, match='several'):
        Envelope('', 'b@x.example', b'')


@pytest.mark.parametrize('content', ['text', None, bytearray(b'x')])
def test_the_content_is_bytes(content):
    with pytest.raises(MessageError, match=f'not {type(content).__name__}'):
        Envelope('', ('b@x.example',), content)


@given(st.lists(st.sampled_from([b'\r', b'\n', b'\r\n', b'a', b'.', b'\xff'])).map(b''.join))
def test_no_envelope_holds_a_bare_cr_or_lf(content):
    envelope = Envelope('', ('b@x.example',), content)

    assert not set(envelope.content.replace(b'\r\n', b'')) & set(b'\r\n')
    assert Envelope('', ('b@x.example',), envelope.content).content is envelope.content


def test_the_recipients_are_normalized_and_each_is_there_once():
    envelope = Envelope('', ('c@bücher.example', 'c@xn--bcher-kva.example', 'b@x.example'), b'')

    assert envelope.recipients == ('c@xn--bcher-kva.example', 'b@x.example')


@pytest.mark.parametrize(
    ('content', 'message_id'),
    [
        (b'Subject: x\r\nMessage-ID: <1@x.example>\r\n\r\n', '<1@x.example>'),
        (b'message-id:<1@x.example>\r\n', '<1@x.example>'),
        (b'Message-ID:\r\n <1@x.example>\r\n\r\n', '<1@x.example>'),
        (b'Message-ID : <1@x.example> (comment)', '<1@x.example>'),
        (b'Message-ID: <\xfc@x.example>\r\n\r\n', r'<\xfc@x.example>'),
        (b'X-Message-ID: <1@x.example>\r\n\r\n', ''),
        (b'Message-ID: \r\nSubject: <1@x.example>\r\n\r\n', ''),
        (b'Message-ID: \r\nSubject: x\r\nMessage-ID: <1@x.example>\r\n\r\n', '<1@x.example>'),
        # What is no msg-id (RFC 5322 section 3.6.4) is told as it stands, in one line.
        (b'Message-ID: 1@x.example \r\n\r\n', '1@x.example'),
        (b'Message-ID: <1 2@x.example>\r\n\r\n', '<1 2@x.example>'),
        (b'Message-ID:\r\n <1\r\n 2@x.example>\r\nSubject: x\r\n\r\n', '<1 2@x.example>'),
        (b'Message-ID: 1\x00\t\x1b[2J\xfc@x.example', r'1\x00\x09\x1b[2J\xfc@x.example'),
        (b'Message-ID: <1\x1b[2J@x.example>', r'<1\x1b[2J@x.example>'),
        (b'Subject: x\r\n\r\nMessage-ID: <1@x.example>\r\n', ''),
        (b'\r\nMessage-ID: <1@x.example>\r\n\r\n', ''),
        (b'', ''),
    ],
)
def test_the_message_id_is_read_from_the_header(content, message_id):
    assert Envelope('', ('b@x.example',), content).message_id == message_id


# --- the sender -------------------------------------------------------------


@pytest.mark.parametrize(
    ('fields', 'sender'),
    [
        ('From: a@x.example', 'a@x.example'),
        ('From: "A, c@x.example" <a@x.example>', 'a@x.example'),
        ('From: a@x.example, b@x.example', 'a@x.example'),
        ('From: a@x.example, b@x.example\nSender: B <b@x.example>', 'b@x.example'),
        ('SENDER : b@x.example\nFrom: a@x.example', 'b@x.example'),
        ('Sender:\nFrom: a@bücher.example', 'a@xn--bcher-kva.example'),
        ('From:\r\n a@x.example', 'a@x.example'),
        ('Subject: no sender', 'default@site.example'),
        ('From: a@x.example\nResent-From: c@x.example', 'c@x.example'),
        ('Resent-From: c@x.example\nResent-Sender: d@x.example\nFrom: a@x.example\nSender: b@x.example', 'd@x.example'),
        ('From: a@x.example\nResent-To: c@x.example', 'default@site.example'),
    ],
)
def test_the_sender_is_taken_from_the_header(fields, sender):
    envelope = Envelope.from_message(
        header(fields), recipients='r@x.example', default_sender='Default <default@site.example>'
    )

    assert envelope.sender == sender


@pytest.mark.parametrize(
    ('argument', 'sender'),
    [
        ('c@x.example', 'c@x.example'),
        ('"C, d@x.example" <c@bücher.example>', 'c@xn--bcher-kva.example'),
        ('', ''),
        ('<>', ''),
    ],
)
def test_the_argument_overrules_the_header(argument, sender):
    message = header('From: a@x.example\nTo: r@x.example\nResent-From: b@x.example\nResent-To: s@x.example')

    assert Envelope.from_message(message, argument).sender == sender


@pytest.mark.parametrize('default_sender', [None, ''])
def test_without_any_sender_the_error_names_the_setting(default_sender):
    with pytest.raises(AddressError, match=r'mailqueue\.default_sender'):
        Envelope.from_message(header('To: r@x.example'), default_sender=default_sender)


@pytest.mark.parametrize('field', ['Resent-To: r@x.example', 'Resent-Bcc: r@x.example'])
def test_without_a_sender_of_the_resending_the_error_names_the_header_that_is_missing(field):
    with pytest.raises(AddressError, match=r'Resent-From.*mailqueue\.default_sender'):
        Envelope.from_message(header(f'From: a@x.example\n{field}'))


@pytest.mark.parametrize('value', ['root', '<>', 'a@x.example)b@x.example', 'A, B <a@x.example>', 'a@x..example'])
def test_a_sender_in_the_header_is_never_guessed(value):
    message = header(f'From: {value}\nTo: r@x.example')

    with pytest.raises(AddressError):
        Envelope.from_message(message, default_sender='default@site.example')
    assert Envelope.from_message(message, 'b@x.example').sender == 'b@x.example'


@pytest.mark.parametrize('argument', ['root', 'a@x.example, b@x.example', 'a@x.example\nb', b'a@x.example', ' '])
def test_a_sender_that_is_no_address_is_refused(argument):
    with pytest.raises(AddressError):
        Envelope.from_message(make(), argument)


# --- the recipients ---------------------------------------------------------


@pytest.mark.parametrize(
    ('fields', 'recipients'),
    [
        ('To: a@x.example', ['a@x.example']),
        ('Bcc: c@x.example\nCc: b@x.example\nTo: a@x.example', ['a@x.example', 'b@x.example', 'c@x.example']),
        ('To: a@x.example\nTo: b@x.example, a@x.example', ['a@x.example', 'b@x.example']),
        ('To: undisclosed-recipients:;\nBcc: A <a@x.example>', ['a@x.example']),
        ('bCC :a@x.example,\n\tb@x.example', ['a@x.example', 'b@x.example']),
        ('Resent-To: c@x.example\nTo: a@x.example\nCc: b@x.example', ['c@x.example']),
        ('To: a@x.example\nResent-Bcc: e@x.example\nResent-Cc: d@x.example', ['d@x.example', 'e@x.example']),
        ('Resent-To: c@x.example\nReceived: x\nResent-To: d@x.example', ['c@x.example']),
        ('Resent-To: c@x.example\nResent-Date: x\nResent-Date: y\nResent-Cc: d@x.example', ['c@x.example']),
        (
            'Received: x\nResent-From: a@x.example\nResent-To: c@x.example\nX: y\nResent-Cc: d@x.example',
            ['c@x.example'],
        ),
    ],
)
def test_the_recipients_are_taken_from_the_header(fields, recipients):
    assert Envelope.from_message(header(fields), 's@x.example').recipients == tuple(recipients)


@pytest.mark.parametrize(
    ('argument', 'recipients'),
    [
        ('b@x.example', ['b@x.example']),
        ('"B, c@x.example" <b@x.example>', ['b@x.example']),
        (['b@x.example', 'C <c@bücher.example>', 'b@x.example'], ['b@x.example', 'c@xn--bcher-kva.example']),
        (iter(['b@x.example']), ['b@x.example']),
        ({'b@x.example': 1}, ['b@x.example']),
    ],
)
def test_the_argument_overrules_the_recipients_in_the_header(argument, recipients):
    message = make(To='a@x.example', Cc='c@x.example', Bcc='d@x.example')

    assert Envelope.from_message(message, recipients=argument).recipients == tuple(recipients)


EARLY = 'Resent-Date: Mon, 23 Nov 2026 23:30:00 -0800\nResent-To: early@x.example'
LATE = 'Resent-Date: Tue, 24 Nov 2026 08:00:00 +0000\nResent-To: late@x.example'


@pytest.mark.parametrize(
    ('blocks', 'expected'),
    [
        ((LATE, EARLY), 'late@x.example'),
        # As a program leaves it that adds fields at the end, such as Python's own email package.
        ((EARLY, LATE), 'late@x.example'),
        ((LATE, LATE.replace('late@', 'same@')), 'late@x.example'),
        # A date that is missing or cannot be read compares with nothing.
        ((EARLY, 'Resent-To: undated@x.example'), 'early@x.example'),
        ((EARLY, LATE.replace('24 Nov', '99 Nov').replace('2026', '999999')), 'early@x.example'),
        ((EARLY, 'Resent-Date: soon\nResent-To: soon@x.example'), 'early@x.example'),
    ],
)
def test_the_latest_resending_counts_wherever_it_stands(blocks, expected):
    message = header('From: a@x.example\n' + '\n'.join(blocks))

    assert Envelope.from_message(message, sender='a@x.example').recipients == (expected,)


@pytest.mark.parametrize(
    'fields', ['Subject: x', 'To: undisclosed-recipients:;', 'To: \nCc: ,', 'To: a@x.example\nResent-From: b@x.example']
)
def test_a_header_without_recipients_is_an_error(fields):
    with pytest.raises(NoRecipients, match='recipients='):
        Envelope.from_message(header(fields), 's@x.example')


# Each has 10 octets, with the comma behind it; the character that is not ASCII counts two.
AS_MANY_AS_FIT = [f'ü{number:x}@x' for number in range(0x10000, 0x10000 + (MAX_RECIPIENTS_OCTETS + 1) // 10)]


def test_the_most_recipients_of_a_message_fit_into_a_queue_file():
    envelope = Envelope.from_message(make(), recipients=AS_MANY_AS_FIT)

    header = serialize_header(QueueHeader(envelope.sender, envelope.recipients, 0))
    assert len(header) > MAX_RECIPIENTS_OCTETS - 10


@pytest.mark.parametrize('where', ['argument', 'header'])
def test_more_recipients_than_one_message_can_have_are_refused_at_once(where):
    too_many = [*AS_MANY_AS_FIT, 'ada@x.example']
    message, recipients = (
        (make(), too_many)
        if where == 'argument'
        else (header(f'From: shop@site.example\nBcc: {", ".join(too_many)}'), None)
    )

    with pytest.raises(TooManyRecipients, match=r'has 100001 recipients with 1000013 octets.* several messages'):
        Envelope.from_message(message, recipients=recipients)


@pytest.mark.parametrize('nobody', [[], (), iter([])])
def test_an_empty_list_does_not_mean_the_header(nobody):
    with pytest.raises(NoRecipients):
        Envelope.from_message(make(), recipients=nobody)


@pytest.mark.parametrize(
    'argument', ['', 'root', 'a@x.example, b@x.example', ['a@x.example', 'b@x.example\r\nDATA'], [None], b'a@x.example']
)
def test_recipients_that_are_no_addresses_are_refused(argument):
    with pytest.raises(AddressError):
        Envelope.from_message(make(), recipients=argument)


@pytest.mark.parametrize('kind', [EmailMessage, Message, bytes])
@pytest.mark.parametrize('name', ['To', 'Cc', 'Bcc', 'Resent-To'])
def test_recipients_in_the_header_are_never_guessed(name, kind):
    value = 'alice@example.org)bob@example.com'
    message = header(f'{name}: {value}')
    if kind is not bytes:
        message = kind()
        message[name] = value

    with pytest.raises(AddressError, match=r'alice@example\.org\)bob.*recipients='):
        Envelope.from_message(message, 's@x.example')
    assert Envelope.from_message(message, 's@x.example', 'r@x.example').recipients == ('r@x.example',)


@pytest.mark.parametrize('policy', [email.policy.default, email.policy.compat32])
def test_an_encoded_word_does_not_become_a_recipient(policy):
    data = header('From: a@x.example\nTo: =?utf-8?q?eve=40x.example=2C_B?= <b@x.example>')

    for message in (data, email.message_from_bytes(data, policy=policy)):
        assert Envelope.from_message(message).recipients == ('b@x.example',)


@given(addresses(), st.lists(addresses(), min_size=1, max_size=5))
def test_an_envelope_has_the_addresses_that_the_message_was_made_with(sender, recipients):
    recipients = [address for address in recipients if not address.startswith('=?')] or ['a@x.example']
    sender = sender if not sender.startswith('=?') else 'a@x.example'

    data = f'From: {sender}\nTo: {", ".join(recipients)}\n\n'.encode()

    for message in (data, email.message_from_bytes(data), email.message_from_bytes(data, policy=email.policy.default)):
        envelope = Envelope.from_message(message)
        assert envelope.sender == check_address(sender)
        assert envelope.recipients == tuple(dict.fromkeys(map(check_address, recipients)))


@pytest.mark.parametrize(
    ('value', 'reason'),
    [
        ('a@x.example, root', "'root' has no domain"),
        ('Lovelace, Ada <a@x.example>', "'Lovelace' has no domain.* double quotes"),
        ('a@x.example b@x.example', 'is more than one address'),
        ('Team: a@x.example', 'its groups are not complete'),
        ('a@x.example (home', 'a parenthesis is not closed'),
        ('a@x.example)', r"the character '\)' has no meaning there"),
        ('<a@x.example', 'is not one address'),
    ],
)
def test_the_error_says_what_is_wrong_with_a_list_of_addresses(value, reason):
    with pytest.raises(AddressError, match=f'read in one way only: .*{reason}'):
        Envelope.from_message(header(f'To: {value}'), 's@x.example')


@pytest.mark.parametrize(
    'text', ['a@x.example, b@x.example', 'a@x.example;b@x.example', 'A <a@x.example>, b@x.example']
)
@pytest.mark.parametrize('argument', ['sender', 'recipients'])
def test_several_addresses_in_one_text_are_refused_with_the_cure(argument, text):
    with pytest.raises(AddressError, match=r'is not exactly one address. Give a list with an item for each'):
        Envelope.from_message(make(), **{argument: text})


# --- the content ------------------------------------------------------------


def test_content_with_nothing_to_change_is_kept():
    assert Envelope.from_message(COMPLETE).content == COMPLETE


def test_date_and_message_id_are_added_where_they_are_missing():
    envelope = Envelope.from_message(b'Subject: x\n\nHello', 'a@bücher.example', 'b@x.example', now=NOW)

    subject, date, message_id = fields_of(envelope)
    assert (subject, date) == ('Subject: x', 'Date: Tue, 24 Nov 2026 08:28:11 +0100')
    assert message_id == f'Message-ID: {envelope.message_id}'
    assert envelope.message_id.endswith('@xn--bcher-kva.example>')
    assert envelope.content.endswith(b'\r\n\r\nHello')


def test_the_date_is_the_present_time_by_default():
    before = datetime.now(timezone.utc).replace(microsecond=0)
    received = email.message_from_bytes(Envelope.from_message(make()).content, policy=email.policy.default)

    assert before <= received['Date'].datetime <= datetime.now(timezone.utc)


@pytest.mark.parametrize('name', ['date', 'DATE ', 'Date'])
def test_a_date_that_is_there_is_kept(name):
    message = header('x: y').replace(b'Date', name.encode())

    assert (
        Envelope.from_message(message, '', 'b@x.example', local_hostname='h', now=NOW).content.lower().count(b'date')
        == 1
    )


@pytest.mark.parametrize('name', ['büro', 'host name', 'a..b', 'x' * 300, '-', '\udcff', 'web1'])
def test_a_machine_may_be_called_anything(monkeypatch, name):
    monkeypatch.setattr(socket, 'getfqdn', lambda: name)

    message_id = Envelope.from_message(make(), '').message_id

    expected = {'büro': 'xn--bro-hoa', 'web1': 'web1'}.get(name, 'localhost')
    assert message_id.endswith(f'@{expected}>')


def test_a_machine_whose_name_cannot_be_found_out_has_one(monkeypatch):
    def getfqdn():
        return ''.encode('idna') + 'a..b'.encode('idna')

    monkeypatch.setattr(socket, 'getfqdn', getfqdn)

    assert Envelope.from_message(make(), '').message_id.endswith('@localhost>')


@pytest.mark.parametrize(
    ('sender', 'default', 'author', 'envelope_sender'),
    [
        (None, 'Shop <shop@site.example>', 'Shop <shop@site.example>', 'shop@site.example'),
        (None, 'Ünal, x <shop@bücher.example>', None, None),
        (None, '"Ünal, x" <u@bücher.example>', '=?utf-8?q?=C3=9Cnal=2C?= x <u@xn--bcher-kva.example>', None),
        ('Me <me@x.example>', 'Shop <shop@site.example>', 'Me <me@x.example>', 'me@x.example'),
        ('me@x.example', None, 'me@x.example', 'me@x.example'),
        ('', 'shop@site.example', 'shop@site.example', ''),
        ('<>', 'shop@site.example', 'shop@site.example', ''),
    ],
)
def test_a_message_without_an_author_gets_one(sender, default, author, envelope_sender):
    if author is None:
        with pytest.raises(AddressError, match='needs double quotes'):
            Envelope.from_message(make(From=None), sender, default_sender=default)
        return

    envelope = Envelope.from_message(make(From=None), sender, default_sender=default)

    assert f'From: {author}' in fields_of(envelope)
    assert envelope_sender in (None, envelope.sender)


@pytest.mark.parametrize('default', ['garbage', 'a@x.example, b@x.example', 'a@b@c'])
def test_a_default_sender_that_is_none_does_not_become_the_author(default):
    with pytest.raises(AddressError):
        Envelope.from_message(make(From=None), '', default_sender=default)


@pytest.mark.parametrize('name', ['x>\r\nBcc: e@x.example\r\nX: <', 'büro', 'host name'])
def test_a_host_name_that_is_none_does_not_reach_the_header(name, monkeypatch):
    monkeypatch.setattr(socket, 'getfqdn', lambda: 'mail.site.example')

    envelope = Envelope.from_message(make(), '', local_hostname=name)

    assert envelope.message_id.endswith('@mail.site.example>')
    assert b'Bcc' not in envelope.content


def test_an_author_that_is_empty_is_replaced():
    envelope = Envelope.from_message(b'From:\nTo: a@x.example\n\n', default_sender='shop@site.example')

    assert [line for line in fields_of(envelope) if line.startswith('From')] == ['From: shop@site.example']


def test_bytes_whose_sender_is_named_get_no_author():
    assert b'From' not in Envelope.from_message(b'To: a@x.example\n\n', 'me@x.example').content


def test_an_empty_date_or_message_id_is_replaced():
    envelope = Envelope.from_message(b'Date:\nMessage-ID: \n\n', 'a@x.example', 'b@x.example', now=NOW)

    assert [line.partition(':')[0] for line in fields_of(envelope)] == ['Date', 'Message-ID']
    assert envelope.message_id


def test_each_message_has_an_id_of_its_own():
    assert Envelope.from_message(make()).message_id != Envelope.from_message(make()).message_id


def test_without_a_sender_the_message_id_has_the_name_of_the_host():
    message = make()

    assert Envelope.from_message(message, '', local_hostname='mail.site.example').message_id.endswith(
        '@mail.site.example>'
    )
    assert Envelope.from_message(message, '').message_id.endswith(f'@{socket.getfqdn()}>')


BCC = b"""\
From: shop@site.example
To: ada@x.example
BCC: eve@x.example
Bcc :
\teve@x.example,
 eve@x.example
Subject: x
Resent-From: shop@site.example
resent-bcc: eve@x.example
Resent-To: ada@x.example
bcc:eve@x.example

Bcc: body@x.example
"""


@pytest.mark.parametrize('line_end', [b'\n', b'\r\n', b'\r'])
def test_bcc_never_leaves(line_end):
    envelope = Envelope.from_message(BCC.replace(b'\n', line_end), recipients=['ada@x.example', 'eve@x.example'])

    assert b'eve' not in envelope.content
    assert [line.partition(':')[0] for line in fields_of(envelope)] == [
        'From', 'To', 'Subject', 'Resent-From', 'Resent-To', 'Date', 'Message-ID',
    ]  # fmt: skip
    assert envelope.content.endswith(b'\r\n\r\nBcc: body@x.example\r\n')


@pytest.mark.parametrize('kind', [EmailMessage, Message])
def test_bcc_of_a_message_object_is_a_recipient_and_stays_with_the_caller(kind):
    message = kind()
    message['From'] = 'shop@site.example'
    message['bCc'] = 'Eve <eve@x.example>'

    envelope = Envelope.from_message(message)

    assert envelope.recipients == ('eve@x.example',)
    assert b'eve' not in envelope.content.lower()
    assert message['Bcc'] == 'Eve <eve@x.example>'
    assert message.keys() == ['From', 'bCc']


def test_the_header_of_an_attached_message_is_its_own_business():
    attached = make(Bcc='eve@x.example')
    message = make()
    message.add_attachment(attached)

    assert b'Bcc: eve@x.example\r\n' in Envelope.from_message(message).content


def test_a_header_without_body_gets_its_empty_line():
    content = Envelope.from_message(COMPLETE.partition(b'\r\n\r\n')[0]).content

    assert content == COMPLETE.partition(b'\r\n\r\n')[0] + b'\r\n\r\n'


def test_a_body_without_header_gets_one():
    content = Envelope.from_message(b'\nHello', 'a@x.example', 'b@x.example').content

    assert content.startswith(b'Date: ')
    assert content.endswith(b'@x.example>\r\n\r\nHello')


@given(st.binary())
def test_any_body_arrives_as_it_is_but_for_the_line_ends(body):
    envelope = Envelope.from_message(COMPLETE + body)

    assert envelope == Envelope(envelope.sender, envelope.recipients, COMPLETE + body)


@pytest.mark.parametrize('wrap', [bytes, bytearray, memoryview, io.BytesIO, email.message_from_bytes])
def test_every_kind_of_message_gives_the_same_envelope(wrap):
    assert Envelope.from_message(wrap(COMPLETE)) == Envelope('shop@site.example', ('ada@x.example',), COMPLETE)


def test_a_large_message_is_copied_once():
    message = b'From: a@x.example\r\nTo: b@x.example\r\nBcc: c@x.example\r\n\r\n' + b'x\r\n' * 1_000_000

    tracemalloc.start()
    envelope = Envelope.from_message(message)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(envelope.content) <= peak < 1.1 * len(message)


def test_the_largest_content_is_max_size():
    assert Envelope.from_message(COMPLETE, max_size=len(COMPLETE)).content == COMPLETE
    with pytest.raises(MessageTooLarge, match=rf'{len(COMPLETE)} octets.*max_message_size.* {len(COMPLETE) - 1}'):
        Envelope.from_message(COMPLETE, max_size=len(COMPLETE) - 1)


@pytest.mark.parametrize('message', ['From: a@x.example\n\n', io.StringIO('x'), None, 7])
def test_what_is_no_message_is_refused(message):
    with pytest.raises(MessageError):
        Envelope.from_message(message, 'a@x.example', 'b@x.example')


# --- a Message of pyramid_mailer --------------------------------------------


class InvalidMessage(Exception):
    pass


@dataclass
class MailerMessage:
    """The shape of ``pyramid_mailer.message.Message``, which needs a module that Python 3.13 no longer has."""

    sender: str | None = None
    recipients: list = field(default_factory=list)
    cc: list | None = None
    bcc: list | None = None
    body: str | None = 'Grüße'

    @property
    def send_to(self):
        return set(self.recipients) | set(self.cc or ()) | set(self.bcc or ())

    def to_message(self):
        if not self.sender:
            raise InvalidMessage('No sender address has been set')
        if not self.body:
            raise InvalidMessage('No body has been set')
        message = MIMEText(self.body, 'plain', 'utf-8')
        message['From'] = self.sender
        message['Subject'] = 'Grüße'
        message['To'] = ', '.join(self.recipients)
        return message


class BadHeaders(Exception):
    """
    Raised if message contains newlines in headers.
    """


class Reticent(MailerMessage):
    def to_message(self):
        raise BadHeaders


RETICENT = Reticent(sender='a@x.example', recipients=['b@x.example'])


def test_a_message_of_pyramid_mailer_goes_to_all_of_its_recipients_in_their_order():
    message = MailerMessage(
        sender='"Shop, The" <shop@site.example>',
        recipients=['z@x.example', 'Åda <a@x.example>'],
        cc=['c@x.example', 'z@x.example'],
        bcc=['b@x.example'],
    )

    envelope = Envelope.from_message(message)

    assert envelope.sender == 'shop@site.example'
    assert envelope.recipients == ('z@x.example', 'a@x.example', 'c@x.example', 'b@x.example')
    received = email.message_from_bytes(envelope.content, policy=email.policy.default)
    assert received['Subject'] == 'Grüße'
    assert received['To'] == 'z@x.example, Åda <a@x.example>'
    assert received.get_content() == 'Grüße'
    assert b'b@x.example' not in envelope.content


def test_whoever_is_added_to_send_to_gets_it_too():
    class Copied(MailerMessage):
        send_to = property(lambda self: {'y@x.example', 'x@x.example', *self.recipients[1:]})

    message = Copied(sender='shop@site.example', recipients=['a@x.example', 'b@x.example'])

    assert Envelope.from_message(message).recipients == ('b@x.example', 'x@x.example', 'y@x.example')


@pytest.mark.parametrize(
    ('own', 'argument', 'in_envelope', 'in_header'),
    [
        ('a@x.example', None, 'a@x.example', 'a@x.example'),
        ('a@x.example', 'b@x.example', 'b@x.example', 'a@x.example'),
        ('a@x.example', '', '', 'a@x.example'),
        (None, None, 'default@x.example', 'default@x.example'),
        (None, 'b@x.example', 'b@x.example', 'b@x.example'),
        (None, '<>', '', 'default@x.example'),
    ],
)
def test_the_sender_of_a_message_of_pyramid_mailer(own, argument, in_envelope, in_header):
    message = MailerMessage(sender=own, recipients=['b@x.example'])

    envelope = Envelope.from_message(message, argument, default_sender='default@x.example', local_hostname='h')

    assert envelope.sender == in_envelope
    assert f'From: {in_header}' in fields_of(envelope)
    assert message == MailerMessage(sender=own, recipients=['b@x.example'])


def test_arguments_overrule_the_recipients_of_a_message_of_pyramid_mailer():
    message = MailerMessage(sender='a@x.example', recipients=['b@x.example'])

    assert Envelope.from_message(message, recipients='c@x.example').recipients == ('c@x.example',)


@pytest.mark.parametrize(
    ('message', 'error', 'reason'),
    [
        (MailerMessage(recipients=['b@x.example']), AddressError, 'default_sender'),
        (MailerMessage(sender='a@x.example'), NoRecipients, 'no recipients'),
        (MailerMessage(sender='root', recipients=['b@x.example']), AddressError, 'no domain'),
        (MailerMessage(sender='a@x.example', recipients=['B, C <b@x.example>']), AddressError, 'one way only'),
        (
            MailerMessage(sender='a@x.example', recipients=['b@x.example'], body=''),
            MessageError,
            'InvalidMessage: No body',
        ),
        (
            Reticent(sender='a@x.example', recipients=['b@x.example']),
            MessageError,
            r'BadHeaders: Raised if message contains newlines in headers\.$',
        ),
    ],
)
def test_what_is_wrong_with_a_message_of_pyramid_mailer_is_an_error_of_ours(message, error, reason):
    with pytest.raises(error, match=reason):
        Envelope.from_message(message)
