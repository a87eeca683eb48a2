"""
Reaching a mail server.

:class:`Connector` tries its addresses, and knows the authorities for TLS; :class:`Client` is a connection to one of
them, over which a :class:`~.smtp.handshake.Handshake` is carried out.

This is imported with the first connection: ssl would take a good part of the time of an idle run.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from os import PathLike
from pathlib import Path

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.hosts import domain_of_this_host
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.transports.smtp.handshake import Handshake, LoginRefused, StartTLS, State, unreachable
from pyramid_mailqueue.transports.smtp.server import VALID_FOR, Address, Server

__all__ = ['Client', 'Connector', 'OnSocket']

log = Log('mailqueue.smtp')

# More than a record of TLS: nothing that was decrypted stays behind, where poll() would not see it.
READ_SIZE = 64 * 1024

# The causes of trouble with a server that can be reached, and is not as it should be.
_WRONG_ANSWERS = ssl.SSLError, EOFError, BrokenPipeError, ConnectionResetError, TimeoutError, type(None)

# What the handshake does for each mode of TLS; with the others TLS begins before it, or never.
_STARTTLS = {'starttls': StartTLS.REQUIRED, 'opportunistic': StartTLS.IF_OFFERED}

#: Called with each socket of a connection that is being opened, see :meth:`Connector.connect`.
OnSocket = Callable[[socket.socket], object]


def _tell_nobody(sock: socket.socket) -> None:
    pass


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
            opportunistic TLS fails.  Another thread may :func:`~.smtp.server.shut_down` the last of them, which ends
            this call.  A shutdown that came too late, for a socket that was just replaced, is repeated here: shut down
            the new one, or raise ServerTrouble
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
                if isinstance(trouble, LoginRefused) or is_given_up():
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
        is_implicit = self._tls == 'implicit'
        new_client = partial(Client, self._server, address, on_socket, deadline, context, is_implicit=is_implicit)
        try:
            return self._open(new_client)
        except (OSError, ValueError) as error:
            raise self._explained(error) from error

    def _open(self, new_client: Callable[[], Client]) -> Client:
        # Before connecting: finding out our own name may take longer than a server waits.
        handshake = self._handshake(_STARTTLS.get(self._tls, StartTLS.NEVER))
        client = new_client()
        try:
            client.shake_hands(handshake)
        except (OSError, ServerTrouble) as error:
            if not (self._tls == 'opportunistic' and handshake.is_starting_tls):
                raise
            log.info('%s: TLS failed, going on without: %s', self._server, error)
            client = new_client()
            client.shake_hands(self._handshake(StartTLS.NEVER))
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

    def _handshake(self, starttls: StartTLS) -> Handshake:
        return Handshake(
            str(self._server),
            self._local_hostname,
            starttls=starttls,
            credentials=self._credentials,
            trace=self._trace if log.isEnabledFor(logging.DEBUG) else None,
        )

    def _trace(self, line: str) -> None:
        log.debug('%s %s', self._server, line)

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
        return unreachable(str(server), error)


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


class Client:
    """
    A connection to one address of the server, over which a handshake is carried out.

    A reply has to come within the timeout as a whole, and not each of its bytes.

    :param address: where to connect to
    :param on_socket: see :meth:`Connector.connect`
    :param deadline: when mail can be sent, or another address is tried; by the clock of *server*
    :param context: for TLS
    :param is_implicit: TLS begins with the first byte
    :ivar sock: the socket; the one with TLS, once there is TLS
    :ivar esmtp_features: what the server offers, see :attr:`~.smtp.handshake.Handshake.esmtp_features`
    """

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
        self.esmtp_features: Mapping[str, str] = {}
        self._server = server
        self._on_socket = on_socket
        self._deadline = deadline
        self._context = context
        self.sock = server.open(address, self._at_most(server.connect_timeout))
        try:
            # Nothing is to be delayed: whole groups of commands are written at once.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            on_socket(self.sock)
            if is_implicit:
                self._start_tls()
        except BaseException:
            self.close()
            raise

    def shake_hands(self, handshake: Handshake) -> None:
        """Carry out *handshake*, with our address in EHLO if it has no name there; if that fails, close."""
        try:
            handshake.local_hostname = handshake.local_hostname or self._address_literal()
            self._carry_out(handshake)
        except BaseException:
            self.close()
            raise
        self.esmtp_features = handshake.esmtp_features

    def close(self) -> None:
        """Close the connection as it is."""
        self.sock.close()

    def _address_literal(self) -> str:
        address = self.sock.getsockname()[0].partition('%')[0]
        return f'[IPv6:{address}]' if ':' in address else f'[{address}]'

    def _carry_out(self, handshake: Handshake) -> None:
        try:
            while handshake.state is not State.READY:
                if handshake.state is State.TLS:
                    self._start_tls()
                    handshake.tls_started()
                self._send(handshake)
                self._receive_reply(handshake)
        except ssl.SSLError:
            raise
        except OSError as error:
            raise handshake.connection_lost(error) from error

    def _start_tls(self) -> None:
        assert self._context
        self.sock.settimeout(self._at_most(self._server.timeout))
        # This takes the connection away from the old socket: only the new one can end it.
        encrypted = self._context.wrap_socket(
            self.sock, server_hostname=self._server.hostname, do_handshake_on_connect=False
        )
        self.sock = encrypted
        self._on_socket(encrypted)
        encrypted.do_handshake()

    def _send(self, handshake: Handshake) -> None:
        if data := handshake.data_to_send():
            self.sock.settimeout(self._at_most(self._server.timeout))
            self.sock.sendall(data)
            handshake.sent(len(data))

    def _receive_reply(self, handshake: Handshake) -> None:
        limit = self._at_most(self._server.timeout)
        deadline = self._server.clock() + limit
        is_complete = False
        while not is_complete:
            data = self._receive(deadline - self._server.clock())
            if data is None:
                raise handshake.timed_out(limit)
            is_complete = handshake.receive_data(data)

    def _receive(self, seconds: float) -> bytes | None:
        """Return what arrives within so many seconds, None for nothing."""
        if seconds <= 0:
            return None
        self.sock.settimeout(seconds)
        try:
            return self.sock.recv(READ_SIZE)
        except TimeoutError:
            return None

    def _at_most(self, seconds: float) -> float:
        """Return *seconds*, or what is left of them before the deadline."""
        return min(seconds, max(self._deadline - self._server.clock(), 0.001))
