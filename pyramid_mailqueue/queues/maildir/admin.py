"""
Lists, inspects and changes the messages of a :class:`~.maildir.MaildirQueue`.

Looking at a message takes no lock (but for a moment in ``prepared/`` and ``moving/``): a file in the queue is never
changed in place, so an open one can be read to its end.  A change holds the file meanwhile, as delivery does; files
that are held elsewhere are left alone.

Each change is one ``rename`` or ``unlink``, and is durable before the method returns::

    new  --hold--> held --unhold--> new     as it was, with its due time
    dead, prepared --retry, release--> new  after a new version was renamed over the file, where it was

After a crash between the two steps of the last line a dead letter is still a dead letter, and a message in doubt is
still in doubt: there is one file of it at all times.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from typing import BinaryIO

from zope.interface import implementer

from pyramid_mailqueue.exceptions import NoSuchMessage, QueueError, QueueFileError, WrongState
from pyramid_mailqueue.interfaces import IQueueAdmin
from pyramid_mailqueue.logs import log_trouble, why
from pyramid_mailqueue.queues.admin import REASONS, QueueAdmin, meant_by, refusal
from pyramid_mailqueue.queues.entries import (
    POSSIBLE,
    Glance,
    QueueEntry,
    QueueStats,
    log_expired,
    oldest_first,
    tally,
    tell_from_header,
)
from pyramid_mailqueue.queues.maildir.claim import FileName
from pyramid_mailqueue.queues.maildir.folders import MOVING, MaildirFolders, born_of, modified_time
from pyramid_mailqueue.queues.maildir.locked_file import LockedFile, sync_folder
from pyramid_mailqueue.queues.maildir.queue_file import MAX_HEADER_OCTETS, is_queue_file, parse_header, read_header

__all__ = ['MaildirAdmin']

STATE_OF = {
    'prepared': 'in doubt',
    MOVING: 'in doubt',
    'new': 'waiting',
    'cur': 'in progress',
    'held': 'held',
    'dead': 'dead',
    'corrupt': 'corrupt',
}

# What a file counts as once it is held: an interrupted delivery is over, an interrupted move has to be ended first.
_STATE_IF_HELD = {**STATE_OF, 'cur': 'waiting', MOVING: 'in a move'}

#: How many octets of a message are read to find its subject; and how many of a file if only its header is needed.
PEEK = 64 * 1024
GLANCE = 4096

#: At most this many names are kept in memory while messages are listed; then the folders are read again.  The first
#: rows of a list come after fewer of them.
SORTED_AT_ONCE = 200_000
SORTED_FIRST = 1000

#: The oldest message is among this many, unless most of them were retried.
OLDEST_FEW = 100

#: How often to look for a message that moves to another folder whenever it is found.
TRIES = 5

#: A retried message keeps its name, to which each burial adds a little; one longer than this many octets is replaced.
LONGEST_NAME = 150

_BORN = re.compile(r'([0-9]{1,12})\.')

_BUSY = {
    'prepared': 'its transaction is being committed right now',
    MOVING: 'it is being moved to another queue right now',
    'new': 'it is being delivered right now',
    'cur': 'it is being delivered right now',
}
_REASONS = {
    **{folder: REASONS[state] for folder, state in STATE_OF.items()},
    MOVING: 'it is half-way to or from a database; "mq-queue app.ini move --to-..." settles that.',
    'cur': 'its delivery was interrupted; the next mq-run resumes it.',
    'corrupt': 'its file is damaged; it can only be looked at, or deleted.',
}


@implementer(IQueueAdmin)
class MaildirAdmin(QueueAdmin):
    """See `IQueueAdmin`."""

    def __init__(self, folders: MaildirFolders) -> None:
        self._folders = folders
        # The names of files by their ids, where those differ, as of the last scan of all files.
        self._names: dict[str, str] = {}

    # -- what there is

    def entries(self, states: Collection[str]) -> Iterator[QueueEntry]:
        """See `IQueueAdmin`."""

        def looks() -> Iterator[tuple[float, QueueEntry]]:
            found = self._damaged() if {*states} == {'corrupt'} else self._oldest_first(states)
            for born, name, folder in found:
                if STATE_OF[folder] not in states and not self._is_damaged(folder, name):
                    continue
                entry = self._look(folder, name)
                if entry is not None and entry.state in states:
                    yield born, entry

        return oldest_first(looks())

    def _damaged(self) -> list[tuple[float, str, str]]:
        """As :meth:`_oldest_first`, which would sort all names to find the few that are damaged."""
        files = ((folder, file) for folder in STATE_OF for file in self._folders.files(folder))
        damaged = (
            (folder, file) for folder, file in files if folder == 'corrupt' or self._is_damaged(folder, file.name)
        )
        found = ((self._born(folder, file), file.name, folder) for folder, file in damaged)
        return sorted((born, name, folder) for born, name, folder in found if born is not None)

    def _is_damaged(self, folder: str, name: str) -> bool:
        glance = self._glance(folder, name)
        return glance is not None and glance.state == 'corrupt'

    def oldest(self, states: Collection[str]) -> QueueEntry | None:
        """See `IQueueAdmin`."""
        folders = _folders_of(states)
        few = heapq.nsmallest(OLDEST_FEW, self._after((-math.inf, ''), folders))
        oldest, since = self._oldest_of(((folder, name) for _, name, folder in few), states)
        # A name has the second in which its message came, or, after a retry, an earlier time.
        if len(few) == OLDEST_FEW and few[-1][0] <= since + 1:
            files = ((folder, file.name) for folder in folders for file in self._folders.files(folder))
            oldest, since = self._oldest_of(files, states)
        return self._look(*oldest) if since < math.inf else None

    def _oldest_of(self, files: Iterable[tuple[str, str]], states: Collection[str]) -> tuple[tuple[str, str], float]:
        """Return the folder and the name of the file that was queued first, and when; ``inf`` without any."""
        oldest, since = ('', ''), math.inf
        for folder, name in files:
            glance = self._glance(folder, name)
            if glance and glance.state in states and glance.queued_at is not None and glance.queued_at < since:
                oldest, since = (folder, name), glance.queued_at
        return oldest, since

    def stats(self, domains_of: Collection[str]) -> QueueStats:
        """See `IQueueAdmin`."""
        glances = (self._glance(folder, file.name) for folder in STATE_OF for file in self._folders.files(folder))
        return tally((glance for glance in glances if glance), self._folders.clock(), domains_of)

    def crashing(self, deaths: int, most: int) -> list[str]:
        """See `IQueueAdmin`."""
        names = (file.name for folder in ('cur', 'new') for file in self._folders.files(folder) if ',' in file.name)
        found = (name for name in map(FileName.parse, names) if name.deaths >= deaths)
        return [name.id for name in itertools.islice(found, most)]

    def _oldest_first(self, states: Collection[str]) -> Iterator[tuple[float, str, str]]:
        """Yield the time in the name, the name and the folder of files that may be in these states."""
        folders, at_once, last = _folders_of(states), SORTED_FIRST, (-math.inf, '')
        while found := heapq.nsmallest(at_once, self._after(last, folders)):
            yield from found
            if len(found) < at_once:
                return
            last = found[-1][:2]
            # Each round reads all names again.
            at_once = min(10 * at_once, SORTED_AT_ONCE)

    def _after(self, last: tuple[float, str], folders: Collection[str]) -> Iterator[tuple[float, str, str]]:
        for folder in folders:
            for file in self._folders.files(folder):
                born = self._born(folder, file)
                if born is not None and (born, file.name) > last:
                    yield born, file.name, folder

    def _born(self, folder: str, file: os.DirEntry[str]) -> float | None:
        """Return when a message first came into the queue, from its name.  None if it is gone."""
        match = _BORN.match(file.name)
        if match:
            return int(match[1])
        # A name from another program.
        entry = self._look(folder, file.name)
        return entry.queued_at if entry and entry.queued_at is not None else modified_time(file)

    def _look(self, folder: str, name: str) -> QueueEntry | None:
        """Return the entry of a file; None if it is gone, or not visible yet."""
        if folder in ('prepared', MOVING) and self._is_held(folder, name):
            return None
        try:
            with self._opened(folder, name) as fd:
                return _entry(folder, name, fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            return QueueEntry(name, STATE_OF[folder], last_reply=f'This file cannot be read: {why(error)}.')

    def _glance(self, folder: str, name: str) -> Glance | None:
        """Return only what is counted of it: a small part of the file is read."""
        if folder in ('prepared', MOVING) and self._is_held(folder, name):
            return None
        try:
            fd = self._open(folder, name)
            try:
                head, size = os.read(fd, GLANCE), os.fstat(fd).st_size
            finally:
                os.close(fd)
            header, start = parse_header(head)
        except (OSError, QueueFileError):
            # Its header may be longer.
            entry = self._look(folder, name)
            return Glance(entry.state, entry.queued_at, entry.size, entry.recipients) if entry else None
        return Glance(STATE_OF[folder], header.queued_at, size - start, header.recipients)

    @contextlib.contextmanager
    def _opened(self, folder: str, name: str) -> Iterator[int]:
        """Raises OSError."""
        fd = self._open(folder, name)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open(self, folder: str, name: str) -> int:
        # Whatever is there now: nothing outside of the queue is read, and nothing is waited for.
        return os.open(self._folders.place(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)

    def _is_held(self, folder: str, name: str) -> bool:
        file = self._folders.take(folder, name)
        if file is None:
            return True
        file.close()
        return False

    # -- one message

    def find(self, id: str) -> QueueEntry:
        """See `IQueueAdmin`."""
        for folder, name in self._tries(id):
            entry = self._look(folder, name)
            if entry is not None:
                return entry
        raise _gone(id)

    def content(self, id: str, start: int = 0, most: int | None = None) -> bytes:
        """See `IQueueAdmin`."""
        for folder, name in self._tries(id):
            try:
                with self._opened(folder, name) as fd, open(fd, 'rb', closefd=False) as fp:
                    return _content(fp, start, most)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise QueueError(f'{name} cannot be read: {why(error)}') from error
        raise _gone(id)

    def _tries(self, id: str) -> Iterator[tuple[str, str]]:
        """Yield where the message is, and again where it is then, if it has moved on."""
        for _ in range(TRIES):
            yield self._locate(id)

    def _locate(self, id: str) -> tuple[str, str]:
        for name in filter(None, (id, self._names.get(id))):
            for folder in STATE_OF:
                if self._is_file(folder, name):
                    return folder, name
        found = self._look_for(id)
        return found[meant_by(id, found)]

    def _look_for(self, beginning: str) -> dict[str, tuple[str, str]]:
        """Return the folders and names of matching files by their ids; note all names that differ from their ids."""
        found = {}
        self._names.clear()
        for folder in STATE_OF:
            for file in self._folders.files(folder):
                if ',' in file.name:
                    self._names[_id_of(file.name)] = file.name
                if beginning and file.name.startswith(beginning):
                    found[_id_of(file.name)] = folder, file.name
        return found

    def _is_file(self, folder: str, name: str) -> bool:
        # What is not the name of a file here must not become a path: it might lead out of the queue.
        if not name or '/' in name or name.startswith('.'):
            return False
        try:
            return stat.S_ISREG(os.stat(self._folders.place(folder, name), follow_symlinks=False).st_mode)
        except (OSError, ValueError):
            return False

    # -- what is done to it

    def _apply(self, action: str, id: str) -> tuple[str, QueueEntry]:
        with self._taken(action, id) as taken:
            if action == 'delete':
                return taken.id, taken.removed()
            if action == 'release' or taken.folder == 'dead':
                taken.renew()
            elif action == 'retry':
                taken.make_due()
            return taken.id, taken.moved('held' if action == 'hold' else 'new')

    def _make_due(self) -> int:
        now = self._folders.clock()
        flushed = 0
        for entry in self._folders.files('new'):
            modified = modified_time(entry)
            if modified is None or modified <= now:
                continue
            file = self._folders.take('new', entry.name)
            if file is None:
                # It is held elsewhere just now, so it was due.
                continue
            try:
                os.utime(file.fd, (now, now))
            except OSError as error:
                raise QueueError(f'{entry.name} cannot be made due: {why(error)}') from error
            finally:
                file.close()
            flushed += 1
        return flushed

    def expire(self, before: float, most: int) -> list[str]:
        """See `IQueueAdmin`."""
        expired: list[str] = []
        for file in self._folders.files('dead'):
            if len(expired) == most:
                break
            # Files that cannot be old enough are not opened: the name is older than the dead letter.
            if (born_of(file.name) or 0) < before and (modified_time(file) or math.inf) < before:
                expired += self._expire(file.name, before)
        return expired

    def _expire(self, name: str, before: float) -> list[str]:
        file = self._folders.take('dead', name)
        if file is None:
            return []
        try:
            entry = _entry('dead', name, file.fd)
            if entry.is_dead_since(before):
                log_expired(entry)
                file.remove()
                self._folders.removed('dead', file)
                return [entry.id]
        except OSError as error:
            log_trouble('is a dead letter that cannot be removed', file.path, error)
        finally:
            file.close()
        return []

    @contextlib.contextmanager
    def _taken(self, action: str, id: str) -> Iterator[_Taken]:
        """Hold a message to which *action* can be applied."""
        taken = self._take(action, id)
        try:
            if _STATE_IF_HELD[taken.folder] not in POSSIBLE[action]:
                raise WrongState(refusal(action, taken.id, _REASONS[taken.folder]))
            yield taken
        except QueueFileError as error:
            raise WrongState(refusal(action, taken.id, f'its file is damaged. {error}')) from error
        except OSError as error:
            raise QueueError(refusal(action, taken.id, why(error))) from error
        finally:
            taken.file.close()

    def _take(self, action: str, id: str) -> _Taken:
        for folder, name in self._tries(id):
            try:
                file = self._folders.hold(folder, name)
            except OSError as error:
                raise QueueError(refusal(action, name, why(error))) from error
            if file is not None:
                return _Taken(self._folders, folder, file)
            if self._is_file(folder, name):
                busy = _BUSY.get(folder, 'it is in use right now')
                raise WrongState(refusal(action, _id_of(name), f'{busy}. Try again in a moment.'))
        raise _gone(id)


class _Taken:
    """A message that is held while it is changed.  Every method may raise OSError."""

    def __init__(self, folders: MaildirFolders, folder: str, file: LockedFile) -> None:
        self._folders = folders
        self.folder = folder
        self.file = file
        self.id = _id_of(file.name)

    def make_due(self) -> None:
        """Make it due now, if it is not yet."""
        now = self._folders.clock()
        if self.file.modified > now:
            os.utime(self.file.fd, (now, now))

    def renew(self) -> None:
        """
        Renew it as if it came into the queue now: due, and without attempts.

        The last reply is kept.  Raises QueueFileError if the message cannot be read.
        """
        now = self._folders.clock()
        header, start = parse_header(self.file.head(MAX_HEADER_OCTETS))
        header = header._replace(queued_at=now, attempts=0)
        version = self._folders.rewrite(self.file.path, header, self.file, start, now)
        self.file.close()
        self.file = version

    def moved(self, folder: str) -> QueueEntry:
        """
        Move it, durably, and return it as it is then.

        If it is there already nothing is made durable: a power cut may undo a due time, which does no harm.
        """
        name = self._name_in_next_folder()
        entry = _entry(folder, name, self.file.fd)
        if folder != self.folder:
            self.file.move(self._folders.place(folder, name))
            sync_folder(self._folders.place(folder))
            sync_folder(self._folders.place(self.folder))
        return entry

    def removed(self) -> QueueEntry:
        """Remove it, durably, and return it as it was."""
        entry = _entry(self.folder, self.file.name, self.file.fd)
        self.file.remove()
        sync_folder(self._folders.place(self.folder))
        return entry

    def _name_in_next_folder(self) -> str:
        name = FileName.parse(self.file.name)
        if self.folder == 'cur':
            # As mq-run would do it.
            return str(name._replace(deaths=name.deaths + 1))
        if self.folder == 'dead' and (len(os.fsencode(self.file.name)) > LONGEST_NAME or self._is_alive()):
            return self._folders.new_name()
        return self.file.name

    def _is_alive(self) -> bool:
        """Whether there is another message of this name that is to be delivered; it must not be overwritten."""
        return any(os.path.lexists(self._folders.place(folder, self.file.name)) for folder in ('new', 'cur', 'held'))


def _folders_of(states: Collection[str]) -> list[str]:
    """Return the folders in which there may be messages in these states."""
    # Damaged files may be in any folder.
    return [folder for folder, state in STATE_OF.items() if state in states or 'corrupt' in states]


def _id_of(name: str) -> str:
    """Return the id of the message in a file of this name."""
    return FileName.parse(name.partition(',moving=')[0]).id


def _entry(folder: str, name: str, fd: int) -> QueueEntry:
    """Return the entry of a message in this place.  Raises OSError."""
    name, state, status = _id_of(name), STATE_OF[folder], os.fstat(fd)
    head = os.pread(fd, GLANCE + PEEK, 0)
    if len(head) > PEEK and is_queue_file(head) is None:
        # Longer headers are rare.
        head = os.pread(fd, MAX_HEADER_OCTETS + PEEK, 0)
    try:
        header, start = parse_header(head)
    except QueueFileError as error:
        return QueueEntry(name, 'corrupt', last_reply=str(error), size=status.st_size)
    subject, message_id = tell_from_header(head[start:])
    return QueueEntry(
        name,
        state,
        header.sender,
        header.recipients,
        retries=header.attempts,
        queued_at=header.queued_at,
        due=status.st_mtime if state in ('waiting', 'held') else None,
        last_attempt=header.last_attempt,
        last_reply=header.last_reply,
        subject=subject,
        message_id=message_id,
        size=status.st_size - start,
    )


def _content(fp: BinaryIO, start: int, most: int | None) -> bytes:
    try:
        read_header(fp)
    except QueueFileError:
        fp.seek(0)
    fp.seek(start, os.SEEK_CUR)
    return fp.read() if most is None else fp.read(most)


def _gone(id: str) -> NoSuchMessage:
    return NoSuchMessage(f'The message {id} is on its way just now, and cannot be found.')
