"""
The queue that is a directory: durable with what every machine has, readable with ``ls`` and ``less``.

::

    queue_dir/            0700; files 0600
        tmp/              being written; nobody has voted yes for it
        prepared/         voted yes, waiting for publish or discard; in doubt if nobody holds its lock
        new/              waiting; the file's mtime is its due time
        cur/              claimed: the holder has it open and locked
        dead/             dead letters
        corrupt/          what could not be parsed, untouched

How a message goes through it; each arrow is one ``rename``, and the file is locked while it moves::

    tmp --a--> prepared --b--> cur --d--> (gone)
                   |           | ^
                   |           e f
                   |           v |
                   +-----c---> new

    a  MaildirStaging.prepare: the "yes" of the first phase
    b  MaildirStaging.publish: the transaction has committed, and this process will try the message
    c  the same, for a later run; and what mq-run does with a message in doubt if told to send it
    d  MaildirClaim.settle: nobody is open any more.  The one change that is an ``unlink``
    e  MaildirClaim.settle: somebody is still open (a new version was renamed over the file first);
       MaildirClaim.release: as it was; MaildirQueue.recover: its deliverer died, which is counted in its name
    f  MaildirQueue.claim_due; MaildirQueue.claim

A dead letter is a new file, and is written for the recipients that are given up before d or e happens.  A file in
``cur/`` that cannot be parsed moves to ``corrupt/``.

What is durable when: a file's data before its first rename; ``prepared/`` before the vote returns (a), ``cur/`` and
``new/`` before the commit returns (b, c), ``dead/`` before the message changes.  While a queue is drained d and e are
made durable in batches of :data:`SYNC_EVERY` changes or :data:`SYNC_SECONDS`: a power cut may repeat the messages of
one batch, and cannot lose one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import heapq
import itertools
import logging
import math
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from zope.interface import implementer

from pyramid_mailqueue.delivery.logs import log_event, queue_log
from pyramid_mailqueue.delivery.results import Burial, Recovery, Settlement
from pyramid_mailqueue.envelope import Envelope
from pyramid_mailqueue.exceptions import QueueError, QueueFileError
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.interfaces import IClaim, IMailQueue, IStaging
from pyramid_mailqueue.queues.locked_file import Holder, LockedFile, sync_folder
from pyramid_mailqueue.queues.queue_file import QueueHeader, read_envelope, serialize_header

__all__ = ['MaildirClaim', 'MaildirQueue', 'MaildirStaging']

FOLDERS = ('tmp', 'prepared', 'new', 'cur', 'dead', 'corrupt')

#: Settled claims are made durable together: after this many changes, or this many seconds after the first of them.
SYNC_EVERY = 100
SYNC_SECONDS = 0.5

#: What nobody has locked in ``tmp/`` for this many seconds was never voted for.
STALE_AFTER = 36 * 3600

#: A message whose deliverer died this often is given up: it may well be what kills them.
MAX_DEATHS = 5

#: So many names are kept in memory at most while a queue is drained; then the folder is read again.
SUPPLY = 10_000

#: How many seconds a message rests whose outcome could not be written: some recipients may have it already.
UNSETTLED_REST = 300


@implementer(IMailQueue)
class MaildirQueue:
    """
    See `IMailQueue`.

    :param path: the queue directory; it is created if it is missing
    :param in_doubt: what :meth:`recover` does with messages in doubt: ``'hold'``, ``'send'`` or ``'discard'``
    :param horizon: no due time can be further away than this many seconds; one that is comes from a clock that jumped,
        and is taken for due
    :param clock: seconds since the epoch
    :raises QueueError: the directory cannot be created or used
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        in_doubt: str = 'hold',
        horizon: float = 4000 + 86400,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.in_doubt = in_doubt
        self.horizon = horizon
        self.clock = clock
        self._host = _in_file_name(socket.gethostname())
        self._numbers = itertools.count(1)
        self._holder = Holder()
        self._create_folders()
        self._forget_changes()
        call_in_children(self._forget_changes)

    def __repr__(self) -> str:
        return f'<MaildirQueue {self.path}>'

    def _create_folders(self) -> None:
        try:
            if _create_folder(self.path):
                sync_folder(os.path.dirname(self.path))
            created = [folder for folder in map(self.place, FOLDERS) if _create_folder(folder)]
            if created:
                sync_folder(self.path)
        except OSError as error:
            raise QueueError(f'The queue directory {self.path} cannot be created or used: {_reason(error)}') from error

    def place(self, folder: str, name: str = '') -> str:
        """Return the path of a folder of this queue, or of a file in it."""
        return f'{self.path}/{folder}/{name}' if name else f'{self.path}/{folder}'

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
        _tell_queued(file, envelope)
        return file

    # -- out of the queue

    def claim_due(self, now: float) -> Iterator[MaildirClaim]:
        """See `IMailQueue`."""
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

    def _due_after(self, last: tuple[int, float, str], now: float) -> list[tuple[int, float, str]]:
        """
        What is due in ``new/`` and comes after *last*, as stumbles, due time and name; one ``stat`` for each message.

        What a server has stumbled over comes last: it must not keep the others from it, run after run.
        """

        def due() -> Iterator[tuple[int, float, str]]:
            for entry in self._files('new'):
                modified = _modified(entry)
                if modified is None or not self._is_due(modified, now):
                    continue
                stumbles = _Name.parse(entry.name).stumbles if _STUMBLES in entry.name else 0
                if (stumbles, modified, entry.name) > last:
                    yield stumbles, modified, entry.name

        return heapq.nsmallest(SUPPLY, due())

    def _is_due(self, when: float, now: float) -> bool:
        return when <= now or when > now + self.horizon

    def _files(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """The regular files of a folder; what starts with a dot is none of ours.  Raises QueueError."""
        try:
            with os.scandir(self.place(folder)) as entries:
                for entry in entries:
                    if not entry.name.startswith('.') and entry.is_file(follow_symlinks=False):
                        yield entry
        except OSError as error:
            raise QueueError(f'The folder {self.place(folder)} cannot be read: {_reason(error)}') from error

    def _claim(self, name: str, now: float) -> MaildirClaim | None:
        file = self.take('new', name)
        if file is None:
            return None
        try:
            # Since the folder was read, somebody else may have tried this one and put it back for later.
            if not self._is_due(file.modified, now):
                file.close()
                return None
            file.move(self.place('cur', name))
        except OSError as error:
            _log_trouble('cannot be claimed', file.path, error)
            file.close()
            return None
        claim = MaildirClaim(self, file)
        return claim if claim.is_readable() else None

    def take(self, folder: str, name: str) -> LockedFile | None:
        """Hold one file; None if it is gone, is held by somebody else, or cannot be opened (that is logged)."""
        try:
            return self._holder.take(self.place(folder, name))
        except OSError as error:
            _log_trouble('cannot be opened', self.place(folder, name), error)
            return None

    # -- for staging and claims

    def create(self, envelope: Envelope) -> LockedFile:
        """Write a new message to ``tmp/``, durably, and hold it.  Raises OSError."""
        return self._write(QueueHeader(envelope.sender, envelope.recipients, queued_at=self.clock()), envelope.content)

    def write(self, path: str, header: QueueHeader, content: bytes, due: float | None = None) -> LockedFile:
        """Write a version of a message, durably, put it at *path* and hold it.  Raises OSError."""
        file = self._write(header, content, due)
        with self.dropped_on_error(file):
            file.move(path)
        return file

    def _write(self, header: QueueHeader, content: bytes, due: float | None = None) -> LockedFile:
        return self._holder.create(self.place('tmp', self._new_name()), (serialize_header(header), content), due)

    def _new_name(self) -> str:
        """
        Return a name as a maildir has them (https://cr.yp.to/proto/maildir.html), sorted by time.

        The random part keeps forked children, and machines that share a name, apart.
        """
        seconds, microseconds = divmod(int(self.clock() * 1_000_000), 1_000_000)
        number = next(self._numbers)
        return f'{seconds}.M{microseconds:06}P{os.getpid()}Q{number}R{secrets.token_hex(4)}.{self._host}'

    @contextlib.contextmanager
    def dropped_on_error(self, file: LockedFile) -> Iterator[None]:
        """Nothing is left behind of *file* if what is done with it fails."""
        try:
            yield
        except BaseException:
            self.drop(file)
            raise

    def drop(self, file: LockedFile) -> bool:
        """Remove a file and let go of it.  Never raises: False if it cannot be removed, which is logged."""
        try:
            file.remove()
        except OSError as error:
            _log_trouble('must not be delivered, and cannot be removed', file.path, error, logging.CRITICAL)
            return False
        finally:
            file.close()
        return True

    def refusal(self, error: OSError) -> QueueError:
        """The "no" of this queue, for a person."""
        return QueueError(f'The queue {self.path} cannot take the message: {_reason(error)}')

    def changed(self, folder: str) -> None:
        """Note a change of a folder that is to be made durable with the next batch."""
        self._changes.note(folder)

    def flush(self) -> None:
        """See `IMailQueue`."""
        self._changes.flush()

    def _forget_changes(self) -> None:
        """At first, and in a forked child: what its parent has yet to make durable is the parent's business."""
        self._changes = _UnsyncedChanges(self.path)

    # -- what dead processes left

    def recover(self, now: float) -> Recovery:
        """See `IMailQueue`."""
        orphans, buried = self._recover_orphans()
        in_doubt, sent, discarded = self._recover_in_doubt()
        swept = self._sweep(now)
        self.flush()
        return Recovery(orphans, buried, in_doubt, sent, discarded, swept)

    def _recover_orphans(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Whoever claimed these is dead, or the kernel would not have given us their locks."""
        orphans, buried = [], []
        for entry in list(self._files('cur')):
            file = self.take('cur', entry.name)
            if file is None:
                continue
            claim = MaildirClaim(self, file)
            if claim.deaths + 1 < MAX_DEATHS:
                if claim.orphaned():
                    orphans.append(claim.id)
            elif claim.is_readable() and claim.given_up():
                buried.append(claim.id)
        return tuple(orphans), tuple(buried)

    def _recover_in_doubt(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        held, sent, discarded = [], [], []
        for entry in list(self._files('prepared')):
            file = self.take('prepared', entry.name)
            if file is None:
                continue
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
            _log_trouble('is in doubt, and cannot be sent', file.path, error)
            return False
        self.changed('new')
        return True

    def _sweep(self, now: float) -> tuple[str, ...]:
        swept = []
        for entry in list(self._files('tmp')):
            modified = _modified(entry)
            if modified is None or now - modified <= STALE_AFTER:
                continue
            file = self.take('tmp', entry.name)
            if file is not None and self.drop(file):
                swept.append(entry.name)
        return tuple(swept)

    # -- for people

    def counts(self) -> dict[str, int]:
        """See `IMailQueue`."""
        return {
            'waiting': sum(1 for _ in self._files('new')),
            'in progress': sum(1 for _ in self._files('cur')),
            'dead': sum(1 for _ in self._files('dead')),
            'in doubt': sum(self._is_in_doubt(entry.name) for entry in list(self._files('prepared'))),
            'corrupt': sum(1 for _ in self._files('corrupt')),
        }

    def _is_in_doubt(self, name: str) -> bool:
        file = self.take('prepared', name)
        if file is None:
            return False
        file.close()
        return True


@implementer(IStaging)
class MaildirStaging:
    """
    See `IStaging`.

    Until :meth:`prepare` the messages are in memory only.
    """

    def __init__(self, queue: MaildirQueue) -> None:
        self._queue = queue
        self._added: list[tuple[Envelope, bool]] = []
        # The files of these, in their order, from prepare() to publish() or discard().
        self._files: list[LockedFile] = []

    def add(self, envelope: Envelope, claimed: bool) -> None:
        """See `IStaging`."""
        self._added.append((envelope, claimed))

    def mark(self) -> int:
        """See `IStaging`.  The mark is the number of messages."""
        return len(self._added)

    def rollback(self, mark: object) -> list[Envelope]:
        """See `IStaging`."""
        assert isinstance(mark, int)
        dropped = [envelope for envelope, _ in self._added[mark:]]
        del self._added[mark:]
        return dropped

    def prepare(self) -> None:
        """See `IStaging`."""
        if not self._added:
            return
        queue = self._queue
        try:
            for envelope, _ in self._added:
                self._files.append(queue.create(envelope))
            for file in self._files:
                file.move(queue.place('prepared', file.name))
            # A "yes" must outlive a power cut: the other resources may commit on the strength of it.
            sync_folder(queue.place('prepared'))
        except BaseException as error:
            self._drop_files()
            if isinstance(error, OSError):
                raise queue.refusal(error) from error
            raise

    def publish(self) -> list[IClaim | None]:
        """See `IStaging`."""
        # From here on nothing may be discarded, even if something interrupts us half-way.
        files, self._files = self._files, []
        added, self._added = self._added, []
        claims = [self._publish(file, claimed) for file, (_, claimed) in zip(files, added, strict=True)]
        for folder in {os.path.dirname(file.path) for file in files}:
            try:
                sync_folder(folder)
            except OSError as error:
                _log_trouble('holds messages that a power cut may lose', folder, error, logging.CRITICAL)
        for file, (envelope, _) in zip(files, added, strict=True):
            if not file.path.startswith(self._queue.place('prepared')):
                _tell_queued(file, envelope)
        return claims

    def _publish(self, file: LockedFile, claimed: bool) -> IClaim | None:
        if file.closed:
            # In a forked child: it is the parent's to publish.
            return None
        if claimed and self._moved(file, 'cur', 'cannot be claimed, and has to wait', logging.ERROR):
            return MaildirClaim(self._queue, file)
        # Only a person can help if that fails too.  Without a lock mq-run reports the message as in doubt.
        self._moved(
            file, 'new', 'is in doubt: its transaction has committed, and it cannot be published', logging.CRITICAL
        )
        file.close()
        return None

    def _moved(self, file: LockedFile, folder: str, problem: str, level: int) -> bool:
        try:
            file.move(self._queue.place(folder, file.name))
        except OSError as error:
            _log_trouble(problem, file.path, error, level)
            return False
        return True

    def leave_in_doubt(self) -> None:
        """See `IStaging`."""
        files, self._files = self._files, []
        self._added = []
        # In a forked child they are closed, and are its parent's.
        held = [file for file in files if not file.closed]
        for file in held:
            file.close()
        for file in held:
            reason = 'its transaction has begun to commit, and did not come to an end; a person must decide'
            log_event(queue_log, logging.CRITICAL, status='in_doubt', id=file.name, reason=reason)

    def discard(self) -> list[Envelope]:
        """See `IStaging`."""
        dropped = [envelope for envelope, _ in self._added]
        self._added = []
        self._drop_files()
        return dropped

    def _drop_files(self) -> None:
        files, self._files = self._files, []
        # In a forked child they are closed, and are its parent's to drop.
        dropped = [self._queue.drop(file) for file in files if not file.closed]
        if not dropped:
            return
        try:
            # A power cut must not bring back what was voted for and then aborted.
            sync_folder(self._queue.place('prepared'))
        except OSError as error:
            problem = 'may show dropped messages again after a power cut'
            _log_trouble(problem, self._queue.place('prepared'), error)


@implementer(IClaim)
class MaildirClaim:
    """See `IClaim`.  Made for a file in ``cur/`` that is held."""

    def __init__(self, queue: MaildirQueue, file: LockedFile) -> None:
        self._queue = queue
        self._file = file
        self._parsed: tuple[QueueHeader, Envelope] | None = None
        self._name = _Name.parse(file.name)
        self.id = self._name.id

    def __repr__(self) -> str:
        return f'<MaildirClaim {self._file.name}>'

    @property
    def deaths(self) -> int:
        """How many deliverers the message has outlived."""
        return self._name.deaths

    @property
    def attempts(self) -> int:
        """See `IClaim`."""
        return self._header.attempts

    @property
    def queued_at(self) -> float:
        """See `IClaim`."""
        return self._header.queued_at

    @property
    def envelope(self) -> Envelope:
        """See `IClaim`."""
        return self._parse()[1]

    @property
    def _header(self) -> QueueHeader:
        return self._parse()[0]

    def _parse(self) -> tuple[QueueHeader, Envelope]:
        if self._parsed is None:
            self._parsed = read_envelope(self._file.read())
        return self._parsed

    def is_readable(self) -> bool:
        """Whether the file can be parsed; if not, the claim ends here, and the file is put aside untouched."""
        try:
            self._parse()
        except QueueFileError as error:
            self._put_aside(error)
            return False
        except OSError as error:
            _log_trouble('cannot be read', self._file.path, error)
            self.release()
            return False
        return True

    def _put_aside(self, error: QueueFileError) -> None:
        queue, file = self._queue, self._file
        try:
            file.move(_unused(queue.place('corrupt', file.name)))
            queue.changed('corrupt')
            log_event(queue_log, logging.ERROR, status='corrupt', id=self.id, file=file.path, error=error)
        except OSError as move_error:
            _log_trouble(f'is damaged ({error}) and cannot be put aside', file.path, move_error)
        file.close()

    def release(self) -> None:
        """See `IClaim`."""
        if not self._file.closed:
            self._back_to_new(self._file.name)

    def orphaned(self) -> bool:
        """Let an orphan wait again, with one more death counted in its name.  False if that failed (logged)."""
        return self._back_to_new(str(self._name._replace(deaths=self.deaths + 1)))

    def given_up(self) -> bool:
        """Bury an orphan.  False if that failed (logged)."""
        reason = f'given up: the process that delivered it died, {MAX_DEATHS} times'
        return self._ended_by(Settlement(counted=False, burials=(Burial(self._header.recipients, reason),)))

    def _back_to_new(self, name: str) -> bool:
        try:
            self._file.move(self._queue.place('new', name))
            self._queue.changed('new')
        except OSError as error:
            _log_trouble('stays in progress until the next run', self._file.path, error)
            return False
        finally:
            self._file.close()
        return True

    def settle(self, settlement: Settlement) -> None:
        """See `IClaim`."""
        if not self._file.closed:
            self._ended_by(settlement)

    def _ended_by(self, settlement: Settlement) -> bool:
        """End the claim; False if the new state could not be written (logged)."""
        try:
            self._settle(settlement)
        except (OSError, QueueFileError) as error:
            log_event(
                queue_log,
                logging.CRITICAL,
                status='unsettled',
                id=self.id,
                error=_reason(error),
                reason='its outcome cannot be written; it waits as it was, and may be delivered again',
            )
            self._postpone(settlement)
            return False
        finally:
            self._file.close()
        return True

    def _settle(self, settlement: Settlement) -> None:
        # Dead letters first: between the two steps a crash may repeat one, and its name makes that the same file.
        for burial in settlement.burials:
            self._bury(burial, settlement)
        if settlement.burials:
            sync_folder(self._queue.place('dead'))
        if not settlement.waiting:
            self._file.remove()
            self._queue.changed('cur')
        elif self._is_changed_by(settlement):
            self._rewrite(settlement)
            # Its deliverer has lived, so the deaths before do not count any more.
            self._back_to_new(self.id)
        else:
            self._back_to_new(str(self._name._replace(stumbles=self._name.stumbles + settlement.stumbled)))

    def _is_changed_by(self, settlement: Settlement) -> bool:
        return settlement.counted or settlement.due is not None or settlement.waiting != self._header.recipients

    def _bury(self, burial: Burial, settlement: Settlement) -> None:
        header = self._next_header(burial.recipients, settlement, burial.reason)
        names = hashlib.sha256('\0'.join(burial.recipients).encode()).hexdigest()
        path = self._queue.place('dead', f'{self.id}.{names[:8]}')
        self._queue.write(path, header, self.envelope.content).close()

    def _rewrite(self, settlement: Settlement) -> None:
        """Put the next version of the message in the place of this one, held from its first moment on."""
        header = self._next_header(settlement.waiting, settlement, settlement.last_reply)
        due = self._file.modified if settlement.due is None else settlement.due
        file = self._queue.write(self._file.path, header, self.envelope.content, due)
        self._file.close()
        self._file = file

    def _next_header(self, recipients: tuple[str, ...], settlement: Settlement, last_reply: str) -> QueueHeader:
        header = self._header
        return dataclasses.replace(
            header,
            recipients=recipients,
            attempts=header.attempts + settlement.counted,
            last_attempt=self._queue.clock() if settlement.counted or last_reply else header.last_attempt,
            last_reply=last_reply or header.last_reply,
        )

    def _postpone(self, settlement: Settlement) -> None:
        """The next version cannot be written (a full disk); keep the old one, which needs no room, and its order."""
        due = self._queue.clock() + UNSETTLED_REST if settlement.due is None else settlement.due
        try:
            os.utime(self._file.fd, (due, due))
        except OSError as error:
            _log_trouble('cannot be given its due time', self._file.path, error)
        self._back_to_new(self._file.name)


class _UnsyncedChanges:
    """The folders that were changed since they were last made durable."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._folders: set[str] = set()
        self._count = 0
        self._since = 0.0

    def note(self, folder: str) -> None:
        now = time.monotonic()
        with self._lock:
            if not self._folders:
                self._since = now
            self._folders.add(folder)
            self._count += 1
            if self._count < SYNC_EVERY and now - self._since < SYNC_SECONDS:
                return
        self.flush()

    def flush(self) -> None:
        with self._lock:
            folders, self._folders, self._count = self._folders, set(), 0
        for folder in folders:
            path = os.path.join(self._path, folder)
            try:
                sync_folder(path)
            except OSError as error:
                _log_trouble('holds changes that a power cut may undo', path, error)


def _create_folder(path: str) -> bool:
    """Return whether the folder had to be created.  Raises OSError, also if it is there and cannot be used."""
    if not os.path.isdir(path):
        # Two processes may start at once; and a umask may have taken away more than what 0700 leaves out.
        os.makedirs(path, 0o700, exist_ok=True)
        os.chmod(path, 0o700)
        return True
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f'user {os.geteuid()} may not read and write {path}')
    return False


def _modified(entry: os.DirEntry[str]) -> float | None:
    """Return the time of modification of a file; None if it is gone, or cannot be looked at (that is logged)."""
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        _log_trouble('cannot be looked at', entry.path, error)
        return None


_STUMBLES = ',stumbles='
_FILE_NAME = re.compile(r'(.*?)(?:,stumbles=([0-9]{1,9}))?(?:,deaths=([0-9]{1,9}))?', re.DOTALL)


class _Name(NamedTuple):
    """
    The name of a file, ``ID[,stumbles=N][,deaths=N]``.

    :param id: the name of the message
    :param stumbles: how often a server broke off in the midst of it
    :param deaths: how many deliverers it has outlived; both are counted since its last attempt
    """

    id: str
    stumbles: int = 0
    deaths: int = 0

    @classmethod
    def parse(cls, name: str) -> _Name:
        match = _FILE_NAME.fullmatch(name)
        assert match
        return cls(match[1], int(match[2] or 0), int(match[3] or 0))

    def __str__(self) -> str:
        stumbles = f'{_STUMBLES}{self.stumbles}' if self.stumbles else ''
        return f'{self.id}{stumbles},deaths={self.deaths}' if self.deaths else f'{self.id}{stumbles}'


def _in_file_name(host: str) -> str:
    return host.replace('/', '\\057').replace(':', '\\072').replace(',', '\\054') or 'localhost'


def _unused(path: str) -> str:
    """Return *path*, with a number if there is something already: what was put aside must not be overwritten."""
    numbered = (f'{path}.{number}' for number in itertools.count(1))
    return next(candidate for candidate in itertools.chain((path,), numbered) if not os.path.lexists(candidate))


def _reason(error: Exception) -> str:
    """What the operating system said, without the paths that are named beside it."""
    return getattr(error, 'strerror', None) or str(error)


def _tell_queued(file: LockedFile, envelope: Envelope) -> None:
    told = {'from': f'<{envelope.sender}>', 'to': ','.join(envelope.recipients)}
    # What is in the queue is in the queue: somebody's log handler that raises must not tell a commit otherwise.
    with contextlib.suppress(Exception):
        log_event(queue_log, logging.INFO, status='queued', id=file.name, msgid=envelope.message_id, **told)


def _log_trouble(problem: str, path: str, error: OSError, level: int = logging.ERROR) -> None:
    """Log what a person should look at."""
    log_event(queue_log, level, status='trouble', file=path, problem=problem, error=_reason(error))
