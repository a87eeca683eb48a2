"""
The queue in memory: for tests, and for nothing that has to outlive its process.

It keeps every promise of `IMailQueue` but durability.  Its messages are visible to its process only, and gone when that
ends; so there are no orphans and no damaged messages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from zope.interface import implementer

from pyramid_mailqueue.interfaces import IClaim, IMailQueue, IStaging
from pyramid_mailqueue.logs import log_event, queue_log
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.base import Claim, MailQueue
from pyramid_mailqueue.queues.entries import STATES
from pyramid_mailqueue.queues.memory.admin import MemoryAdmin
from pyramid_mailqueue.queues.memory.messages import MemoryMessage, MemoryMessages
from pyramid_mailqueue.queues.staged import StagedMail
from pyramid_mailqueue.results import Recovery, Settlement

__all__ = ['MemoryClaim', 'MemoryQueue', 'MemoryStaging']


@implementer(IMailQueue)
class MemoryQueue(MailQueue):
    """
    See `IMailQueue`.

    :param in_doubt: what :meth:`recover` does with messages in doubt: ``'hold'``, ``'send'`` or ``'discard'``
    :param clock: seconds since the epoch
    """

    def __init__(self, *, in_doubt: str = 'hold', clock: Callable[[], float] = time.time) -> None:
        self.in_doubt = in_doubt
        self._messages = MemoryMessages(clock)

    # -- into the queue

    def staging(self) -> MemoryStaging:
        """See `IMailQueue`."""
        return MemoryStaging(self._messages)

    def put(self, envelope: Envelope) -> str:
        """See `IMailQueue`."""
        return self._messages.enter(envelope, 'waiting').id

    def put_claimed(self, envelope: Envelope) -> MemoryClaim:
        """See `IMailQueue`."""
        return MemoryClaim(self._messages, self._messages.enter(envelope, 'in progress'))

    # -- out of the queue

    def claim_due(self, now: float) -> Iterator[MemoryClaim]:
        """See `IMailQueue`.  Messages during which a server disconnected come last."""
        for message in sorted(self._due(now), key=lambda message: (message.stumbles, message.due, message.born)):
            claim = self._claim(message.id, now)
            if claim is not None:
                yield claim

    def count_due(self, now: float) -> int:
        """See `IMailQueue`."""
        return len(self._due(now))

    def claim(self, id: str) -> MemoryClaim | None:
        """See `IMailQueue`."""
        return self._claim(id, self._messages.clock())

    def _due(self, now: float) -> list[MemoryMessage]:
        return [message for message in self._messages.in_order() if _is_due(message, now)]

    def _claim(self, id: str, now: float) -> MemoryClaim | None:
        with self._messages.lock:
            message = self._messages.by_id.get(id)
            if message is None or not _is_due(message, now):
                return None
            claimed = self._messages.by_id[id] = replace(message, state='in progress')
        return MemoryClaim(self._messages, claimed)

    # -- what was left

    def recover(self, now: float) -> Recovery:
        """See `IMailQueue`.  A claim ends with the queue, so there are no orphans."""
        with self._messages.lock:
            doubtful = [message for message in self._messages.in_order() if message.state == 'in doubt']
            names = tuple(message.id for message in doubtful)
            if self.in_doubt == 'hold':
                return Recovery(in_doubt=names)
            for message in doubtful:
                del self._messages.by_id[message.id]
            if self.in_doubt == 'discard':
                return Recovery(discarded=names)
            self._messages.by_id.update({message.id: replace(message, state='waiting') for message in doubtful})
            return Recovery(sent=names)

    def flush(self) -> None:
        """See `IMailQueue`.  Nothing here is durable."""

    # -- for people

    @property
    def admin(self) -> MemoryAdmin:
        """See `IMailQueue`."""
        return MemoryAdmin(self._messages)

    def counts(self) -> dict[str, int]:
        """See `IMailQueue`."""
        states = [message.state for message in self._messages.in_order()]
        return {state: states.count(state) for state in STATES}


def _is_due(message: MemoryMessage, now: float) -> bool:
    return message.state == 'waiting' and message.due <= now


@implementer(IStaging)
class MemoryStaging(StagedMail):
    """See `IStaging`.  Until :meth:`publish` the messages are not in the queue at all."""

    def __init__(self, messages: MemoryMessages) -> None:
        self._messages = messages
        super().__init__()
        self._is_prepared = False

    def prepare(self, alone: bool = False) -> None:
        """See `IStaging`."""
        self._is_prepared = True

    def publish(self) -> list[IClaim | None]:
        """See `IStaging`."""
        return [self._publish(envelope, claimed) for envelope, claimed in self._taken()]

    def _publish(self, envelope: Envelope, claimed: bool) -> IClaim | None:
        message = self._messages.enter(envelope, 'in progress' if claimed else 'waiting')
        return MemoryClaim(self._messages, message) if claimed else None

    def discard(self) -> list[Envelope]:
        """See `IStaging`."""
        return [envelope for envelope, _ in self._taken()]

    def leave_in_doubt(self) -> None:
        """See `IStaging`."""
        if not self._is_prepared:
            self._added = []
        for envelope, _ in self._taken():
            name = self._messages.enter(envelope, 'in doubt').id
            reason = 'its transaction began to commit and did not finish; a person must decide'
            log_event(queue_log, logging.CRITICAL, status='in_doubt', id=name, reason=reason)

    def _taken(self) -> list[tuple[Envelope, bool]]:
        """Return what was added, once."""
        added, self._added, self._is_prepared = self._added, [], False
        return added


@implementer(IClaim)
class MemoryClaim(Claim):
    """See `IClaim`.  Made for a message that is in progress."""

    def __init__(self, messages: MemoryMessages, message: MemoryMessage) -> None:
        self._messages = messages
        self._message = message
        self._has_ended = False
        self.id = message.id

    def __repr__(self) -> str:
        return f'<MemoryClaim {self.id}>'

    @property
    def attempts(self) -> int:
        """See `IClaim`."""
        return self._message.attempts

    @property
    def queued_at(self) -> float:
        """See `IClaim`."""
        return self._message.queued_at

    @property
    def envelope(self) -> Envelope:
        """See `IClaim`."""
        return self._message.envelope

    def begin(self) -> bool:
        """See `IClaim`.  Nothing here outlives a process."""
        return not self._has_ended

    @property
    def recipients(self) -> tuple[str, ...]:
        """See `IClaim`."""
        return self._message.envelope.recipients

    def abandon(self) -> None:
        """See `IClaim`.  It is in memory already, and its queue dies with the process: nothing is counted."""
        self.release()

    def settle(self, settlement: Settlement) -> None:
        """See `IClaim`."""
        with self._messages.lock:
            if not self._end():
                return
            for burial in settlement.burials:
                self._messages.bury(self._next(burial.recipients, settlement, burial.reason))
            if settlement.waiting:
                self._messages.by_id[self.id] = self._waiting(settlement)
            else:
                del self._messages.by_id[self.id]

    def keep(self, recipients: tuple[str, ...]) -> None:
        """See `IClaim`."""
        with self._messages.lock:
            if not self._has_ended:
                self._message = replace(self._message, envelope=self._envelope_for(recipients))
                self._messages.by_id[self.id] = self._message

    def release(self) -> None:
        """See `IClaim`."""
        with self._messages.lock:
            if self._end():
                self._messages.by_id[self.id] = replace(self._message, state='waiting')

    def _end(self) -> bool:
        """Called with the lock held; False if the claim has ended before."""
        has_ended, self._has_ended = self._has_ended, True
        return not has_ended

    def _waiting(self, settlement: Settlement) -> MemoryMessage:
        changed = self._next(settlement.waiting, settlement, settlement.last_reply)
        return replace(
            changed,
            state='waiting',
            due=changed.due if settlement.due is None else settlement.due,
            # A completed attempt shows that the message is not the cause of the disconnects.
            stumbles=0 if settlement.counted else changed.stumbles + settlement.stumbled,
        )

    def _next(self, recipients: tuple[str, ...], settlement: Settlement, last_reply: str) -> MemoryMessage:
        """Return the message after the attempt, for some of its recipients."""
        message = self._message
        return replace(
            message,
            envelope=self._envelope_for(recipients),
            attempts=message.attempts + settlement.counted,
            last_attempt=self._messages.clock() if settlement.counted or last_reply else message.last_attempt,
            last_reply=last_reply or message.last_reply,
        )

    def _envelope_for(self, recipients: tuple[str, ...]) -> Envelope:
        return replace(self._message.envelope, recipients=recipients)
