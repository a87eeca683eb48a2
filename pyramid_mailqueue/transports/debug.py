"""A transport for development: it accepts every message, and keeps it in a file to read."""

from __future__ import annotations

import os
import time
from pathlib import Path

from zope.interface import implementer

from pyramid_mailqueue.display import mail_date
from pyramid_mailqueue.interfaces import ITransport
from pyramid_mailqueue.results import Reply, SendResult
from pyramid_mailqueue.transports.base import Transport

__all__ = ['DebugInbox']


@implementer(ITransport)
class DebugInbox(Transport):
    """
    See `ITransport`.  Each message becomes a file that mail programs open (``.eml``); nothing leaves this machine.

    The envelope, which is not in the message, is written on top of it.  Only its owner can read the file.

    :param path: the folder to write to; if it is missing it is created with the first message, for its owner only
    """

    name = 'inbox'

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def send(self, sender: str, recipients: tuple[str, ...], content: bytes) -> SendResult:
        """See `ITransport`."""
        self._make_folder()
        lines = (
            f'Return-Path: <{sender}>',
            *(f'X-Envelope-To: {recipient}' for recipient in recipients),
            f'X-Delivery-Date: {mail_date(time.time())}',
            '',
        )
        # The hidden name keeps readers away until the message is whole.
        name = f'{time.time_ns()}-{os.urandom(4).hex()}.eml'
        hidden = self.path / f'.{name}'
        hidden.touch(mode=0o600, exist_ok=False)
        # The umask may have taken away what its owner needs.
        hidden.chmod(0o600)
        hidden.write_bytes('\r\n'.join(lines).encode() + content)
        hidden.rename(self.path / name)
        reply = Reply(250, f'kept in {self.path / name}', '2.0.0', from_server=False)
        return SendResult(dict.fromkeys(recipients, reply), self.name)

    def _make_folder(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            return
        self.path.chmod(0o700)
