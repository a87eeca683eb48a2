"""The queue in a database."""

from pyramid_mailqueue.queues.sql.queue import SQLQueue

__all__ = ['SQLQueue']
