"""The envelope of a message."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Envelope:
    """Sender, recipients and content of one message, frozen."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes
