"""Several web processes and several mq-runs work on one queue at the same time."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from email.message import EmailMessage
from functools import partial

import pytest
import transaction

from pyramid_mailqueue.delivery.dispatch import BackgroundDispatcher, InlineDispatcher
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.retry import ExponentialBackoff
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.mailer import Mailer
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.results import Reply
from tests.parts.children import Child
from tests.parts.maildir import where
from tests.parts.witnesses import Notes, Recording

COMMITS = 30
DEADLINE = 60


class Moody(Recording):
    """A transport that defers a third of what it is offered."""

    def send(self, sender, recipients, content):
        self._replies = dict.fromkeys(recipients, Reply(451, 'later')) if random.random() < 0.3 else {}
        return super().send(sender, recipients, content)


@pytest.fixture
def notes(tmp_path):
    return Notes(tmp_path / 'notes')


@pytest.fixture
def queue(tmp_path):
    return MaildirQueue(tmp_path / 'queue')


@pytest.fixture
def mailer(queue, notes):
    """Made before the web processes are forked, as by "gunicorn --preload"."""
    handler = handler_of(notes)
    dispatchers = {
        'inline': InlineDispatcher(handler, queue),
        'background': BackgroundDispatcher(handler, queue),
    }
    return Mailer(queue, handler, dispatchers, Envelope.from_message)


def handler_of(notes):
    # Whatever is deferred comes back at once, so that everybody is after the same messages.
    return MessageHandler([Moody(notes)], retry_policy=ExponentialBackoff(first=0.01, longest=0.01))


def serve_requests(mailer, delivery, number, connection):
    """Commit two messages with each request, and abort a third; then end as a web process does."""
    for request in range(COMMITS):
        transaction.begin()
        for letter in 'ab':
            mailer.send(message_to(f'{number}-{request}-{letter}@x.example'), delivery=delivery)
        transaction.commit()
        transaction.begin()
        mailer.send(message_to('nobody@x.example'), delivery=delivery)
        transaction.abort()
    mailer.close()


def message_to(recipient):
    message = EmailMessage()
    message['From'] = 'sender@site.example'
    message['To'] = recipient
    message.set_content('hello')
    return message


def run_until_told_to_stop(queue, notes, connection):
    runner = Runner(queue, handler_of(notes))
    while not connection.poll():
        runner.run()


@pytest.fixture
def start():
    """Start a process that does something; whatever the test does, it is dead in the end."""
    with contextlib.ExitStack() as children:
        yield lambda function, *args: children.enter_context(Child(partial(function, *args)))


@pytest.fixture
def start_webs(start, mailer):
    def start_webs():
        return [
            start(serve_requests, mailer, delivery, number)
            for number, delivery in enumerate(('inline', 'background', 'queue'))
        ]

    return start_webs


@pytest.fixture
def start_run(start, queue, notes):
    return lambda: start(run_until_told_to_stop, queue, notes)


EVERYBODY = {
    f'{number}-{request}-{letter}@x.example' for number in range(3) for request in range(COMMITS) for letter in 'ab'
}


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_that_share_a_queue_deliver_each_message_once(start_run, start_webs, queue, notes):
    runs = [start_run(), start_run()]
    assert [web.wait() for web in start_webs()] == [0, 0, 0]
    wait_until(lambda: set(notes.delivered) == EVERYBODY)
    for run in runs:
        run.tell('stop')
    assert [run.wait() for run in runs] == [0, 0]

    assert Counter(notes.delivered) == Counter(EVERYBODY)
    assert where(queue) == {}


def test_a_run_that_is_killed_loses_nothing_and_repeats_at_most_the_message_in_hand(
    start_run, start_webs, queue, notes
):
    kills = 4
    steady = start_run()
    webs = start_webs()
    for _ in range(kills):
        run = start_run()
        enough = min(len(notes.delivered) + 10, len(EVERYBODY))
        wait_until(lambda enough=enough: len(notes.delivered) >= enough)
        run.kill()
    assert [web.wait() for web in webs] == [0, 0, 0]
    wait_until(lambda: set(notes.delivered) == EVERYBODY)
    steady.tell('stop')
    assert steady.wait() == 0
    # What the last one had in hand when it was killed.
    wait_until(lambda: Runner(queue, handler_of(notes)).run() and where(queue).keys() <= {'tmp'})

    assert len(notes.delivered) <= len(EVERYBODY) + kills
