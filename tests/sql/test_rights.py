"""The database does not let a worker write what became of messages: it stops, and sends nothing again and again."""

from __future__ import annotations

import logging

import pytest
from sqlalchemy import make_url

from pyramid_mailqueue.delivery.dispatch import InlineDispatcher
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.exceptions import ConfigurationError, QueueError
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.sql import leases as sql_leases
from pyramid_mailqueue.results import Burial, Reply, SendResult, Settlement
from tests.parts.maildir import Told

ADA, BOB = 'ada@x.example', 'bob@x.example'
FOR_ADA = Envelope('shop@site.example', (ADA,), b'Subject: 1\r\n\r\nHello.\r\n')
FOR_TWO = Envelope('shop@site.example', (ADA, BOB), b'Subject: 2\r\n\r\nHello.\r\n')

TRIGGER = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; END $$;
CREATE TRIGGER refuse BEFORE {event} ON mailqueue_message FOR EACH ROW {when} EXECUTE FUNCTION refuse()
"""
SECURITY = """
ALTER TABLE mailqueue_message ENABLE ROW LEVEL SECURITY;
CREATE POLICY others ON mailqueue_message USING (true) WITH CHECK (true);
CREATE POLICY kept ON mailqueue_message AS RESTRICTIVE FOR DELETE USING (false)
"""

#: What keeps rows from being deleted.
OBSTACLES = {
    'no right': 'REVOKE DELETE ON mailqueue_message FROM {role}',
    'a trigger that raises': TRIGGER.format(body="RAISE 'kept for the auditors'", event='DELETE', when=''),
    'a trigger that does nothing': TRIGGER.format(body='RETURN NULL', event='DELETE', when=''),
    'a rule': 'CREATE RULE kept AS ON DELETE TO mailqueue_message DO INSTEAD NOTHING',
    'security of rows': SECURITY,
}


@pytest.fixture
def role(postgres_url, sql):
    """A user who may do what a worker needs, and is not the owner of the tables."""
    schema = make_url(postgres_url).query['options'].rpartition('=')[2]
    name = f'worker_of_{schema}'
    sql(postgres_url, f'CREATE ROLE {name}')
    sql(postgres_url, f'GRANT USAGE ON SCHEMA {schema} TO {name}')
    sql(postgres_url, f'GRANT SELECT, INSERT, UPDATE, DELETE ON mailqueue_message TO {name}')
    sql(postgres_url, f'GRANT SELECT, INSERT ON mailqueue_content TO {name}')
    sql(postgres_url, f'GRANT SELECT ON mailqueue_schema TO {name}')
    yield name
    sql(postgres_url, f'DROP OWNED BY {name}')
    sql(postgres_url, f'DROP ROLE {name}')


@pytest.fixture
def worker_url(postgres_url, role):
    url = make_url(postgres_url)
    options = f'{url.query["options"]} -crole={role}'
    return url.update_query_dict({'options': options}).render_as_string(hide_password=False)


class Relay:
    """A transport that notes what it has taken; *reply* is what it says."""

    name = 'relay'

    def __init__(self, reply=None, then=lambda: None):
        self.taken = []
        self.reply = reply or Reply(250, 'Ok')
        self.then = then

    def send(self, _sender, recipients, content):
        self.taken.append(content)
        self.then()
        return SendResult(dict.fromkeys(recipients, self.reply), self.name)

    def close(self):
        pass


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO)
    return Told(caplog)


@pytest.fixture
def make_runner(make_queue):
    def make_runner(url, relay, **options):
        return Runner(make_queue(url, **options), MessageHandler([relay]))

    return make_runner


def fill(queue, number=20):
    for it in range(number):
        queue.put(Envelope('shop@site.example', (ADA,), b'Subject: %d\r\n\r\nHello.\r\n' % it))


@pytest.mark.parametrize('obstacle', OBSTACLES.values(), ids=OBSTACLES)
def test_a_run_that_could_not_delete_what_it_sends_does_not_begin(
    postgres_url, worker_url, role, sql, make_queue, make_runner, obstacle
):
    fill(make_queue(postgres_url))
    sql(postgres_url, obstacle.format(role=role))
    relay = Relay()

    for _ in range(3):
        with pytest.raises((ConfigurationError, QueueError)):
            make_runner(worker_url, relay).run()

    assert relay.taken == []
    assert sql(postgres_url, 'SELECT state, count(*) FROM mailqueue_message GROUP BY state') == [('waiting', 20)]


@pytest.mark.parametrize('obstacle', OBSTACLES.values(), ids=OBSTACLES)
def test_a_run_ends_after_the_first_outcome_that_cannot_be_written(
    postgres_url, worker_url, role, sql, make_queue, make_runner, told, obstacle
):
    fill(make_queue(postgres_url))
    relay = Relay(then=lambda: len(relay.taken) > 1 or sql(postgres_url, obstacle.format(role=role)))
    runner = make_runner(worker_url, relay)

    for _ in range(3):
        with pytest.raises((ConfigurationError, QueueError)):
            runner.round()
    runner.close()

    assert len(relay.taken) == 1
    (event,) = told(level='CRITICAL', status='unsettled')
    in_progress = sql(postgres_url, "SELECT id FROM mailqueue_message WHERE state = 'in progress'")
    assert in_progress == [(event['id'],)]
    assert make_queue(postgres_url).counts()['waiting'] == 19


def test_the_outcome_is_written_and_the_worker_goes_on_when_it_has_the_right_again(
    postgres_url, worker_url, role, sql, make_queue, make_runner, monkeypatch
):
    monkeypatch.setattr(sql_leases, 'PATIENCE', 1000)
    fill(make_queue(postgres_url))
    revoke = f'REVOKE DELETE ON mailqueue_message FROM {role}'
    relay = Relay(then=lambda: len(relay.taken) > 1 or sql(postgres_url, revoke))
    runner = make_runner(worker_url, relay)
    with pytest.raises((ConfigurationError, QueueError)):
        runner.round()
    sql(postgres_url, f'GRANT DELETE ON mailqueue_message TO {role}')

    report = runner.round()

    assert (report.sent, len(relay.taken), len({*relay.taken})) == (19, 20, 20)
    assert not any(make_queue(postgres_url).counts().values())


#: What keeps rows from getting another state.
NO_OTHER_STATE = TRIGGER.format(body="RAISE 'no'", event='UPDATE', when="WHEN (NEW.state <> 'in progress')")


@pytest.mark.parametrize(('reply', 'status'), [(Reply(451, 'later'), 'deferred'), (Reply(550, 'no'), 'buried')])
def test_nothing_is_told_to_be_deferred_or_buried_that_is_not(
    postgres_url, sql, make_queue, make_runner, told, reply, status
):
    fill(make_queue(postgres_url), 3)
    sql(postgres_url, NO_OTHER_STATE)
    relay, events = Relay(reply), []
    runner = make_runner(postgres_url, relay)
    runner.handler.notify = events.append

    with pytest.raises(QueueError, match='cannot be written, so no more mail is delivered for now: '):
        runner.run()

    assert len(relay.taken) == 1
    assert (runner.report.done, runner.report.deferred, runner.report.refused) == (0, 0, 0)
    assert (told(status=status), events) == ([], [])
    told_of_message, told_of_recipient = told(status='unsettled')
    assert str(reply) == told_of_recipient['smtp']
    assert told_of_recipient['id'] == told_of_message['id']


def test_a_web_process_sends_no_more_while_it_cannot_write_what_became_of_the_last(
    postgres_url, worker_url, role, sql, make_queue
):
    sql(postgres_url, f'REVOKE DELETE ON mailqueue_message FROM {role}')
    queue, relay = make_queue(worker_url), Relay()
    handler = MessageHandler([relay])
    for _ in range(3):
        InlineDispatcher(handler, queue).dispatch([queue.put_claimed(FOR_ADA)])

    assert len(relay.taken) == 1
    assert make_queue(postgres_url).counts()['waiting'] == 2


def test_one_row_that_cannot_be_deleted_keeps_back_no_other_row(postgres_url, sql, make_queue, told, monkeypatch):
    monkeypatch.setattr(sql_leases, 'LINGER', 1000)
    queue = make_queue(postgres_url)
    queue.put_claimed(FOR_ADA).settle(Settlement())
    claims = [queue.put_claimed(FOR_ADA) for _ in range(5)]
    sql(postgres_url, TRIGGER.format(body="RAISE 'no'", event='DELETE', when=f"WHEN (OLD.id = '{claims[2].id}')"))

    for claim in claims:
        claim.settle(Settlement())
    assert 'no' in str(queue.flush())

    assert sql(postgres_url, 'SELECT id FROM mailqueue_message') == [(claims[2].id,)]
    assert [event['id'] for event in told(level='CRITICAL', status='unsettled')] == [claims[2].id]
    assert told(status='lost') == []


def test_a_row_that_cannot_be_deleted_holds_up_the_others_for_no_longer_than_a_lease(
    postgres_url, sql, make_queue, make_runner
):
    fill(make_queue(postgres_url), 3)
    ((stuck,),) = sql(postgres_url, 'SELECT id FROM mailqueue_message ORDER BY id LIMIT 1')
    relay = Relay(
        then=lambda: (
            len(relay.taken) > 1
            or sql(postgres_url, TRIGGER.format(body="RAISE 'no'", event='DELETE', when=f"WHEN (OLD.id = '{stuck}')"))
        )
    )
    runner = make_runner(postgres_url, relay)
    with pytest.raises(QueueError):
        runner.round()
    with pytest.raises(QueueError):
        runner.round()
    assert len(relay.taken) == 1
    sql(postgres_url, "UPDATE mailqueue_message SET lease = 1 WHERE state = 'in progress'")

    with pytest.raises(QueueError):
        runner.round()

    assert len(relay.taken) == 4
    # The first claim, which ran out, and that of now.
    assert sql(postgres_url, 'SELECT id, deaths FROM mailqueue_message') == [(stuck, 2)]


@pytest.mark.parametrize(
    ('end', 'body'),
    [
        ('settle', 'RETURN OLD'),
        ('settle', 'RETURN NULL'),
        ('keep', 'RETURN OLD'),
        ('release', 'RETURN OLD'),
        ('release', 'RETURN NULL'),
    ],
)
def test_a_trigger_that_leaves_the_row_as_it_was_is_noticed(postgres_url, sql, make_queue, told, end, body):
    queue = make_queue(postgres_url)
    claim = queue.put_claimed(FOR_TWO)
    sql(postgres_url, TRIGGER.format(body=body, event='UPDATE', when=''))

    if end == 'settle':
        assert claim.settle(Settlement((ADA,), due=0)) is not None
    elif end == 'keep':
        claim.keep((ADA,))
    else:
        claim.release()
        assert queue.flush() is not None

    assert told(level='CRITICAL', status='unsettled', id=claim.id)


def test_a_dead_letter_that_a_trigger_swallows_does_not_take_the_message_along(postgres_url, sql, make_queue, told):
    queue = make_queue(postgres_url)
    claim = queue.put_claimed(FOR_TWO)
    sql(postgres_url, TRIGGER.format(body='RETURN NULL', event='INSERT', when=''))

    assert claim.settle(Settlement(burials=(Burial((ADA,), 'no'), Burial((BOB,), 'nobody')))) is not None

    assert [state for (state,) in sql(postgres_url, 'SELECT state FROM mailqueue_message')] == ['in progress']
    assert told(level='CRITICAL', status='unsettled', id=claim.id)
