"""A queue as a transport."""

from __future__ import annotations

import time

import pytest
from zope.interface.verify import verifyObject

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.exceptions import QueueError, ServerTrouble
from pyramid_mailqueue.interfaces import ITransport
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.queue_file import read_envelope
from pyramid_mailqueue.results import Burial
from pyramid_mailqueue.transports.maildir import MaildirBackend

CONTENT = b'Subject: hello\r\nDate: Tue, 24 Nov 2026 07:28:11 +0000\r\nMessage-ID: <1@site.example>\r\n\r\n'
ENVELOPE = Envelope('shop@site.example', ('ada@x.example', 'bob@x.example'), CONTENT)


class Down:
    def send(self, sender, recipients, content):
        raise ServerTrouble('down')


@pytest.fixture
def backend(queue_dir):
    return MaildirBackend(queue_dir)


@pytest.fixture
def waiting(queue_dir):
    """The envelopes that wait in the queue."""

    def waiting():
        claims = list(MaildirQueue(queue_dir).claim_due(time.time() + 1))
        envelopes = [claim.envelope for claim in claims]
        for claim in claims:
            claim.release()
        return envelopes

    return waiting


def test_it_is_a_transport(backend):
    assert verifyObject(ITransport, backend)


def test_the_queue_is_created_at_once(queue_dir, backend):
    assert (queue_dir / 'new').is_dir()


def test_what_is_sent_waits_for_mq_run(backend, waiting):
    result = backend.send(ENVELOPE.sender, ENVELOPE.recipients, ENVELOPE.content)

    assert waiting() == [ENVELOPE]
    assert result.queued
    assert result.accepted == ENVELOPE.recipients
    assert not any(reply.from_server for reply in result.replies.values())


def test_the_reply_names_the_message(backend, queue_dir):
    result = backend.send(ENVELOPE.sender, list(ENVELOPE.recipients), ENVELOPE.content)

    (path,) = (queue_dir / 'new').iterdir()
    assert {str(reply) for reply in result.replies.values()} == {f'250 2.0.0 queued as {path.name}'}


def test_as_the_last_transport_it_catches_what_the_others_could_not_deliver(backend, waiting):
    result = MessageHandler([Down(), backend]).send_message(CONTENT, ENVELOPE.sender, recipients=ENVELOPE.recipients)

    assert waiting() == [ENVELOPE]
    assert result.queued
    assert result.trouble is None


def test_dead_letters_are_kept_with_their_reasons(backend, queue_dir):
    backend.bury(ENVELOPE.sender, ENVELOPE.content, [Burial(('bob@x.example',), '550 5.1.1 no such user')])

    (path,) = (queue_dir / 'dead').iterdir()
    with path.open('rb') as file:
        header, envelope = read_envelope(file.read())
    assert (header.last_reply, envelope.recipients) == ('550 5.1.1 no such user', ('bob@x.example',))
    assert [path.name for path in queue_dir.iterdir() if any(path.iterdir())] == ['dead']


def test_it_leads_to_its_own_queue_and_to_no_other(backend, queue_dir, tmp_path):
    assert backend.leads_to(MaildirQueue(queue_dir))
    assert not backend.leads_to(MaildirQueue(tmp_path / 'other'))
    assert not backend.leads_to(None)


def test_a_queue_that_cannot_take_the_message_says_so(backend, queue_dir):
    for folder in queue_dir.iterdir():
        folder.rmdir()

    with pytest.raises(QueueError, match='cannot take the message'):
        backend.send(ENVELOPE.sender, ENVELOPE.recipients, ENVELOPE.content)


def test_a_path_that_cannot_be_a_queue_is_refused_at_once(tmp_path):
    (tmp_path / 'file').touch()

    with pytest.raises(QueueError, match='cannot be created or used'):
        MaildirBackend(tmp_path / 'file')


def test_closing_it_makes_durable_what_there_is_and_it_can_be_used_again(backend, waiting):
    for _ in range(2):
        backend.send(ENVELOPE.sender, ENVELOPE.recipients, ENVELOPE.content)
        backend.close()

    assert len(waiting()) == 2
