"""What the tests of the queue directory put into it, and how they look at it."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from pyramid_mailqueue.envelope import Envelope
from pyramid_mailqueue.queues.maildir import FOLDERS

CONTENT = b'Subject: hello\r\nMessage-ID: <1@site.example>\r\n\r\nhello\r\n'
ENVELOPE = Envelope('sender@site.example', ('a@x.example', 'b@x.example'), CONTENT)
OTHER = Envelope('', ('other@x.example',), CONTENT)

HOUR = 3600
LATER = 1 << 33


class Told:
    """What was told of messages: a dict for each event."""

    def __init__(self, caplog):
        caplog.set_level(logging.INFO, 'mailqueue.queue_log')
        self._caplog = caplog

    def __call__(self, **fields):
        """Those events that have these fields."""
        return [event for event in self.events if fields.items() <= event.items()]

    @property
    def events(self):
        return [
            {'level': record.levelname, **record.mailqueue}
            for record in self._caplog.records
            if hasattr(record, 'mailqueue')
        ]

    def clear(self):
        self._caplog.clear()


def at(queue, folder, name=''):
    return Path(queue.place(folder, name))


def names(queue, folder):
    return names_in(at(queue, folder))


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def where(queue):
    """The number of files in each folder that has any."""
    return {folder: len(found) for folder in FOLDERS if (found := names(queue, folder))}


def put(queue, envelope=ENVELOPE, *, due=None):
    name = queue.put(envelope)
    if due is not None:
        os.utime(queue.place('new', name), (due, due))
    return name


def claim(queue, *, now=None):
    """Claim what is due, which must be one message."""
    (found,) = queue.claim_due(time.time() if now is None else now)
    return found


def stage(queue, *messages):
    """A staging that has said "yes" to messages, pairs of an envelope and whether it is claimed."""
    staging = queue.staging()
    for envelope, claimed in messages:
        staging.add(envelope, claimed)
    staging.prepare()
    return staging


def forget(*things):
    """Drop the open files of claims or stagings as a process that dies does."""
    for thing in things:
        for file in getattr(thing, '_files', None) or [thing._file]:
            file.abandon()
