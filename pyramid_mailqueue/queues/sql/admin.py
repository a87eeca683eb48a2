"""Lists, inspects and changes the messages of a :class:`~.sql.SQLQueue`; each change is one statement."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Executable,
    Integer,
    Row,
    Select,
    Text,
    and_,
    case,
    cast,
    delete,
    false,
    func,
    literal_column,
    or_,
    select,
    true,
    update,
)
from zope.interface import implementer

from pyramid_mailqueue.exceptions import WrongState
from pyramid_mailqueue.interfaces import IQueueAdmin
from pyramid_mailqueue.queues.admin import REASONS, SOME, QueueAdmin, meant_by, no_such_message, refusal
from pyramid_mailqueue.queues.entries import (
    AGE_LIMITS,
    POSSIBLE,
    STATES,
    DomainCount,
    ExactId,
    QueueEntry,
    QueueStats,
    Tally,
    log_expired,
    oldest_first,
)
from pyramid_mailqueue.queues.sql.database import Database
from pyramid_mailqueue.queues.sql.deadlines import CONTENT_SECONDS, LONG_SECONDS, LOOK_SECONDS, STATEMENT_SECONDS
from pyramid_mailqueue.queues.sql.leases import Leases
from pyramid_mailqueue.queues.sql.outcomes import IS_SEEN, IS_UNKNOWN, UNCLAIMED, state_is
from pyramid_mailqueue.queues.sql.tables import (
    CONTENT,
    CONTENTS,
    MESSAGES,
    RECIPIENTS,
    SIZE,
    has_run_out,
    has_time,
    is_time,
    part_of_content,
    recipients_of,
)

__all__ = ['SQLAdmin']

#: How many messages are read at once; and how many if little is read of each.
PAGE, MANY = 500, 5000

#: The oldest is likely to be among this many that came first.
FEW = 100

_COLUMNS = (
    MESSAGES.c.id,
    cast(MESSAGES.c.state, Text).label('state'),
    MESSAGES.c.attempts,
    MESSAGES.c.queued_at,
    MESSAGES.c.due,
    MESSAGES.c.last_attempt,
    # Any value in them is shown, without being converted.
    *(
        cast(column, Text).label(column.key)
        for column in (
            MESSAGES.c.sender,
            MESSAGES.c.recipients,
            MESSAGES.c.last_reply,
            MESSAGES.c.subject,
            MESSAGES.c.message_id,
        )
    ),
    SIZE,
)

_REASONS = {
    **REASONS,
    'in doubt': 'it is half-way to or from a directory; "mq-queue app.ini move --to-..." settles that.',
    'corrupt': 'its row is damaged; it can only be looked at, or deleted.',
}


@implementer(IQueueAdmin)
class SQLAdmin(QueueAdmin):
    """See `IQueueAdmin`."""

    def __init__(self, database: Database, leases: Leases, clock: Callable[[], float]) -> None:
        self._database = database
        self._leases = leases
        self._clock = clock

    # -- what there is

    def entries(self, states: Collection[str]) -> Iterator[QueueEntry]:
        """See `IQueueAdmin`."""
        self._leases.flush()
        found = map(_entry, self._pages(select(*_COLUMNS), states, PAGE))
        yield from oldest_first((_born(entry.id), entry) for entry in found)

    def _pages(self, statement: Select[Any], states: Collection[str], size: int) -> Iterator[Row[Any]]:
        """Yield rows in the order of their ids, read *size* at once: no connection is kept while a person reads."""
        statement = statement.where(_is_in(states), IS_SEEN).order_by(MESSAGES.c.id).limit(size)
        rows = self._rows(statement)
        yield from rows
        while len(rows) == size:
            rows = self._rows(statement.where(MESSAGES.c.id > rows[-1].id))
            yield from rows

    def oldest(self, states: Collection[str]) -> QueueEntry | None:
        """See `IQueueAdmin`."""
        self._leases.flush()
        # Each state by its own index.
        found = [entry for state in states if (entry := self._oldest(state)) is not None]
        return min(found, key=lambda entry: (entry.queued_at or 0, entry.id), default=None)

    def _oldest(self, state: str) -> QueueEntry | None:
        statement = select(*_COLUMNS).where(_is_in([state]), IS_SEEN)
        first = [*map(_entry, self._rows(statement.order_by(MESSAGES.c.id).limit(FEW)))]
        known = [entry for entry in first if entry.queued_at is not None]
        oldest = min(known, key=lambda entry: entry.queued_at or 0, default=None)
        if len(first) < FEW or (oldest is not None and _born(first[-1].id) > (oldest.queued_at or 0)):
            # They sort by the time at which they first came; none is in the queue for longer than that.
            return oldest
        # A retried message counts from later on.
        by_time = statement.where(has_time(MESSAGES.c.queued_at)).order_by(MESSAGES.c.queued_at, MESSAGES.c.id)
        return next(map(_entry, self._rows(by_time.limit(1))), None)

    def crashing(self, deaths: int, most: int) -> list[str]:
        """See `IQueueAdmin`."""
        crashing = (state_is('waiting', 'in progress'), MESSAGES.c.deaths >= deaths)
        found = select(MESSAGES.c.id).where(*crashing).order_by(MESSAGES.c.id).limit(most)
        return [row.id for row in self._rows(found)]

    def stats(self, domains_of: Collection[str]) -> QueueStats:
        """See `IQueueAdmin`.  The database counts, except for the domains, for which addresses have to be read."""
        self._leases.flush()
        now = self._clock()
        by_state = dict.fromkeys(STATES, Tally())
        for row in self._rows(_counting(now), LONG_SECONDS):
            state = row.state if row.state in STATES else 'corrupt'
            by_state[state] += _tally(row[1:])
        domains = DomainCount(now)
        for row in self._pages(select(*_ADDRESSES), domains_of, MANY):
            # A damaged row has none.
            with suppress(ValueError):
                domains.add(recipients_of(row.recipients), _time(row.queued_at), row.size)
        return QueueStats(by_state, domains.tallies())

    def find(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        self._leases.flush()
        for row in self._rows(select(*_COLUMNS).where(MESSAGES.c.id == self._whole(id))):
            return _entry(row)
        raise no_such_message(id)

    def content(self, id: str, start: int = 0, most: int | None = None) -> bytes:
        """See `IQueueAdmin`."""
        if most is not None and self._database.dialect == 'sqlite':
            found = self._database.run(partial(_read_blob, id=self._whole(id), start=start, most=most), CONTENT_SECONDS)
            if found is not None:
                return found
        meant = CONTENT if most is None else part_of_content(start, most)
        statement = select(meant).where(MESSAGES.c.id == self._whole(id))
        content: bytes | None = self._database.run(lambda connection: connection.scalar(statement), CONTENT_SECONDS)
        if content is None:
            raise no_such_message(id)
        return content[start:] if most is None else content

    def _rows(self, statement: Executable, seconds: float = LOOK_SECONDS) -> list[Row[Any]]:
        return [*self._database.run(lambda connection: connection.execute(statement).all(), seconds)]

    def _whole(self, id: str) -> str:
        """Return the id that begins so; an exact one as it is."""
        if isinstance(id, ExactId):
            return str(id)
        if not id.isprintable():
            raise no_such_message(id)
        # The empty id is the beginning of all, and means only itself.
        begins_so = and_(MESSAGES.c.id >= id, MESSAGES.c.id < id + '\U0010ffff') if id else MESSAGES.c.id == id
        number = select(func.count()).where(begins_so).correlate(None).scalar_subquery().label('number')
        found = self._rows(select(MESSAGES.c.id, number).where(begins_so).order_by(MESSAGES.c.id).limit(SOME))
        return meant_by(id, [row.id for row in found], found[0].number if found else 0)

    # -- what is done to it

    def _apply(self, action: str, id: str) -> tuple[str, QueueEntry]:
        whole = self._whole(id)
        change: Any = delete(MESSAGES) if action == 'delete' else update(MESSAGES).values(_after(action, self._clock()))
        for row in self._rows(change.where(MESSAGES.c.id == whole, _can(action)).returning(*_COLUMNS)):
            return whole, _entry(row)
        raise WrongState(refusal(action, whole, _REASONS[self.find(ExactId(whole)).state]))

    def _make_due(self) -> int:
        now = self._clock()
        statement = update(MESSAGES).where(state_is('waiting'), MESSAGES.c.due > now).values(due=now)
        return self._database.run(lambda connection: connection.execute(statement).rowcount, LONG_SECONDS)

    def expire(self, before: float, most: int) -> list[str]:
        """See `IQueueAdmin`."""
        died = func.coalesce(MESSAGES.c.last_attempt, MESSAGES.c.queued_at)
        is_over = (state_is('dead'), has_time(died), died < before)
        found = self._rows(select(*_COLUMNS).where(*is_over).order_by(MESSAGES.c.id).limit(most), STATEMENT_SECONDS)
        for entry in map(_entry, found):
            log_expired(entry)
        # It may have been retried since then.
        expired = delete(MESSAGES).where(*is_over, MESSAGES.c.id.in_([row.id for row in found]))
        return [row.id for row in self._rows(expired.returning(MESSAGES.c.id), STATEMENT_SECONDS)] if found else []


def _can(action: str) -> ColumnElement[bool]:
    """The rows to which *action* can be applied; a message in doubt is half-way to or from another queue."""
    states = [state for state in POSSIBLE[action] if state != 'in doubt']
    if 'waiting' not in states:
        return _is_in(states)
    # It will wait after the next recovery.
    return or_(_is_in(states), and_(state_is('in progress'), has_run_out()))


def _after(action: str, now: float) -> dict[str, Any]:
    """Return the values of a row after *action*."""
    values: dict[str, Any] = {'state': 'held' if action == 'hold' else 'waiting', **UNCLAIMED}
    if action == 'retry':
        was_dead = MESSAGES.c.state == 'dead'
        values['due'] = case((or_(was_dead, MESSAGES.c.due > now), now), else_=MESSAGES.c.due)
        values['queued_at'] = case((was_dead, now), else_=MESSAGES.c.queued_at)
        values['attempts'] = case((was_dead, 0), else_=MESSAGES.c.attempts)
    return values


def _is_in(states: Collection[str]) -> ColumnElement[bool]:
    """The rows in these states; a row with an unknown state is *corrupt*."""
    if not states:
        return false()
    if set(states) == set(STATES):
        return true()
    return or_(state_is(*states), IS_UNKNOWN) if 'corrupt' in states else state_is(*states)


# The columns that are needed to count domains.
_ADDRESSES: tuple[Any, ...] = (
    MESSAGES.c.id,
    RECIPIENTS,
    MESSAGES.c.queued_at,
    SIZE,
)


def _counting(now: float) -> Select[Any]:
    """Return a statement that yields each state with the figures of :func:`_tally`."""
    queued_at = MESSAGES.c.queued_at
    is_known = has_time(queued_at)
    as_old: Iterator[Any] = (func.count().filter(is_known, queued_at >= now - 60 * limit) for limit in AGE_LIMITS)
    figures = (
        func.count(),
        func.coalesce(func.sum(SIZE), 0),
        func.min(queued_at).filter(is_known),
        func.count().filter(is_known),
        *as_old,
    )
    state = cast(MESSAGES.c.state, Text)
    return select(state.label('state'), *figures).where(IS_SEEN).group_by(state)


def _tally(figures: Sequence[Any]) -> Tally:
    """
    Return what the database has counted.

    The figures are the messages; their octets; the time of the oldest; of how many a time is known; and how many of
    these are at most as old as each of :data:`~.entries.AGE_LIMITS`.
    """
    messages, size, oldest, known, *as_old = figures
    by_age = tuple(number - before for before, number in pairwise((0, *as_old, known)))
    return Tally(messages, int(size), oldest, by_age)


def _entry(row: Row[Any]) -> QueueEntry:
    """Return the entry of a row; damaged values are left out, and the rest is shown."""
    state, last_reply = row.state, row.last_reply
    try:
        recipients = recipients_of(row.recipients)
    except ValueError as error:
        recipients, last_reply = (), str(error)
    if state not in STATES:
        state, last_reply = 'corrupt', f'its state is {ascii(state)}, and there is none of this name'
    return QueueEntry(
        row.id,
        state,
        row.sender,
        recipients,
        retries=row.attempts,
        queued_at=_time(row.queued_at),
        due=_time(row.due) if state in ('waiting', 'held') else None,
        last_attempt=_time(row.last_attempt),
        last_reply=last_reply,
        subject=row.subject,
        message_id=row.message_id,
        size=row.size,
    )


def _time(value: Any) -> float | None:
    return value if is_time(value) else None


def _born(id: str) -> float:
    """Return when a message first came, from its id; minus infinity for an id of another program."""
    try:
        return int(id[:13], 16) / 1_000_000
    except ValueError:
        return -math.inf


def _read_blob(connection: Connection, *, id: str, start: int, most: int) -> bytes | None:
    """
    Return a part of a content in a file of SQLite, whose own functions would load all of it.

    None if there is none, or it cannot be read so: before Python 3.11, or if it is neither a blob nor a text.
    """
    driver: Any = connection.connection.driver_connection
    open_blob = getattr(driver, 'blobopen', None)
    if open_blob is None:
        return None
    for table in (MESSAGES, CONTENTS):
        column, row = table.c.content, literal_column('rowid', Integer)
        is_there = func.typeof(column).in_(('blob', 'text'))
        number = connection.scalar(select(row).select_from(table).where(table.c.id == id, is_there))
        if number is not None:
            with open_blob(table.name, column.name, number, readonly=True) as blob:
                blob.seek(min(start, len(blob)))
                found: bytes = blob.read(most)
                return found
    return None
