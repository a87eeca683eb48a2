"""
What this process holds of a queue in a database.

A claim is a lease: it ends by itself when its process dies, and nobody has to find that out.  For as long as the
process lives, a thread of it (the heartbeat) prolongs the leases at a third of their length, and writes what became of
messages:

* Messages that are done are deleted together: :data:`ENOUGH` of them, or what there is :data:`LINGER` seconds after the
  first.  When there are :data:`BATCH` whoever delivers writes them before it goes on, so they are all that a death of
  the process can send twice; while the database is away, what was claimed before is added to them.
* Any other end is written by who settles it, before :meth:`Leases.settle` returns.
* What cannot be written because the database is away is written when it is back.

A process that was paused (SIGSTOP, a machine that was suspended) for longer than a lease may have lost its claims
without having seen it.  So whoever is about to send asks :meth:`Leases.make_sure`, which looks at a clock, and where
little is left of the lease asks the database.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Protocol

from sqlalchemy import select, update

from pyramid_mailqueue.delivery.logs import Log, log_event, queue_log
from pyramid_mailqueue.delivery.results import Settlement
from pyramid_mailqueue.exceptions import MailqueueError, QueueError
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.queues.sql_database import Database, DatabaseAway
from pyramid_mailqueue.queues.sql_outcomes import Claimed, delete_done, in_ascii, named, owned, release, settle
from pyramid_mailqueue.queues.sql_tables import MESSAGES, database_time

__all__ = ['BATCH', 'ENOUGH', 'LINGER', 'Leases', 'elapsed']

log = Log('mailqueue.delivery')

#: How many messages that are done are not deleted, at most.
BATCH = 100

#: How many of them are enough to begin with, so that whoever delivers need not wait for it.
ENOUGH = BATCH // 2

#: How long they wait for others, in seconds.
LINGER = 0.05

#: How long the heartbeat waits before it tries again what has failed, in seconds.
PATIENCE = 1

#: How long the end of a process waits for the heartbeat, in seconds.
CLOSING_PATIENCE = 5

#: How long the heartbeat stays when there is nothing to do, in seconds.
IDLE = 10


class HeldClaim(Claimed, Protocol):
    """What is noted of a claim while it is held."""

    # Until when the lease holds at least, by the timer; whether the row was seen; and whether its end was not refused.
    deadline: float
    is_confirmed: bool
    is_written: bool


def elapsed() -> float:
    """Return seconds that never go back, and that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC))


class Leases:
    """
    See the module.

    :param lease: how long a claim lasts, in seconds, without being prolonged
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
        """In a forked child too: what is held is the parent's."""
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self._held: dict[str, HeldClaim] = {}
        self._ended: deque[tuple[HeldClaim, Settlement | None]] = deque()
        self._under_way = 0
        self._renewed = self.timer()
        self._is_away = False
        self._is_closing = False
        self._thread: threading.Thread | None = None

    # -- claims

    def hold(self, claims: Sequence[HeldClaim]) -> None:
        """Take care of new claims until they end."""
        if not claims:
            return
        with self._changed:
            if not self._held:
                self._renewed = self.timer()
            self._held.update({claim.token: claim for claim in claims})
            self._see_to_thread()

    def holds(self, claim: HeldClaim) -> bool:
        """Whether the claim has not ended."""
        return claim.token in self._held

    def forget(self, claim: HeldClaim) -> bool:
        """End a claim without writing anything; False if it had ended before."""
        with self._changed:
            return self._held.pop(claim.token, None) is not None

    def make_sure(self, claim: HeldClaim) -> bool:
        """Whether the message is still *claim*'s, and will be for long enough to begin sending it."""
        if not self.holds(claim):
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
        """End claims whose messages are not theirs any more."""
        for claim in claims:
            if not self.forget(claim):
                continue
            if claim.is_confirmed:
                reason = 'its lease ran out while this process was paused or cut off; whoever has it now delivers it'
                log_event(queue_log, logging.WARNING, status='lost', id=claim.id, reason=reason)
            else:
                reason = (
                    'its row was not found after the commit: a savepoint of the connection was rolled back, the row is '
                    'in another database or schema than that of mailqueue.sql_url, or somebody else has it'
                )
                log_event(queue_log, logging.WARNING, status='discarded', id=claim.id, reason=reason)

    # -- the ends of claims

    def settle(self, claim: HeldClaim, settlement: Settlement) -> bool:
        """See `IClaim`."""
        if not self.forget(claim):
            return False
        is_done = not (settlement.waiting or settlement.burials)
        with self._changed:
            self._ended.append((claim, settlement))
            number = len(self._ended)
            # What is being written may yet fail.
            may_linger = is_done and number + self._under_way < BATCH and self._has_thread()
            if number in (1, ENOUGH):
                self._changed.notify_all()
        if not may_linger:
            self.flush()
        return claim.is_written

    def release(self, claims: Sequence[HeldClaim]) -> None:
        """See `IClaim`."""
        ended = [claim for claim in claims if self.forget(claim)]
        if ended:
            with self._changed:
                self._ended.extend((claim, None) for claim in ended)
                # Whoever settles one now finds others there, and does not wake the heartbeat.
                self._changed.notify_all()
            self.flush()

    def flush(self) -> None:
        """Write what has ended.  What cannot be written now the heartbeat tries again.  Raises no MailqueueError."""
        with self._writing:
            # What ends in the meantime waits for others, or there would be a statement for each.
            left = len(self._ended)
            while left > 0 and (batch := self._take_ended()):
                left -= len(batch)
                try:
                    self._write(batch)
                except DatabaseAway as error:
                    self._put_back(batch, error)
                    return
                self._under_way = 0
                self._is_away = False

    def _take_ended(self) -> list[tuple[HeldClaim, Settlement | None]]:
        with self._changed:
            self._under_way = min(len(self._ended), BATCH)
            return [self._ended.popleft() for _ in range(self._under_way)]

    def _put_back(self, batch: Sequence[tuple[HeldClaim, Settlement | None]], error: DatabaseAway) -> None:
        with self._changed:
            self._under_way = 0
            self._ended.extendleft(reversed(batch))
            self._see_to_thread()
        if not self._is_away:
            self._is_away = True
            ids = ','.join(claim.id for claim, _ in batch)
            reason = 'what became of these messages is written when the database is back'
            log_event(queue_log, logging.ERROR, status='trouble', id=ids, error=error, reason=reason)

    def _write(self, batch: list[tuple[HeldClaim, Settlement | None]]) -> None:
        """Raises DatabaseAway; then *batch* has what is not written."""
        done = [claim for claim, end in batch if end is not None and not (end.waiting or end.burials)]
        given_back = [claim for claim, end in batch if end is None]
        if done:
            self._write_some(done, lambda: self.database.run(partial(delete_done, claims=done)))
            batch[:] = [(claim, end) for claim, end in batch if claim not in done]
        if given_back:
            self._write_some(given_back, lambda: self.database.run(partial(release, claims=given_back)))
            batch[:] = [(claim, end) for claim, end in batch if claim not in given_back]
        while batch:
            claim, end = batch[0]
            assert end is not None
            claim.is_written = self._write_some([claim], partial(self._settle, claim, end))
            del batch[0]

    def _settle(self, claim: HeldClaim, settlement: Settlement) -> set[str]:
        write = partial(settle, claim=claim, now=self.clock())
        try:
            return self.database.transact(partial(write, settlement=settlement))
        except DatabaseAway:
            raise
        except (QueueError, UnicodeError):
            # What a server has said may have characters that are not in the encoding of the database.
            plain = in_ascii(settlement)
            if plain == settlement:
                raise
            return self.database.transact(partial(write, settlement=plain))

    def _write_some(self, claims: Sequence[HeldClaim], write: Callable[[], set[str]]) -> bool:
        """Whether all was written.  Raises DatabaseAway."""
        try:
            ours = write()
        except DatabaseAway:
            raise
        except MailqueueError as error:
            reason = 'its outcome cannot be written; it waits as it was, and may be delivered again'
            for claim in claims:
                log_event(queue_log, logging.CRITICAL, status='unsettled', id=claim.id, error=error, reason=reason)
            return False
        self._tell_lost(claims, ours)
        return all(claim.token in ours for claim in claims)

    def _tell_lost(self, claims: Collection[HeldClaim], ours: set[str]) -> None:
        for claim in claims:
            if claim.token not in ours:
                reason = 'its lease ran out before its outcome was written; it may be delivered again'
                log_event(queue_log, logging.WARNING, status='lost', id=claim.id, reason=reason)

    def close(self) -> None:
        """Write what has ended, forget what has not, and wait for the heartbeat to end, though not for ever."""
        self.flush()
        with self._changed:
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
            # Too many threads, or the interpreter is about to end: whoever sends prolongs its own lease.
            return False
        self._thread = thread
        return True

    def _beat(self) -> None:
        while self._wait():
            if self._ended:
                self.flush()
            if self._held and self.timer() >= self._renewed + self.lease / 3:
                self._renew_all()

    @property
    def _has_work(self) -> bool:
        return bool(self._ended or self._held)

    @property
    def _is_enough(self) -> bool:
        return self._is_closing or (len(self._ended) >= ENOUGH and not self._is_away)

    def _wait(self) -> bool:
        """Return when there is something to do; False if there was nothing for long."""
        with self._changed:
            if not (self._has_work or self._is_closing):
                self._changed.wait(IDLE)
            if not self._has_work or self._is_closing:
                self._thread = None
                return False
            renewal = self._renewed + self.lease / 3
            while self._held and not self._ended and (rest := renewal - self.timer()) > 0:
                self._changed.wait(rest)
            # What is done waits for others.
            until = time.monotonic() + (PATIENCE if self._is_away else LINGER)
            while self._ended and not self._is_enough and (rest := until - time.monotonic()) > 0:
                self._changed.wait(rest)
        return True

    def _renew_all(self) -> None:
        with self._changed:
            claims = [*self._held.values()]
        self._renewed = self.timer()
        try:
            self._renew(claims)
        except MailqueueError as error:
            log.error('%s The claims of this process could not be prolonged.', error)
            # Not long from now, while there is still time.
            self._renewed += PATIENCE - self.lease / 3

    def _renew(self, claims: Sequence[HeldClaim]) -> None:
        """Prolong leases, and lose the claims whose messages are not theirs any more.  Raises QueueError."""
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

    def _confirm(self, claim: HeldClaim) -> None:
        """Look whether a row is there, or lose the claim.  Raises QueueError."""
        statement = select(MESSAGES.c.claim).where(owned(self.database.dialect))
        if self.database.run(lambda connection: connection.scalar(statement, named([claim]))) is None:
            self.lose([claim])
        else:
            claim.is_confirmed = True
