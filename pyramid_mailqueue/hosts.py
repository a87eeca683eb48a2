"""What can be told of a host by its name alone."""

from __future__ import annotations

__all__ = ['is_loopback']


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
