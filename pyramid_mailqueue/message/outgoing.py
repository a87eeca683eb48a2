"""
Makes an envelope of what an application hands in: its sender, its recipients and its content.

By default sender and recipients are read from the header of the message, for the last time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timezone
from email.message import Message
from email.utils import format_datetime, make_msgid, mktime_tz, parsedate_tz
from typing import Any, NamedTuple

from pyramid_mailqueue.exceptions import AddressError, MessageError, described
from pyramid_mailqueue.hosts import domain_of_this_host, is_ehlo_argument
from pyramid_mailqueue.message.addresses import at_least_one, parse_header_addresses, parse_mailbox
from pyramid_mailqueue.message.content import Field, message_bytes, split_content
from pyramid_mailqueue.message.fields import field_bytes, needs_utf8
from pyramid_mailqueue.message.line_ends import joined

__all__ = ['Parts', 'read_message']


class Parts(NamedTuple):
    """The parts of an :class:`~.envelope.Envelope`."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes


def read_message(
    message: Any,
    sender: str | None,
    recipients: Iterable[str] | str | None,
    default_sender: str | None,
    local_hostname: str | None,
    now: datetime | None,
) -> Parts:
    """Return the parts of an envelope; see :meth:`.Envelope.from_message` for what comes in, and what is raised."""
    if hasattr(message, 'to_message') and hasattr(message, 'send_to'):
        message, sender, recipients = _unwrap(message, sender, recipients, default_sender)
    fields, body = split_content(message_bytes(message))
    author = _author(sender, default_sender, is_complete=not isinstance(message, Message))
    envelope_sender = _find_sender(sender, fields, default_sender)
    return Parts(
        envelope_sender,
        _find_recipients(recipients, fields),
        _outgoing(fields, body, author, envelope_sender.rpartition('@')[2] or _host(local_hostname), now),
    )


# --- sender and recipients --------------------------------------------------

_NULL_SENDER = frozenset({'', '<>'})


def _find_sender(sender: str | None, fields: list[Field], default_sender: str | None) -> str:
    if sender is not None:
        return '' if sender in _NULL_SENDER else parse_mailbox(sender)
    resending = _latest_resending(fields)
    for name in ('resent-sender', 'resent-from') if resending else ('sender', 'from'):
        for address in _addresses(resending or fields, name):
            return address
    if default_sender:
        return parse_mailbox(default_sender)
    raise _no_sender('Resent-From header (it has other Resent- fields)' if resending else 'From header')


def _author(sender: str | None, default_sender: str | None, *, is_complete: bool) -> str | None:
    """
    Return the From of a message without one (RFC 5322 section 3.6); None leaves it alone.

    :param is_complete: whether it came as bytes, which are left as they are if the caller names the sender
    """
    if sender not in _NULL_SENDER and sender is not None:
        return None if is_complete else sender
    if default_sender and (sender is None or not is_complete):
        parse_mailbox(default_sender)
        return default_sender
    return None


def _no_sender(what_it_needs: str) -> AddressError:
    return AddressError(
        f'The message has no sender: give it a {what_it_needs}, pass sender=, or set mailqueue.default_sender.'
    )


def _find_recipients(recipients: Iterable[str] | str | None, fields: list[Field]) -> tuple[str, ...]:
    if isinstance(recipients, str):
        recipients = [recipients]
    if recipients is not None:
        return at_least_one(map(parse_mailbox, recipients))
    resending = _latest_resending(fields)
    names = ('resent-to', 'resent-cc', 'resent-bcc') if resending else ('to', 'cc', 'bcc')
    return at_least_one(address for name in names for address in _addresses(resending or fields, name))


def _addresses(fields: list[Field], name: str) -> list[str]:
    return parse_header_addresses(
        entry.value.decode('utf-8', 'surrogateescape') for entry in fields if entry.name == name
    )


def _latest_resending(fields: list[Field]) -> list[Field]:
    """
    Return the block of ``Resent-`` fields of the latest resending; the empty list if there was none.

    That is the one with the latest ``Resent-Date``.  If a block has none that can be read, it is the topmost one: by
    RFC 5322 section 3.6.6 a new block is put above the older ones.
    """
    blocks = _resendings(fields)
    dates = [_resent_date(block) for block in blocks]
    known = [date for date in dates if date is not None]
    if not known or len(known) < len(blocks):
        return blocks[0] if blocks else []
    return blocks[dates.index(max(known))]


def _resendings(fields: list[Field]) -> list[list[Field]]:
    """Return all blocks.  A block has each of its fields once, and ends before any other field."""
    blocks: list[dict[str, Field]] = [{}]
    for entry in fields:
        is_resent = entry.name.startswith('resent-')
        if blocks[-1] and (not is_resent or entry.name in blocks[-1]):
            blocks.append({})
        if is_resent:
            blocks[-1][entry.name] = entry
    return [list(block.values()) for block in blocks if block]


def _resent_date(block: list[Field]) -> float | None:
    for entry in block:
        if entry.name == 'resent-date':
            date = parsedate_tz(entry.value.decode('ascii', 'replace'))
            with suppress(ValueError, OverflowError):
                return mktime_tz(date) if date else None
    return None


def _unwrap(
    message: Any, sender: str | None, recipients: Iterable[str] | str | None, default_sender: str | None
) -> tuple[Any, str, Iterable[str] | str]:
    """Return the message, the sender and the recipients of a ``Message`` of pyramid_mailer."""
    if recipients is None:
        # send_to is a set, and the order should be the same each time.
        named = [*(message.recipients or ()), *(message.cc or ()), *(message.bcc or ())]
        send_to = set(message.send_to)
        recipients = at_least_one([*filter(send_to.__contains__, named), *sorted(send_to.difference(named))])
    twin = copy.copy(message)
    twin.sender = message.sender or (sender if sender not in _NULL_SENDER else None) or default_sender
    if not twin.sender:
        raise _no_sender('From header')
    try:
        return twin.to_message(), twin.sender if sender is None else sender, recipients
    except Exception as exc:
        # Its own exceptions, which are not imported here, and whatever an attachment raises.
        raise MessageError(f'The message of pyramid_mailer cannot be used: {described(exc)}') from exc


def _host(local_hostname: str | None) -> str:
    if local_hostname and is_ehlo_argument(local_hostname):
        return local_hostname
    return domain_of_this_host() or 'localhost'


# --- what goes out ----------------------------------------------------------

_HIDDEN = frozenset({'bcc', 'resent-bcc'})
_REQUIRED = frozenset({'date', 'message-id'})


def _outgoing(fields: list[Field], body: memoryview, author: str | None, domain: str, now: datetime | None) -> bytes:
    # An empty one of these is as good as none, but must not stand beside a second one.
    completed = _REQUIRED | {'from'} if author else _REQUIRED
    kept = [entry for entry in fields if entry.name not in _HIDDEN and (entry.value or entry.name not in completed)]
    missing = _REQUIRED.difference(entry.name for entry in kept)
    lines = [entry.lines for entry in kept]
    if author and 'from' not in (entry.name for entry in kept):
        lines.append(field_bytes('From', author, utf8=needs_utf8('From', author)))
    if 'date' in missing:
        lines.append(f'Date: {format_datetime(now or datetime.now(timezone.utc))}\r\n'.encode('ascii'))
    if 'message-id' in missing:
        message_id = make_msgid(domain=domain)
        lines.append(f'Message-ID: {message_id}\r\n'.encode('ascii'))
    return joined([*lines, b'\r\n', body])
