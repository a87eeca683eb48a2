"""
Which transaction does mail join here?  And will anybody commit it?

The second question is the reason for this module.  A manager that is not explicit begins a transaction for whoever
asks for one, even after the request's own has ended: mail that joins it is lost without a word.  So for a request that
is being served it is not enough that there is a transaction; somebody must have begun it on purpose:

* ``tm.active`` or ``repoze.tm.active`` is in the environ, or
* the transaction carries our mark, put there for this request or for one around it.  It gets it when the request
  begins, for pyramid_tm takes ``tm.active`` away before it commits, and mail may still come from a before-commit hook;
  and when anybody calls ``begin()`` while the request is served: managers tell their synchronizers of that, but not of
  a transaction that ``get()`` has made; or
* the manager is explicit, so that there is no transaction unless somebody began it.

And nobody must have decided already that it will not be committed:

* After an exception view pyramid_tm aborts, unless a commit veto looks at the response and lets it pass.  What it will
  say nobody knows yet, so mail is refused in either case.
* If a before-commit hook fails, pyramid_tm calls an exception view and leaves the transaction behind, which looks as if
  it were still active.  Its mark tells: it is a before-commit hook itself, and a commit uses up its hooks.
* A transaction that another request began and left behind in this thread has the mark of that one.

Elsewhere there is nobody to ask: in scripts (with a request of ``bootstrap()``, ``prepare()`` or pshell, too) and under
other frameworks.  There code begins and commits as it likes, often with no more than a ``commit()`` at the end, so the
manager's transaction is taken as it is.  The data manager tells of mail whose transaction was never ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import transaction
from transaction.interfaces import NoTransaction

from pyramid_mailqueue.exceptions import NoActiveTransaction

__all__ = ['ITransactionSource', 'ManagerTransaction', 'RequestTransaction', 'ThreadTransaction', 'watch_request']

_INSTEAD = (
    'Call send_immediately(), which tries to deliver now and queues the message if that fails, or enqueue(), which '
    'leaves it to mq-run.'
)
_NOT_BEGUN = (
    'send() needs a transaction, and nobody has begun one: this transaction manager is explicit. Write '
    f'"with manager:" around it ("with request.tm:" for request.mailer). {_INSTEAD}'
)
_NOBODY_COMMITS = (
    'send() needs a transaction that somebody is going to commit, and there is none here, or no more: the mail would '
    f'be lost. {_INSTEAD} In a Pyramid app pyramid_tm has to be included, and active for this request; where it is not, '
    'write "with request.tm:" (without pyramid_tm "with transaction.manager:") around send().'
)
_WILL_ABORT = (
    'send() needs a transaction that is going to be committed, and in an exception view nobody can count on that: '
    f'pyramid_tm usually aborts it. {_INSTEAD}'
)


class ITransactionSource(Protocol):
    """Whoever knows the current transaction."""

    @property
    def manager(self) -> Any:
        """The transaction manager."""

    def current(self) -> Any:
        """Return the transaction that somebody will commit.  Raises NoActiveTransaction."""

    def of_request(self, name: str) -> Any:
        """Return an attribute of the request whose transaction that is; None if there is no request, or none of it."""


class ManagerTransaction:
    """
    The transaction of a manager.

    :param manager: None is the manager of the thread, ``transaction.manager``
    """

    def __init__(self, manager: Any = None) -> None:
        self.manager = transaction.manager if manager is None else manager

    def current(self) -> Any:
        """Return the transaction of the manager.  Raises NoActiveTransaction if it is explicit and has none."""
        return _get(self.manager, _NOT_BEGUN)

    def of_request(self, name: str) -> None:
        """See `ITransactionSource`."""


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
        environ = self._request.environ
        requests = [self._request, *_requests_in_hand()]
        is_served = any(hasattr(request, _BY_ROUTER) for request in requests)
        txn = _get(self.manager, _NOBODY_COMMITS if is_served else _NOT_BEGUN)
        if environ.get('tm.active'):
            if self._is_given_up():
                raise NoActiveTransaction(_WILL_ABORT)
            # The view may have begun another one than that of the beginning.
            _mark(txn, self._request)
        elif is_served and not (environ.get('repoze.tm.active') or _will_be_committed(txn, self.manager, requests)):
            raise NoActiveTransaction(_NOBODY_COMMITS)
        return txn

    def of_request(self, name: str) -> Any:
        """See `ITransactionSource`."""
        return getattr(self._request, name, None)

    def _is_given_up(self) -> bool:
        """Whether an exception view has answered, or is about to."""
        return getattr(self._request, 'exc_info', None) is not None


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

    def of_request(self, name: str) -> Any:
        """See `ITransactionSource`."""
        return self._source().of_request(name)

    def _source(self) -> ITransactionSource:
        # Whoever uses this has Pyramid; who uses this module may not.
        from pyramid.threadlocal import get_current_request

        request = get_current_request()
        return ManagerTransaction() if request is None else RequestTransaction(request)


def watch_request(event: Any) -> None:
    """At the begin of a request: remember which transaction pyramid_tm will commit, and watch for others that begin."""
    request = event.request
    # Before the request has its token: what is there already was begun by somebody else, or by nobody.
    transaction.manager.registerSynch(_MARK)
    request.environ[_TOKEN] = object()
    if 'tm.active' in request.environ:
        manager = RequestTransaction(request).manager
        manager.registerSynch(_MARK)
        # An explicit manager has none if a tween has ended it, for reasons of its own.
        with suppress(NoTransaction):
            _mark(manager.get(), request)


#: What a request has that comes from Pyramid's router: it is served, and no script's.
_BY_ROUTER = 'invoke_subrequest'

#: The key of the environ for what the marks of a request are known by.
_TOKEN = 'pyramid_mailqueue.token'


class _Mark:
    """
    Added to a transaction twice: as data, which it keeps, and as a before-commit hook, which a commit uses up.

    As a synchronizer (see `transaction.interfaces.ISynchronizer`) it adds itself where a transaction is begun.
    """

    def __call__(self) -> None:
        """Do nothing: to be there is all."""

    def newTransaction(self, txn: Any) -> None:
        """Called by ``begin()``, but not by the ``get()`` of a manager that is not explicit."""
        for request in _requests_in_hand()[-1:]:
            if _token_of(request) is not None:
                _mark(txn, request)

    def beforeCompletion(self, txn: Any) -> None:
        """Do nothing."""

    def afterCompletion(self, txn: Any) -> None:
        """Do nothing."""


_MARK = _Mark()


def _mark(txn: Any, request: Any) -> None:
    txn.set_data(_MARK, _token_of(request))
    if not _has_hook(txn):
        txn.addBeforeCommitHook(_MARK)


def _token_of(request: Any) -> object:
    # Tests of an application put whatever they like in the place of a request.
    return getattr(request, 'environ', {}).get(_TOKEN)


def _has_hook(txn: Any) -> bool:
    return any(hook is _MARK for hook, _, _ in txn.getBeforeCommitHooks())


def _will_be_committed(txn: Any, manager: Any, requests: Sequence[Any]) -> bool:
    try:
        token = txn.data(_MARK)
    except KeyError:
        return bool(manager.explicit)
    return _has_hook(txn) and any(_token_of(request) is token for request in requests)


def _get(manager: Any, otherwise: str) -> Any:
    """Return the transaction of *manager*.  Raises NoActiveTransaction if it is explicit and has none."""
    try:
        return manager.get()
    except NoTransaction:
        raise NoActiveTransaction(otherwise) from None


def _requests_in_hand() -> list[Any]:
    """Return the requests that this thread works on, the innermost last; who asks for them has Pyramid."""
    from pyramid.threadlocal import manager

    return [known['request'] for known in manager.stack if known['request'] is not None]
