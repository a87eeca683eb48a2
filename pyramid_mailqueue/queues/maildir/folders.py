"""
The folders of a queue directory, and the operations on the files in them.

:mod:`~.maildir.queue` says what the folders mean, and when a file goes from one to another.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.logs import log_trouble, why
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir.inspection import FOLDERS, MOVING, NoQueue, check_access, lack_of_queue
from pyramid_mailqueue.queues.maildir.locked_file import Holder, LockedFile, abandon_all, sync_folder
from pyramid_mailqueue.queues.maildir.queue_file import QueueHeader, serialize_header
from pyramid_mailqueue.queues.maildir.trouble import FOR_ALL, FOR_ALL_LOOKS, cure_of, may_stay_open, standstill

__all__ = ['FOLDERS', 'MOVING', 'MaildirFolders', 'born_of', 'modified_time']

#: Settled claims are made durable in batches: with this many changes, or with the first one that comes this many
#: seconds after the batch began.
SYNC_EVERY = 100
SYNC_SECONDS = 0.5

#: In ``prepared/`` the lock of ``NAME``, the first message of its transaction, holds the file ``NAME+7``, too.
#: ``NAME`` comes there before all others and leaves after them.
FOLLOWER = '+'

#: A removed file that is larger than this, in octets, is not kept open until then: its disk space is freed at once.
LARGE = 64 * 1024


class MaildirFolders:
    """
    The folders at *path*.

    :param path: the queue directory
    :param clock: seconds since the epoch
    :param access: ``'create'`` creates what is missing; ``'use'`` needs a queue, and creates the folders that a queue
        of mailqueue-runner lacks; ``'look'`` needs a queue, and no right to write
    :raises QueueError: the directory cannot be created or used, is no queue, or is that of another program
    """

    def __init__(
        self, path: str | os.PathLike[str], clock: Callable[[], float] = time.time, *, access: str = 'create'
    ) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.clock = clock
        self._host = _in_file_name(socket.gethostname())
        self._numbers = itertools.count(1)
        self._holder = Holder()
        self._absent = {MOVING}
        self._open_folders(access)
        # Whether the last change failed.
        self.is_in_doubt = False
        self._forget_changes()
        call_in_children(self._forget_changes)

    def _open_folders(self, access: str) -> None:
        lack = lack_of_queue(self.path)
        if lack and access != 'create':
            raise NoQueue(self.path, lack)
        try:
            if access == 'look':
                self._look_at_folders()
            else:
                self._create_folders()
        except OSError as error:
            raise QueueError(f'The queue directory {self.path} cannot be created or used: {why(error)}') from error

    def _look_at_folders(self) -> None:
        self._absent.update(folder for folder in FOLDERS if not os.path.isdir(self.place(folder)))
        for folder in FOLDERS:
            if folder not in self._absent:
                check_access(self.place(folder), os.R_OK | os.X_OK)

    def _create_folders(self) -> None:
        if _create_folder(self.path):
            sync_folder(os.path.dirname(self.path))
        created = [folder for folder in map(self.place, FOLDERS) if _create_folder(folder)]
        if created:
            sync_folder(self.path)

    def place(self, folder: str, name: str = '') -> str:
        """Return the path of a folder of this queue, or of a file in it."""
        return f'{self.path}/{folder}/{name}' if name else f'{self.path}/{folder}'

    def files(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """Yield the regular files of a folder, but for names that start with a dot.  Raises QueueError."""
        try:
            with os.scandir(self.place(folder)) as entries:
                for entry in entries:
                    if not entry.name.startswith('.') and entry.is_file(follow_symlinks=False):
                        yield entry
        except OSError as error:
            if folder in self._absent and isinstance(error, FileNotFoundError):
                return
            raise QueueError(f'The folder {self.place(folder)} cannot be read: {why(error)}{cure_of(error)}') from error

    def take(self, folder: str, name: str) -> LockedFile | None:
        """
        Hold one file; None if it is gone, is held elsewhere, or cannot be opened (logged).

        Raises QueueError if no file can be opened.
        """
        try:
            return self.hold(folder, name)
        except OSError as error:
            if error.errno in FOR_ALL:
                raise standstill(self.place(folder), error) from error
            log_trouble('cannot be opened', self.place(folder, name), error)
            return None

    def hold(self, folder: str, name: str) -> LockedFile | None:
        """Hold one file; None if it is gone or is held elsewhere.  Raises OSError if it cannot be opened."""
        first, is_follower, _ = name.rpartition(FOLLOWER)
        if is_follower and folder == 'prepared' and self._holder.is_held(self.place(folder, first)):
            return None
        return self._holder.take(self.place(folder, name))

    def prepare(self, files: Sequence[LockedFile]) -> None:
        """
        Move the new files of one transaction to ``prepared/``.

        Those that are closed are held there by the first one (see :data:`FOLLOWER`).  Raises OSError.
        """
        for number, file in enumerate(files, 1):
            name = f'{files[0].name}{FOLLOWER}{number}' if file.closed else file.name
            file.move(self.place('prepared', name))

    def create(self, envelope: Envelope) -> LockedFile:
        """Write a new message to ``tmp/``, durably, and hold it.  Raises OSError."""
        return self._write(QueueHeader(envelope.sender, envelope.recipients, queued_at=self.clock()), envelope.content)

    def write(self, path: str, header: QueueHeader, content: bytes, due: float | None = None) -> LockedFile:
        """Write a version of a message, durably, put it at *path* and hold it.  Raises OSError."""
        return self._put_at(path, self._write(header, content, due))

    def rewrite(
        self, path: str, header: QueueHeader, source: LockedFile, start: int, due: float | None = None
    ) -> LockedFile:
        """As :meth:`write`, with the content that begins at *start* in *source*; takes no memory, whatever its size."""
        temporary = self.place('tmp', self.new_name())
        return self._put_at(
            path, self._holder.create(temporary, [serialize_header(header)], due, rest_of=(source, start))
        )

    def _put_at(self, path: str, file: LockedFile) -> LockedFile:
        try:
            file.move(path)
        except BaseException:
            file.find()
            # A file that is in its place already is the only version.
            if file.folder == 'tmp':
                self.drop(file)
            file.close()
            raise
        return file

    def _write(self, header: QueueHeader, content: bytes, due: float | None = None) -> LockedFile:
        return self._holder.create(self.place('tmp', self.new_name()), (serialize_header(header), content), due)

    def new_name(self, born: float | None = None) -> str:
        """
        Return a file name of a maildir (https://cr.yp.to/proto/maildir.html); names sort by time.

        The random part distinguishes forked children, and machines that share a name.

        :param born: when the message first came into a queue, in seconds since the epoch; None is now
        """
        seconds, microseconds = divmod(
            int(self.clock() * 1_000_000) if born is None else round(born * 1_000_000), 1_000_000
        )
        number = next(self._numbers)
        return f'{seconds}.M{microseconds:06}P{os.getpid()}Q{number}R{os.urandom(4).hex()}.{self._host}'

    @contextlib.contextmanager
    def dropped_on_error(self, file: LockedFile) -> Iterator[None]:
        """Remove *file* if the block raises."""
        try:
            yield
        except BaseException:
            self.drop(file)
            raise

    def drop(self, file: LockedFile) -> bool:
        """Remove a file and close it.  Never raises: False if it cannot be removed (logged)."""
        try:
            file.remove()
        except OSError as error:
            log_trouble('must not be delivered, and cannot be removed', file.path, error, logging.CRITICAL)
            return False
        finally:
            file.close()
        return True

    def check_changes(self) -> None:
        """Raise QueueError if nothing can be removed from ``cur/``: sent messages would be sent again and again."""
        # A name with a dot, which is never delivered if it stays.
        path = self.place('cur', '.removable')
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        except OSError as error:
            raise standstill(self.place('cur'), error) from error
        self.is_in_doubt = False

    def refusal(self, error: OSError) -> QueueError:
        """Return the error for a message that this queue cannot take."""
        return QueueError(f'The queue {self.path} cannot take the message: {why(error)}')

    def changed(self, folder: str) -> None:
        """Note a change of a folder that is to be made durable with the next batch."""
        self._changes.note(folder)

    def removed(self, folder: str, file: LockedFile) -> None:
        """Release a file that was removed from a folder; the removal is made durable with the next batch."""
        try:
            is_small = file.size <= LARGE
        except OSError:
            is_small = False
        self._changes.note(folder, self._holder.take_over(file) if is_small else None)

    def flush(self) -> QueueError | None:
        """See `IMailQueue`."""
        self._changes.flush()
        return None

    def _forget_changes(self) -> None:
        """Start without changes, also in a forked child: the parent makes its own changes durable."""
        self._changes = _UnsyncedChanges(self.path)


class _UnsyncedChanges:
    """
    The folders that were changed since the last sync, and files that were removed from them.

    A full batch is synced by a thread of its own, which also closes the removed files: the file system frees their
    space when the last open descriptor is closed, which takes time.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        # Held while a batch is synced or handed to the thread: the caller that fills the next one has to wait.
        self._syncing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._troubles: deque[tuple[str, OSError]] = deque()
        self._begin()

    def _begin(self) -> None:
        self._folders: set[str] = set()
        self._files: list[LockedFile] = []
        self._count = 0
        self._since = 0.0

    def note(self, folder: str, file: LockedFile | None = None) -> None:
        now = time.monotonic()
        with self._lock:
            if not self._count:
                self._since = now
            self._folders.add(folder)
            if file is not None and may_stay_open(file.fd):
                self._files.append(file)
            elif file is not None:
                file.abandon()
            self._count += 1
            if self._count < SYNC_EVERY and now - self._since < SYNC_SECONDS:
                return
        with self._syncing:
            self._wait()
            folders, files = self._take()
            thread = threading.Thread(target=self._end, args=(folders, files), name='mailqueue-sync', daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError:
                # No more threads can be started.
                self._end(folders, files)
            except BaseException:
                self._folders |= folders
                raise
        self._tell()

    def flush(self) -> None:
        with self._syncing:
            self._wait()
            folders, files = self._take()
            try:
                self._end(folders, files)
            except BaseException:
                self._folders |= folders
                raise
        self._tell()

    def _tell(self) -> None:
        """Called without a lock: a log handler may send mail."""
        while self._troubles:
            path, error = self._troubles.popleft()
            log_trouble('holds changes that a power cut may undo', path, error)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _take(self) -> tuple[set[str], list[LockedFile]]:
        with self._lock:
            batch = self._folders, self._files
            self._begin()
        return batch

    def _end(self, folders: set[str], files: list[LockedFile]) -> None:
        for folder in folders:
            path = os.path.join(self._path, folder)
            try:
                sync_folder(path)
            except OSError as error:
                self._troubles.append((path, error))
        abandon_all(files)


def _create_folder(path: str) -> bool:
    """Return whether the folder had to be created.  Raises OSError, also if it is there and cannot be used."""
    if not os.path.isdir(path):
        # Two processes may start at once; and a umask may remove more rights than 0700 does.
        os.makedirs(path, 0o700, exist_ok=True)
        os.chmod(path, 0o700)
        return True
    check_access(path, os.R_OK | os.W_OK | os.X_OK)
    return False


def modified_time(entry: os.DirEntry[str]) -> float | None:
    """
    Return the time of modification of a file; None if it is gone, or cannot be looked at (logged).

    Raises QueueError if nothing in its folder can be looked at.
    """
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in FOR_ALL_LOOKS:
            raise standstill(os.path.dirname(entry.path), error) from error
        log_trouble('cannot be looked at', entry.path, error)
        return None


_BORN = re.compile(r'([0-9]{1,12})\.(?:M([0-9]{1,6})(?![0-9]))?')


def born_of(name: str) -> float | None:
    """Return when a message first came into a queue, from its name; None if the name does not tell."""
    match = _BORN.match(name)
    return int(match[1]) + int(match[2] or 0) / 1_000_000 if match else None


def _in_file_name(host: str) -> str:
    return host.replace('/', '\\057').replace(':', '\\072').replace(',', '\\054') or 'localhost'
