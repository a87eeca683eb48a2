"""
Header fields that a program has set, as they go out.

:func:`field_bytes` writes what :meth:`email.message.Message.raw_items` gives: the text of the older API or of a parser,
a :class:`email.header.Header`, or an object of :mod:`email.headerregistry`.

* Text that can go out as it is does so, byte for byte.
* Address fields are written from the mailboxes in them.  When the library folds a long one it may drop the quotes of a
  display name, so that the name ``"boss@site.example, John"`` becomes an address on its own.
* The parameters of MIME fields are written as RFC 2231 has it where they are not ASCII.
* Everything else is text, see :mod:`~.encoded_words`.
* A field that would end early, and begin another field or the body, is refused, and so is one with a control in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from email.errors import MessageDefect, NonASCIILocalPartDefect, ObsoleteHeaderDefect
from email.header import Header
from email.headerregistry import AddressHeader, BaseHeader, ParameterizedMIMEHeader
from email.policy import SMTP, SMTPUTF8
from typing import Any
from urllib.parse import quote, unquote

from pyramid_mailqueue.addresses import (
    AddressGroup,
    check_address,
    needs_smtputf8,
    parse_address_list,
    parse_header_addresses,
)
from pyramid_mailqueue.encoded_words import LINE_MUST, FieldLines, chunks, decoded, is_text
from pyramid_mailqueue.exceptions import AddressError, MessageError

__all__ = ['FIELD', 'MOST_IN_A_FIELD', 'MOST_TEXT', 'boundary_of', 'field_bytes', 'needs_utf8', 'with_boundary']

#: So many characters are in the value of a field at most: enough for the recipients of one message.
MOST_IN_A_FIELD = 1_000_000

#: The same for text that has to be encoded.
MOST_TEXT = 100_000

# A field with its folds.  A blank before the colon is obsolete (RFC 5322 section 4.5) and must still be understood.
FIELD = re.compile(rb'([!-9;-~]+)[ \t]*:([^\r\n]*(?:\r\n[ \t][^\r\n]*)*)\r\n')

_NAME = re.compile(r'[!-9;-~]+')
_LINE_END = re.compile(r'\r\n|\r|\n')
_CONTROL = re.compile(r'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]')
# What switches to another character set in ISO 2022, as in fields of Japanese mail that was parsed.
_DESIGNATOR = re.compile(r'\x1b(?:\$[@AB]|\$?\([A-Z]|\([IJ])')

_ADDRESS_FIELDS = frozenset(
    {
        *('from', 'sender', 'reply-to', 'to', 'cc', 'bcc'),
        *('resent-from', 'resent-sender', 'resent-reply-to', 'resent-to', 'resent-cc', 'resent-bcc'),
        *('disposition-notification-to', 'errors-to', 'mail-followup-to', 'mail-reply-to', 'return-receipt-to'),
    }
)
# They are taken off before the message leaves.
_HIDDEN_FIELDS = frozenset({'bcc', 'resent-bcc'})
_PARAMETER_FIELDS = frozenset({'content-type', 'content-disposition'})


def field_bytes(name: str, value: object, *, utf8: bool = False, is_signed: bool = False) -> bytes:
    """
    Return the field *name* with its line ends.

    :param value: as in :meth:`email.message.Message.raw_items`
    :param utf8: whether the header may hold UTF-8 (RFC 6532)
    :param is_signed: whether it is inside of ``multipart/signed``, where any other form breaks the signature
    :raises MessageError: it is not one field, or cannot be written so that it is read as it was set
    """
    if not _NAME.fullmatch(name):
        raise _not_one_field(name)
    field = _written(name, value, utf8=utf8 or name.lower() in _HIDDEN_FIELDS, is_signed=is_signed)
    octets = field.encode('utf-8', 'surrogateescape')
    if not FIELD.fullmatch(octets):
        raise _not_one_field(name)
    return octets


def _written(name: str, value: object, *, utf8: bool, is_signed: bool) -> str:
    if isinstance(value, Header):
        return _write(name, value, _checked(name, str(value)), utf8=utf8)
    if not isinstance(value, str):
        raise MessageError(f'The value of the header field {name} must be text, not {type(value).__name__}.')
    _checked(name, value)
    if not isinstance(value, BaseHeader):
        return _unchanged(name, value) or _write(name, value, _LINE_END.sub('', value), utf8=utf8)
    if is_signed:
        # As the library writes it for the one who signs.
        return value.fold(policy=(SMTPUTF8 if utf8 else SMTP).clone(max_line_length=0))
    return _write(name, value, str(value), utf8=utf8)


def _checked(name: str, text: str) -> str:
    lines = _LINE_END.split(text)
    if any(not line.startswith((' ', '\t')) for line in lines[1:]):
        raise _not_one_field(name)
    most = MOST_IN_A_FIELD if text.isascii() or name.lower() in _ADDRESS_FIELDS else MOST_TEXT
    if len(text) > most:
        raise MessageError(f'The header field {name} has {len(text)} characters; it can have {most} at most.')
    control = _CONTROL.search(_DESIGNATOR.sub('', text))
    if control:
        raise MessageError(
            f'The header field {name} holds the control character {ascii(control[0])}, which no mail may have there. '
            'Remove it; if the value came out of a form or a database, check it there.'
        )
    return text


def _not_one_field(name: str) -> MessageError:
    return MessageError(
        f'The header field {ascii(name[:100])} is not one field: it has a line end that would begin another field or '
        'the body, or a name that is none. If its value came out of a form, it may be an attack.'
    )


def _unchanged(name: str, value: str) -> str | None:
    """Return the field with its own folds, or None if it cannot go out like that."""
    lines = _LINE_END.split(f'{name}: {value}')
    if max(map(len, lines)) > LINE_MUST or is_text(value):
        return None
    return '\r\n'.join([*lines, ''])


def _write(name: str, value: object, text: str, *, utf8: bool) -> str:
    lines = FieldLines(name, utf8=utf8)
    if isinstance(value, AddressHeader) or name.lower() in _ADDRESS_FIELDS:
        return _write_addresses(name, value, text, utf8=utf8)
    if isinstance(value, ParameterizedMIMEHeader) or name.lower() in _PARAMETER_FIELDS:
        _add_parameters(lines, _source(value) if isinstance(value, ParameterizedMIMEHeader) else text)
    else:
        lines.add_text(text, holds_encoded=_holds_encoded(value))
    return lines.text()


def _holds_encoded(value: object) -> bool:
    """Whether an encoded word in the text of *value* is meant as one: the library's objects have decoded theirs."""
    return not isinstance(value, (Header, BaseHeader))


# --- address fields ---------------------------------------------------------

# The library has something to say about such a field, but there is only one way to read it.
_HARMLESS_DEFECTS = (NonASCIILocalPartDefect, ObsoleteHeaderDefect)

_ATOMS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?: [A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
_NEEDS_BACKSLASH = re.compile(r'(["\\])')
# A quoted string is not folded: not every reader knows that it may be.
_MOST_QUOTED = LINE_MUST - 78

_VISIBLE_ADDRESS_FIELDS = frozenset(
    {'from', 'sender', 'reply-to', 'to', 'cc', 'resent-from', 'resent-sender', 'resent-to', 'resent-cc'}
)


class _Text(str):
    """A display name that has to be encoded."""

    __slots__ = ()


def needs_utf8(name: str, value: object) -> bool:
    """Tell whether the header has to be written in UTF-8 (RFC 6532): an address cannot hold an encoded word."""
    if name.lower() not in _VISIBLE_ADDRESS_FIELDS or (isinstance(value, str) and value.isascii()):
        return False
    text = _LINE_END.sub('', str(value))
    if _holds_encoded(value) and not is_text(text):
        return False
    try:
        groups = _groups(value, text)
    except AddressError:
        return False
    return any(needs_smtputf8(address) for group in groups for _, address in group.mailboxes)


def _write_addresses(name: str, value: object, text: str, *, utf8: bool) -> str:
    lines = FieldLines(name, utf8=utf8)
    try:
        groups = _groups(value, text)
        items = [words for group in groups for words in _group_items(group, utf8=utf8)]
    except AddressError:
        return _write_odd_addresses(lines, name, value, text)
    for number, words in enumerate(items, 1):
        for word in [*words[:-1], words[-1] + (',' if number < len(items) else '')]:
            lines.add_encoded(word) if isinstance(word, _Text) else lines.add(word)
    return lines.text()


def _groups(value: object, text: str) -> list[AddressGroup]:
    """Return the mailboxes in an address field.  Raises AddressError if they may not be those that are meant."""
    if not isinstance(value, AddressHeader) or not _is_read(value):
        return [
            AddressGroup(it.name and decoded(it.name), [(decoded(name), address) for name, address in it.mailboxes])
            for it in parse_address_list(text)
        ]
    groups = [
        AddressGroup(group.display_name, [(it.display_name, check_address(it.addr_spec)) for it in group.addresses])
        for group in value.groups
    ]
    if all(isinstance(defect, _HARMLESS_DEFECTS) for defect in _defects(value)):
        return groups
    ours = parse_header_addresses([_library_text(value)])
    if ours != list(dict.fromkeys(address for group in groups for _, address in group.mailboxes)):
        raise AddressError('The library has not read the same addresses.')
    return groups


def _is_read(value: Any) -> bool:
    """Whether the library has read addresses, not taken over the texts of a list."""
    return not any(isinstance(it, str) for group in value.groups for it in (group, *group.addresses))


def _defects(value: Any) -> tuple[MessageDefect, ...]:
    return tuple(value.defects)


def _library_text(value: Any) -> str:
    """Return the value in one line as the library writes it: it keeps what it could not read."""
    return str(value.fold(policy=SMTPUTF8.clone(max_line_length=0)).partition(':')[2].strip())


def _group_items(group: AddressGroup, *, utf8: bool) -> list[list[str]]:
    """Return the words of each mailbox; a group has its name in front of the first, and ends in a semicolon."""
    items = [_mailbox_words(name, address, utf8=utf8) for name, address in group.mailboxes]
    if group.name is not None:
        items = items or [[]]
        *words, last = _phrase(group.name, utf8=utf8)
        items[0][:0] = [*words, last, ':'] if isinstance(last, _Text) else [*words, f'{last}:']
        items[-1][-1] += ';'
    return items


def _mailbox_words(name: str, address: str, *, utf8: bool) -> list[str]:
    if needs_smtputf8(address) and not utf8:
        raise AddressError(f'{address} has no ASCII form.')
    return [*_phrase(name, utf8=utf8), f'<{address}>'] if name else [address]


def _phrase(text: str, *, utf8: bool) -> list[str]:
    """Return *text* as the words of a phrase (RFC 5322 section 3.2.5)."""
    if '=?' not in text and text.isprintable() and (utf8 or text.isascii()):
        if _ATOMS.fullmatch(text):
            return text.split(' ')
        quoted = '"' + _NEEDS_BACKSLASH.sub(r'\\\1', text) + '"'
        if len(quoted.encode()) <= _MOST_QUOTED:
            return [quoted]
    return [_Text(text)]


def _write_odd_addresses(lines: FieldLines, name: str, value: object, text: str) -> str:
    """Write an address field as text; it must not come to name anybody whom it did not name before."""
    named: set[str] = set()
    if isinstance(value, AddressHeader) and _is_read(value):
        text = _library_text(value)
        named = {mailbox.addr_spec for mailbox in value.addresses}
    lines.add_text(text, holds_encoded=_holds_encoded(value))
    written = lines.text()
    try:
        if set(parse_header_addresses([written.partition(':')[2].strip()])) <= named:
            return written
    except AddressError:
        return written  # Nobody will be read out of it.
    raise AddressError(
        f'The header field {name} cannot be written so that everybody reads the same addresses in it: '
        f'{ascii(text[:100])}. Correct it.'
    )


# --- parameters of MIME fields ----------------------------------------------

_PARAMETER = re.compile(r';[ \t]*([0-9A-Za-z!#$%&\'*+.^_`{|}~-]+)[ \t]*=[ \t]*')
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"[ \t]*(?:\([^()]*\)[ \t]*)*(?=;|\Z)')
_ESCAPED = re.compile(r'\\(["\\])')
_TOKEN = re.compile(r"[0-9A-Za-z!#$%&'*+.^_`{|}~-]+")
# What follows a token is a comment, or something that is no parameter.
_TOKEN_AND_MORE = re.compile(rf'({_TOKEN.pattern})[ \t]*(?:\([^()]*\)[ \t]*)*(?:;|\Z)')
# RFC 2231 section 4: charset, language, and octets of which some are escaped.
_EXTENDED = re.compile(r"([^']*)'([^']*)'([!-~]*)")
_SEGMENT_ROOM = 60
_QUOTED_PAIR = re.compile(r'\\(.)')
_DELIMITER = re.compile('[ -~]*[!-~]')
_BOUNDARY = re.compile(
    r';\s*boundary\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s"();]+))\s*(?:\([^()]*\)\s*)*(?:;|\Z)', re.IGNORECASE
)


def _source(value: Any) -> str:
    """Return what the program has set: if that is not as the RFC has it, the text of the object misses some of it."""
    if not value.defects:
        return str(value)
    return ''.join(map(_token_source, value._parse_tree))  # noqa: SLF001 - nothing else holds all of it


def _token_source(token: Any) -> str:
    return ''.join(map(str, token)) if isinstance(token, list) else str(token)


def _add_parameters(lines: FieldLines, text: str) -> None:
    match = _PARAMETER.search(text)
    words = [text[: match.start()].strip(' \t') if match else text]
    words += [word for name, parameter in _parameters(text) for word in _parameter_words(name, parameter)]
    lines.add_text(words[0] + (';' if len(words) > 1 else ''), holds_encoded=True)
    for number, word in enumerate(words[1:], 2):
        lines.add(word + (';' if number < len(words) else ''))


def _parameters(text: str) -> Iterator[tuple[str, str]]:
    """Yield the parameters in *text*; a value without quotes goes on until another parameter begins."""
    begin = _PARAMETER.search(text)
    while begin:
        quoted = _QUOTED.match(text, begin.end())
        following = _PARAMETER.search(text, quoted.end() if quoted else begin.end())
        if quoted:
            yield begin[1], _ESCAPED.sub(r'\1', quoted[1])
        else:
            yield begin[1], _unquoted(text[begin.end() : following.start() if following else len(text)].strip(' \t;'))
        begin = following


def _unquoted(value: str) -> str:
    """Return the value of a parameter that is no quoted string: a token, or whatever stands there."""
    token = _TOKEN_AND_MORE.match(value)
    if token:
        return token[1]
    return value[1:].removesuffix('"') if value.startswith('"') else value


def _parameter_words(name: str, value: str) -> list[str]:
    if name.endswith('*') and _TOKEN.fullmatch(value):
        # Encoded already.
        extended = _EXTENDED.fullmatch(value)
        if len(name) + len(value) <= _MOST_QUOTED or not extended or '*' in name[:-1]:
            return [f'{name}={value}']
        name, value = name[:-1], unquote(extended[3], extended[1] or 'utf-8', 'replace')
    quoted = f'{name}="' + _NEEDS_BACKSLASH.sub(r'\\\1', value) + '"'
    if value.isascii() and value.isprintable() and len(quoted) <= _MOST_QUOTED:
        return [quoted]
    octets = [quote(char, safe='!#$&+-.^_`{|}~', errors='replace') for char in value]
    if sum(map(len, octets)) <= _SEGMENT_ROOM:
        return [f"{name}*=utf-8''{''.join(octets)}"]
    first, *others = (''.join(units) for units in chunks(octets, _SEGMENT_ROOM - 7, _SEGMENT_ROOM))
    return [f"{name}*0*=utf-8''{first}", *(f'{name}*{number}*={part}' for number, part in enumerate(others, 1))]


def boundary_of(value: object) -> str | None:
    """
    Return the boundary that a field ``Content-Type`` names (RFC 2046); None if not every reader finds one.

    :param value: as in :meth:`email.message.Message.raw_items`
    """
    match = _BOUNDARY.search(_LINE_END.sub('', str(value)))
    boundary = _QUOTED_PAIR.sub(r'\1', match[1] or match[2] or '') if match else ''
    return boundary if _DELIMITER.fullmatch(boundary) else None


def with_boundary(value: object, boundary: str) -> str:
    """Return the text of the field ``Content-Type`` *value* with another *boundary*."""
    text = _LINE_END.sub('', str(value))
    begin = _PARAMETER.search(text)
    kept = [
        word
        for name, parameter in _parameters(text)
        if name.partition('*')[0].lower() != 'boundary'
        for word in _parameter_words(name, parameter)
    ]
    return '; '.join([text[: begin.start()] if begin else text.rstrip(' \t;'), *kept, f'boundary="{boundary}"'])
