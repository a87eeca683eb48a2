"""
Line ends: in transit each line of a message ends in CRLF (RFC 5321 section 2.3.8).

A bare CR or LF is a line end to some servers and not to others, and between the two a second message can be smuggled.
So line ends are checked wherever a message may enter; bytes that have passed are marked.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import IncrementalNewlineDecoder

__all__ = ['SMALL', 'joined', 'normalize_line_ends']

#: Content of at most so many octets may be copied once more.
SMALL = 64 * 1024


class _Normalized(bytes):
    """Bytes that :func:`normalize_line_ends` has returned, so that later checks are skipped."""


def normalize_line_ends(data: bytes, start: int = 0) -> bytes:
    """
    Return *data* from *start* on, with each CR, LF and CRLF as CRLF.

    Large *data* that is so already, from *start* 0, is returned itself, not copied.
    """
    if isinstance(data, _Normalized) and not start:
        return data
    if len(data) <= SMALL:
        data, start = data[start:], 0
        if _has_only_crlf(data):
            return _Normalized(data)
    else:
        line_feeds = data.count(b'\n', start)
        if data.count(b'\r', start) == line_feeds == data.count(b'\r\n', start):
            # Python makes two copies for a subclass of bytes: here that costs more than checking again.
            return data[start:]
    lines = data[start:].replace(b'\r\n', b'\n').replace(b'\r', b'\n')
    return _Normalized(lines.replace(b'\n', b'\r\n'))


def _has_only_crlf(data: bytes) -> bool:
    """Uses Python's newline decoder: several times as fast as counting, though it needs a copy as text."""
    eye = IncrementalNewlineDecoder(None, translate=False)
    eye.decode(data.decode('latin-1'), final=True)
    return eye.newlines in (None, '\r\n')


def joined(pieces: Iterable[bytes | memoryview]) -> bytes:
    """Return *pieces* as one; each of them is as :func:`normalize_line_ends` returns it."""
    data = b''.join(pieces)
    return _Normalized(data) if len(data) <= SMALL else data
