"""
Which transaction does the mail of a Pyramid request join?  And will it be committed?

The second question is the reason for this module.  A manager that is not explicit begins a transaction whenever it is
asked for one, even after the request's own has ended: mail that joins it is lost without a word.  So for a request that
is being served it is not enough that there is a transaction; it must have been begun on purpose:

* ``tm.active`` or ``repoze.tm.active`` is in the environ, or
* the transaction carries our mark, put there for this request or for one around it.  The mark is set when the request
  begins, because pyramid_tm removes ``tm.active`` before it commits, and mail may still come from a before-commit hook;
  and by each ``begin()`` while the request is served: managers tell their synchronizers of that, but not of a
  transaction that ``get()`` has made; or
* the manager is explicit, so that there is no transaction unless it was begun.

And it must not be certain already that it will not be committed:

* After an exception view pyramid_tm aborts, unless a commit veto sees the response and lets it pass.  The verdict is
  not known yet, so mail is refused in either case.
* If a before-commit hook fails, pyramid_tm calls an exception view and leaves the transaction behind, which looks as if
  it were still active.  The mark shows the difference: it is a before-commit hook itself, and a commit uses up its
  hooks.
* A transaction that another request began and left behind in this thread has the mark of that one.

Elsewhere nothing can be checked: in scripts (with a request of ``bootstrap()``, ``prepare()`` or pshell, too) and under
other frameworks.  There code begins and commits as it likes, often with no more than a ``commit()`` at the end, so the
manager's transaction is taken as it is.  The data manager logs mail whose transaction was never ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from threading import get_ident
from typing import Any

import transaction
from pyramid.threadlocal import get_current_request, manager
from transaction.interfaces import NoTransaction

from pyramid_mailqueue.exceptions import NoActiveTransaction
from pyramid_mailqueue.transactions import INSTEAD, NOT_BEGUN, ITransactionSource, ManagerTransaction, current_of

__all__ = ['RequestTransaction', 'ThreadTransaction', 'watch_request']

_NOBODY_COMMITS = (
    'send() needs a transaction that is going to be committed, and there is none here, or no longer: the mail would '
    f'be lost. {INSTEAD} In a Pyramid app pyramid_tm has to be included, and active for this request. Where it is '
    'not, write "with request.tm:" (without pyramid_tm "with transaction.manager:") around send(); in a tween this '
    'needs an explicit manager (tm.manager_hook = pyramid_tm.explicit_manager).'
)
_WILL_ABORT = (
    'send() needs a transaction that is going to be committed, and in an exception view that is not certain: '
    f'pyramid_tm usually aborts it. {INSTEAD}'
)


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
        """Return the transaction that will be committed.  Raises NoActiveTransaction."""
        environ = self._request.environ
        is_served = self._is_served()
        txn = current_of(self.manager, _NOBODY_COMMITS if is_served else NOT_BEGUN)
        if environ.get('tm.active'):
            if self._is_given_up():
                raise NoActiveTransaction(_WILL_ABORT)
            # The view may have begun another one since.
            _mark(txn, _service_of(self._request))
        elif is_served and not (environ.get('repoze.tm.active') or self._will_be_committed(txn)):
            raise NoActiveTransaction(_NOBODY_COMMITS)
        return txn

    def of_request(self, name: str) -> Any:
        """See `ITransactionSource`."""
        return getattr(self._request, name, None)

    def _is_given_up(self) -> bool:
        """Whether an exception view has answered, or is about to."""
        return getattr(self._request, 'exc_info', None) is not None

    def _is_served(self) -> bool:
        """Whether this thread serves a request that came through Pyramid's router: this one, or one around it."""
        service = _service_of(self._request)
        is_elsewhere = service is not None and service.thread != get_ident()
        requests = _requests_in_hand() if is_elsewhere else [self._request, *_requests_in_hand()]
        return any(hasattr(request, 'invoke_subrequest') for request in requests)

    def _will_be_committed(self, txn: Any) -> bool:
        try:
            service = txn.data(_MARK)
        except KeyError:
            return bool(self.manager.explicit)
        in_hand = _requests_in_hand()
        if service is None:
            # The iterator of a response body runs when its request is not in hand any more.
            return _has_hook(txn) and not in_hand
        return _has_hook(txn) and any(_service_of(request) is service for request in [self._request, *in_hand])


class ThreadTransaction:
    """
    The transaction of the Pyramid request that this thread works on, for code that has no request at hand.

    Without a request it is the thread's, ``transaction.manager``.
    """

    @property
    def manager(self) -> Any:
        """The transaction manager."""
        return self._source().manager

    def current(self) -> Any:
        """Return the transaction that will be committed.  Raises NoActiveTransaction."""
        return self._source().current()

    def of_request(self, name: str) -> Any:
        """See `ITransactionSource`."""
        return self._source().of_request(name)

    def _source(self) -> ITransactionSource:
        request = get_current_request()
        return ManagerTransaction() if request is None else RequestTransaction(request)


def watch_request(event: Any) -> None:
    """At the start of a request: mark the transaction that pyramid_tm will commit, and watch for others that begin."""
    request, environ = event.request, event.request.environ
    around = _services([other for other in _requests_in_hand() if other is not request])
    if not around:
        # Registering reports a transaction that has begun already; it is not marked, because no request is served yet.
        environ.pop(_SERVICE, None)
        transaction.manager.registerSynch(_MARK)
    # An application in an application has the same environ, or a copy of it.
    if environ.get(_SERVICE) not in around:
        environ[_SERVICE] = _Service()
    if 'tm.active' in environ:
        its_manager = RequestTransaction(request).manager
        its_manager.registerSynch(_MARK)
        # An explicit manager has none if a tween has ended it.
        with suppress(NoTransaction):
            _mark(its_manager.get(), _service_of(request))


class _Service:
    """The service of a request, and its thread; marks are recognised by the identity of this object."""

    def __init__(self) -> None:
        self.thread = get_ident()


#: The key of the environ for the service of a request.
_SERVICE = 'pyramid_mailqueue.service'


class _Mark:
    """
    Added to a transaction twice: as data, which it keeps, and as a before-commit hook, which a commit uses up.

    As a synchronizer (see `transaction.interfaces.ISynchronizer`) it adds itself where a transaction is begun.
    """

    def __call__(self) -> None:
        """Do nothing: its presence is the mark."""

    def newTransaction(self, txn: Any) -> None:
        """Called by ``begin()``, but not by the ``get()`` of a manager that is not explicit."""
        requests = _requests_in_hand()
        services = _services(requests)
        if services or not requests:
            _mark(txn, services[-1] if services else None)

    def beforeCompletion(self, txn: Any) -> None:
        """Do nothing."""

    def afterCompletion(self, txn: Any) -> None:
        """Do nothing."""


_MARK = _Mark()


def _mark(txn: Any, service: _Service | None) -> None:
    txn.set_data(_MARK, service)
    if not _has_hook(txn):
        txn.addBeforeCommitHook(_MARK)


def _service_of(request: Any) -> _Service | None:
    # Tests of an application may use any object as a request.
    service: _Service | None = getattr(request, 'environ', {}).get(_SERVICE)
    return service


def _services(requests: Sequence[Any]) -> list[_Service]:
    return [service for service in map(_service_of, requests) if service is not None]


def _has_hook(txn: Any) -> bool:
    return any(hook is _MARK for hook, _, _ in txn.getBeforeCommitHooks())


def _requests_in_hand() -> list[Any]:
    """Return the requests that this thread works on, the innermost last."""
    return [known['request'] for known in manager.stack if known.get('request') is not None]
