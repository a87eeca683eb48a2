"""
Reaching a mail server: smtplib up to the point where mail can be sent.

:class:`Connector` goes through connection, greeting, EHLO, STARTTLS and AUTH; :class:`Client` does each step.

This is imported with the first connection: smtplib and ssl would take a good part of the time of an idle run.
"""

from __future__ import annotations

import base64
import hmac
import logging
import math
import os
import smtplib
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from os import PathLike
from pathlib import Path

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.hosts import domain_of_this_host
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.transports.smtp.server import VALID_FOR, Address, Server
from pyramid_mailqueue.transports.smtp.transaction import ReplyReader, printable

__all__ = ['Client', 'Connector', 'OnSocket', 'shut_down']

log = Log('mailqueue.smtp')

# More than a record of TLS: nothing that was decrypted stays behind, where poll() would not see it.
READ_SIZE = 64 * 1024

# The causes of trouble with a server that can be reached, and is not as it should be.
_WRONG_ANSWERS = smtplib.SMTPException, ssl.SSLError, TimeoutError, type(None)

#: Called with each socket of a connection that is being opened, see :meth:`Connector.connect`.
OnSocket = Callable[[socket.socket], object]


def _tell_nobody(sock: socket.socket) -> None:
    pass


class _LoginRefused(ServerTrouble):
    """The password is wrong: no other address is tried, as too many attempts lock the account."""


def shut_down(sock: socket.socket) -> None:
    """
    End a connection that another thread uses, which notices at once.

    Not with the method of SSLSocket: what the other thread sends in that moment would go out in clear text.
    """
    with suppress(OSError):
        if isinstance(sock, ssl.SSLSocket):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
        else:
            sock.shutdown(socket.SHUT_RDWR)


class Connector:
    """
    See the module.

    :param server: where the server is
    :param tls: ``implicit``, ``starttls``, ``opportunistic`` or ``off``
    :param tls_ca_file: the authorities (PEM) that certificates are checked against, instead of the system's
    :param credentials: username and password
    :param local_hostname: the argument of EHLO; by default the fully qualified name of this host
    """

    def __init__(
        self,
        server: Server,
        *,
        tls: str,
        tls_ca_file: str | PathLike[str] | None = None,
        credentials: tuple[str, str] | None = None,
        local_hostname: str | None = None,
    ) -> None:
        self._server = server
        self._tls = tls
        self._tls_ca_file = tls_ca_file
        self._credentials = credentials
        self._given_local_hostname = local_hostname
        # Until when each address is left out that could not be used.
        self._failed: dict[Address, float] = {}
        # The state of the authorities, and the context that knows them.
        self._made_of: tuple[Sequence[object], ssl.SSLContext] | None = None

    def connect(self, on_socket: OnSocket | None = None, is_given_up: Callable[[], bool] = lambda: False) -> Client:
        """
        Return a client that can send mail.  Raises :class:`~.exceptions.ServerTrouble`, in words for a person.

        Each address of the server is tried once (RFC 5321 section 5.1), whatever is wrong with the one before: all but
        the last one share the timeout of a command.  One that could not be used comes last for
        :data:`~.smtp.server.VALID_FOR` seconds.

        :param on_socket: called with the socket when there is one, before the server has said anything, and with each
            one that replaces it: the one with TLS, before the handshake, and that of a second connection, if
            opportunistic TLS fails.  Another thread may :func:`shut_down` the last of them, which ends this call.  A
            shutdown that came too late, for a socket that was just replaced, is repeated here: shut down the new one,
            or raise ServerTrouble
        :param is_given_up: whether one of them was shut down by another thread, so that no other address is tried
        """
        try:
            # First: if the authorities cannot be read, no address is to blame.
            context = self._context()
            addresses = self._worth_trying(self._server.addresses())
        except (OSError, ValueError) as error:
            raise self._explained(error) from error
        troubles: dict[Address, ServerTrouble] = {}
        for address in addresses:
            is_last = address == addresses[-1]
            share = math.inf if is_last else self._server.timeout / len(addresses)
            try:
                client = self._connect_to(address, share, on_socket or _tell_nobody, context)
            except ServerTrouble as trouble:
                troubles[address] = trouble
                if isinstance(trouble, _LoginRefused) or is_given_up():
                    break
                self._failed[address] = self._server.clock() + VALID_FOR
                if not is_last:
                    level = logging.WARNING if isinstance(trouble.__cause__, _WRONG_ANSWERS) else logging.INFO
                    log.log(level, '%s This is its address %s; the next one is tried.', trouble, address)
            else:
                self._failed.pop(address, None)
                return client
        raise self._summary(troubles)

    def _connect_to(
        self, address: Address, seconds: float, on_socket: OnSocket, context: ssl.SSLContext | None
    ) -> Client:
        deadline = self._server.clock() + seconds
        try:
            return self._open(partial(Client, self._server, address, on_socket, deadline, context))
        except (OSError, ValueError, smtplib.SMTPException) as error:
            raise self._explained(error) from error

    def _open(self, new_client: Callable[..., Client]) -> Client:
        client = self._greeted(new_client)
        try:
            if self._tls == 'starttls':
                self._start_tls(client)
            elif self._tls == 'opportunistic' and client.has_extn('starttls'):
                try:
                    self._start_tls(client)
                except (OSError, ServerTrouble, smtplib.SMTPException) as error:
                    log.info('%s: TLS failed, going on without: %s', self._server, error)
                    client.close()
                    client = self._greeted(new_client)
            if self._credentials:
                client.authenticate(*self._credentials)
        except BaseException:
            client.close()
            raise
        return client

    def _worth_trying(self, addresses: list[Address]) -> list[Address]:
        """Return *addresses*, those that failed recently at the end, the latest failure first."""
        now = self._server.clock()
        good = [it for it in addresses if self._failed.get(it, 0) <= now]
        return good + sorted({*addresses} - {*good}, key=self._failed.__getitem__, reverse=True)

    def _summary(self, troubles: dict[Address, ServerTrouble]) -> ServerTrouble:
        """Return the trouble of the server: that of each address, if they differ."""
        last = [*troubles.values()][-1]
        if len({str(trouble) for trouble in troubles.values()}) == 1:
            return last
        each = ' '.join(f'{address}: {trouble}' for address, trouble in troubles.items())
        return ServerTrouble(f'{self._server} can be used at none of its addresses. {each}', code=last.code)

    def _greeted(self, new_client: Callable[..., Client]) -> Client:
        # Before connecting: finding out our own name may take longer than a server waits.
        our_name = self._local_hostname
        client = new_client(is_implicit=self._tls == 'implicit')
        try:
            client.greet()
            client.local_hostname = our_name or client.address_literal
            # Where TLS must come next nothing but EHLO is said in clear text.
            client.introduce(may_say_helo=self._tls != 'starttls')
        except BaseException:
            client.close()
            raise
        return client

    def _start_tls(self, client: Client) -> None:
        if not client.has_extn('starttls'):
            raise ServerTrouble(
                f'{self._server} does not offer STARTTLS, and mailqueue.smtp_tls = {self._tls} requires it. If it '
                'should, the offer may have been removed on the way; nothing was sent.'
            )
        try:
            client.start_tls()
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
        name = domain_of_this_host()
        return name if '.' in name else ''

    def forget_authorities(self) -> None:
        """Read the authorities again for the next connection, whether or not they seem to have changed."""
        self._made_of = None

    def _context(self) -> ssl.SSLContext | None:
        """Return the context of a new connection: a new one when the authorities have changed."""
        if self._tls == 'off':
            return None
        # Looked at before they are read: what is being written now is read again next time.
        authorities = () if self._tls == 'opportunistic' else _state_of_authorities(self._tls_ca_file)
        if self._made_of is None or self._made_of[0] != authorities:
            self._made_of = authorities, self._new_context()
        return self._made_of[1]

    def _new_context(self) -> ssl.SSLContext:
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
                f'The certificate of {server} could not be verified: {error.verify_message}. '
                f'mailqueue.smtp_tls = {self._tls} requires one for {server.hostname}; a private authority goes into '
                'mailqueue.smtp_tls_ca_file.'
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


def _state_of_authorities(ca_file: str | PathLike[str] | None) -> Sequence[object]:
    """Return what changes when the authorities of the system do, or those in *ca_file*."""
    if ca_file is not None:
        return [_state_of(ca_file)]
    paths = ssl.get_default_verify_paths()
    places = [os.environ.get(paths.openssl_cafile_env, paths.openssl_cafile)]
    for folder in os.environ.get(paths.openssl_capath_env, paths.openssl_capath).split(os.pathsep):
        places.append(folder)
        with suppress(OSError):
            # A few hundred: less than a millisecond, once for each connection.
            places += sorted(entry.path for entry in os.scandir(folder))
    return [_state_of(place) for place in places]


def _state_of(path: str | PathLike[str]) -> object:
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size


class Client(smtplib.SMTP):
    """
    smtplib up to the point where mail can be sent.

    Replies are read by our own reader: within the timeout as a whole and not for each byte, never more than was asked
    for, and never more than fits.  So there is no buffer either in which a forged line could wait for the end of the
    TLS handshake.

    :param address: where to connect to
    :param on_socket: see :meth:`Connector.connect`
    :param deadline: when mail can be sent, or another address is tried; by the clock of *server*
    :param context: for TLS
    :param is_implicit: TLS begins with the first byte
    """

    ehlo_msg = 'EHLO'

    def __init__(
        self,
        server: Server,
        address: Address,
        on_socket: OnSocket,
        deadline: float,
        context: ssl.SSLContext | None,
        *,
        is_implicit: bool,
    ) -> None:
        super().__init__(local_hostname='', timeout=server.timeout)
        self._server = server
        self._address = address
        self._on_socket = on_socket
        self._deadline = deadline
        self._context = context
        self._is_implicit = is_implicit

    def _at_most(self, seconds: float) -> float:
        """Return *seconds*, or what is left of them before the deadline."""
        return min(seconds, max(self._deadline - self._server.clock(), 0.001))

    def _connected(self) -> socket.socket:
        sock = self._server.open(self._address, self._at_most(self._server.connect_timeout))
        try:
            sock.settimeout(self._at_most(self._server.timeout))
            # Nothing is to be delayed: whole groups of commands are written at once.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._on_socket(sock)
            return self._encrypted(sock) if self._is_implicit else sock
        except BaseException:
            sock.close()
            raise

    def _encrypted(self, sock: socket.socket) -> ssl.SSLSocket:
        assert self._context
        # This takes the connection away from the old socket: only the new one can end it.
        encrypted = self._context.wrap_socket(
            sock, server_hostname=self._server.hostname, do_handshake_on_connect=False
        )
        try:
            self._on_socket(encrypted)
            encrypted.do_handshake()
        except BaseException:
            encrypted.close()
            raise
        return encrypted

    def start_tls(self) -> None:
        """Send STARTTLS, do the handshake, and forget what was said before (RFC 3207 section 4.2)."""
        assert self.sock
        code, text = self.docmd('STARTTLS')
        if code != 220:
            raise smtplib.SMTPResponseException(code, text)
        self.sock = self._encrypted(self.sock)
        self.helo_resp = self.ehlo_resp = None
        self.esmtp_features = {}
        self.does_esmtp = False

    @property
    def address_literal(self) -> str:
        """Our address on this connection, as EHLO takes it."""
        assert self.sock
        address = self.sock.getsockname()[0].partition('%')[0]
        return f'[IPv6:{address}]' if ':' in address else f'[{address}]'

    def greet(self) -> None:
        """Connect, and read the greeting."""
        self.sock = self._connected()
        code, text = self.getreply()
        if code != 220:
            raise smtplib.SMTPConnectError(code, text)

    def introduce(self, *, may_say_helo: bool) -> None:
        """Send EHLO, and HELO if the server does not know that."""
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
        kind = _LoginRefused if code is not None and code >= 500 else ServerTrouble
        return kind(
            f'{self._server} rejected the login of {username!r}: {_text(why)}. '
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
        """Send a command; called by smtplib."""
        log.debug('%s C: %s %s', self._server, cmd, args)
        super().putcmd(cmd, args)

    def getreply(self) -> tuple[int, bytes]:
        """Read the reply to the last command; called by smtplib."""
        return self._read_reply()

    def _read_reply(self, shown: str | None = None) -> tuple[int, bytes]:
        reader = ReplyReader(str(self._server))
        limit = self._at_most(self._server.timeout)
        deadline = self._server.clock() + limit
        while (reply := reader.next_reply()) is None:
            reader.feed(self._receive(deadline, limit))
        if not reader.is_empty:
            raise ServerTrouble(f'{self._server} said more than it was asked for; that may have been added on the way.')
        code, lines = reply
        if log.isEnabledFor(logging.DEBUG):
            for line in lines:
                log.debug('%s S: %d %s', self._server, code, shown or _text(line))
        return code, b'\n'.join(lines)

    def _receive(self, deadline: float, limit: float) -> bytes:
        assert self.sock
        remaining = deadline - self._server.clock()
        data = None
        with suppress(TimeoutError):
            if remaining > 0:
                self.sock.settimeout(remaining)
                data = self.sock.recv(READ_SIZE)
        if data is None:
            raise TimeoutError(f'no reply within {round(limit, 1):g} seconds')
        self.sock.settimeout(self._at_most(self._server.timeout))
        if not data:
            raise smtplib.SMTPServerDisconnected('it closed the connection')
        return data


def _text(said: bytes | str) -> str:
    """What a server said, in one line."""
    return ' '.join(printable(said.encode(errors='replace') if isinstance(said, str) else said).split())
