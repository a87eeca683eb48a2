"""
The directory in a move (:mod:`~.queues.moving`): its messages, and its record of what is decided.

::

    queue_dir/moving/                               is created by the first move
        NAME,moving=BATCH.out.STATE                 a message that leaves; STATE is the folder to which it would go back
        NAME,moving=BATCH.in.STATE                  a copy that comes; STATE is the folder to which it will go
        .decided-BATCH                              the decision
        .lock                                       held by the one move that is at work
        .record                                     the id of this directory, and the database of its last move

A message in ``moving/`` is held by the move that is at work; what is not held is in doubt.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from errno import EACCES, ENAMETOOLONG, EPERM
from typing import NamedTuple

from pyramid_mailqueue.exceptions import ConfigurationError, QueueError, QueueFileError
from pyramid_mailqueue.logs import why
from pyramid_mailqueue.queues.maildir.claim import FileName, unused
from pyramid_mailqueue.queues.maildir.folders import MOVING, born_of
from pyramid_mailqueue.queues.maildir.locked_file import Holder, LockedFile, sync_folder
from pyramid_mailqueue.queues.maildir.queue import SUPPLY, MaildirQueue
from pyramid_mailqueue.queues.maildir.queue_file import MAX_HEADER_OCTETS, parse_header
from pyramid_mailqueue.queues.moving import IN, OUT, Parcel, batched
from pyramid_mailqueue.queues.sql.engine import is_same_database

__all__ = ['DirectoryRecord', 'MaildirSide']

#: The folders of messages that can be moved.
_FOLDERS = {'waiting': 'new', 'held': 'held', 'dead': 'dead'}

#: Errors that concern one file, and not the directory.
_ABOUT_ONE_FILE = frozenset({EACCES, ENAMETOOLONG, EPERM})

#: How long to wait for a file that an observer holds, in seconds.
PATIENCE = 5


_MARKED = re.compile(r'(.+),moving=([0-9a-f.]+)\.(in|out)\.(new|held|dead)', re.DOTALL)


class _Mark(NamedTuple):
    """The parts of the name of a file in ``moving/``."""

    name: str
    batch: str
    role: str
    folder: str

    @classmethod
    def parse(cls, file_name: str) -> _Mark | None:
        """Parse the name; None if no move has given it."""
        match = _MARKED.fullmatch(file_name)
        return cls(*match.groups()) if match else None

    def __str__(self) -> str:
        return f'{self.name},moving={self.batch}.{self.role}.{self.folder}'


class MaildirSide:
    """See `Side`."""

    def __init__(self, queue: MaildirQueue) -> None:
        self._queue = queue
        self.name = queue.path
        # What this move holds in moving/, by its name there.
        self._held: dict[str, LockedFile] = {}

    def close(self) -> None:
        """Close the files that are left half-way: they are in doubt from now on."""
        for name in [*self._held]:
            self._let_go(name)

    def recover(self) -> None:
        """See `Side`."""
        self._queue.recover(self._queue.clock())

    def counts(self) -> Mapping[str, int]:
        """See `Side`."""
        return self._queue.counts()

    # -- what leaves

    def batches(self, state: str) -> Iterator[Sequence[str]]:
        """See `Side`."""
        folder = _FOLDERS[state]
        return batched((name, self._size(folder, name)) for name in self._names(folder))

    def _names(self, folder: str) -> Iterator[str]:
        """Yield the names, a part at a time: the folder changes meanwhile."""
        last = ''
        while found := heapq.nsmallest(SUPPLY, (it.name for it in self._queue.files(folder) if it.name > last)):
            yield from found
            last = found[-1]

    def _size(self, folder: str, name: str) -> int:
        try:
            return os.stat(self._queue.place(folder, name), follow_symlinks=False).st_size
        except OSError:
            return 0

    def take(self, batch: str, state: str, ids: Sequence[str], refuse: Callable[[str, str], None]) -> list[Parcel]:
        """See `Side`."""
        parcels = []
        for name in ids:
            try:
                parcel = self._take(batch, state, name)
            except QueueFileError as error:
                refuse(name, f'its file is damaged: {error}')
            except OSError as error:
                if error.errno not in _ABOUT_ONE_FILE:
                    raise
                refuse(name, why(error))
            else:
                parcels += [parcel] if parcel is not None else []
        if parcels:
            # Synced before the other queue relies on it: a power cut must not undo it.
            for folder in (MOVING, _FOLDERS[state]):
                sync_folder(self._queue.place(folder))
        return parcels

    def _take(self, batch: str, state: str, name: str) -> Parcel | None:
        folder = _FOLDERS[state]
        file = self._queue.hold(folder, name)
        if file is None:
            return None
        try:
            parcel = _parcel(state, file)
            mark = str(_Mark(name, batch, OUT, folder))
            file.move(self._queue.place(MOVING, mark))
        except BaseException:
            file.close()
            raise
        self._held[mark] = file
        return parcel

    # -- what comes

    def stage(self, batch: str, parcels: Sequence[Parcel]) -> list[str]:
        """See `Side`."""
        ids = [self._queue.new_name(parcel.born) for parcel in parcels]
        for id_, parcel in zip(ids, parcels, strict=True):
            name = str(FileName(id_, parcel.stumbles, parcel.deaths))
            mark = str(_Mark(name, batch, IN, _FOLDERS[parcel.state]))
            path = self._queue.place(MOVING, mark)
            self._held[mark] = self._queue.write(path, parcel.header, parcel.content, parcel.due)
        sync_folder(self._queue.place(MOVING))
        return ids

    # -- how it ends

    def unfinished(self) -> set[str]:
        """See `Side`."""
        return {mark.batch for mark in self._marks()}

    def remove(self, batch: str, role: str) -> None:
        """See `Side`."""
        gone = [str(mark) for mark in self._marks() if (mark.batch, mark.role) == (batch, role)]
        for name in gone:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._queue.place(MOVING, name))
            self._let_go(name)
        if gone:
            sync_folder(self._queue.place(MOVING))

    def publish(self, batch: str, role: str) -> None:
        """See `Side`.  Each is held until a power cut cannot bring it back to ``moving/``."""
        marks = [mark for mark in self._marks() if (mark.batch, mark.role) == (batch, role)]
        files = []
        try:
            for mark in marks:
                files.append(self._hold(str(mark)))
                files[-1].move(unused(self._queue.place(mark.folder, mark.name)))
            for folder in dict.fromkeys((*(mark.folder for mark in marks), *([MOVING] if marks else []))):
                sync_folder(self._queue.place(folder))
        finally:
            for file in files:
                file.close()

    def _marks(self) -> list[_Mark]:
        return sorted(mark for file in self._queue.files(MOVING) if (mark := _Mark.parse(file.name)) is not None)

    def _hold(self, name: str) -> LockedFile:
        """Hold a file in ``moving/``, if this move does not hold it already; an observer may hold it for a moment."""
        file = self._held.pop(name, None)
        end = time.monotonic() + PATIENCE
        while file is None or file.closed:
            file = self._queue.hold(MOVING, name)
            if file is None and time.monotonic() > end:
                raise QueueError(f'{self._queue.place(MOVING, name)} is in use right now. Try again in a moment.')
            if file is None:
                time.sleep(0.01)
        return file

    def _let_go(self, name: str) -> None:
        file = self._held.pop(name, None)
        if file is not None:
            file.close()


def _parcel(state: str, file: LockedFile) -> Parcel:
    """Raises QueueFileError, and OSError."""
    header, start = parse_header(file.head(MAX_HEADER_OCTETS))
    name = FileName.parse(file.name)
    born = born_of(file.name)
    return Parcel(
        file.name,
        state,
        header.queued_at if born is None else born,
        file.modified,
        header,
        file.read(start),
        name.stumbles,
        name.deaths,
    )


def _told(database: str, schema: str) -> str:
    return f'{database} (schema {schema})' if schema else database


class DirectoryRecord:
    """
    See `Decisions`.

    :param queue: the queue in the directory
    :param database: the URL of the database, without its password
    :param schema: the schema that its tables are in
    """

    def __init__(self, queue: MaildirQueue, database: str, schema: str = '') -> None:
        self.place = queue.path
        self._queue = queue
        self._database = database
        self._schema = schema
        self._numbers = itertools.count(1)
        self._holder = Holder()
        #: The id of this directory in the database; and that of the last move that named batches.
        self.directory, self.run = '', ''

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """See `Decisions`.  Raises ConfigurationError if there are messages half-way to another database."""
        os.makedirs(self._queue.place(MOVING), 0o700, exist_ok=True)
        path = self._queue.place(MOVING, '.lock')
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        lock = self._holder.take(path)
        if lock is None:
            raise QueueError(f'Another move is at work in {self._queue.path}.')
        try:
            sync_folder(self._queue.path)
            # What a dead move has decided or removed can be seen before it is durable.
            sync_folder(self._queue.place(MOVING))
            self._read()
            yield
        finally:
            lock.close()

    def _read(self) -> None:
        try:
            with open(self._queue.place(MOVING, '.record'), 'rb') as fp:
                record = json.load(fp)
            self.directory, self.run, database = record['directory'], record['run'], record['database']
            is_ours = is_same_database(database, self._database)
            # Older versions did not record it.
            schema = record.get('schema', self._schema)
        except FileNotFoundError:
            self._name_directory()
            return
        except (ValueError, KeyError, TypeError) as error:
            raise QueueError(f'{self._queue.place(MOVING, ".record")} is damaged.') from error
        half_way = sum(_Mark.parse(file.name) is not None for file in self._queue.files(MOVING))
        if not (is_ours and schema == self._schema) and (half_way or self.decided()):
            there, here = _told(database, schema), _told(self._database, self._schema)
            raise ConfigurationError(
                f'{self._queue.place(MOVING)} holds messages that are half-way between this directory and {there}, '
                f'and mailqueue.sql_url names {here}. Finish that move with the other URL first (--set '
                f'mailqueue.sql_url=...). If both are the same database, write its new name into '
                f'{self._queue.place(MOVING, ".record")}.'
            )

    def _name_directory(self) -> None:
        self.directory = secrets.token_hex(4)
        self.begin()

    def begin(self) -> None:
        """See `Decisions`."""
        self.run = secrets.token_hex(4)
        record = {'directory': self.directory, 'run': self.run, 'database': self._database, 'schema': self._schema}
        temporary = self._queue.place('tmp', self._queue.new_name())
        file = self._holder.create(temporary, [json.dumps(record).encode() + b'\n'])
        try:
            file.move(self._queue.place(MOVING, '.record'))
            sync_folder(self._queue.place(MOVING))
        finally:
            file.close()

    def new_batch(self) -> str:
        """See `Decisions`."""
        return f'{self.directory}.{self.run}.{next(self._numbers)}'

    def decide(self, batch: str) -> None:
        """See `Decisions`."""
        os.close(os.open(self._decision(batch), os.O_RDWR | os.O_CREAT, 0o600))
        sync_folder(self._queue.place(MOVING))

    def decided(self) -> set[str]:
        """See `Decisions`."""
        beginning = '.decided-'
        names = os.listdir(self._queue.place(MOVING))
        return {name.removeprefix(beginning) for name in names if name.startswith(beginning)}

    def forget(self, batch: str) -> None:
        """See `Decisions`.  If a power cut brings it back, nothing is left of its batch."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._decision(batch))

    def _decision(self, batch: str) -> str:
        return self._queue.place(MOVING, f'.decided-{batch}')
