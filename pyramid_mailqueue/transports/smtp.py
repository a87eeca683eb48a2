"""
The SMTP transport: where messages go to a mail server.

:class:`SMTPTransport` decides how to reach the server, and splits a message into mail transactions.  It stands on
three helpers:

- ``_Client`` is smtplib up to the point where mail can be sent: connection, greeting, EHLO, STARTTLS, AUTH;
- ``_Session`` carries the bytes of a :class:`~.smtp_transaction.Dialogue` over the client's socket, within deadlines;
- ``_Pool`` keeps sessions for the next message, and away from forked children.

All that goes wrong with the server, and with nothing else, is :class:`~.exceptions.ServerTrouble`: which server, what
it said, and what to check.
"""

from __future__ import annotations

import base64
import hmac
import logging
import os
import re
import select
import smtplib
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from os import PathLike

from zope.interface import implementer

from pyramid_mailqueue.delivery.results import Offer, Reply, SendResult
from pyramid_mailqueue.exceptions import ConfigurationError, ServerTrouble
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.hosts import is_loopback
from pyramid_mailqueue.interfaces import ITransport
from pyramid_mailqueue.settings import default_tls
from pyramid_mailqueue.transports.smtp_transaction import (
    Capabilities,
    Dialogue,
    MailTransaction,
    ReplyReader,
    printable,
)

__all__ = ['SMTPTransport', 'tls_mode']

log = logging.getLogger('mailqueue.smtp')

Connect = Callable[[tuple[str, int], float], socket.socket]

#: How long a server may take to say goodbye, in seconds.
QUIT_PATIENCE = 1.0

#: How much goes into one record of TLS, at most (RFC 8446 section 5.1).
TLS_RECORD = 16 * 1024

# More than a record: nothing that was decrypted stays behind, where poll() would not see it.
READ_SIZE = 64 * 1024

_EHLO_ARGUMENT = re.compile(
    r'\[[0-9A-Za-z:.-]+\]|[0-9A-Za-z](?:[0-9A-Za-z-]*[0-9A-Za-z])?(?:\.[0-9A-Za-z](?:[0-9A-Za-z-]*[0-9A-Za-z])?)*'
)


def tls_mode(tls: str | None, hostname: str, port: int, *, has_credentials: bool, has_ca_file: bool) -> str:
    """
    Return what ``mailqueue.smtp_tls`` comes to: ``implicit``, ``starttls``, ``opportunistic`` or ``off``.

    TLS is required, and certificates are verified, with the first two.  Credentials never leave this host in clear
    text: with them *opportunistic* becomes ``starttls``, and *off* is a
    :class:`~.exceptions.ConfigurationError`, unless the server is on this host.  So is a file of authorities with
    a mode that verifies nothing.
    """
    if tls is None or tls in ('', 'auto'):
        tls = default_tls(hostname, port, has_ca_file=has_ca_file)
    if tls not in ('implicit', 'starttls', 'opportunistic', 'off'):
        raise ConfigurationError(f'mailqueue.smtp_tls = {tls}: must be implicit, starttls, opportunistic or off.')
    if has_ca_file and tls in ('opportunistic', 'off'):
        raise ConfigurationError(
            f'mailqueue.smtp_tls_ca_file is of no use with mailqueue.smtp_tls = {tls}, which verifies no certificate. '
            'Remove one of them.'
        )
    if not has_credentials or is_loopback(hostname):
        return tls
    if tls == 'off':
        raise ConfigurationError(
            f'mailqueue.smtp_tls = off would send mailqueue.smtp_password in clear text to {hostname}. '
            'Set it to starttls or implicit.'
        )
    return 'starttls' if tls == 'opportunistic' else tls


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
    :param connect: called with (host, port) and *connect_timeout*, returns a connected socket
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
        connect: Connect = socket.create_connection,
    ) -> None:
        if not hostname:
            raise ConfigurationError('mailqueue.smtp_hostname is missing: name the mail server to send over.')
        if bool(username) != bool(password):
            raise ConfigurationError('Set both mailqueue.smtp_username and mailqueue.smtp_password, or neither.')
        if max_recipients < 1:
            raise ConfigurationError(f'mailqueue.max_recipients = {max_recipients}: must be 1 or more.')
        if local_hostname and not _EHLO_ARGUMENT.fullmatch(local_hostname):
            raise ConfigurationError(
                f'mailqueue.smtp_local_hostname = {local_hostname!r}: must be a domain name, or an address such as '
                '[192.0.2.1].'
            )
        self._server = _Server(hostname, port, connect_timeout, timeout, data_timeout, clock, connect)
        self._credentials = (username, password) if username and password else None
        self._tls = tls_mode(tls, hostname, port, has_credentials=bool(username), has_ca_file=tls_ca_file is not None)
        self._tls_ca_file = tls_ca_file
        self._given_local_hostname = local_hostname
        self._max_recipients = max_recipients
        self._name = f'smtp:{self._server}'
        self._pool = _Pool(idle_timeout, clock)

    def __repr__(self) -> str:
        return f'<SMTPTransport {self._server} tls={self._tls}>'

    def send(self, sender: str, recipients: Sequence[str], content: bytes) -> SendResult:
        """
        See `ITransport`.

        The transport of the result is ``smtp:host:port``.  Its ``trouble`` is set if the session broke off when some
        recipients had their outcome; if nobody had, :class:`~.exceptions.ServerTrouble` is raised.
        """
        replies: dict[str, Reply] = {}
        trouble = None
        # Each transaction brings at least one reply, so this comes to an end: see MailTransaction.finish().
        while trouble is None and (rest := tuple(r for r in recipients if r not in replies)):
            try:
                for result in self.stream(Offer(sender, rest, content), _nothing_more):
                    replies.update(result.replies)
                    trouble = result.trouble
            except ServerTrouble as error:
                if not replies:
                    raise
                trouble = error
        in_order = {recipient: replies[recipient] for recipient in recipients if recipient in replies}
        return SendResult(in_order, self._name, trouble=trouble)

    def stream(self, first: Offer, more: Callable[[], Offer | None]) -> Generator[SendResult]:
        """
        See `ITransport`.

        Each offer is one transaction, for at most *max_recipients*.  Of two offers one is under way, and the other has
        said MAIL, RCPT and DATA behind it: in the same write as the end of its content, where the server offers
        PIPELINING.
        """
        session = self._pool.take() or self._connect()
        offers = deque([first])
        try:
            transactions = deque([self._submit(session, first)])
            while offers:
                if len(offers) < 2 and session.dialogue.trouble is None and (offer := more()) is not None:
                    offers.append(offer)
                    transactions.append(self._submit(session, offer))
                transaction = transactions[0]
                try:
                    session.run(transaction)
                except ServerTrouble as trouble:
                    if not session.was_stale(transaction):
                        trouble.in_message = transaction.begun
                        if not transaction.replies:
                            raise
                        yield SendResult(transaction.replies, self._name, trouble=trouble)
                        return
                if session.takes_no_more(transaction):
                    session.say_quit()
                    self._pool.discard(session)
                    session = self._pool.take() or self._connect()
                    transactions = deque(self._submit(session, offer) for offer in offers)
                    continue
                offers.popleft()
                transactions.popleft()
                yield SendResult(transaction.replies, self._name)
        finally:
            self._pool.give_back(session)

    def _submit(self, session: _Session, offer: Offer) -> MailTransaction:
        recipients = offer.recipients[: self._max_recipients]
        return session.dialogue.submit(offer.sender, recipients, offer.content, offer.is_valid)

    def close(self) -> None:
        """See `ITransport`.  Sessions in use go on, and are kept when their message is sent."""
        self._pool.close()

    def abort(self) -> None:
        """See `ITransport`.  What is under way ends as if the server had closed the connection."""
        self._pool.abort()

    # --- a new session ---

    def _connect(self) -> _Session:
        aborts = self._pool.aborts
        try:
            client = self._open()
        except (OSError, ValueError, smtplib.SMTPException) as error:
            raise self._explained(error) from error
        session = _Session(client, self._server)
        if not self._pool.add(session, aborts):
            session.close()
            raise ServerTrouble(f'The connection to {self._server} was given up by this process.')
        return session

    def _open(self) -> _Client:
        client = self._greeted()
        try:
            if self._tls == 'starttls':
                self._start_tls(client)
            elif self._tls == 'opportunistic' and client.has_extn('starttls'):
                try:
                    self._start_tls(client)
                except (OSError, ServerTrouble, smtplib.SMTPException) as error:
                    log.info('%s: TLS failed, going on without: %s', self._server, error)
                    client.close()
                    client = self._greeted()
            if self._credentials:
                client.authenticate(*self._credentials)
        except BaseException:
            client.close()
            raise
        return client

    def _greeted(self) -> _Client:
        # Before connecting: finding out our own name may take longer than a server waits.
        our_name = self._local_hostname
        client = _Client(self._server, self._context if self._tls == 'implicit' else None)
        try:
            client.greet()
            client.local_hostname = our_name or client.address_literal
            # Where TLS must come next nothing but EHLO is said in clear text.
            client.introduce(may_say_helo=self._tls != 'starttls')
        except BaseException:
            client.close()
            raise
        return client

    def _start_tls(self, client: _Client) -> None:
        if not client.has_extn('starttls'):
            raise ServerTrouble(
                f'{self._server} does not offer STARTTLS, and mailqueue.smtp_tls = {self._tls} requires it. If it '
                'should, somebody on the way may have removed the offer; nothing was sent.'
            )
        try:
            client.starttls(context=self._context)
        except smtplib.SMTPResponseException as error:
            raise ServerTrouble(
                f'{self._server} offers STARTTLS and refuses it: {error.smtp_code} {_text(error.smtp_error)}.',
                code=error.smtp_code,
            ) from error
        # What was offered in clear text is forgotten by now.
        client.introduce(may_say_helo=False)

    @cached_property
    def _local_hostname(self) -> str:
        """The argument of EHLO; ``''`` for the address of the connection (RFC 5321 section 4.1.4)."""
        if self._given_local_hostname:
            return self._given_local_hostname
        name = socket.getfqdn()
        return name if '.' in name and _EHLO_ARGUMENT.fullmatch(name) else ''

    @cached_property
    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if self._tls == 'opportunistic' else self._verifying_context()
        if self._tls == 'opportunistic':
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Then sending never has to wait for something to be received.
        context.options |= ssl.OP_NO_RENEGOTIATION
        return context

    def _verifying_context(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=self._tls_ca_file)
        except OSError as error:
            raise ServerTrouble(f'mailqueue.smtp_tls_ca_file = {self._tls_ca_file} cannot be used: {error}.') from error

    def _explained(self, error: Exception) -> ServerTrouble:
        server = self._server
        if isinstance(error, ssl.SSLCertVerificationError):
            return ServerTrouble(
                f'The certificate of {server} does not hold: {error.verify_message}. mailqueue.smtp_tls = {self._tls} '
                f'requires one for {server.hostname}; a private authority goes into mailqueue.smtp_tls_ca_file.'
            )
        if isinstance(error, ssl.SSLError):
            return ServerTrouble(
                f'TLS with {server} failed: {error.reason or error}. '
                f'Check that mailqueue.smtp_tls = {self._tls} fits mailqueue.smtp_port.'
            )
        if isinstance(error, (socket.gaierror, UnicodeError)):
            return ServerTrouble(
                f'There is no address for {server}: {error}. Check mailqueue.smtp_hostname, and the name server.'
            )
        if isinstance(error, smtplib.SMTPResponseException):
            return ServerTrouble(
                f'{server} takes no mail from us: {error.smtp_code} {_text(error.smtp_error)}.', code=error.smtp_code
            )
        return ServerTrouble(
            f'Cannot reach {server}: {error}. Check mailqueue.smtp_hostname, smtp_port and smtp_tls, and that a mail '
            'server runs there.'
        )


@dataclass(frozen=True)
class _Server:
    """Where the server is, and how long it may take."""

    hostname: str
    port: int
    connect_timeout: float
    timeout: float
    data_timeout: float
    clock: Callable[[], float]
    connect: Connect

    def __str__(self) -> str:
        return f'[{self.hostname}]:{self.port}' if ':' in self.hostname else f'{self.hostname}:{self.port}'


class _Client(smtplib.SMTP):
    """
    smtplib up to the point where mail can be sent.

    Replies are read by our own reader: within the timeout as a whole and not for each byte, never more than was asked
    for, and never more than fits.  So there is no buffer either in which a forged line could wait for the end of the
    TLS handshake.

    :param context: for TLS from the first byte
    """

    ehlo_msg = 'EHLO'

    def __init__(self, server: _Server, context: ssl.SSLContext | None) -> None:
        super().__init__(local_hostname='', timeout=server.timeout)
        # smtplib's own name for what certificates are checked against.
        self._host = server.hostname
        self._server = server
        self._context = context

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        """Called by smtplib to connect."""
        sock = self._server.connect((host, port), self._server.connect_timeout)
        sock.settimeout(timeout)
        # What is to go out goes at once: we write whole groups of commands.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._context.wrap_socket(sock, server_hostname=host) if self._context else sock

    @property
    def address_literal(self) -> str:
        """Our address on this connection, as EHLO takes it."""
        assert self.sock
        address = self.sock.getsockname()[0].partition('%')[0]
        return f'[IPv6:{address}]' if ':' in address else f'[{address}]'

    def greet(self) -> None:
        """Connect, and hear the greeting."""
        code, text = self.connect(self._server.hostname, self._server.port)
        if code != 220:
            raise smtplib.SMTPConnectError(code, text)

    def introduce(self, *, may_say_helo: bool) -> None:
        """Say EHLO, and HELO if the server does not know that."""
        code, text = self.ehlo()
        if code not in {250, 421} and may_say_helo:
            code, text = self.helo()
        if code != 250:
            raise smtplib.SMTPHeloError(code, text)

    def authenticate(self, username: str, password: str) -> None:
        """
        Log in.

        smtplib's own login tries the same wrong password with every mechanism, which locks accounts, and takes ASCII
        only.
        """
        offered = self.esmtp_features.get('auth', '').upper().split()
        for mechanism in ('PLAIN', 'LOGIN', 'CRAM-MD5'):
            if mechanism not in offered:
                continue
            try:
                code, text = self._try(mechanism, username.encode(), password.encode())
            except (OSError, ValueError, smtplib.SMTPException) as error:
                raise self._login_failed(username, str(error)) from error
            if code == 235:
                return
            # RFC 4954 section 4: 504 is "mechanism unknown", in spite of the offer.
            if code != 504:
                raise self._login_failed(username, f'{code} {text}', code)
        raise self._login_failed(
            username, f'it offers {" ".join(offered) or "no AUTH"}, and we know PLAIN, LOGIN and CRAM-MD5'
        )

    def _login_failed(self, username: str, why: str, code: int | None = None) -> ServerTrouble:
        return ServerTrouble(
            f'{self._server} does not let {username!r} in: {why}. '
            'Check mailqueue.smtp_username, smtp_password and smtp_tls.',
            code=code,
        )

    def _try(self, mechanism: str, username: bytes, password: bytes) -> tuple[int, str]:
        plain = b'\0%s\0%s' % (username, password)
        if mechanism == 'PLAIN':
            code, text = self._tell(plain, 'AUTH PLAIN ')
        else:
            code, text = self.docmd('AUTH', mechanism)
        if code == 334 and mechanism == 'LOGIN':
            code, text = self._tell(username)
            if code == 334:
                code, text = self._tell(password)
        elif code == 334 and mechanism == 'CRAM-MD5':
            digest = hmac.new(password, base64.b64decode(text), 'md5').hexdigest()
            code, text = self._tell(b'%s %s' % (username, digest.encode()))
        # Some servers repeat what they do not understand.
        for secret in (plain, password):
            text = text.replace(base64.b64encode(secret), b'[redacted]').replace(secret, b'[redacted]')
        return code, _text(text)

    def _tell(self, secret: bytes, command: str = '') -> tuple[int, bytes]:
        log.debug('%s C: %s[redacted]', self._server, command)
        self.send(f'{command}{base64.b64encode(secret).decode()}\r\n')
        return self._read_reply('[redacted]')

    def putcmd(self, cmd: str, args: str = '') -> None:
        """Say a command; called by smtplib."""
        log.debug('%s C: %s %s', self._server, cmd, args)
        super().putcmd(cmd, args)

    def getreply(self) -> tuple[int, bytes]:
        """Hear the reply to the last command; called by smtplib."""
        return self._read_reply()

    def _read_reply(self, shown: str | None = None) -> tuple[int, bytes]:
        reader = ReplyReader(str(self._server))
        deadline = self._server.clock() + self._server.timeout
        while (reply := reader.next_reply()) is None:
            reader.feed(self._receive(deadline))
        if not reader.is_empty:
            raise ServerTrouble(
                f'{self._server} said more than it was asked for; somebody on the way may have added it.'
            )
        code, lines = reply
        if log.isEnabledFor(logging.DEBUG):
            for line in lines:
                log.debug('%s S: %d %s', self._server, code, shown or _text(line))
        return code, b'\n'.join(lines)

    def _receive(self, deadline: float) -> bytes:
        assert self.sock
        remaining = deadline - self._server.clock()
        data = None
        with suppress(TimeoutError):
            if remaining > 0:
                self.sock.settimeout(remaining)
                data = self.sock.recv(READ_SIZE)
        if data is None:
            raise TimeoutError(f'no reply within {self._server.timeout:g} seconds')
        self.sock.settimeout(self._server.timeout)
        if not data:
            raise smtplib.SMTPServerDisconnected('it closed the connection')
        return data


def _nothing_more() -> None:
    return None


def _text(said: bytes | str) -> str:
    """What a server said, in one line."""
    return ' '.join((printable(said) if isinstance(said, bytes) else said).split())


class _Session:
    """
    A connection on which mail can be sent: the bytes of the dialogue, and the deadlines.

    The socket does not block, so that we can always hear while we speak: with a long group of commands the server may
    stop reading until we have read its replies.

    :ivar was_used: a transaction was completed on it
    :ivar idle_since: when it went into the pool
    """

    def __init__(self, client: _Client, server: _Server) -> None:
        assert client.sock
        self.dialogue = Dialogue(Capabilities.from_ehlo(client.esmtp_features), str(server))
        self.was_used = False
        self.idle_since = 0.0
        self._has_delivered = False
        self._is_broken_off = False
        self._server = server
        self._client = client
        self._sock = client.sock
        self._sock.settimeout(0)
        self._is_encrypted = isinstance(client.sock, ssl.SSLSocket)
        self._poll = select.poll()
        self._poll.register(self._sock)

    def run(self, transaction: MailTransaction) -> None:
        """
        Go on until *transaction* is done.

        Raises :class:`~.exceptions.ServerTrouble`.  What comes behind the last reply, such as a farewell (421), is not
        about this transaction: it is raised for the next one.
        """
        self.dialogue.trace = self._trace if log.isEnabledFor(logging.DEBUG) else None
        try:
            self._go_on_until_done(transaction)
        except ServerTrouble:
            if not transaction.done:
                raise
        self.was_used = True
        self._has_delivered |= transaction.delivered

    def _go_on_until_done(self, transaction: MailTransaction) -> None:
        """
        A deadline begins anew when a chunk has left and when a reply is complete.

        Not with single bytes: a slow server could hold us for ever.
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
                self._wait_until(began, has_more=has_more)
            # In the midst of a long content too: the server may have something to say about what it has seen so far.
            if self._hear():
                began = self._server.clock()

    def was_stale(self, transaction: MailTransaction) -> bool:
        """The server had ended this session while it was idle: nothing of *transaction* was answered."""
        if transaction.answered or transaction.done or self._is_broken_off:
            return False
        return self.was_used and self.dialogue.closed_by_server

    def takes_no_more(self, transaction: MailTransaction) -> bool:
        """
        The server has ended this session, or takes only so many messages in one (OpenSMTPD: 452 to MAIL).

        In either case nothing of *transaction* has happened, and a new session may do.
        """
        return self.was_stale(transaction) or (transaction.postponed and self._has_delivered)

    @property
    def is_alive(self) -> bool:
        """Nothing has come since the last reply: neither the end of the stream nor a farewell (421)."""
        try:
            return self._receive() is None
        except ServerTrouble:
            return False

    def say_quit(self) -> None:
        """Say goodbye, if that does not take any time."""
        with suppress(OSError):
            self._sock.send(b'QUIT\r\n')

    def hear_out(self, seconds: float) -> None:
        """Close when the server has said goodbye too, or after *seconds*."""
        with suppress(OSError):
            self._wait(select.POLLIN, seconds)
            # A socket with something unread is reset when it is closed.
            self._sock.recv(READ_SIZE)
        self.close()

    def shut_down(self) -> None:
        """End the connection from another thread; the one that uses it will hear of it."""
        self._is_broken_off = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close without a word."""
        self._client.close()

    def _trace(self, line: str) -> None:
        log.debug('%s %s', self._server, line)

    def _wait_until(self, began: float, *, has_more: bool) -> None:
        limit = self._server.data_timeout if self.dialogue.awaits_end_of_data else self._server.timeout
        remaining = began + limit - self._server.clock()
        mask = select.POLLIN | select.POLLOUT if has_more else select.POLLIN
        if remaining <= 0 or not self._wait(mask, remaining):
            raise self.dialogue.timed_out(limit)

    def _wait(self, mask: int, seconds: float) -> bool:
        self._poll.modify(self._sock, mask)
        return bool(self._poll.poll(max(0, seconds) * 1000))

    def _hear(self) -> int:
        """Take what has come; return how many replies are complete with it."""
        data = self._receive()
        return 0 if data is None else self.dialogue.receive_data(data)

    def _receive(self) -> bytes | None:
        """Return what has come: None for nothing yet, ``b''`` for the end of the stream."""
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
        # OpenSSL does not tell how many of several records have left when it has to wait; of one it is all or nothing.
        size = TLS_RECORD if self._is_encrypted else len(chunk)
        try:
            return self._sock.send(chunk[:size])
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError as error:
            # It may have said why before it closed.
            self._hear()
            raise self.dialogue.connection_lost(f'broke off the connection ({error})') from error


class _Pool:
    """
    The sessions of this process, in use and idle; the one that was used last is taken first.

    A timer closes those that are idle for too long.  A forked child closes its copies of the sockets and says nothing:
    the sessions are its parent's.
    """

    def __init__(self, idle_timeout: float, clock: Callable[[], float]) -> None:
        self._idle_timeout = idle_timeout
        self._clock = clock
        self._start_anew()
        call_in_children(self._drop_inherited)

    def _start_anew(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        #: How often everything was broken off.
        self.aborts = 0
        self._open: set[_Session] = set()
        self._idle: list[_Session] = []
        self._timer: threading.Timer | None = None

    def _drop_inherited(self) -> None:
        inherited = self._open
        self._start_anew()
        for session in inherited:
            session.close()

    def add(self, session: _Session, aborts: int) -> bool:
        """Take note of a new session, in use; False if everything was broken off while it was opened."""
        with self._lock:
            if self.aborts != aborts:
                return False
            self._open.add(session)
            return True

    def take(self) -> _Session | None:
        """Return a session that was idle and is alive, if there is one."""
        if self._pid != os.getpid():
            # Not every server that forks tells Python of it (uWSGI does not).
            self._drop_inherited()
        self._close_expired()
        while True:
            with self._lock:
                if not self._idle:
                    return None
                session = self._idle.pop()
            if session.is_alive:
                return session
            self.discard(session)

    def give_back(self, session: _Session) -> None:
        """Keep *session* for the next message, if it is fit for that."""
        with self._lock:
            # Not one that was discarded, because no other could be had for it.
            if session in self._open and session.dialogue.is_idle:
                session.idle_since = self._clock()
                self._idle.append(session)
                self._start_timer()
                return
        self.discard(session)

    def discard(self, session: _Session) -> None:
        """Close a session that broke, or is of no use any more."""
        with self._lock:
            self._open.discard(session)
        session.close()

    def abort(self) -> None:
        """Break off all sessions, for the threads that use them."""
        with self._lock:
            self.aborts += 1
            sessions = list(self._open)
        for session in sessions:
            session.shut_down()

    def close(self) -> None:
        """Close all idle sessions."""
        with self._lock:
            idle, self._idle = self._idle, []
            timer, self._timer = self._timer, None
        if timer:
            timer.cancel()
        self._quit(idle)

    def _close_expired(self) -> None:
        with self._lock:
            oldest = self._clock() - self._idle_timeout
            expired = [session for session in self._idle if session.idle_since <= oldest]
            self._idle = [session for session in self._idle if session.idle_since > oldest]
        self._quit(expired)

    def _start_timer(self) -> None:
        """Called with the lock held."""
        if self._timer is not None or not self._idle:
            return
        timer = threading.Timer(self._idle[0].idle_since + self._idle_timeout - self._clock(), self._on_timer)
        timer.daemon = True
        # While the interpreter ends there are no new threads, and soon no sessions either.
        with suppress(RuntimeError):
            timer.start()
            self._timer = timer

    def _on_timer(self) -> None:
        self._close_expired()
        with self._lock:
            # Not the timer of close(), which may have been too late to stop this one.
            if self._timer is threading.current_thread():
                self._timer = None
                self._start_timer()

    def _quit(self, sessions: Iterable[_Session]) -> None:
        """Say goodbye to all before waiting for any."""
        sessions = list(sessions)
        for session in sessions:
            session.say_quit()
        deadline = self._clock() + QUIT_PATIENCE
        for session in sessions:
            session.hear_out(deadline - self._clock())
        with self._lock:
            self._open.difference_update(sessions)
