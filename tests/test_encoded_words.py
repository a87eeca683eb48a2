"""Text in a header, read by others than who has written it."""

from __future__ import annotations

import email
import email.charset
import email.policy
from email.header import Header, decode_header, make_header
from email.message import EmailMessage, Message

import pytest
from hypothesis import example, given

from pyramid_mailqueue.exceptions import MessageError
from pyramid_mailqueue.message.content import message_bytes
from pyramid_mailqueue.message.encoded_words import decoded, looks_encoded
from tests.parts.reader import lines_of_field, read_text
from tests.parts.strategies import texts

POLICIES = [
    email.policy.default,
    email.policy.SMTP,
    email.policy.SMTPUTF8,
    email.policy.default.clone(max_line_length=None),
    email.policy.default.clone(max_line_length=20),
    email.policy.default.clone(refold_source='all', cte_type='7bit'),
]


def modern(name, text, policy=email.policy.default):
    message = EmailMessage(policy)
    # Not every character is allowed there: the library takes some for line ends.
    try:
        message[name] = text
    except ValueError:
        return None
    return message


def older(name, value):
    message = Message()
    message[name] = value
    return message


def read_by_all(content, name):
    """What three readers find in a field: ours, which is strict, and the two of the standard library."""
    parsed = email.message_from_bytes(content)[name].replace('\r\n', '')
    return [
        read_text(content, name),
        str(email.message_from_bytes(content, policy=email.policy.default)[name]),
        str(make_header(decode_header(parsed))),
    ]


@pytest.mark.parametrize('policy', POLICIES)
@given(texts())
@example('Уведомление о принятии в работу обращения')  # noqa: RUF001 - Russian
@example('Уведомление о принятии  в работу обращения граждан, ' * 9)  # noqa: RUF001 - the same, longer
@example('é b é  é')
@example('=?utf-8?q?literally?= é')
@example('a =?utf-8?q?b c?= d')
def test_text_is_read_as_it_was_set(policy, text):
    message = modern('Subject', text, policy)
    if message is None:
        return
    strict, default, legacy = read_by_all(message_bytes(message), 'Subject')

    assert strict == default == str(message['Subject'])
    # This reader makes one blank of any white space between words.
    assert legacy.split() == str(message['Subject']).split()


@given(texts())
def test_text_of_the_older_api_is_read_as_it_was_set(text):
    for value in (text, Header(text, 'utf-8')):
        if isinstance(value, str) and looks_encoded(text):
            continue  # There it is taken for what it looks like.
        assert read_by_all(message_bytes(older('X-Text', value)), 'X-Text')[:2] == [text, text]


@pytest.mark.parametrize('name', ['X-' + 'Long-' * 8, 'X-' + 'Long-' * 15 + 'Name'])
@given(texts())
def test_a_field_with_a_long_name_keeps_the_rules_too(name, text):
    message = modern(name, text)
    if message is not None:
        assert read_text(message_bytes(message), name) == str(message[name])


@pytest.fixture(params=[email.charset.QP, email.charset.BASE64, email.charset.SHORTEST, None])
def _another_charset_registry(request):
    before = dict(email.charset.CHARSETS)
    email.charset.add_charset('utf-8', request.param, None, 'utf-8')
    yield
    email.charset.CHARSETS.clear()
    email.charset.CHARSETS.update(before)


@pytest.mark.usefixtures('_another_charset_registry')
@pytest.mark.parametrize('value', ['Grüße', Header('Grüße', 'utf-8')])
def test_what_the_process_has_done_to_the_charsets_of_email_does_not_matter(value):
    assert message_bytes(older('Subject', value)) == b'Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n\r\n'


def test_a_header_object_with_folds_is_unfolded():
    assert message_bytes(older('Subject', Header('one\r\n two ü\n\tthree', 'utf-8'))) == (
        b'Subject: one two =?utf-8?q?=C3=BC?=\tthree\r\n\r\n'
    )


# Fields that machines read.
URL = f'<https://site.example/{"a" * 60}?b=?c&d=?=>'
MACHINE_FIELDS = {
    'List-Unsubscribe': f'<mailto:u@x.example?subject={"a" * 70}>, {URL}',
    'In-Reply-To': f'<{"A" * 80}@x.prod.outlook.example>',
    'References': ' '.join(f'<{"B" * 90}{number}@x.example>' for number in range(9)),
    'Content-ID': f'<{"c" * 100}@x.example>',
    'X-SMTPAPI': '{"to": ["a@x.example"], "section": {"%s": "x"}}' % ('d' * 200),
    'Feedback-ID': 'e' * 300,
    'DKIM-Signature': f'v=1; a=rsa-sha256; b={"f" * 344}',
    'Autocrypt': f'addr=a@x.example; keydata={"g" * 900}',
    'Thread-Index': 'h' * 90,
    'Message-ID': f'<{"i" * 120}@x.example>',
    'Subject': f'See {URL} for more',
}


@pytest.mark.parametrize('name', MACHINE_FIELDS)
@pytest.mark.parametrize('make', [modern, older])
def test_ascii_goes_out_as_ascii(make, name):
    lines = lines_of_field(message_bytes(make(name, MACHINE_FIELDS[name])), name.encode())

    assert b''.join(lines).decode() == f'{name}: {MACHINE_FIELDS[name]}'


def test_a_long_field_is_folded_where_there_is_white_space():
    lines = lines_of_field(message_bytes(modern('References', MACHINE_FIELDS['References'])), b'References')

    assert [line.count(b'@') for line in lines] == [1] * 9


@pytest.mark.parametrize('make', [modern, older])
@pytest.mark.parametrize('name', ['X', 'X' * 100])
def test_a_word_may_be_as_long_as_a_line(make, name):
    assert f'{name}:\r\n {"y" * 997}\r\n'.encode() in message_bytes(make(name, 'y' * 997))
    with pytest.raises(MessageError, match=rf'field {name} has a line of \d+ octets without white space'):
        message_bytes(make(name, 'y' * 998))


@pytest.mark.parametrize('kind', [modern, older])
def test_a_field_that_is_absurdly_long_is_refused(kind):
    with pytest.raises(MessageError, match='Subject has 1000002 characters; it can have 1000000'):
        message_bytes(older('Subject', 'a ' * 500_001))
    with pytest.raises(MessageError, match='Subject has 100002 characters; it can have 100000'):
        message_bytes(older('Subject', 'ü ' * 50_001))


@pytest.mark.parametrize(
    'text', ['Re: =?utf-8?q?Gr=C3=BC=C3=9Fe?= für', 'ü =?utf-8?q?=C3=BC?= x', '=?utf-8?q?=C3=BC?= ü =?utf-8?b?w7w=?=']
)
def test_an_encoded_word_in_text_of_the_older_api_is_one(text):
    assert read_text(message_bytes(older('Subject', text)), 'Subject') == decoded(text)


@pytest.mark.parametrize('character', ['\x00', '\x07', '\x1b', '\x08', '\x7f'])
@pytest.mark.parametrize('name', ['Subject', 'To', 'Content-Disposition', 'X-Any', 'Message-ID'])
@pytest.mark.parametrize('make', [modern, older])
def test_a_control_character_is_refused(make, name, character):
    message = make(name, f'a{character}b <a@x.example>')

    with pytest.raises(MessageError, match=rf'{name} holds the control character'):
        message_bytes(message)


def test_raw_iso_2022_of_a_message_that_was_parsed_is_no_control_character():
    raw = b'Subject: \x1b$B$3$s\x1b(B\r\n\r\n'

    assert message_bytes(email.message_from_bytes(raw)) == raw


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('=?utf-8?q?a?= =?utf-8?q?b?= c', 'ab c'),
        ('=?utf-8?b?w7w=?=\r\n =?iso-8859-1?Q?=FC?=', 'üü'),
        ('=?utf-8?b?w7w?=', 'ü'),
        ('=?utf-8*de?q?=C3=BC?=', 'ü'),
        # A character that was torn apart.
        ('=?utf-8?q?=C3?= =?utf-8?q?=BC?=', 'ü'),
        ('=?utf-8?q?a b_c?=x', 'a b cx'),
        ('=?no-such?q?a?= =?utf-8?q?b?=', '=?no-such?q?a?= b'),
        ('=?ascii?q?=FC?=', '=?ascii?q?=FC?='),
        ('=?hex?q?00?= =?idna?q?a?=', '=?hex?q?00?= =?idna?q?a?='),
        ('a =?b', 'a =?b'),
        ('', ''),
    ],
)
def test_encoded_words_are_decoded(text, expected):
    assert decoded(text) == expected
