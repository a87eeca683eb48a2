"""
The bytes of a message object, with CRLF line ends.

What a reader of the mail gets is what the program has set.  The generator of :mod:`email` does not hold that in all of
its versions, and it reads the header by other rules than the message's own, so the tree is written here:

* A header field goes out as :mod:`~.fields` writes it; one that was parsed, byte for byte.
* A body that not every server takes, with 8-bit octets or with lines of more than 998, is encoded.  Only where a
  signature covers it, it stays as it is.
* The delimiters of a multipart are those that its ``Content-Type`` names.
* ``Return-Path`` is the business of the server that delivers (RFC 5321 section 4.4), and does not leave.
"""

from __future__ import annotations

import copy
import secrets
from base64 import encodebytes
from binascii import b2a_qp
from email.message import Message
from typing import Any

from pyramid_mailqueue.encoded_words import LINE_MUST
from pyramid_mailqueue.exceptions import MailqueueError, MessageError, described
from pyramid_mailqueue.fields import boundary_of, field_bytes, needs_utf8, with_boundary
from pyramid_mailqueue.line_ends import normalize_line_ends

__all__ = ['composed']

# RFC 5322 section 3.6, and the fields of MIME.
_AT_MOST_ONE = frozenset(
    {
        *('date', 'from', 'sender', 'reply-to', 'to', 'cc', 'bcc', 'subject'),
        *('message-id', 'in-reply-to', 'references'),
        *('mime-version', 'content-type', 'content-transfer-encoding', 'content-disposition', 'content-id'),
    }
)
# What a Content-Transfer-Encoding that encodes nothing is called (RFC 2045 section 6).
_IDENTITIES = frozenset({'', '7bit', '8bit', 'binary'})

_Fields = list[tuple[str, Any]]


def composed(message: Message) -> bytes:
    """Return the bytes of *message*, which is not changed.  Raises :class:`~.exceptions.MessageError`."""
    fields = [(name, value) for name, value in message.raw_items() if name.lower() != 'return-path']
    _check_counts([name.lower() for name, _ in fields])
    try:
        composer = _Composer(utf8=any(needs_utf8(name, value) for name, value in fields))
        return composer.part(message, fields, is_top=True)
    except MailqueueError:
        raise
    except Exception as exc:
        # Whatever an odd message makes the library raise: UnicodeError, LookupError, TypeError, AttributeError, ...
        raise MessageError(f'The message cannot be turned into bytes: {described(exc)}') from exc


def _check_counts(names: list[str]) -> None:
    for name in sorted(_AT_MOST_ONE.intersection(names)):
        if names.count(name) > 1:
            raise MessageError(
                f'The message has {names.count(name)} header fields {name.title()}; it can have one (RFC 5322 section '
                f'3.6). Assigning to a field adds one: remove the old one first, with del message[{name.title()!r}].'
            )


class _Composer:
    """
    Composes one message, part by part.

    :param utf8: whether its header may hold UTF-8 (RFC 6532)
    """

    def __init__(self, *, utf8: bool) -> None:
        self._utf8 = utf8

    def part(
        self,
        part: Message,
        fields: _Fields | None = None,
        *,
        is_top: bool = False,
        keeps_body: bool = False,
        keeps_header: bool = False,
    ) -> bytes:
        """
        Return the bytes of *part*.

        :param fields: its header; by default all of it
        :param is_top: whether it is the whole message
        :param keeps_body: whether a signature covers the bodies in it
        :param keeps_header: whether one covers its header, too
        """
        fields = list(part.raw_items()) if fields is None else fields
        own = [*fields]
        # The body may have a say in the header.
        body = self._body(part, fields, keeps_body=keeps_body or _get(fields, 'dkim-signature') is not None)
        if is_top and fields != own and _get(fields, 'mime-version') is None:
            fields.append(('MIME-Version', '1.0'))
        header = [field_bytes(name, value, utf8=self._utf8, is_signed=keeps_header) for name, value in fields]
        return b''.join([*header, b'\r\n', body])

    def _body(self, part: Message, fields: _Fields, *, keeps_body: bool) -> bytes:
        # get_payload() would decode 8-bit octets.
        payload: Any = part._payload  # type: ignore[attr-defined]  # noqa: SLF001
        kind = part.get_content_type()
        is_composite = kind.startswith(('multipart/', 'message/'))
        if isinstance(payload, str):
            return _octets(part, payload) if is_composite else _leaf(part, payload, fields, keeps_body=keeps_body)
        parts = payload if isinstance(payload, list) else [] if payload is None else [payload]
        if kind.startswith('multipart/'):
            return self._multipart(part, parts, fields, keeps_body=keeps_body)
        if kind == 'message/delivery-status':
            return b'\r\n'.join(self.part(block).removesuffix(b'\r\n') for block in parts)
        if not parts:
            return b''
        if not is_composite or not isinstance(parts[0], Message):
            raise MessageError(
                f'The payload of a part of the type {kind} must be text, not {type(payload).__name__}: let '
                'EmailMessage.set_content() or add_attachment() set it.'
            )
        return self.part(parts[0], keeps_body=keeps_body)

    def _multipart(self, part: Message, parts: list[Message], fields: _Fields, *, keeps_body: bool) -> bytes:
        is_signed = part.get_content_subtype() == 'signed'
        value = _get(fields, 'content-type')
        boundary = boundary_of(value)
        if boundary is None:
            boundary = f'==={secrets.token_hex(16)}==='
            _set(fields, 'Content-Type', with_boundary(value, boundary))
        inner = [self.part(it, keeps_body=keeps_body or is_signed, keeps_header=is_signed) for it in parts]
        delimiter = f'\r\n--{boundary}'.encode('ascii')
        return b''.join(
            [
                b'' if part.preamble is None else _ascii(part.preamble) + b'\r\n',
                delimiter.removeprefix(b'\r\n') + b'\r\n',
                (delimiter + b'\r\n').join(inner),
                delimiter + b'--\r\n',
                b'' if part.epilogue is None else _ascii(part.epilogue),
            ]
        )


def _get(fields: _Fields, name: str) -> Any:
    """Return the value of the first field *name*, which is in lower case; None if there is none."""
    return next((value for own, value in fields if own.lower() == name), None)


def _set(fields: _Fields, name: str, value: str) -> None:
    """Give *value* to the first field *name*; without one, add it."""
    for index, (own, _) in enumerate(fields):
        if own.lower() == name.lower():
            fields[index] = (own, value)
            return
    fields.append((name, value))


# --- a body -----------------------------------------------------------------


def _leaf(part: Message, payload: str, fields: _Fields, *, keeps_body: bool) -> bytes:
    """Return the body of a part that has no parts; where it has to be encoded, *fields* say so."""
    data = _octets(part, payload)
    body = normalize_line_ends(data)
    if keeps_body or _can_go(body):
        return body
    encoding, body = _encoded(part, data)
    _set(fields, 'Content-Transfer-Encoding', encoding)
    return body


def _can_go(body: bytes) -> bool:
    """Whether every server takes *body*: 7-bit, without NUL, no line too long (RFC 5321 section 4.5.3.1.6)."""
    return body.isascii() and b'\0' not in body and max(map(len, body.split(b'\r\n'))) <= LINE_MUST


def _encoded(part: Message, data: bytes) -> tuple[str, bytes]:
    """Return a Content-Transfer-Encoding, and the body in it."""
    if str(part.get('Content-Transfer-Encoding', '')).strip().lower() not in _IDENTITIES:
        twin = copy.copy(part)
        twin.defects = []
        data = bytes(twin.get_payload(decode=True))
    if part.get_content_maintype() != 'text' or b'\0' in data:
        return 'base64', encodebytes(data)
    lines = normalize_line_ends(data)
    quoted, base64 = b2a_qp(lines, istext=True), encodebytes(lines)
    return ('quoted-printable', quoted) if len(quoted) <= len(base64) else ('base64', base64)


def _octets(part: Message, payload: str) -> bytes:
    try:
        return _ascii(payload)
    except UnicodeEncodeError:
        charset = part.get_content_charset()
        if charset is None:
            raise MessageError(
                'The body of the message is text that is not ASCII, and names no charset. Use EmailMessage and '
                "set_content(text), MIMEText(text, _charset='utf-8'), or set_payload(text, 'utf-8')."
            ) from None
        return payload.encode(charset, 'surrogateescape')


def _ascii(text: str) -> bytes:
    """Return *text* with the octets that a parser has found in it."""
    return text.encode('ascii', 'surrogateescape')
