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
    return ordinary | quoted_strings() | international


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
