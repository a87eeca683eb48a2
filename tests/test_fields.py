"""Address fields and the parameters of MIME fields, read by others than who has written them."""

from __future__ import annotations

import contextlib
import email
import email.policy
from email.header import Header
from email.headerregistry import Address, Group
from email.message import EmailMessage, Message

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyramid_mailqueue.exceptions import AddressError, MessageError
from pyramid_mailqueue.message.addresses import parse_address_list
from pyramid_mailqueue.message.content import message_bytes
from tests.parts.reader import decode_text, lines_of_field, read_parameter
from tests.parts.strategies import texts

ADDRESS_FIELDS = ['To', 'From', 'Cc', 'Reply-To', 'Resent-To', 'Sender']
names = st.one_of(
    st.just(''),
    texts().map(lambda text: ' '.join(text.split())).filter(str.isprintable),
    st.sampled_from(['Lovelace, Ada', 'a "b" c', 'back\\slash', "O'Neil (x)", 'eve@x.example, x', 'long ' * 30 + ',x']),
)


def modern(name, value):
    message = EmailMessage()
    message[name] = value
    return message


def older(name, value):
    message = Message()
    message[name] = value
    return message


def read_mailboxes(message, name):
    value = b''.join(lines_of_field(message_bytes(message), name.encode())).decode().partition(':')[2]
    return [(decode_text(it), address) for group in parse_address_list(value) for it, address in group.mailboxes]


# --- address fields ---------------------------------------------------------


@given(st.lists(names, min_size=1, max_size=6))
@example(['ü' * 30, 'Ünal'])
def test_names_and_addresses_are_read_as_they_were_set(display_names):
    mailboxes = [(' '.join(name.split()), f'u{number}@x.example') for number, name in enumerate(display_names)]
    objects = [Address(name, addr_spec=address) for name, address in mailboxes]
    written = [str(it) for it in objects]
    assert read_mailboxes(modern('To', objects), 'To') == mailboxes

    if any('=?' in name for name, _ in mailboxes):
        return  # In text that is an encoded word.
    for message in (
        modern('To', written),
        modern('To', ', '.join(written)),
        older('To', ', '.join(written)),
        older('To', Header(', '.join(written), 'utf-8')),
    ):
        assert read_mailboxes(message, 'To') == mailboxes


ADA, UNAL = Address('Lovelace, Ada', 'a', 'x.example'), Address('Ünal', 'u', 'x.example')


@pytest.mark.parametrize('name', ADDRESS_FIELDS)
@pytest.mark.parametrize(
    ('value', 'written'),
    [
        (lambda: ['a@x.example', 'Ünal <u@x.example>'], 'a@x.example, =?utf-8?q?=C3=9Cnal?= <u@x.example>'),
        (lambda: ('a@x.example', 'Ünal <u@x.example>'), 'a@x.example, =?utf-8?q?=C3=9Cnal?= <u@x.example>'),
        (
            lambda: ['"Lovelace, Ada" <a@x.example>', UNAL],
            '"Lovelace, Ada" <a@x.example>, =?utf-8?q?=C3=9Cnal?= <u@x.example>',
        ),
        (lambda: [Group('Team', ('a@x.example', UNAL))], 'Team: a@x.example, =?utf-8?q?=C3=9Cnal?= <u@x.example>;'),
        (
            lambda: [Group('Älle', (ADA,)), 'u@x.example'],
            '=?utf-8?q?=C3=84lle?= : "Lovelace, Ada" <a@x.example>;, u@x.example',
        ),
        (lambda: [ADA, Group(None, ('u@x.example',))], '"Lovelace, Ada" <a@x.example>, u@x.example'),
        (lambda: ADA, '"Lovelace, Ada" <a@x.example>'),
        (lambda: Group('Nobody', ()), 'Nobody:;'),
        (lambda: iter(['a@x.example']), 'a@x.example'),
        (list, ''),
    ],
)
def test_every_form_that_a_message_takes_is_written(name, value, written):
    lines = lines_of_field(message_bytes(modern(name, value())), name.encode())

    assert b''.join(lines).decode() == f'{name}: {written}'.rstrip()


def test_a_line_with_an_encoded_name_has_76_characters_at_most():
    people = [Address('Ünal ' * (number % 9 + 1), f'u{number}', 'x.example') for number in range(40)]

    lines = lines_of_field(message_bytes(modern('To', people)), b'To')

    assert max(len(line) for line in lines) <= 78
    assert max(len(line) for line in lines if b'=?' in line) <= 76


def test_text_with_a_comma_in_a_name_that_has_no_quotes_names_nobody_else():
    message = older('To', 'Müller, Hans <h@x.example>')

    with pytest.raises(AddressError):
        parse_address_list(message_bytes(message).decode('ascii').partition(':')[2].strip())


@pytest.mark.parametrize('text', ['Alle hier drüben', 'Ö' * 100, 'ü)b@x.example', 'Jörg <@x.example>'])
def test_text_that_names_nobody_is_written_as_text(text):
    lines = lines_of_field(message_bytes(older('To', text)), b'To')

    assert decode_text(b''.join(lines).decode('ascii').partition(':')[2].strip()) == text


def test_an_encoded_word_in_a_name_of_the_older_api_is_one():
    message = older('To', '=?utf-8?q?Gr=C3=BC=C3=9Fe?= Ö <a@x.example>, "=?utf-8?q?=C3=BC?= b" <b@x.example>')

    assert read_mailboxes(message, 'To') == [('Grüße Ö', 'a@x.example'), ('ü b', 'b@x.example')]


@pytest.mark.parametrize('name', ['Bcc', 'Resent-Bcc'])
def test_a_hidden_field_can_name_an_international_mailbox(name):
    assert message_bytes(older(name, 'ådå@x.example, ü <b@x.example>')).decode() == (
        f'{name}: ådå@x.example, "ü" <b@x.example>\r\n\r\n'
    )


# --- parameters -------------------------------------------------------------

# get_filename() of the standard library takes brackets and quotes off twice.
file_names = st.one_of(
    texts()
    .map(lambda text: ' '.join(text.split()))
    .filter(lambda it: it and it.isprintable() and '=?' not in it and it[0] not in '<"'),
    st.sampled_from(['ü b.pdf', "it's ü.pdf", 'a;b ü.pdf', 'q"uo"te.pdf', 'C:\\ü.pdf', '100%.pdf', 'x' * 2000]),
)


@given(file_names)
@example('ü' * 300)
def test_the_name_of_a_file_is_read_as_it_was_set(name):
    attached = EmailMessage()
    attached.set_content(b'x', maintype='application', subtype='pdf', filename=name)
    quoted = name.replace('\\', '\\\\').replace('"', '\\"')
    for part in (
        attached,
        older('Content-Disposition', f'attachment; filename="{quoted}"'),
        with_parameter(name),
        with_parameter(('utf-8', 'de', name)),
    ):
        content = message_bytes(part)
        if b"filename*=utf-8'de'" not in content and b'filename*="' not in content:
            assert read_parameter(content, 'Content-Disposition', 'filename') == name
        for policy in (email.policy.default, email.policy.compat32):
            assert email.message_from_bytes(content, policy=policy).get_filename() == name


def with_parameter(name):
    message = Message()
    message.add_header('Content-Disposition', 'attachment', filename=name)
    return message


@pytest.mark.parametrize(
    ('value', 'name'),
    [
        ('attachment; filename=ü b.pdf', 'ü b.pdf'),
        ('attachment; filename=ü b.pdf; size=3', 'ü b.pdf'),
        ("attachment; filename='ü x.pdf'", "'ü x.pdf'"),
        ('attachment; filename="ü b.pdf"', 'ü b.pdf'),
        ('attachment; filename="ü b.pdf" (a comment)', 'ü b.pdf'),
        ('attachment; filename="ü \\"b\\".pdf"', 'ü "b".pdf'),
        ('attachment; filename="ü "b".pdf"', 'ü "b".pdf'),
        ('attachment; filename=ü;b.pdf', 'ü;b.pdf'),
        ('attachment;filename =  ü (1).pdf ;', 'ü (1).pdf'),
        ('attachment; size=3; filename="a; b=ü.pdf"', 'a; b=ü.pdf'),
        ('attachment; filename="ü', 'ü'),
    ],
)
@pytest.mark.parametrize('make', [modern, older])
def test_a_field_that_was_written_by_hand_loses_nothing_of_a_name(make, value, name):
    content = message_bytes(make('Content-Disposition', value))

    assert read_parameter(content, 'Content-Disposition', 'filename') == name
    assert content.startswith(b'Content-Disposition: attachment;')


def test_the_other_parameters_stay_as_they_are():
    message = older('Content-Type', 'text/plain; charset=utf-8 (c); foo; name=ü; format="flowed"')

    assert message_bytes(message).partition(b'\r\n\r\n')[0] == (
        b'Content-Type: text/plain; charset="utf-8"; name*=utf-8\'\'%C3%BC;\r\n format="flowed"'
    )


# --- how long it takes ------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'piece'),
    [
        ('Reply-To', '\\'),
        ('Reply-To', '=?x?q?a '),
        ('Reply-To', ' ='),
        ('Reply-To', ' '),
        ('Content-Type', ' '),
        ('References', '<'),
        ('To', 'ü <u@x.example>, '),
        ('To', '"\\" '),
        ('Content-Disposition', ';'),
        ('Content-Disposition', '; a="\\'),
        ('Subject', '=?utf-8?q? '),
    ],
)
def test_a_value_out_of_a_form_does_not_take_quadratic_time(name, piece):
    length = 200_000 if name in ('Reply-To', 'To') else 99_000
    message = older(name, 'ü' + piece * (length // len(piece)) + '<b@x.example>')

    # In quadratic time it would not come to an end before the run of the tests is stopped.
    with contextlib.suppress(MessageError):
        assert message_bytes(message).isascii()


# --- what the older API composes of pieces ----------------------------------


def in_pieces(*pieces):
    header = Header()
    for text, charset in pieces:
        header.append(text, charset)
    return header


@pytest.mark.parametrize(
    'name', ['boss@s.example', 'Ö, X', 'Ö: x', '"Ö', 'Ö (x)', ',', 'Ö , .', 'Ö <eve@x.example>', 'Ünal', 'ü' * 80]
)
def test_what_was_encoded_in_a_piece_of_a_header_is_a_name_and_no_address(name):
    pieces = [(name, 'utf-8'), ('<a@x.example>,', 'ascii'), (name, 'iso-8859-1'), ('<b@x.example>', None)]
    message = older('From', in_pieces(*pieces))

    assert read_mailboxes(message, 'From') == [(name, 'a@x.example'), (name, 'b@x.example')]


def test_an_encoded_word_in_an_ascii_piece_is_one():
    assert message_bytes(older('Subject', Header('=?utf-8?q?=C3=BC?='))) == b'Subject: =?utf-8?q?=C3=BC?=\r\n\r\n'


def test_octets_of_a_message_that_was_parsed_are_copied():
    parsed = email.message_from_bytes(b'Subject: \xfc x\n\n')

    assert message_bytes(older('Subject', parsed['Subject'])) == b'Subject: \xfc x\r\n\r\n'


# --- names, comments, and what looks like an address ------------------------


@pytest.mark.parametrize(
    'name',
    [
        'Universität Hamburg, Fachbereich Informatik, Arbeitsbereich Netze und verteilte Systeme',
        'Verein zur Förderung der Informatik e.V., Abteilung Veranstaltungen',
    ],
)
def test_a_long_name_is_not_torn_within_a_word(name):
    content = message_bytes(modern('To', [Address(name, 'a', 'x.example')]))

    # This reader shows a blank between two encoded words.
    (mailbox,) = email.message_from_bytes(content, policy=email.policy.default)['To'].addresses
    assert mailbox.display_name.split() == name.split()


@pytest.mark.parametrize(
    ('value', 'mailboxes'),
    [
        ('a@x.example (Ada Lovelace)', [('Ada Lovelace', 'a@x.example')]),
        ('a@x.example (Jörg Müller), B <b@x.example> (work)', [('Jörg Müller', 'a@x.example'), ('B', 'b@x.example')]),
        ('(Ünal) u@x.example', [('Ünal', 'u@x.example')]),
    ],
)
@pytest.mark.parametrize('make', [modern, older])
def test_a_comment_is_the_name_of_a_mailbox_that_has_none(make, value, mailboxes):
    assert read_mailboxes(make('To', value), 'To') == mailboxes


@pytest.mark.parametrize(
    'value',
    [
        '=?utf-8?q?boss=40site.example=2C?= J <eve@x.example>, Jane Doe',
        '=?utf-8?q?e=40e=2Eexample?=;',
        '=?utf-8?q?a=40x.example?=, root',
    ],
)
def test_a_decoded_name_in_an_odd_field_does_not_become_an_address(value):
    with pytest.raises(AddressError, match='cannot be written so that all readers find the same addresses'):
        message_bytes(modern('Reply-To', value))


# --- more than one form of a parameter --------------------------------------


@pytest.mark.parametrize(
    ('value', 'name'),
    [
        ('attachment; filename="ü.pdf"; filename*=UTF-8\'\'%C3%BC.pdf', 'ü.pdf'),
        ('attachment; filename*=UTF-8\'\'%C3%BC.pdf; filename="ü.pdf"', 'ü.pdf'),
        ("attachment; filename*=utf-8''ü.pdf", 'ü.pdf'),
        ('attachment; filename*0*=utf-8\'\'%C3%BC; filename*1="ß.pdf"', 'üß.pdf'),
        ("attachment; filename*=iso-8859-1''%FC%DF; size=ü", 'üß'),
        ('attachment (Anhänge); filename="x.pdf"', 'x.pdf'),
    ],
)
@pytest.mark.parametrize('make', [modern, older])
def test_one_name_in_several_forms_is_one_name(make, value, name):
    content = message_bytes(make('Content-Disposition', value))

    for policy in (email.policy.default, email.policy.compat32):
        assert email.message_from_bytes(content, policy=policy).get_filename() == name


def test_only_parameters_may_hold_other_text():
    with pytest.raises(MessageError, match=r'Content-Type cannot be written: .* is not ASCII'):
        message_bytes(older('Content-Type', 'text/ü; charset=utf-8'))


@pytest.mark.parametrize('name', ['Message-ID', 'Content-ID', 'In-Reply-To', 'References'])
def test_an_id_is_ascii(name):
    with pytest.raises(MessageError, match=f'{name} holds an id that is not ASCII'):
        message_bytes(older(name, '<1@x.example> <ü@x.example>'))
