"""The envelope of a message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from pyramid_mailqueue.addresses import check_address
from pyramid_mailqueue.exceptions import MessageError, NoRecipients

__all__ = ['Envelope']


@dataclass(frozen=True)
class Envelope:
    """Sender, recipients and content of one message, frozen."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes

    def __post_init__(self) -> None:
        if self.sender:
            object.__setattr__(self, 'sender', check_address(self.sender))
        object.__setattr__(self, 'recipients', _check_recipients(self.recipients))
        if not isinstance(self.content, bytes):
            raise MessageError(f'The content of an envelope must be bytes, not {type(self.content).__name__}.')

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
        """Build the envelope of *message*."""
        raise NotImplementedError

    def with_recipients(self, recipients: Iterable[str]) -> Envelope:
        """Return an envelope of the same content for other *recipients*."""
        return Envelope(self.sender, tuple(recipients), self.content)

    @cached_property
    def message_id(self) -> str:
        """The Message-ID with its angle brackets; ``''`` if there is none."""
        raise NotImplementedError


def _check_recipients(recipients: Iterable[str] | str) -> tuple[str, ...]:
    if isinstance(recipients, str):
        recipients = (recipients,)
    checked = tuple(dict.fromkeys(map(check_address, recipients)))
    if not checked:
        raise NoRecipients('The message has no recipients.')
    return checked
