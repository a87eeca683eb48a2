"""A real queue, transports that answer as they are told, and what the logs have."""

from __future__ import annotations

import logging
from email.message import EmailMessage
from pathlib import Path

import pytest
from zope.interface import implementer

from pyramid_mailqueue.delivery.plugins import registry
from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.interfaces import ITransport
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.queue_file import read_header

# In no log, in no reason and in no name of a file.
SECRET_CONTENT = 'the sum is 4711'


@implementer(ITransport)
class Says:
    """A transport that gives its answers one after the other, the last one again and again; ``asked`` has for whom."""

    def __init__(self, *answers, name='says'):
        self.answers = list(answers)
        self.asked = []
        self.name = name
        self.closed = 0

    def send(self, sender, recipients, content):
        self.asked.append(recipients)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self):
        self.closed += 1


class Queue(MaildirQueue):
    """A real one, with a look into its folders; ``flushes`` is how often it was told to flush."""

    flushes = 0

    def flush(self):
        self.flushes += 1
        super().flush()

    def files(self, folder):
        return sorted(Path(entry.path) for entry in super().files(folder))

    def headers(self, folder):
        """What the queue knows of each message in a folder."""
        headers = []
        for path in self.files(folder):
            with path.open('rb') as file:
                headers.append(read_header(file))
        return headers

    def move(self, name, folder):
        """Move a waiting message to where a dead process would have left it."""
        Path(self.path, 'new', name).rename(Path(self.path, folder, name))

    @property
    def state(self):
        """How many messages there are in each state that has any."""
        return {state: number for state, number in self.counts().items() if number}

    def claimed(self, envelope):
        """A claim to a message of its own."""
        return self.put_claimed(envelope)


@pytest.fixture
def queue(queue_dir):
    return Queue(queue_dir)


@pytest.fixture
def says():
    return Says


@pytest.fixture
def trouble():
    return ServerTrouble('mail.example:25 is down')


@pytest.fixture
def envelope():
    """Make an envelope for some people of ``x.example``: ``envelope('ada', 'bob')``."""

    def envelope(*names):
        made = EmailMessage()
        made['From'] = 'shop@site.example'
        made['Subject'] = SECRET_CONTENT
        made.set_content(SECRET_CONTENT)
        return Envelope.from_message(made, recipients=[f'{name}@x.example' for name in names or ['ada']])

    return envelope


@pytest.fixture
def told(caplog):
    """What was told of messages since they came in: ``told('status', 'to')`` has these of each event, in order."""
    for name in ('delivery_log', 'queue_log', 'delivery'):
        caplog.set_level(logging.INFO, f'mailqueue.{name}')

    def told(*keys):
        records = [record for record in caplog.records if hasattr(record, 'mailqueue')]
        arrivals = ('mailqueue.queue_log', 'queued')
        events = [it.mailqueue for it in records if (it.name, it.mailqueue['status']) != arrivals]
        return [tuple(event.get(key) for key in keys) for event in events]

    yield told
    assert SECRET_CONTENT not in caplog.text
    assert not any(SECRET_CONTENT in str(vars(record)) for record in caplog.records)


@pytest.fixture
def listen():
    """Connect receivers for as long as the test runs: ``listen(signal, receiver)``."""
    connected = []

    def listen(signal, receiver):
        registry.connect(signal, receiver)
        connected.append((signal, receiver))

    yield listen
    for signal, receiver in connected:
        registry.disconnect(signal, receiver)
