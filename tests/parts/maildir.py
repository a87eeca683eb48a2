"""What the tests of the queue directory put into it, and how they look at it."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir.folders import FOLDERS
from pyramid_mailqueue.queues.maildir.queue_file import read_envelope

CONTENT = b'Subject: hello\r\nMessage-ID: <1@site.example>\r\n\r\nhello\r\n'
ENVELOPE = Envelope('sender@site.example', ('a@x.example', 'b@x.example'), CONTENT)
OTHER = Envelope('', ('other@x.example',), CONTENT)

HOUR = 3600
LATER = 1 << 33


class Told:
    """What was told of messages since they came in: a dict for each event."""

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
            if hasattr(record, 'mailqueue') and record.mailqueue['status'] != 'queued'
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


def clear(queue):
    """Remove all files; the folders take longer to create."""
    for folder in FOLDERS:
        for path in at(queue, folder).iterdir():
            path.unlink()


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


def leave_everything_behind(queue):
    """An orphan, one that has killed four already, two messages in doubt, and one that nobody has voted for."""
    orphan = queue.put_claimed(message_of('orphan@x.example'))
    deadly = queue.put_claimed(message_of('deadly@x.example'))
    at(queue, 'cur', deadly.id).rename(at(queue, 'cur', f'{deadly.id},deaths=4'))
    prepared = message_of('prepared@x.example')
    forget(orphan, deadly, stage(queue, (prepared, True), (prepared, False)))
    at(queue, 'tmp', 'stale').write_bytes(b'half a mess')
    os.utime(queue.place('tmp', 'stale'), (1, 1))


def message_of(address):
    return Envelope(address, (address,), CONTENT)


def dead_recipients(queue):
    """Who is given up, in all dead letters; each of these is whole."""
    found = []
    for name in names(queue, 'dead'):
        with at(queue, 'dead', name).open('rb') as file:
            _, envelope = read_envelope(file.read())
        assert envelope.content == CONTENT
        found += envelope.recipients
    return sorted(found)
