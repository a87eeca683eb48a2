"""One message of a :class:`~.maildir.MaildirQueue`, taken for delivery, and the name of its file."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
import zlib
from typing import NamedTuple

from zope.interface import implementer

from pyramid_mailqueue.exceptions import QueueError, QueueFileError
from pyramid_mailqueue.interfaces import IClaim
from pyramid_mailqueue.logs import log_event, log_trouble, queue_log, why
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.base import Claim
from pyramid_mailqueue.queues.maildir.folders import MaildirFolders
from pyramid_mailqueue.queues.maildir.locked_file import LockedFile, sync_folder
from pyramid_mailqueue.queues.maildir.queue_file import MAX_HEADER_OCTETS, QueueHeader, parse_header, serialize_header
from pyramid_mailqueue.queues.maildir.trouble import leave_some_files
from pyramid_mailqueue.results import Burial, Settlement

__all__ = ['MAX_DEATHS', 'FileName', 'MaildirClaim']

#: A message whose delivery crashed its process this often is given up: it may well be the cause.
MAX_DEATHS = 5

#: The back-off, in seconds, of a message whose outcome could not be written: some recipients may have it already.
UNSETTLED_REST = 300

#: The same, if it could not be delivered for lack of memory.
ABANDONED_REST = 300


@implementer(IClaim)
class MaildirClaim(Claim):
    """
    See `IClaim`.

    The file is held: in ``new/`` until :meth:`begin`, and then in ``cur/``.  Or it is in ``new/`` and closed, because
    too many are open (see :func:`~.maildir.trouble.may_stay_open`): then :meth:`begin` takes it.
    """

    def __init__(self, folders: MaildirFolders, file: LockedFile) -> None:
        self._folders = folders
        self._file = file
        self._has_to_take = file.closed
        # With the offset of the content in the file.
        self._parsed: tuple[QueueHeader, int] | None = None
        self._envelope: Envelope | None = None
        self._name = FileName.parse(file.name)
        self.id = self._name.id

    def __repr__(self) -> str:
        return f'<MaildirClaim {self._file.name}>'

    def begin(self) -> bool:
        """See `IClaim`.  After a crash a file in ``new/`` waits as before, and one in ``cur/`` is an orphan."""
        if self._has_to_take:
            self._take()
        if self._file.closed:
            return False
        if self._file.folder != 'new':
            return True
        try:
            self._file.move(self._folders.place('cur', self._file.name))
        except OSError as error:
            log_trouble('cannot be claimed, and has to wait', self._file.path, error)
            self._file.close()
            return False
        return True

    def _take(self) -> None:
        """Hold the file, unless another process holds or has postponed it meanwhile."""
        self._has_to_take = False
        try:
            file = self._folders.take('new', self._file.name)
            if file is None:
                return
            self._file = file
            leave_some_files(file.fd)
            is_due = file.modified <= self._folders.clock()
        except (OSError, QueueError) as error:
            problem = 'cannot be claimed, and has to wait'
            log_event(queue_log, logging.ERROR, status='trouble', id=self.id, problem=problem, error=why(error))
            is_due = False
        if not is_due:
            self._file.close()

    @property
    def deaths(self) -> int:
        """See `IClaim`."""
        return self._name.deaths

    @property
    def attempts(self) -> int:
        """See `IClaim`."""
        return self._parse()[0].attempts

    @property
    def queued_at(self) -> float:
        """See `IClaim`."""
        return self._parse()[0].queued_at

    @property
    def envelope(self) -> Envelope:
        """See `IClaim`."""
        header, start = self._parse()
        if self._envelope is None:
            self._envelope = Envelope.of_checked(header.sender, header.recipients, self._file.read(start), 0)
        return self._envelope

    @property
    def recipients(self) -> tuple[str, ...]:
        """See `IClaim`."""
        return self._header.recipients

    @property
    def _header(self) -> QueueHeader:
        return self._parse()[0]

    def _parse(self) -> tuple[QueueHeader, int]:
        if self._parsed is None:
            head = self._file.head(MAX_HEADER_OCTETS)
            self._parsed = header, start = parse_header(head)
            if len(head) == self._file.size:
                # That was all of it; the content of a larger one is read on demand.
                self._envelope = Envelope.of_checked(header.sender, header.recipients, head, start)
        return self._parsed

    def is_readable(self) -> bool:
        """Whether its header can be read; if not, the claim ends here, and the file is put aside untouched."""
        try:
            self._parse()
        except QueueFileError as error:
            self._put_aside(error)
            return False
        except OSError as error:
            log_trouble('cannot be read', self._file.path, error)
            self.release()
            return False
        return True

    def _put_aside(self, error: QueueFileError) -> None:
        folders, file = self._folders, self._file
        try:
            file.move(unused(folders.place('corrupt', file.name)))
            folders.changed('corrupt')
            log_event(queue_log, logging.ERROR, status='corrupt', id=self.id, file=file.path, error=error)
        except OSError as move_error:
            log_trouble(f'is damaged ({error}) and cannot be put aside', file.path, move_error)
        file.close()

    def keep(self, recipients: tuple[str, ...]) -> None:
        """See `IClaim`."""
        if self._file.closed:
            return
        header = self._header._replace(recipients=recipients)
        try:
            file = self._write(self._file.path, header, self._file.modified)
        except (OSError, QueueError, MemoryError) as error:
            self._tell_unsettled(error)
            return
        self._file.close()
        self._file = file
        self._parsed = header, len(serialize_header(header))
        if self._envelope is not None:
            self._envelope = dataclasses.replace(self._envelope, recipients=recipients)
        self._forget_deaths()

    def _forget_deaths(self) -> None:
        """A recipient has the message: it is not the cause of the crashes."""
        if not self.deaths:
            return
        name = self._name._replace(deaths=0)
        try:
            self._file.move(self._folders.place('cur', str(name)))
        except OSError as error:
            log_trouble('keeps its old count of deaths', self._file.path, error)
            return
        self._name = name

    def release(self) -> None:
        """See `IClaim`."""
        self._has_to_take = False
        if self._file.folder == 'new':
            self._file.close()
        elif not self._file.closed:
            self._back_to_new(self._file.name)

    def orphaned(self) -> bool:
        """Let an orphan wait again, with one more death counted in its name.  False if that failed (logged)."""
        return self._back_to_new(str(self._name._replace(deaths=self.deaths + 1)))

    def given_up(self) -> bool:
        """
        Bury an orphan.  False if that failed (logged).

        If the reason cannot be written into it (a full disk) it is buried as it is: it must not crash more processes.
        """
        reason = f'given up: the process that delivered it died, {MAX_DEATHS} times'
        try:
            self._settle(Settlement(counted=False, burials=(Burial(self._header.recipients, reason),)))
        except (OSError, QueueError, MemoryError) as error:
            log_trouble('is given up, and the reason cannot be written into it', self._file.path, error)
            # If a dead letter was written before the failure, this takes its place.
            return self._moved('dead', self._burial_path(self.recipients))
        finally:
            self._file.close()
        return True

    def abandon(self) -> None:
        """See `IClaim`."""
        if self._file.closed:
            return
        self._rest_until(self._folders.clock() + ABANDONED_REST)
        self._file.close()

    def _back_to_new(self, name: str) -> bool:
        return self._moved('new', self._folders.place('new', name))

    def _moved(self, folder: str, path: str) -> bool:
        """Move the file to *path*, which is in *folder*, and end the claim.  False if that failed (logged)."""
        try:
            self._file.move(path)
            self._folders.changed(folder)
        except OSError as error:
            log_trouble('stays in progress until the next run', self._file.path, error)
            self._folders.is_in_doubt = True
            return False
        finally:
            self._file.close()
        return True

    def settle(self, settlement: Settlement) -> QueueError | None:
        """See `IClaim`."""
        return None if self._file.closed else self._ended_by(settlement)

    def _ended_by(self, settlement: Settlement) -> QueueError | None:
        """End the claim; return why the new state could not be written (logged), if so."""
        try:
            self._settle(settlement)
        except (OSError, QueueError, MemoryError) as error:
            self._tell_unsettled(error)
            self._postpone(settlement)
            self._folders.is_in_doubt = True
            return QueueError(
                f'The outcome of the message {self.id} cannot be written, so no more mail is delivered for now: '
                f'{self._file.path}: {why(error)}'
            )
        finally:
            self._file.close()
        return None

    def _tell_unsettled(self, error: Exception) -> None:
        reason = 'its outcome cannot be written; it waits as it was, and may be delivered again'
        log_event(queue_log, logging.CRITICAL, status='unsettled', id=self.id, error=why(error), reason=reason)

    def _settle(self, settlement: Settlement) -> None:
        # Dead letters first: between the two steps a crash may repeat one, and its name makes that the same file.
        for burial in settlement.burials:
            self._bury(burial, settlement)
        if settlement.burials:
            sync_folder(self._folders.place('dead'))
        if not settlement.waiting:
            if self._file.remove():
                self._folders.removed(self._file.folder, self._file)
        elif self._is_changed_by(settlement):
            self._rewrite(settlement)
            # The process has survived, so earlier deaths do not count any more.
            self._back_to_new(self.id)
        else:
            self._back_to_new(str(self._name._replace(stumbles=self._name.stumbles + settlement.stumbled)))

    def _is_changed_by(self, settlement: Settlement) -> bool:
        return settlement.counted or settlement.due is not None or settlement.waiting != self._header.recipients

    def _bury(self, burial: Burial, settlement: Settlement) -> None:
        header = self._next_header(burial.recipients, settlement, burial.reason)
        self._write(self._burial_path(burial.recipients), header).close()

    def _burial_path(self, recipients: tuple[str, ...]) -> str:
        names = zlib.crc32('\0'.join(recipients).encode())
        return self._folders.place('dead', f'{self.id}.{names:08x}')

    def _rewrite(self, settlement: Settlement) -> None:
        """Replace the message by its next version, held from its first moment on."""
        header = self._next_header(settlement.waiting, settlement, settlement.last_reply)
        due = self._file.modified if settlement.due is None else settlement.due
        file = self._write(self._file.path, header, due)
        self._file.close()
        self._file = file

    def _write(self, path: str, header: QueueHeader, due: float | None = None) -> LockedFile:
        """Write another version of the message, without loading a content that was not read yet."""
        if self._envelope is not None:
            return self._folders.write(path, header, self._envelope.content, due)
        return self._folders.rewrite(path, header, self._file, self._parse()[1], due)

    def _next_header(self, recipients: tuple[str, ...], settlement: Settlement, last_reply: str) -> QueueHeader:
        header = self._header
        return header._replace(
            recipients=recipients,
            attempts=header.attempts + settlement.counted,
            last_attempt=self._folders.clock() if settlement.counted or last_reply else header.last_attempt,
            last_reply=last_reply or header.last_reply,
        )

    def _postpone(self, settlement: Settlement) -> None:
        """Postpone the old version, which needs no disk space, if the next one cannot be written (a full disk)."""
        self._rest_until(self._folders.clock() + UNSETTLED_REST if settlement.due is None else settlement.due)
        self._back_to_new(self._file.name)

    def _rest_until(self, due: float) -> None:
        try:
            os.utime(self._file.fd, (due, due))
        except OSError as error:
            log_trouble('cannot be given its due time', self._file.path, error)


_FILE_NAME = re.compile(r'(.*?)(?:,stumbles=([0-9]{1,9}))?(?:,deaths=([0-9]{1,9}))?', re.DOTALL)


class FileName(NamedTuple):
    """
    The name of a file, ``ID[,stumbles=N][,deaths=N]``.

    :param id: the name of the message
    :param stumbles: how often a server disconnected during it
    :param deaths: how many processes crashed while delivering it; both are counted since its last attempt, and deaths
        since it was accepted for some of its recipients
    """

    id: str
    stumbles: int = 0
    deaths: int = 0

    @classmethod
    def parse(cls, name: str) -> FileName:
        """Parse the name of a file; any text is valid."""
        if ',' not in name:
            return cls(name)
        match = _FILE_NAME.fullmatch(name)
        assert match
        return cls(match[1], int(match[2] or 0), int(match[3] or 0))

    @property
    def setbacks(self) -> int:
        """
        How often something went wrong that may be the message's fault or not.

        Disconnects and crashes count alike: the more of them, the later a message comes.
        """
        return self.stumbles + self.deaths

    def __str__(self) -> str:
        stumbles = f',stumbles={self.stumbles}' if self.stumbles else ''
        return f'{self.id}{stumbles},deaths={self.deaths}' if self.deaths else f'{self.id}{stumbles}'


def unused(path: str) -> str:
    """Return *path*, with a number if it exists already: files that were put aside must not be overwritten."""
    numbered = (f'{path}.{number}' for number in itertools.count(1))
    return next(candidate for candidate in itertools.chain((path,), numbered) if not os.path.lexists(candidate))
