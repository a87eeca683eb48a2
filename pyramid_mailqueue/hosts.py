"""The names of hosts: checks without a lookup, and the names of this host."""

from __future__ import annotations

import re
import socket

__all__ = [
    'domain_of_this_host',
    'is_ehlo_argument',
    'is_ip_address',
    'is_loopback',
    'name_of_this_host',
    'to_a_labels',
]

_LABEL = '[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?'
# RFC 6874: an address of one link may name it.
_ZONE = re.compile(r'%[^%]+\Z')
_LOOPBACK_IPV6 = bytes(15) + b'\1'
_EHLO_ARGUMENT = re.compile(rf'\[[0-9A-Za-z:.-]+\]|{_LABEL}(?:\.{_LABEL})*')


def is_loopback(hostname: str) -> bool:
    """Whether *hostname* is this host: ``localhost``, ``127.0.0.0/8`` or ``::1``.  Asks no name server."""
    if hostname.lower().rstrip('.') == 'localhost':
        return True
    packed = _packed(hostname.strip('[]'))
    return packed == _LOOPBACK_IPV6 or (len(packed) == 4 and packed[0] == 127)


def is_ip_address(text: str) -> bool:
    """Whether *text* is an IP address, of version 4 or 6."""
    return bool(_packed(text))


def _packed(address: str) -> bytes:
    """Return the 4 or 16 octets of an IP address; none if it is not one."""
    # Not by ipaddress: socket is here anyway, and an idle run imports nothing that it can do without.
    try:
        if ':' in address:
            return socket.inet_pton(socket.AF_INET6, _ZONE.sub('', address))
        return socket.inet_pton(socket.AF_INET, address)
    except (OSError, ValueError):
        return b''


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
        ascii_name = name if is_ehlo_argument(name) else to_a_labels(name)
    except (OSError, UnicodeError):
        return ''
    return ascii_name if is_ehlo_argument(ascii_name) else ''


def to_a_labels(name: str) -> str:
    """Return a domain name in another script as A-labels (RFC 5891).  Raises UnicodeError if it cannot be one."""
    # Few names need it, and its tables take a while to load.
    import idna

    return idna.encode(name, uts46=True, transitional=False).decode('ascii')


def name_of_this_host() -> str:
    """Return the host name of this machine, as ASCII: for display and for storage."""
    return socket.gethostname().encode('ascii', 'backslashreplace').decode('ascii')
