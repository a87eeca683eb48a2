"""
The queue in the application's own database: for more than one machine.

A message is a row, INSERTed in the session of the application (:mod:`~.sql.staging`); so it commits with the
application's data or not at all, and any number of ``mq-run --watch`` on any host share the work.  How a message goes
through the table; each arrow is one statement, or one transaction::

       (the application's commit)
           |              |
           a              b
           v              v
       in progress <--c-- waiting <--f-- held, dead
         |  |  |             ^
         |  |  +------d------+
         e  +---------g----> dead
         v
       (gone)

    a  SQLStaging.add: this process will try the message after the commit, so its row comes claimed
    b  the same, for a later run
    c  SQLQueue.claim_due; SQLQueue.claim: an UPDATE that skips rows which others have locked
    d  SQLClaim.settle, if a recipient is still open; SQLClaim.release; SQLQueue.recover, if the lease has run out
    e  SQLClaim.settle: no recipient is open any more.  Such rows are deleted in batches
    f  SQLAdmin
    g  SQLClaim.settle, or SQLQueue.recover after too many deaths

A claim is a lease (:mod:`~.sql.leases`), and each claim has a token of its own in the row: a lost claim can change
nothing.  Leases are measured by the clock of the database, due times by those of the hosts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    CompoundSelect,
    Float,
    Integer,
    Text,
    Update,
    bindparam,
    case,
    func,
    literal_column,
    not_,
    or_,
    select,
    tuple_,
    union_all,
    update,
)
from zope.interface import implementer

from pyramid_mailqueue.exceptions import ConfigurationError, QueueError, translated
from pyramid_mailqueue.interfaces import ISessionQueue
from pyramid_mailqueue.logs import log_event, queue_log
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.base import MailQueue
from pyramid_mailqueue.queues.entries import STATES
from pyramid_mailqueue.queues.sql.admin import SQLAdmin
from pyramid_mailqueue.queues.sql.claim import (
    ClaimedRow,
    Contents,
    SQLClaim,
    claim_values,
    claiming,
)
from pyramid_mailqueue.queues.sql.database import Database
from pyramid_mailqueue.queues.sql.deadlines import LOOK_SECONDS
from pyramid_mailqueue.queues.sql.leases import Leases
from pyramid_mailqueue.queues.sql.notify import listening, tell
from pyramid_mailqueue.queues.sql.outcomes import IS_SEEN, UNCLAIMED, state_is, try_everything
from pyramid_mailqueue.queues.sql.tables import ASIDE, CONTENTS, MESSAGES, database_time, has_run_out
from pyramid_mailqueue.results import Recovery

if TYPE_CHECKING:
    from pyramid_mailqueue.queues.sql.intake import Intake
    from pyramid_mailqueue.queues.sql.staging import SQLStaging

__all__ = ['SQLQueue']

#: How many messages are claimed at once, at most.  A run begins with one, and claims twice as many each time.  Not many
#: more than are in progress: if the process crashes, it counts as a death for each.
CLAIM_BATCH = 10

#: A message whose claims ran out this often is given up: it may well be the cause.
MAX_DEATHS = 5


@implementer(ISessionQueue)
class SQLQueue(MailQueue):
    """
    See `ISessionQueue`.

    :param url: the database, as SQLAlchemy takes it
    :param session_name: the attribute of a request that is the session of the application
    :param lease: how long a claim lasts, in seconds, without being renewed
    :param notify: whether to send and receive notifications of new mail (PostgreSQL)
    :param horizon: as of a `.MaildirQueue`, in seconds
    :param clock: seconds since the epoch
    :raises ConfigurationError: this is no database for a queue
    """

    def __init__(
        self,
        url: str,
        *,
        session_name: str = 'dbsession',
        lease: float = 300,
        notify: bool = False,
        horizon: float = 4000 + 86400,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.session_name = session_name
        self.notify = notify
        self.horizon = horizon
        self.database = Database(url)
        self.leases = Leases(self.database, lease, clock)
        self._clock = clock
        self._can_write = False

    def __repr__(self) -> str:
        return f'<SQLQueue {self.database.name}>'

    # -- into the queue

    @cached_property
    def _intake(self) -> Intake:
        # With the first message: delivery does not need the ORM of SQLAlchemy.
        from pyramid_mailqueue.queues.sql.intake import Intake

        return Intake(self.database, self.leases)

    def staging(self) -> SQLStaging:
        """See `IMailQueue`."""
        return self._intake.staging(self.tell_news)

    def takes_part(self, session: Any, manager: Any) -> bool:
        """See `ISessionQueue`."""
        return self._intake.takes_part(session, manager)

    def put_in(self, session: Any, envelope: Envelope) -> str:
        """See `ISessionQueue`."""
        return self._intake.put_in(session, envelope)

    def put(self, envelope: Envelope) -> str:
        """See `IMailQueue`."""
        message = self._intake.put(envelope, claimed=False)
        self.tell_news()
        return message.id

    def put_claimed(self, envelope: Envelope) -> SQLClaim:
        """See `IMailQueue`."""
        claim = self._intake.put(envelope, claimed=True).claim
        assert claim is not None
        self.leases.hold([claim])
        return claim

    def tell_news(self) -> None:
        """Notify waiting runs of mail that is not claimed.  Raises nothing."""
        if self.notify:
            tell(self.database)

    def listening(self, on_news: Callable[[], None]) -> AbstractContextManager[None]:
        """See `IMailQueue`."""
        return listening(self.database, on_news) if self.notify else nullcontext()

    # -- out of the queue

    def claim_due(self, now: float) -> Iterator[SQLClaim]:
        """See `IMailQueue`.  A few are claimed together, more each time."""
        self._make_sure_of_writing()
        self._make_misdated_due(now)
        last, size = (-math.inf, ''), 1
        while True:
            claims = self._claim_after(last, now, size)
            left = iter(claims)
            try:
                for claim in left:
                    if not claim.is_over:
                        yield claim
            finally:
                self.leases.release([*left])
            if len(claims) < size:
                return
            last, size = (claims[-1].due, claims[-1].id), min(2 * size, CLAIM_BATCH)

    def _make_misdated_due(self, now: float) -> None:
        is_misdated = (state_is('waiting'), self._is_misdated)
        # Found at the end of an index; such rows are few, and rare.
        latest = select(func.max(MESSAGES.c.due)).where(state_is('waiting')).scalar_subquery()
        if not self.database.run(lambda connection: connection.scalar(select(_is_after(self.horizon, latest)))):
            return
        due = case((database_time() < now, database_time()), else_=now)
        reason = 'its due time was further away than any retry: a clock was wrong when it was written; it is due now'
        for name in self._ids_of(update(MESSAGES).where(*is_misdated).values(due=due)):
            log_event(queue_log, logging.WARNING, status='trouble', id=name, reason=reason)

    @property
    def _is_misdated(self) -> ColumnElement[bool]:
        """The rows whose due time no policy can have given, by the one clock that all hosts have in common."""
        return _is_after(self.horizon)

    def count_misdated(self) -> int:
        """See `IMailQueue`."""
        return self._count(self._is_misdated)

    def _count(self, *conditions: ColumnElement[bool]) -> int:
        statement = select(func.count()).where(state_is('waiting'), *conditions)
        return self.database.run(lambda connection: connection.scalar(statement), LOOK_SECONDS) or 0

    def _claim_after(self, last: tuple[float, str], now: float, size: int) -> list[SQLClaim]:
        meant = {'now': now, 'last_due': last[0], 'last_id': last[1], 'size': size}
        return self._claimed(_claiming_due(self.database.dialect), meant)

    def claim(self, id: str) -> SQLClaim | None:
        """See `IMailQueue`."""
        meant = {'now': self._clock(), 'meant': id, 'horizon': self.horizon}
        return next(iter(self._claimed(_claiming_one(), meant)), None)

    def _claimed(self, statement: Update, meant: Mapping[str, Any]) -> list[SQLClaim]:
        """Claim the rows that are *meant*, and return their claims in the order of due times."""
        if self.leases.trouble is not None:
            raise self.leases.trouble
        values = {**meant, **claim_values(self.leases)}
        deadline = self.leases.timer() + self.leases.lease
        rows = self.database.run(lambda connection: connection.execute(statement, values).all())
        contents = Contents(self.database)
        claims = [SQLClaim(self.leases, ClaimedRow(*row), deadline, contents=contents) for row in rows]
        contents.note(claims)
        claims.sort(key=lambda claim: (claim.due, claim.id))
        self.leases.hold(claims)
        return claims

    def count_due(self, now: float) -> int:
        """See `IMailQueue`."""
        return self._count(or_(MESSAGES.c.due <= now, self._is_misdated))

    # -- what dead processes left

    def recover(self, now: float) -> Recovery:
        """See `IMailQueue`.  No commit is ever in doubt here: the row commits with the rest, or does not."""
        ran_out = (state_is('in progress'), has_run_out())
        bury = update(MESSAGES).where(*ran_out, MESSAGES.c.deaths >= MAX_DEATHS)
        reason = f'given up: the process that delivered it died, or was cut off, {MAX_DEATHS} times'
        bury = bury.values(state='dead', deaths=0, last_attempt=now, last_reply=reason, **UNCLAIMED)
        # After all that is due now, if a process crashed while delivering it.
        due = case((MESSAGES.c.deaths > 0, min(now, self._clock())), else_=MESSAGES.c.due)
        wait = update(MESSAGES).where(*ran_out).values(state='waiting', due=due, **UNCLAIMED)
        buried, orphans = (self._ids_of(statement) for statement in (bury, wait))
        return Recovery(orphans=orphans, buried=buried, half_way=self._half_way())

    def _make_sure_of_writing(self) -> None:
        """Raise an error if the outcomes of messages cannot be written: they would be sent again and again."""
        trouble = self.flush()
        if trouble is not None:
            self._can_write = False
            raise trouble
        if not self._can_write:
            self.check_rights('mq-run')
            self._can_write = True

    def check_rights(self, who: str) -> None:
        """Raise ConfigurationError if the user of the database may not do all that *who* does; else QueueError."""
        try:
            self.database.try_out(try_everything)
        except ConfigurationError as error:
            raise translated(
                ConfigurationError(
                    f'{error} {who} needs a user in mailqueue.sql_url who may SELECT, INSERT, UPDATE and DELETE in '
                    f'{MESSAGES.name}, and SELECT and INSERT in {CONTENTS.name}.'
                ),
                error,
            ) from error

    def _half_way(self) -> tuple[str, ...]:
        found = select(MESSAGES.c.id).where(state_is('in doubt'), IS_SEEN).order_by(MESSAGES.c.id)
        return tuple(self.database.run(lambda connection: connection.scalars(found).all()))

    def _ids_of(self, statement: Update) -> tuple[str, ...]:
        with_ids = statement.returning(MESSAGES.c.id)
        return tuple(sorted(self.database.run(lambda connection: connection.scalars(with_ids).all())))

    def flush(self) -> QueueError | None:
        """See `IMailQueue`."""
        self.leases.flush()
        return self.leases.trouble

    def hurry(self, seconds: float) -> None:
        """See `IMailQueue`."""
        self.database.deadlines.hurry(seconds)

    # -- for people

    @property
    def admin(self) -> SQLAdmin:
        """See `IMailQueue`."""
        return SQLAdmin(self.database, self.leases, self._clock)

    def counts(self) -> dict[str, int]:
        """See `IMailQueue`."""
        self.leases.flush()
        found = self.database.run(lambda connection: dict(map(tuple, connection.execute(_counting()))), LOOK_SECONDS)
        # No index has the rows with an unknown state.
        counts = {state: found.get(state, 0) for state in STATES}
        counts['corrupt'] += found[_ALL] - sum(counts.values())
        counts['in doubt'] -= found[_UNSEEN]
        return counts

    def count_waiting(self, most: int) -> int:
        """See `IMailQueue`.  Called after each round that has sent something, when many rows may be left."""
        self.leases.flush()
        some = select(literal_column('1')).where(state_is('waiting')).limit(most + 1).subquery()
        return self.database.run(lambda c: c.scalar(select(func.count()).select_from(some))) or 0

    def close(self) -> None:
        """
        Write what has ended, and close the connections.

        What this process still holds waits until its leases have run out, unless it is released.
        """
        self.leases.close()
        self.database.close()

    def check(self) -> None:
        """Raise ConfigurationError if the tables are missing, or those of another version; else DatabaseAway."""
        with _blaming_setting():
            self.database.check()

    def create_tables(self) -> None:
        """Create the tables that are missing.  Raises ConfigurationError if there can be none, or DatabaseAway."""
        with _blaming_setting():
            self.database.create_tables()
            self.database.check()


@contextmanager
def _blaming_setting() -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise translated(ConfigurationError(f'mailqueue.queue = sql: {error}'), error) from error


# In the place of a state: all rows, and those in doubt that a move is working on.
_ALL, _UNSEEN = 'all', 'unseen'


@lru_cache
def _counting() -> CompoundSelect[Any]:
    """
    Return a statement that yields each state with its number of rows, and so :data:`_ALL` and :data:`_UNSEEN`.

    Each is answered by an index alone, as far as VACUUM has seen the rows: no column is asked for that is not in it.
    """
    is_meant: dict[str, tuple[ColumnElement[bool], ...]] = {
        'waiting': (state_is('waiting'),),
        'in progress': (state_is('in progress'),),
        _UNSEEN: (state_is('in doubt'), not_(IS_SEEN)),
        _ALL: (),
    }
    each = [
        select(literal_column(f"'{name}'", Text()), func.count()).select_from(MESSAGES).where(*conditions)
        for name, conditions in is_meant.items()
    ]
    return union_all(*each, select(MESSAGES.c.state, func.count()).where(state_is(*ASIDE)).group_by(MESSAGES.c.state))


@lru_cache
def _claiming_due(dialect: str) -> Update:
    """Return a statement that claims the first *size* rows behind (*last_due*, *last_id*) that are due *now*."""
    last = tuple_(bindparam('last_due', type_=Float(53)), bindparam('last_id', type_=Text()))
    found = (
        select(MESSAGES.c.id)
        .where(state_is('waiting'), MESSAGES.c.due <= bindparam('now'), tuple_(MESSAGES.c.due, MESSAGES.c.id) > last)
        .order_by(MESSAGES.c.due, MESSAGES.c.id)
        .limit(bindparam('size', type_=Integer()))
    )
    if dialect == 'sqlite':
        return claiming(update(MESSAGES).where(MESSAGES.c.id.in_(found)))
    picked: CTE = found.with_for_update(skip_locked=True).cte('picked')
    return claiming(update(MESSAGES).where(MESSAGES.c.id == picked.c.id))


def _is_after(seconds: Any, due: Any = MESSAGES.c.due) -> ColumnElement[bool]:
    """Whether *due* is later than so many seconds from now."""
    # A subquery is evaluated once, so an index can be used: the time of the database changes from row to row.
    is_one: ColumnElement[bool] = due > select(database_time() + seconds).scalar_subquery()
    return is_one


@lru_cache
def _claiming_one() -> Update:
    """Return a statement that claims the row whose id is *meant*, if it is due *now*."""
    is_due = or_(MESSAGES.c.due <= bindparam('now'), _is_after(bindparam('horizon', type_=Float(53))))
    is_meant = (MESSAGES.c.id == bindparam('meant'), state_is('waiting'), is_due)
    return claiming(update(MESSAGES).where(*is_meant))
