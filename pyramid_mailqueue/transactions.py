"""
Which transaction does mail join here?  And will anybody commit it?

The second question is the reason for this module.  A manager that is not explicit begins a transaction for whoever
asks for one, even after the request's own has ended: mail that joins it is lost without a word.  So for a request it
is not enough that there is a transaction; somebody must have taken it upon himself to commit it:

* ``tm.active`` or ``repoze.tm.active`` is in the environ, or
* the manager is explicit, so that there is no transaction unless somebody began it, or
* the transaction carries our mark.  It is set when the request begins, for pyramid_tm takes ``tm.active`` away before
  it commits, and mail may still come from a before-commit hook.

Without a request (scripts, other frameworks) there is nobody to ask: the manager's transaction is taken as it is.
"""

from __future__ import annotations

from typing import Any, Protocol

import transaction
from transaction.interfaces import NoTransaction

from pyramid_mailqueue.exceptions import NoActiveTransaction

__all__ = ['ITransactionSource', 'ManagerTransaction', 'RequestTransaction', 'mark_transaction']

_TEXT = (
    'send() needs an active transaction, and there is none here: nobody would commit it, and the mail would be lost. '
    'Call send_immediately(), which tries to deliver now and queues the message if that fails, or enqueue(), which '
    'leaves it to mq-run. In a Pyramid app check that pyramid_tm is included.'
)


class ITransactionSource(Protocol):
    """Whoever knows the current transaction."""

    @property
    def manager(self) -> Any:
        """The transaction manager."""

    def current(self) -> Any:
        """Return the transaction that somebody will commit.  Raises NoActiveTransaction."""


class ManagerTransaction:
    """
    The transaction of a manager.

    :param manager: None is the manager of the thread, ``transaction.manager``
    """

    def __init__(self, manager: Any = None) -> None:
        self.manager = transaction.manager if manager is None else manager

    def current(self) -> Any:
        """Return the transaction of the manager.  Raises NoActiveTransaction if it is explicit and has none."""
        try:
            return self.manager.get()
        except NoTransaction:
            raise NoActiveTransaction(_TEXT) from None


class RequestTransaction:
    """The transaction of a request, managed by pyramid_tm, by repoze.tm2, or by the application itself."""

    def __init__(self, request: Any) -> None:
        self._request = request

    @property
    def manager(self) -> Any:
        """The transaction manager; repoze.tm2 always uses the one of the thread."""
        if 'repoze.tm.active' in self._request.environ:
            return transaction.manager
        return getattr(self._request, 'tm', transaction.manager)

    def current(self) -> Any:
        """Return the transaction that somebody will commit.  Raises NoActiveTransaction."""
        manager = self.manager
        txn = ManagerTransaction(manager).current()
        if not (self._is_managed() or manager.explicit or _is_marked(txn)):
            raise NoActiveTransaction(_TEXT)
        return txn

    def _is_managed(self) -> bool:
        environ = self._request.environ
        return bool(environ.get('tm.active') or environ.get('repoze.tm.active'))


class _Mark:
    """Transactions keep data by the identity of an object; this one is ours."""


_MARK = _Mark()


def mark_transaction(event: Any) -> None:
    """At the begin of a request: remember of its transaction that it will be committed."""
    request = event.request
    if 'tm.active' in request.environ:
        request.tm.get().set_data(_MARK, _MARK)


def _is_marked(txn: Any) -> bool:
    try:
        txn.data(_MARK)
    except KeyError:
        return False
    return True
