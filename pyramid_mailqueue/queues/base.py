"""Base classes for queues and claims, with defaults for the members of the contracts that most of them do not need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.interfaces import IClaim, IMailQueue, IQueueAdmin
from pyramid_mailqueue.message.envelope import Envelope

__all__ = ['Claim', 'MailQueue', 'WrappedClaim', 'completed', 'has_admin']


class MailQueue:
    """A base class for queues; see `IMailQueue`.  Each queue has to implement what is missing here."""

    @property
    def admin(self) -> IQueueAdmin:
        """See `IMailQueue`."""
        raise ConfigurationError('This queue has no "admin" (see IQueueAdmin): its messages cannot be read or changed.')

    def counts(self) -> Mapping[str, int]:
        """See `IMailQueue`."""
        raise NotImplementedError

    def count_waiting(self, most: int) -> int:
        """See `IMailQueue`.  Taken from :meth:`counts`."""
        return self.counts().get('waiting', 0)

    def count_misdated(self) -> int:
        """See `IMailQueue`."""
        return 0

    def listening(self, on_news: Callable[[], None]) -> AbstractContextManager[object]:
        """See `IMailQueue`.  There is no news: a waiting run polls."""
        return nullcontext()

    def hurry(self, seconds: float) -> None:
        """See `IMailQueue`.  Nothing takes long."""

    def close(self) -> None:
        """See `IMailQueue`.  There are no connections."""


class Claim:
    """A base class for claims; see `IClaim`."""

    @property
    def queue(self) -> IMailQueue | None:
        """See `IClaim`."""
        return None

    @property
    def deaths(self) -> int:
        """See `IClaim`."""
        return 0

    @property
    def is_over(self) -> bool:
        """See `IClaim`."""
        return False

    def is_valid(self) -> bool:
        """See `IClaim`."""
        return True


class WrappedClaim(Claim):
    """A base class for claims that stand for another one; each says how it ends."""

    def __init__(self, claim: IClaim) -> None:
        self._claim = claim
        self.id: str = claim.id

    @property
    def deaths(self) -> int:
        """See `IClaim`."""
        return self._claim.deaths

    def is_valid(self) -> bool:
        """See `IClaim`."""
        return self._claim.is_valid()

    @property
    def attempts(self) -> int:
        """See `IClaim`."""
        return self._claim.attempts

    @property
    def queued_at(self) -> float:
        """See `IClaim`."""
        return self._claim.queued_at

    @property
    def recipients(self) -> tuple[str, ...]:
        """See `IClaim`."""
        return self._claim.recipients

    @property
    def envelope(self) -> Envelope:
        """See `IClaim`."""
        return self._claim.envelope

    def begin(self) -> bool:
        """See `IClaim`."""
        return self._claim.begin()

    def keep(self, recipients: tuple[str, ...]) -> None:
        """See `IClaim`."""
        self._claim.keep(recipients)


def has_admin(queue: IMailQueue) -> bool:
    """Whether the messages of *queue* can be seen and changed."""
    try:
        return bool(queue.admin)
    except (AttributeError, ConfigurationError):
        # The former: an object of an application, which has none.
        return False


def completed(queue: Any) -> IMailQueue:
    """Return *queue*, an object of an application, with the methods of :class:`MailQueue` that it lacks."""
    for name in ('close', 'count_misdated', 'count_waiting', 'hurry', 'listening'):
        if not hasattr(queue, name):
            setattr(queue, name, getattr(MailQueue, name).__get__(queue))
    whole: IMailQueue = queue
    return whole
