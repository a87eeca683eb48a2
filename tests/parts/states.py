"""A message in each state, in any queue."""

from __future__ import annotations

from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.entries import STATES
from pyramid_mailqueue.results import Burial, Settlement
from tests.parts.maildir import stage

ENVELOPE = Envelope(
    'shop@site.example',
    ('ada@x.example', 'bob@x.example'),
    b'Message-ID: <1@site.example>\r\nSubject: hello\r\n\r\nHello.\r\n',
)


def entries(queue, *states):
    return list(queue.admin.entries(states or STATES))


def make_waiting(queue, envelope=ENVELOPE):
    return queue.put(envelope)


def make_held(queue, envelope=ENVELOPE):
    return queue.admin.hold(queue.put(envelope)).id


def make_dead(queue, envelope=ENVELOPE, reply='550 no'):
    before = {entry.id for entry in entries(queue, 'dead')}
    queue.put_claimed(envelope).settle(Settlement(burials=(Burial(envelope.recipients, reply),)))
    (name,) = {entry.id for entry in entries(queue, 'dead')} - before
    return name


def make_doubtful(queue, envelope=ENVELOPE):
    before = {entry.id for entry in entries(queue, 'in doubt')}
    stage(queue, (envelope, True)).leave_in_doubt()
    (name,) = {entry.id for entry in entries(queue, 'in doubt')} - before
    return name


MAKE = {'waiting': make_waiting, 'held': make_held, 'dead': make_dead, 'in doubt': make_doubtful}
