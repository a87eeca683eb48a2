"""A queue in a database as the contract of all queues wants it: with a session that commits when it is told to."""

from __future__ import annotations

from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from zope.interface import implementer

from pyramid_mailqueue.interfaces import IStaging
from pyramid_mailqueue.queues.sql import SQLQueue


class QueueWithSession(SQLQueue):
    """Its stagings have a session each, which they commit and roll back: that is what a transaction manager does."""

    def __init__(self, url, **options):
        super().__init__(url, **options)
        self._app_engine = create_engine(url, poolclass=NullPool)
        if self.database.dialect == 'sqlite':
            for engine in (self._app_engine, self.database.engine):
                event.listen(engine, 'connect', _without_sync)

    def staging(self):
        kind = LateStaging if self.database.dialect == 'sqlite' else StagingWithSession
        return kind(super().staging(), Session(self._app_engine))


def _without_sync(connection, _record):
    connection.execute('PRAGMA synchronous=OFF')


@implementer(IStaging)
class StagingWithSession:
    def __init__(self, staging, session):
        self._staging = staging
        self._session = session
        staging.join(session)

    def add(self, envelope, claimed):
        self._staging.add(envelope, claimed)

    def mark(self):
        return self._staging.mark(), self._session.begin_nested()

    def rollback(self, mark):
        number, savepoint = mark
        if savepoint.is_active:
            savepoint.rollback()
        return self._staging.rollback(number)

    def prepare(self, alone=False):
        self._staging.prepare(alone)

    def publish(self):
        self._session.commit()
        return self._staging.publish()

    def discard(self):
        self._session.rollback()
        return self._staging.discard()

    def leave_in_doubt(self):
        self._session.rollback()
        self._staging.leave_in_doubt()


@implementer(IStaging)
class LateStaging:
    """
    For SQLite, which has one writer at a time: whoever claims messages waits until an open transaction has ended.

    The tests of the contract do both in one thread, so the session writes when the transaction is committed.
    """

    def __init__(self, staging, session):
        self._staging = staging
        self._session = session
        self._added = []
        staging.join(session)

    def add(self, envelope, claimed):
        self._added.append((envelope, claimed))

    def mark(self):
        return len(self._added)

    def rollback(self, mark):
        dropped = self._added[mark:]
        del self._added[mark:]
        return [envelope for envelope, _ in dropped]

    def prepare(self, alone=False):
        self._staging.prepare(alone)

    def publish(self):
        for envelope, claimed in self._added:
            self._staging.add(envelope, claimed)
        self._added = []
        self._session.commit()
        return self._staging.publish()

    def discard(self):
        dropped, self._added = self._added, []
        return [*self._staging.discard(), *(envelope for envelope, _ in dropped)]

    def leave_in_doubt(self):
        self._added = []
        self._staging.leave_in_doubt()
