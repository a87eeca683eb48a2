"""The mail of one transaction while it is in memory only: a base class for stagings."""

from __future__ import annotations

from pyramid_mailqueue.message.envelope import Envelope

__all__ = ['StagedMail']


class StagedMail:
    """The part of `IStaging` that touches no queue yet."""

    def __init__(self) -> None:
        self._added: list[tuple[Envelope, bool]] = []

    def add(self, envelope: Envelope, claimed: bool) -> None:
        """See `IStaging`."""
        self._added.append((envelope, claimed))

    def mark(self) -> int:
        """See `IStaging`.  The mark is the number of messages."""
        return len(self._added)

    def rollback(self, mark: object) -> list[Envelope]:
        """See `IStaging`."""
        assert isinstance(mark, int)
        dropped = [envelope for envelope, _ in self._added[mark:]]
        del self._added[mark:]
        return dropped
