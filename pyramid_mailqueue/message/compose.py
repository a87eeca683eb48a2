"""
The bytes of a message object, with CRLF line ends.

The reader of the mail gets what the program has set.  The generator of :mod:`email` does not guarantee that in all of
its versions, and it reads the header by other rules than the message's own, so the tree is written here:

* A header field goes out as :mod:`~.fields` writes it; one that was parsed, byte for byte.
* A body that not every server accepts, with 8-bit octets or with lines of more than 998, is encoded.  Only where a
  signature covers it, it stays as it is.
* The delimiters of a multipart are those that its ``Content-Type`` names.
* ``Return-Path`` is added by the server that delivers (RFC 5321 section 4.4), and is not sent.
"""

from __future__ import annotations

import copy
import secrets
from base64 import encodebytes
from binascii import b2a_qp
from contextlib import suppress
from email.message import Message
from typing import Any

from pyramid_mailqueue.exceptions import MailqueueError, MessageError, described
from pyramid_mailqueue.message.encoded_words import LINE_MUST, LINE_SHOULD
from pyramid_mailqueue.message.fields import (
    boundary_of,
    charset_of,
    content_type,
    field_bytes,
    needs_utf8,
    with_boundary,
)
from pyramid_mailqueue.message.line_ends import normalize_line_ends

__all__ = ['composed']

# RFC 5322 section 3.6, and the fields of MIME.
_AT_MOST_ONE = frozenset(
    {
        *('date', 'from', 'sender', 'reply-to', 'to', 'cc', 'bcc', 'subject'),
        *('message-id', 'in-reply-to', 'references'),
        *('mime-version', 'content-type', 'content-transfer-encoding', 'content-disposition', 'content-id'),
    }
)
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
    except RecursionError:
        raise MessageError('The parts of the message are nested too deeply to be written.') from None
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
        default_type: str = 'text/plain',
        signed_for: int | None = None,
    ) -> bytes:
        """
        Return the bytes of *part*.

        :param fields: its header; by default all of it
        :param is_top: whether it is the whole message
        :param default_type: its type if it names none
        :param signed_for: see :func:`~.fields.field_bytes`; the body stays as it is, too
        """
        fields = list(part.raw_items()) if fields is None else fields
        if signed_for is None and _get(fields, 'dkim-signature') is not None:
            signed_for = LINE_SHOULD
        own = [*fields]
        # Making the body may change the fields.
        body = self._body(part, fields, content_type(_get(fields, 'content-type'), default_type), signed_for)
        if is_top and fields != own and _get(fields, 'mime-version') is None:
            fields.append(('MIME-Version', '1.0'))
        return b''.join([*(self._field(name, value, signed_for) for name, value in fields), b'\r\n', body])

    def _field(self, name: str, value: object, signed_for: int | None) -> bytes:
        # It was added after the others had been signed.
        is_signature = name.lower() == 'dkim-signature'
        return field_bytes(name, value, utf8=self._utf8, signed_for=None if is_signature else signed_for)

    def _body(self, part: Message, fields: _Fields, kind: str, signed_for: int | None) -> bytes:
        # get_payload() would decode 8-bit octets.
        payload: Any = part._payload  # type: ignore[attr-defined]  # noqa: SLF001
        is_composite = kind.startswith(('multipart/', 'message/'))
        if isinstance(payload, str):
            data = _octets(payload, charset_of(_get(fields, 'content-type')))
            return data if is_composite else _leaf(part, data, fields, kind, signed_for)
        parts = payload if isinstance(payload, list) else [] if payload is None else [payload]
        if kind.startswith('multipart/'):
            return self._multipart(part, parts, fields, kind, signed_for)
        if kind == 'message/delivery-status':
            blocks = (self.part(block, signed_for=signed_for) for block in parts)
            return b'\r\n'.join(block.removesuffix(b'\r\n') for block in blocks)
        if not parts:
            return b''
        if not is_composite or not isinstance(parts[0], Message):
            raise MessageError(
                f'The payload of a part of the type {kind} must be text, not {type(payload).__name__}: let '
                'EmailMessage.set_content() or add_attachment() set it.'
            )
        return self.part(parts[0], signed_for=signed_for)

    def _multipart(
        self, part: Message, parts: list[Message], fields: _Fields, kind: str, signed_for: int | None
    ) -> bytes:
        value = _get(fields, 'content-type')
        boundary = boundary_of(value)
        if boundary is None:
            boundary = f'==={secrets.token_hex(16)}==='
            _set(fields, 'Content-Type', with_boundary(value, boundary))
        # RFC 2046 section 5.1.5.
        default_type = 'message/rfc822' if kind == 'multipart/digest' else 'text/plain'
        if kind == 'multipart/signed' and signed_for is None:
            signed_for = 0
        inner = [self.part(it, default_type=default_type, signed_for=signed_for) for it in parts]
        delimiter = f'\r\n--{boundary}'.encode('ascii')
        return b''.join(
            [
                b'' if part.preamble is None else _octets(part.preamble) + b'\r\n',
                delimiter.removeprefix(b'\r\n') + b'\r\n',
                (delimiter + b'\r\n').join(inner),
                delimiter + b'--\r\n',
                b'' if part.epilogue is None else _octets(part.epilogue),
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

# RFC 2045 section 6; the encodings that the library decodes.
_IDENTITIES = frozenset({'', '7bit', '8bit', 'binary'})
_ENCODINGS = frozenset({'quoted-printable', 'base64', 'x-uuencode', 'uuencode', 'uue', 'x-uue'})


def _leaf(part: Message, data: bytes, fields: _Fields, kind: str, signed_for: int | None) -> bytes:
    """Return the body of a part that has no parts; if it has to be encoded, that is noted in *fields*."""
    body = normalize_line_ends(data)
    has_lines = not kind.startswith('text/') or _has_lines(charset_of(_get(fields, 'content-type')))
    if signed_for is not None or (has_lines and _can_go(body)):
        return body
    content = _content(part, data, str(_get(fields, 'content-transfer-encoding') or '').strip().lower())
    if kind.startswith('text/') and has_lines and b'\0' not in content:
        encoding, body = _encoded_text(normalize_line_ends(content))
    else:
        encoding, body = 'base64', encodebytes(content)
    _set(fields, 'Content-Transfer-Encoding', encoding)
    return body


def _can_go(body: bytes) -> bool:
    """Whether every server accepts *body*: 7-bit, without NUL, no line too long (RFC 5321 section 4.5.3.1.6)."""
    return body.isascii() and b'\0' not in body and max(map(len, body.split(b'\r\n'))) <= LINE_MUST


def _has_lines(charset: str | None) -> bool:
    """Whether CR and LF are line ends in *charset*; in UTF-16 they are halves of characters."""
    try:
        return '\r\n'.encode(charset or 'ascii') == b'\r\n'
    except LookupError:
        return True


def _content(part: Message, data: bytes, encoding: str) -> bytes:
    """Return what *data* is without its Content-Transfer-Encoding."""
    if encoding in _IDENTITIES:
        return data
    if encoding not in _ENCODINGS:
        raise MessageError(
            f'A part of the message has the Content-Transfer-Encoding {ascii(encoding[:100])}, which is unknown, and a '
            'body that not every server takes. Let EmailMessage.set_content() encode it.'
        )
    # A copy with its own list of defects, so that *part* is not changed.
    twin = copy.copy(part)
    twin.defects = []
    twin.set_payload(_ascii_of(data, encoding))
    return bytes(twin.get_payload(decode=True))


def _ascii_of(data: bytes, encoding: str) -> str:
    if data.isascii():
        return data.decode('ascii')
    raise MessageError(
        f'A part of the message says that its body is {encoding}, and it is not: it holds text that is not ASCII. Let '
        "EmailMessage.set_content() encode it, or set_payload(text, 'utf-8') of a part without that field."
    )


def _encoded_text(lines: bytes) -> tuple[str, bytes]:
    """Return the shorter Content-Transfer-Encoding of *lines*, which end in CRLF, and the encoded lines."""
    quoted, base64 = b2a_qp(lines, istext=True), encodebytes(lines)
    return ('quoted-printable', quoted) if len(quoted) <= len(base64) else ('base64', base64)


def _octets(text: str, charset: str | None = None) -> bytes:
    """Return *text* in its *charset*, with the octets that a parser has found in it."""
    with suppress(UnicodeEncodeError):
        return text.encode('ascii', 'surrogateescape')
    try:
        return text.encode(charset or 'ascii', 'surrogateescape')
    except (LookupError, UnicodeError):
        named = f'the charset {charset}, which cannot hold it' if charset else 'no charset'
        raise MessageError(
            f'The body of the message is text that is not ASCII, and names {named}. Use EmailMessage and '
            "set_content(text), MIMEText(text, _charset='utf-8'), or set_payload(text, 'utf-8')."
        ) from None
