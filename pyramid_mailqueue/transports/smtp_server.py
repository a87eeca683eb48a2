"""Which mail server there is, how long it may take, and what has to be encrypted on the way to it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.hosts import is_loopback
from pyramid_mailqueue.settings import default_tls

__all__ = ['MAX_POSTPONED', 'POSTPONED_FOR', 'Connect', 'PostponedSenders', 'Server', 'tls_mode']

Connect = Callable[[tuple[str, int], float], socket.socket]

#: How long it holds what a new session has said of a sender, in seconds.
POSTPONED_FOR = 300

#: Of so many senders at most.
MAX_POSTPONED = 1000


class PostponedSenders:
    """
    The senders from whom the server takes no message for now: it has said so (4xx to MAIL) to one in a new session.

    In a session that was used the same reply may mean that no more messages are taken in it, and a new session finds
    out.  For these it is known already.  A sender is here for :data:`POSTPONED_FOR` seconds, or until the server takes
    a message from it.

    May be used by any number of threads at once: there is no lock, each step is one operation of a dict.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def add(self, sender: str) -> None:
        """Note what a new session has said."""
        if len(self._until) >= MAX_POSTPONED:
            # Those who still have to wait are found out again.
            self._until.clear()
        self._until[sender] = self._clock() + POSTPONED_FOR

    def discard(self, sender: str) -> None:
        """Note that the server takes messages from *sender*."""
        self._until.pop(sender, None)

    def __contains__(self, sender: str) -> bool:
        until = self._until.get(sender)
        return until is not None and self._clock() < until


@dataclass(frozen=True)
class Server:
    """Where the server is, how long it may take, and what is known of it; see `SMTPTransport`."""

    hostname: str
    port: int
    connect_timeout: float
    timeout: float
    data_timeout: float
    clock: Callable[[], float]
    connect: Connect
    postponed: PostponedSenders = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, 'postponed', PostponedSenders(self.clock))

    def __str__(self) -> str:
        return f'[{self.hostname}]:{self.port}' if ':' in self.hostname else f'{self.hostname}:{self.port}'


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
