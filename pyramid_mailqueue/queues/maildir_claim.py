"""One message of a :class:`~.maildir.MaildirQueue`, taken for delivery, and the name of its file."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
from typing import NamedTuple

from zope.interface import implementer

from pyramid_mailqueue.delivery.logs import log_event, log_trouble, queue_log, why
from pyramid_mailqueue.delivery.results import Burial, Settlement
from pyramid_mailqueue.envelope import Envelope
from pyramid_mailqueue.exceptions import QueueError, QueueFileError
from pyramid_mailqueue.interfaces import IClaim
from pyramid_mailqueue.queues.locked_file import LockedFile, sync_folder
from pyramid_mailqueue.queues.maildir_folders import MaildirFolders
from pyramid_mailqueue.queues.queue_file import QueueHeader, read_envelope

__all__ = ['MAX_DEATHS', 'FileName', 'MaildirClaim']

#: A message whose deliverer died this often is given up: it may well be what kills them.
MAX_DEATHS = 5

#: How many seconds a message rests whose outcome could not be written: some recipients may have it already.
UNSETTLED_REST = 300


@implementer(IClaim)
class MaildirClaim:
    """See `IClaim`.  Made for a file in ``cur/`` that is held."""

    def __init__(self, folders: MaildirFolders, file: LockedFile) -> None:
        self._folders = folders
        self._file = file
        self._parsed: tuple[QueueHeader, Envelope] | None = None
        self._name = FileName.parse(file.name)
        self.id = self._name.id

    def __repr__(self) -> str:
        return f'<MaildirClaim {self._file.name}>'

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
            file = self._folders.write(self._file.path, header, self.envelope.content, self._file.modified)
        except (OSError, QueueError) as error:
            self._tell_unsettled(error)
            return
        self._file.close()
        self._file = file
        self._parsed = header, dataclasses.replace(self.envelope, recipients=recipients)
        self._forget_deaths()

    def _forget_deaths(self) -> None:
        """Somebody has the message: it is not what kills its deliverers."""
        if not self.deaths:
            return
        name = self._name._replace(deaths=0)
        try:
            self._file.move(self._folders.place('cur', str(name)))
        except OSError as error:
            log_trouble('keeps the count of the deaths before', self._file.path, error)
            return
        self._name = name

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
            self._file.move(self._folders.place('new', name))
            self._folders.changed('new')
        except OSError as error:
            log_trouble('stays in progress until the next run', self._file.path, error)
            return False
        finally:
            self._file.close()
        return True

    def settle(self, settlement: Settlement) -> bool:
        """See `IClaim`."""
        return not self._file.closed and self._ended_by(settlement)

    def _ended_by(self, settlement: Settlement) -> bool:
        """End the claim; False if the new state could not be written (logged)."""
        try:
            self._settle(settlement)
        except (OSError, QueueFileError) as error:
            self._tell_unsettled(error)
            self._postpone(settlement)
            return False
        finally:
            self._file.close()
        return True

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
                self._folders.removed('cur', self._file)
        elif self._is_changed_by(settlement):
            self._rewrite(settlement)
            # Its deliverer has lived, so the deaths before do not count any more.
            self._back_to_new(self.id)
        else:
            self._back_to_new(str(self._name._replace(stumbles=self._name.stumbles + settlement.stumbled)))

    def _is_changed_by(self, settlement: Settlement) -> bool:
        return settlement.counted or settlement.due is not None or settlement.waiting != self._header.recipients

    def _bury(self, burial: Burial, settlement: Settlement) -> None:
        # Few runs need it.
        import hashlib

        header = self._next_header(burial.recipients, settlement, burial.reason)
        names = hashlib.sha256('\0'.join(burial.recipients).encode()).hexdigest()
        path = self._folders.place('dead', f'{self.id}.{names[:8]}')
        self._folders.write(path, header, self.envelope.content).close()

    def _rewrite(self, settlement: Settlement) -> None:
        """Put the next version of the message in the place of this one, held from its first moment on."""
        header = self._next_header(settlement.waiting, settlement, settlement.last_reply)
        due = self._file.modified if settlement.due is None else settlement.due
        file = self._folders.write(self._file.path, header, self.envelope.content, due)
        self._file.close()
        self._file = file

    def _next_header(self, recipients: tuple[str, ...], settlement: Settlement, last_reply: str) -> QueueHeader:
        header = self._header
        return header._replace(
            recipients=recipients,
            attempts=header.attempts + settlement.counted,
            last_attempt=self._folders.clock() if settlement.counted or last_reply else header.last_attempt,
            last_reply=last_reply or header.last_reply,
        )

    def _postpone(self, settlement: Settlement) -> None:
        """The next version cannot be written (a full disk); keep the old one, which needs no room, and its order."""
        due = self._folders.clock() + UNSETTLED_REST if settlement.due is None else settlement.due
        try:
            os.utime(self._file.fd, (due, due))
        except OSError as error:
            log_trouble('cannot be given its due time', self._file.path, error)
        self._back_to_new(self._file.name)


_FILE_NAME = re.compile(r'(.*?)(?:,stumbles=([0-9]{1,9}))?(?:,deaths=([0-9]{1,9}))?', re.DOTALL)


class FileName(NamedTuple):
    """
    The name of a file, ``ID[,stumbles=N][,deaths=N]``.

    :param id: the name of the message
    :param stumbles: how often a server broke off in the midst of it
    :param deaths: how many deliverers it has outlived; both are counted since its last attempt, and deaths since it was
        accepted for some of its recipients
    """

    id: str
    stumbles: int = 0
    deaths: int = 0

    @classmethod
    def parse(cls, name: str) -> FileName:
        """Read the name of a file; any text is one."""
        if ',' not in name:
            return cls(name)
        match = _FILE_NAME.fullmatch(name)
        assert match
        return cls(match[1], int(match[2] or 0), int(match[3] or 0))

    @property
    def setbacks(self) -> int:
        """
        How often something went wrong that may be the message's fault or not.

        Counted together: what goes wrong once more comes behind what has fared as badly, whichever way.
        """
        return self.stumbles + self.deaths

    def __str__(self) -> str:
        stumbles = f',stumbles={self.stumbles}' if self.stumbles else ''
        return f'{self.id}{stumbles},deaths={self.deaths}' if self.deaths else f'{self.id}{stumbles}'


def unused(path: str) -> str:
    """Return *path*, with a number if there is something already: what was put aside must not be overwritten."""
    numbered = (f'{path}.{number}' for number in itertools.count(1))
    return next(candidate for candidate in itertools.chain((path,), numbered) if not os.path.lexists(candidate))
