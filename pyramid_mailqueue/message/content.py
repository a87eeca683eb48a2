"""
The content of a message: the RFC 5322 bytes as they go out, with CRLF line ends.

:func:`message_bytes` makes bytes of whatever an application hands in, :func:`split_content` finds the header fields in
them.  Decisions about a message (its recipients, the fields that are sent) are made on these bytes and not on the
object they came from, so that what is checked is what is sent.

The reader of the mail gets what the program has set.  Bytes are never changed but for their line ends; an object is
written by :mod:`~.compose`, in a form that every server and every reader understands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from email.message import Message
from typing import Any, NamedTuple

from pyramid_mailqueue.exceptions import MessageError
from pyramid_mailqueue.message.compose import composed
from pyramid_mailqueue.message.fields import FIELD
from pyramid_mailqueue.message.line_ends import normalize_line_ends

__all__ = ['Field', 'message_bytes', 'split_content']

_FOLD = re.compile(rb'\r\n(?=[ \t])')


# --- bytes to fields --------------------------------------------------------


class Field(NamedTuple):
    """
    One field of a header.

    :param name: in lower case
    :param value: the text after the colon, without folds and without blanks around it
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
        match = FIELD.match(header, position)
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
        return normalize_line_ends(composed(message))
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
