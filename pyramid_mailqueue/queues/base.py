"""What a queue and a claim are if they say nothing else: the members of the contracts that most of them do not need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.interfaces import IMailQueue, IQueueAdmin

__all__ = ['Claim', 'MailQueue', 'completed', 'has_admin']


class MailQueue:
    """A base class for queues; see `IMailQueue`.  What is not here each queue has to have of its own."""

    @property
    def admin(self) -> IQueueAdmin:
        """See `IMailQueue`."""
        raise ConfigurationError('This queue has no "admin" (see IQueueAdmin): nobody can see or change what is in it.')

    def counts(self) -> Mapping[str, int]:
        """See `IMailQueue`."""
        raise NotImplementedError

    def count_waiting(self, most: int) -> int:
        """See `IMailQueue`.  Counted with all others."""
        return self.counts().get('waiting', 0)

    def count_misdated(self) -> int:
        """See `IMailQueue`."""
        return 0

    def listening(self, on_news: Callable[[], None]) -> AbstractContextManager[object]:
        """See `IMailQueue`.  There is no news: who waits for mail looks from time to time."""
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


def has_admin(queue: IMailQueue) -> bool:
    """Whether a person can see or change what is in *queue*."""
    try:
        return bool(queue.admin)
    except ConfigurationError:
        return False


def completed(queue: Any) -> IMailQueue:
    """Return *queue*, an object of an application, with what it lacks of :class:`MailQueue`."""
    whole: Any = queue if isinstance(queue, MailQueue) else _Completed(queue)
    found: IMailQueue = whole
    return found


class _Completed:
    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._queue, name):
            return getattr(self._queue, name)
        return getattr(MailQueue, name).__get__(self)
