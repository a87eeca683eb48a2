"""The mail server: where it is, how long it may take, and whether its connections are encrypted."""

from __future__ import annotations

import socket
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.hosts import is_loopback
from pyramid_mailqueue.settings import default_tls

__all__ = [
    'MAX_KNOWN',
    'MAX_VAIN',
    'VALID_FOR',
    'Address',
    'Connect',
    'Objections',
    'Server',
    'shut_down',
    'tls_mode',
]

Connect = Callable[[tuple[str, int], float], socket.socket]

#: How long a reply in a new session, or the failure of an address, is remembered, in seconds.
VALID_FOR = 300

#: For how many senders and groups of recipients a reply is remembered, at most.
MAX_KNOWN = 1000

#: After so many new sessions in a row with the same reply it is believed in used sessions, too.
MAX_VAIN = 3


class Objections:
    """
    The objections in new sessions: for whom the server has no answer but "not now".

    In a session that has delivered, the same reply may mean that it takes no more messages, and a new session finds
    out.  This records what is known already: of a sender or of recipients, and of a reply (its code and enhanced code)
    that came in :data:`MAX_VAIN` new sessions in a row, too, as from a server that makes all strangers wait.  It is
    known for :data:`VALID_FOR` seconds, or until the server takes a message from the sender or for the recipients.

    May be used by any number of threads at once: there is no lock, each step is one operation of a dict.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # By the hash: the addresses themselves may be many.
        self._until: dict[int, float] = {}
        self._vain: dict[Hashable, tuple[int, float]] = {}

    def add(self, about: Hashable, said: Hashable) -> None:
        """Note that a new session has *said* this *about* a sender, or some recipients."""
        if len(self._until) >= MAX_KNOWN:
            # Those that still hold are found out again.
            self._until.clear()
        until = self._clock() + VALID_FOR
        self._until[hash(about)] = until
        self._vain[said] = self._count(said) + 1, until

    def discard(self, about: Hashable) -> None:
        """Note that the server takes messages from a sender, or for some recipients."""
        self._until.pop(hash(about), None)

    def was_of_session(self, said: Hashable) -> None:
        """Note that a used session has *said* this, and a new one has taken the message."""
        self._vain.pop(said, None)

    def holds(self, about: Hashable, said: Hashable) -> bool:
        """Whether it would be in vain to ask a new session."""
        return self._clock() < self._until.get(hash(about), 0) or self._count(said) >= MAX_VAIN

    def _count(self, said: Hashable) -> int:
        count, until = self._vain.get(said, (0, 0))
        return count if self._clock() < until else 0


class Address(NamedTuple):
    """One of the addresses that a server has, as :func:`socket.getaddrinfo` gives them."""

    family: int
    sockaddr: tuple[Any, ...]

    def __str__(self) -> str:
        return str(self.sockaddr[0])


@dataclass(frozen=True)
class Server:
    """Where the server is, how long it may take, and what is known of it; see `SMTPTransport`."""

    hostname: str
    port: int
    connect_timeout: float
    timeout: float
    data_timeout: float
    clock: Callable[[], float]
    connect: Connect | None = None
    objections: Objections = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, 'objections', Objections(self.clock))

    def addresses(self) -> list[Address]:
        """Return the addresses of the server, each once, the preferred one first.  Raises OSError, ValueError."""
        if self.connect is not None:
            return [Address(socket.AF_UNSPEC, (self.hostname, self.port))]
        found = socket.getaddrinfo(self.hostname, self.port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(Address(family, sockaddr) for family, _, _, _, sockaddr in found))

    def open(self, address: Address, seconds: float) -> socket.socket:
        """Return a socket that is connected to one of the addresses, in *seconds* at most.  Raises OSError."""
        if self.connect is not None:
            return self.connect((self.hostname, self.port), seconds)
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        try:
            sock.settimeout(seconds)
            sock.connect(address.sockaddr)
        except BaseException:
            sock.close()
            raise
        return sock

    def __str__(self) -> str:
        return f'[{self.hostname}]:{self.port}' if ':' in self.hostname else f'{self.hostname}:{self.port}'


def tls_mode(tls: str | None, hostname: str, port: int, *, has_credentials: bool, has_ca_file: bool) -> str:
    """
    Return the effective ``mailqueue.smtp_tls``: ``implicit``, ``starttls``, ``opportunistic`` or ``off``.

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


def shut_down(sock: socket.socket) -> None:
    """
    End a connection that another thread uses, which notices at once.

    Not with the method of SSLSocket: what the other thread sends in that moment would go out in clear text.
    """
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
