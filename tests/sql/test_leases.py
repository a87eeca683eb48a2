"""Claims that are leases: how they are prolonged, lost, and ended."""

from __future__ import annotations

import logging
import math
import threading

import pytest
from sqlalchemy import event

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.exceptions import QueueError, QueueFileError
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.sql import leases as sql_leases
from pyramid_mailqueue.queues.sql.database import Database, DatabaseAway
from pyramid_mailqueue.queues.sql.leases import BATCH
from pyramid_mailqueue.queues.sql.new_message import NewMessage
from pyramid_mailqueue.queues.sql.queue import MAX_DEATHS
from pyramid_mailqueue.queues.sql.tables import INLINE
from pyramid_mailqueue.results import Burial, Settlement
from tests.parts.children import run_in_child

ADA, BOB = 'ada@x.example', 'bob@x.example'
FOR_TWO = Envelope('shop@site.example', (ADA, BOB), b'Message-ID: <2@site.example>\r\n\r\nHello.\r\n')
LATER = 2_000_000_000


@pytest.fixture
def run_out(sql):
    """Let all leases run out, as if their processes had been silent for long."""
    return lambda url: sql(url, "UPDATE mailqueue_message SET lease = 1 WHERE state = 'in progress'")


@pytest.fixture
def rows(sql, url):
    return lambda: sql(url, 'SELECT id, state, claim, attempts, deaths FROM mailqueue_message ORDER BY id')


@pytest.fixture
def make_proven(make_queue, envelope):
    """Make a queue that has written an end before: the first is written at once."""

    def make_proven(url):
        queue = make_queue(url)
        queue.put_claimed(envelope).settle(Settlement())
        return queue

    return make_proven


@pytest.fixture
def impatient(monkeypatch):
    """What has failed is tried again soon."""
    monkeypatch.setattr(sql_leases, 'PATIENCE', 0.01)


def is_held(queue):
    """Whether the heartbeat still has something to prolong or to write."""
    return queue.leases._has_work


# --- lost claims ------------------------------------------------------------


def test_a_message_whose_lease_has_run_out_waits_again(url, make_queue, envelope, run_out):
    queue, other = make_queue(url), make_queue(url)
    claim = queue.put_claimed(envelope)
    assert other.recover(LATER).orphans == ()
    run_out(url)

    assert other.recover(LATER).orphans == (claim.id,)

    (again,) = other.claim_due(LATER)
    assert (again.id, again.envelope) == (claim.id, envelope)


ENDS = {
    'done': lambda claim: claim.settle(Settlement()),
    'deferred': lambda claim: claim.settle(Settlement((ADA,), due=LATER)),
    'buried': lambda claim: claim.settle(Settlement(burials=(Burial((ADA,), 'no'), Burial((BOB,), 'no')))),
    'kept': lambda claim: claim.keep((BOB,)),
    'released': lambda claim: claim.release(),
}


@pytest.mark.parametrize('end', ENDS.values(), ids=ENDS)
def test_who_has_lost_a_message_changes_nothing(url, make_queue, run_out, rows, end, caplog):
    caplog.set_level(logging.WARNING)
    queue, other = make_queue(url), make_queue(url)
    lost = queue.put_claimed(FOR_TWO)
    run_out(url)
    other.recover(LATER)
    (claim,) = other.claim_due(LATER)
    before = rows()

    end(lost)
    queue.flush()

    assert rows() == before
    assert 'status=lost' in caplog.text
    assert lost.is_over
    assert claim.is_valid()


def test_who_was_away_for_long_asks_the_database(url, make_queue, envelope, run_out):
    queue, other = make_queue(url, lease=60), make_queue(url)
    mine, lost = queue.put_claimed(envelope), queue.put_claimed(envelope)
    run_out(url)
    other.recover(LATER)
    other.claim(lost.id)
    # In the meantime nobody has taken the other one, and it was not even given back.
    sql_back = queue.claim(mine.id)
    queue.leases.timer = lambda: sql_leases.elapsed() + 50

    assert not mine.is_valid()
    assert not lost.is_valid()
    assert sql_back.is_valid()
    assert sql_back.deadline > queue.leases.timer() + 55


def test_a_claim_that_nobody_has_taken_goes_on_after_its_lease(url, make_queue, envelope, run_out):
    queue = make_queue(url, lease=60)
    claim = queue.put_claimed(envelope)
    run_out(url)
    queue.leases.timer = lambda: sql_leases.elapsed() + 1000

    assert claim.is_valid()
    assert make_queue(url).recover(LATER).orphans == ()


def test_nothing_is_asked_while_there_is_time(url, make_queue, envelope, monkeypatch):
    queue = make_queue(url)
    claim = queue.put_claimed(envelope)
    monkeypatch.setattr(queue.database, 'run', None)

    assert claim.is_valid()


def test_a_message_that_outlives_too_many_deliverers_is_given_up(url, make_queue, envelope, run_out):
    queue = make_queue(url)
    name = queue.put(envelope)
    for _ in range(MAX_DEATHS - 1):
        lost = queue.claim(name)
        run_out(url)
        assert queue.recover(LATER).orphans == (name,) == (lost.id,)
    lost = queue.claim(name)
    run_out(url)

    assert queue.recover(LATER).buried == (name,) == (lost.id,)

    (dead,) = queue.admin.entries(['dead'])
    assert (dead.id, dead.recipients) == (name, (ADA,))
    assert f'died, or was cut off, {MAX_DEATHS} times' in dead.last_reply


def test_what_has_outlived_a_deliverer_comes_behind_all_that_is_due(url, make_queue, envelope, run_out):
    queue = make_queue(url)
    first, second = queue.put(envelope), queue.put(envelope)
    lost = queue.claim(first)
    run_out(url)
    queue.recover(LATER)

    assert lost.begin()
    assert [(claim.id, claim.deaths) for claim in queue.claim_due(LATER)] == [(second, 0), (first, 1)]


@pytest.mark.parametrize(
    'make_progress',
    [lambda claim: claim.settle(Settlement((ADA,), due=1)), lambda claim: claim.keep((ADA,))],
    ids=['the attempt ends', 'some have it'],
)
def test_progress_ends_the_count_of_deaths(url, make_queue, envelope, run_out, rows, make_progress):
    queue = make_queue(url)
    name = queue.put(envelope)
    lost = queue.claim(name)
    run_out(url)
    queue.recover(LATER)
    deaths = [rows()[0][4]]
    claim = queue.claim(name)
    make_progress(claim)
    claim.release()
    deaths.append(rows()[0][4])

    assert (deaths, lost.id) == ([1, 0], name)


def test_a_person_may_do_something_with_a_message_whose_deliverer_died(url, make_queue, envelope, run_out):
    queue = make_queue(url)
    held, deleted, retried = (queue.put_claimed(envelope).id for _ in range(3))
    run_out(url)

    assert queue.admin.hold(held).state == 'held'
    assert queue.admin.retry(retried).state == 'waiting'
    queue.admin.delete(deleted)
    assert queue.counts() | {'waiting': 1, 'held': 1} == queue.counts()


def test_in_a_forked_child_claims_are_the_parents(postgres_url, make_queue, envelope):
    queue = make_queue(postgres_url)
    claim = queue.put_claimed(envelope)

    def work():
        claim.settle(Settlement())
        claim.release()
        queue.flush()
        return claim.is_valid(), queue.counts()['in progress'], queue.put(envelope)

    valid, in_progress, name = run_in_child(work)

    assert (valid, in_progress) == (False, 1)
    assert claim.is_valid()
    assert queue.claim(name).envelope == envelope


@pytest.mark.parametrize('url', ['postgresql+psycopg', 'postgresql+psycopg2'], indirect=True)
def test_both_drivers_say_and_hear_the_same(url, make_queue, rows):
    queue = make_queue(url)
    content = b'Subject: all of them\r\n\r\n' + bytes({*range(256)} - {*b'\r\n'}) + b"%s %(x)s \\ '\r\n"
    names = [queue.put(Envelope('shop@site.example', (ADA, f"{it}'%s{{}}@x.example"), content)) for it in range(4)]
    claims = queue._claim_after((-math.inf, ''), LATER, 10)

    assert [(it.id, it.envelope.recipients[1], it.envelope.content) for it in claims] == [
        (name, f"{it}'%s{{}}@x.example", content) for it, name in enumerate(names)
    ]
    queue.leases._renew(claims)
    for claim, end in zip(claims, ENDS.values(), strict=False):
        end(claim)
    queue.flush()
    assert [row[:3] for row in rows()[:2]] == [(names[1], 'waiting', None), (names[2], 'dead', None)]
    assert names[0] not in {row[0] for row in rows()}
    assert claims[3].is_valid()


# --- the heartbeat ----------------------------------------------------------


def test_leases_are_prolonged_while_the_process_lives(url, make_queue, envelope, sql, until):
    queue = make_queue(url, lease=1.5)
    claims = [queue.put_claimed(envelope) for _ in range(3)]
    ((first,),) = sql(url, 'SELECT min(lease) FROM mailqueue_message')

    until(lambda: sql(url, 'SELECT min(lease) FROM mailqueue_message')[0][0] > first + 1)

    assert make_queue(url).recover(LATER).orphans == ()
    assert all(claim.is_valid() for claim in claims)


def test_the_heartbeat_finds_out_what_was_lost(url, make_queue, envelope, run_out, until, caplog):
    caplog.set_level(logging.WARNING)
    queue, other = make_queue(url, lease=1), make_queue(url)
    lost = queue.put_claimed(envelope)
    run_out(url)
    other.recover(LATER)
    other.claim(lost.id)

    until(lambda: f'status=lost id={lost.id}' in caplog.text)
    assert lost.is_over


def test_what_is_done_is_deleted_with_others_a_little_later(url, make_queue, envelope, rows, until):
    queue = make_queue(url)
    for _ in range(3):
        queue.put_claimed(envelope).settle(Settlement())

    until(lambda: not rows())


def test_where_there_is_little_to_do_what_is_done_is_deleted_at_once(
    url, make_proven, envelope, rows, monkeypatch, until
):
    queue = make_proven(url)
    monkeypatch.setattr(sql_leases, 'LINGER', 1000)
    monkeypatch.setattr(sql_leases, 'RESTS', 1_000_000)
    first, second = queue.put_claimed(envelope), queue.put_claimed(envelope)

    first.settle(Settlement())
    until(lambda: [row[0] for row in rows()] == [second.id])
    # The next one comes before the heartbeat has rested.
    second.settle(Settlement())
    queue.flush()
    assert rows() == []


def test_while_a_batch_is_done_and_not_deleted_nobody_goes_on(postgres_url, make_proven, envelope, sql, monkeypatch):
    queue = make_proven(postgres_url)
    claims = [queue.put_claimed(envelope) for _ in range(BATCH)]
    may_write, run = threading.Event(), Database.run

    def run_later(database, *work):
        may_write.wait(30)
        return run(database, *work)

    monkeypatch.setattr(Database, 'run', run_later)
    left = []

    def settle_the_last():
        claims[-1].settle(Settlement())
        left.append(sql(postgres_url, 'SELECT count(*) FROM mailqueue_message'))

    for claim in claims[:-1]:
        claim.settle(Settlement())
    thread = threading.Thread(target=settle_the_last)
    thread.start()
    thread.join(0.1)
    assert left == []
    may_write.set()
    thread.join()

    assert left == [[(0,)]]


def test_the_thread_ends_when_there_is_nothing_to_do(url, make_queue, envelope, until, monkeypatch):
    monkeypatch.setattr(sql_leases, 'IDLE', 0.01)
    queue = make_queue(url)
    queue.put_claimed(envelope).settle(Settlement())

    until(lambda: queue.leases._thread is None)
    queue.put_claimed(envelope).settle(Settlement())
    until(lambda: not is_held(queue))
    assert queue.counts()['in progress'] == 0


def test_where_no_thread_can_be_started_what_is_done_is_deleted_at_once(url, make_queue, envelope, rows, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr('threading.Thread.start', refuse)
    queue = make_queue(url)
    queue.put_claimed(envelope).settle(Settlement())

    assert rows() == []


# --- a database that is away ------------------------------------------------


@pytest.fixture
def away(monkeypatch):
    """Nothing can be said to the database while the returned list is not empty: its first error is raised."""
    reasons = []
    run = Database.run

    def run_or_not(database, *work):
        if reasons:
            raise reasons[0]
        return run(database, *work)

    monkeypatch.setattr(Database, 'run', run_or_not)
    return reasons


AWAY = DatabaseAway('the database is away')

# Of a driver, of this package, of the machine.
DEFECTS = {type(it).__name__: it for it in (TypeError('a defect'), MemoryError(), OSError('of a driver'))}


@pytest.mark.parametrize('end', ENDS.values(), ids=ENDS)
def test_what_cannot_be_written_is_written_when_the_database_is_back(
    url, make_queue, rows, end, away, until, monkeypatch, caplog
):
    monkeypatch.setattr(sql_leases, 'PATIENCE', 0.01)
    queue = make_queue(url)
    claim = queue.put_claimed(FOR_TWO)
    away.append(AWAY)
    end(claim)
    queue.flush()
    before = rows()
    away.clear()
    claim.release()

    until(lambda: rows() != before)
    assert [state for _, state, *_ in rows() if state == 'in progress'] == []
    assert [record.levelname for record in caplog.records if 'the database is away' in record.getMessage()]


@pytest.mark.usefixtures('impatient')
@pytest.mark.parametrize('defect', DEFECTS.values(), ids=DEFECTS)
@pytest.mark.parametrize('end', ['done', 'deferred', 'buried', 'released'])
def test_what_a_defect_keeps_from_being_written_is_written_later(
    url, make_queue, rows, end, defect, away, until, caplog
):
    queue = make_queue(url)
    claim = queue.put_claimed(FOR_TWO)
    away.append(defect)
    ENDS[end](claim)
    queue.flush()
    before = rows()
    away.clear()

    until(lambda: rows() != before)
    assert 'in progress' not in {state for _, state, *_ in rows()}
    unsettled, told = [record.getMessage() for record in caplog.records if record.levelname == 'CRITICAL']
    assert unsettled.startswith(f'status=unsettled id={claim.id} ')
    assert told == f'A defect of pyramid_mailqueue is in the way of {claim.id}'


@pytest.mark.parametrize('interruption', [KeyboardInterrupt, SystemExit])
def test_what_an_interruption_keeps_from_being_written_is_written_later(
    url, make_queue, envelope, rows, away, until, interruption
):
    queue = make_queue(url)
    claim = queue.put_claimed(envelope)
    away.append(interruption())
    with pytest.raises(interruption):
        claim.settle(Settlement((ADA,), due=LATER))
    away.clear()

    until(lambda: [row[1] for row in rows()] == ['waiting'])


def test_one_message_that_cannot_be_written_keeps_no_other_from_it(url, make_queue, envelope, rows, until, monkeypatch):
    monkeypatch.setattr(sql_leases, 'PATIENCE', 0.01)
    queue = make_queue(url)
    claims = [queue.put_claimed(envelope) for _ in range(3)]
    settle = sql_leases.settle

    def settle_or_not(connection, claim, **others):
        if claim is claims[0]:
            raise TypeError('a defect')
        return settle(connection, claim=claim, **others)

    monkeypatch.setattr(sql_leases, 'settle', settle_or_not)
    for claim in claims:
        claim.settle(Settlement((ADA,), due=LATER))

    until(lambda: [row[1] for row in rows()] == ['in progress', 'waiting', 'waiting'])
    monkeypatch.undo()
    until(lambda: {row[1] for row in rows()} == {'waiting'})


def test_the_heartbeat_outlives_a_defect(url, make_queue, envelope, away, until, monkeypatch, caplog):
    monkeypatch.setattr(sql_leases, 'PATIENCE', 0.01)
    queue = make_queue(url, lease=1)
    claim = queue.put_claimed(envelope)
    away.append(TypeError('a defect'))
    until(lambda: 'could not be prolonged' in caplog.text)
    away.clear()
    before = claim.deadline

    until(lambda: claim.deadline > before)


def test_who_asks_for_one_message_hears_that_the_database_is_away(url, make_queue, envelope, away):
    queue = make_queue(url)
    name = queue.put(envelope)
    away.append(AWAY)
    with pytest.raises(QueueError, match='the database is away'):
        queue.claim(name)
    away.clear()

    assert queue.claim(name)


def test_nothing_is_sent_of_which_nobody_knows_whose_it_is(url, make_queue, envelope, away, caplog):
    queue = make_queue(url)
    claim = queue.put_claimed(envelope)
    queue.leases.timer = lambda: sql_leases.elapsed() + 1000
    away.append(AWAY)

    assert not claim.is_valid()
    assert 'is not sent now' in caplog.text
    away.clear()
    assert claim.is_valid()


def test_the_heartbeat_tries_again_soon(url, make_queue, envelope, away, until, monkeypatch, caplog):
    monkeypatch.setattr(sql_leases, 'PATIENCE', 0.01)
    queue = make_queue(url, lease=1)
    away.append(AWAY)
    claim = NewMessage.made_of(envelope, queue.leases, claimed=True).claim
    queue.leases.hold([claim])
    until(lambda: 'could not be prolonged' in caplog.text)
    away.clear()

    until(lambda: claim.is_over)


def test_what_the_database_refuses_is_told_and_keeps_others_back(postgres_url, make_queue, envelope, sql, caplog):
    queue = make_queue(postgres_url)
    claims = [queue.put_claimed(envelope) for _ in range(3)]
    sql(postgres_url, 'ALTER TABLE mailqueue_message RENAME TO elsewhere')

    claims[0].settle(Settlement((ADA,), due=1))
    claims[1].keep((ADA,))

    told = [record.mailqueue['id'] for record in caplog.records if record.levelname == 'CRITICAL']
    assert told == [claim.id for claim in claims[:2]]
    assert not claims[2].is_valid()
    sql(postgres_url, 'ALTER TABLE elsewhere RENAME TO mailqueue_message')
    assert queue.flush() is None
    assert claims[2].is_valid()
    assert queue.counts()['waiting'] == 1


# --- contents ---------------------------------------------------------------


def test_small_contents_are_read_together_and_a_large_one_when_it_is_asked_for(url, make_queue):
    queue = make_queue(url)
    sizes = {queue.put(Envelope('', (ADA,), b'x' * size)): size for size in (10, 20, INLINE + 1, 30)}
    claims = queue._claim_after((-1, ''), LATER, 4)
    statements = []
    event.listen(queue.database.engine, 'before_cursor_execute', lambda *it: statements.append(it[2]))

    seen = {claim.id: len(claim.envelope.content) for claim in claims}

    assert seen == sizes
    assert len(statements) == 2


# --- damaged rows -----------------------------------------------------------


def test_a_row_that_is_no_message_is_put_aside(url, make_queue, envelope, sql, caplog):
    queue = make_queue(url)
    name = queue.put(envelope)
    sql(url, "UPDATE mailqueue_message SET sender = 'no address'")
    claim = queue.claim(name)

    with pytest.raises(QueueFileError, match='its row is damaged'):
        assert claim.envelope
    claim.release()

    (entry,) = queue.admin.entries(['corrupt'])
    assert (entry.id, 'no address' in entry.last_reply) == (name, True)
    assert queue.admin.content(name) == envelope.content
    assert list(queue.claim_due(LATER)) == []
    queue.admin.delete(name)
    assert not any(queue.counts().values())


def test_a_message_that_somebody_else_has_cannot_be_read(url, make_queue, envelope, run_out, caplog):
    caplog.set_level(logging.WARNING)
    queue = make_queue(url)
    name = queue.put(envelope)
    lost = queue.claim(name)
    run_out(url)
    queue.recover(LATER)
    caplog.clear()

    MessageHandler([]).deliver(lost)

    assert [record.levelname for record in caplog.records] == ['WARNING']
    assert f'status=lost id={name}' in caplog.text
    with pytest.raises(QueueError, match='another process has it'):
        assert lost.envelope
