"""What a person may see and do in a :class:`~.sql.SQLQueue`; each change is one statement."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, Text, and_, case, cast, delete, func, or_, select, update
from zope.interface import implementer

from pyramid_mailqueue.delivery.logs import log_event, queue_log
from pyramid_mailqueue.exceptions import NoSuchMessage, WrongState
from pyramid_mailqueue.interfaces import IQueueAdmin
from pyramid_mailqueue.queues.entries import STATES, QueueEntry, QueueStats, tally
from pyramid_mailqueue.queues.sql_database import Database
from pyramid_mailqueue.queues.sql_leases import Leases
from pyramid_mailqueue.queues.sql_outcomes import UNCLAIMED, state_is
from pyramid_mailqueue.queues.sql_schema import CONTENT, Message, database_time, is_time, recipients_of

__all__ = ['IS_SEEN', 'SQLAdmin']

#: So many messages are read at once.
PAGE = 500

#: So many ids with the same beginning are named.
SOME = 5

_COLUMNS = (
    Message.id,
    Message.state,
    Message.attempts,
    Message.queued_at,
    Message.due,
    Message.last_attempt,
    # Whatever is in them is shown, without being converted.
    *(
        cast(column, Text).label(column.key)
        for column in (Message.sender, Message.recipients, Message.last_reply, Message.subject, Message.message_id)
    ),
    # Neither database reads a content to know its length.
    func.length(Message.content).label('size'),
)

_OTHER_STATE = {
    'waiting': 'it is waiting',
    'in progress': 'it is being delivered right now. Try again in a moment',
    'held': 'it is held; unhold it first',
    'dead': 'it is a dead letter; it can be retried, or deleted',
    'in doubt': 'it is half-way to or from a directory; "mq-queue app.ini move --to-..." settles that',
    'corrupt': 'its row is damaged; it can only be looked at, or deleted',
}


@implementer(IQueueAdmin)
class SQLAdmin:
    """See `IQueueAdmin`."""

    def __init__(self, database: Database, leases: Leases, clock: Callable[[], float]) -> None:
        self._database = database
        self._leases = leases
        self._clock = clock

    # -- what there is

    def entries(self, states: Collection[str]) -> Iterator[QueueEntry]:
        """See `IQueueAdmin`."""
        self._leases.flush()
        last = ''
        while page := self._page(states, last, PAGE):
            yield from page
            last = page[-1].id

    def _page(self, states: Collection[str], last: str, size: int) -> list[QueueEntry]:
        """No connection is kept while a person reads."""
        if not states:
            return []
        meant = (Message.id > last, state_is(*states), IS_SEEN)
        statement = select(*_COLUMNS).where(*meant).order_by(Message.id).limit(size)
        return [*map(_entry, self._rows(statement))]

    def oldest(self, states: Collection[str]) -> QueueEntry | None:
        """See `IQueueAdmin`."""
        oldest, since = None, math.inf
        # The order is that in which they came for the first time; after a retry a message counts from later on.
        for entry in self.entries(states):
            if _born(entry.id) > since:
                break
            if entry.queued_at is not None and entry.queued_at < since:
                oldest, since = entry, entry.queued_at
        return oldest

    def stats(self, domains_of: Collection[str]) -> QueueStats:
        """See `IQueueAdmin`."""
        return tally(self.entries(STATES), self._clock(), domains_of)

    def find(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        self._leases.flush()
        for row in self._rows(select(*_COLUMNS).where(Message.id == self._whole(id))):
            return _entry(row)
        raise _nobody(id)

    def content(self, id: str) -> bytes:
        """See `IQueueAdmin`."""
        statement = select(CONTENT).where(Message.id == self._whole(id))
        content = self._database.run(lambda connection: connection.scalar(statement))
        if content is None:
            raise _nobody(id)
        return content

    def _rows(self, statement: Select[Any]) -> list[Row[Any]]:
        return [*self._database.run(lambda connection: connection.execute(statement).all())]

    def _whole(self, id: str) -> str:
        """Return the id that begins so."""
        if not id or not id.isprintable():
            raise _nobody(id)
        begins_so = and_(Message.id >= id, Message.id < id + '\U0010ffff')
        found = [row.id for row in self._rows(select(Message.id).where(begins_so).order_by(Message.id).limit(SOME + 1))]
        if not found:
            raise _nobody(id)
        # The shortest comes first: a whole id is the beginning of those of its dead letters.
        if found[0] != id and len(found) > 1:
            number = self._database.run(lambda c: c.scalar(select(func.count()).where(begins_so)))
            some = ', '.join(found[:SOME]) + (', ...' if len(found) > SOME else '')
            raise NoSuchMessage(f'{id} is the beginning of {number} ids; give more of it: {some}')
        return str(found[0])

    # -- what is done to it

    def hold(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        return self._change(id, 'held', _WAITING, {'state': 'held', **UNCLAIMED})

    def unhold(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        return self._change(id, 'unheld', state_is('held'), {'state': 'waiting'})

    def retry(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        now = self._clock()
        was_dead = Message.state == 'dead'
        values = {
            'state': 'waiting',
            'due': case((or_(was_dead, Message.due > now), now), else_=Message.due),
            'queued_at': case((was_dead, now), else_=Message.queued_at),
            'attempts': case((was_dead, 0), else_=Message.attempts),
            **UNCLAIMED,
        }
        return self._change(id, 'retried', or_(_WAITING, state_is('dead')), values)

    def release(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`.  Nothing is ever in doubt here."""
        raise self._wrong_state(id, 'released')

    def delete(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        condition = or_(_WAITING, state_is('held', 'dead', 'corrupt'))
        return self._changed(id, 'deleted', delete(Message).where(condition))

    def flush(self) -> int:
        """See `IQueueAdmin`."""
        now = self._clock()
        statement = update(Message).where(state_is('waiting'), Message.due > now).values(due=now)
        flushed = self._database.run(lambda connection: connection.execute(statement).rowcount)
        log_event(queue_log, logging.INFO, status='flushed', messages=flushed)
        return flushed

    def _change(self, id: str, done: str, condition: ColumnElement[bool], values: Mapping[str, Any]) -> QueueEntry:
        """Change a message for which *condition* holds; *done* is the word for that."""
        return self._changed(id, done, update(Message).where(condition).values(**values))

    def _changed(self, id: str, done: str, statement: Any) -> QueueEntry:
        whole = self._whole(id)
        statement = statement.where(Message.id == whole).returning(*_COLUMNS)
        for row in self._rows(statement):
            entry = _entry(row)
            log_event(queue_log, logging.INFO, status=done, id=entry.id, state=entry.state, msgid=entry.message_id)
            return entry
        raise self._wrong_state(whole, done)

    def _wrong_state(self, id: str, done: str) -> WrongState:
        entry = self.find(id)
        return WrongState(f'{entry.id} cannot be {done}: {_OTHER_STATE[entry.state]}.')


#: A message that a move has in hand just now (see :mod:`~.moving_sql`) is not to be seen.
IS_SEEN = or_(Message.state != 'in doubt', Message.lease < database_time())

#: What waits, or would if anybody had seen that its deliverer died.
_WAITING = or_(state_is('waiting'), and_(state_is('in progress'), Message.lease < database_time()))


def _entry(row: Row[Any]) -> QueueEntry:
    """What is damaged is not known, and does not keep the rest from being seen."""
    last_reply = row.last_reply
    try:
        recipients = recipients_of(row.recipients)
    except ValueError as error:
        recipients, last_reply = (), str(error)
    return QueueEntry(
        row.id,
        row.state,
        row.sender,
        recipients,
        retries=row.attempts,
        queued_at=_time(row.queued_at),
        due=_time(row.due) if row.state in ('waiting', 'held') else None,
        last_attempt=_time(row.last_attempt),
        last_reply=last_reply,
        subject=row.subject,
        message_id=row.message_id,
        size=row.size,
    )


def _time(value: Any) -> float | None:
    return value if is_time(value) else None


def _born(id: str) -> float:
    """When a message came for the first time, as its id tells; an id of somebody else's making tells nothing."""
    try:
        return int(id[:13], 16) / 1_000_000
    except ValueError:
        return -math.inf


def _nobody(id: str) -> NoSuchMessage:
    return NoSuchMessage(f'There is no message in the queue whose id begins with {id!a}.')
