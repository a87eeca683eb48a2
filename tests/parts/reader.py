"""
A reader of headers that is not the writer: what RFC 2047 and RFC 2231 say, and nothing else.

It is strict where the readers of the standard library are lenient, so that what it reads is what any reader does.
"""

from __future__ import annotations

import base64
import quopri
import re
from urllib.parse import unquote_to_bytes

ENCODED_WORD = re.compile(r'=\?([^? ]+)\?([bBqQ])\?([!->@-~]*)\?=')


def lines_of_field(content, name):
    """The lines of the one field *name* of the message *content*; fails if they break a rule."""
    header = content.partition(b'\r\n\r\n')[0]
    fields = [field for field in re.split(rb'\r\n(?![ \t])', header) if field.lower().startswith(name.lower() + b':')]
    assert len(fields) == 1
    lines = fields[0].split(b'\r\n')
    for line in lines:
        # RFC 5322 section 2.1.1 and 3.2.2: no line is too long, and no fold looks like the end of the header.
        assert len(line) <= 998
        assert line.strip() or lines == [line]
        check_encoded_words(line)
    return lines


def check_encoded_words(line):
    """RFC 2047: how long lines and words are, what stands beside a word, and that its characters are whole."""
    for match in re.finditer(rb'(\S*)(=\?utf-8\?[bq]\?[^? ]*\?=)(\S*)', line):
        assert len(line) <= 76
        assert len(match[2]) <= 75
        assert not match[1]
        assert not match[3]
        decode_word(ENCODED_WORD.fullmatch(match[2].decode('ascii')))


def decode_word(match):
    charset, encoding, text = match.groups()
    if encoding in 'bB':
        return base64.b64decode(text, validate=True).decode(charset)
    return quopri.decodestring(text.replace('_', ' ').encode('ascii')).decode(charset)


def read_text(content, name):
    """The text of the field *name*, unfolded (RFC 5322 section 2.2.3) and decoded (RFC 2047 section 6)."""
    value = b''.join(lines_of_field(content, name.encode('ascii'))).decode('utf-8').partition(':')[2].removeprefix(' ')
    return decode_text(value)


def decode_text(value):
    pieces, after_encoded = [], False
    for blanks, word in re.findall(r'([ \t]*)([^ \t]+|\Z)', value):
        match = ENCODED_WORD.fullmatch(word)
        pieces += [blanks if not (match and after_encoded) else '', decode_word(match) if match else word]
        after_encoded = match is not None
    return ''.join(pieces)


def read_parameter(content, field, name):
    """The parameter *name* of a MIME field (RFC 2045 section 5.1, RFC 2231); None if it is not there."""
    value = b''.join(lines_of_field(content, field.encode('ascii'))).decode('ascii')
    pattern = rf';\s*{name}(?:\*(\d+))?(\*)?=("(?:[^"\\]|\\.)*"|[^\s;"]+)'
    parts = {int(number or 0): (text, bool(star)) for number, star, text in re.findall(pattern, value)}
    if not parts:
        return None
    assert list(parts) == list(range(len(parts)))
    octets = b''
    for number, (text, is_extended) in parts.items():
        if is_extended:
            if number == 0:
                charset, _, text = text.split("'", 2)
                assert charset == 'utf-8'
            octets += unquote_to_bytes(text)
            octets.decode('utf-8')
        else:
            octets += re.sub(r'\\(.)', r'\1', text[1:-1] if text.startswith('"') else text).encode('ascii')
    return octets.decode('utf-8')
