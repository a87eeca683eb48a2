"""
Notifications of new mail, between processes: LISTEN and NOTIFY of PostgreSQL.

They are sent after the commit only.  Within the application's transaction they would let one commit wait for the other,
and not work with two phases.  A run that misses one finds the mail at its next poll.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from pyramid_mailqueue.exceptions import MailqueueError
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.queues.sql.database import Database
from pyramid_mailqueue.queues.sql.deadlines import NEWS_SECONDS
from pyramid_mailqueue.queues.sql.trouble import first_line

__all__ = ['listening', 'tell']

log = Log('mailqueue.delivery')

CHANNEL = 'mailqueue'

#: How long the listener waits before it connects again, in seconds.
PATIENCE = 5


def tell(database: Database) -> None:
    """Notify listeners of new mail.  Raises nothing: the mail is in the table anyway."""
    if database.dialect != 'postgresql':
        return
    try:
        database.run(lambda connection: connection.exec_driver_sql(f'NOTIFY {CHANNEL}'), NEWS_SECONDS)
    except MailqueueError as error:
        log.warning('%s There is no notification of new mail.', error)


@contextmanager
def listening(database: Database, on_news: Callable[[], None]) -> Iterator[None]:
    """Call *on_news* at each notification, from a thread that has one of the connections meanwhile."""
    if database.dialect != 'postgresql':
        yield
        return
    ended, end = os.pipe()
    listener = _Listener(database, on_news, ended)
    thread = threading.Thread(target=listener.run, name='mailqueue-news', daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(end)
        thread.join(NEWS_SECONDS)
        if not thread.is_alive():
            os.close(ended)


class _Listener:
    """
    See :func:`listening`.

    :param ended: a pipe that is closed at its other end when it is over
    """

    def __init__(self, database: Database, on_news: Callable[[], None], ended: int) -> None:
        self._database = database
        self._on_news = on_news
        self._ended = ended
        # The trouble that was logged, until it is over.
        self._told = ''

    def run(self) -> None:
        wait = 0.0
        while not self._is_over(wait):
            wait = PATIENCE
            try:
                self._listen()
            except Exception as error:  # noqa: BLE001 - the drivers have no base for their errors in common
                trouble = first_line(error)
                if trouble != self._told:
                    log.warning('There are no notifications of new mail now; it is found by polling. %s', trouble)
                self._told = trouble

    def _is_over(self, seconds: float, *others: Any) -> bool:
        """Wait for the end or for one of *others*; whether it is the end."""
        return self._ended in select.select([self._ended, *others], [], [], seconds)[0]

    def _listen(self) -> None:
        with self._database.connection() as connection:
            try:
                connection.exec_driver_sql(f'LISTEN {CHANNEL}')
                self._database.deadlines.lift()
                self._told = ''
                raw: Any = connection.connection.driver_connection
                # Mail that came before that was not notified.
                self._on_news()
                while not self._is_over(60, raw):
                    if _has_news(raw):
                        self._on_news()
            finally:
                # The next user of the connection must not listen.
                with suppress(SQLAlchemyError):
                    connection.invalidate()


def _has_news(raw: Any) -> bool:
    """Whether a notification has arrived on a connection of psycopg2 or psycopg; raises the errors of the driver."""
    if hasattr(raw, 'poll'):
        raw.poll()
        news = bool(raw.notifies)
        raw.notifies.clear()
        return news
    raw.pgconn.consume_input()
    news = False
    while raw.pgconn.notifies():
        news = True
    return news
