"""
The database in a move (:mod:`~.queues.moving`).

A row that is out of reach is in state *in doubt*, which no worker claims.  Its ``claim`` is
``move:BATCH.ROLE.STATE``, and its ``lease`` tells until when a move is likely to be at work on it; until then it is not
reported.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import CTE, Connection, Executable, Row, Update, delete, insert, or_, select, text, update
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError

from pyramid_mailqueue.exceptions import ConfigurationError, MessageError, QueueError, translated
from pyramid_mailqueue.hosts import name_of_this_host
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.entries import tell_from_header
from pyramid_mailqueue.queues.maildir.queue_file import QueueHeader, serialize_header
from pyramid_mailqueue.queues.moving import IN, MOVED, OUT, DoesNotFit, Parcel, batched
from pyramid_mailqueue.queues.sql.claim import separated
from pyramid_mailqueue.queues.sql.deadlines import LONG_SECONDS
from pyramid_mailqueue.queues.sql.engine import AS_BYTES
from pyramid_mailqueue.queues.sql.outcomes import UNCLAIMED, state_is
from pyramid_mailqueue.queues.sql.tables import (
    CONTENT,
    CONTENTS,
    MESSAGES,
    RECIPIENTS,
    SIZE,
    current_schema,
    database_time,
    has_run_out,
    recipients_of,
)

if TYPE_CHECKING:
    from pyramid_mailqueue.queues.maildir.moving import DirectoryRecord
    from pyramid_mailqueue.queues.sql import SQLQueue
    from pyramid_mailqueue.queues.sql.database import Database

__all__ = ['SQLSide', 'blaming_configuration', 'schema_of']

T = TypeVar('T')

#: How long a batch is likely to take, in seconds.
LEASE = 60

#: How many ids are read at once.
PAGE = 500

#: The limits of due times and of times in ids, in seconds since the epoch: what a file and an id can hold.
_LATEST = 1 << 33
_LONGEST_AGO = 0

_CLAIM = re.compile(r'move:(.+)\.(?:in|out)\.[a-z]+')
_ID_TIME = re.compile(r'[0-9a-f]{13}')

_COLUMNS = (
    MESSAGES.c.id,
    MESSAGES.c.due,
    MESSAGES.c.attempts,
    MESSAGES.c.deaths,
    MESSAGES.c.queued_at,
    MESSAGES.c.last_attempt,
    MESSAGES.c.last_reply,
    MESSAGES.c.sender,
    RECIPIENTS,
    CONTENT,
)


class SQLSide:
    """
    See `Side`.

    :param record: the directory on the other side, whose batches these are
    """

    def __init__(self, queue: SQLQueue, record: DirectoryRecord) -> None:
        self._queue = queue
        self._database = queue.database
        self._record = record
        self.name = queue.database.name

    def check(self) -> None:
        """Raise ConfigurationError if the user of the database may not do all that a move does; see `Side` too."""
        with blaming_configuration():
            self._queue.check_rights('A move')

    def recover(self) -> None:
        """See `Side`."""
        with blaming_configuration():
            self._queue.recover(self._queue.leases.clock())

    def counts(self) -> Mapping[str, int]:
        """See `Side`."""
        return self._queue.counts()

    def _execute(self, statement: Executable) -> None:
        self._transact(lambda connection: connection.execute(statement))

    def _transact(self, work: Callable[[Connection], T]) -> T:
        """Run *work* as one transaction, which is on the disk when this returns: the other queue relies on it."""

        def durably(connection: Connection) -> T:
            if self._database.dialect == 'postgresql':
                connection.execute(_SYNCHRONOUS)
            return work(connection)

        with blaming_configuration():
            return self._database.transact(durably, LONG_SECONDS)

    # -- what leaves

    def batches(self, state: str) -> Iterator[Sequence[str]]:
        """See `Side`."""
        return batched(self._sizes(state))

    def _sizes(self, state: str) -> Iterator[tuple[str, int]]:
        last = ''
        columns = (MESSAGES.c.id, SIZE)
        while True:
            page = select(*columns).where(state_is(state), MESSAGES.c.id > last).order_by(MESSAGES.c.id).limit(PAGE)
            rows = self._rows(page)
            yield from map(tuple, rows)
            if len(rows) < PAGE:
                return
            last = rows[-1].id

    def take(self, batch: str, state: str, ids: Sequence[str], refuse: Callable[[str, str], None]) -> list[Parcel]:
        """See `Side`."""
        claim = _claim(batch, OUT, state)
        self._hide(ids, self._taking(state, ids).values(**_out_of_reach(claim)))
        parcels = []
        # Not what the UPDATE returns: if its answer was lost, it was repeated, and found nothing any more.
        taken = select(*_COLUMNS).where(*_claimed(claim)).order_by(MESSAGES.c.id)
        for row in self._rows(taken.execution_options(**{AS_BYTES: True})):
            try:
                parcels.append(_parcel(state, row))
            except (MessageError, QueueError, TypeError, ValueError, OverflowError) as error:
                self._put_back(claim, state, row.id)
                refuse(row.id, f'its row is damaged, or does not fit into a file: {error}')
        return parcels

    def _hide(self, ids: Sequence[str], statement: Update) -> None:
        connections = []

        def hide(connection: Connection) -> None:
            connections.append(connection)
            connection.execute(statement)

        self._transact(hide)
        if len(connections) > 1:
            # It was repeated, and has skipped what a lost connection holds.  If that is committed after the messages
            # were read, they are removed without a copy: wait until it is or is not.
            self._execute(select(MESSAGES.c.id).where(MESSAGES.c.id.in_(ids)).with_for_update())

    def _taking(self, state: str, ids: Sequence[str]) -> Update:
        found = select(MESSAGES.c.id).where(MESSAGES.c.id.in_(ids), state_is(state))
        if self._database.dialect == 'sqlite':
            return update(MESSAGES).where(MESSAGES.c.id.in_(found))
        picked: CTE = found.with_for_update(skip_locked=True).cte('picked')
        return update(MESSAGES).where(MESSAGES.c.id == picked.c.id)

    def _put_back(self, claim: str, state: str, id: str) -> None:
        self._execute(update(MESSAGES).where(*_claimed(claim), MESSAGES.c.id == id).values(state=state, **UNCLAIMED))

    def _rows(self, statement: Any) -> Sequence[Row[Any]]:
        with blaming_configuration():
            return self._database.run(lambda connection: connection.execute(statement).all(), LONG_SECONDS)

    # -- what comes

    def stage(self, batch: str, parcels: Sequence[Parcel]) -> list[str]:
        """See `Side`."""
        now = self._queue.leases.clock()
        rows = [{**_row(parcel, now), **_mark(_claim(batch, IN, parcel.state))} for parcel in parcels]
        large = [content for row in rows if (content := separated(row)) is not None]
        statement = insert(MESSAGES).values(lease=database_time() + LEASE)

        def insert_all(connection: Connection) -> None:
            connection.execute(statement, rows)
            if large:
                connection.execute(insert(CONTENTS), large)

        try:
            self._transact(insert_all)
        except QueueError as error:
            if isinstance(error.__cause__, (DataError, IntegrityError)):
                raise DoesNotFit(str(error)) from error
            raise
        return [row['id'] for row in rows]

    # -- how it ends

    def unfinished(self) -> set[str]:
        """
        See `Side`.

        A batch that an earlier move has begun can be that of a copy of this directory, which is at work elsewhere.
        """
        directory = f'move:{self._record.directory}.'
        is_over = or_(MESSAGES.c.claim.startswith(f'{directory}{self._record.run}.'), has_run_out())
        ours = (state_is('in doubt'), MESSAGES.c.claim.startswith(directory), is_over)
        found = self._rows(select(MESSAGES.c.claim).where(*ours).distinct())
        return {match[1] for (claim,) in found if (match := _CLAIM.fullmatch(claim))}

    def remove(self, batch: str, role: str) -> None:
        """See `Side`."""
        for state in self._states_of(batch, role):
            self._execute(delete(MESSAGES).where(*_claimed(_claim(batch, role, state))))

    def publish(self, batch: str, role: str) -> None:
        """See `Side`."""
        for state in self._states_of(batch, role):
            is_meant = _claimed(_claim(batch, role, state))
            self._execute(update(MESSAGES).where(*is_meant).values(state=state, **UNCLAIMED))
            self._queue.tell_news()

    def _states_of(self, batch: str, role: str) -> list[str]:
        """
        Return the states that the rows in this role are to have; a batch has one.

        Without rows nothing is written: a database that takes no changes must not keep messages from going back into
        the directory.
        """
        states = {_claim(batch, role, state): state for state in MOVED}
        found = select(MESSAGES.c.claim).where(state_is('in doubt'), MESSAGES.c.claim.in_([*states])).distinct()
        return [states[claim] for (claim,) in self._rows(found)]


def schema_of(database: Database) -> str:
    """Return the schema of the tables, which depends on the user of the database; '' if it has none."""
    return '' if database.dialect == 'sqlite' else database.run(current_schema) or ''


@contextmanager
def blaming_configuration() -> Iterator[None]:
    """Raise ConfigurationError for a missing table or right: these do not pass by themselves."""
    try:
        yield
    except QueueError as error:
        if isinstance(error.__cause__, ProgrammingError):
            raise translated(ConfigurationError(str(error)), error) from error
        raise


# The application may have switched it off, to commit faster.
_SYNCHRONOUS = text(
    "SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'"
)


def _claim(batch: str, role: str, state: str) -> str:
    return f'move:{batch}.{role}.{state}'


def _claimed(claim: str) -> tuple[Any, ...]:
    return state_is('in doubt'), MESSAGES.c.claim == claim


def _mark(claim: str) -> dict[str, Any]:
    return {'state': 'in doubt', 'claim': claim, 'claimed_by': f'mq-queue move, {name_of_this_host()}:{os.getpid()}'}


def _out_of_reach(claim: str) -> dict[str, Any]:
    return {**_mark(claim), 'lease': database_time() + LEASE}


def _parcel(state: str, row: Row[Any]) -> Parcel:
    """Return the row as a :class:`Parcel`; raises if no queue file can be made of it."""
    envelope = Envelope(row.sender, recipients_of(row.recipients), b'')
    header = QueueHeader(
        envelope.sender, envelope.recipients, row.queued_at, row.attempts, row.last_attempt, row.last_reply
    )
    serialize_header(header)
    begin = _ID_TIME.match(row.id)
    born = int(begin[0], 16) / 1_000_000 if begin else row.queued_at
    return Parcel(row.id, state, _within(born), _within(row.due), header, row.content, deaths=row.deaths)


def _within(seconds: float) -> float:
    if not math.isfinite(seconds):
        raise ValueError(f'{seconds} is no time')
    return min(max(seconds, _LONGEST_AGO), _LATEST)


def _row(parcel: Parcel, now: float) -> dict[str, Any]:
    header = parcel.header
    subject, message_id = tell_from_header(parcel.content)
    # In a database only the due time lets a message wait behind others.
    due = max(parcel.due, now) if parcel.stumbles else parcel.due
    born = min(_within(parcel.born), (1 << 52) / 1_000_000 - 1)
    return {
        'id': f'{round(born * 1_000_000):013x}{secrets.token_hex(5)}',
        'due': due,
        'attempts': header.attempts,
        'deaths': parcel.deaths,
        'queued_at': header.queued_at,
        'last_attempt': header.last_attempt,
        'last_reply': header.last_reply.replace('\0', ' '),
        'sender': header.sender,
        'recipients': [*header.recipients],
        'message_id': message_id,
        'subject': subject.replace('\0', '\N{REPLACEMENT CHARACTER}'),
        'content': parcel.content,
    }
