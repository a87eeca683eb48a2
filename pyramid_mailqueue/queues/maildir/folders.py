"""
The folders of a queue directory, and what is done to the files in them.

What the folders mean, and when a file goes from one to another, is told in :mod:`~.maildir`.
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

#: Settled claims are made durable together: with this many changes, or with the first one that comes this many seconds
#: after the others began.
SYNC_EVERY = 100
SYNC_SECONDS = 0.5

#: In ``prepared/`` the file ``NAME+7`` is held by whoever holds ``NAME``, the first message of its transaction, which
#: comes there before all others and leaves after them.
FOLLOWER = '+'

#: The room on the disk of a removed file that is larger than this, in octets, is not kept until then.
LARGE = 64 * 1024


class MaildirFolders:
    """
    The folders at *path*.

    :param path: the queue directory
    :param clock: seconds since the epoch
    :param access: ``'create'`` creates what is missing; ``'use'`` needs a queue, and creates the folders that one of
        mailqueue-runner has not; ``'look'`` needs a queue, and no right to write
    :raises QueueError: the directory cannot be created or used, is no queue, or is somebody else's
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
        # Whether the last change of ours has failed.
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
        """The regular files of a folder; what starts with a dot is none of ours.  Raises QueueError."""
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
        Hold one file; None if it is gone, is held by somebody else, or cannot be opened (that is logged).

        Raises QueueError if none can be opened.
        """
        try:
            return self.hold(folder, name)
        except OSError as error:
            if error.errno in FOR_ALL:
                raise standstill(self.place(folder), error) from error
            log_trouble('cannot be opened', self.place(folder, name), error)
            return None

    def hold(self, folder: str, name: str) -> LockedFile | None:
        """Hold one file; None if it is gone or is held by somebody else.  Raises OSError if it cannot be opened."""
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
        """The same, with the content that begins at *start* in *source*.  It takes no memory, however large that is."""
        temporary = self.place('tmp', self.new_name())
        return self._put_at(
            path, self._holder.create(temporary, [serialize_header(header)], due, rest_of=(source, start))
        )

    def _put_at(self, path: str, file: LockedFile) -> LockedFile:
        try:
            file.move(path)
        except BaseException:
            file.find()
            # What is in its place already is the only version that there is.
            if file.folder == 'tmp':
                self.drop(file)
            file.close()
            raise
        return file

    def _write(self, header: QueueHeader, content: bytes, due: float | None = None) -> LockedFile:
        return self._holder.create(self.place('tmp', self.new_name()), (serialize_header(header), content), due)

    def new_name(self, born: float | None = None) -> str:
        """
        Return a name as a maildir has them (https://cr.yp.to/proto/maildir.html), sorted by time.

        The random part keeps forked children, and machines that share a name, apart.

        :param born: when the message came into a queue for the first time, in seconds since the epoch; None is now
        """
        seconds, microseconds = divmod(
            int(self.clock() * 1_000_000) if born is None else round(born * 1_000_000), 1_000_000
        )
        number = next(self._numbers)
        return f'{seconds}.M{microseconds:06}P{os.getpid()}Q{number}R{os.urandom(4).hex()}.{self._host}'

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
            log_trouble('must not be delivered, and cannot be removed', file.path, error, logging.CRITICAL)
            return False
        finally:
            file.close()
        return True

    def check_changes(self) -> None:
        """Raise QueueError if nothing can be removed from ``cur/``: what is sent would be sent again and again."""
        # Not one of ours, so that nobody delivers it where it stays.
        path = self.place('cur', '.removable')
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        except OSError as error:
            raise standstill(self.place('cur'), error) from error
        self.is_in_doubt = False

    def refusal(self, error: OSError) -> QueueError:
        """The "no" of this queue, for a person."""
        return QueueError(f'The queue {self.path} cannot take the message: {why(error)}')

    def changed(self, folder: str) -> None:
        """Note a change of a folder that is to be made durable with the next batch."""
        self._changes.note(folder)

    def removed(self, folder: str, file: LockedFile) -> None:
        """Let go of a file that was removed from a folder, and make that durable, with the next batch."""
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
        """At first, and in a forked child: what its parent has yet to make durable is the parent's business."""
        self._changes = _UnsyncedChanges(self.path)


class _UnsyncedChanges:
    """
    The folders that were changed since they were last made durable, and files that were removed from them.

    A batch that is full is ended by a thread of its own.  The file system takes its time to free what was in a file,
    and does that when the last one who has it open closes it.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        # Held by who makes a batch durable, or has it done: who has filled the next one meanwhile has to wait.
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
                # There can be no more threads.
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
        """Called when nothing is held: who hears of it may deliver mail."""
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
        # Two processes may start at once; and a umask may have taken away more than what 0700 leaves out.
        os.makedirs(path, 0o700, exist_ok=True)
        os.chmod(path, 0o700)
        return True
    check_access(path, os.R_OK | os.W_OK | os.X_OK)
    return False


def modified_time(entry: os.DirEntry[str]) -> float | None:
    """
    Return the time of modification of a file; None if it is gone, or cannot be looked at (that is logged).

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
    """Return when a message came into a queue for the first time, as its name tells; None if it does not."""
    match = _BORN.match(name)
    return int(match[1]) + int(match[2] or 0) / 1_000_000 if match else None


def _in_file_name(host: str) -> str:
    return host.replace('/', '\\057').replace(':', '\\072').replace(',', '\\054') or 'localhost'
