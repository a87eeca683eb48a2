"""How a queue is shown to people: ages, sizes, and text that is safe to display."""

from __future__ import annotations

import pwd
from collections.abc import Sequence
from datetime import datetime, timezone

__all__ = [
    'EARLIEST',
    'LATEST',
    'MONTHS',
    'few',
    'mail_date',
    'numbered',
    'printable',
    'size_in_words',
    'span_in_words',
    'timestamp',
    'user_name',
]

#: The range of datetime (years 1 to 9999), in seconds since the epoch.
EARLIEST, LATEST = -62_135_596_800.0, 253_402_300_799.0

#: As mail names them, in any locale.
MONTHS = ('Jan', 'Feb', 'Mar', 'Apr', 'May', 'Jun', 'Jul', 'Aug', 'Sep', 'Oct', 'Nov', 'Dec')
_DAYS = ('Mon', 'Tue', 'Wed', 'Thu', 'Fri', 'Sat', 'Sun')


def printable(text: str) -> str:
    """
    Return *text* in one line that any terminal shows as text.

    Text from senders and servers may try to move the cursor or to set the title of the window.
    """
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode('ascii') for c in text)


def span_in_words(seconds: float) -> str:
    """Return a time span such as ``12s``, ``5m``, ``3h`` or ``2d``; it is rounded down."""
    for unit, length, most in (('s', 1, 60), ('m', 60, 60), ('h', 3600, 48)):
        if seconds < most * length:
            return f'{max(0, int(seconds / length))}{unit}'
    return f'{int(seconds / 86400)}d'


def size_in_words(octets: int) -> str:
    """Return a size such as ``512``, ``4.1K`` or ``2.3M``; 1K is 1024 octets."""
    size, units = float(octets), iter(' KMGTP')
    unit = next(units)
    while size >= 1000:
        size, unit = size / 1024, next(units)
    return str(octets) if unit == ' ' else f'{size:.1f}{unit}'


def numbered(number: int, noun: str) -> str:
    """``1 message``, ``2,000 messages``."""
    return f'{number:,} {noun}' if number == 1 else f'{number:,} {noun}s'


def few(recipients: Sequence[str], most: int = 3) -> str:
    """Return the first *most* of *recipients*, and how many more there are."""
    more = len(recipients) - most
    return ','.join(recipients[:most]) + (f',... ({more} more)' if more > 0 else '')


def timestamp(seconds: float | None) -> str | None:
    """Return a time in seconds since the epoch as ISO 8601 in UTC, to the second."""
    if seconds is None:
        return None
    # A file system may hold times outside of that range.
    seconds = min(max(seconds, EARLIEST), LATEST)
    return datetime.fromtimestamp(int(seconds), timezone.utc).isoformat().replace('+00:00', 'Z')


def user_name(uid: int) -> str:
    """Return the name of the user with this number; ``#1234`` if it has none, as in many containers."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f'#{uid}'


def mail_date(seconds: float) -> str:
    """Return a time since the epoch as mail has it (RFC 5322 section 3.3), in UTC."""
    # As email.utils.format_datetime() does, which takes a while to import.
    date = datetime.fromtimestamp(int(seconds), timezone.utc)
    return f'{_DAYS[date.weekday()]}, {date:%d} {MONTHS[date.month - 1]} {date.year:04} {date:%H:%M:%S} +0000'
