"""
The content of a message for display: its header, its text, and the names of everything else.

A content may be malformed in any way, also on purpose.  One that cannot be parsed can still be downloaded.  Nothing in
it is ever shown as HTML.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message

from pyramid_mailqueue.interfaces import IQueueAdmin
from pyramid_mailqueue.message.encoded_words import SLOW_CODECS, decoded, without_surrogates
from pyramid_mailqueue.queues.entries import header_lines

__all__ = ['MOST_OCTETS', 'Contents', 'Part', 'body_of', 'pieces_of', 'read_contents']

#: At most this many octets of a header, and characters of a text, are shown.
MOST_HEADER = 64 * 1024
MOST_TEXT = 100_000

# That many characters fit into this many octets, in any character set.
MOST_TEXT_OCTETS = 4 * MOST_TEXT + 4

#: At most this many parts are named.
MOST_PARTS = 100

#: Larger contents are not parsed: that takes their size in memory several times, and that of each line many times.
MOST_OCTETS = 25 * 1024 * 1024

#: A whole content is read in pieces of this many octets.
PIECE = 8 * 1024 * 1024
MOST_LINES = 400_000

#: The parser compares each line with the boundary of each part that it is in: at most this many comparisons.
MOST_COMPARED = 10_000_000

#: Each part costs the parser at least 0.05 ms: at most this many delimiters.
MOST_DELIMITERS = 10_000

# The time to parse such fields grows with the square of their length.
_ENDLESS = re.compile(rb'(?im)^content-(?:type|disposition)[ \t]*:(?:[^\r\n]|\r?\n[ \t]){5000}')


_BOUNDARY = re.compile(rb'(?i)boundary')


@dataclass(frozen=True)
class Part:
    """
    A part of a message that is not shown.

    :param name: of the file; ``''`` if it has none
    :param kind: such as ``application/pdf``
    :param size: in octets, decoded; None is not known
    """

    name: str
    kind: str
    size: int | None


@dataclass(frozen=True)
class Contents:
    """
    What is shown of a content.

    :param header: pairs of the name of a field and its value, decoded
    :param text: the lines of the text; None if there is no part in plain text
    :param is_cut: whether there is more of the text
    :param parts: everything else
    :param problem: why it could not be parsed; ``''`` if it could
    """

    header: tuple[tuple[str, str], ...]
    text: tuple[str, ...] | None = None
    is_cut: bool = False
    parts: tuple[Part, ...] = ()
    problem: str = ''


def pieces_of(admin: IQueueAdmin, id: str) -> Iterator[bytes]:
    """
    Return the content of a message, whatever its size, in pieces.

    Raises as `IQueueAdmin.content` does: at the call, or between the pieces.
    """
    first = admin.content(id, 0, PIECE)

    def pieces() -> Iterator[bytes]:
        piece, start = first, 0
        while piece:
            yield piece
            start += len(piece)
            piece = admin.content(id, start, PIECE)

    return pieces()


def read_contents(content: bytes) -> Contents:
    """Return *content*, whatever it is, for display; the first :data:`MOST_OCTETS` + 1 octets are enough."""
    header = tuple(map(_field, header_lines(content[:MOST_HEADER])))
    lines = content.count(b'\n')
    boundaries = len(_BOUNDARY.findall(content))
    delimiters = content.count(b'\n--') if boundaries else 0
    is_too_large = len(content) > MOST_OCTETS or lines > MOST_LINES or delimiters > MOST_DELIMITERS
    if is_too_large or lines * boundaries > MOST_COMPARED:
        return Contents(header, problem='This message is too large to be parsed here.')
    if _ENDLESS.search(content):
        return Contents(header, problem='This message has header fields that are too long to be parsed.')
    try:
        return _taken_apart(header, content)
    except Exception as error:  # noqa: BLE001 - whatever an odd message makes the library raise
        return Contents(header, problem=f'This message cannot be parsed ({type(error).__name__}).')


def body_of(content: bytes, kind: str) -> str:
    """Return the first part of *content* that is ``text/`` *kind* and no attachment, decoded; ``''`` without any."""
    try:
        bodies = (part for part in _parts(message_from_bytes(content)) if _is_body(part, f'text/{kind}'))
        body = next(bodies, None)
        return '' if body is None else _decoded(body, _octets(body))
    except Exception:  # noqa: BLE001 - as above
        return ''


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(':')
    return name.strip(), decoded(value.strip())


def _taken_apart(header: tuple[tuple[str, str], ...], content: bytes) -> Contents:
    parts = list(_parts(message_from_bytes(content)))
    shown = next(filter(_is_text, parts), None)
    others = tuple(_described(part) for part in parts[: MOST_PARTS + 1] if part is not shown)
    if shown is None:
        return Contents(header, parts=others)
    octets = _octets(shown)
    text = _decoded(shown, octets[:MOST_TEXT_OCTETS], is_whole=len(octets) <= MOST_TEXT_OCTETS)
    lines = (line.expandtabs() for line in text[:MOST_TEXT].splitlines())
    return Contents(header, tuple(lines), len(text) > MOST_TEXT, others)


def _parts(message: Message) -> Iterator[Message]:
    """Yield the parts that have no parts of their own; a message inside a message counts as one."""
    stack = [message]
    while stack:
        part = stack.pop()
        # Only for a multipart: any other payload would be decoded on the way.
        inner = part.get_payload() if part.is_multipart() else None
        if isinstance(inner, list) and part.get_content_maintype() == 'multipart':
            stack.extend(each for each in reversed(inner) if isinstance(each, Message))
        else:
            yield part


def _is_body(part: Message, kind: str) -> bool:
    return part.get_content_type() == kind and part.get_content_disposition() != 'attachment'


def _is_text(part: Message) -> bool:
    return _is_body(part, 'text/plain') and not _filename(part)


def _filename(part: Message) -> str:
    try:
        return decoded(part.get_filename() or '')
    except (TypeError, ValueError):
        # A malformed parameter.
        return ''


def _decoded(part: Message, octets: bytes, *, is_whole: bool = True) -> str:
    try:
        codec = codecs.lookup(part.get_content_charset('')).name
        if codec not in SLOW_CODECS:
            return without_surrogates(octets.decode(codec, 'replace'))
    except (LookupError, TypeError, ValueError):
        # The character set is missing or unknown, or a parameter is malformed.
        pass
    try:
        return codecs.utf_8_decode(octets, 'strict', is_whole)[0]
    except UnicodeDecodeError:
        return octets.decode('latin-1')


def _octets(part: Message) -> bytes:
    octets = part.get_payload(decode=True)
    return octets if isinstance(octets, bytes) else b''


def _described(part: Message) -> Part:
    size = None if part.is_multipart() else len(_octets(part))
    return Part(_filename(part), part.get_content_type(), size)
