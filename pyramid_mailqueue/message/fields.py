"""
Header fields that a program has set, as they go out.

:func:`field_bytes` writes what :meth:`email.message.Message.raw_items` gives: the text of the older API or of a parser,
a :class:`email.header.Header`, or an object of :mod:`email.headerregistry`.

* Text that can go out as it is does so, byte for byte.
* Address fields are written from the mailboxes in them.  When the library folds a long one it may drop the quotes of a
  display name, so that the name ``"boss@site.example, John"`` becomes an address on its own.
* The parameters of MIME fields are written by RFC 2231 where they are not ASCII.
* Everything else is text, see :mod:`~.encoded_words`.
* A field that would end early, and begin another field or the body, is refused, and so is one with a control in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from email.errors import MessageDefect, NonASCIILocalPartDefect, ObsoleteHeaderDefect
from email.header import Header, decode_header
from email.headerregistry import AddressHeader, BaseHeader, ParameterizedMIMEHeader
from email.policy import SMTP, SMTPUTF8, compat32
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from pyramid_mailqueue.exceptions import AddressError, MessageError
from pyramid_mailqueue.message.addresses import (
    AddressGroup,
    check_address,
    needs_smtputf8,
    parse_address_list,
    parse_header_addresses,
)
from pyramid_mailqueue.message.encoded_words import LINE_MUST, FieldLines, chunks, decoded, encoded_words, is_text

__all__ = [
    'FIELD',
    'MOST_IN_A_FIELD',
    'MOST_TEXT',
    'boundary_of',
    'charset_of',
    'content_type',
    'field_bytes',
    'needs_utf8',
    'with_boundary',
]

#: The value of a field has at most so many characters: enough for the recipients of one message.
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
# They are removed before the message is sent.
_HIDDEN_FIELDS = frozenset({'bcc', 'resent-bcc'})
_PARAMETER_FIELDS = frozenset({'content-type', 'content-disposition'})


def field_bytes(name: str, value: object, *, utf8: bool = False, signed_for: int | None = None) -> bytes:
    """
    Return the field *name* with its line ends.

    :param value: as in :meth:`email.message.Message.raw_items`
    :param utf8: whether the header may hold UTF-8 (RFC 6532)
    :param signed_for: the length of lines with which the library writes it, if a signature covers it; 0 folds nothing
    :raises MessageError: it is not one field, or cannot be written so that it is read as it was set
    """
    if not _NAME.fullmatch(name):
        raise _not_one_field(name)
    if not isinstance(value, (str, Header)):
        raise MessageError(f'The value of the header field {name} must be text, not {type(value).__name__}.')
    _check(name, str(value))
    if signed_for is None:
        octets = _written(name, value, utf8=utf8 or name.lower() in _HIDDEN_FIELDS)
    else:
        octets = _as_signed(name, value, signed_for, utf8=utf8)
    if not FIELD.fullmatch(octets):
        raise _not_one_field(name)
    return octets


def _as_signed(name: str, value: str | Header, line_length: int, *, utf8: bool) -> bytes:
    """Return the field as the library writes it: as it was when it was signed."""
    policy: Any = compat32.clone(linesep='\r\n')
    if isinstance(value, BaseHeader):
        policy = SMTPUTF8 if utf8 and needs_utf8(name, value) else SMTP
    elif isinstance(value, str) and (unchanged := _unchanged(name, value)) is not None:
        return _octets(unchanged)
    return bytes(policy.clone(max_line_length=line_length).fold_binary(name, value))


def _written(name: str, value: str | Header, *, utf8: bool) -> bytes:
    if isinstance(value, Header):
        text = _of_header(name, value)
        if not isinstance(text, Header):
            return _octets(_write(name, text, _LINE_END.sub('', text), utf8=utf8))
    elif not isinstance(value, BaseHeader):
        unchanged = _unchanged(name, value)
        if unchanged is not None:
            return _octets(unchanged)
    return _octets(_write(name, value, _LINE_END.sub('', str(value)), utf8=utf8))


# What a Header calls ASCII, and octets that a parser has found.
_OCTETS = frozenset(('us-ascii', 'unknown-8bit'))


def _of_header(name: str, header: Header) -> str | Header:
    """
    Return *header* as text with encoded words, as the older API takes it; itself, if that would change its meaning.

    A piece in another character set than ASCII is only text, never an address.
    """
    pieces = [(octets, None if charset in _OCTETS else charset) for octets, charset in decode_header(header)]
    if not any(charset for _, charset in pieces):
        # Raw octets, copied from a message that was parsed, are not text in any of them.
        return ' '.join(octets.decode('ascii', 'surrogateescape') for octets, _ in pieces)
    if name.lower() not in _ADDRESS_FIELDS:
        return header
    text = ' '.join(
        ' '.join(encoded_words(octets.decode(charset))) if charset else octets.decode('ascii', 'replace')
        for octets, charset in pieces
    )
    # A whole address list in another character set holds no address then.
    return text if _named_in(text) else header


def _octets(field: str) -> bytes:
    return field.encode('utf-8', 'surrogateescape')


def _check(name: str, text: str) -> None:
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
        _add_parameters(lines, name, _source(value))
        return lines.text()
    if name.lower() in _ID_FIELDS and not utf8 and _ID_NOT_ASCII.search(text):
        raise MessageError(
            f'The header field {name} holds an id that is not ASCII, {ascii(text[:100])}: no reader understands it '
            '(RFC 5322 section 3.6.4).'
        )
    lines.add_text(text, holds_encoded=_holds_encoded(value))
    return lines.text()


_ID_FIELDS = frozenset({'message-id', 'resent-message-id', 'content-id', 'in-reply-to', 'references'})
_ID_NOT_ASCII = re.compile('<[!-;=-~]*[^\x00-\x7f\udc80-\udcff]')


def _holds_encoded(value: object) -> bool:
    """Whether an encoded word in the text of *value* is meant as one: the library's objects have decoded theirs."""
    return not isinstance(value, (Header, BaseHeader))


# --- address fields ---------------------------------------------------------

# The library reports these for a field that can be read in one way only.
_HARMLESS_DEFECTS = (NonASCIILocalPartDefect, ObsoleteHeaderDefect)

_ATOMS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?: [A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
_NEEDS_BACKSLASH = re.compile(r'(["\\])')
# A quoted string is not folded: not every reader knows that it may be.
_MOST_QUOTED = LINE_MUST - 78


class _Phrase(str):
    """A display name that has to be encoded in part or as a whole."""

    __slots__ = ()


def needs_utf8(name: str, value: object) -> bool:
    """Whether the header has to be written in UTF-8 (RFC 6532): an address cannot hold an encoded word."""
    if name.lower() not in _ADDRESS_FIELDS - _HIDDEN_FIELDS or (isinstance(value, str) and value.isascii()):
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
            lines.add_phrase(word) if isinstance(word, _Phrase) else lines.add(word)
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
    mailboxes = [mailbox for group in groups for mailbox in group.mailboxes]
    if not all(isinstance(defect, _HARMLESS_DEFECTS) for defect in _defects(value)):
        ours = parse_header_addresses([_library_text(value)])
        if ours != list(dict.fromkeys(address for _, address in mailboxes)):
            raise AddressError('The library has not read the same addresses.')
    if all(name for name, _ in mailboxes) or '(' not in _tree_text(value):
        return groups
    return _with_comments(groups, _library_text(value))


def _with_comments(groups: list[AddressGroup], text: str) -> list[AddressGroup]:
    """Name a mailbox without a name by its comment in *text*, as in old mail; the library drops the comment."""
    try:
        names = {address: name for it in parse_address_list(text) for name, address in it.mailboxes}
    except AddressError:
        return groups
    return [AddressGroup(it.name, [(name or names.get(ad, ''), ad) for name, ad in it.mailboxes]) for it in groups]


def _is_read(value: Any) -> bool:
    """Whether the library has parsed addresses, not taken over the strings of a list."""
    return not any(isinstance(it, str) for group in value.groups for it in (group, *group.addresses))


def _defects(value: Any) -> Sequence[MessageDefect]:
    defects: Sequence[MessageDefect] = value.defects
    return defects


def _tree_text(value: Any) -> str:
    """Return what the program has set, as far as the library keeps it: the text of the object does not have it."""
    return ''.join(map(_token_text, value._parse_tree))  # noqa: SLF001 - it has no other name


def _token_text(token: Any) -> str:
    # The parameters of a MIME field are a token whose text has only those that were understood.
    return ''.join(map(str, token)) if isinstance(token, list) else str(token)


def _library_text(value: Any) -> str:
    """Return the value in one line as the library writes it: it keeps what it could not read."""
    return str(value.fold(policy=SMTPUTF8.clone(max_line_length=0)).partition(':')[2].strip())


def _group_items(group: AddressGroup, *, utf8: bool) -> list[list[str]]:
    """Return the words of each mailbox; a group has its name in front of the first, and ends in a semicolon."""
    items = [_mailbox_words(name, address, utf8=utf8) for name, address in group.mailboxes]
    if group.name is not None:
        items = items or [[]]
        *words, last = _phrase(group.name, utf8=utf8)
        items[0][:0] = [*words, last, ':'] if isinstance(last, _Phrase) else [*words, f'{last}:']
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
    return [_Phrase(text)]


def _write_odd_addresses(lines: FieldLines, name: str, value: object, text: str) -> str:
    """Write an address field as text; it must not name an address that it did not name before."""
    named: set[str] = set()
    decoded_anything = False
    if isinstance(value, AddressHeader) and _is_read(value):
        text = _library_text(value)
        named = {mailbox.addr_spec for mailbox in value.addresses}
        decoded_anything = _has_encoded_word(value._parse_tree)  # type: ignore[attr-defined]  # noqa: SLF001 - as above
    lines.add_text(text, holds_encoded=_holds_encoded(value))
    written = lines.text()
    if decoded_anything or not _named_in(written.partition(':')[2].strip()) <= named:
        raise AddressError(
            f'The header field {name} cannot be written so that all readers find the same addresses in it: '
            f'{ascii(text[:100])}. Correct it.'
        )
    return written


def _has_encoded_word(token: Any) -> bool:
    kind = getattr(token, 'token_type', None)
    return kind == 'encoded-word' or (isinstance(token, list) and any(map(_has_encoded_word, token)))


def _named_in(text: str) -> set[str]:
    """Return the addresses in *text*; none, if it can be read in more than one way."""
    try:
        return set(parse_header_addresses([text]))
    except AddressError:
        return set()


# --- parameters of MIME fields ----------------------------------------------

_PARAMETER = re.compile(r';[ \t]*([0-9A-Za-z!#$%&\'*+.^_`{|}~-]+)[ \t]*=[ \t]*')
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"[ \t]*(?:\([^()]*\)[ \t]*)*(?=;|\Z)')
_ESCAPED = re.compile(r'\\(["\\])')
# What follows a token is a comment, or something that is no parameter.
_TOKEN = re.compile(r"([0-9A-Za-z!#$%&'*+.^_`{|}~/?@:=-]+)[ \t]*(?:\([^()]*\)[ \t]*)*(?:;|\Z)")
_COMMENT = re.compile(r'\([^()]*\)')
# RFC 2231 section 4: charset, language, and octets of which some are escaped; section 3: the number of a piece.
_EXTENDED = re.compile(r"([^']*)'[^']*'(.*)", re.DOTALL)
_PIECE = re.compile(r'([^*]+)(?:\*([0-9]{1,4}))?(\*)?')
_SEGMENT_ROOM = 60
_DELIMITER = re.compile(r'[ !#-\[\]-~]*[!#-\[\]-~]')


class _Parameter(NamedTuple):
    name: str
    value: str
    #: Whether every reader finds the same value.
    is_exact: bool


def _source(value: object) -> str:
    """Return what the program has set, in one line."""
    if isinstance(value, ParameterizedMIMEHeader) and _defects(value):
        return _tree_text(value)
    return _LINE_END.sub('', str(value))


def _parameters(text: str) -> Iterator[_Parameter]:
    """Yield the parameters in *text*; a value without quotes goes on until another parameter begins."""
    begin = _PARAMETER.search(text)
    while begin:
        quoted = _QUOTED.match(text, begin.end())
        following = _PARAMETER.search(text, quoted.end() if quoted else begin.end())
        if quoted:
            yield _Parameter(begin[1], _ESCAPED.sub(r'\1', quoted[1]), is_exact=True)
        else:
            yield _unquoted(begin[1], text[begin.end() : following.start() if following else len(text)])
        begin = following


def _unquoted(name: str, text: str) -> _Parameter:
    token = _TOKEN.match(text)
    if token:
        return _Parameter(name, token[1], is_exact=True)
    value = text.strip(' \t;')
    return _Parameter(name, value[1:].removesuffix('"') if value.startswith('"') else value, is_exact=False)


def _merged(parameters: Iterable[_Parameter]) -> Iterator[tuple[str, str]]:
    """Yield names and values; of those that are not ASCII all pieces are put together (RFC 2231 section 3)."""
    of_name: dict[str, list[_Parameter]] = {}
    for parameter in parameters:
        of_name.setdefault(parameter.name.partition('*')[0].lower(), []).append(parameter)
    for pieces in of_name.values():
        if all(it.value.isascii() and len(it.value) <= _MOST_QUOTED for it in pieces):
            yield from ((it.name, it.value) for it in pieces)
        else:
            yield pieces[0].name.partition('*')[0], _put_together(pieces)


def _put_together(pieces: list[_Parameter]) -> str:
    # An encoded form beside a plain one says the same, and better.
    encoded = [it for it in pieces if '*' in it.name] or pieces[:1]
    charset = 'utf-8'
    values = []
    for number, it in enumerate(encoded):
        value = it.value
        if it.name.endswith('*'):
            extended = _EXTENDED.fullmatch(value) if number == 0 else None
            charset, value = (extended[1] or charset, extended[2]) if extended else (charset, value)
            value = _unescaped(value, charset)
        values.append(value)
    return ''.join(values)


def _unescaped(value: str, charset: str) -> str:
    try:
        return unquote(value, charset, 'replace')
    except LookupError:
        return unquote(value, errors='replace')


def _add_parameters(lines: FieldLines, name: str, text: str) -> None:
    begin = _PARAMETER.search(text)
    main = text[: begin.start()].strip(' \t') if begin else text
    if not main.isascii():
        main = _COMMENT.sub('', main).strip(' \t')
    if is_text(main):
        raise MessageError(
            f'The header field {name} cannot be written: {ascii(main[:100])} is not ASCII. Only a parameter such as '
            'filename= may hold other text.'
        )
    words = [main] if main else []
    words += [word for key, value in _merged(_parameters(text)) for word in _parameter_words(key, value)]
    ended = [f'{word};' for word in words[:-1]] + words[-1:]
    lines.add_text(ended[0] if ended else '', holds_encoded=True)
    for word in ended[1:]:
        lines.add(word)


def _parameter_words(name: str, value: str) -> list[str]:
    if name.endswith('*'):
        return [f'{name}={value}']  # Encoded already.
    quoted = f'{name}="' + _NEEDS_BACKSLASH.sub(r'\\\1', value) + '"'
    if value.isascii() and value.isprintable() and len(quoted) <= _MOST_QUOTED:
        return [quoted]
    octets = [quote(char, safe='!#$&+-.^_`{|}~', errors='replace') for char in value]
    if sum(map(len, octets)) <= _SEGMENT_ROOM:
        return [f"{name}*=utf-8''{''.join(octets)}"]
    first, *others = (''.join(units) for units in chunks(octets, _SEGMENT_ROOM - 7, _SEGMENT_ROOM))
    return [f"{name}*0*=utf-8''{first}", *(f'{name}*{number}*={part}' for number, part in enumerate(others, 1))]


# --- what a part is ---------------------------------------------------------

_TYPE = re.compile(r'\s*([^\s;/()]+/[^\s;/()]+)\s*(?:[;(]|\Z)')


def content_type(value: object, default: str) -> str:
    """Return the type in the field ``Content-Type`` *value* in lower case, as readers understand it."""
    if value is None:
        return default
    match = _TYPE.match(_LINE_END.sub('', str(value)))
    # RFC 2045 section 5.2.
    return match[1].lower() if match else 'text/plain'


def charset_of(value: object) -> str | None:
    """Return the charset in the field ``Content-Type`` *value*; None if it names none."""
    named = (it.value for it in _parameters(_source(value)) if it.name.partition('*')[0].lower() == 'charset')
    charset = next(named, None)
    return charset and charset.rpartition("'")[2]


def boundary_of(value: object) -> str | None:
    """
    Return the boundary that a field ``Content-Type`` names (RFC 2046); None if not every reader finds the same one.

    :param value: as in :meth:`email.message.Message.raw_items`
    """
    named = [it for it in _parameters(_source(value)) if it.name.partition('*')[0].lower() == 'boundary']
    is_clear = len(named) == 1 and named[0].is_exact and '*' not in named[0].name
    return named[0].value if is_clear and _DELIMITER.fullmatch(named[0].value) else None


def with_boundary(value: object, boundary: str) -> str:
    """Return the text of the field ``Content-Type`` *value* with another *boundary*."""
    text = _source(value)
    begin = _PARAMETER.search(text)
    kept = [
        word
        for name, parameter in _merged(
            it for it in _parameters(text) if it.name.partition('*')[0].lower() != 'boundary'
        )
        for word in _parameter_words(name, parameter)
    ]
    return '; '.join([text[: begin.start()] if begin else text.rstrip(' \t;'), *kept, f'boundary="{boundary}"'])
