"""Lists, inspects and changes the messages of a :class:`~.memory.MemoryQueue`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from zope.interface import implementer

from pyramid_mailqueue.exceptions import WrongState
from pyramid_mailqueue.interfaces import IQueueAdmin
from pyramid_mailqueue.logs import log_event, queue_log
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
class MemoryAdmin:
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
        found = [message for message in self._messages.in_order() if message.state in states]
        return _entry(min(found, key=lambda message: message.queued_at)) if found else None

    def crashing(self, deaths: int, most: int) -> list[str]:
        """See `IQueueAdmin`.  A crash ends the queue, too."""
        return []

    def stats(self, domains_of: Collection[str]) -> QueueStats:
        """See `IQueueAdmin`."""
        return tally(self.entries(STATES), self._messages.clock(), domains_of)

    def find(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        return _entry(self._messages.find(id))

    def content(self, id: str, start: int = 0, most: int | None = None) -> bytes:
        """See `IQueueAdmin`."""
        return self._messages.find(id).envelope.content[start : None if most is None else start + most]

    # -- what is done to it

    def hold(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        return self._change(id, 'held', POSSIBLE['hold'], lambda message: replace(message, state='held'))

    def unhold(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        return self._change(id, 'unheld', POSSIBLE['unhold'], lambda message: replace(message, state='waiting'))

    def retry(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        now = self._messages.clock()
        return self._change(
            id,
            'retried',
            POSSIBLE['retry'],
            lambda message: message.renewed(now) if message.state == 'dead' else _due(message, now),
        )

    def release(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        now = self._messages.clock()
        return self._change(id, 'released', POSSIBLE['release'], lambda message: message.renewed(now))

    def delete(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        with self._messages.lock:
            message = self._take(id, 'deleted', POSSIBLE['delete'])
            del self._messages.by_id[message.id]
        return _told('deleted', message)

    def flush(self) -> int:
        """See `IQueueAdmin`."""
        now = self._messages.clock()
        with self._messages.lock:
            later = [
                message for message in self._messages.in_order() if message.state == 'waiting' and message.due > now
            ]
            self._messages.by_id.update({message.id: _due(message, now) for message in later})
        log_event(queue_log, logging.INFO, status='flushed', messages=len(later))
        return len(later)

    def expire(self, before: float, most: int) -> list[str]:
        """See `IQueueAdmin`."""
        with self._messages.lock:
            expired = [entry for entry in self.entries(['dead']) if entry.is_dead_since(before)][:most]
            for entry in expired:
                log_expired(entry)
                del self._messages.by_id[entry.id]
        return [entry.id for entry in expired]

    def _change(
        self, id: str, done: str, states: Collection[str], change: Callable[[MemoryMessage], MemoryMessage]
    ) -> QueueEntry:
        """Change a message that is in one of *states*; *done* names the change."""
        with self._messages.lock:
            message = change(self._take(id, done, states))
            self._messages.by_id[message.id] = message
        return _told(done, message)

    def _take(self, id: str, done: str, states: Collection[str]) -> MemoryMessage:
        """Called with the lock held."""
        message = self._messages.find(id)
        if message.state not in states:
            raise WrongState(f'{message.id} cannot be {done}: it is {message.state}.')
        return message


def _due(message: MemoryMessage, now: float) -> MemoryMessage:
    return replace(message, due=min(message.due, now))


def _told(done: str, message: MemoryMessage) -> QueueEntry:
    entry = _entry(message)
    log_event(queue_log, logging.INFO, status=done, id=entry.id, state=entry.state, msgid=entry.message_id)
    return entry


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
