"""The names of hosts: checks without a lookup, and the names of this host."""

from __future__ import annotations

import re
import socket

__all__ = ['domain_of_this_host', 'is_ehlo_argument', 'is_loopback', 'name_of_this_host']

_LABEL = '[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?'
_EHLO_ARGUMENT = re.compile(rf'\[[0-9A-Za-z:.-]+\]|{_LABEL}(?:\.{_LABEL})*')


def is_loopback(hostname: str) -> bool:
    """Whether *hostname* is this host: ``localhost``, ``127.0.0.0/8`` or ``::1``.  Asks no name server."""
    if hostname.lower().rstrip('.') == 'localhost':
        return True
    address = hostname.strip('[]')
    if ':' not in address and not address[-1:].isdecimal():
        # A domain name, as most are, does not need this slow import.
        return False
    from ipaddress import ip_address

    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


def is_ehlo_argument(name: str) -> bool:
    """Whether *name* is a domain name or an address literal (RFC 5321 section 4.1.1.1)."""
    return len(name) <= 255 and _EHLO_ARGUMENT.fullmatch(name) is not None


def domain_of_this_host() -> str:
    """
    Return the fully qualified name of this machine as it may stand in a mail, or ``''``.

    A machine may be called anything.  A name in another script becomes A-labels (RFC 5891).
    """
    try:
        name = socket.getfqdn()
        return name if is_ehlo_argument(name) else _a_labels(name)
    except (OSError, UnicodeError):
        return ''


def _a_labels(name: str) -> str:
    import idna

    ascii_name = idna.encode(name, uts46=True).decode('ascii')
    return ascii_name if is_ehlo_argument(ascii_name) else ''


def name_of_this_host() -> str:
    """Return the host name of this machine, as ASCII: for display and for storage."""
    return socket.gethostname().encode('ascii', 'backslashreplace').decode('ascii')
