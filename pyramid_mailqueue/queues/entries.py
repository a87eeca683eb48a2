"""
What ``mq-queue`` and web pages show of a queue: its messages, and how many there are.

Every queue describes itself with these classes, so the code that shows them is the same for all queues.
"""

from __future__ import annotations

import heapq
import logging
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from pyramid_mailqueue.logs import log_event, queue_log
from pyramid_mailqueue.message.encoded_words import decoded
from pyramid_mailqueue.message.envelope import message_id_of
from pyramid_mailqueue.message.line_ends import normalize_line_ends

__all__ = [
    'AGE_LIMITS',
    'POSSIBLE',
    'STATES',
    'UNDELIVERED',
    'Choice',
    'DomainCount',
    'ExactId',
    'Glance',
    'QueueEntry',
    'QueueStats',
    'Tally',
    'header_lines',
    'log_expired',
    'oldest_first',
    'subject_of',
    'tally',
    'tell_from_header',
]

#: The states of a message.  A message in doubt was prepared by a process that died before it could publish it.
STATES = ('waiting', 'in progress', 'held', 'dead', 'in doubt', 'corrupt')

#: The states of messages that are still to be delivered.
UNDELIVERED = ('waiting', 'in progress', 'held')

#: The methods of `IQueueAdmin` that change a message, and the states in which each of them can be called.
POSSIBLE = MappingProxyType(
    {
        'retry': ('waiting', 'dead'),
        'hold': ('waiting',),
        'unhold': ('held',),
        'release': ('in doubt',),
        'delete': tuple(state for state in STATES if state != 'in progress'),
    }
)

#: The ages by which messages are counted, in minutes: those of Postfix's qshape.
AGE_LIMITS = (5, 10, 20, 40, 80, 160, 320, 640, 1280)


class ExactId(str):
    """A whole id, never taken for the beginning of another one: for the methods of `IQueueAdmin`."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """
    One message, as it was when it was read.  Times are in seconds since the epoch.

    A message that cannot be read has only an id, a state and a size; *last_reply* says what is wrong.

    :param id: its name in the queue
    :param state: one of :data:`STATES`
    :param sender: the reverse-path; ``''`` is the null sender, None is not known
    :param recipients: the recipients that are still open, or were given up
    :param retries: how many attempts were made
    :param queued_at: when it came into the queue
    :param due: when it may be tried again, if it waits or is held
    :param last_attempt: when the last attempt was made
    :param last_reply: the server's reply, or why the message is a dead letter
    :param subject: decoded; it may hold anything that the sender wrote, control characters too
    :param message_id: with its angle brackets
    :param size: the octets of the message; of the whole file if that is corrupt
    """

    id: str
    state: str
    sender: str | None = None
    recipients: tuple[str, ...] = ()
    retries: int = 0
    queued_at: float | None = None
    due: float | None = None
    last_attempt: float | None = None
    last_reply: str = ''
    subject: str = ''
    message_id: str = ''
    size: int = 0

    def is_dead_since(self, before: float) -> bool:
        """Whether it is a dead letter, and became one before *before*, in seconds since the epoch."""
        died = self.queued_at if self.last_attempt is None else self.last_attempt
        return self.state == 'dead' and died is not None and died < before


def log_expired(entry: QueueEntry) -> None:
    """Log that a dead letter is about to be removed; called first, so that none is removed without a record."""
    told = {'from': f'<{entry.sender}>', 'to': ','.join(entry.recipients), 'error': entry.last_reply}
    reason = 'a dead letter for longer than mailqueue.keep_dead'
    log_event(queue_log, logging.INFO, status='discarded', id=entry.id, msgid=entry.message_id, **told, reason=reason)


class Glance(NamedTuple):
    """
    What is counted of a message.

    The fields are those of :class:`QueueEntry`.
    """

    state: str
    queued_at: float | None
    size: int
    recipients: tuple[str, ...]


def oldest_first(entries: Iterable[tuple[float, QueueEntry]]) -> Iterator[QueueEntry]:
    """
    Yield *entries* in the order of :attr:`QueueEntry.queued_at`.

    A queue lists messages cheaply in the order in which they first came.  A retried or released message counts as new:
    only such messages are kept here until their turn comes.

    :param entries: each with the time at which it first came, in seconds since the epoch; in that order
    """
    later: list[tuple[float, int, QueueEntry]] = []
    for number, (born, entry) in enumerate(entries):
        heapq.heappush(later, (max(born, entry.queued_at or born), number, entry))
        while later and later[0][0] <= born:
            yield heapq.heappop(later)[2]
    while later:
        yield heapq.heappop(later)[2]


@dataclass(frozen=True, slots=True)
class Choice:
    """
    A filter for messages; None matches any.

    :param sender: part of the envelope sender; all of it in angle brackets; ``<>`` is the null sender
    :param recipient: part of one recipient, likewise
    :param older_than: an age in seconds
    :param newer_than: an age in seconds
    :param message_id: the whole Message-ID, with or without angle brackets
    """

    sender: str | None = None
    recipient: str | None = None
    older_than: float | None = None
    newer_than: float | None = None
    message_id: str | None = None

    def takes(self, entry: QueueEntry, now: float) -> bool:
        """Whether *entry* matches; *now* is in seconds since the epoch."""
        age = None if entry.queued_at is None else now - entry.queued_at
        if self.older_than is not None and (age is None or age <= self.older_than):
            return False
        if self.newer_than is not None and (age is None or age >= self.newer_than):
            return False
        if self.message_id is not None and _bare(entry.message_id) != _bare(self.message_id):
            return False
        if not _is_in(self.recipient, entry.recipients):
            return False
        return _is_in(self.sender, () if entry.sender is None else (entry.sender,))


def _bare(message_id: str) -> str:
    return message_id.strip().removeprefix('<').removesuffix('>')


def _is_in(text: str | None, addresses: Sequence[str]) -> bool:
    return text is None or any(text.lower() in f'<{address}>'.lower() for address in addresses)


# --- from the header of a message -------------------------------------------

_SUBJECT = re.compile(rb'^subject[ \t]*:([^\r\n]*(?:\r\n[ \t][^\r\n]*)*)', re.IGNORECASE | re.MULTILINE)


def tell_from_header(content: bytes) -> tuple[str, str]:
    """Return the subject and the Message-ID in *content*, the beginning of a message; ``''`` if missing."""
    content = normalize_line_ends(content)
    return subject_of(content), message_id_of(content)


def subject_of(content: bytes) -> str:
    """Return the subject of a message whose lines end in CRLF; ``''`` if it has none."""
    if content.startswith(b'\r\n'):
        return ''
    end = content.find(b'\r\n\r\n')
    match = _SUBJECT.search(content, 0, end + 2 if end >= 0 else len(content))
    return _decoded(match[1]) if match else ''


def _decoded(value: bytes) -> str:
    return decoded(value.replace(b'\r\n', b'').decode('utf-8', 'backslashreplace').strip(' \t'))


def header_lines(content: bytes) -> list[str]:
    """Return the header fields of a message, each unfolded into one line, not decoded."""
    lines: list[str] = []
    head, _, _ = (b'\r\n' + normalize_line_ends(content)).partition(b'\r\n\r\n')
    for line in head.decode('utf-8', 'backslashreplace').split('\r\n')[1:]:
        if line[:1] in (' ', '\t') and lines:
            lines[-1] += line.replace('\t', ' ')
        elif line:
            lines.append(line)
    return lines


# --- counts -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tally:
    """
    Counts of some messages.

    :param messages: how many there are
    :param size: their octets, in total
    :param oldest: when the oldest of them came into the queue, in seconds since the epoch; None if unknown
    :param by_age: how many are at most as old as each of :data:`AGE_LIMITS` and older than the one before; the last
        number counts those older than all limits
    """

    messages: int = 0
    size: int = 0
    oldest: float | None = None
    by_age: tuple[int, ...] = (0,) * (len(AGE_LIMITS) + 1)

    def __add__(self, other: Tally) -> Tally:
        """Count the messages of both."""
        return Tally(
            self.messages + other.messages,
            self.size + other.size,
            min((oldest for oldest in (self.oldest, other.oldest) if oldest is not None), default=None),
            tuple(map(sum, zip(self.by_age, other.by_age, strict=True))),
        )


@dataclass(frozen=True)
class QueueStats:
    """
    Counts of the messages in a queue.

    :param by_state: a tally for each of :data:`STATES`
    :param by_domain: a tally for each domain of a recipient, the largest first; a message for several domains is in
        the tally of each of them
    """

    by_state: Mapping[str, Tally]
    by_domain: Mapping[str, Tally]


def tally(entries: Iterable[QueueEntry | Glance], now: float, domains_of: Collection[str] = UNDELIVERED) -> QueueStats:
    """
    Count *entries*, in memory that grows with the number of domains only.

    :param now: seconds since the epoch, from which ages are counted
    :param domains_of: the states whose messages are counted by domain
    """
    by_state = {state: _Count() for state in STATES}
    domains = DomainCount(now)
    for entry in entries:
        by_state[entry.state].add(entry.queued_at, entry.size, now)
        if entry.state in domains_of:
            domains.add(entry.recipients, entry.queued_at, entry.size)
    return QueueStats({state: count.tally() for state, count in by_state.items()}, domains.tallies())


class DomainCount:
    """
    Tallies by the recipients' domains, while they are being made.

    :param now: seconds since the epoch, from which ages are counted
    """

    def __init__(self, now: float) -> None:
        self._now = now
        self._counts: defaultdict[str, _Count] = defaultdict(_Count)

    def add(self, recipients: Sequence[str], queued_at: float | None, size: int) -> None:
        """Count one message."""
        if len(recipients) == 1:
            self._counts[_domain(recipients[0])].add(queued_at, size, self._now)
            return
        for domain in set(map(_domain, recipients)):
            self._counts[domain].add(queued_at, size, self._now)

    def tallies(self) -> dict[str, Tally]:
        """Return a tally for each domain, the largest first."""
        largest_first = sorted(self._counts.items(), key=lambda item: (-item[1].messages, item[0]))
        return {domain: count.tally() for domain, count in largest_first}


def _domain(recipient: str) -> str:
    return recipient.rpartition('@')[2].lower()


class _Count:
    """A :class:`Tally` that is still being made."""

    __slots__ = ('by_age', 'messages', 'oldest', 'size')

    def __init__(self) -> None:
        self.messages = 0
        self.size = 0
        self.oldest: float | None = None
        self.by_age = [0] * (len(AGE_LIMITS) + 1)

    def add(self, queued_at: float | None, size: int, now: float) -> None:
        self.messages += 1
        self.size += size
        if queued_at is None:
            return
        if self.oldest is None or queued_at < self.oldest:
            self.oldest = queued_at
        self.by_age[bisect_left(AGE_LIMITS, (now - queued_at) / 60)] += 1

    def tally(self) -> Tally:
        return Tally(self.messages, self.size, self.oldest, tuple(self.by_age))
