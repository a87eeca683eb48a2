"""
Which transaction does mail join?  That of a manager; for a request see :mod:`~.requests`.

Outside of a request that is being served nothing can be checked: in scripts and under other frameworks code begins and
commits as it likes, often with no more than a ``commit()`` at the end, so the manager's transaction is taken as it is.
The data manager logs mail whose transaction was never ended.
"""

from __future__ import annotations

from typing import Any, Protocol

import transaction
from transaction.interfaces import NoTransaction

from pyramid_mailqueue.exceptions import NoActiveTransaction

__all__ = ['INSTEAD', 'NOT_BEGUN', 'ITransactionSource', 'ManagerTransaction', 'current_of']

INSTEAD = (
    'Call send_immediately(), which tries to deliver now and queues the message if that fails, or enqueue(), which '
    'leaves it to mq-run.'
)
NOT_BEGUN = (
    'send() needs a transaction, and its manager has none: it is explicit, and begin() was not called. Write "with '
    f'manager:" around send(), for request.mailer "with request.tm:". Or use what needs no transaction. {INSTEAD}'
)


class ITransactionSource(Protocol):
    """Finds the current transaction."""

    @property
    def manager(self) -> Any:
        """The transaction manager."""

    def current(self) -> Any:
        """Return the transaction that will be committed.  Raises NoActiveTransaction."""

    def of_request(self, name: str) -> Any:
        """Return an attribute of the request of the transaction; None without a request, or without the attribute."""


class ManagerTransaction:
    """
    The transaction of a manager.

    :param manager: None is the manager of the thread, ``transaction.manager``
    """

    def __init__(self, manager: Any = None) -> None:
        self.manager = transaction.manager if manager is None else manager

    def current(self) -> Any:
        """Return the transaction of the manager.  Raises NoActiveTransaction if it is explicit and has none."""
        return current_of(self.manager, NOT_BEGUN)

    def of_request(self, name: str) -> None:
        """See `ITransactionSource`."""


def current_of(manager: Any, otherwise: str) -> Any:
    """Return the transaction of *manager*.  Raises NoActiveTransaction if it is explicit and has none."""
    try:
        return manager.get()
    except NoTransaction:
        raise NoActiveTransaction(otherwise) from None
