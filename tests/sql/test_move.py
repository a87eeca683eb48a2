"""``mq-queue move``: what moves, what stays, and that others may be at work meanwhile."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.exc import OperationalError

from pyramid_mailqueue.exceptions import AddressError, ConfigurationError, QueueError, WrongState
from pyramid_mailqueue.message.addresses import check_address
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues import moving
from pyramid_mailqueue.queues.entries import STATES
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir import moving as moving_maildir
from pyramid_mailqueue.queues.maildir.moving import DirectoryRecord
from pyramid_mailqueue.queues.maildir.queue_file import QueueHeader
from pyramid_mailqueue.queues.sql import moving as moving_sql
from pyramid_mailqueue.wiring import open_move
from tests.parts.databases import create_queue_tables
from tests.parts.move import FOLDER, Office, Place, break_off, touch
from tests.parts.strategies import addresses

BORN = 1_700_000_000
HEADER = QueueHeader('shop@site.example', ('ada@x.example',), BORN)


def content(number):
    return f'Message-ID: <{number}@site.example>\r\nSubject: order {number}\r\n\r\nHello\r\n'.encode()


@pytest.fixture
def place(tmp_path, url):
    return Place(tmp_path / 'queue', url)


KINDS = {
    'several recipients': (QueueHeader('a@x.example', ('b@x.example', '"c,d"@x.example', 'ü@x.example'), BORN), {}),
    'the null sender': (QueueHeader('', ('b@x.example',), BORN), {}),
    'attempts': (QueueHeader('a@x.example', ('b@x.example',), BORN, 3, BORN + 9000, '451 4.3.0 try later'), {}),
    'due later': (HEADER, {'due': 1 << 32}),
    'held': (HEADER, {'state': 'held', 'due': BORN + 1000.25}),
    'dead': (QueueHeader('a@x.example', ('b@x.example',), BORN, 9, BORN + 9, '550 no such user'), {'state': 'dead'}),
    'deaths': (HEADER, {'deaths': 3}),
}
CONTENTS = {
    'text': content(1),
    '8bit': b'Subject: \xc3\xbc\r\n\r\n\xff\xfe\x80\r\n',
    'line ends as they are': b'Subject: x\n\nbare\nlines\r\rand NUL \0',
    'nothing': b'',
    'no header': b'\r\n\r\n',
    'big': b'Subject: big\r\n\r\n' + b'x' * 76 * 200_000,
}


@pytest.mark.parametrize('kind', KINDS)
def test_a_message_moves_there_and_back_with_all_that_is_known_of_it(place, kind):
    header, options = KINDS[kind]
    place.put(content(1), header=header, **options)
    before = place.kept('maildir')

    place.move('sql')
    assert (place.kept('maildir'), place.kept('sql')) == ([], before)
    place.move('maildir')
    assert (place.kept('maildir'), place.kept('sql')) == (before, [])


@pytest.mark.parametrize('name', CONTENTS)
def test_a_content_moves_byte_for_byte(place, name):
    place.put(CONTENTS[name])

    for to in ('sql', 'maildir'):
        place.move(to)
        assert [kept.content for kept in place.kept(to)] == [CONTENTS[name]]


def _checked(address):
    try:
        return check_address(address)
    except AddressError:
        return None


SOME_ADDRESSES = addresses().map(_checked).filter(bool)
SECONDS = st.integers(0, 1 << 32)
REPLIES = st.text(' !"#abcXYZ019.-', max_size=40).map(lambda text: ' '.join(text.split()))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.builds(
        QueueHeader,
        sender=st.just('') | SOME_ADDRESSES,
        recipients=st.lists(SOME_ADDRESSES, min_size=1, max_size=4, unique=True).map(tuple),
        queued_at=SECONDS,
        attempts=st.integers(0, 999_999),
        last_attempt=SECONDS,
        last_reply=REPLIES,
    ),
    state=st.sampled_from(list(FOLDER)),
    due=SECONDS,
    deaths=st.integers(0, 4),
    data=st.binary(max_size=200),
)
def test_any_message_moves_there_and_back(place, header, state, due, deaths, data):
    place.put(data, header=header, state=state, due=due, deaths=deaths)
    before = place.kept('maildir')

    place.move('sql')
    there = place.kept('sql')
    place.move('maildir')

    assert there == place.kept('maildir') == before
    for entry in list(place.maildir.admin.entries(STATES)):
        place.maildir.admin.delete(entry.id)


def test_messages_keep_their_order_and_their_age(place):
    names = [place.put(content(n), header=QueueHeader('a@x.example', ('b@x.example',), BORN + n)) for n in range(5)]
    assert [entry.id for entry in place.maildir.admin.entries(STATES)] == names

    for to in ('sql', 'maildir'):
        place.move(to)
        with place.sql() as queue:
            admin = (queue if to == 'sql' else place.maildir).admin
            assert [entry.queued_at for entry in admin.entries(STATES)] == [BORN + n for n in range(5)]
            assert admin.oldest(STATES).queued_at == BORN


def test_a_name_of_somebody_elses_making_moves_too(place):
    place.put(content(1), name='letter')
    place.put(content(2), name='999999999999.x')

    assert place.move('sql').moved == {'waiting': 2}
    assert len(place.kept('sql')) == 2


def test_what_a_server_has_stumbled_over_waits_behind_the_others_that_are_due(place):
    stumbled = place.put(content(1), due=BORN)
    Path(place.maildir.place('new', stumbled)).rename(place.maildir.place('new', f'{stumbled},stumbles=1'))
    place.put(content(2), due=BORN + 1)

    place.move('sql')

    with place.sql() as queue:
        assert [claim.envelope.content for claim in queue.claim_due(time.time() + 1)] == [content(2), content(1)]


def test_many_messages_move_in_batches(place, monkeypatch):
    monkeypatch.setattr(moving, 'MOST_MESSAGES', 3)
    monkeypatch.setattr(moving, 'MOST_OCTETS', 2000)
    for n in range(8):
        header = HEADER._replace(queued_at=BORN + n)
        place.put(content(n) + b'x' * (700 if n < 4 else 3000 if n == 4 else 0), header=header)
    batches = []

    for to in ('sql', 'maildir'):
        place.move(to, on_batch=lambda: batches.append(1))
        assert len(place.kept(to)) == 8

    # Two and two, the large one alone, and the last three.
    assert len(batches) == 2 * 4


def test_what_somebody_holds_or_nobody_can_decide_stays_and_what_dead_deliverers_left_moves(place):
    envelope = Envelope('a@x.example', ('b@x.example',), content(1))
    claim = place.maildir.put_claimed(envelope)
    orphan = place.maildir.put_claimed(Envelope('a@x.example', ('b@x.example',), content(2)))
    orphan._file.abandon()
    staging = place.maildir.staging()
    staging.add(envelope, claimed=False)
    staging.prepare()
    staging._files[0].close()
    Path(place.maildir.place('corrupt', 'damaged')).write_bytes(b'no queue file')

    report = place.move('sql')

    assert report.moved == {'waiting': 1}
    assert [(kept.content, kept.deaths) for kept in place.kept('sql')] == [(content(2), 1)]
    assert place.counts('maildir') == {'in progress': 1, 'in doubt': 1, 'corrupt': 1}
    claim.release()
    assert place.move('sql').moved == {'waiting': 1}


def test_rows_that_somebody_has_claimed_stay_and_those_whose_lease_ran_out_move(place, sql, url):
    with place.sql() as queue, place.sql() as other:
        kept = queue.put_claimed(Envelope('a@x.example', ('b@x.example',), content(1)))
        lost = other.put_claimed(Envelope('a@x.example', ('b@x.example',), content(2)))
        sql(url, 'UPDATE mailqueue_message SET lease = 1 WHERE id = :id', id=lost.id)

        assert place.move('maildir').moved == {'waiting': 1}
        assert [(it.content, it.deaths) for it in place.kept('maildir')] == [(content(2), 1)]
        assert place.counts('sql') == {'in progress': 1}
        kept.release()


def test_a_damaged_file_stays_and_is_told_of(place):
    Path(place.maildir.place('new', 'damaged')).write_bytes(b'no queue file')
    place.put(content(1))

    report = place.move('sql')

    assert report.moved == {'waiting': 1}
    assert list(report.refused) == ['damaged']
    assert Path(place.maildir.place('new', 'damaged')).read_bytes() == b'no queue file'


def test_a_name_that_is_too_long_stays_and_is_told_of(place):
    name = place.put(content(1), name='n' * 240)
    place.put(content(2))

    report = place.move('sql')

    assert (report.moved, list(report.refused)) == ({'waiting': 1}, [name])
    assert place.counts('maildir') == {'waiting': 1}


@pytest.mark.parametrize(
    'damage',
    [
        "sender = 'a b@x.example'",
        "recipients = '[]'",
        "recipients = '5'",
        "recipients = 'not JSON'",
        'due = 9e999',
        'queued_at = 1e15',
        "id = 'x'",
    ],
)
def test_a_damaged_row_stays_as_it_is_and_is_told_of(place, sql, url, damage):
    with place.sql() as queue:
        damaged, _ = (queue.put(Envelope('a@x.example', ('b@x.example',), content(n))) for n in range(2))
    if 'sqlite' not in url:
        damage = {'due = 9e999': "due = 'Infinity'", "recipients = 'not JSON'": "recipients = '{}'"}.get(damage, damage)
    sql(url, f'UPDATE mailqueue_message SET {damage} WHERE id = :id', id=damaged)

    report = place.move('maildir')

    # An id of somebody else's making is no damage.
    stays = [] if damage.startswith('id') else [damaged]
    assert list(report.refused) == stays
    assert report.moved == {'waiting': 2 - len(stays)}
    assert place.counts('sql') == ({'waiting': 1} if stays else {})


def test_what_does_not_fit_into_the_other_queue_stays_and_the_others_move(place, sql, url):
    if url.startswith('sqlite'):
        trigger = (
            'CREATE TRIGGER no_9 BEFORE INSERT ON mailqueue_message WHEN NEW.subject LIKE :subject '
            "BEGIN SELECT RAISE(ABORT, 'too large'); END"
        ).replace(':subject', "'order 9'")
        sql(url, trigger)
    else:
        sql(url, "ALTER TABLE mailqueue_message ADD CONSTRAINT no_9 CHECK (subject <> 'order 9')")
    for n in (8, 9, 10):
        place.put(content(n))

    report = place.move('sql')

    assert report.moved == {'waiting': 2}
    assert len(report.refused) == 1
    assert [kept.content for kept in place.kept('maildir')] == [content(9)]
    assert place.in_moving() == []


def test_if_nothing_of_a_batch_fits_all_of_it_stays_and_the_move_goes_on(place, sql, url):
    if url.startswith('sqlite'):
        sql(
            url,
            "CREATE TRIGGER no BEFORE INSERT ON mailqueue_message WHEN NEW.id NOT LIKE 'probe.%' AND (NEW.state <> "
            "'in doubt' OR NEW.claim NOT LIKE '%dead') BEGIN SELECT RAISE(ABORT, 'too large'); END",
        )
    else:
        is_dead = "state = 'dead' OR claim LIKE '%dead'"
        sql(url, f"ALTER TABLE mailqueue_message ADD CONSTRAINT no CHECK ({is_dead} OR id LIKE 'probe.%')")
    names = [place.put(content(n)) for n in range(3)]
    place.put(content(3), state='dead')
    before = place.kept('maildir')

    report = place.move('sql')

    assert (report.moved, list(report.refused)) == ({'dead': 1}, names)
    assert (place.kept('maildir'), place.in_moving()) == (before[:3], [])
    assert place.counts('sql') == {'dead': 1}


# --- others at work ---------------------------------------------------------


@pytest.mark.parametrize('to', ['sql', 'maildir'])
def test_workers_on_both_queues_may_be_at_work_meanwhile(place, to, monkeypatch):
    monkeypatch.setattr(moving, 'MOST_MESSAGES', 7)
    for n in range(150):
        place.put(content(n))
    if to == 'maildir':
        place.move('sql')
    office, is_over = Office(), threading.Event()

    def work(kind):
        while not is_over.is_set():
            place.run(office, kind)

    workers = [threading.Thread(target=work, args=[kind]) for kind in ('maildir', 'sql')]
    for worker in workers:
        worker.start()
    try:
        place.move(to)
    finally:
        is_over.set()
        for worker in workers:
            worker.join()
    place.run(office, 'maildir')
    place.run(office, 'sql')

    assert sorted(office.contents) == sorted(map(content, range(150)))
    assert (place.counts('maildir'), place.counts('sql')) == ({}, {})


def test_a_second_move_of_the_same_directory_is_refused_while_the_first_is_at_work(place):
    place.put(content(1))
    refusals = []

    def try_another():
        with pytest.raises(QueueError, match='Another move is at work') as info:
            place.move('maildir')
        refusals.append(info.value)

    assert place.move('sql', on_batch=try_another).moved == {'waiting': 1}
    assert len(refusals) == 1


def test_several_directories_may_move_into_one_database_and_back_at_the_same_time(tmp_path, url, monkeypatch):
    monkeypatch.setattr(moving, 'MOST_MESSAGES', 5)
    places = [Place(tmp_path / name, url) for name in 'abc']
    for number, place in enumerate(places):
        for n in range(30):
            place.put(content(100 * number + n))

    def at_once(to):
        failures = []

        def move(place):
            try:
                place.move(to)
            except BaseException as error:  # noqa: BLE001 - told in the thread of the test
                failures.append(error)

        threads = [threading.Thread(target=move, args=[place]) for place in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    everything = sorted(content(100 * number + n) for number in range(3) for n in range(30))
    at_once('sql')
    assert [kept.content for kept in places[0].kept('sql')] == everything
    at_once('maildir')
    assert sorted(kept.content for place in places for kept in place.kept('maildir')) == everything
    assert places[0].counts('sql') == {}


def test_more_messages_move_than_are_read_at_once(place, monkeypatch):
    monkeypatch.setattr(moving_sql, 'PAGE', 3)
    monkeypatch.setattr(moving_maildir, 'SUPPLY', 3)
    for n in range(7):
        place.put(content(n))

    for to in ('sql', 'maildir'):
        assert place.move(to).moved == {'waiting': 7}


@contextlib.contextmanager
def away(is_away):
    """The database is away for the statements for which *is_away* is true."""

    def fail(_connection, _cursor, statement, *_):
        if is_away(statement):
            raise OperationalError(statement, {}, ConnectionError('the server is away'))

    event.listen(Engine, 'before_cursor_execute', fail)
    try:
        yield
    finally:
        event.remove(Engine, 'before_cursor_execute', fail)


def test_a_database_that_goes_away_before_the_decision_leaves_everything_where_it_was(place):
    for n in range(3):
        place.put(content(n))
    before = place.kept('maildir')

    with away(lambda statement: 'VALUES' in statement), pytest.raises(QueueError, match='away'):
        place.move('sql')

    assert (place.kept('maildir'), place.kept('sql'), place.in_moving()) == (before, [], [])


@pytest.mark.parametrize('to', ['sql', 'maildir'])
def test_a_database_that_goes_away_after_the_decision_leaves_it_to_the_next_move(place, to):
    for n in range(3):
        place.put(content(n))
    before = place.kept('maildir')
    if to == 'maildir':
        place.move('sql')

    is_decided = away(lambda _: any('decided' in name for name in place.in_moving()))
    with is_decided, pytest.raises(QueueError, match='away') as info:
        place.move(to)

    assert place.in_moving() != []
    if to == 'maildir':
        # Nobody holds them any more, though what has failed may still be known.
        assert place.counts('maildir') == {'in doubt': 3}, info.value
    report = place.move(to)
    assert (report.settled, report.moved) == (1, {})
    assert (place.kept(to), place.in_moving()) == (before, [])


def test_an_answer_that_was_lost_loses_no_message(postgres_url, tmp_path):
    """The rows are out of reach, but the connection broke before the database could say so; it is asked again."""
    place = Place(tmp_path / 'queue', postgres_url)
    place.put(content(1))
    place.move('sql')
    broken = []

    def break_after_commit(_connection, cursor, statement, *_):
        if statement == 'COMMIT' and not broken:
            broken.append(1)
            cursor.connection.close()
            raise psycopg.OperationalError('the connection is lost')

    with open_move(place.settings, to='maildir') as work:
        event.listen(work.source._database.engine, 'after_cursor_execute', break_after_commit)
        # With this the first COMMIT is that of what is taken.
        work._settle_all = lambda: None
        work.run()

    assert broken
    assert work.report.moved == {'waiting': 1}
    assert [kept.content for kept in place.kept('maildir')] == [content(1)]
    assert place.counts('sql') == {}


def test_what_a_lost_connection_takes_later_is_not_removed_without_a_copy(postgres_url, tmp_path):
    """The UPDATE was repeated over another connection, and took another message; then the first COMMIT arrives."""
    place = Place(tmp_path / 'queue', postgres_url)
    for n in range(2):
        place.put(content(n))
    place.move('sql')
    broken, engine = [], create_engine(postgres_url)

    def break_off_update(_connection, cursor, statement, *_):
        if 'UPDATE' in statement and not broken:
            broken.append(1)
            cursor.connection.close()
            raise psycopg.OperationalError('the connection is lost')

    with engine.connect() as late, open_move(place.settings, to='maildir') as work:
        new_batch, stage = work._decisions.new_batch, work.target.stage
        commit = threading.Timer(0.5, late.commit)

        def take_one_too_late():
            batch = new_batch()
            if not broken:
                one = 'UPDATE mailqueue_message SET claim = :claim, state = :state WHERE subject = :subject'
                of_batch = {'claim': f'move:{batch}.out.waiting', 'state': 'in doubt', 'subject': 'order 1'}
                late.execute(text(one), of_batch)
                commit.start()
                event.listen(work.source._database.engine, 'before_cursor_execute', break_off_update)
            return batch

        def stage_late(*args):
            ids = stage(*args)
            commit.join()
            return ids

        work._decisions.new_batch, work.target.stage = take_one_too_late, stage_late
        work.run()
    engine.dispose()

    assert broken
    assert [kept.content for kept in place.kept('maildir')] == [content(0), content(1)]
    assert place.counts('sql') == {}


def test_a_record_that_is_damaged_is_told_of(place):
    place.put(content(1))
    place.move('sql')
    Path(place.maildir.place('moving', '.record')).write_text('{}')

    with pytest.raises(QueueError, match=r'\.record is damaged'):
        place.move('maildir')


# --- half-way ---------------------------------------------------------------


@pytest.mark.parametrize('at', ['staged', 'decided'])
@pytest.mark.parametrize('to', ['sql', 'maildir'])
def test_what_is_half_way_is_in_doubt_in_both_queues_until_another_move_settles_it(place, sql, url, to, at):
    place.put(content(1), due=BORN)
    if to == 'maildir':
        place.move('sql')
    break_off(place, to, at=at)
    # Until then a move may be at work on it.
    assert place.counts('sql') == {}
    sql(url, 'UPDATE mailqueue_message SET lease = 1')
    office = Office()

    for kind in ('maildir', 'sql'):
        assert place.counts(kind) == {'in doubt': 1}
        assert len(place.run(office, kind).recovery.half_way) == 1
    assert office.contents == []
    with place.sql() as queue:
        for admin in (place.maildir.admin, queue.admin):
            (entry,) = admin.entries(STATES)
            assert (entry.state, admin.find(entry.id), admin.content(entry.id)) == ('in doubt', entry, content(1))
            for change in (admin.hold, admin.unhold, admin.retry, admin.release, admin.delete):
                with pytest.raises(WrongState, match='half-way'):
                    change(entry.id)

    report = place.move(to)

    assert report.settled == 1
    assert report.moved == ({'waiting': 1} if at == 'staged' else {})
    other = 'maildir' if to == 'sql' else 'sql'
    assert (place.counts(to), place.counts(other), place.in_moving()) == ({'waiting': 1}, {}, [])


def test_mq_run_tells_once_of_what_is_half_way(place, caplog):
    place.put(content(1))
    break_off(place, 'sql', at='staged')

    place.run(Office(), 'maildir')

    (record,) = [it for it in caplog.records if it.levelno == logging.CRITICAL]
    assert record.mailqueue['reason'] == 'its move to another queue was interrupted; run the move again'


def test_a_move_with_another_database_does_not_touch_what_is_half_way(place, tmp_path):
    place.put(content(1))
    break_off(place, 'sql', at='decided')
    url = f'sqlite:///{tmp_path}/other.sqlite'
    create_queue_tables(url)
    elsewhere = Place(place.maildir.path, url)

    with pytest.raises(ConfigurationError, match='half-way between this directory and'):
        elsewhere.move('sql')
    assert place.move('sql').settled == 1
    assert len(place.kept('sql')) == 1
    elsewhere.move('sql')


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('postgresql://a@db/shop', 'postgresql+psycopg2://b:secret@db:5432/shop?sslmode=require'),
        ('postgresql+psycopg://a@db/shop', 'postgresql+psycopg://a@/shop?host=db&connect_timeout=3'),
        ('postgresql://a@db/shop?options=-csearch_path%3Dours', 'postgresql://b@db/shop'),
        ('postgresql://a@/?host=/run/pg', 'postgresql://b@/a?host=/run/pg&application_name=mq'),
        ('sqlite:////srv/shop.sqlite', 'sqlite:////srv/shop.sqlite?timeout=5'),
    ],
)
def test_who_logs_in_and_how_may_change_while_something_is_half_way(tmp_path, one, other):
    assert is_refused_after(tmp_path, one, other) is False


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('postgresql://a@db/shop', 'postgresql://a@db2/shop'),
        ('postgresql://a@db/shop', 'postgresql://a@db:5433/shop'),
        ('postgresql://a@db/shop', 'postgresql://a@db/shop2'),
        ('postgresql://a@/shop?host=/run/pg', 'postgresql://a@/shop?host=/run/pg2'),
        ('postgresql://a@db/shop?dbname=x', 'postgresql://a@db/shop?dbname=y'),
        ('postgresql://a@db/', 'postgresql://b@db/'),
        ('postgresql://a@/shop?service=x', 'postgresql://a@/shop?service=y'),
        ('sqlite:////srv/shop.sqlite', 'sqlite:////srv/shop2.sqlite'),
    ],
)
def test_another_database_is_refused_while_something_is_half_way(tmp_path, one, other):
    assert is_refused_after(tmp_path, one, other) is True


def is_refused_after(tmp_path, one, other):
    """Whether a directory whose move with one database was broken off refuses a move with the other."""
    queue = MaildirQueue(tmp_path / 'queue')
    before, now = (DirectoryRecord(queue, make_url(url).render_as_string()) for url in (one, other))
    with before.alone():
        before.begin()
        before.decide(before.new_batch())
    try:
        with now.alone():
            return False
    except ConfigurationError:
        return True


def test_another_schema_is_another_database_and_the_same_one_is_not_whoever_asks(tmp_path, make_database, sql):
    here, there = (make_database('postgresql+psycopg') for _ in range(2))
    for url in (here, there):
        create_queue_tables(url)
    place, elsewhere = Place(tmp_path / 'queue', here), Place(tmp_path / 'queue', there)
    place.put(content(1))
    break_off(place, 'sql', at='decided')

    with pytest.raises(ConfigurationError, match=r'half-way between this directory and .* \(schema mq_'):
        elsewhere.move('sql')

    ((schema,),) = sql(here, 'SELECT current_schema()')
    another_way = make_url(there).update_query_dict({'options': f'-csearch_path=nowhere,{schema}'})
    assert Place(tmp_path / 'queue', another_way.render_as_string(hide_password=False)).move('sql').settled == 1
    assert len(place.kept('sql')) == 1


def test_a_record_that_a_former_version_has_written_is_read(place):
    place.put(content(1))
    break_off(place, 'sql', at='decided')
    path = Path(place.maildir.place('moving', '.record'))
    record = json.loads(path.read_bytes())
    del record['schema']
    path.write_text(json.dumps(record))

    assert place.move('sql').settled == 1


def test_a_copy_of_the_directory_leaves_alone_what_the_original_has_under_way(place, tmp_path):
    place.put(content(1))
    place.move('sql')
    copy = Place(tmp_path / 'copy', place.settings.sql_url)
    Path(copy.maildir.place('moving')).mkdir()
    for name in ('.record', '.lock'):
        Path(copy.maildir.place('moving', name)).write_bytes(Path(place.maildir.place('moving', name)).read_bytes())
    place.put(content(2))
    break_off(place, 'sql', at='staged')

    assert copy.move('sql').settled == 0
    assert place.move('sql').settled == 1
    assert [kept.content for kept in place.kept('sql')] == [content(1), content(2)]


def test_what_a_statement_wrote_after_its_process_had_died_is_removed_by_a_later_move(place, sql, url):
    """The INSERT reaches the database when the next move has put the messages back already."""
    place.put(content(1))
    break_off(place, 'sql', at='staged')
    columns = 'due, attempts, deaths, queued_at, last_reply, sender, recipients, message_id, subject, content'
    late = sql(url, f'SELECT claim, {columns} FROM mailqueue_message')[0]
    place.move('sql')
    place.move('maildir')
    names = [f':c{n}' for n in range(11)]
    values = {f'c{n}': value if not isinstance(value, list) else json.dumps(value) for n, value in enumerate(late)}
    sql(
        url,
        f'INSERT INTO mailqueue_message (id, state, lease, claim, {columns}) '
        f"VALUES ('0', 'in doubt', 1, {', '.join(names)})",
        **values,
    )

    assert place.counts('sql') == {'in doubt': 1}
    place.move('sql')

    assert place.counts('sql') == {'waiting': 1}


def test_a_removal_that_arrives_after_its_process_has_died_does_no_harm(postgres_url, tmp_path):
    """The COMMIT of the DELETE is still on its way when the next move begins."""
    place = Place(tmp_path / 'queue', postgres_url)
    place.put(content(1))
    place.move('sql')
    break_off(place, 'maildir', at='decided')
    engine = create_engine(postgres_url)

    with engine.connect() as late, late.begin():
        late.exec_driver_sql('DELETE FROM mailqueue_message')
        mover = threading.Thread(target=place.move, args=['maildir'])
        mover.start()
        time.sleep(0.5)
    mover.join()
    engine.dispose()

    assert [kept.content for kept in place.kept('maildir')] == [content(1)]
    assert (place.counts('sql'), place.in_moving()) == ({}, [])


def test_what_is_half_way_can_be_moved_back_instead(place):
    for n in range(3):
        place.put(content(n))
    break_off(place, 'sql', at='decided')

    assert place.move('maildir').settled == 1
    assert [kept.content for kept in place.kept('maildir')] == [content(n) for n in range(3)]
    assert place.counts('sql') == {}


def test_somebody_who_looks_at_what_is_half_way_does_not_keep_it_from_being_settled(place):
    place.put(content(1))
    break_off(place, 'sql', at='staged')
    (name,) = place.in_moving()
    looked_at = place.maildir.hold('moving', name)
    threading.Timer(0.2, looked_at.close).start()

    assert place.move('sql').settled == 1
    assert place.counts('sql') == {'waiting': 1}


def test_the_log_says_where_a_message_went(place, caplog):
    caplog.set_level(logging.INFO, 'mailqueue.queue_log')
    name = place.put(content(1))

    place.move('sql')

    (event,) = [it.mailqueue for it in caplog.records if getattr(it, 'mailqueue', {}).get('status') == 'moved']
    with place.sql() as queue:
        assert (event['id'], event['new_id']) == (name, next(queue.admin.entries(STATES)).id)


def test_a_move_that_is_told_to_stop_does_so_between_two_batches(place, monkeypatch):
    monkeypatch.setattr(moving, 'MOST_MESSAGES', 1)
    for n in range(3):
        place.put(content(n))
    done = []

    report = place.move('sql', is_stopped=lambda: bool(done), on_batch=lambda: done.append(1))

    assert (report.moved, report.is_complete) == ({'waiting': 1}, False)
    assert (place.counts('sql'), place.counts('maildir')) == ({'waiting': 1}, {'waiting': 2})


def test_new_mail_wakes_whoever_listens(postgres_url, tmp_path):
    place = Place(tmp_path / 'queue', postgres_url + '&application_name=test')
    place.settings = place.settings.__class__(queue_dir=place.settings.queue_dir, sql_url=postgres_url, sql_notify=True)
    place.put(content(1))
    heard = threading.Event()

    with place.sql(notify=True) as queue, queue.listening(heard.set):
        place.move('sql')
        assert heard.wait(30)


def test_a_session_that_commits_without_waiting_for_the_disk_is_not_relied_upon(postgres_url, tmp_path, sql):
    separator = '&' if '?' in postgres_url else '?'
    url = f'{postgres_url}{separator}application_name=mq'.replace('options=', 'options=-csynchronous_commit%3Doff%20')
    place = Place(tmp_path / 'queue', url)
    place.put(content(1))
    (before,) = sql(url, 'SHOW synchronous_commit')
    settings_seen = []

    with open_move(place.settings, to='sql') as work:
        transact = work.target._database.transact

        def watched(do, seconds):
            def and_look(connection):
                result = do(connection)
                settings_seen.append(connection.exec_driver_sql('SHOW synchronous_commit').scalar())
                return result

            return transact(and_look, seconds)

        work.target._database.transact = watched
        work.run()

    assert before == ('off',)
    assert set(settings_seen) == {'on'}


def test_due_times_survive_in_part_of_a_second(place):
    name = place.put(content(1))
    touch(place.maildir.place('new', name), BORN + 0.125)

    for to in ('sql', 'maildir'):
        place.move(to)
        assert [kept.due for kept in place.kept(to)] == [BORN + 0.125]
