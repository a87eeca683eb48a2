"""One message of a :class:`~.sql.SQLQueue`, taken for delivery, and how a new one comes into its table."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import Executable, Float, Insert, Text, Update, bindparam, func, insert, or_, select, update
from zope.interface import implementer

from pyramid_mailqueue.delivery.logs import log_event, queue_log
from pyramid_mailqueue.delivery.results import Settlement
from pyramid_mailqueue.envelope import Envelope
from pyramid_mailqueue.exceptions import MailqueueError, QueueError, QueueFileError
from pyramid_mailqueue.hosts import name_of_this_host
from pyramid_mailqueue.interfaces import IClaim
from pyramid_mailqueue.queues.entries import subject_of
from pyramid_mailqueue.queues.sql_database import Database
from pyramid_mailqueue.queues.sql_engine import AS_BYTES
from pyramid_mailqueue.queues.sql_leases import Leases
from pyramid_mailqueue.queues.sql_outcomes import UNCLAIMED, named, owned, update_recipients
from pyramid_mailqueue.queues.sql_tables import CONTENT, MESSAGES, RECIPIENTS, database_time, is_time, recipients_of

__all__ = ['ClaimedRow', 'Contents', 'NewMessage', 'SQLClaim', 'claim_values', 'claiming']

#: Contents of so many octets at most are read together.
SMALL = 64 * 1024


class ClaimedRow(NamedTuple):
    """
    What is known of a row that was claimed; the names are those of :class:`~.sql_tables.MESSAGES`.

    Nothing of it was checked: it is what somebody has written into the row.

    :param claim: the token that is in the row for as long as the claim holds
    :param recipients: for :func:`~.sql_tables.recipients_of`; None where the envelope is known
    """

    id: str
    claim: str
    due: float
    attempts: int
    queued_at: float
    sender: str
    recipients: str | None
    deaths: int = 0


@implementer(IClaim)
class SQLClaim:
    """
    See `IClaim`.

    It holds for as long as its lease does, which *leases* prolongs.  A process that was paused for longer may have lost
    it to another one: whoever is about to send asks :meth:`is_valid`.

    :param deadline: until when the lease holds at least, by the timer of *leases*
    :param contents: reads the content when somebody asks for it
    :param envelope: where it is known already, in the place of *contents*
    :param is_confirmed: whether the row was seen.  That of a transaction that has just committed was not: it may have
        gone with a savepoint
    """

    def __init__(
        self,
        leases: Leases,
        row: ClaimedRow,
        deadline: float,
        *,
        contents: Contents | None = None,
        envelope: Envelope | None = None,
        is_confirmed: bool = True,
    ) -> None:
        self._leases = leases
        self._contents = contents
        self._row = row
        self._envelope = envelope
        self.id = row.id
        self.token = row.claim
        self.attempts = row.attempts
        self.queued_at = row.queued_at
        self.due = row.due
        self.deaths = row.deaths
        self.deadline = deadline
        self.is_confirmed = is_confirmed
        self.is_written = True

    def __repr__(self) -> str:
        return f'<SQLClaim {self.id}>'

    @property
    def is_over(self) -> bool:
        """Whether it was settled, released or lost."""
        return not self._leases.holds(self)

    def is_valid(self) -> bool:
        """See `IClaim`."""
        return self._leases.make_sure(self)

    @property
    def envelope(self) -> Envelope:
        """See `IClaim`.  The content is read from the database when somebody asks for it."""
        if self._envelope is None:
            self._envelope = self._read()
        return self._envelope

    def _read(self) -> Envelope:
        assert self._contents is not None
        assert self._row.recipients is not None
        content = self._contents.take(self)
        if content is None:
            self._leases.lose([self])
            raise QueueError('somebody else has it')
        try:
            _check(self._row)
            return Envelope(self._row.sender, recipients_of(self._row.recipients), content)
        except (TypeError, ValueError) as error:
            self._put_aside(str(error))
            raise QueueFileError(f'its row is damaged: {error}') from error

    def _put_aside(self, problem: str) -> None:
        values = {'state': 'corrupt', 'last_reply': problem.replace('\0', ' '), **UNCLAIMED}
        database = self._leases.database
        statement = update(MESSAGES).where(owned(database.dialect)).values(**values)
        database.run(lambda connection: connection.execute(statement, named([self])))
        self._leases.forget(self)
        log_event(queue_log, logging.ERROR, status='corrupt', id=self.id, error=problem)

    def keep(self, recipients: tuple[str, ...]) -> None:
        """See `IClaim`."""
        if self.is_over:
            return
        try:
            is_ours = self._leases.database.run(lambda connection: update_recipients(connection, self, recipients))
        except MailqueueError as error:
            reason = 'who has the message cannot be written; it waits as it was, and may be delivered again'
            log_event(queue_log, logging.CRITICAL, status='unsettled', id=self.id, error=error, reason=reason)
            return
        self._envelope = replace(self.envelope, recipients=recipients)
        if not is_ours:
            self._leases.lose([self])

    def settle(self, settlement: Settlement) -> bool:
        """See `IClaim`.  What is done is deleted a little later, with others (see :mod:`~.sql_leases`)."""
        return self._leases.settle(self, settlement)

    def release(self) -> None:
        """See `IClaim`."""
        self._leases.release([self])


def _check(row: ClaimedRow) -> None:
    """Its name, and what a retry is reckoned with.  Raises TypeError or ValueError."""
    if not row.id:
        # That is what a message is called which is in no queue.
        raise ValueError('its id is empty')
    if not is_time(row.queued_at):
        raise ValueError(f'its queued_at is no time: {row.queued_at!r}')
    if not isinstance(row.attempts, int):
        raise TypeError(f'its attempts are no number: {row.attempts!r}')


class Contents:
    """
    The contents of messages that were claimed together.

    They are read when one of them is asked for, all of the small ones at once: one question for each message would cost
    more than its delivery.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._unread: list[SQLClaim] = []
        self._read: dict[str, bytes] = {}

    def note(self, claims: Iterable[SQLClaim]) -> None:
        """Note the claims of these messages."""
        self._unread = [*claims]

    def take(self, claim: SQLClaim) -> bytes | None:
        """Return the content of one message; None if it is not *claim*'s any more.  Raises QueueError."""
        with self._lock:
            if claim.token not in self._read:
                self._read.update(self._fetch(claim))
            return self._read.pop(claim.token, None)

    def _fetch(self, claim: SQLClaim) -> dict[str, bytes]:
        others, self._unread = [it for it in self._unread if it is not claim and not it.is_over], []
        statement, values = _reading(self._database.dialect), {**named([claim, *others]), 'asked': claim.id}
        rows = self._database.run(lambda connection: connection.execute(statement, values).all())
        return {row.claim: row.content for row in rows if row.claim is not None}


@lru_cache
def _reading(dialect: str) -> Executable:
    is_meant = or_(MESSAGES.c.id == bindparam('asked'), func.length(MESSAGES.c.content) <= SMALL)
    statement = select(MESSAGES.c.claim, CONTENT).where(owned(dialect), is_meant)
    return statement.execution_options(**{AS_BYTES: True})


@dataclass(frozen=True)
class NewMessage:
    """
    A message that is on its way into the table.

    :param statement: inserts it, given *values*
    :param values: its row
    :param claim: the claim that will hold when the row is there; None if it is to wait
    """

    id: str
    envelope: Envelope
    statement: Insert
    values: dict[str, Any]
    claim: SQLClaim | None

    @classmethod
    def made_of(cls, envelope: Envelope, leases: Leases, *, claimed: bool) -> NewMessage:
        """Return a message that is due now, claimed by this process or not."""
        now, deadline = leases.clock(), leases.timer() + leases.lease
        name = f'{int(now * 1_000_000):013x}{secrets.token_hex(5)}'
        values = {
            'id': name,
            'state': 'waiting',
            'due': now,
            'queued_at': now,
            'sender': envelope.sender,
            'recipients': [*envelope.recipients],
            'message_id': envelope.message_id,
            'subject': subject_of(envelope.content).replace('\0', '\ufffd'),
            'content': envelope.content,
        }
        if not claimed:
            return cls(name, envelope, _inserting(None), values, None)
        token = _new_token() + name
        row = ClaimedRow(name, token, now, 0, now, envelope.sender, None)
        claim = SQLClaim(leases, row, deadline, envelope=envelope)
        values |= {'state': 'in progress', 'claim': token, 'claimed_by': _this_process()}
        return cls(name, envelope, _inserting(leases.lease), values, claim)


@lru_cache(maxsize=4)
def _inserting(lease: float | None) -> Insert:
    """
    Return a statement that inserts what it is given, and the end of a lease of so many seconds.

    It is about the mapped class: who listens to a session takes no notice of one about the table.  Always the same
    statement is a third faster than a new one with values in it, and so is ``raw``, which says that values go by names
    of columns.
    """
    # With the first message: whoever only delivers does not need it.
    from pyramid_mailqueue.queues.sql_schema import Message

    statement = insert(Message).execution_options(autoflush=False, dml_strategy='raw')
    return statement if lease is None else statement.values(lease=database_time() + lease)


def claiming(statement: Update) -> Update:
    """
    Let *statement*, which says which rows are meant, claim them, and return what becomes a :class:`ClaimedRow`.

    It is put together once, and executed with the values of :func:`claim_values`.
    """
    lease = database_time() + bindparam('seconds', type_=Float(53))
    values = {'state': 'in progress', 'claimed_by': bindparam('process'), 'lease': lease}
    statement = statement.values(**values, claim=bindparam('token', type_=Text()) + MESSAGES.c.id)
    columns = {name: MESSAGES.c[name] for name in ClaimedRow._fields} | {'recipients': RECIPIENTS}
    return statement.returning(*columns.values())


def claim_values(leases: Leases) -> dict[str, Any]:
    """Return the values of one execution of a :func:`claiming` statement."""
    return {'process': _this_process(), 'seconds': leases.lease, 'token': _new_token()}


def _this_process() -> str:
    return f'{name_of_this_host()}:{os.getpid()}'


def _new_token() -> str:
    """The beginning of tokens that nobody had before; the id of a message is the rest."""
    return f'{secrets.token_hex(8)}.'
