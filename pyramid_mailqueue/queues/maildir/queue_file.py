"""
The queue file: six header lines for the queue, then the message, byte for byte as it goes out.

::

    Return-path: <sender@site.example>
    Envelope-to: a@site.example,b@site.example
    X-Queue-Date: Tue, 24 Nov 2026 07:28:11 +0000
    X-Last-Attempt: Tue, 24 Nov 2026 07:33:12 +0000 (451 4.3.0 try again later)
    X-Retries: 1
    X-Queue-Meta-End: end

Each line ends in CRLF and none is folded; mailqueue-runner reads and writes the same lines.  It also reads addresses
that are written as RFC 2047 words, so those are read, and never written.  This module handles the format only, and how
to tell it from that of other queues; the queue decides where files are, who may open them and when they are synced.
"""

from __future__ import annotations

import binascii
import itertools
import re
from datetime import datetime, timezone
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from pyramid_mailqueue.display import EARLIEST, LATEST, MONTHS, mail_date
from pyramid_mailqueue.exceptions import AddressError, QueueError, QueueFileError
from pyramid_mailqueue.message.addresses import check_address, split_addresses
from pyramid_mailqueue.message.envelope import Envelope

__all__ = [
    'MAX_HEADER_OCTETS',
    'QueueHeader',
    'is_queue_file',
    'parse_header',
    'read_envelope',
    'read_header',
    'serialize_header',
    'writer_of',
]

MAX_HEADER_OCTETS = 1024 * 1024
# What the other lines of a header can need, now or after later attempts.
ROOM_FOR_OTHER_LINES = 1024
MAX_REPLY_CHARACTERS = 300
# How much is read first if only the header is needed.
READ_AHEAD = 4096

# A larger number of attempts is taken for this one, which fits into every column of a database.
MAX_RETRIES = 2_000_000_000

_FIELDS = frozenset({'Return-path', 'Envelope-to', 'X-Queue-Date', 'X-Last-Attempt', 'X-Retries'})
_END = b'X-Queue-Meta-End: end'

# Characters that one ordinary address does not have.
_OF_SEVERAL = re.compile('[",=? \t]')

# The header, as written here, of a message that was not tried yet: a fast path for the most frequent case.
_FRESH = re.compile(
    rb'Return-path: (<[!-~]*>)\r\nEnvelope-to: ([!-~]+)\r\nX-Queue-Date: ([!-~][ -~]+[!-~])\r\n'
    rb'X-Queue-Meta-End: end\r\n'
)


class QueueHeader(NamedTuple):
    """
    What the queue knows of a message.

    :param sender: the reverse-path; ``''`` is the null sender
    :param recipients: the recipients that are still open
    :param queued_at: when it came into the queue, in seconds since the epoch; the file keeps whole seconds
    :param attempts: how many attempts were made
    :param last_attempt: when the last one was made, or when the message became a dead letter without any
    :param last_reply: the server's reply, or why the message is a dead letter; kept only with *last_attempt*
    """

    sender: str
    recipients: tuple[str, ...]
    queued_at: float
    attempts: int = 0
    last_attempt: float | None = None
    last_reply: str = ''


# --- writing ----------------------------------------------------------------


def serialize_header(header: QueueHeader) -> bytes:
    """
    Return the lines of *header* up to and including the end marker; the message follows at once.

    Raises :class:`~.exceptions.QueueError` if there are more recipients than one file may name.
    """
    recipients = f'Envelope-to: {",".join(header.recipients)}'
    if len(recipients.encode()) > MAX_HEADER_OCTETS - ROOM_FOR_OTHER_LINES:
        raise QueueError(
            f'{len(header.recipients)} recipients are too many for one message in the queue; send it in several parts.'
        )
    lines = [f'Return-path: <{header.sender}>', recipients, f'X-Queue-Date: {mail_date(header.queued_at)}']
    if header.last_attempt is not None:
        reply = _clean_comment(header.last_reply)
        lines.append(f'X-Last-Attempt: {mail_date(header.last_attempt)}' + (f' ({reply})' if reply else ''))
    if header.attempts:
        lines.append(f'X-Retries: {header.attempts}')
    return '\r\n'.join(lines).encode() + b'\r\n' + _END + b'\r\n'


_COMMENT_SUBSTITUTES = str.maketrans({'(': '[', ')': ']', '\\': '/'})
_NOT_PRINTABLE_ASCII = re.compile(r'[^ -~]')


def _clean_comment(text: str) -> str:
    """Return *text* as it may stand in an RFC 5322 comment without any quoting."""
    text = ' '.join(text.split()).translate(_COMMENT_SUBSTITUTES)
    return _NOT_PRINTABLE_ASCII.sub('?', text)[:MAX_REPLY_CHARACTERS].rstrip()


# --- whose file it is -------------------------------------------------------

# zope.sendmail writes it first; repoze.sendmail, which pyramid_mailer uses, after the fields of the message.
_OF_ZOPE = re.compile(rb'X-Zope-(?:From|To):', re.IGNORECASE)
_OF_REPOZE = re.compile(rb'^X-Actually-(?:From|To):', re.IGNORECASE | re.MULTILINE)
_BLANK_LINE = re.compile(rb'^\r?\n', re.MULTILINE)


def is_queue_file(head: bytes) -> bool | None:
    """Whether a file with this beginning is a queue file; None if it is cut off before that shows."""
    try:
        _read_fields(head)
    except _CutOffError:
        return None
    except QueueFileError:
        return False
    return True


def writer_of(head: bytes) -> str | None:
    """Return which other program has written a file with this beginning; None if none is known."""
    if _OF_ZOPE.match(head):
        return 'zope.sendmail'
    blank = _BLANK_LINE.search(head)
    if _OF_REPOZE.search(head, 0, blank.start() if blank else len(head)):
        return 'repoze.sendmail (pyramid_mailer)'
    return None


class _CutOffError(QueueFileError):
    """The end of the header is missing, and the rest of it is valid."""


# --- reading ----------------------------------------------------------------


def read_envelope(data: bytes) -> tuple[QueueHeader, Envelope]:
    """Read a whole queue file.  Raises :class:`~.exceptions.QueueFileError` as :func:`read_header` does."""
    header, end = parse_header(data)
    return header, Envelope.of_checked(header.sender, header.recipients, data, end)


def read_header(fp: BinaryIO) -> QueueHeader:
    """
    Read the lines of the queue from *fp* and leave it at the first byte of the message.

    Raises :class:`~.exceptions.QueueFileError` for anything that neither this package nor mailqueue-runner writes.
    """
    begin = fp.tell()
    # Most headers are short, and most messages are longer.
    data = fp.read(READ_AHEAD)
    if _END not in data:
        data += fp.read(MAX_HEADER_OCTETS - len(data))
    header, end = parse_header(data)
    fp.seek(begin + end)
    return header


def parse_header(data: bytes) -> tuple[QueueHeader, int]:
    """
    Return the header at the beginning of *data*, and where the message begins.

    Raises :class:`~.exceptions.QueueFileError` as :func:`read_header` does; :data:`MAX_HEADER_OCTETS` are enough.
    """
    if fresh := _FRESH.match(data, 0, MAX_HEADER_OCTETS):
        sender, recipients, date = fresh.groups()
        queued_at = _parse_date('X-Queue-Date', date.decode())
        return QueueHeader(
            _parse_sender(sender.decode()), _parse_recipients(recipients.decode()), queued_at
        ), fresh.end()
    try:
        fields, end = _read_fields(data)
    except QueueFileError as exc:
        if (writer := writer_of(data[:MAX_HEADER_OCTETS])) is None:
            raise
        raise QueueFileError(
            f'This is no queue file, but a message that {writer} has queued. Move it into a directory of that program, '
            'which has to deliver it, and let each of the two have a directory of its own.'
        ) from exc
    last_attempt, last_reply = _parse_attempt(fields.get('X-Last-Attempt'))
    header = QueueHeader(
        sender=_parse_sender(_required(fields, 'Return-path')),
        recipients=_parse_recipients(_required(fields, 'Envelope-to')),
        queued_at=_parse_date('X-Queue-Date', _required(fields, 'X-Queue-Date')),
        attempts=_parse_retries(fields.get('X-Retries')),
        last_attempt=last_attempt,
        last_reply=last_reply,
    )
    return header, end


def _read_fields(data: bytes) -> tuple[dict[str, str], int]:
    fields: dict[str, str] = {}
    begin = 0
    while (end := data.find(b'\n', begin, MAX_HEADER_OCTETS) + 1) > 0:
        line = data[begin : end - 1].removesuffix(b'\r')
        begin = end
        if line == _END:
            return fields, end
        name, value = _split_line(line)
        if name in fields:
            raise QueueFileError(f'The line {name} is there twice.')
        fields[name] = value
    raise _CutOffError(
        f'The line "{_END.decode()}" is missing'
        + (f' in the first {MAX_HEADER_OCTETS} octets' if len(data) >= MAX_HEADER_OCTETS else ': the file is cut off')
        + '; this is not a queue file.'
    )


def _split_line(line: bytes) -> tuple[str, str]:
    try:
        name, _, value = line.decode().partition(':')
    except UnicodeDecodeError as exc:
        raise QueueFileError(f'The line {_shown(line)} is not UTF-8.') from exc
    if name not in _FIELDS:
        raise QueueFileError(f'The line {_shown(line)} does not belong in the header of a queue file.')
    return name, value.strip(' \t')


def _shown(line: bytes) -> str:
    return repr(line[:100]).removeprefix('b')


def _required(fields: dict[str, str], name: str) -> str:
    if name not in fields:
        raise QueueFileError(f'The line {name} is missing.')
    return fields[name]


# An application has few senders.
@lru_cache(maxsize=64)
def _parse_sender(value: str) -> str:
    if not (value.startswith('<') and value.endswith('>')):
        raise QueueFileError(f'Return-path must be an address in angle brackets, not {ascii(value[:100])}.')
    return _checked('Return-path', _decoded('Return-path', value[1:-1])) if value != '<>' else ''


def _parse_recipients(value: str) -> tuple[str, ...]:
    if value and not _OF_SEVERAL.search(value):
        return (_checked('Envelope-to', value),)
    addresses = split_addresses(_decoded('Envelope-to', value))
    recipients = tuple(dict.fromkeys([_checked('Envelope-to', address) for address in addresses]))
    if not recipients:
        raise QueueFileError('Envelope-to is empty: there is no recipient.')
    return recipients


# Nothing but encoded words: no address or list of addresses looks like this, because the last domain would end in "?=".
_WORDS = re.compile(r'=\?[!->@-~]+\?[bq]\?[ ->@-~]*\?=(?:[ \t]*=\?[!->@-~]+\?[bq]\?[ ->@-~]*\?=)*', re.IGNORECASE)
_HEX = re.compile('=([0-9A-Fa-f]{2})')
_WORD = re.compile(r'=\?([^?]+)\?([bBqQ])\?([^?]*)\?=')


def _decoded(name: str, value: str) -> str:
    """Decode RFC 2047 words.  Beside anything else they are a part of an address."""
    if not _WORDS.fullmatch(value):
        return value
    try:
        # Adjacent words of one charset may share a character, whatever the RFC says.
        runs = itertools.groupby(_WORD.findall(value), key=lambda word: word[0].lower())
        return ''.join(b''.join(map(_octets, words)).decode(charset) for charset, words in runs)
    except (LookupError, ValueError) as exc:
        raise QueueFileError(f'{name} holds RFC 2047 words that cannot be decoded: {ascii(value[:100])}.') from exc


def _octets(word: tuple[str, str, str]) -> bytes:
    """Return what a word stands for.  Not by email.header, which takes a while to import.  Raises ValueError."""
    _, encoding, text = word
    if encoding in 'qQ':
        return _HEX.sub(lambda it: chr(int(it[1], 16)), text.replace('_', ' ')).encode('latin-1')
    return binascii.a2b_base64(text + '=' * (-len(text) % 4))


def _checked(name: str, address: str) -> str:
    try:
        return check_address(address)
    except AddressError as exc:
        raise QueueFileError(f'{name} cannot be used: {exc}') from exc


_DATE = re.compile(
    rf'[A-Z][a-z]{{2}}, ([0-9]{{1,2}}) ({"|".join(MONTHS)}) ([0-9]{{4}})'
    r' ([0-9]{2}):([0-9]{2}):([0-9]{2}) ([+-])([0-9]{2})([0-9]{2})'
)
_ATTEMPT = re.compile(r'([^()]+?)(?: \(([^()]*)\))?')
_RETRIES = re.compile(r'[0-9]+')


def _parse_date(name: str, value: str) -> float:
    seconds = value[-8:-6]
    if seconds.isascii() and seconds.isdigit() and seconds < '60':
        # Messages that were queued together share the minute.
        return min(_parse_whole_date(name, f'{value[:-8]}00{value[-6:]}') + int(seconds), LATEST)
    return _parse_whole_date(name, value)


@lru_cache(maxsize=64)
def _parse_whole_date(name: str, value: str) -> float:
    match = _DATE.fullmatch(value)
    if not match:
        raise _bad_date(name, value)
    day, month, year, hour, minute, second, sign, offset_hours, offset_minutes = match.groups()
    try:
        local = datetime(
            int(year), MONTHS.index(month) + 1, int(day), int(hour), int(minute), int(second), tzinfo=timezone.utc
        )
    except ValueError as exc:
        raise _bad_date(name, value) from exc
    offset = 3600 * int(offset_hours) + 60 * int(offset_minutes)
    return min(max(local.timestamp() + (offset if sign == '-' else -offset), EARLIEST), LATEST)


def _bad_date(name: str, value: str) -> QueueFileError:
    return QueueFileError(f'{name} must be a date such as "Tue, 24 Nov 2026 07:28:11 +0000", not {ascii(value[:100])}.')


def _parse_attempt(value: str | None) -> tuple[float | None, str]:
    if value is None:
        return None, ''
    match = _ATTEMPT.fullmatch(value)
    if not match:
        raise _bad_date('X-Last-Attempt', value)
    return _parse_date('X-Last-Attempt', match.group(1)), match.group(2) or ''


def _parse_retries(value: str | None) -> int:
    if value is None:
        return 0
    if not _RETRIES.fullmatch(value):
        raise QueueFileError(f'X-Retries must be a number, not {ascii(value[:100])}.')
    # int() refuses thousands of digits.
    digits = value.lstrip('0')
    return min(int(digits or '0'), MAX_RETRIES) if len(digits) <= 10 else MAX_RETRIES
