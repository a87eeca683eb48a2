"""What can be told of a host by its name alone."""

from __future__ import annotations

from ipaddress import ip_address

__all__ = ['is_loopback']


def is_loopback(hostname: str) -> bool:
    """Tell whether *hostname* is this host: ``localhost``, ``127.0.0.0/8`` or ``::1``.  Asks no name server."""
    if hostname.lower().rstrip('.') == 'localhost':
        return True
    try:
        return ip_address(hostname.strip('[]')).is_loopback
    except ValueError:
        return False
