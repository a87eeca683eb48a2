"""A connection on which mail can be sent: the bytes of the :class:`~.smtp.transaction.Dialogue`, and the deadlines."""

from __future__ import annotations

import logging
import select
import ssl
from collections.abc import Generator, Hashable
from contextlib import suppress

from pyramid_mailqueue.delivery.waiting import Wait
from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.results import Reply
from pyramid_mailqueue.transports.smtp.client import READ_SIZE, Client, shut_down
from pyramid_mailqueue.transports.smtp.server import MAX_VAIN, Server
from pyramid_mailqueue.transports.smtp.transaction import Capabilities, Dialogue, MailTransaction

__all__ = ['Session']

log = Log('mailqueue.smtp')

#: How much goes into one record of TLS, at most (RFC 8446 section 5.1).
TLS_RECORD = 16 * 1024


class Session:
    """
    A connection on which mail can be sent: the bytes of the dialogue, and the deadlines.

    The socket does not block, so that replies can be read while commands are sent: with a long group of commands the
    server may stop reading until its replies are read.

    :ivar was_used: a transaction was completed on it
    :ivar instead_of: the reply because of which it replaces a used session
    :ivar idle_since: when it went into the pool
    """

    def __init__(self, client: Client, server: Server) -> None:
        assert client.sock
        self.dialogue = Dialogue(Capabilities.from_ehlo(client.esmtp_features), str(server))
        self.was_used = False
        self.instead_of: Reply | None = None
        self.idle_since = 0.0
        self._has_delivered = False
        # The number of objections since the last delivery.
        self._in_vain = 0
        self._is_broken_off = False
        self._server = server
        self._client = client
        self._sock = client.sock
        self._sock.settimeout(0)
        self._is_encrypted = isinstance(client.sock, ssl.SSLSocket)

    def run(self, transaction: MailTransaction) -> Generator[Wait]:
        """
        Continue until *transaction* is done; yield whenever that has to wait for the server.

        Raises :class:`~.exceptions.ServerTrouble`.  What follows the last reply, such as a farewell (421), is not about
        this transaction: it is raised for the next one.
        """
        self.dialogue.trace = self._trace if log.isEnabledFor(logging.DEBUG) else None
        try:
            yield from self._go_on_until_done(transaction)
        except ServerTrouble as trouble:
            if not transaction.done:
                trouble.in_message = transaction.announced
                trouble.at_mail = not transaction.begun
                raise
        finally:
            self._learn_from(transaction)
        self.was_used = True

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

    def _go_on_until_done(self, transaction: MailTransaction) -> Generator[Wait]:
        """
        The deadline begins anew when a chunk has left and when a reply is complete.

        Not with single bytes: a slow server could hold the session for ever.
        """
        began = self._server.clock()
        if self.dialogue.trouble and not transaction.done:
            raise self.dialogue.trouble
        while not transaction.done:
            if chunk := self.dialogue.data_to_send():
                count = self._send(chunk)
                self.dialogue.sent(count)
                if count == len(chunk):
                    began = self._server.clock()
                has_more = bool(self.dialogue.data_to_send())
            else:
                count, has_more = 0, False
            if not (count and has_more):
                yield self._wait_since(began, has_more=has_more)
            # During a long content, too: the server may reply to what it has seen so far.
            if self._hear():
                began = self._server.clock()

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
            Wait(self._sock.fileno(), select.POLLIN, seconds).here()
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

    def _wait_since(self, began: float, *, has_more: bool) -> Wait:
        limit = self._server.data_timeout if self.dialogue.awaits_end_of_data else self._server.timeout
        remaining = began + limit - self._server.clock()
        if remaining <= 0:
            self._is_broken_off = True
            raise self.dialogue.timed_out(limit)
        return Wait(self._sock.fileno(), select.POLLIN | select.POLLOUT if has_more else select.POLLIN, remaining)

    def _hear(self) -> int:
        """Read what has arrived; return how many replies it completes."""
        data = self._receive()
        return 0 if data is None else self.dialogue.receive_data(data)

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


def _about(transaction: MailTransaction) -> Hashable:
    """The recipients or the sender that the objection to *transaction* is about, if it is about the message."""
    return transaction.recipients if transaction.begun else transaction.sender


def _said(reply: Reply) -> Hashable:
    return reply.code, reply.enhanced
