"""What the tests of moves put into the two queues, and how they look at them."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.queues.entries import STATES
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.queue_file import QueueHeader
from pyramid_mailqueue.queues.sql import SQLQueue
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.wiring import open_move

FOLDER = {'waiting': 'new', 'held': 'held', 'dead': 'dead'}


class Kept(NamedTuple):
    """What is known of a message in either queue, but for its id."""

    state: str
    sender: str
    recipients: tuple
    retries: int
    queued_at: float
    last_attempt: float | None
    last_reply: str
    subject: str
    message_id: str
    content: bytes
    due: float | None = None
    deaths: int = 0


class Place:
    """A queue directory and a database, between which messages move."""

    def __init__(self, path, url):
        self.settings = Settings(queue_dir=Path(path), sql_url=url)
        self.maildir = MaildirQueue(path)
        self._url = url

    @contextlib.contextmanager
    def sql(self, **options):
        queue = SQLQueue(self._url, **options)
        try:
            yield queue
        finally:
            queue.close()

    def move(self, to, **options):
        with open_move(self.settings, to=to) as work:
            work.run(**options)
        return work.report

    def put(self, content, *, state='waiting', header=None, due=None, deaths=0, name=None):
        """Put a message into the directory; return its name."""
        header = header or QueueHeader('shop@site.example', ('ada@x.example',), 1_700_000_000)
        name = name or self.maildir.new_name(header.queued_at)
        full = f'{name},deaths={deaths}' if deaths else name
        self.maildir.write(self.maildir.place(FOLDER[state], full), header, content, due).close()
        return name

    def kept(self, kind):
        """All that is known of the messages in one of the queues, in the order of their contents."""
        if kind == 'maildir':
            return self._kept_in(self.maildir, self._deaths_in_names())
        with self.sql() as queue:
            rows = queue.database.run(_deaths)
            return self._kept_in(queue, dict(map(tuple, rows)))

    def _deaths_in_names(self):
        names = [entry.name for folder in FOLDER.values() for entry in self.maildir.files(folder)]
        return {name.partition(',')[0]: int(name.rpartition('deaths=')[2]) for name in names if 'deaths=' in name}

    def _kept_in(self, queue, deaths):
        found = [
            Kept(
                entry.state,
                entry.sender,
                entry.recipients,
                entry.retries,
                entry.queued_at,
                entry.last_attempt,
                entry.last_reply,
                entry.subject,
                entry.message_id,
                queue.admin.content(entry.id),
                entry.due and round(entry.due, 3),
                deaths.get(entry.id, 0),
            )
            for entry in queue.admin.entries([state for state in STATES if state != 'in doubt'])
        ]
        return sorted(found, key=lambda kept: kept.content)

    def counts(self, kind):
        if kind == 'maildir':
            counts = self.maildir.counts()
        else:
            with self.sql() as queue:
                counts = queue.counts()
        return {state: number for state, number in counts.items() if number}

    def run(self, transport, kind):
        """What mq-run does with one of the queues."""
        if kind == 'maildir':
            return Runner(self.maildir, MessageHandler([transport])).run()
        with self.sql() as queue:
            return Runner(queue, MessageHandler([transport])).run()

    def delete_all(self):
        with self.sql() as queue:
            for admin in (self.maildir.admin, queue.admin):
                for entry in [*admin.entries(STATES)]:
                    admin.delete(entry.id)

    def in_moving(self):
        path = Path(self.maildir.place('moving'))
        return sorted(it.name for it in path.iterdir() if it.name not in ('.lock', '.record')) if path.exists() else []


def _deaths(connection):
    return connection.exec_driver_sql('SELECT id, deaths FROM mailqueue_message').all()


class Office:
    """A transport that notes the contents that it was given."""

    name = 'office'

    def __init__(self):
        self._lock = threading.Lock()
        self.contents = []

    def send(self, sender, recipients, content):
        with self._lock:
            self.contents.append(content)
        return True

    def close(self):
        pass


def touch(path, when):
    os.utime(path, (when, when))


class _Killed(Exception):
    """Stands for a signal."""


def break_off(place, to, *, at):
    """A move that ends at a step as if it had been killed there."""

    def die(*_, **__):
        raise _Killed

    with open_move(place.settings, to=to) as work:
        if at == 'decided':
            work._end = die
        else:
            decide = work._decisions.decide
            work._decisions.decide = die
        with pytest.raises(_Killed):
            work.run()
        if at != 'decided':
            work._decisions.decide = decide
        for side in (work.source, work.target):
            for file in getattr(side, '_held', {}).values():
                file.abandon()
