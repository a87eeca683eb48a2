"""A commit with mail in the database is interrupted at every moment: what is committed leaves in the same process."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import sys
import time

import pytest
import transaction
import zope.sqlalchemy
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool

from pyramid_mailqueue import mailer_from_settings
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.queues.sql.database import Database
from tests.parts.interrupts import Interrupted, interrupting
from tests.parts.orders import Base, Order

# Not each moment each time: there are more than a thousand, and most of them lie in the same function.
STRIDE = 23


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    """Logs, and what pytest notes of interrupted generators, would keep their frames and all that is in there."""
    monkeypatch.setattr(sys, 'unraisablehook', lambda _: None)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    gc.collect()


class Process:
    """An application with orders, each of which sends two messages."""

    def __init__(self, url, settings):
        engine = create_engine(url, poolclass=NullPool)
        Base.metadata.create_all(engine)
        self.factory = sessionmaker(engine)
        zope.sqlalchemy.register(self.factory)
        self.mailer = mailer_from_settings(settings)

    def commit(self, message, name, number):
        """Return whether the commit was interrupted."""
        manager = transaction.manager
        manager.begin()
        session = self.factory()
        session.add(Order(name=name))
        for _ in range(2):
            self.mailer.send(message(name), recipients=f'{name}@x.example', session=session)
        with interrupting(number) as hit:
            try:
                manager.commit()
            except Interrupted:
                manager.abort()
        session.close()
        return bool(hit)


@pytest.mark.parametrize('delivery', ['background', 'inline'])
def test_what_is_committed_leaves(url, make_settings, make_queue, smtp_server, message, sql, until, delivery):
    process = Process(url, {'sqlalchemy.url': url, **make_settings(smtp_server, queue='sql', delivery=delivery)})
    runner = Runner(make_queue(url), process.mailer.handler)

    def has_left():
        runner.round()
        return sql(url, 'SELECT count(*) FROM mailqueue_message') == [(0,)]

    for number in itertools.count(1, STRIDE):
        name = f'n{number}'
        is_hit = process.commit(message, name, number)
        until(has_left)
        count = sum(envelope.rcpt_tos == [f'{name}@x.example'] for envelope in smtp_server.received)
        is_committed = sql(url, f"SELECT count(*) FROM orders WHERE name = '{name}'") == [(1,)]
        # At least once.
        assert count >= 2 if is_committed else count == 0, number
        if not is_hit:
            break
    process.mailer.close()
    # Newer Pythons call less.
    assert number > 5 * STRIDE
    assert count == 2


@pytest.mark.parametrize('package', ['pyramid_mailqueue', 'sqlalchemy'])
def test_whoever_is_interrupted_takes_no_connection_along(url, package):
    database = Database(url)
    for number in itertools.count(1, STRIDE):
        with interrupting(number, package) as hit, contextlib.suppress(Interrupted):
            database.run(lambda connection: connection.exec_driver_sql('SELECT 1').scalar())
        if not hit:
            break
    began = time.monotonic()

    assert [database.run(lambda connection: connection.exec_driver_sql('SELECT 1').scalar()) for _ in range(4)] == [
        1
    ] * 4
    assert time.monotonic() - began < 3
    database.close()
