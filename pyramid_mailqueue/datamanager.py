"""
The mail of one transaction, as the ``transaction`` package sees it.

The order of a commit, and what happens to the mail::

    before-commit hooks      mail may still be added
    tpc_begin, commit        from here on it may not
    tpc_vote                 staging.prepare: on disk, invisible; a QueueError is our "no", and everything rolls back
    tpc_finish               staging.publish: real
    after-commit hooks       the claims go to their dispatchers

The traps, each of which has a test:

* ``abort`` is called again *after a successful commit*, on every resource, whenever any after-commit hook exists; and
  both ``abort`` and ``tpc_abort`` may follow a failed commit.  So both only ever discard what is not yet published.
* When a savepoint older than our joining is rolled back, the transaction aborts *and forgets* us.  ``abort`` therefore
  leaves this manager ready to join again.
* Another manager may fail in its ``tpc_finish`` before ours is called.  All have voted yes by then, and a database may
  have committed: the mail is no longer dropped, but stays prepared, in doubt.  ``abort`` and ``tpc_abort`` cannot
  detect that; a resource that finishes before all others reports it (:class:`_FirstToFinish`).
* After-commit hooks run with ``False`` after a failed commit.  Mail can have been published nevertheless, if another
  manager failed in its ``tpc_finish`` after ours; it is real, so it is delivered.
* A transaction may never be ended on purpose: its thread, its manager or the interpreter ends first, or ``begin()``
  aborts it.  Its mail is logged at ERROR, unlike that of an abort (:func:`_log_left`).
* A commit may be interrupted at any instruction (Ctrl-C, the time limit of a server).  What was published stays with
  the staging, or with this manager, until a dispatcher has it; the abort that follows finds it there.
* After-commit hooks do not run at all if a synchronizer fails in its ``afterCompletion``.  The abort of the transaction
  then hands over the claims, which would otherwise never be settled.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from inspect import currentframe
from itertools import islice
from traceback import walk_stack
from typing import Any, NamedTuple, cast

import transaction
import transaction.interfaces
from zope.interface import implementer

from pyramid_mailqueue.exceptions import NoActiveTransaction
from pyramid_mailqueue.interfaces import IClaim, IDispatcher, ISessionStaging, IStaging
from pyramid_mailqueue.logs import Log, log_event
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import DROPPED, Dropped

__all__ = ['MailDataManager']

log = Log('mailqueue.queue_log')

_NEVER_ENDED = (
    "its transaction was never committed: write 'with transaction.manager:' around send() (in Pyramid 'with "
    "request.tm:'), or call commit(), or use send_immediately() or enqueue()"
)


class _Added(NamedTuple):
    """A message that is part of the transaction."""

    delivery: str
    envelope: Envelope
    pid: int


@implementer(transaction.interfaces.ISavepointDataManager)
class MailDataManager:
    """
    See `transaction.interfaces.ISavepointDataManager`.

    There is one for each transaction and queue; it joins with its first message.

    :param txn: the transaction
    :param manager: its transaction manager
    :param staging: a new, empty staging of the queue
    :param dispatchers: deliver after the commit; by the *delivery* of :meth:`add`
    :param tell_queued: called for each message after the commit, with its id (``''`` if it is unknown) and its
        envelope; must not raise
    """

    def __init__(
        self,
        txn: transaction.interfaces.ITransaction,
        manager: transaction.interfaces.ITransactionManager,
        staging: IStaging,
        dispatchers: Mapping[str, IDispatcher],
        tell_queued: Callable[[str, Envelope], None] | None = None,
    ) -> None:
        self.transaction_manager = manager
        self._txn = txn
        self._staging = staging
        self._dispatchers = dispatchers
        self._tell_queued = tell_queued
        # Always the same list, without a reference back to this object.
        self._added: list[_Added] = []
        self._end = weakref.finalize(self, _log_left, self._added)
        # What publish() has returned, until it is sorted out.
        self._published: Sequence[IClaim | Dropped | None] | None = None
        self._queued: list[tuple[str, Envelope]] = []
        self._claims: list[tuple[str, IClaim]] = []
        self._joined = False
        self._committing = False
        self._decided = False

    def add(self, envelope: Envelope, delivery: str, session: Any = None) -> None:
        """
        Make *envelope* part of the transaction.

        :param delivery: which dispatcher gets it after the commit; ``'queue'`` leaves it to a later run
        :param session: for the staging of an `ISessionQueue`
        :raises NoActiveTransaction: the transaction is already being committed, or has ended
        """
        if self._committing:
            raise NoActiveTransaction(_too_late(self._txn))
        if not self._joined:
            self._join()
        if session is not None:
            cast('ISessionStaging', self._staging).join(session)
        self._staging.add(envelope, claimed=delivery in self._dispatchers)
        self._added.append(_Added(delivery, envelope, os.getpid()))

    def _join(self) -> None:
        try:
            # Not kept here: a reference cycle would leave both to the garbage collector.
            self._txn.join(_FirstToFinish(self))
            self._txn.join(self)
        except (ValueError, transaction.interfaces.TransactionError) as error:
            raise NoActiveTransaction(_too_late(self._txn)) from error
        self._joined = True
        self._txn.addAfterCommitHook(self._dispatch)

    def sortKey(self) -> str:
        """
        See `transaction.interfaces.IDataManager`.

        After almost all others, so that a full disk is the last "no"; but before ``~sqlalchemy:``, because a one-phase
        session commits in its vote, and nothing after it can roll that back.
        """
        return f'~pyramid_mailqueue:{id(self)}'

    def tpc_begin(self, txn: Any) -> None:
        """See `transaction.interfaces.IDataManager`."""
        self._committing = True
        # No _log_left from here on: an exit of the interpreter leaves the mail in doubt, if anything.
        self._end.detach()

    def commit(self, txn: Any) -> None:
        """See `transaction.interfaces.IDataManager`."""

    def tpc_vote(self, txn: Any) -> None:
        """See `transaction.interfaces.IDataManager`.  Raises QueueError if the queue cannot take the mail."""
        self._staging.prepare(alone=not self._others_rely_on_this())

    def _others_rely_on_this(self) -> bool:
        """Whether another resource may commit because of our "yes"."""
        # The attribute is not public; without it the worst is assumed.
        resources = getattr(self._txn, '_resources', None)
        return resources is None or not all(map(self._is_ours, resources))

    def _is_ours(self, resource: object) -> bool:
        return resource is self or (isinstance(resource, _FirstToFinish) and resource.data_manager is self)

    def decide(self) -> None:
        """The second phase has begun: from here on the mail may not be dropped, whatever happens."""
        self._decided = True

    def tpc_finish(self, txn: Any) -> None:
        """See `transaction.interfaces.IDataManager`.  Never raises."""
        try:
            self._published = self._staging.publish()
        except Exception:
            # The queue broke its promise; but the others have committed, so this must not raise.
            self._staging.leave_in_doubt()
            log.critical('Mail of a committed transaction could not be published', exc_info=True)
        self._sort_out()

    def _sort_out(self) -> None:
        if self._published is None:
            return
        published = [*zip(self._added, self._published, strict=True)]
        there = [(*message, claim) for message, claim in published if claim is not DROPPED]
        self._claims = [(delivery, claim) for delivery, _, _, claim in there if claim is not None]
        self._queued = [(claim.id if claim is not None else '', envelope) for _, envelope, _, claim in there]
        self._published = None
        self._added.clear()
        _log_discarded([message.envelope for message, claim in published if claim is DROPPED])

    def tpc_abort(self, txn: Any) -> None:
        """See `transaction.interfaces.IDataManager`."""
        self._discard()

    def abort(self, txn: Any) -> None:
        """See `transaction.interfaces.IDataManager`.  Never drops what is published; may be called at any time."""
        if self._added and _is_begun_over():
            _log_left(self._added)
            self._staging.discard()
        self._discard()
        self._dispatch(committed=False)

    def _discard(self) -> None:
        self._sort_out()
        self._joined = False
        self._added.clear()
        if self._decided:
            self._staging.leave_in_doubt()
        else:
            _log_discarded(self._staging.discard())

    def savepoint(self) -> _Savepoint:
        """See `transaction.interfaces.ISavepointDataManager`."""
        return _Savepoint(self)

    def mark(self) -> tuple[object, int]:
        """Return a mark of the mail added so far."""
        return self._staging.mark(), len(self._added)

    def rollback(self, mark: tuple[object, int]) -> None:
        """Drop the mail that was added since *mark*."""
        staged, count = mark
        del self._added[count:]
        _log_discarded(self._staging.rollback(staged))

    def _dispatch(self, committed: bool) -> None:
        """The after-commit hook; *committed* says nothing about our claims (see the docstring of the module)."""
        self._sort_out()
        queued, self._queued = self._queued, []
        for name, envelope in queued:
            if self._tell_queued is not None:
                self._tell_queued(name, envelope)
        while self._claims:
            way = self._claims[0][0]
            claims = [claim for delivery, claim in self._claims if delivery == way]
            # Taken out first: if this one is interrupted (Ctrl-C), the abort after the hooks goes on with the others.
            self._claims = [(delivery, claim) for delivery, claim in self._claims if delivery != way]
            self._dispatchers[way].dispatch(claims)


@implementer(transaction.interfaces.ISavepointDataManager)
class _FirstToFinish:
    """See `transaction.interfaces.ISavepointDataManager`.  Tells the data manager that the second phase has begun."""

    def __init__(self, data_manager: MailDataManager) -> None:
        self.transaction_manager = data_manager.transaction_manager
        self.data_manager = data_manager

    def sortKey(self) -> str:
        """See `transaction.interfaces.IDataManager`.  Nothing sorts before this, at most beside it."""
        return ''

    def tpc_finish(self, txn: Any) -> None:
        """See `transaction.interfaces.IDataManager`."""
        self.data_manager.decide()

    def _nothing_to_do(self, txn: Any) -> None:
        """See `transaction.interfaces.IDataManager`."""

    tpc_begin = commit = tpc_vote = tpc_abort = abort = _nothing_to_do

    def savepoint(self) -> _Savepoint:
        """See `transaction.interfaces.ISavepointDataManager`.  The same as that of the data manager, or a later one."""
        return _Savepoint(self.data_manager)


@implementer(transaction.interfaces.IDataManagerSavepoint)
class _Savepoint:
    """See `transaction.interfaces.IDataManagerSavepoint`."""

    def __init__(self, data_manager: MailDataManager) -> None:
        self._data_manager = data_manager
        self._mark = data_manager.mark()

    def rollback(self) -> None:
        """See `transaction.interfaces.IDataManagerSavepoint`."""
        self._data_manager.rollback(self._mark)


def _too_late(txn: Any) -> str:
    """Explain to a developer why *txn* takes no more mail."""
    return (
        f'This transaction is {str(txn.status).lower()}: mail that is sent now would never be committed. '
        'Use send_immediately() or enqueue() here.'
    )


def _is_begun_over() -> bool:
    """
    Whether the transaction is aborted only because its manager begins another one.

    Only the stack shows it: ``TransactionManager.begin`` calls the same ``abort`` as any other caller.
    """
    # This function, the ``abort`` of the data manager, and its callers.
    _, _, *callers = [frame.f_code for frame, _ in islice(walk_stack(currentframe()), 4)]
    return callers == [transaction.Transaction.abort.__code__, transaction.TransactionManager.begin.__code__]


def _log_discarded(envelopes: Sequence[Envelope]) -> None:
    """Log mail that is not sent: that a commit veto drops it, too, is a common surprise."""
    for envelope in envelopes:
        _log_drop(logging.INFO, envelope, 'its transaction, or a savepoint, was rolled back')


def _log_left(added: Sequence[_Added]) -> None:
    """
    Log mail whose transaction was never ended on purpose.

    Called when ``begin()`` aborts the transaction, when the data manager is garbage, or when the interpreter ends.
    """
    for _, envelope, pid in added:
        # A forked child inherits mail of its parent, which may still commit it.
        if pid == os.getpid():
            _log_drop(logging.ERROR, envelope, _NEVER_ENDED)


def _log_drop(level: int, envelope: Envelope, reason: str) -> None:
    log_event(
        log,
        level,
        status='discarded',
        msgid=envelope.message_id,
        to=','.join(envelope.recipients),
        reason=reason,
    )
