"""
The queue in a directory: durable with what every machine has, readable with ``ls`` and ``less``.

::

    queue_dir/            0700; files 0600
        tmp/              being written; not voted for yet
        prepared/         voted yes, waiting for publish or discard; in doubt if its lock is free.  NAME+7 has that of
                          NAME, the first message of the same transaction
        new/              waiting; the file's mtime is its due time
        cur/              claimed: the holder has it open and locked
        held/             not to be delivered until a person says so; the file's mtime is still its due time
        dead/             dead letters
        corrupt/          what could not be parsed, untouched
        moving/           half-way to or from a database (see :mod:`~.maildir.moving`)

How a message goes through it; each arrow is one ``rename``, and the file is locked while it moves::

    tmp --a--> prepared --b--> new --c--> cur --d--> (gone)
                                ^          |
                                +----e-----+

    a  MaildirStaging.prepare: the "yes" of the first phase
    b  MaildirStaging.publish: the transaction has committed.  If this process will try the message it stays locked; and
       what mq-run does with a message in doubt if told to send it
    c  MaildirClaim.begin: the process begins to deliver the message; MaildirQueue.claim_due; MaildirQueue.claim
    d  MaildirClaim.settle: no recipient is open any more.  The one change that is an ``unlink``
    e  MaildirClaim.settle: a recipient is still open (a new version was renamed over the file first);
       MaildirClaim.release: as it was; MaildirQueue.recover: its process crashed, which is counted in its name

A dead letter is a new file, written for the recipients that are given up, before d or e happens.  A file in ``cur/``
that cannot be parsed moves to ``corrupt/``.  For the changes of a person see :mod:`~.maildir.admin`.

What is durable when: a file's data before its first rename; ``prepared/`` before the vote returns (a), ``new/`` before
the commit returns (b), ``dead/`` before the message changes.  While a queue is drained d and e are made durable in
batches (:data:`~.folders.SYNC_EVERY`, :data:`~.folders.SYNC_SECONDS`): a power cut may repeat the messages of one
batch, and of a second one that was on its way to the disk, and cannot lose one.
"""

from __future__ import annotations

import heapq
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator

from zope.interface import implementer

from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.interfaces import IClaim, IMailQueue, IQueueAdmin, IStaging
from pyramid_mailqueue.logs import log_event, log_queued, log_trouble, queue_log
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.base import MailQueue
from pyramid_mailqueue.queues.maildir.claim import MAX_DEATHS, FileName, MaildirClaim
from pyramid_mailqueue.queues.maildir.folders import MOVING, MaildirFolders, modified_time
from pyramid_mailqueue.queues.maildir.locked_file import LockedFile, sync_folder
from pyramid_mailqueue.queues.maildir.trouble import FOR_ALL_MOVES, leave_some_files, may_stay_open, standstill
from pyramid_mailqueue.queues.staged import StagedMail
from pyramid_mailqueue.results import Recovery

__all__ = ['MaildirQueue', 'MaildirStaging']

#: An unlocked file in ``tmp/`` that is older than this many seconds was never voted for.
STALE_AFTER = 36 * 3600

#: At most this many names are kept in memory while a queue is drained; then the folder is read again.
SUPPLY = 10_000


#: Up to this many files are opened when messages are counted.
LOOKED_INTO = 2_000


@implementer(IMailQueue)
class MaildirQueue(MaildirFolders, MailQueue):
    """
    See `IMailQueue`.

    :param path: the queue directory
    :param in_doubt: what :meth:`recover` does with messages in doubt: ``'hold'``, ``'send'`` or ``'discard'``
    :param horizon: the longest wait for a due time, in seconds; a later one comes from a clock that jumped, and counts
        as due
    :param clock: seconds since the epoch
    :param access: ``'create'``, ``'use'`` or ``'look'`` (see `.MaildirFolders`)
    :raises QueueError: the directory cannot be created or used, is no queue, or is that of another program
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        in_doubt: str = 'hold',
        horizon: float = 4000 + 86400,
        clock: Callable[[], float] = time.time,
        access: str = 'create',
    ) -> None:
        super().__init__(path, clock, access=access)
        self.in_doubt = in_doubt
        self.horizon = horizon

    def __repr__(self) -> str:
        return f'<MaildirQueue {self.path}>'

    # -- into the queue

    def staging(self) -> MaildirStaging:
        """See `IMailQueue`."""
        return MaildirStaging(self)

    def put(self, envelope: Envelope) -> str:
        """See `IMailQueue`."""
        file = self._put(envelope, 'new')
        file.close()
        return file.name

    def put_claimed(self, envelope: Envelope) -> MaildirClaim:
        """See `IMailQueue`."""
        return MaildirClaim(self, self._put(envelope, 'cur'))

    def _put(self, envelope: Envelope, folder: str) -> LockedFile:
        try:
            file = self.create(envelope)
            with self.dropped_on_error(file):
                file.move(self.place(folder, file.name))
                sync_folder(self.place(folder))
        except OSError as error:
            raise self.refusal(error) from error
        log_queued(file.name, envelope)
        return file

    # -- out of the queue

    def claim_due(self, now: float) -> Iterator[MaildirClaim]:
        """See `IMailQueue`."""
        if self.is_in_doubt:
            self.check_changes()
        last = (0, -math.inf, '')
        while found := self._due_after(last, now):
            for _, _, name in found:
                claim = self._claim(name, now)
                if claim is not None:
                    yield claim
            if len(found) < SUPPLY:
                return
            last = found[-1]

    def claim(self, id: str) -> MaildirClaim | None:
        """See `IMailQueue`.  An orphan has another name than its id, and is left to :meth:`claim_due`."""
        return self._claim(id, self.clock())

    def count_due(self, now: float) -> int:
        """See `IMailQueue`."""
        times = map(modified_time, self.files('new'))
        return sum(modified is not None and self._is_due(modified, now) for modified in times)

    def _due_after(self, last: tuple[int, float, str], now: float) -> list[tuple[int, float, str]]:
        """
        Return what is due in ``new/`` after *last*, as setbacks, due time and name; one ``stat`` for each message.

        A message during which a server disconnects must not block the others, run after run; and one whose process
        crashed may have been in progress by chance, and should not be in progress the next time, too.  So both come
        last.
        """

        def due() -> Iterator[tuple[int, float, str]]:
            for entry in self.files('new'):
                modified = modified_time(entry)
                if modified is None or not self._is_due(modified, now):
                    continue
                setbacks = FileName.parse(entry.name).setbacks if ',' in entry.name else 0
                if (setbacks, modified, entry.name) > last:
                    yield setbacks, modified, entry.name

        return heapq.nsmallest(SUPPLY, due())

    def _is_due(self, when: float, now: float) -> bool:
        return when <= now or when > now + self.horizon

    def _claim(self, name: str, now: float) -> MaildirClaim | None:
        """Raises QueueError if no message can be claimed now."""
        file = self.take('new', name)
        if file is None:
            return None
        try:
            # Since the folder was read, another process may have tried this one and put it back for later.
            if not self._is_due(file.modified, now):
                file.close()
                return None
            leave_some_files(file.fd)
            file.move(self.place('cur', name))
        except OSError as error:
            file.close()
            if error.errno in FOR_ALL_MOVES:
                raise standstill(self.path, error) from error
            log_trouble('cannot be claimed', file.path, error)
            return None
        claim = MaildirClaim(self, file)
        return claim if claim.is_readable() else None

    # -- what dead processes left

    def recover(self, now: float) -> Recovery:
        """See `IMailQueue`."""
        orphans, buried = self._recover_orphans()
        in_doubt, sent, discarded = self._recover_in_doubt()
        swept = self._sweep(now)
        self.flush()
        return Recovery(orphans, buried, in_doubt, sent, discarded, swept, self._find_half_way())

    def _taken(self, folder: str, entries: Iterable[os.DirEntry[str]]) -> Iterator[LockedFile]:
        """Take the files that are not held.  If no more can be opened the rest is left, and what was done is told."""
        for entry in list(entries):
            try:
                file = self.take(folder, entry.name)
            except QueueError as error:
                problem = 'cannot be read to its end'
                log_event(
                    queue_log, logging.ERROR, status='trouble', file=self.place(folder), problem=problem, error=error
                )
                return
            if file is not None:
                yield file

    def _recover_orphans(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The processes that claimed these files are dead, or the kernel would not have given us their locks."""
        orphans, buried = [], []
        for file in self._taken('cur', self.files('cur')):
            claim = MaildirClaim(self, file)
            if claim.deaths + 1 < MAX_DEATHS:
                if claim.orphaned():
                    orphans.append(claim.id)
            elif claim.is_readable() and claim.given_up():
                buried.append(claim.id)
        return tuple(orphans), tuple(buried)

    def _recover_in_doubt(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        held, sent, discarded = [], [], []
        for file in self._taken('prepared', self.files('prepared')):
            if self.in_doubt == 'send' and self._publish_in_doubt(file):
                sent.append(file.name)
            elif self.in_doubt == 'discard' and self.drop(file):
                self.changed('prepared')
                discarded.append(file.name)
            else:
                held.append(file.name)
            file.close()
        return tuple(held), tuple(sent), tuple(discarded)

    def _publish_in_doubt(self, file: LockedFile) -> bool:
        try:
            file.move(self.place('new', file.name))
        except OSError as error:
            log_trouble('is in doubt, and cannot be sent', file.path, error)
            return False
        self.changed('new')
        return True

    def _sweep(self, now: float) -> tuple[str, ...]:
        def is_stale(entry: os.DirEntry[str]) -> bool:
            modified = modified_time(entry)
            return modified is not None and now - modified > STALE_AFTER

        stale = filter(is_stale, self.files('tmp'))
        return tuple(file.name for file in self._taken('tmp', stale) if self.drop(file))

    def _find_half_way(self) -> tuple[str, ...]:
        names = []
        for file in self._taken(MOVING, self.files(MOVING)):
            names.append(file.name)
            file.close()
        return tuple(names)

    # -- for people

    @property
    def admin(self) -> IQueueAdmin:
        """See `IMailQueue`."""
        # Delivery does not import what only people need.
        from pyramid_mailqueue.queues.maildir.admin import MaildirAdmin

        return MaildirAdmin(self)

    def counts(self) -> dict[str, int]:
        """See `IMailQueue`.  Damaged ones outside of ``corrupt/`` are found only if there are few messages."""
        counts = self._count_files()
        if sum(counts.values()) > LOOKED_INTO:
            return counts
        return {state: tally.messages for state, tally in self.admin.stats(()).by_state.items()}

    def _count_files(self) -> dict[str, int]:
        return {
            'waiting': sum(1 for _ in self.files('new')),
            'in progress': sum(1 for _ in self.files('cur')),
            'held': sum(1 for _ in self.files('held')),
            'dead': sum(1 for _ in self.files('dead')),
            'in doubt': sum(
                self._is_nobodys(folder, entry.name)
                for folder in ('prepared', MOVING)
                for entry in list(self.files(folder))
            ),
            'corrupt': sum(1 for _ in self.files('corrupt')),
        }

    def count_waiting(self, most: int) -> int:
        """See `IMailQueue`."""
        return sum(1 for _ in self.files('new'))

    def count_misdated(self) -> int:
        """See `IMailQueue`."""
        latest = self.clock() + self.horizon
        return sum((modified_time(entry) or 0) > latest for entry in self.files('new'))

    def _is_nobodys(self, folder: str, name: str) -> bool:
        file = self.take(folder, name)
        if file is None:
            return False
        file.close()
        return True


@implementer(IStaging)
class MaildirStaging(StagedMail):
    """
    See `IStaging`.

    Until :meth:`prepare` the messages are in memory only.
    """

    def __init__(self, queue: MaildirQueue) -> None:
        self._queue = queue
        super().__init__()
        # The files of these, in their order, from prepare() to publish() or discard().
        self._files: list[LockedFile] = []
        self._is_alone = False
        # Once the first file is published, nothing may be discarded.
        self._is_real = False

    def prepare(self, alone: bool = False) -> None:
        """See `IStaging`."""
        if not self._added:
            return
        queue = self._queue
        self._is_alone = alone
        try:
            for envelope, _ in self._added:
                self._files.append(queue.create(envelope))
                if len(self._files) > 1:
                    _keep_or_close(self._files[-1])
            queue.prepare(self._files)
            # A "yes" must survive a power cut where other resources commit because of it.
            if not alone:
                sync_folder(queue.place('prepared'))
        except BaseException as error:
            self._drop_files()
            if isinstance(error, OSError):
                raise queue.refusal(error) from error
            raise

    def publish(self) -> list[IClaim | None]:
        """See `IStaging`."""
        files, added = self._files, self._added
        # Those that are closed leave before the first one, which holds them.
        for file in sorted(files, key=lambda file: not file.closed):
            if self._are_ours and not self._is_published(file):
                self._publish(file)
        if files:
            self._sync_new()
        claims: list[IClaim | None] = []
        for file, (envelope, claimed) in zip(files, added, strict=True):
            if self._is_published(file):
                log_queued(file.name, envelope)
            if claimed and self._is_published(file):
                _keep_or_close(file)
                claims.append(MaildirClaim(self._queue, file))
            else:
                # Without a lock any process may claim it; what could not be published mq-run reports as in doubt.
                claims.append(None)
                file.close()
        self._forget()
        return claims

    @property
    def _are_ours(self) -> bool:
        """Whether this process holds the files: a forked child has closed the first one, too."""
        return bool(self._files) and not self._files[0].closed

    def _is_published(self, file: LockedFile) -> bool:
        file.find()
        return file.folder == 'new'

    def _publish(self, file: LockedFile) -> None:
        self._is_real = True
        try:
            file.move(self._queue.place('new', file.name))
        except OSError as error:
            # Only a person can help.
            problem = 'is in doubt: its transaction has committed, and it cannot be published'
            log_trouble(problem, file.path, error, logging.CRITICAL)

    def _sync_new(self) -> None:
        folder = self._queue.place('new')
        try:
            sync_folder(folder)
        except OSError as error:
            log_trouble('holds messages that a power cut may lose', folder, error, logging.CRITICAL)

    def _forget(self) -> None:
        self._files, self._added, self._is_real = [], [], False

    def leave_in_doubt(self) -> None:
        """See `IStaging`."""
        if self._is_real or (self._is_alone and self._files):
            # Interrupted: the decision is known nevertheless, because it is ours or because others act on it already.
            self.publish()
            return
        files, self._files = self._files if self._are_ours else [], []
        self._added = []
        for file in reversed(files):
            file.close()
        for file in files:
            reason = 'its transaction began to commit and did not finish; a person must decide'
            log_event(queue_log, logging.CRITICAL, status='in_doubt', id=file.name, reason=reason)

    def discard(self) -> list[Envelope]:
        """See `IStaging`."""
        if self._is_real:
            # publish() was interrupted: finish it.
            self.publish()
            return []
        dropped = [envelope for envelope, _ in self._added]
        self._added = []
        self._drop_files()
        return dropped

    def _drop_files(self) -> None:
        dropped = []
        while self._files:
            file = self._files[-1]
            if self._are_ours:
                dropped.append(self._queue.drop(file))
            # Only now: if this is interrupted, the next call goes on with it.
            self._files.pop()
        if not dropped:
            return
        try:
            # A power cut must not bring back what was voted for and then aborted.
            sync_folder(self._queue.place('prepared'))
        except OSError as error:
            problem = 'may show dropped messages again after a power cut'
            log_trouble(problem, self._queue.place('prepared'), error)


def _keep_or_close(file: LockedFile) -> None:
    if not may_stay_open(file.fd):
        file.close()
