"""What hypothesis makes up for several tests."""

from __future__ import annotations

import string

from hypothesis import strategies as st

PRINTABLE = ''.join(map(chr, range(0x20, 0x7F)))
ATEXT = string.ascii_letters + string.digits + "!#$%&'*+-/=?^_`{|}~"


def quoted_strings():
    pieces = st.sampled_from(PRINTABLE).map(lambda char: f'\\{char}' if char in '"\\' else char)
    escapes = st.sampled_from(PRINTABLE).map('\\{}'.format)
    return st.lists(pieces | escapes, min_size=1, max_size=20).map(''.join).map('"{}"'.format)


def local_parts():
    ordinary = st.text(ATEXT + '.', min_size=1, max_size=20)
    international = st.text('aZ.-äßéøλжя中日한😀', min_size=1, max_size=15)
    # What begins like an encoded word is refused.
    return (ordinary | quoted_strings() | international).filter(lambda part: '=?' not in part)


def domains():
    labels = st.text(string.ascii_letters + string.digits + '-_', min_size=1, max_size=20)
    names = st.lists(labels, min_size=1, max_size=4).map('.'.join)
    international = st.sampled_from(
        ['bücher.example', 'BÜCHER.example', 'παράδειγμα.example', '例え.example', 'faß.example']
    )
    literals = st.sampled_from(['[192.0.2.1]', '[IPv6:2001:db8::1]'])
    return names | international | literals


def addresses():
    """Addresses that may be sent to, as people write them: not all of them normalised."""
    return st.builds('{}@{}'.format, local_parts(), domains())


_SCRIPTS = [
    'abcxyz',
    'абвгд',
    '日本語漢字',
    'äöüßé',
    '😀👩‍👧🏳️',
    'مرحبا',
    '=?_@<>,;:"\\()[]',
    '0123',
    '\xa0\u200b\u2028',
]


def texts():
    """Text of a header: words of several scripts, with any white space between them."""
    words = st.sampled_from(_SCRIPTS).flatmap(lambda script: st.text(script, min_size=1, max_size=40))
    blanks = st.sampled_from([' ', ' ', ' ', '  ', '\t', ' \t '])
    pairs = st.lists(st.tuples(blanks, words), min_size=1, max_size=30)
    return pairs.map(lambda pairs: ''.join(blank + word for blank, word in pairs).strip())


# What mail is made of that is not as it should be, and what the email package has raised an exception for.
_FIELDS = (
    b'Content-Type', b'Content-Transfer-Encoding', b'Content-Disposition', b'Subject', b'From', b'To', b'Sender',
    b'Date', b'Message-ID', b'MIME-Version',
)  # fmt: skip
_PIECES = (
    b'text/plain', b'text/html', b'multipart/mixed', b'multipart/alternative', b'message/rfc822',
    b'message/delivery-status', b'attachment', b'; charset=', b'; charset="', b"; charset*0*=\xff''utf; charset*1=-8",
    b"; charset*=utf-8''x", b'utf-8', b'no-such', b'utf-7', b'utf-16', b'unicode_escape', b'x\0y', b'hex', b'idna',
    b'; boundary=b', b'; boundary="b', b"; boundary*=\0''b", b'; name*1=a; name*=x', b"; filename*=no''%ff", b'base64',
    b'quoted-printable', b'x-uuencode', b'8bit', b'"', b'(', b'<', b'>', b'@', b',', b';', b':', b'=', b'\\', b'\xff',
    b'\xc3\xbc', b'\0', b' ', b'\r\n ', b'=?utf-8?q?=C3=BC?=', b'=?utf-8?b?!?=', b'=?no-such?q?a?=',
    b'=?utf-7?q?+2AA-?=', b'=?unicode_escape?q?=5Cud800?=', b'=?a\0?q?b?=', b'=?', b'?=', b'a@x.example', b'group:;',
)  # fmt: skip
_LINES = (
    b'--b', b'--b--', b'Hello', b'\xff\xfe', b'=', b'=3D=', b'=XY', b'SGVsbG8=', b'!!!!', b'begin 666 x', b'end', b'',
    b'+2AA-', b'\\ud800', b'\0', b'\xed\xa0\x80',
)  # fmt: skip


def odd_contents():
    """Contents of messages as nobody should send them."""
    values = st.lists(st.sampled_from(_PIECES), max_size=5).map(b''.join)
    headers = st.lists(st.builds(b'%s: %s\r\n'.__mod__, st.tuples(st.sampled_from(_FIELDS), values)), max_size=4)
    parts = st.sampled_from(_LINES).map(b'%s\r\n'.__mod__) | headers.map(lambda lines: b''.join(lines) + b'\r\n')
    return st.builds(lambda header, body: b''.join([*header, b'\r\n', *body]), headers, st.lists(parts, max_size=6))
