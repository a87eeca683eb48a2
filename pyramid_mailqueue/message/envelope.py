"""
The envelope of a message: its sender, its recipients and its content.

RFC 5321 section 2.3.1: the envelope is not the header.  :meth:`Envelope.from_message` reads it from the header by
default (see :mod:`~.outgoing`); from then on the header has no influence on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pyramid_mailqueue.exceptions import AddressError, MessageError, MessageTooLarge, TooManyRecipients
from pyramid_mailqueue.message.addresses import at_least_one, check_address
from pyramid_mailqueue.message.line_ends import normalize_line_ends

if TYPE_CHECKING:
    from datetime import datetime

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

    An envelope never holds anything that could break out of an SMTP command: its addresses have passed
    :func:`~.addresses.check_address`, and each line of its content ends in CRLF.

    :param sender: the reverse-path without angle brackets; ``''`` is the null sender (RFC 5321 section 4.5.5)
    :param recipients: at least one; duplicates are dropped
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
        # The same fields as always, without checking the addresses again.
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
        :raises NoRecipients: there are no recipients
        :raises TooManyRecipients: they have more than :data:`MAX_RECIPIENTS_OCTETS` octets
        :raises MessageTooLarge: the content has more than *max_size* octets
        :raises MessageError: *message* cannot be made into bytes
        """
        # Delivery does not need it, nor the half of the email package that comes with it.
        from pyramid_mailqueue.message.outgoing import read_message

        parts = read_message(message, sender, recipients, default_sender, local_hostname, now)
        # Not checked for every envelope: a queue file of another program may name a few more, and is sent.
        _check_fit(parts.recipients)
        envelope = object.__new__(cls)
        # The same fields as always, without checking the addresses again.
        envelope.__dict__.update(parts._asdict())
        if max_size is not None and len(envelope.content) > max_size:
            raise MessageTooLarge(
                f'The message has {len(envelope.content)} octets; mailqueue.max_message_size allows {max_size}.'
            )
        return envelope

    @cached_property
    def message_id(self) -> str:
        """
        The ``Message-ID`` with its angle brackets; ``''`` if there is none.

        If it is not one by RFC 5322 section 3.6.4, it is returned as it stands.  In any case it is one line of ASCII;
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
    return at_least_one(map(check_address, recipients))


def _check_fit(recipients: tuple[str, ...]) -> None:
    octets = len(','.join(recipients).encode())
    if octets > MAX_RECIPIENTS_OCTETS:
        raise TooManyRecipients(
            f'The message has {len(recipients)} recipients with {octets} octets; one message can have '
            f'{MAX_RECIPIENTS_OCTETS}. Send it as several messages, each to some of them.'
        )
