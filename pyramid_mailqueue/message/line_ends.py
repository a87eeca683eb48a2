"""
Line ends: on its way a message has each of them as CRLF (RFC 5321 section 2.3.8).

A bare CR or LF is a line end to some servers and not to others, and between the two a second message can be smuggled.
So a message is asked for that wherever it could come in, and what has passed once is known.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import IncrementalNewlineDecoder

__all__ = ['SMALL', 'joined', 'normalize_line_ends']

#: How many octets may be copied once more.
SMALL = 64 * 1024


class _Normalized(bytes):
    """What :func:`normalize_line_ends` has returned: on its way it is asked for that wherever it could come in."""


def normalize_line_ends(data: bytes, start: int = 0) -> bytes:
    """
    Return *data* from *start* on, with each CR, LF and CRLF as CRLF.

    If it is large, and so already from its beginning, that is *data* itself, not a copy.
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
            # Python makes two copies for a subclass of bytes: that is too dear here, and looking again is not.
            return data[start:]
    lines = data[start:].replace(b'\r\n', b'\n').replace(b'\r', b'\n')
    return _Normalized(lines.replace(b'\n', b'\r\n'))


def _has_only_crlf(data: bytes) -> bool:
    """Python's own eye for line ends is several times as fast as to count them, and wants a copy as text."""
    eye = IncrementalNewlineDecoder(None, translate=False)
    eye.decode(data.decode('latin-1'), final=True)
    return eye.newlines in (None, '\r\n')


def joined(pieces: Iterable[bytes | memoryview]) -> bytes:
    """Return *pieces* as one; each of them is as :func:`normalize_line_ends` returns it."""
    data = b''.join(pieces)
    return _Normalized(data) if len(data) <= SMALL else data
