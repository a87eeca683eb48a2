"""What is the same in the admin of every queue: which message is meant, what is possible, what is logged and said."""

from __future__ import annotations

import logging
from collections.abc import Collection
from types import MappingProxyType

from pyramid_mailqueue.exceptions import NoSuchMessage
from pyramid_mailqueue.logs import log_event, queue_log
from pyramid_mailqueue.queues.entries import ExactId, QueueEntry

__all__ = ['REASONS', 'SOME', 'QueueAdmin', 'meant_by', 'no_such_message', 'refusal']

#: What an action has done with a message, in logs and errors.
DONE = MappingProxyType(
    {'retry': 'retried', 'hold': 'held', 'unhold': 'unheld', 'release': 'released', 'delete': 'deleted'}
)

#: Why an action is impossible, by the state of the message; a queue may have reasons of its own.
REASONS = MappingProxyType(
    {
        'waiting': 'it is waiting.',
        'in progress': 'it is being delivered right now. Try again in a moment.',
        'held': 'it is held; unhold it first.',
        'dead': 'it is a dead letter; it can be retried, or deleted.',
        'in doubt': 'it is in doubt; release it, or delete it.',
        'corrupt': 'it is damaged; it can only be looked at, or deleted.',
    }
)

#: At most this many ids with the same beginning are named.
SOME = 5


class QueueAdmin:
    """A base class for the admin of a queue; see `IQueueAdmin`.  Each has to implement what is missing here."""

    def hold(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        return self._change('hold', id)

    def unhold(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        return self._change('unhold', id)

    def retry(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        return self._change('retry', id)

    def release(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        return self._change('release', id)

    def delete(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        return self._change('delete', id)

    def flush(self) -> int:
        """See `IQueueAdmin`."""
        flushed = self._make_due()
        log_event(queue_log, logging.INFO, status='flushed', messages=flushed)
        return flushed

    def _change(self, action: str, id: str) -> QueueEntry:
        before, entry = self._apply(action, id)
        told = {'id': before, 'state': entry.state, 'new_id': entry.id if entry.id != before else None}
        log_event(queue_log, logging.INFO, status=DONE[action], **told, msgid=entry.message_id)
        return entry

    def _apply(self, action: str, id: str) -> tuple[str, QueueEntry]:
        """
        Apply one of :data:`~.entries.POSSIBLE`, durably; return the id until then, and the message as it is now.

        Whether the message is in a state for it is decided together with the change: another process may be faster.
        Raises as `IQueueAdmin` says.
        """
        raise NotImplementedError

    def _make_due(self) -> int:
        """Make every waiting message due now; return how many were not."""
        raise NotImplementedError


def meant_by(id: str, found: Collection[str], number: int | None = None) -> str:
    """
    Return the one of *found* that *id* stands for.  Raises NoSuchMessage if there is none, or more than one.

    A whole id may be the beginning of others: those of its dead letters.

    :param found: ids that begin with *id*
    :param number: how many do, if *found* are only the first of them
    """
    if id in found:
        return id
    if not found or isinstance(id, ExactId):
        raise no_such_message(id)
    number = number or len(found)
    if number > 1:
        some = ', '.join(sorted(found)[:SOME]) + (', ...' if number > SOME else '')
        raise NoSuchMessage(f'{id} is the beginning of {number} ids; give more of it: {some}')
    return next(iter(found))


def no_such_message(id: str) -> NoSuchMessage:
    """Return the error for an id with which none in the queue begins."""
    return NoSuchMessage(f'There is no message in the queue whose id begins with {id!a}.')


def refusal(action: str, id: str, reason: str) -> str:
    """Return the text of an error: why nothing was changed."""
    return f'{id} cannot be {DONE[action]}: {reason}'
