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
                   |            |  --e--> new
                   +----c--> new --f--> cur
                                |  --g--> dead

    a  MaildirStaging.prepare: the "yes" of the first phase
    b  MaildirStaging.publish: the transaction has committed, this process will try the message
    c  the same, for a later run; and what mq-run does with a message in doubt if told to send it
    d  MaildirClaim.settle: everybody has it.  The one change that is an ``unlink``
    e  MaildirClaim.settle: somebody is still open (a new version was renamed over the file first);
       MaildirClaim.release: as it was; MaildirQueue.recover: its deliverer died
    f  MaildirQueue.claim_due
    g  a dead letter is a new file, written for the recipients that are given up, before d or e happens

What is durable when: a file's data before it is renamed to where it counts (a, and the new version of e); the folders
before the commit returns (a, b, c).  While a queue is drained the changes d, e and g's counterpart are made durable in
batches of :data:`SYNC_EVERY` changes or :data:`SYNC_SECONDS`: a power cut may repeat the messages of one batch, and
cannot lose one.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import heapq
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

from zope.interface import implementer

from pyramid_mailqueue.delivery.results import Burial, Recovery, Settlement
from pyramid_mailqueue.envelope import Envelope
from pyramid_mailqueue.exceptions import QueueError, QueueFileError
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.interfaces import IClaim, IMailQueue, IStaging
from pyramid_mailqueue.queues import locked_file
from pyramid_mailqueue.queues.locked_file import LockedFile
from pyramid_mailqueue.queues.queue_file import QueueHeader, read_header, serialize_header

__all__ = ['MaildirClaim', 'MaildirQueue', 'MaildirStaging']

log = logging.getLogger('mailqueue.queue_log')

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
        self._held: set[LockedFile] = set()
        self._changes = _UnsyncedChanges(self.path)
        self._create_folders()
        call_in_children(self._forget_parent)

    def __repr__(self) -> str:
        return f'<MaildirQueue {self.path}>'

    def _create_folders(self) -> None:
        try:
            if not os.path.isdir(self.path):
                os.makedirs(self.path, 0o700)
                locked_file.sync_folder(os.path.dirname(self.path))
            for folder in map(self.place, FOLDERS):
                if not os.path.isdir(folder):
                    os.mkdir(folder, 0o700)
                if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, f'user {os.geteuid()} may not read and write {folder}')
            locked_file.sync_folder(self.path)
        except OSError as error:
            raise QueueError(f'The queue directory {self.path} cannot be created or used: {_reason(error)}') from error

    def place(self, folder: str, name: str = '') -> str:
        """Return the path of a folder of this queue, or of a file in it."""
        return os.path.join(self.path, folder, name) if name else os.path.join(self.path, folder)

    # -- into the queue

    def staging(self) -> MaildirStaging:
        """See `IMailQueue`."""
        return MaildirStaging(self)

    def put(self, envelope: Envelope) -> str:
        """See `IMailQueue`."""
        file = self._write_and_publish(envelope, 'new')
        self.let_go(file)
        return file.name

    def put_claimed(self, envelope: Envelope) -> MaildirClaim:
        """See `IMailQueue`."""
        return MaildirClaim(self, self._write_and_publish(envelope, 'cur'))

    def _write_and_publish(self, envelope: Envelope, folder: str) -> LockedFile:
        file = None
        try:
            file = self.write_new(envelope)
            file.move(self.place(folder, file.name))
            locked_file.sync_folder(self.place(folder))
        except OSError as error:
            if file is not None:
                self.drop(file)
            raise self.refusal(error) from error
        return file

    # -- out of the queue

    def claim_due(self, now: float) -> Iterator[MaildirClaim]:
        """See `IMailQueue`."""
        while names := self._due_names(now, SUPPLY):
            claims = (self._claim(name) for name in names)
            found = False
            for claim in claims:
                if claim is not None:
                    found = True
                    yield claim
            if len(names) < SUPPLY or not found:
                return

    def _due_names(self, now: float, limit: int) -> list[str]:
        """The names in ``new/`` that are due, the oldest due time first; one ``stat`` for each message."""

        def due() -> Iterator[tuple[float, str]]:
            for entry in self._files('new'):
                try:
                    when = entry.stat(follow_symlinks=False).st_mtime
                except FileNotFoundError:
                    continue
                if when <= now or when > now + self.horizon:
                    yield when, entry.name

        return [name for _, name in heapq.nsmallest(limit, due())]

    def _files(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """The regular files of a folder; what starts with a dot is none of ours."""
        with os.scandir(self.place(folder)) as entries:
            for entry in entries:
                if not entry.name.startswith('.') and entry.is_file(follow_symlinks=False):
                    yield entry

    def _claim(self, name: str) -> MaildirClaim | None:
        file = self.take('new', name)
        if file is None:
            return None
        try:
            file.move(self.place('cur', name))
        except OSError as error:
            self.let_go(file)
            if error.errno != errno.ENOENT:
                _log_trouble(f'{file.path} cannot be claimed: {_reason(error)}')
            return None
        claim = MaildirClaim(self, file)
        return claim if claim.is_readable() else None

    def take(self, folder: str, name: str) -> LockedFile | None:
        """Hold one file; None if it is gone, is held by somebody else, or cannot be opened (that is logged)."""
        try:
            file = locked_file.take(self.place(folder, name))
        except OSError as error:
            _log_trouble(f'{self.place(folder, name)} cannot be opened: {_reason(error)}')
            return None
        if file is not None:
            self._held.add(file)
        return file

    def let_go(self, file: LockedFile) -> None:
        """Give up the lock of a file, where it is."""
        self._held.discard(file)
        file.close()

    # -- for staging and claims

    def write_new(self, envelope: Envelope) -> LockedFile:
        """Write a new message to ``tmp/``, durably, and hold it.  Raises OSError."""
        return self.write(QueueHeader(envelope.sender, envelope.recipients, queued_at=self.clock()), envelope.content)

    def write(self, header: QueueHeader, content: bytes, due: float | None = None) -> LockedFile:
        """Write a version of a message to ``tmp/`` under a new name, durably, and hold it.  Raises OSError."""
        file = locked_file.create(self.place('tmp', self._new_name()), (serialize_header(header), content), due)
        self._held.add(file)
        return file

    def _new_name(self) -> str:
        """
        Return a name as a maildir has them (https://cr.yp.to/proto/maildir.html), sorted by time.

        The random part keeps forked children, and machines that share a name, apart.
        """
        seconds, microseconds = divmod(int(self.clock() * 1_000_000), 1_000_000)
        number = next(self._numbers)
        return f'{seconds}.M{microseconds:06}P{os.getpid()}Q{number}R{secrets.token_hex(4)}.{self._host}'

    def drop(self, file: LockedFile) -> None:
        """Remove what must not be delivered.  Never raises: what cannot be removed is logged, and let go of."""
        try:
            file.remove()
        except FileNotFoundError:
            pass
        except OSError as error:
            log.critical('%s must not be delivered and cannot be removed: %s', file.path, _reason(error))
        self.let_go(file)

    def refusal(self, error: OSError) -> QueueError:
        """The "no" of this queue, for a person."""
        return QueueError(f'The queue {self.path} cannot take the message: {_reason(error)}')

    def changed(self, folder: str) -> None:
        """Note a change of a folder that is to be made durable with the next batch."""
        self._changes.note(folder)

    def flush(self) -> None:
        """See `IMailQueue`."""
        self._changes.flush()

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
            if not claim.is_readable():
                continue
            if claim.deaths + 1 >= MAX_DEATHS:
                reason = f'given up: the process that delivered it died, {MAX_DEATHS} times'
                claim.settle(Settlement(counted=False, burials=(Burial(claim.recipients, reason),)))
                buried.append(claim.id)
            elif claim.orphaned():
                orphans.append(claim.id)
        return tuple(orphans), tuple(buried)

    def _recover_in_doubt(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        held, sent, discarded = [], [], []
        for entry in list(self._files('prepared')):
            file = self.take('prepared', entry.name)
            if file is None:
                continue
            if self.in_doubt == 'send' and self._publish_in_doubt(file):
                sent.append(file.name)
            elif self.in_doubt == 'discard':
                self.drop(file)
                self.changed('prepared')
                discarded.append(file.name)
            else:
                held.append(file.name)
            self.let_go(file)
        return tuple(held), tuple(sent), tuple(discarded)

    def _publish_in_doubt(self, file: LockedFile) -> bool:
        try:
            file.move(self.place('new', file.name))
        except OSError as error:
            _log_trouble(f'{file.path} is in doubt and cannot be sent: {_reason(error)}')
            return False
        self.changed('new')
        return True

    def _sweep(self, now: float) -> tuple[str, ...]:
        swept = []
        for entry in list(self._files('tmp')):
            try:
                age = now - entry.stat(follow_symlinks=False).st_mtime
            except FileNotFoundError:
                continue
            if age > STALE_AFTER and (file := self.take('tmp', entry.name)) is not None:
                self.drop(file)
                swept.append(entry.name)
        return tuple(swept)

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
        self.let_go(file)
        return True

    def _forget_parent(self) -> None:
        """In a forked child: the claims are the parent's, and so is what it has yet to make durable."""
        for file in list(self._held):
            file.abandon()
        self._held = set()
        self._changes = _UnsyncedChanges(self.path)


@implementer(IStaging)
class MaildirStaging:
    """
    See `IStaging`.

    Until :meth:`prepare` the messages are in memory only.
    """

    def __init__(self, queue: MaildirQueue) -> None:
        self._queue = queue
        self._added: list[tuple[Envelope, bool]] = []
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
                self._files.append(queue.write_new(envelope))
            for file in self._files:
                file.move(queue.place('prepared', file.name))
            # A "yes" must outlive a power cut: the other resources may commit on the strength of it.
            locked_file.sync_folder(queue.place('prepared'))
        except OSError as error:
            self._drop_files()
            raise queue.refusal(error) from error
        except BaseException:
            self._drop_files()
            raise

    def publish(self) -> list[IClaim | None]:
        """See `IStaging`."""
        claims = [self._publish(file, claimed) for file, (_, claimed) in zip(self._files, self._added, strict=True)]
        for folder in {'cur' if claimed else 'new' for _, claimed in self._added}:
            try:
                locked_file.sync_folder(self._queue.place(folder))
            except OSError as error:
                log.critical(
                    'Messages are in %s, but a power cut may lose them: %s', self._queue.place(folder), _reason(error)
                )
        self._files, self._added = [], []
        return claims

    def _publish(self, file: LockedFile, claimed: bool) -> IClaim | None:
        queue = self._queue
        if file.closed:
            return None
        try:
            file.move(queue.place('cur' if claimed else 'new', file.name))
        except OSError as error:
            # Only a person can help now.  Without a lock mq-run reports the message as in doubt.
            log.critical(
                'The transaction has committed, but its message stays in doubt in %s: %s', file.path, _reason(error)
            )
            queue.let_go(file)
            return None
        if claimed:
            return MaildirClaim(queue, file)
        queue.let_go(file)
        return None

    def discard(self) -> list[Envelope]:
        """See `IStaging`."""
        dropped = [envelope for envelope, _ in self._added]
        self._added = []
        self._drop_files()
        return dropped

    def _drop_files(self) -> None:
        files, self._files = self._files, []
        if not files:
            return
        for file in files:
            if not file.closed:
                self._queue.drop(file)
        try:
            # A power cut must not bring back what was voted for and then aborted.
            locked_file.sync_folder(self._queue.place('prepared'))
        except OSError as error:
            log.error('%s cannot be synced: %s', self._queue.place('prepared'), _reason(error))


@implementer(IClaim)
class MaildirClaim:
    """See `IClaim`.  Made for a file in ``cur/`` that is held."""

    def __init__(self, queue: MaildirQueue, file: LockedFile) -> None:
        self._queue = queue
        self._file = file
        self._header: QueueHeader | None = None
        self._envelope: Envelope | None = None
        self.id, self.deaths = _split_name(file.name)

    def __repr__(self) -> str:
        return f'<MaildirClaim {self._file.name}>'

    @property
    def attempts(self) -> int:
        """See `IClaim`."""
        return self._read_header().attempts

    @property
    def queued_at(self) -> float:
        """See `IClaim`."""
        return self._read_header().queued_at

    @property
    def recipients(self) -> tuple[str, ...]:
        """Who the message is still open for, without reading its content."""
        return self._read_header().recipients

    @property
    def envelope(self) -> Envelope:
        """See `IClaim`."""
        if self._envelope is None:
            with self._file.reader() as reader:
                header = self._header = read_header(reader)
                self._envelope = Envelope(header.sender, header.recipients, reader.read())
        return self._envelope

    def _read_header(self) -> QueueHeader:
        if self._header is None:
            with self._file.reader() as reader:
                self._header = read_header(reader)
        return self._header

    def is_readable(self) -> bool:
        """Whether the file can be parsed; if not, the claim ends here, and the file is put aside untouched."""
        try:
            self._read_header()
        except QueueFileError as error:
            self._put_aside(error)
            return False
        except OSError as error:
            _log_trouble(f'{self._file.path} cannot be read: {_reason(error)}')
            self.release()
            return False
        return True

    def _put_aside(self, error: QueueFileError) -> None:
        queue, file = self._queue, self._file
        try:
            file.move(queue.place('corrupt', file.name))
            queue.changed('corrupt')
            log.error('status=corrupt id=%s file=%s error="%s"', self.id, file.path, error)
        except OSError as move_error:
            _log_trouble(f'{file.path} is damaged ({error}) and cannot be put aside: {_reason(move_error)}')
        queue.let_go(file)

    def release(self) -> None:
        """See `IClaim`."""
        if self._file.closed:
            return
        self._back_to_new(self._file.name)

    def orphaned(self) -> bool:
        """Let an orphan wait again, with one more death counted in its name.  False if that failed (logged)."""
        return self._back_to_new(f'{self.id}{_DEATHS}{self.deaths + 1}')

    def _back_to_new(self, name: str) -> bool:
        try:
            self._file.move(self._queue.place('new', name))
            self._queue.changed('new')
        except OSError as error:
            _log_trouble(f'{self._file.path} stays in progress until the next run: {_reason(error)}')
            return False
        finally:
            self._queue.let_go(self._file)
        return True

    def settle(self, settlement: Settlement) -> None:
        """See `IClaim`."""
        if self._file.closed:
            return
        try:
            self._settle(settlement)
        except OSError as error:
            log.critical(
                'status=unsettled id=%s error="%s": the message stays as it was, and may be delivered again',
                self.id,
                _reason(error),
            )
            self._postpone(settlement.due)
        finally:
            self._queue.let_go(self._file)

    def _settle(self, settlement: Settlement) -> None:
        # Dead letters first: between the two steps a crash may repeat one, and its name makes that the same file.
        for burial in settlement.burials:
            self._bury(burial, settlement)
        if settlement.burials:
            locked_file.sync_folder(self._queue.place('dead'))
        if not settlement.waiting:
            self._file.remove()
            self._queue.changed('cur')
        elif settlement.counted or settlement.waiting != self.recipients:
            self._rewrite(settlement)
            self._back_to_new(self._file.name)
        else:
            self.release()

    def _bury(self, burial: Burial, settlement: Settlement) -> None:
        header = self._next_header(burial.recipients, settlement, burial.reason)
        names = hashlib.sha256('\0'.join(sorted(burial.recipients)).encode()).hexdigest()
        file = self._queue.write(header, self.envelope.content)
        try:
            file.move(self._queue.place('dead', f'{self.id}.{names[:8]}'))
        except OSError:
            self._queue.drop(file)
            raise
        self._queue.let_go(file)

    def _rewrite(self, settlement: Settlement) -> None:
        """Put the next version of the message in the place of this one, held from its first moment on."""
        header = self._next_header(settlement.waiting, settlement, settlement.last_reply)
        due = os.fstat(self._file.fd).st_mtime if settlement.due is None else settlement.due
        file = self._queue.write(header, self.envelope.content, due)
        try:
            file.move(self._file.path)
        except OSError:
            self._queue.drop(file)
            raise
        self._queue.let_go(self._file)
        self._file = file

    def _next_header(self, recipients: tuple[str, ...], settlement: Settlement, last_reply: str) -> QueueHeader:
        header = self._read_header()
        return dataclasses.replace(
            header,
            recipients=recipients,
            attempts=header.attempts + settlement.counted,
            last_attempt=self._queue.clock() if settlement.counted or last_reply else header.last_attempt,
            last_reply=last_reply or header.last_reply,
        )

    def _postpone(self, due: float | None) -> None:
        """The next version cannot be written (a full disk); keep the old one, which needs no room, and its order."""
        if self._file.closed:
            return
        try:
            if due is not None:
                os.utime(self._file.fd, (due, due))
        except OSError as error:
            _log_trouble(f'{self._file.path} cannot be given its due time: {_reason(error)}')
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
                locked_file.sync_folder(path)
            except OSError as error:
                _log_trouble(f'{path} cannot be synced: {_reason(error)}')


_DEATHS = ',deaths='


def _split_name(name: str) -> tuple[str, int]:
    """Return the id of a message and how many deliverers it has outlived."""
    id_, _, deaths = name.partition(_DEATHS)
    return id_, int(deaths) if deaths.isascii() and deaths.isdigit() else 0


def _in_file_name(host: str) -> str:
    return host.replace('/', '\\057').replace(':', '\\072').replace(',', '\\054') or 'localhost'


def _reason(error: OSError) -> str:
    """What the operating system said, without the paths that the sentence around it already names."""
    return error.strerror or str(error)


def _log_trouble(text: str) -> None:
    log.error('%s', text)
