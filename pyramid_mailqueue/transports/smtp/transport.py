"""
The SMTP transport: where messages go to a mail server.

:class:`SMTPTransport` splits messages into mail transactions, and streams them over a session.  It stands on

- :class:`~.smtp.client.Connector`, which reaches the server;
- :class:`~.smtp.session.Session`, which carries the bytes of a :class:`~.smtp.transaction.Dialogue` over a connection;
- :class:`~.smtp.pool.Pool`, which keeps sessions for the next message, and away from forked children.

Every error of the server, and no other, is :class:`~.exceptions.ServerTrouble`: which server, what it said, and what to
check.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import cached_property, partial
from os import PathLike
from typing import TYPE_CHECKING

from zope.interface import implementer

from pyramid_mailqueue.delivery.waiting import ABOUT_TO_BLOCK, Wait, without_waits
from pyramid_mailqueue.exceptions import ConfigurationError, ServerTrouble
from pyramid_mailqueue.hosts import is_ehlo_argument
from pyramid_mailqueue.interfaces import ITransport
from pyramid_mailqueue.results import Offer, Reply, SendResult
from pyramid_mailqueue.transports.smtp.pool import Pool
from pyramid_mailqueue.transports.smtp.server import Connect, Server, tls_mode

if TYPE_CHECKING:
    from pyramid_mailqueue.transports.smtp.client import Connector
    from pyramid_mailqueue.transports.smtp.session import Session
    from pyramid_mailqueue.transports.smtp.transaction import MailTransaction

__all__ = ['SMTPTransport', 'tls_mode']


@implementer(ITransport)
class SMTPTransport:
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
                for result in without_waits(self.stream(Offer(sender, rest, content), _nothing_more)):
                    replies.update(result.replies)
                    trouble = result.trouble
            except ServerTrouble as error:
                if not replies:
                    raise
                trouble = error
        in_order = {recipient: replies[recipient] for recipient in recipients if recipient in replies}
        return SendResult(in_order, self._name, trouble=trouble)

    def open_stream(self, more: Callable[[], Offer | None]) -> Generator[SendResult | Wait]:
        """See `ITransport`."""
        return self.stream(None, more)

    def stream(self, first: Offer | None, more: Callable[[], Offer | None]) -> Generator[SendResult | Wait]:
        """
        See `ITransport`.  Without *first* as of :meth:`open_stream`.

        Each offer is one transaction, for at most *max_recipients*.  Of two offers one is under way, and the other has
        said MAIL, RCPT and DATA behind it: in the same write as the end of its content, where the server offers
        PIPELINING.
        """
        session = self._pool.take() or self._connect(is_ahead=first is None)
        try:
            offers = deque(offer for offer in (first or more(),) if offer is not None)
            transactions = deque(self._submit(session, offer) for offer in offers)
            while offers:
                if len(offers) < 2 and session.dialogue.trouble is None and (offer := more()) is not None:
                    offers.append(offer)
                    transactions.append(self._submit(session, offer))
                transaction = transactions[0]
                try:
                    yield from session.run(transaction)
                except ServerTrouble as trouble:
                    if not session.takes_no_more(transaction):
                        if not transaction.replies:
                            raise
                        yield SendResult(transaction.replies, self._name, trouble=trouble)
                        return
                if session.takes_no_more(transaction):
                    session.say_quit()
                    self._pool.discard(session)
                    yield ABOUT_TO_BLOCK
                    session = self._pool.take() or self._connect()
                    session.instead_of = transaction.objection
                    transactions = deque(self._submit(session, offer) for offer in offers)
                    continue
                offers.popleft()
                transactions.popleft()
                yield SendResult(transaction.replies, self._name)
        finally:
            self._pool.give_back(session)

    def _submit(self, session: Session, offer: Offer) -> MailTransaction:
        recipients = offer.recipients[: self._max_recipients]
        return session.dialogue.submit(offer.sender, recipients, offer.content, offer.is_valid)

    def close(self) -> None:
        """See `ITransport`.  Sessions in use go on, and are kept when their message is sent."""
        self._pool.close()

    def reload(self) -> None:
        """See `ITransport`.  The authorities that certificates are checked against are read again."""
        self._connector.forget_authorities()
        self.close()

    def abort_opening(self) -> None:
        """See `ITransport`."""
        self._pool.abort_opening()

    def make_room(self) -> None:
        """See `ITransport`."""
        self._pool.make_room()

    def abort(self) -> None:
        """See `ITransport`.  What is under way ends as if the server had closed the connection."""
        self._pool.abort()

    # --- sessions ---

    def _connect(self, *, is_ahead: bool = False) -> Session:
        from pyramid_mailqueue.transports.smtp.session import Session

        with self._pool.opening(is_ahead=is_ahead) as opening:
            client = self._connector.connect(partial(self._pool.note, opening), lambda: opening.is_given_up)
            session = Session(client, self._server)
            if not self._pool.add(session, opening):
                session.close()
                raise ServerTrouble(f'The connection to {self._server} was given up by this process.')
            return session

    @cached_property
    def _connector(self) -> Connector:
        from pyramid_mailqueue.transports.smtp.client import Connector

        return Connector(
            self._server,
            tls=self._tls,
            tls_ca_file=self._tls_ca_file,
            credentials=self._credentials,
            local_hostname=self._local_hostname,
        )


def _nothing_more() -> None:
    return None
