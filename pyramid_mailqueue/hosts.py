"""The names of hosts: what can be told of one without asking for it, and what this one is called."""

from __future__ import annotations

import re
import socket

__all__ = ['domain_of_this_host', 'is_ehlo_argument', 'is_loopback', 'name_of_this_host']

_LABEL = '[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?'
_EHLO_ARGUMENT = re.compile(rf'\[[0-9A-Za-z:.-]+\]|{_LABEL}(?:\.{_LABEL})*')


def is_loopback(hostname: str) -> bool:
    """Tell whether *hostname* is this host: ``localhost``, ``127.0.0.0/8`` or ``::1``.  Asks no name server."""
    if hostname.lower().rstrip('.') == 'localhost':
        return True
    address = hostname.strip('[]')
    if ':' not in address and not address[-1:].isdecimal():
        # A domain name, as most are; then the import, which takes a while, is not needed.
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
    """Return what this machine calls itself, as ASCII: for people, and for what is stored."""
    return socket.gethostname().encode('ascii', 'backslashreplace').decode('ascii')
