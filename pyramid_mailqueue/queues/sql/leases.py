"""
The claims that this process holds in a queue in a database.

A claim is a lease: it ends by itself when its process dies, without any detection.  For as long as the process lives,
a thread of it (the heartbeat) renews the leases at a third of their length, and writes the outcomes of messages:

* Messages that are done are deleted together: a deletion begins :data:`RESTS` times as long after the last one as that
  took, and :data:`LINGER` seconds after it at most.  So each is deleted at once if there is little to do, and a
  deletion has many if there is much.  When there are :data:`BATCH`, delivery writes them before it goes on, so they are
  all that a crash of the process can send twice; while the database is away, messages claimed before are added to them.
* Any other end is written before :meth:`Leases.settle` returns.
* What cannot be written now, because the database is away or for another reason, is noted until it is written.  Until
  then no message is begun: it would be sent, and its outcome would not be written either.  So the first end of a
  process is written before the next message.

A claim belongs to the code that delivers it: the references here are weak.  A claim that its owner has lost to an
interruption is released (:meth:`Leases.let_go`).

A process that was paused (SIGSTOP, a machine that was suspended) for longer than a lease may have lost its claims
unnoticed.  So before anything is sent :meth:`Leases.make_sure` looks at a clock, and asks the database if little is
left of the lease.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Protocol
from weakref import WeakValueDictionary

from sqlalchemy import select, update

from pyramid_mailqueue.exceptions import MailqueueError, QueueError, translated
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.logs import Log, log_event, queue_log
from pyramid_mailqueue.queues.sql.database import Database, DatabaseAway
from pyramid_mailqueue.queues.sql.outcomes import (
    UNCHANGED,
    Claimed,
    begin,
    delete_done,
    in_ascii,
    named,
    owned,
    release,
    settle,
)
from pyramid_mailqueue.queues.sql.tables import MESSAGES, database_time
from pyramid_mailqueue.results import Settlement

__all__ = ['BATCH', 'LINGER', 'Leases', 'elapsed']

log = Log('mailqueue.delivery')

#: How many done messages may wait for their deletion, at most.
BATCH = 10

#: How long after the beginning of one deletion the next one begins: at most, in seconds, and as a multiple of the time
#: that one took.  Longer if the process or the database is busy.
LINGER = 0.02
RESTS = 1

#: How long the heartbeat waits before it retries what has failed, in seconds.
PATIENCE = 1

#: The same, at most, after repeated failures.
LONGEST_PAUSE = 10

#: How long the end of a process waits for the heartbeat, in seconds.
CLOSING_PATIENCE = 5

#: How long the heartbeat stays when there is nothing to do, in seconds.
IDLE = 10


class HeldClaim(Claimed, Protocol):
    """What is noted of a claim while it is held."""

    # Until when the lease holds at least, by the timer; and whether the row was seen.
    deadline: float
    is_confirmed: bool
    # Whether a row may wait for its end; and whether its owner has lost it.
    is_open: bool
    is_forgotten: bool


# A claim, and how it ends; None means that the message is released.
_Ended = tuple[HeldClaim, Settlement | None]


def elapsed() -> float:
    """Return seconds that never go back, and that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC))


def _is_done(end: Settlement | None) -> bool:
    return end is not None and not (end.waiting or end.burials)


def _standstill(error: Exception) -> QueueError:
    if isinstance(error, DatabaseAway):
        return error
    problem = f'The outcome of a message cannot be written, so no more mail is delivered for now: {error}'
    return translated(QueueError(problem), error)


class Leases:
    """
    See the module.

    :param lease: how long a claim lasts, in seconds, without being renewed
    :param clock: seconds since the epoch
    :param timer: seconds that never go back
    """

    def __init__(
        self,
        database: Database,
        lease: float,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = elapsed,
    ) -> None:
        self.database = database
        self.lease = lease
        self.clock = clock
        self.timer = timer
        self._start_anew()
        call_in_children(self._start_anew)

    def _start_anew(self) -> None:
        """Start without claims, also in a forked child: those held are the parent's."""
        # Held under its own name: an interruption may keep a Condition from releasing it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._writing = threading.Lock()
        self._held: WeakValueDictionary[str, HeldClaim] = WeakValueDictionary()
        # What is not written yet, by the tokens of the claims.
        self._ended: dict[str, _Ended] = {}
        self._renewed = self.timer()
        self._rests_until = 0.0
        # Why the end of a message cannot be written; the tokens of the messages for which that was logged; how long the
        # heartbeat waits before it tries again; and whether any end was written since.
        self.trouble: QueueError | None = None
        self._told: set[str] = set()
        self._pause = 0.0
        self._is_proven = False
        self._is_closing = False
        self._thread: threading.Thread | None = None

    # -- claims

    def hold(self, claims: Sequence[HeldClaim]) -> None:
        """Keep new claims until they end."""
        if not claims:
            return
        with self._lock:
            if not self._held:
                self._renewed = self.timer()
            self._held.update({claim.token: claim for claim in claims})
            self._see_to_thread()

    def holds(self, claim: HeldClaim) -> bool:
        """Whether the claim has not ended."""
        return claim.token in self._held

    def forget(self, claim: HeldClaim) -> bool:
        """End a claim without writing anything; False if it had ended before."""
        claim.is_open = False
        with self._lock:
            return self._held.pop(claim.token, None) is not None

    def let_go(self, claims: Iterable[HeldClaim]) -> None:
        """
        Release, soon, claims that their owners have lost.

        Called by the garbage collector too, which may have interrupted the holder of the lock: does not wait for it.
        """
        for claim in claims:
            if claim.is_open:
                claim.is_open, claim.is_forgotten = False, True
                self._held.pop(claim.token, None)
                self._ended.setdefault(claim.token, (claim, None))
        if self._lock.acquire(blocking=False):
            try:
                self._changed.notify_all()
            finally:
                self._lock.release()

    def watch(self) -> None:
        """Start the heartbeat for claims that may be let go."""
        with self._lock:
            self._see_to_thread()

    def begin(self, claim: HeldClaim) -> bool:
        """See `IClaim`."""
        if claim.has_begun or not self.holds(claim):
            return self.holds(claim)
        # A claim that is released meanwhile has begun: its death was counted, or there is none to take back.
        claim.has_begun = True
        try:
            is_there = self.database.run(partial(begin, claim=claim))
        except MailqueueError as error:
            log.error('%s The message %s is not sent now.', error, claim.id)
            return False
        if not is_there:
            self.lose([claim])
        claim.is_confirmed = is_there
        return is_there

    def make_sure(self, claim: HeldClaim) -> bool:
        """Whether the message is still *claim*'s, and will be for long enough to begin sending it."""
        if self.trouble is not None or not self.holds(claim):
            return False
        has_time = claim.deadline - self.timer() > self.lease / 3
        if has_time and claim.is_confirmed:
            return True
        try:
            if has_time:
                self._confirm(claim)
            else:
                self._renew([claim])
        except MailqueueError as error:
            log.error('%s The message %s is not sent now.', error, claim.id)
            return False
        return self.holds(claim)

    def lose(self, claims: Collection[HeldClaim]) -> None:
        """End claims that have lost their messages."""
        for claim in claims:
            if not self.forget(claim):
                continue
            if claim.is_confirmed:
                reason = 'its lease ran out while this process was paused or cut off; another process delivers it'
                log_event(queue_log, logging.WARNING, status='lost', id=claim.id, reason=reason)
            else:
                reason = (
                    'its row was not found after the commit: a savepoint of the connection was rolled back, the row is '
                    'in another database or schema than that of mailqueue.sql_url, or another process has it'
                )
                log_event(queue_log, logging.WARNING, status='discarded', id=claim.id, reason=reason)

    # -- the ends of claims

    def settle(self, claim: HeldClaim, settlement: Settlement) -> QueueError | None:
        """See `IClaim`."""
        with self._lock:
            if not self.holds(claim):
                return None
            # In this order: an interruption may have it written twice, but not never.
            self._ended[claim.token] = claim, settlement
            self.forget(claim)
            # Includes what is being written: that may yet fail.
            number = len(self._ended)
            is_trusted = self._is_proven and self.trouble is None
            may_linger = _is_done(settlement) and is_trusted and number < BATCH and self._has_thread()
            if number == 1:
                self._changed.notify_all()
        if may_linger:
            return None
        self.flush()
        return self.trouble

    def release(self, claims: Sequence[HeldClaim]) -> None:
        """See `IClaim`."""
        with self._lock:
            ended = [claim for claim in claims if self.holds(claim)]
            for claim in ended:
                self._ended[claim.token] = claim, None
                self.forget(claim)
            # A settle() from now on finds others there, and does not wake the heartbeat.
            self._changed.notify_all()
        if ended:
            self.flush()

    def flush(self) -> bool:
        """
        Write the ends of claims; return whether there were any.

        The heartbeat retries what cannot be written now.  Raises no Exception.
        """
        with self._writing:
            # Claims that end meanwhile wait for others, or there would be a statement for each.
            ended = [*self._ended.values()]
            try:
                for first in range(0, len(ended), BATCH):
                    self._write(ended[first : first + BATCH])
                    self._is_proven, self.trouble, self._pause = True, None, 0.0
                    self._told.clear()
            except Exception as error:  # noqa: BLE001 - a defect must lose nothing, either
                self._try_later(error)
            return bool(ended)

    def _try_later(self, error: Exception) -> None:
        told, self.trouble = self.trouble, _standstill(error)
        self._is_proven = False
        self._pause = min(2 * self._pause or PATIENCE, LONGEST_PAUSE)
        with self._lock:
            self._see_to_thread()
        if told is None and isinstance(error, DatabaseAway):
            ids = ','.join(claim.id for claim, _ in [*self._ended.values()])
            reason = 'the outcomes of these messages are written when the database is back'
            log_event(queue_log, logging.ERROR, status='trouble', id=ids, error=error, reason=reason)

    def _write(self, batch: Sequence[_Ended]) -> None:
        """Write a batch, and remove it from :attr:`_ended`.  Raises an Exception if a part of it cannot be written."""
        done = [claim for claim, end in batch if _is_done(end)]
        given_back = [claim for claim, end in batch if end is None]
        refusals = [
            self._write_some(done, lambda claims: self.database.run(partial(delete_done, claims=claims))),
            self._write_some(given_back, lambda claims: self.database.run(partial(release, claims=claims))),
        ]
        for claim, end in batch:
            if end is not None and not _is_done(end):
                refusals.append(self._write_some([claim], partial(self._settle, settlement=end)))
        for refusal in filter(None, refusals):
            raise refusal

    def _settle(self, claims: Sequence[HeldClaim], settlement: Settlement) -> set[str]:
        (claim,) = claims
        write = partial(settle, claim=claim, now=self.clock())
        try:
            return self.database.transact(partial(write, settlement=settlement))
        except DatabaseAway:
            raise
        except (QueueError, UnicodeError):
            # A server's reply may have characters that are not in the encoding of the database.
            plain = in_ascii(settlement)
            if plain == settlement:
                raise
            return self.database.transact(partial(write, settlement=plain))

    def _write_some(
        self, claims: Sequence[HeldClaim], write: Callable[[Sequence[HeldClaim]], set[str]]
    ) -> Exception | None:
        """Write the ends of some claims; return why one cannot be written, if so.  Raises DatabaseAway."""
        if not claims:
            return None
        try:
            ours = write(claims)
        except DatabaseAway:
            raise
        except Exception as error:  # noqa: BLE001 - it is logged below, and what has ended stays noted
            if len(claims) == 1:
                return self._refused(claims, error)
            # One of them must not hold back the others.
            refusals = [self._write_some([claim], write) for claim in claims]
            return next(filter(None, refusals), None)
        missing = [claim for claim in claims if claim.token not in ours]
        kept = self._still_there(missing) if missing else set()
        for claim in claims:
            if claim.token not in kept:
                self._tell(claim, is_ours=claim.token in ours)
                self._ended.pop(claim.token, None)
        left = [claim for claim in missing if claim.token in kept]
        return self._refused(left, QueueError(UNCHANGED)) if left else None

    def _still_there(self, claims: Sequence[HeldClaim]) -> set[str]:
        """Return the tokens of those that still hold, although nothing was changed."""
        statement = select(MESSAGES.c.claim).where(owned(self.database.dialect))
        return self.database.run(lambda connection: {*connection.scalars(statement, named(claims))})

    def _refused(self, claims: Sequence[HeldClaim], error: Exception) -> Exception:
        """Log messages whose ends cannot be written, once each; return *error*."""
        reason = 'its outcome cannot be written; no more mail is sent until it can be, and it may be delivered again'
        for claim in claims:
            if claim.token not in self._told:
                log_event(queue_log, logging.CRITICAL, status='unsettled', id=claim.id, error=error, reason=reason)
                if not isinstance(error, MailqueueError):
                    log.critical('A defect of pyramid_mailqueue is in the way of %s', claim.id, exc_info=error)
        self._told.update(claim.token for claim in claims)
        return error

    def _tell(self, claim: HeldClaim, *, is_ours: bool) -> None:
        if claim.is_forgotten:
            # A message without a row was aborted.
            if is_ours:
                reason = 'its delivery was interrupted; it waits'
                log_event(queue_log, logging.WARNING, status='released', id=claim.id, reason=reason)
        elif not is_ours:
            reason = 'its lease ran out before its outcome was written; it may be delivered again'
            log_event(queue_log, logging.WARNING, status='lost', id=claim.id, reason=reason)

    def close(self) -> None:
        """Write what has ended, forget what has not, and wait for the heartbeat to end, but not for ever."""
        self.flush()
        with self._lock:
            self._held.clear()
            self._is_closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(CLOSING_PATIENCE)
        self._is_closing = False

    # -- the heartbeat

    def _see_to_thread(self) -> None:
        """Wake the thread, or start it.  Called with the lock held."""
        self._changed.notify_all()
        self._has_thread()

    def _has_thread(self) -> bool:
        """Whether the thread is there; it is started if it can be.  Called with the lock held."""
        if self._thread is not None and self._thread.is_alive():
            return True
        thread = threading.Thread(target=self._beat, name='mailqueue-leases', daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # Too many threads, or the interpreter is about to end: each delivery renews its own lease.
            return False
        self._thread = thread
        return True

    def _beat(self) -> None:
        while True:
            try:
                while self._wait():
                    self._work()
            except Exception:
                # Without it the claims of this process would be lost.
                log.critical('A defect: the heartbeat of the leases was about to end, and goes on', exc_info=True)
                time.sleep(PATIENCE)
            else:
                return

    def _work(self) -> None:
        began = time.monotonic()
        if self._ended and self.flush():
            now = time.monotonic()
            self._rests_until = now + self._pause if self._pause else began + min(LINGER, RESTS * (now - began))
        if self._held and self.timer() >= self._renewed + self.lease / 3:
            self._renew_all()

    @property
    def _has_work(self) -> bool:
        return bool(self._ended or self._held)

    def _wait(self) -> bool:
        """Wait until there is something to do; False if the thread is to end."""
        with self._lock:
            if not (self._has_work or self._is_closing):
                self._changed.wait(IDLE)
            if not self._has_work or self._is_closing:
                self._thread = None
                return False
            renewal = self._renewed + self.lease / 3
            while self._held and not self._ended and (rest := renewal - self.timer()) > 0:
                # let_go() may not be able to wake this.
                self._changed.wait(min(rest, IDLE))
            # Done messages wait for others.
            while self._ended and not self._is_closing and (rest := self._rests_until - time.monotonic()) > 0:
                self._changed.wait(rest)
        return True

    def _renew_all(self) -> None:
        with self._lock:
            claims = [*self._held.values()]
        self._renewed = self.timer()
        try:
            self._renew(claims)
        except Exception as error:
            is_defect = not isinstance(error, MailqueueError)
            level = logging.CRITICAL if is_defect else logging.ERROR
            log.log(level, '%s The claims of this process could not be prolonged.', error, exc_info=is_defect)
            # Try again soon, while there is still time.
            self._renewed += PATIENCE - self.lease / 3

    def _renew(self, claims: Sequence[HeldClaim]) -> None:
        """Renew leases, and end the claims that have lost their messages.  Raises QueueError."""
        began = self.timer()
        until = database_time() + self.lease
        ours_still = owned(self.database.dialect)
        statement = update(MESSAGES).where(ours_still).values(lease=until).returning(MESSAGES.c.claim)
        ours = self.database.run(lambda connection: {*connection.scalars(statement, named(claims))})
        for claim in claims:
            if claim.token in ours:
                claim.deadline = began + self.lease
                claim.is_confirmed = True
        self.lose([claim for claim in claims if claim.token not in ours])

    def present(self, ids: Sequence[str]) -> Collection[str]:
        """Return which of these messages are there.  Raises QueueError."""
        statement = select(MESSAGES.c.id).where(MESSAGES.c.id.in_(ids))
        return self.database.run(lambda connection: connection.scalars(statement).all())

    def _confirm(self, claim: HeldClaim) -> None:
        """Check that the row is there, or end the claim.  Raises QueueError."""
        statement = select(MESSAGES.c.claim).where(owned(self.database.dialect))
        if self.database.run(lambda connection: connection.scalar(statement, named([claim]))) is None:
            self.lose([claim])
        else:
            claim.is_confirmed = True
