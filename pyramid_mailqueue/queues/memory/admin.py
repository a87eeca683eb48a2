"""Lists, inspects and changes the messages of a :class:`~.memory.MemoryQueue`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from zope.interface import implementer

from pyramid_mailqueue.exceptions import WrongState
from pyramid_mailqueue.interfaces import IQueueAdmin
from pyramid_mailqueue.queues.admin import REASONS, QueueAdmin, meant_by, refusal
from pyramid_mailqueue.queues.entries import (
    POSSIBLE,
    STATES,
    QueueEntry,
    QueueStats,
    log_expired,
    tally,
    tell_from_header,
)
from pyramid_mailqueue.queues.memory.messages import MemoryMessage, MemoryMessages

__all__ = ['MemoryAdmin']


@implementer(IQueueAdmin)
class MemoryAdmin(QueueAdmin):
    """See `IQueueAdmin`."""

    def __init__(self, messages: MemoryMessages) -> None:
        self._messages = messages

    # -- what there is

    def entries(self, states: Collection[str]) -> Iterator[QueueEntry]:
        """See `IQueueAdmin`."""
        oldest_first = sorted(self._messages.in_order(), key=lambda message: message.queued_at)
        return (_entry(message) for message in oldest_first if message.state in states)

    def oldest(self, states: Collection[str]) -> QueueEntry | None:
        """See `IQueueAdmin`."""
        return next(self.entries(states), None)

    def crashing(self, deaths: int, most: int) -> list[str]:
        """See `IQueueAdmin`.  A crash ends the queue, too."""
        return []

    def stats(self, domains_of: Collection[str]) -> QueueStats:
        """See `IQueueAdmin`."""
        return tally(self.entries(STATES), self._messages.clock(), domains_of)

    def find(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        return _entry(self._find(id))

    def content(self, id: str, start: int = 0, most: int | None = None) -> bytes:
        """See `IQueueAdmin`."""
        return self._find(id).envelope.content[start : None if most is None else start + most]

    def _find(self, id: str) -> MemoryMessage:
        with self._messages.lock:
            by_id = self._messages.by_id
            found = [id] if id in by_id else [known for known in by_id if id and known.startswith(id)]
            return by_id[meant_by(id, found)]

    # -- what is done to it

    def _apply(self, action: str, id: str) -> tuple[str, QueueEntry]:
        with self._messages.lock:
            message = self._find(id)
            if message.state not in POSSIBLE[action]:
                raise WrongState(refusal(action, message.id, REASONS[message.state]))
            if action == 'delete':
                del self._messages.by_id[message.id]
            else:
                message = self._messages.by_id[message.id] = _changed(action, message, self._messages.clock())
        return message.id, _entry(message)

    def _make_due(self) -> int:
        now = self._messages.clock()
        with self._messages.lock:
            later = [
                message for message in self._messages.in_order() if message.state == 'waiting' and message.due > now
            ]
            self._messages.by_id.update({message.id: _due(message, now) for message in later})
        return len(later)

    def expire(self, before: float, most: int) -> list[str]:
        """See `IQueueAdmin`."""
        with self._messages.lock:
            expired = [entry for entry in self.entries(['dead']) if entry.is_dead_since(before)][:most]
            for entry in expired:
                log_expired(entry)
                del self._messages.by_id[entry.id]
        return [entry.id for entry in expired]


def _changed(action: str, message: MemoryMessage, now: float) -> MemoryMessage:
    if action == 'hold':
        return replace(message, state='held')
    if action == 'unhold':
        return replace(message, state='waiting')
    if message.state == 'waiting':
        return _due(message, now)
    return message.renewed(now)


def _due(message: MemoryMessage, now: float) -> MemoryMessage:
    return replace(message, due=min(message.due, now))


def _entry(message: MemoryMessage) -> QueueEntry:
    envelope = message.envelope
    subject, message_id = tell_from_header(envelope.content)
    return QueueEntry(
        message.id,
        message.state,
        envelope.sender,
        envelope.recipients,
        retries=message.attempts,
        queued_at=message.queued_at,
        due=message.due if message.state in ('waiting', 'held') else None,
        last_attempt=message.last_attempt,
        last_reply=message.last_reply,
        subject=subject,
        message_id=message_id,
        size=len(envelope.content),
    )
