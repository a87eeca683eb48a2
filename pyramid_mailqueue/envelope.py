"""
The envelope of a message: who sends it, whom it is for, and its content.

RFC 5321 section 2.3.1: the envelope is not the header.  :meth:`Envelope.from_message` reads one from the header where
nobody says otherwise; from then on the header has no say in it.
"""

from __future__ import annotations

import copy
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import format_datetime, make_msgid, mktime_tz, parsedate_tz
from functools import cached_property
from typing import Any

from pyramid_mailqueue.addresses import check_address, parse_header_addresses, parse_mailbox
from pyramid_mailqueue.content import Field, joined, message_bytes, normalize_line_ends, split_content
from pyramid_mailqueue.exceptions import AddressError, MessageError, MessageTooLarge, NoRecipients, TooManyRecipients

__all__ = ['MAX_RECIPIENTS_OCTETS', 'Envelope', 'message_id_of']

#: How many octets the recipients of a new message may have, with a comma between two.  The header of a queue file has
#: room for a little more.
MAX_RECIPIENTS_OCTETS = 1_000_000

_MESSAGE_ID = re.compile(
    rb'^message-id[ \t]*:(?:[ \t]|\r\n[ \t])*([^ \t\r\n][^\r\n]*(?:\r\n[ \t][^\r\n]*)*)',
    re.IGNORECASE | re.MULTILINE,
)
_ORDINARY_ID = re.compile(rb'<[^<>\s]+>')
_CONTROL = re.compile(r'[\x00-\x1f\x7f]')


@dataclass(frozen=True)
class Envelope:
    """
    Sender, recipients and content of one message, frozen.

    However it came to be, an envelope holds nothing that could break out of an SMTP command: its addresses have passed
    :func:`~.addresses.check_address`, and each line of its content ends in CRLF.

    :param sender: the reverse-path without angle brackets; ``''`` is the null sender (RFC 5321 section 4.5.5)
    :param recipients: at least one; who is there twice is kept once
    :param content: RFC 5322 bytes, not dot-stuffed
    :raises MessageError: or one of its subclasses, for anything that cannot be sent
    """

    sender: str
    recipients: tuple[str, ...]
    content: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.content, bytes):
            raise MessageError(f'The content of an envelope must be bytes, not {type(self.content).__name__}.')
        object.__setattr__(self, 'sender', check_address(self.sender) if self.sender != '' else '')
        object.__setattr__(self, 'recipients', _checked_recipients(self.recipients))
        object.__setattr__(self, 'content', normalize_line_ends(self.content))

    @classmethod
    def of_checked(cls, sender: str, recipients: tuple[str, ...], data: bytes, start: int) -> Envelope:
        """
        Return an envelope whose addresses have passed :func:`~.addresses.check_address` already, each only once.

        :param data: the content is in it, from *start* on; a large one is not copied more often than needed
        """
        envelope = object.__new__(cls)
        # The same fields as always, without asking the addresses again.
        envelope.__dict__.update(sender=sender, recipients=recipients, content=normalize_line_ends(data, start))
        return envelope

    @classmethod
    def from_message(
        cls,
        message: Any,
        sender: str | None = None,
        recipients: Iterable[str] | str | None = None,
        *,
        default_sender: str | None = None,
        max_size: int | None = None,
        local_hostname: str | None = None,
        now: datetime | None = None,
    ) -> Envelope:
        """
        Return the envelope of *message*.

        The content gets a ``Message-ID`` and a ``Date`` where it has none, and loses ``Bcc`` and ``Resent-Bcc``.

        :param message: an :class:`email.message.EmailMessage` or the older ``Message``, bytes, a binary file (read to
            its end), or a ``Message`` of pyramid_mailer; it is not changed
        :param sender: an address, also as ``Name <address>``; ``''`` or ``'<>'`` is the null sender.  By default the
            address in ``Sender``, else the first one in ``From``
        :param recipients: one address or several, also as ``Name <address>``.  By default all in ``To``, ``Cc`` and
            ``Bcc``.  For a message that was resent the defaults are taken from the ``Resent-`` fields of the latest
            resending (RFC 5322 section 3.6.6)
        :param default_sender: the sender where the message has none
        :param max_size: how many octets the content may have
        :param local_hostname: the domain of a new ``Message-ID`` where the sender has none
        :param now: the ``Date`` of a message without one; by default the present time
        :raises AddressError: the header or an argument cannot be read reliably, or there is no sender
        :raises NoRecipients: there is nobody to send to
        :raises TooManyRecipients: they have more than :data:`MAX_RECIPIENTS_OCTETS` octets
        :raises MessageTooLarge: the content has more than *max_size* octets
        :raises MessageError: *message* cannot be made into bytes
        """
        if hasattr(message, 'to_message') and hasattr(message, 'send_to'):
            message, sender, recipients = _unwrap(message, sender, recipients, default_sender)
        fields, body = split_content(message_bytes(message))
        envelope = object.__new__(cls)
        put = object.__setattr__
        put(envelope, 'sender', _find_sender(sender, fields, default_sender))
        put(envelope, 'recipients', _find_recipients(recipients, fields))
        # Not wherever an envelope is made: a queue file of another program may name a few more, and is sent.
        _check_fit(envelope.recipients)
        put(envelope, 'content', _outgoing(fields, body, envelope.sender, local_hostname, now))
        if max_size is not None and len(envelope.content) > max_size:
            raise MessageTooLarge(
                f'The message has {len(envelope.content)} octets; mailqueue.max_message_size allows {max_size}.'
            )
        return envelope

    @cached_property
    def message_id(self) -> str:
        """
        The ``Message-ID`` with its angle brackets; ``''`` if there is none.

        Where it is not one as in RFC 5322 section 3.6.4 it is told as it stands.  In any case it is one line of ASCII;
        other bytes are escaped.
        """
        return message_id_of(self.content)


def message_id_of(content: bytes) -> str:
    """Return the ``Message-ID`` in the header of *content*; see :attr:`Envelope.message_id`."""
    if content.startswith(b'\r\n'):
        return ''
    header_end = content.find(b'\r\n\r\n')
    match = _MESSAGE_ID.search(content, 0, header_end if header_end >= 0 else len(content))
    if not match:
        return ''
    value = match[1].replace(b'\r\n', b'').rstrip(b' \t')
    ordinary = _ORDINARY_ID.match(value)
    text = (ordinary[0] if ordinary else value).decode('ascii', 'backslashreplace')
    return _CONTROL.sub(lambda control: f'\\x{ord(control[0]):02x}', text)


def _checked_recipients(recipients: Iterable[str]) -> tuple[str, ...]:
    if isinstance(recipients, str):
        raise AddressError(f'The recipients of an envelope must be several, not the text {ascii(recipients[:100])}.')
    return _at_least_one(map(check_address, recipients))


# --- who sends it, and whom it is for ---------------------------------------

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


def _no_sender(what_it_needs: str) -> AddressError:
    return AddressError(
        f'The message has no sender: give it a {what_it_needs}, pass sender=, or set mailqueue.default_sender.'
    )


def _find_recipients(recipients: Iterable[str] | str | None, fields: list[Field]) -> tuple[str, ...]:
    if isinstance(recipients, str):
        recipients = [recipients]
    if recipients is not None:
        return _at_least_one(map(parse_mailbox, recipients))
    resending = _latest_resending(fields)
    names = ('resent-to', 'resent-cc', 'resent-bcc') if resending else ('to', 'cc', 'bcc')
    return _at_least_one(address for name in names for address in _addresses(resending or fields, name))


def _at_least_one(recipients: Iterable[str]) -> tuple[str, ...]:
    unique = tuple(dict.fromkeys(recipients))
    if not unique:
        raise NoRecipients('There is nobody to send the message to: give it a To, Cc or Bcc, or pass recipients=.')
    return unique


def _check_fit(recipients: tuple[str, ...]) -> None:
    octets = len(','.join(recipients).encode())
    if octets > MAX_RECIPIENTS_OCTETS:
        raise TooManyRecipients(
            f'The message has {len(recipients)} recipients with {octets} octets; one message can have '
            f'{MAX_RECIPIENTS_OCTETS}. Send it as several messages, each to some of them.'
        )


def _addresses(fields: list[Field], name: str) -> list[str]:
    return parse_header_addresses(
        entry.value.decode('utf-8', 'surrogateescape') for entry in fields if entry.name == name
    )


def _latest_resending(fields: list[Field]) -> list[Field]:
    """
    Return the block of ``Resent-`` fields of the latest resending; the empty list if there was none.

    That is the one with the latest ``Resent-Date``.  Where a block has none that can be read it is the topmost one: RFC
    5322 section 3.6.6 lets who resends a message put a block above those of others.
    """
    blocks = _resendings(fields)
    dates = [_resent_date(block) for block in blocks]
    known = [date for date in dates if date is not None]
    if not known or len(known) < len(blocks):
        return blocks[0] if blocks else []
    return blocks[dates.index(max(known))]


def _resendings(fields: list[Field]) -> list[list[Field]]:
    """A block has each of its fields once, and ends where any other field stands."""
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
        recipients = _at_least_one([*filter(send_to.__contains__, named), *sorted(send_to.difference(named))])
    twin = copy.copy(message)
    twin.sender = message.sender or (sender if sender not in _NULL_SENDER else None) or default_sender
    if not twin.sender:
        raise _no_sender('From header')
    try:
        return twin.to_message(), twin.sender if sender is None else sender, recipients
    except Exception as exc:
        # Its own exceptions, which are not imported here, and whatever an attachment raises.
        raise MessageError(f'The message of pyramid_mailer cannot be used: {type(exc).__name__}: {exc}') from exc


# --- what goes out ----------------------------------------------------------

_HIDDEN = frozenset({'bcc', 'resent-bcc'})
_REQUIRED = frozenset({'date', 'message-id'})


def _outgoing(
    fields: list[Field], body: memoryview, sender: str, local_hostname: str | None, now: datetime | None
) -> bytes:
    # An empty Date or Message-ID is as good as none, but must not stand beside a second one.
    kept = [entry for entry in fields if entry.name not in _HIDDEN and (entry.value or entry.name not in _REQUIRED)]
    missing = _REQUIRED.difference(entry.name for entry in kept)
    lines = [entry.lines for entry in kept]
    if 'date' in missing:
        lines.append(f'Date: {format_datetime(now or datetime.now(timezone.utc))}\r\n'.encode('ascii'))
    if 'message-id' in missing:
        domain = sender.rpartition('@')[2] or local_hostname or socket.getfqdn()
        lines.append(f'Message-ID: {make_msgid(domain=domain)}\r\n'.encode('ascii'))
    return joined([*lines, b'\r\n', body])
