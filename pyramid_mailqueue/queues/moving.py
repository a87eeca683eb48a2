"""
Move messages from one queue to another; each is in exactly one of them whenever the process dies.

A batch of messages moves by two-phase commit between the two queues, and the directory, which is one of them, keeps the
record of the decision::

    take     source: the messages of the batch are out of reach, durably      (new/ -> moving/, or state "in doubt")
    stage    target: copies of them, out of reach too, durably
    decide   a file moving/.decided-BATCH, durably
    end      source: the originals are removed; then target: the copies are published; then the decision is forgotten

Out of reach means that no worker claims the message, no orphan rule applies to it, and no command changes it.  It
carries the name of its batch, its role (:data:`OUT` of this queue, or :data:`IN`), and the state that it is to have.

After a crash the next move, in either direction, begins with what is left.  It ends a batch that was decided.  For one
that was not, it first removes the copies, then puts back the originals.  Both go by the name of the batch, and may be
repeated.  Until then such messages are *in doubt*, in both queues; they do not come back by themselves.

A lock lets one move at a time work on a directory.  The name of a batch is new each time, so that a statement which
reaches the database after its process has died cannot mix with a later batch; what it has written is put back or
removed as an undecided batch.

Why the removal of the originals is not itself the decision (a copy without its original would be published, and one
beside its original removed):

* A statement may reach the database after its process has died.  A copy could arrive when its original was put back and
  delivered: it would be sent again.  An original could be removed after its copy was.
* Once the files are removed, nothing in the directory would tell that copies wait in a database, and in which one.
* Many files are not removed at once: each message would be decided alone, and has to be found in the other queue.

Each of these can be answered, but only with a record in the directory again; the code does not get smaller by that.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from pyramid_mailqueue.exceptions import MailqueueError, QueueError
from pyramid_mailqueue.logs import log_event, queue_log, why
from pyramid_mailqueue.queues.maildir.queue_file import QueueHeader

__all__ = [
    'IN',
    'MOST_MESSAGES',
    'MOST_OCTETS',
    'MOVED',
    'OUT',
    'Decisions',
    'DoesNotFit',
    'Move',
    'Moved',
    'Parcel',
    'Side',
    'batched',
]

#: The role of a message that is out of reach: it leaves this queue, or it has come from the other one.
OUT, IN = 'out', 'in'

#: The states whose messages are moved, in this order.
MOVED = ('waiting', 'held', 'dead')

#: The most messages in a batch, and the most octets unless it is a single message.
MOST_MESSAGES = 100
MOST_OCTETS = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Parcel:
    """
    One message that is being moved.

    :param id: its name in the queue that it leaves
    :param state: one of :data:`MOVED`
    :param born: when it first came into a queue, in seconds since the epoch
    :param due: when it may be tried again
    :param header: its envelope and its attempts
    :param content: byte for byte
    :param stumbles: how often a server disconnected during it, since its last attempt
    :param deaths: how many processes crashed while delivering it, since then
    """

    id: str
    state: str
    born: float
    due: float
    header: QueueHeader
    content: bytes
    stumbles: int = 0
    deaths: int = 0


class DoesNotFit(QueueError):
    """One of these messages does not fit into a queue; others may."""


class Side(Protocol):
    """
    One of the two queues.

    Every method may raise QueueError or OSError if the queue cannot be used now, and ConfigurationError if a person has
    to repair something first.
    """

    @property
    def name(self) -> str:
        """The name of the queue, for display."""

    def recover(self) -> None:
        """Recover what dead processes left, as the next run would do."""

    def batches(self, state: str) -> Iterator[Sequence[str]]:
        """Yield the ids of messages in *state*, oldest first, in batches."""

    def take(self, batch: str, state: str, ids: Sequence[str], refuse: Callable[[str, str], None]) -> list[Parcel]:
        """
        Put messages out of reach, durably, and return them.  Messages that others hold are skipped.

        :param refuse: called with the id of a message that cannot be moved, and why; it stays as it is
        """

    def stage(self, batch: str, parcels: Sequence[Parcel]) -> list[str]:
        """Write copies, out of reach, durably; return their ids.  Raises `DoesNotFit` too; then nothing is written."""

    def remove(self, batch: str, role: str) -> None:
        """Remove the messages of *batch* in this role, durably."""

    def publish(self, batch: str, role: str) -> None:
        """Give the messages of *batch* in this role the state that they are to have, durably."""

    def unfinished(self) -> set[str]:
        """Return the batches of this directory that have messages out of reach."""

    def counts(self) -> Mapping[str, int]:
        """See `IMailQueue`."""


class Decisions(Protocol):
    """The record of decided batches.  Every method may raise QueueError, and OSError."""

    @property
    def place(self) -> str:
        """The name of the directory that keeps this, for display."""

    def alone(self) -> AbstractContextManager[None]:
        """Keep other moves from this directory during the block.  Raises QueueError if one is at work."""

    def begin(self) -> None:
        """Start a new series of batch names."""

    def new_batch(self) -> str:
        """Return a name that no batch ever had."""

    def decide(self, batch: str) -> None:
        """Decide that a batch moves, durably."""

    def decided(self) -> set[str]:
        """Return the batches that were decided and not forgotten."""

    def forget(self, batch: str) -> None:
        """Forget a batch that has ended."""


@dataclass
class Moved:
    """
    The result of a move.

    :param moved: how many messages were moved, by their state
    :param refused: the ids of messages that cannot be moved, and why
    :param settled: how many batches of an interrupted move were left, and are settled now
    :param half_way: how many batches are left half-way: their messages are in doubt until the next move
    :param is_complete: False if it was told to stop
    """

    moved: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)
    settled: int = 0
    half_way: int = 0
    is_complete: bool = False


class Move:
    """
    A move of all messages, but for those being delivered, from one queue into another.

    :param source: the queue that they leave
    :param target: the queue that they come into
    :param decisions: the record in the directory of one of them
    """

    def __init__(self, source: Side, target: Side, decisions: Decisions) -> None:
        self.source = source
        self.target = target
        self._decisions = decisions
        self.report = Moved()

    def run(self, is_stopped: Callable[[], bool] = lambda: False, on_batch: Callable[[], None] = lambda: None) -> None:
        """
        Run the move; :attr:`report` shows its progress.

        :param is_stopped: asked before each batch
        :param on_batch: called after each
        :raises QueueError: one of the queues cannot be used now, or another move works on the directory
        :raises ConfigurationError: a person has to repair something first
        """
        try:
            with self._decisions.alone():
                self._settle_all()
                self._decisions.begin()
                self.source.recover()
                self._move_all(is_stopped, on_batch)
        except OSError as error:
            raise QueueError(f'{error.filename or self._decisions.place}: {why(error)}') from error

    def _settle_all(self) -> None:
        decided = self._decisions.decided()
        left = sorted(decided | self.source.unfinished() | self.target.unfinished())
        self.report.half_way = len(left)
        for batch in left:
            self._end(batch, is_decided=batch in decided)
            self.report.settled += 1

    def _move_all(self, is_stopped: Callable[[], bool], on_batch: Callable[[], None]) -> None:
        for state in MOVED:
            for ids in self.source.batches(state):
                if is_stopped():
                    return
                self._move(state, ids)
                on_batch()
        self.report.is_complete = True

    def _move(self, state: str, ids: Sequence[str]) -> None:
        try:
            self._move_batch(state, ids)
        except (DoesNotFit, MemoryError):
            # Any of them may be the cause.
            for id_ in ids:
                self._move_alone(state, id_)

    def _move_alone(self, state: str, id: str) -> None:
        try:
            self._move_batch(state, [id])
        except DoesNotFit as error:
            self.report.refused[id] = str(error)
        except MemoryError as error:
            self.report.refused[id] = f'there is not enough memory for it: {error}'

    def _move_batch(self, state: str, ids: Sequence[str]) -> None:
        batch = self._decisions.new_batch()
        self.report.half_way += 1
        try:
            parcels = self.source.take(batch, state, ids, self.report.refused.__setitem__)
            new_ids = self.target.stage(batch, parcels) if parcels else []
        except (DoesNotFit, MemoryError):
            # A refused message is put back; if that fails, the move ends.
            self._end(batch, is_decided=False)
            raise
        except BaseException:
            # If that fails too, the next move does it.
            with suppress(MailqueueError, OSError):
                self._end(batch, is_decided=False)
            raise
        if not parcels:
            self.report.half_way -= 1
            return
        # If anything is raised from here on, only the next move can tell how it stands.
        self._decisions.decide(batch)
        self._end(batch, is_decided=True)
        self.report.moved[state] += len(parcels)
        for parcel, new_id in zip(parcels, new_ids, strict=True):
            log_event(queue_log, logging.INFO, status='moved', id=parcel.id, new_id=new_id, to=self.target.name)

    def _end(self, batch: str, *, is_decided: bool) -> None:
        """Remove from one queue before publishing in the other: a message can never be claimed in both."""
        goes, comes = (OUT, IN) if is_decided else (IN, OUT)
        for side in (self.source, self.target):
            side.remove(batch, goes)
        for side in (self.source, self.target):
            side.publish(batch, comes)
        self._decisions.forget(batch)
        self.report.half_way -= 1


def batched(sized: Iterable[tuple[str, int]]) -> Iterator[Sequence[str]]:
    """Divide ids, each with the octets of its message, into batches."""
    batch: list[str] = []
    octets = 0
    for id_, size in sized:
        if batch and (len(batch) == MOST_MESSAGES or octets + size > MOST_OCTETS):
            yield batch
            batch, octets = [], 0
        batch.append(id_)
        octets += size
    if batch:
        yield batch
