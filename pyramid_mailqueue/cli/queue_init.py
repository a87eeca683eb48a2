"""The command of ``mq-queue`` that creates the queue."""

from __future__ import annotations

import argparse
import os

from pyramid_mailqueue.cli.common import EX_OK, complain
from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.wiring import build_queue, build_sql_queue

__all__ = ['init']


def init(settings: Settings, arguments: argparse.Namespace) -> int:
    """Create the tables of a queue in a database, or the directory of another one, unless they exist."""
    if settings.queue == 'sql':
        _create_tables(settings, arguments)
        return EX_OK
    if arguments.sql:
        raise ConfigurationError(f'mailqueue.queue = {settings.queue}: --sql is for a queue in a database.')
    queue = build_queue(settings, access='create')
    # A queue of another package may have no directory.
    path = getattr(queue, 'path', None)
    print(f'{path or queue} is ready')
    if path is not None and os.geteuid() == 0:
        complain(
            arguments.prog, f'it belongs to root; for an application that runs as another user: chown -R USER: {path}'
        )
    return EX_OK


def _create_tables(settings: Settings, arguments: argparse.Namespace) -> None:
    queue = build_sql_queue(settings)
    if arguments.sql:
        print(queue.database.ddl(), end='')
        return
    try:
        queue.create_tables()
    finally:
        queue.close()
    print(f'The queue in {queue.database.name} is ready')
