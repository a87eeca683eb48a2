"""From settings to what needs SQLAlchemy: the queue in a database, and the move between that and a directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyramid_mailqueue.exceptions import ConfigurationError, QueueError
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.moving import DirectoryRecord, MaildirSide
from pyramid_mailqueue.queues.moving import Move
from pyramid_mailqueue.queues.sql import SQLQueue
from pyramid_mailqueue.queues.sql.database import DatabaseAway, NoTables
from pyramid_mailqueue.queues.sql.moving import SQLSide, blaming_configuration, schema_of
from pyramid_mailqueue.settings import Settings

__all__ = ['SQLWiring']

DAY = 86400


class SQLWiring:
    """See the module, and :mod:`~.wiring`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def queue(self) -> SQLQueue:
        """See :func:`~.wiring.build_sql_queue`."""
        settings = self._settings
        if settings.sql_url is None:
            raise ConfigurationError('mailqueue.sql_url is missing, and so is sqlalchemy.url: name the database.')
        return SQLQueue(
            settings.sql_url,
            session_name=settings.sql_session,
            lease=settings.sql_lease,
            notify=settings.sql_notify,
            horizon=settings.retry_max + DAY,
        )

    def checked_queue(self, on_away: Callable[[QueueError], None]) -> SQLQueue:
        """See :func:`~.wiring.build_queue`."""
        queue = self.queue()
        try:
            queue.check()
        except DatabaseAway as error:
            on_away(error)
        finally:
            # A server may fork from here on.
            queue.close()
        return queue

    @contextmanager
    def move(self, directory: MaildirQueue, *, to: str) -> Iterator[Move]:
        """See :func:`~.wiring.open_move`."""
        database = self.queue()
        here = MaildirSide(directory)
        try:
            with blaming_configuration():
                self._check_tables(database)
                schema = schema_of(database.database)
            record = DirectoryRecord(directory, database.database.name, schema)
            there = SQLSide(database, record)
            there.check()
            yield Move(here, there, record) if to == 'sql' else Move(there, here, record)
        finally:
            here.close()
            database.close()

    def _check_tables(self, queue: SQLQueue) -> None:
        try:
            queue.database.check()
        except NoTables as error:
            if self._settings.queue == 'sql':
                raise
            raise ConfigurationError(
                f'{error} As long as the ini file names the other queue: mq-queue app.ini --set mailqueue.queue=sql '
                'init.'
            ) from error
