"""The tree of a message, as any server takes it and as a reader finds it."""

from __future__ import annotations

import email
import email.policy
import re
from email import encoders
from email.charset import QP, Charset
from email.header import Header
from email.message import EmailMessage, Message
from email.mime.application import MIMEApplication
from email.mime.base import MIMEBase
from email.mime.message import MIMEMessage
from email.mime.multipart import MIMEMultipart
from email.mime.nonmultipart import MIMENonMultipart
from email.mime.text import MIMEText

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramid_mailqueue.exceptions import MessageError
from pyramid_mailqueue.message.content import message_bytes
from pyramid_mailqueue.message.envelope import Envelope


def modern(text='x', **options):
    message = EmailMessage()
    message['From'] = message['To'] = 'a@x.example'
    message.set_content(text, **options)
    return message


def text_of(part):
    """The text of *part* with the line ends of Python."""
    return part.get_content().replace('\r\n', '\n')


def read_back(message):
    """*message* as a reader has it; fails if not every server would take it."""
    content = message_bytes(message)
    assert content.isascii()
    assert max(map(len, content.split(b'\r\n'))) <= 998
    assert b'\0' not in content
    return email.message_from_bytes(content, policy=email.policy.default)


# --- bodies that not every server takes -------------------------------------

LONG = 'x' * 2000
TEXTS = [
    'Grüße\n',
    f'{LONG}\n',
    f'a\n{LONG}\nü\n',
    'один два три\n' * 50,
    'a\0b\n',
    'trailing \n.\nFrom me\n',
    '\n',
    'ü',
]


@pytest.mark.parametrize('text', TEXTS)
@pytest.mark.parametrize('cte', ['8bit', 'quoted-printable', 'base64', None])
def test_text_arrives_as_it_was_written(cte, text):
    message = modern(text, cte=cte) if cte != '8bit' or max(map(len, text.split('\n'))) < 998 else modern(text)

    assert text_of(read_back(message)) == message.get_content()


@given(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029')))
def test_any_text_arrives_as_it_was_written(text):
    message = modern(text)

    assert text_of(read_back(message)) == message.get_content()


@pytest.mark.parametrize('text', TEXTS)
def test_text_of_the_older_api_arrives_as_it_was_written(text):
    as_8bit = MIMENonMultipart('text', 'plain', charset='utf-8')
    charset = Charset('utf-8')
    charset.body_encoding = None
    as_8bit.set_payload(text, charset)
    by_hand = Message()
    by_hand['Content-Type'] = 'text/plain; charset=utf-8'
    by_hand.set_payload(text)
    as_qp = Message()
    quoted = Charset('utf-8')
    quoted.body_encoding = QP
    as_qp.set_payload(text, quoted)

    for message in (MIMEText(text, 'plain', 'utf-8'), as_8bit, by_hand, as_qp):
        assert text_of(read_back(message)).removesuffix('\n') == text.removesuffix('\n')


BINARY = bytes(range(256)) * 10 + b'\r\n\r\n--b\n' + b'y' * 3000


@pytest.mark.parametrize('cte', ['base64', 'quoted-printable', '8bit', 'binary'])
def test_an_attachment_arrives_as_it_was_added(cte):
    message = modern('see below')
    message.add_attachment(BINARY, maintype='application', subtype='octet-stream', filename='ü.bin', cte=cte)

    (attachment,) = read_back(message).iter_attachments()
    assert attachment.get_content() == BINARY
    assert attachment.get_filename() == 'ü.bin'


def test_base64_in_one_line_is_broken_into_lines():
    part = MIMEBase('application', 'octet-stream')
    part.set_payload(BINARY)
    encoders.encode_base64(part)
    part.set_payload(part.get_payload().replace('\n', ''))

    assert read_back(part).get_content() == BINARY


def test_what_is_encoded_here_says_so_in_the_header():
    message = Message()
    message['To'] = 'a@x.example'
    message.set_payload(f'{LONG}\n')

    assert message_bytes(message).partition(b'\r\n\r\n')[0].split(b'\r\n') == [
        b'To: a@x.example',
        b'Content-Transfer-Encoding: quoted-printable',
        b'MIME-Version: 1.0',
    ]


def test_a_body_that_every_server_takes_stays_as_it_is():
    message = modern('one\ntwo\n')

    assert message_bytes(message).endswith(
        b'\r\nContent-Transfer-Encoding: 7bit\r\nMIME-Version: 1.0\r\n\r\none\r\ntwo\r\n'
    )


def signed_part():
    return email.message_from_bytes(
        b'Content-Type: text/plain; charset=utf-8\n\nGr\xc3\xbc\xc3\x9fe ' + b'x' * 2000 + b'\n'
    )


def in_a_signed_multipart():
    message = MIMEMultipart('signed', protocol='application/pgp-signature')
    message.attach(signed_part())
    message.attach(MIMEApplication(b'sig', 'pgp-signature'))
    return message


def signed_by_a_domain():
    message = signed_part()
    message['DKIM-Signature'] = 'v=1; b=abc'
    return message


def attached_as_a_whole():
    message = modern('forwarded')
    message.add_attachment(email.message_from_bytes(signed_by_a_domain().as_bytes(), policy=email.policy.default))
    return message


@pytest.mark.parametrize('make', [in_a_signed_multipart, signed_by_a_domain, attached_as_a_whole])
def test_what_a_signature_covers_stays_as_it_is(make):
    assert b'Gr\xc3\xbc\xc3\x9fe ' + b'x' * 2000 + b'\r\n' in message_bytes(make())


def test_a_message_inside_of_another_is_encoded_too():
    inner = modern('Grüße\n')
    for outer in (MIMEMessage(inner), modern('see below')):
        if not outer.is_multipart():
            outer.add_attachment(inner)
        assert [text_of(part) for part in read_back(outer).walk() if part.get_content_maintype() == 'text'][
            -1
        ] == 'Grüße\n'


# --- multiparts -------------------------------------------------------------

BOUNDARIES = [
    'boundary="b" (c)',
    'boundary="b"; x=y',
    'boundary=b (c)',
    'boundary="\\b"',
    "boundary*=utf-8''b",
    'boundary="b"\n (c)',
    'x=y;\n\tboundary=\n "b"',
    'BOUNDARY = b',
]


@pytest.mark.parametrize('parameter', BOUNDARIES)
@pytest.mark.parametrize('policy', [email.policy.default, email.policy.compat32])
def test_the_delimiters_are_those_that_the_header_names(policy, parameter):
    data = f'Content-Type: multipart/mixed; {parameter}\n\n--b\n\none\n--b\n\ntwo\n--b--\n'.encode()
    parsed = email.message_from_bytes(data, policy=policy)
    by_hand = MIMEMultipart()
    del by_hand['Content-Type']
    by_hand['Content-Type'] = f'multipart/mixed; {parameter}'
    for text in ('one', 'two'):
        by_hand.attach(MIMEText(text))

    for message in (parsed, by_hand):
        if not message.is_multipart():
            continue  # The library has not found its parts, and it goes out as it came.
        assert [part.get_payload() for part in read_back(message).get_payload()] == ['one', 'two']


def test_a_multipart_that_was_parsed_goes_out_as_it_came():
    data = b'MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary="b" (c)\r\n\r\n--b\r\n\r\none\r\n--b--\r\n'

    assert message_bytes(email.message_from_bytes(data, policy=email.policy.default)) == data


def test_a_report_keeps_its_blocks():
    data = (
        b'MIME-Version: 1.0\r\nContent-Type: multipart/report; boundary="b"\r\n\r\n--b\r\n'
        b'Content-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; x\r\n\r\nAction: failed\r\n\r\n'
        b'Action: delayed\r\n'
        b'\r\n--b--\r\n'
    )

    assert message_bytes(email.message_from_bytes(data)) == data


@pytest.mark.parametrize('payload', [7, [object()]])
def test_a_payload_that_cannot_be_written_is_refused_with_the_cure(payload):
    message = Message()
    message.set_payload(payload)

    with pytest.raises(MessageError, match=r'payload of a part of the type text/plain must be text.*set_content'):
        message_bytes(message)


# --- fields that do not leave, or stand once --------------------------------


def test_the_return_path_of_an_application_does_not_leave():
    message = modern()
    message['Return-Path'] = '<bounce@x.example>'

    assert b'bounce' not in message_bytes(message)
    assert b'bounce' in message_bytes(b'Return-Path: <bounce@x.example>\r\n\r\n')


@pytest.mark.parametrize(
    'name', ['From', 'to', 'Subject', 'Date', 'Message-ID', 'Reply-To', 'References', 'Content-Type', 'MIME-Version']
)
def test_a_field_that_may_stand_once_is_refused_if_it_stands_twice(name):
    message = MIMEText('x')
    del message[name]
    message[name] = message[name.upper()] = 'a@x.example'

    with pytest.raises(MessageError, match=rf'(?i)2 header fields {name}; .*del message\[.{name}'):
        Envelope.from_message(message, 'a@x.example', 'b@x.example')


def test_bytes_are_never_changed():
    data = b'From: a@x.example\r\nFrom: b@x.example\r\nX: \0\x1b\xfc\r\n\r\n' + b'z' * 2000 + b'\xfc\0'

    assert message_bytes(data) == data


# --- beside the library, and messages of other packages ---------------------


def corpus():
    message = modern('Grüße,\n\nlong ' * 30, subtype='plain')
    message['Subject'] = 'Уведомление о принятии в работу обращения'  # noqa: RUF001 - Russian
    message['Cc'] = '"Lovelace, Ada" <ada@x.example>, Ünal <u@x.example>'
    message['List-Unsubscribe'] = f'<https://site.example/{"a" * 60}>'
    message.add_alternative('<p>Grüße</p>', subtype='html')
    message.add_attachment(b'\0\xff' * 100, maintype='image', subtype='png', filename='Übersicht.png', cid='<c@x>')
    message.add_attachment(modern('inner'))
    older = MIMEMultipart('alternative')
    older['From'] = older['To'] = 'a@x.example'
    older['Subject'] = 'x' * 70
    older.attach(MIMEText('Grüße', 'plain', 'utf-8'))
    older.attach(MIMEText('<p>', 'html'))
    return [message, older, modern('x')]


# Where a reader finds something else than in what the library writes, and why that is better.
IMPROVEMENTS = {
    'subject': 'the library has lost or added blanks, in some of its versions',
    'list-unsubscribe': 'the library has made an encoded word of a URL, in some of its versions',
    'content-transfer-encoding': '8-bit text is encoded, so that every server takes it',
}


@pytest.mark.parametrize('message', corpus())
def test_a_reader_finds_the_same_as_in_what_the_library_writes(message):
    theirs = email.message_from_bytes(message.as_bytes(policy=email.policy.SMTP), policy=email.policy.default)
    ours = read_back(message)

    assert [part.get_content_type() for part in ours.walk()] == [part.get_content_type() for part in theirs.walk()]
    for part, other in zip(ours.walk(), theirs.walk(), strict=True):
        assert part.keys() == other.keys()
        differing = {name.lower() for name in part if without_boundary(part[name]) != without_boundary(other[name])}
        assert differing <= IMPROVEMENTS.keys()
        assert crlf(part.get_payload(decode=True), part) == crlf(other.get_payload(decode=True), part)
    for name in ('Subject', 'List-Unsubscribe'):
        assert ours[name] == message[name]


def without_boundary(value):
    return re.sub(r'boundary="[^"]*"', '', str(value))


def crlf(data, part):
    return re.sub(b'\r?\n', b'\r\n', data) if data and part.get_content_maintype() == 'text' else data


def test_a_message_of_django_arrives_as_it_was_written():
    from django.conf import settings
    from django.core.mail import EmailMultiAlternatives

    if not settings.configured:
        settings.configure()
    mail = EmailMultiAlternatives('Grüße', f'Grüße {LONG}\n', '"Ü, x" <a@x.example>', ['Ö <b@x.example>'])
    mail.attach_alternative('<p>é</p>', 'text/html')
    mail.attach('ü.pdf', b'\0\xff', 'application/pdf')

    found = read_back(mail.message())
    assert found['Subject'] == 'Grüße'
    assert found['From'].addresses[0].display_name == 'Ü, x'
    assert found['To'].addresses[0].display_name == 'Ö'
    assert text_of(found.get_body(('plain',))) == f'Grüße {LONG}\n'
    assert [(it.get_filename(), it.get_content()) for it in found.iter_attachments()] == [('ü.pdf', b'\0\xff')]


def test_a_message_of_flask_mail_arrives_as_it_was_written():
    import flask
    from flask_mail import Mail
    from flask_mail import Message as FlaskMessage

    app = flask.Flask('app')
    Mail(app)
    with app.app_context():
        mail = FlaskMessage('Grüße', ['Ö <b@x.example>'], 'Grüße', sender=('Ü x', 'a@x.example'))
        mail.attach('ü.pdf', 'application/pdf', b'\0\xff')
        content = mail._message()  # its bytes are the library's

    found = read_back(content)
    assert found['Subject'] == 'Grüße'
    assert found['From'].addresses[0].display_name == 'Ü x'
    assert [(it.get_filename(), it.get_content()) for it in found.iter_attachments()] == [('ü.pdf', b'\0\xff')]


# --- what a signature covers ------------------------------------------------


def forwarded():
    inner = modern('x\n')
    inner['Subject'] = 'Grüße aus Köln'
    part = EmailMessage()
    part.set_content('hi\n')
    part.add_attachment(inner)
    return part


def with_a_long_file_name():
    part = EmailMessage()
    part.set_content('hi\n')
    part.add_attachment(b'x', maintype='a', subtype='b', filename='a' * 70 + '.pdf')
    return part


def of_the_older_api():
    part = MIMEText('hi')
    part['Subject'] = Header('Grüße', 'utf-8')
    part['X-Subject'] = 'Grüße'
    return part


@pytest.mark.parametrize('make', [forwarded, with_a_long_file_name, of_the_older_api])
def test_a_signed_part_is_written_as_it_was_signed(make):
    part = make()
    message = EmailMessage()
    message['To'] = 'å@x.example'
    message['Content-Type'] = 'multipart/signed; protocol="application/pgp-signature"; boundary="b"'
    message.set_payload([part, MIMEApplication(b'sig', 'pgp-signature')])
    policy = part.policy.clone(linesep='\r\n', max_line_length=0)

    assert b'--b\r\n' + part.as_bytes(policy=policy) + b'\r\n--b\r\n' in message_bytes(message)


def test_a_message_that_was_signed_for_its_domain_is_written_as_it_was_signed():
    message = modern('x\n')
    message['Subject'] = 'Уведомление о принятии в работу обращения'  # noqa: RUF001 - Russian
    name = 'Übersicht der Rechnungen im Monat November.pdf'
    message.add_attachment(b'x', maintype='a', subtype='b', filename=name)
    signed = message.as_bytes(policy=email.policy.SMTP)
    message['DKIM-Signature'] = f'v=1; a=rsa-sha256; b={"A" * 300}'

    content = message_bytes(message)
    assert re.sub(rb'DKIM-Signature:.*\r\n(?:[ \t].*\r\n)*', b'', content) == signed


# --- text that is not what it says ------------------------------------------


@pytest.mark.parametrize(('encoding', 'text'), [('quoted-printable', 'Кириллица'), ('base64', 'Grüße'), ('x-foo', 'ü')])
def test_text_that_is_not_encoded_as_it_says_is_refused(encoding, text):
    message = Message()
    message['Content-Type'] = 'text/plain; charset=utf-8'
    message['Content-Transfer-Encoding'] = encoding
    message.set_payload(text)

    with pytest.raises(MessageError, match=rf'{encoding}.*Let EmailMessage\.set_content\(\) encode it'):
        message_bytes(message)


@pytest.mark.parametrize('charset', ['utf-16', 'utf-16-le', 'utf-32', 'cp037'])
@pytest.mark.parametrize('text', ['上海', 'abc\n', 'x\n' * 2000])
def test_text_whose_line_ends_are_no_octets_arrives_as_it_was_written(charset, text):
    try:
        data = text.encode(charset)
    except UnicodeEncodeError:
        return
    message = Message()
    message['Content-Type'] = f'text/plain; charset={charset}'
    message.set_payload(data.decode('ascii', 'surrogateescape'))

    assert email.message_from_bytes(message_bytes(message)).get_payload(decode=True) == data


@pytest.mark.parametrize('charset', ['us-ascii', 'nope'])
def test_text_that_its_charset_cannot_hold_is_refused(charset):
    message = Message()
    message['Content-Type'] = f'text/plain; charset={charset}'
    message.set_payload('Grüße')

    with pytest.raises(MessageError, match=f'names the charset {charset}, which cannot hold it'):
        message_bytes(message)


def test_a_boundary_is_not_looked_for_in_other_parameters():
    message = MIMEMultipart('related', start_info='a; boundary=x; y')
    message.set_boundary('real')
    message.attach(MIMEText('one'))

    assert [part.get_payload() for part in read_back(message).get_payload()] == ['one']


def test_parts_that_are_nested_too_deeply_are_refused():
    message = MIMEText('x')
    for _ in range(2000):
        outer = MIMEMultipart()
        outer.attach(message)
        message = outer

    with pytest.raises(MessageError, match='nested too deeply'):
        message_bytes(message)
