"""A connection on which mail can be sent: the bytes of the :class:`~.smtp.transaction.Dialogue`, and the deadlines."""

from __future__ import annotations

import logging
import select
import ssl
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from os import PathLike

from zope.interface import implementer

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.interfaces import IConnection
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.results import Offer, Reply, SendResult
from pyramid_mailqueue.transports.base import Connection
from pyramid_mailqueue.transports.smtp.client import READ_SIZE, Client, Connector, OnSocket
from pyramid_mailqueue.transports.smtp.server import MAX_VAIN, Server, shut_down
from pyramid_mailqueue.transports.smtp.transaction import Capabilities, Dialogue, MailTransaction

__all__ = ['Opener', 'Session']

log = Log('mailqueue.smtp')

#: How much goes into one record of TLS, at most (RFC 8446 section 5.1).
TLS_RECORD = 16 * 1024


@implementer(IConnection)
class Session(Connection):
    """
    See `IConnection`: the bytes of the dialogue, and the deadlines.

    The socket does not block, so that replies can be read while commands are sent: with a long group of commands the
    server may stop reading until its replies are read.

    Each offer is one transaction, for at most *max_recipients*.  Of two offers one is under way, and the other has said
    MAIL, RCPT and DATA behind it: in the same write as the end of its content, where the server offers PIPELINING.

    :param give_back: called with the session when it is released
    :ivar was_used: a transaction was completed on it
    :ivar instead_of: the reply because of which it replaces a used session
    :ivar idle_since: when it went into the pool
    """

    def __init__(
        self, client: Client, server: Server, give_back: Callable[[Session], None], max_recipients: int
    ) -> None:
        assert client.sock
        self.dialogue = Dialogue(Capabilities.from_ehlo(client.esmtp_features), str(server))
        self.was_used = False
        self.instead_of: Reply | None = None
        self.idle_since = 0.0
        self._hand: deque[MailTransaction] = deque()
        self._began = 0.0
        self._has_delivered = False
        # The number of objections since the last delivery.
        self._in_vain = 0
        self._is_broken_off = False
        self._is_spent = False
        self._server = server
        self._name = f'smtp:{server}'
        self._give_back = give_back
        self._max_recipients = max_recipients
        self._client = client
        self._sock = client.sock
        self._sock.settimeout(0)
        self._is_encrypted = isinstance(client.sock, ssl.SSLSocket)

    # --- see `IConnection` ---

    def fileno(self) -> int:
        """See `IConnection`."""
        return self._sock.fileno()

    @property
    def is_spent(self) -> bool:
        """See `IConnection`."""
        return self._is_spent

    @property
    def needs_new(self) -> bool:
        """See `IConnection`."""
        return self._is_spent and self.objection is not None

    @property
    def objection(self) -> Reply | None:
        """The reply because of which this session is spent, if it was one."""
        return self._hand[0].objection if self._hand else None

    @property
    def has_room(self) -> bool:
        """See `IConnection`."""
        return len(self._hand) < 2 and not (self.dialogue.trouble or self._is_spent)

    def submit(self, offer: Offer) -> None:
        """See `IConnection`."""
        if not self._hand:
            self._began = self._server.clock()
        self.dialogue.trace = self._trace if log.isEnabledFor(logging.DEBUG) else None
        recipients = offer.recipients[: self._max_recipients]
        self._hand.append(self.dialogue.submit(offer.sender, recipients, offer.content, offer.is_valid))

    def advance(self, events: int = 0) -> Iterator[SendResult]:
        """See `IConnection`."""
        try:
            # Whoever was busy elsewhere when its time was over has not seen yet what has come.
            if events & ~select.POLLOUT or (self._hand and self._is_late):
                self._hear()
            while self._hand and not self._is_spent:
                if self._hand[0].done:
                    yield from self._completed()
                elif self._has_to_wait():
                    self._check_deadline()
                    break
        except ServerTrouble as trouble:
            yield from self._broken(trouble)

    def wait(self) -> tuple[int, float]:
        """See `IConnection`."""
        events = select.POLLIN | select.POLLOUT if self.dialogue.data_to_send() else select.POLLIN
        return events, self._began + self._limit - self._server.clock()

    def release(self) -> None:
        """See `IConnection`."""
        if self._is_spent:
            self.say_quit()
        self._give_back(self)

    # --- the transactions in hand ---

    def _completed(self) -> Iterator[SendResult]:
        """Yield the result of the oldest transaction, which is done."""
        transaction = self._hand[0]
        self._learn_from(transaction)
        self.was_used = True
        self._is_spent = self.takes_no_more(transaction)
        if self._is_spent:
            return
        self._hand.popleft()
        self._began = self._server.clock()
        yield SendResult(transaction.replies, self._name)

    def _broken(self, trouble: ServerTrouble) -> Iterator[SendResult]:
        """
        Yield what is known of the transactions in hand when the session has ended.

        What follows the last reply, such as a farewell (421), is not about the transaction before, but about the next.
        """
        while self._hand and self._hand[0].done and not self._is_spent:
            yield from self._completed()
        if self._is_spent or not self._hand:
            return
        transaction = self._hand[0]
        trouble.in_message = transaction.announced
        trouble.at_mail = not transaction.begun
        self._learn_from(transaction)
        if self.takes_no_more(transaction):
            self._is_spent = True
            return
        self._hand.popleft()
        yield SendResult(transaction.replies, self._name, trouble=trouble)

    def _learn_from(self, transaction: MailTransaction) -> None:
        known, objection = self._server.objections, transaction.objection
        if transaction.begun:
            known.discard(transaction.sender)
        if transaction.delivered:
            known.discard(transaction.recipients)
            if self.instead_of is not None:
                known.was_of_session(_said(self.instead_of))
        elif objection is not None and not self._has_delivered:
            known.add(_about(transaction), _said(objection))
        self.instead_of = None
        self._has_delivered |= transaction.delivered
        self._in_vain = 0 if transaction.delivered else self._in_vain + (objection is not None)

    def _has_to_wait(self) -> bool:
        """
        Send what can be sent now; return whether the server has to be waited for.

        The deadline begins anew when a chunk has left and when a reply is complete.  Not with single bytes: a slow
        server could hold the session for ever.
        """
        if self.dialogue.trouble:
            raise self.dialogue.trouble
        chunk = self.dialogue.data_to_send()
        if not chunk:
            return True
        count = self._send(chunk)
        self.dialogue.sent(count)
        if count == len(chunk):
            self._began = self._server.clock()
        if not (count and self.dialogue.data_to_send()):
            return True
        # During a long content, too: the server may reply to what it has seen so far.
        self._hear()
        return False

    def was_stale(self, transaction: MailTransaction) -> bool:
        """
        The server had ended this session, or made it useless, before anything of *transaction* was answered.

        Not by silence: that is not waited for a second time.
        """
        if transaction.answered or transaction.done or self._is_broken_off:
            return False
        return self.was_used and self.dialogue.trouble is not None

    def takes_no_more(self, transaction: MailTransaction) -> bool:
        """
        The server has ended this session, or takes only so many messages in one.

        In either case nothing of *transaction* has happened, and a new session may help.  A limit shows as any refusal
        of MAIL, or as 4xx for all recipients at RCPT, DATA or the end of the data; not if new sessions get the same,
        unless nothing works in this one any more.
        """
        if transaction.objection is not None and self._has_delivered and not self._is_broken_off:
            is_known = self._server.objections.holds(_about(transaction), _said(transaction.objection))
            return self._in_vain >= MAX_VAIN or not is_known
        return self.was_stale(transaction)

    @property
    def is_idle(self) -> bool:
        """Nothing is in hand, and the session can go on: also if it was left in the middle."""
        return not self._hand and self.dialogue.is_idle

    @property
    def is_alive(self) -> bool:
        """Nothing has come since the last reply: neither the end of the stream nor a farewell (421)."""
        try:
            return self._receive() is None
        except ServerTrouble:
            return False

    def say_quit(self) -> None:
        """Send QUIT, if that takes no time, and cannot be taken for content."""
        if self.dialogue.awaits_reply:
            return
        with suppress(OSError):
            self._sock.send(b'QUIT\r\n')

    def hear_out(self, seconds: float) -> None:
        """Close when the server has answered, or after *seconds*."""
        with suppress(OSError):
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            poll.poll(max(0, seconds) * 1000)
            # A socket with something unread is reset when it is closed.
            self._sock.recv(READ_SIZE)
        self.close()

    def shut_down(self) -> None:
        """End the connection from another thread; the one that uses it notices."""
        self._is_broken_off = True
        shut_down(self._sock)

    def close(self) -> None:
        """Close without QUIT."""
        self._client.close()

    def _trace(self, line: str) -> None:
        log.debug('%s %s', self._server, line)

    @property
    def _limit(self) -> float:
        return self._server.data_timeout if self.dialogue.awaits_end_of_data else self._server.timeout

    @property
    def _is_late(self) -> bool:
        return self._server.clock() - self._began >= self._limit

    def _check_deadline(self) -> None:
        if self._is_late:
            self._is_broken_off = True
            raise self.dialogue.timed_out(self._limit)

    def _hear(self) -> None:
        """Read what has arrived."""
        data = self._receive()
        if data is not None and self.dialogue.receive_data(data):
            self._began = self._server.clock()

    def _receive(self) -> bytes | None:
        """Return what has arrived: None for nothing yet, ``b''`` for the end of the stream."""
        try:
            return self._sock.recv(READ_SIZE)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except OSError as error:
            raise self.dialogue.connection_lost(f'broke off the connection ({error})') from error

    def _send(self, chunk: memoryview) -> int:
        """Return how much of *chunk* the network has taken."""
        if not chunk:
            return 0
        # OpenSSL does not say how many of several records have left when it has to wait; of one it is all or nothing.
        size = TLS_RECORD if self._is_encrypted else len(chunk)
        try:
            return self._sock.send(chunk[:size])
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError as error:
            # It may have said why before it closed.
            self._hear()
            raise self.dialogue.connection_lost(f'broke off the connection ({error})') from error


class Opener:
    """
    Opens the sessions with one server.

    :param give_back: called with a session that is released
    :param max_recipients: the most recipients of one mail transaction
    :ivar connector: connects to it, with the other arguments
    """

    def __init__(
        self,
        server: Server,
        give_back: Callable[[Session], None],
        max_recipients: int,
        *,
        tls: str,
        tls_ca_file: str | PathLike[str] | None,
        credentials: tuple[str, str] | None,
        local_hostname: str | None,
    ) -> None:
        self._server = server
        self._give_back = give_back
        self._max_recipients = max_recipients
        self.connector = Connector(
            server, tls=tls, tls_ca_file=tls_ca_file, credentials=credentials, local_hostname=local_hostname
        )

    def open(self, on_socket: OnSocket, is_given_up: Callable[[], bool]) -> Session:
        """Return a new session, in use; see :meth:`~.smtp.client.Connector.connect`."""
        client = self.connector.connect(on_socket, is_given_up)
        return Session(client, self._server, self._give_back, self._max_recipients)


def _about(transaction: MailTransaction) -> Hashable:
    """The recipients or the sender that the objection to *transaction* is about, if it is about the message."""
    return transaction.recipients if transaction.begun else transaction.sender


def _said(reply: Reply) -> Hashable:
    return reply.code, reply.enhanced
