"""An outcome that the queue cannot write: nothing is told that is not so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from sqlalchemy import text

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.runner import RunReport
from pyramid_mailqueue.events import MailDelivered
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.sql import SQLQueue
from pyramid_mailqueue.results import Reply, SendResult
from tests.delivery.conftest import Says
from tests.parts.databases import create_queue_tables

ADA, BOB = 'ada@x.example', 'bob@x.example'
ENVELOPE = Envelope('shop@site.example', (ADA, BOB), b'Message-ID: <1@site.example>\r\n\r\nhello\r\n')

REFUSED = Reply(550, 'no such user', '5.1.1')
LATER = Reply(451, 'later', '4.3.0')
ACCEPTED = Reply(250, 'queued', '2.0.0')

# Neither a dead letter nor a count of attempts can be written any more.
SQLITE = """
    CREATE TRIGGER no BEFORE UPDATE ON mailqueue_message WHEN NEW.state = 'dead' OR NEW.attempts > OLD.attempts
    BEGIN SELECT RAISE(ABORT, 'no'); END
"""
POSTGRESQL = """
    CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE insufficient_privilege; END $$;
    CREATE TRIGGER no BEFORE UPDATE ON mailqueue_message FOR EACH ROW
    WHEN (NEW.state = 'dead' OR NEW.attempts > OLD.attempts) EXECUTE FUNCTION no()
"""


def claim_in_directory(request):
    queue = MaildirQueue(request.getfixturevalue('tmp_path') / 'queue')
    claim = queue.put_claimed(ENVELOPE)
    for folder in ('dead', 'tmp'):
        place = Path(queue.place(folder))
        place.rmdir()
        place.touch()
    return claim


def claim_in_database(kind, ban):
    def make(request):
        url = request.getfixturevalue('make_database')(kind)
        create_queue_tables(url)
        queue = SQLQueue(url)
        request.addfinalizer(queue.close)
        claim = queue.put_claimed(ENVELOPE)
        with queue.database.engine.begin() as connection:
            connection.execute(text(ban))
        return claim

    return make


KINDS = {
    'maildir': claim_in_directory,
    'sqlite': claim_in_database('sqlite', SQLITE),
    'postgresql': claim_in_database('postgresql+psycopg', POSTGRESQL),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def claimed(request):
    """A claim of each queue, whose outcome cannot be written."""
    return request.param(request)


@pytest.mark.parametrize(
    ('replies', 'said'),
    [
        pytest.param({ADA: REFUSED, BOB: REFUSED}, {ADA: 'unsettled', BOB: 'unsettled'}, id='refused'),
        pytest.param({ADA: LATER, BOB: LATER}, {ADA: 'unsettled', BOB: 'unsettled'}, id='deferred'),
        pytest.param({ADA: ACCEPTED, BOB: REFUSED}, {ADA: 'sent', BOB: 'unsettled'}, id='refused in part'),
        pytest.param({ADA: ACCEPTED, BOB: LATER}, {ADA: 'sent', BOB: 'unsettled'}, id='accepted in part'),
    ],
)
def test_what_cannot_be_written_is_not_told_as_if_it_were(claimed, replies, said, caplog):
    caplog.set_level(logging.INFO, 'mailqueue')
    events, report = [], RunReport()

    result = MessageHandler([Says(SendResult(replies, 'says'))], notify=events.append).deliver(claimed)

    report.count(result.settlement)
    assert report == RunReport()
    told = [(record.name, record.mailqueue) for record in caplog.records if hasattr(record, 'mailqueue')]
    assert {it['to']: it['status'] for name, it in told if name == 'mailqueue.delivery_log'} == said
    assert {it['status'] for name, it in told if name == 'mailqueue.queue_log'} == {'unsettled'}
    assert [type(event) for event in events] == [MailDelivered] * ('sent' in said.values())
    assert result.queued
    assert {*result.settlement.waiting} == {recipient for recipient, status in said.items() if status != 'sent'}
