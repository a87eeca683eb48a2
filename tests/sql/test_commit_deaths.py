"""
A process that dies at any point of its commit: its mail is there exactly when its data is.

It is killed before and after each statement and each COMMIT, those of the application as well as those of the queue.
"""

from __future__ import annotations

import itertools
import os
import signal
from functools import partial

import pytest
import transaction
import zope.sqlalchemy
from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from pyramid_mailqueue import mailer_from_settings
from pyramid_mailqueue.queues.sql.schema import Message
from tests.parts.children import Child
from tests.parts.orders import Base, Order

pytestmark = pytest.mark.forks


class Deadly:
    """Kills this process when it is called for the so-manieth time."""

    def __init__(self, count):
        self._left = count

    def __call__(self, *args, **kwargs):
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def commit_one(connection, *, settings, message, name, count, twophase):
    """In the child: one transaction with an order and its mail."""
    factory = sessionmaker(create_engine(settings['sqlalchemy.url'], poolclass=NullPool), twophase=twophase)
    zope.sqlalchemy.register(factory)
    mailer = mailer_from_settings(settings)
    deadly = Deadly(count)
    for point in ('before_cursor_execute', 'after_cursor_execute', 'commit', 'prepare_twophase', 'commit_twophase'):
        event.listen(Engine, point, deadly)
    event.listen(Session, 'after_commit', deadly)
    with transaction.manager:
        session = factory()
        session.add(Order(name=name))
        mailer.send(message, sender='shop@site.example', recipients=f'{name}@x.example', session=session)
    connection.send('alive')


@pytest.mark.parametrize('twophase', [False, True], ids=['one phase', 'two phases'])
@pytest.mark.parametrize('delivery', ['inline', 'queue'])
def test_the_mail_is_there_exactly_when_the_data_is(
    postgres_url, make_settings, smtp_server, message, delivery, twophase
):
    engine = create_engine(postgres_url, poolclass=NullPool)
    Base.metadata.create_all(engine)
    settings = {'sqlalchemy.url': postgres_url, **make_settings(smtp_server, queue='sql', delivery=delivery)}
    deaths, committed = 0, 0

    for count in itertools.count():
        name = f'{delivery}{count}'
        work = partial(commit_one, settings=settings, message=message(name), name=name, count=count, twophase=twophase)
        with Child(work) as child:
            status = child.wait()
        with engine.connect().execution_options(isolation_level='AUTOCOMMIT') as connection:
            # What is prepared the database has in doubt as a whole, data and mail; whatever a person decides is true of
            # both.
            for (gid,) in connection.execute(text('SELECT gid FROM pg_prepared_xacts')).all():
                connection.execute(text(f"{'COMMIT' if count % 2 else 'ROLLBACK'} PREPARED '{gid}'"))
            has_data = connection.scalar(select(Order.name).where(Order.name == name)) is not None
            recipients = connection.scalars(select(Message.recipients)).all()
        sent = [it for it in smtp_server.received if it.rcpt_tos == [f'{name}@x.example']]
        assert has_data == bool(sent or [f'{name}@x.example'] in recipients), name
        committed += has_data
        if status == 0:
            break
        deaths += 1
    engine.dispose()

    assert committed > 1
    assert deaths >= 6
