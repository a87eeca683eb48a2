"""One message of a :class:`~.sql.SQLQueue`, claimed for delivery, and the INSERT of a new one."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakSet

from sqlalchemy import Executable, Float, Text, Update, bindparam, func, or_, select, update
from zope.interface import implementer

from pyramid_mailqueue.exceptions import MailqueueError, QueueError, QueueFileError
from pyramid_mailqueue.hosts import name_of_this_host
from pyramid_mailqueue.interfaces import IClaim
from pyramid_mailqueue.logs import log_event, queue_log
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.base import Claim
from pyramid_mailqueue.queues.sql.database import Database
from pyramid_mailqueue.queues.sql.deadlines import CONTENT_SECONDS
from pyramid_mailqueue.queues.sql.engine import AS_BYTES
from pyramid_mailqueue.queues.sql.leases import Leases
from pyramid_mailqueue.queues.sql.outcomes import UNCLAIMED, named, owned, update_recipients
from pyramid_mailqueue.queues.sql.tables import (
    CONTENT,
    INLINE,
    MESSAGES,
    RECIPIENTS,
    database_time,
    is_time,
    recipients_of,
)
from pyramid_mailqueue.results import Settlement

__all__ = [
    'ClaimedRow',
    'Contents',
    'SQLClaim',
    'claim_values',
    'claiming',
    'new_token',
    'separated',
    'this_process',
]


class ClaimedRow(NamedTuple):
    """
    The columns of a row that was claimed; the names are those of :data:`~.sql.tables.MESSAGES`.

    Nothing of it was checked: it is what the row has.

    :param claim: the token that is in the row for as long as the claim holds
    :param recipients: for :func:`~.sql.tables.recipients_of`; None where the envelope is known
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
class SQLClaim(Claim):
    """
    See `IClaim`.

    It holds for as long as its lease does, which *leases* renews.  A process that was paused for longer may have lost
    it to another one: :meth:`is_valid` is asked before sending.

    :param deadline: until when the lease holds at least, by the timer of *leases*
    :param contents: reads the content on demand
    :param envelope: if it is known already, instead of *contents*
    :param is_confirmed: whether the row was seen.  After the commit of a transaction it was not: it may have been
        rolled back with a savepoint
    :param has_begun: see :meth:`begin`
    :ivar is_open: a row may wait for the end of this claim
    :ivar is_forgotten: its owner has lost it
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
        has_begun: bool = True,
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
        self.deadline = deadline
        self.is_confirmed = is_confirmed
        self.has_begun = has_begun
        self.is_open = has_begun
        self.is_forgotten = False
        self._pid = os.getpid()

    @property
    def deaths(self) -> int:
        """See `IClaim`."""
        return self._row.deaths

    def __del__(self) -> None:
        # An interruption (Ctrl-C, the time limit of a server) has taken it from its owner.  In a forked child it is
        # the parent's.
        if self.is_open and self._pid == os.getpid():
            self._leases.let_go([self])

    def __repr__(self) -> str:
        return f'<SQLClaim {self.id}>'

    @property
    def is_over(self) -> bool:
        """Whether it was settled, released or lost."""
        return not self._leases.holds(self)

    def begin(self) -> bool:
        """See `IClaim`."""
        return self._leases.begin(self)

    def is_valid(self) -> bool:
        """See `IClaim`."""
        return self._leases.make_sure(self)

    @property
    def envelope(self) -> Envelope:
        """See `IClaim`.  The content is read from the database on demand."""
        if self._envelope is None:
            self._envelope = self._read()
        return self._envelope

    def _read(self) -> Envelope:
        assert self._contents is not None
        try:
            content = self._contents.take(self)
        except KeyError:
            self._leases.lose([self])
            raise QueueError('another process has it') from None
        with self._put_aside_if_damaged():
            _check(self._row)
            return Envelope(self._row.sender, self._recipients(), content)

    @property
    def recipients(self) -> tuple[str, ...]:
        """See `IClaim`."""
        if self._envelope is not None:
            return self._envelope.recipients
        with self._put_aside_if_damaged():
            return self._recipients()

    def _recipients(self) -> tuple[str, ...]:
        assert self._row.recipients is not None
        return recipients_of(self._row.recipients)

    @contextmanager
    def _put_aside_if_damaged(self) -> Iterator[None]:
        """Raises QueueFileError in the place of TypeError and ValueError."""
        try:
            yield
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
            reason = 'its open recipients cannot be written; it waits as it was, and may be delivered again'
            log_event(queue_log, logging.CRITICAL, status='unsettled', id=self.id, error=error, reason=reason)
            return
        self._envelope = replace(self.envelope, recipients=recipients)
        if not is_ours:
            self._leases.lose([self])

    def settle(self, settlement: Settlement) -> QueueError | None:
        """See `IClaim`.  A done message is deleted a little later, with others (see :mod:`~.sql.leases`)."""
        return self._leases.settle(self, settlement)

    def abandon(self) -> None:
        """See `IClaim`.  Nothing is written: the lease runs out, and the death that was counted for it stays."""
        self._leases.forget(self)

    def release(self) -> None:
        """See `IClaim`."""
        self._leases.release([self])


def _check(row: ClaimedRow) -> None:
    """Check the id, and the values that a retry is computed from.  Raises TypeError or ValueError."""
    if not row.id:
        # The empty id is that of a message in no queue.
        raise ValueError('its id is empty')
    if not is_time(row.queued_at):
        raise ValueError(f'its queued_at is no time: {row.queued_at!r}')
    if not isinstance(row.attempts, int):
        raise TypeError(f'its attempts are no number: {row.attempts!r}')


class Contents:
    """
    The contents of messages that were claimed together.

    They are read when one of them is needed, all of the small ones at once: a query for each message would cost more
    than its delivery.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        # A claim without any other reference leaves this set.
        self._unread: WeakSet[SQLClaim] = WeakSet()
        # By the tokens; any value may be in the column.
        self._read: dict[str, Any] = {}

    def note(self, claims: Iterable[SQLClaim]) -> None:
        """Note the claims of these messages."""
        self._unread = WeakSet(claims)

    def take(self, claim: SQLClaim) -> Any:
        """Return the content of one message; KeyError if it is not *claim*'s any more.  Raises QueueError."""
        with self._lock:
            if claim.token not in self._read:
                self._read.update(self._fetch(claim))
            return self._read.pop(claim.token)

    def _fetch(self, claim: SQLClaim) -> dict[str, Any]:
        others = [it for it in self._unread if it is not claim and not it.is_over]
        self._unread.clear()
        statement, values = _reading(self._database.dialect), {**named([claim, *others]), 'asked': claim.id}
        rows = self._database.run(lambda connection: connection.execute(statement, values).all(), CONTENT_SECONDS)
        return {row.claim: row.content for row in rows if row.claim is not None}


@lru_cache
def _reading(dialect: str) -> Executable:
    is_meant = or_(MESSAGES.c.id == bindparam('asked'), func.length(MESSAGES.c.content) <= INLINE)
    statement = select(MESSAGES.c.claim, CONTENT).where(owned(dialect), is_meant)
    return statement.execution_options(**{AS_BYTES: True})


def separated(values: dict[str, Any]) -> dict[str, Any] | None:
    """Take a large content out of the row of a message; return its own row, if so."""
    if len(values['content']) <= INLINE:
        return None
    content, values['content'] = values['content'], None
    return {'id': values['id'], 'content': content}


def claiming(statement: Update) -> Update:
    """
    Make *statement*, which selects the rows, claim them and return the columns of a :class:`ClaimedRow`.

    It is built once, and executed with the values of :func:`claim_values`.
    """
    lease = database_time() + bindparam('seconds', type_=Float(53))
    values = {
        'state': 'in progress',
        'claimed_by': bindparam('process'),
        'lease': lease,
        'deaths': MESSAGES.c.deaths + 1,
    }
    statement = statement.values(**values, claim=bindparam('token', type_=Text()) + MESSAGES.c.id)
    # As it was before.
    others = {'recipients': RECIPIENTS, 'deaths': (MESSAGES.c.deaths - 1).label('deaths')}
    columns = {name: MESSAGES.c[name] for name in ClaimedRow._fields} | others
    return statement.returning(*columns.values())


def claim_values(leases: Leases) -> dict[str, Any]:
    """Return the values of one execution of a :func:`claiming` statement."""
    return {'process': this_process(), 'seconds': leases.lease, 'token': new_token()}


def this_process() -> str:
    """Return the name of this process, for people who look into the table."""
    return f'{name_of_this_host()}:{os.getpid()}'


def new_token() -> str:
    """Return the beginning of new tokens; the id of a message is the rest."""
    return f'{secrets.token_hex(8)}.'
