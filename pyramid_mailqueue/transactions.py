"""
Which transaction does mail join here?  And will anybody commit it?

The second question is the reason for this module.  A manager that is not explicit begins a transaction for whoever
asks for one, even after the request's own has ended: mail that joins it is lost without a word.  So for a request it
is not enough that there is a transaction; somebody must have taken it upon himself to commit it:

* ``tm.active`` or ``repoze.tm.active`` is in the environ, or
* the manager is explicit, so that there is no transaction unless somebody began it, or
* the transaction carries our mark.  It is set when the request begins, for pyramid_tm takes ``tm.active`` away before
  it commits, and mail may still come from a before-commit hook.

And pyramid_tm must not have decided already that it will not: it aborts after an exception view, unless a commit veto
is there to look at the response.

Without a request (scripts, other frameworks) there is nobody to ask: the manager's transaction is taken as it is.
"""

from __future__ import annotations

from typing import Any, Protocol

import transaction
from transaction.interfaces import NoTransaction

from pyramid_mailqueue.exceptions import NoActiveTransaction

__all__ = ['ITransactionSource', 'ManagerTransaction', 'RequestTransaction', 'ThreadTransaction', 'mark_transaction']

_INSTEAD = (
    'Call send_immediately(), which tries to deliver now and queues the message if that fails, or enqueue(), which '
    'leaves it to mq-run.'
)
_NOBODY_COMMITS = (
    'send() needs an active transaction, and there is none here: nobody would commit it, and the mail would be lost. '
    f'{_INSTEAD} In a Pyramid app check that pyramid_tm is included and active for this request; if you begin '
    'transactions yourself, use an explicit manager (tm.manager_hook = pyramid_tm.explicit_manager).'
)
_WILL_ABORT = (
    'send() needs a transaction that is going to be committed, and this one is not: after an exception view pyramid_tm '
    f'aborts it, because there is no tm.commit_veto to look at the response. {_INSTEAD}'
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
            raise NoActiveTransaction(_NOBODY_COMMITS) from None


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
        environ = self._request.environ
        if environ.get('tm.active') and self._is_given_up():
            raise NoActiveTransaction(_WILL_ABORT)
        if not (environ.get('tm.active') or environ.get('repoze.tm.active') or manager.explicit or _is_marked(txn)):
            raise NoActiveTransaction(_NOBODY_COMMITS)
        return txn

    def _is_given_up(self) -> bool:
        """Whether pyramid_tm will abort because an exception view has answered, or is about to."""
        settings = self._request.registry.settings
        veto = settings.get('tm.commit_veto', settings.get('pyramid_tm.commit_veto'))
        return not veto and getattr(self._request, 'exc_info', None) is not None


class ThreadTransaction:
    """
    The transaction of the Pyramid request that this thread works on, for those who have no request at hand.

    Without a request it is the thread's, ``transaction.manager``.
    """

    @property
    def manager(self) -> Any:
        """The transaction manager."""
        return self._source().manager

    def current(self) -> Any:
        """Return the transaction that somebody will commit.  Raises NoActiveTransaction."""
        return self._source().current()

    def _source(self) -> ITransactionSource:
        # Whoever uses this has Pyramid; who uses this module may not.
        from pyramid.threadlocal import get_current_request

        request = get_current_request()
        return ManagerTransaction() if request is None else RequestTransaction(request)


class _Mark:
    """Transactions keep data by the identity of an object; this one is ours."""


_MARK = _Mark()


def mark_transaction(event: Any) -> None:
    """At the begin of a request: remember of its transaction that it will be committed."""
    request = event.request
    if 'tm.active' not in request.environ:
        return
    manager = RequestTransaction(request).manager
    # An explicit one needs no mark; and a tween may have ended its transaction already, for reasons of its own.
    if not manager.explicit:
        manager.get().set_data(_MARK, _MARK)


def _is_marked(txn: Any) -> bool:
    try:
        txn.data(_MARK)
    except KeyError:
        return False
    return True
