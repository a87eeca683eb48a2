"""The messages of one :class:`~.memory.MemoryQueue`, and the lock under which they change."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.logs import log_queued
from pyramid_mailqueue.message.envelope import Envelope

__all__ = ['MemoryMessage', 'MemoryMessages']


@dataclass(frozen=True, slots=True)
class MemoryMessage:
    """
    One message, as it is now; a change makes a new object with the same id.

    :param id: its name in the queue
    :param born: its number in the order in which messages first came; a dead letter has that of its message
    :param state: one of :data:`~.entries.STATES`
    :param due: when it may be tried again
    :param stumbles: how often the server disconnected during it, since its last attempt
    """

    id: str
    born: int
    state: str
    envelope: Envelope
    queued_at: float
    due: float
    attempts: int = 0
    stumbles: int = 0
    last_attempt: float | None = None
    last_reply: str = ''

    def renewed(self, now: float) -> MemoryMessage:
        """Return it waiting as if it came into the queue now: due, and without attempts."""
        return dataclasses.replace(self, state='waiting', queued_at=now, due=now, attempts=0, stumbles=0)


class MemoryMessages:
    """
    All messages, by their ids.

    A change holds :attr:`lock` from the first look at the message on.

    :param clock: seconds since the epoch
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.by_id: dict[str, MemoryMessage] = {}
        self._numbers = itertools.count(1)
        self._make_lock()
        call_in_children(self._make_lock)

    def _make_lock(self) -> None:
        self.lock = threading.RLock()

    def enter(self, envelope: Envelope, state: str) -> MemoryMessage:
        """Add a new message, due now."""
        with self.lock:
            number, now = next(self._numbers), self.clock()
            message = MemoryMessage(f'{number:06}', number, state, envelope, queued_at=now, due=now)
            self.by_id[message.id] = message
        if state != 'in doubt':
            log_queued(message.id, envelope)
        return message

    def bury(self, message: MemoryMessage) -> None:
        """Keep *message* as a dead letter, beside the message of which it is a part."""
        with self.lock:
            ids = (f'{message.id}.{number}' for number in itertools.count(1))
            unused = next(name for name in ids if name not in self.by_id)
            self.by_id[unused] = dataclasses.replace(message, id=unused, state='dead')

    def in_order(self) -> list[MemoryMessage]:
        """Return all messages, in the order in which they first came."""
        with self.lock:
            return sorted(self.by_id.values(), key=lambda message: (message.born, message.id))
