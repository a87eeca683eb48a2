"""
The content of a message: the RFC 5322 bytes as they go out, with CRLF line ends.

:func:`message_bytes` makes bytes of whatever an application hands in, :func:`split_content` finds the header fields in
them.  What is decided about a message (whom it is for, which fields leave) is decided on these bytes and not on the
object they came from, so that what is checked is what is sent.

The generator of :mod:`email` writes with a policy of our own:

* A field that came from a parser goes out byte for byte.
* Address fields are written here.  When the library folds a long one it may drop the quotes of a display name, so that
  the name ``"boss@site.example, John"`` becomes an address on its own.
* A field that would end early, and begin another field or the body, is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from email.errors import NonASCIILocalPartDefect, ObsoleteHeaderDefect
from email.generator import BytesGenerator
from email.header import Header
from email.headerregistry import Address, HeaderRegistry
from email.message import Message
from email.policy import SMTP, SMTPUTF8, Compat32
from io import BytesIO
from typing import Any, NamedTuple

from pyramid_mailqueue.addresses import check_address, needs_smtputf8, parse_header_addresses
from pyramid_mailqueue.exceptions import AddressError, MailqueueError, MessageError
from pyramid_mailqueue.line_ends import normalize_line_ends

__all__ = ['Field', 'message_bytes', 'split_content']

# RFC 5322 section 2.1.1; without the CRLF.
LINE_SHOULD, LINE_MUST = 78, 998

_FIELD_NAME = re.compile(r'[!-9;-~]+')
# A field with its folds.  A blank before the colon is obsolete (RFC 5322 section 4.5) and must still be understood.
_FIELD = re.compile(rb'([!-9;-~]+)[ \t]*:([^\r\n]*(?:\r\n[ \t][^\r\n]*)*)\r\n')
_FOLD = re.compile(rb'\r\n(?=[ \t])')


# --- bytes to fields --------------------------------------------------------


class Field(NamedTuple):
    """
    One field of a header.

    :param name: in lower case
    :param value: what stands behind the colon, without folds and without blanks around it
    :param lines: the whole field as it is, with its line ends
    """

    name: str
    value: bytes
    lines: bytes


def split_content(content: bytes) -> tuple[list[Field], memoryview]:
    """
    Return the fields in the header of *content*, and its body without the empty line before it.

    Raises :class:`~.exceptions.MessageError` if a line before the first empty line does not belong to a field.
    """
    if content.startswith(b'\r\n'):
        return [], memoryview(content)[2:]
    end = content.find(b'\r\n\r\n')
    if end >= 0:
        return list(_fields(content[: end + 2])), memoryview(content)[end + 4 :]
    only_header = content if not content or content.endswith(b'\r\n') else content + b'\r\n'
    return list(_fields(only_header)), memoryview(b'')


def _fields(header: bytes) -> Iterator[Field]:
    position = 0
    while position < len(header):
        match = _FIELD.match(header, position)
        if not match:
            line = header[position : header.index(b'\r\n', position)]
            raise MessageError(
                f'The message has a line in its header that is not a header field: {ascii(line[:100])[1:]}. '
                'An empty line must stand between the header and the body.'
            )
        lines, name, value = match.group(0, 1, 2)
        if b'\r\n' in value:
            value = _FOLD.sub(b'', value)
        yield Field(name.decode('ascii').lower(), value.strip(b' \t'), lines)
        position = match.end()


# --- anything to bytes ------------------------------------------------------

# The line before each message of an mbox file; not the obsolete header field "From : a@example.org".
_MBOX_SEPARATOR = re.compile(rb'From (?![ \t]*:)[^\r\n]*(?:\r\n|\r|\n|\Z)')


def message_bytes(message: Any) -> bytes:
    """
    Return the bytes of *message* with CRLF line ends.

    *message* is an :class:`email.message.EmailMessage` or the older ``Message``, which is not changed, or bytes, or a
    binary file, which is read to its end.  Raises :class:`~.exceptions.MessageError`.
    """
    if isinstance(message, Message):
        return normalize_line_ends(_generate(message))
    data = _raw_bytes(message)
    separator = _MBOX_SEPARATOR.match(data)
    return normalize_line_ends(data[separator.end() :] if separator else data)


def _raw_bytes(message: Any) -> bytes:
    data = message.read() if hasattr(message, 'read') else message
    if isinstance(data, bytes):
        return data
    if isinstance(data, (bytearray, memoryview)):
        return bytes(data)
    if isinstance(data, str):
        raise MessageError(
            'A message cannot be text, because text has no encoding. Pass an email.message.EmailMessage, bytes, or a '
            'file that was opened in binary mode.'
        )
    raise MessageError(
        f'A message must be an email.message.EmailMessage, bytes or a binary file, not {type(data).__name__}.'
    )


def _generate(message: Message) -> bytes:
    buffer = BytesIO()
    try:
        policy = _InternationalWirePolicy() if _has_international_mailbox(message) else _WirePolicy()
        _WireGenerator(buffer, policy=policy).flatten(_twin(message))
    except MailqueueError:
        raise
    except Exception as exc:
        # Whatever an odd message makes the library raise: UnicodeError, LookupError, TypeError, AttributeError, ...
        raise MessageError(f'The message cannot be turned into bytes: {type(exc).__name__}: {exc}') from exc
    return buffer.getvalue()


class _WireGenerator(BytesGenerator):
    def _write_lines(self, lines: str) -> None:
        # The library writes a body line by line, which takes seconds for an attachment of some megabytes.
        self.write(lines.replace('\r\n', '\n').replace('\r', '\n').replace('\n', '\r\n'))


def _twin(message: Any) -> Any:
    # The generator sets the policy of every part, and a boundary where a multipart has none yet.
    twin = copy.copy(message)
    if message.is_multipart():
        twin.set_payload([_twin(part) for part in message.get_payload()])
    return twin


# --- writing the fields of a header -----------------------------------------

_VISIBLE_ADDRESS_FIELDS = frozenset(
    {'from', 'sender', 'reply-to', 'to', 'cc', 'resent-from', 'resent-sender', 'resent-to', 'resent-cc'}
)
_ESCAPED_BYTE = re.compile('[\udc80-\udcff]')
_LINE_END = re.compile(r'\r\n|\r|\n')
# Nothing to encode, and nothing that a reader would take for encoded.
_PLAIN = re.compile(r'(?!.*=\?)[!-~](?:[ -~]*[!-~])?')
_parse_field = HeaderRegistry()


def _has_international_mailbox(message: Message) -> bool:
    """Tell whether the header has to be written in UTF-8 (RFC 6532): an address cannot hold an encoded word."""
    return any(
        mailbox.domain and not mailbox.username.isascii()
        for name, value in message.raw_items()
        if name.lower() in _VISIBLE_ADDRESS_FIELDS and isinstance(value, str) and _is_international(value)
        for mailbox in _parsed(name, value).addresses
    )


def _is_international(value: str) -> bool:
    return not value.isascii() and not _ESCAPED_BYTE.search(value)


def _parsed(name: str, value: str) -> Any:
    """Return *value* as a header object of :mod:`email.headerregistry`."""
    return value if hasattr(value, 'fold') else _parse_field(name, _LINE_END.sub('', value))


class _WirePolicy(Compat32):
    """How the fields of a header go out.  The base class never looks into a field, so that nothing is lost there."""

    linesep = '\r\n'
    mangle_from_ = False
    header_policy = SMTP

    def fold_binary(self, name: str, value: object) -> bytes:
        if not _FIELD_NAME.fullmatch(name):
            raise _not_one_field(name)
        field = self._fold_any(name, value)
        if not _FIELD.fullmatch(field):
            raise _not_one_field(name)
        return field

    def _fold_any(self, name: str, value: object) -> bytes:
        if isinstance(value, Header):
            text = value.encode(linesep=self.linesep, maxlinelen=self.max_line_length)
            return f'{name}: {text}\r\n'.encode('ascii', 'surrogateescape')
        if not isinstance(value, str):
            raise MessageError(f'The value of the header field {name} must be text, not {type(value).__name__}.')
        unchanged = None if hasattr(value, 'fold') else self._leave(name, value)
        return unchanged or self._encode(self._fold_object(name, _parsed(name, value)))

    def _leave(self, name: str, value: str) -> bytes | None:
        """Return the field with its own folds, or None if it cannot go out like that."""
        lines = _LINE_END.split(f'{name}: {value}')
        if any(not line.startswith((' ', '\t')) for line in lines[1:]):
            raise _not_one_field(name)
        try:
            return self._encode('\r\n'.join(lines) + '\r\n') if max(map(len, lines)) <= LINE_MUST else None
        except UnicodeEncodeError:
            return None

    def _fold_object(self, name: str, value: Any) -> str:
        if self.max_line_length == 0:
            # Inside of multipart/signed: any other form than the one that was signed breaks the signature.
            return str(value.fold(policy=self.header_policy.clone(max_line_length=0)))
        if not hasattr(value, 'groups'):
            if len(name) + 2 + len(value) <= LINE_SHOULD and _PLAIN.fullmatch(value):
                # Most fields.  The library writes the same, but takes much longer to find that out.
                return f'{name}: {value}\r\n'
            return str(value.fold(policy=self.header_policy))
        try:
            return _fold_addresses(name, value, utf8=self.header_policy.utf8)
        except (AddressError, UnicodeEncodeError):
            return _fold_odd_addresses(value, self.header_policy)

    def _encode(self, field: str) -> bytes:
        return field.encode('utf-8' if self.header_policy.utf8 else 'ascii', 'surrogateescape')


class _InternationalWirePolicy(_WirePolicy):
    header_policy = SMTPUTF8


def _not_one_field(name: str) -> MessageError:
    return MessageError(
        f'The header field {ascii(name[:100])} is not one field: it has a line end that would begin another field or '
        'the body, or a name that is none. If its value came out of a form, it may be an attack.'
    )


# --- address fields ---------------------------------------------------------

# The library has something to say about such a field, but there is only one way to read it.
_HARMLESS_DEFECTS = (NonASCIILocalPartDefect, ObsoleteHeaderDefect)

_ATOMS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?: [A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
_NEEDS_BACKSLASH = re.compile(r'(["\\])')


def _fold_addresses(name: str, field: Any, *, utf8: bool) -> str:
    """
    Return the address field from what the library read in it.

    Raises :class:`~.exceptions.AddressError` if that may not be what is meant.
    """
    if not (all(isinstance(defect, _HARMLESS_DEFECTS) for defect in field.defects) or _we_read_the_same(field)):
        raise AddressError(f'{name} is not a list of addresses.')
    lines = [f'{name}:']
    for word in _address_words(field, utf8=utf8):
        if len(lines[-1]) + 1 + len(word) > LINE_SHOULD and lines != [f'{name}:']:
            lines.append('')
        lines[-1] += f' {word}'
    return '\r\n'.join(lines) + '\r\n'


def _we_read_the_same(field: Any) -> bool:
    text = field.fold(policy=SMTPUTF8.clone(max_line_length=0)).partition(':')[2].strip()
    addresses = [check_address(mailbox.addr_spec) for mailbox in field.addresses]
    return parse_header_addresses([text]) == list(dict.fromkeys(addresses))


def _address_words(field: Any, *, utf8: bool) -> list[str]:
    """Return the pieces of an address list between which it may be folded."""
    items: list[list[str]] = []
    for group in field.groups:
        members = [_mailbox_words(mailbox, utf8=utf8) for mailbox in group.addresses]
        if group.display_name is not None:
            members = members or [[]]
            *words, last = _phrase(group.display_name, utf8=utf8)
            members[0][:0] = [*words, f'{last}:']
            members[-1][-1] += ';'
        items += members
    for item in items[:-1]:
        item[-1] += ','
    return [word for item in items for word in item]


def _mailbox_words(mailbox: Address, *, utf8: bool) -> list[str]:
    address = check_address(mailbox.addr_spec)
    if needs_smtputf8(address) and not utf8:
        raise AddressError(f'{address} has no ASCII form.')
    if not mailbox.display_name:
        return [address]
    return [*_phrase(mailbox.display_name, utf8=utf8), f'<{address}>']


def _phrase(text: str, *, utf8: bool) -> list[str]:
    """Return *text* as the words of a phrase (RFC 5322 section 3.2.5)."""
    if '=?' not in text and text.isprintable() and (utf8 or text.isascii()):
        if _ATOMS.fullmatch(text):
            return text.split(' ')
        quoted = '"' + _NEEDS_BACKSLASH.sub(r'\\\1', text) + '"'
        if len(quoted) < LINE_SHOULD:
            return [quoted]
    return Header(text, 'utf-8').encode().split()


def _fold_odd_addresses(field: Any, policy: Any) -> str:
    """Let the library write a field that we cannot; it must not come to name anybody whom it did not name before."""
    folded = str(field.fold(policy=policy))
    try:
        written = set(parse_header_addresses([folded.partition(':')[2].strip()]))
    except AddressError:
        return folded  # Nobody will be read out of it.
    if written <= {mailbox.addr_spec for mailbox in field.addresses}:
        return folded
    raise AddressError(
        f'The header field {field.name} cannot be written so that everybody reads the same addresses in it: '
        f'{ascii(str(field)[:100])}. Correct it.'
    )
