"""
The SMTP transport: where messages go to a mail server.

:class:`SMTPTransport` opens sessions, and keeps them for the next message.  It stands on

- :class:`~.smtp.client.Connector`, which reaches the server;
- :class:`~.smtp.session.Session`, which carries the bytes of a :class:`~.smtp.transaction.Dialogue` over a connection;
- :class:`~.smtp.pool.Pool`, which keeps sessions for the next message, and away from forked children.

Every error of the server, and no other, is :class:`~.exceptions.ServerTrouble`: which server, what it said, and what to
check.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from os import PathLike
from typing import TYPE_CHECKING, cast

from zope.interface import implementer

from pyramid_mailqueue.exceptions import ConfigurationError, ServerTrouble
from pyramid_mailqueue.hosts import is_ehlo_argument
from pyramid_mailqueue.interfaces import IConnection, ITransport
from pyramid_mailqueue.results import Offer, Reply, SendResult
from pyramid_mailqueue.transports.base import Transport, run
from pyramid_mailqueue.transports.smtp.pool import Pool
from pyramid_mailqueue.transports.smtp.server import Connect, Server, tls_mode

if TYPE_CHECKING:
    from pyramid_mailqueue.transports.smtp.session import Opener, Session

__all__ = ['SMTPTransport', 'tls_mode']


@implementer(ITransport)
class SMTPTransport(Transport):
    """
    See `ITransport`.  Sends over SMTP to one mail server, and keeps sessions for the next message.

    :param hostname: the name or IP address of the server; certificates are checked against it
    :param port: its port
    :param username: with *password*, to log in (RFC 4954)
    :param local_hostname: the argument of EHLO; by default the fully qualified name of this host
    :param tls: ``implicit``, ``starttls``, ``opportunistic`` or ``off``; None or ``auto`` is implicit on port 465,
        opportunistic on this host without *tls_ca_file*, and else starttls (see :func:`tls_mode`)
    :param tls_ca_file: the authorities (PEM) that certificates are checked against, instead of the system's
    :param connect_timeout: how long connecting to each address of the server may take, in seconds
    :param timeout: how long the reply to a command, or the way of 64 KiB of content, may take, in seconds in all
    :param data_timeout: how long the reply to the end of the content may take, in seconds in all
    :param idle_timeout: how long a session is kept for the next message, in seconds
    :param max_recipients: the most recipients of one mail transaction
    :param clock: seconds that never go back
    :param connect: called with (*hostname*, *port*) and *connect_timeout*, returns a connected socket; by default the
        addresses of the host are tried, one after the other, until mail can be sent
    :raises ConfigurationError: the arguments contradict each other
    """

    name = 'smtp'

    def __init__(  # noqa: PLR0913 - a server has that many independent settings
        self,
        *,
        hostname: str,
        port: int = 25,
        username: str | None = None,
        password: str | None = None,
        local_hostname: str | None = None,
        tls: str | None = None,
        tls_ca_file: str | PathLike[str] | None = None,
        connect_timeout: float = 10,
        timeout: float = 300,
        data_timeout: float = 600,
        idle_timeout: float = 30,
        max_recipients: int = 100,
        clock: Callable[[], float] = time.monotonic,
        connect: Connect | None = None,
    ) -> None:
        if not hostname:
            raise ConfigurationError('mailqueue.smtp_hostname is missing: name the mail server to send over.')
        if bool(username) != bool(password):
            raise ConfigurationError('Set both mailqueue.smtp_username and mailqueue.smtp_password, or neither.')
        if max_recipients < 1:
            raise ConfigurationError(f'mailqueue.max_recipients = {max_recipients}: must be 1 or more.')
        if local_hostname and not is_ehlo_argument(local_hostname):
            raise ConfigurationError(
                f'mailqueue.smtp_local_hostname = {local_hostname!r}: must be a domain name, or an address such as '
                '[192.0.2.1].'
            )
        self._server = Server(hostname, port, connect_timeout, timeout, data_timeout, clock, connect)
        self._tls = tls_mode(tls, hostname, port, has_credentials=bool(username), has_ca_file=tls_ca_file is not None)
        self._tls_ca_file = tls_ca_file
        self._credentials = (username, password) if username and password else None
        self._local_hostname = local_hostname
        self._max_recipients = max_recipients
        self._name = f'smtp:{self._server}'
        self._pool = Pool(idle_timeout, clock)

    def __repr__(self) -> str:
        return f'<SMTPTransport {self._server} tls={self._tls}>'

    def send(self, sender: str, recipients: Sequence[str], content: bytes) -> SendResult:
        """
        See `ITransport`.

        The transport of the result is ``smtp:host:port``.  Its ``trouble`` is set if the session broke off when some
        recipients had their outcome; if none had, :class:`~.exceptions.ServerTrouble` is raised.
        """
        replies: dict[str, Reply] = {}
        trouble = None
        # Each transaction brings at least one reply, so this comes to an end: see MailTransaction.finish().
        while trouble is None and (rest := tuple(r for r in recipients if r not in replies)):
            try:
                result = self._send_once(Offer(sender, rest, content))
            except ServerTrouble as error:
                result = SendResult(trouble=error)
            replies.update(result.replies)
            trouble = result.trouble
        if trouble is not None and not replies:
            raise trouble
        in_order = {recipient: replies[recipient] for recipient in recipients if recipient in replies}
        return SendResult(in_order, self._name, trouble=trouble)

    def _send_once(self, offer: Offer) -> SendResult:
        """Make one transaction, in this thread."""
        session = self.connect()
        while True:
            try:
                session.submit(offer)
                result = run(session)
            finally:
                session.release()
            if isinstance(result, SendResult):
                return result
            session = self.connect(session)

    def connect(self, instead_of: IConnection | None = None) -> Session:
        """See `ITransport`.  A session that was kept is preferred to a new connection."""
        session = self._pool.take() or self._connect()
        if instead_of is not None:
            # One of ours.
            session.instead_of = cast('Session', instead_of).objection
        return session

    def close(self) -> None:
        """See `ITransport`.  Sessions in use go on, and are kept when their message is sent."""
        self._pool.close()

    def reload(self) -> None:
        """See `ITransport`.  The authorities that certificates are checked against are read again."""
        self._opener.connector.forget_authorities()
        self.close()

    def abort(self) -> None:
        """See `ITransport`.  What is under way ends as if the server had closed the connection."""
        self._pool.abort()

    # --- sessions ---

    def _connect(self) -> Session:
        with self._pool.opening() as opening:
            session = self._opener.open(partial(self._pool.note, opening), lambda: opening.is_given_up)
            if not self._pool.add(session, opening):
                session.close()
                raise ServerTrouble(f'The connection to {self._server} was given up by this process.')
            return session

    @cached_property
    def _opener(self) -> Opener:
        # With the first connection: ssl takes a tenth of an idle run.
        from pyramid_mailqueue.transports.smtp.session import Opener

        return Opener(
            self._server,
            self._pool.give_back,
            self._max_recipients,
            tls=self._tls,
            tls_ca_file=self._tls_ca_file,
            credentials=self._credentials,
            local_hostname=self._local_hostname,
        )
