"""What a person may see and do in a queue directory, beside those who deliver from it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import socket
import time
from functools import partial
from pathlib import Path

import pytest

from pyramid_mailqueue.delivery.retry import ExponentialBackoff
from pyramid_mailqueue.exceptions import NoSuchMessage, QueueError, WrongState
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.entries import STATES, UNDELIVERED, ExactId, QueueEntry
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir import admin as maildir_admin
from pyramid_mailqueue.queues.maildir.folders import MaildirFolders
from pyramid_mailqueue.queues.maildir.locked_file import LockedFile
from pyramid_mailqueue.queues.maildir.queue_file import QueueHeader, read_header, serialize_header
from pyramid_mailqueue.results import Burial, Reply, SendResult, Settlement
from tests.parts.children import Child, no_open_files_are_left
from tests.parts.clock import Clock
from tests.parts.faults import CAN_FAIL, Fault, intercepted, without_sync
from tests.parts.maildir import CONTENT, ENVELOPE, HOUR, LATER, Told, at, claim, clear, forget, put, stage, where
from tests.parts.witnesses import Notes

NOW = 1_800_000_000
DAY = 24 * HOUR
GARBAGE = b'not a queue file'


@pytest.fixture
def clock():
    return Clock(NOW)


@pytest.fixture
def queue(tmp_path, clock):
    return MaildirQueue(tmp_path / 'queue', clock=clock)


@pytest.fixture
def admin(queue):
    return queue.admin


@pytest.fixture
def told(caplog):
    return Told(caplog)


def waiting(queue, *, due=NOW, envelope=ENVELOPE):
    return put(queue, envelope, due=due)


def held(queue):
    return queue.admin.hold(waiting(queue)).id


def dead(queue, envelope=ENVELOPE, reason='550 5.1.1 no such user'):
    queue.put_claimed(envelope).settle(Settlement(burials=(Burial(envelope.recipients, reason),)))
    (path,) = at(queue, 'dead').glob(f'{int(queue.clock())}.*')
    return path.name


def in_doubt(queue, envelope=ENVELOPE):
    staging = stage(queue, (envelope, False))
    name = staging._files[0].name
    forget(staging)
    return name


def orphan(queue):
    left = queue.put_claimed(ENVELOPE)
    forget(left)
    return left.id


def corrupt(queue):
    at(queue, 'corrupt', 'damaged').write_bytes(GARBAGE)
    return 'damaged'


EVERYTHING = {
    'waiting': waiting,
    'in progress': orphan,
    'held': held,
    'dead': dead,
    'in doubt': in_doubt,
    'corrupt': corrupt,
}


def header_of(queue, folder, name):
    with at(queue, folder, name).open('rb') as fp:
        return read_header(fp), fp.read()


def listed(admin, states=STATES):
    return [(entry.id, entry.state) for entry in admin.entries(states)]


# --- what there is ----------------------------------------------------------


def test_a_message_tells_all_there_is_to_know_of_it(queue, admin, clock):
    name = waiting(queue)
    taken = claim(queue, now=NOW)
    clock.now += 60
    taken.settle(Settlement(('b@x.example',), due=NOW + HOUR, last_reply='451 4.3.0 later'))

    assert list(admin.entries(['waiting'])) == [
        QueueEntry(
            id=name,
            state='waiting',
            sender='sender@site.example',
            recipients=('b@x.example',),
            retries=1,
            queued_at=NOW,
            due=NOW + HOUR,
            last_attempt=NOW + 60,
            last_reply='451 4.3.0 later',
            subject='hello',
            message_id='<1@site.example>',
            size=len(CONTENT),
        )
    ]


def test_each_state_has_its_messages(queue, admin):
    ids = {state: make(queue) for state, make in EVERYTHING.items()}

    assert {state: name for name, state in listed(admin)} == ids
    for state, name in ids.items():
        assert listed(admin, [state]) == [(name, state)]
        assert admin.find(name).state == state
    assert list(EVERYTHING) == list(STATES)


@pytest.mark.parametrize('state', STATES)
def test_only_what_may_be_tried_again_has_a_due_time(queue, admin, state):
    EVERYTHING[state](queue)

    (entry,) = admin.entries([state])

    assert (entry.due is not None) == (state in {'waiting', 'held'})


def test_messages_are_listed_oldest_first_whatever_their_state(queue, admin, clock, monkeypatch):
    monkeypatch.setattr(maildir_admin, 'SORTED_AT_ONCE', 2)
    ids = []
    for make in (dead, waiting, in_doubt, held, orphan, waiting):
        clock.now += 1
        ids.append(make(queue))

    assert [name for name, _ in listed(admin)] == ids


def test_a_name_that_somebody_else_has_given_is_in_its_place_too(queue, admin, clock):
    ids = []
    for name in ('zebra', 'Michelle', 'apple'):
        clock.now += 60
        at(queue, 'new', name).write_bytes(serialize_header(QueueHeader('', ('a@x.example',), clock.now)) + CONTENT)
        ids.append(name)
        clock.now += 60
        ids.append(waiting(queue))
    at(queue, 'corrupt', 'oldest').write_bytes(GARBAGE)
    os.utime(queue.place('corrupt', 'oldest'), (1, 1))

    assert [name for name, _ in listed(admin)] == ['oldest', *ids]


def test_a_damaged_file_is_corrupt_wherever_it_is(queue, admin):
    name = waiting(queue)
    at(queue, 'new', name).write_bytes(GARBAGE)

    (entry,) = admin.entries(['corrupt'])

    assert (entry.id, entry.state, entry.size, entry.sender) == (name, 'corrupt', len(GARBAGE), None)
    assert entry.last_reply.startswith('The line "X-Queue-Meta-End: end" is missing')
    assert listed(admin, ['waiting']) == []


def test_what_is_about_to_be_published_is_not_shown(queue, admin):
    staging = stage(queue, (ENVELOPE, False))
    name = staging._files[0].name

    assert listed(admin) == []
    with pytest.raises(NoSuchMessage, match=f'{name} is on its way'):
        admin.find(name)
    staging.publish()
    assert admin.find(name).state == 'waiting'


def test_what_vanishes_while_it_is_listed_is_not_missed(queue, admin):
    names = [waiting(queue) for _ in range(3)]
    found = admin.entries(STATES)
    first = next(found)
    at(queue, 'new', names[1]).unlink()

    assert [first.id, *(entry.id for entry in found)] == [names[0], names[2]]


def test_what_is_no_message_is_not_shown(queue, admin, tmp_path):
    for folder in ('prepared', 'new', 'cur', 'held', 'dead', 'corrupt'):
        at(queue, folder, '.hidden').write_bytes(GARBAGE)
        at(queue, folder, 'folder').mkdir()
        at(queue, folder, 'link').symlink_to(tmp_path / 'secret')
        os.mkfifo(queue.place(folder, 'fifo'))
        os.chdir(queue.place(folder))
        with socket.socket(socket.AF_UNIX) as server:
            server.bind('socket')
    (tmp_path / 'secret').write_bytes(b'a secret')

    assert listed(admin) == []
    for name in ('.hidden', 'folder', 'link', 'fifo', 'socket'):
        for method in (admin.find, admin.content, admin.delete, admin.hold):
            with pytest.raises(NoSuchMessage, match='There is no message in the queue'):
                method(name)


def test_a_link_that_takes_the_place_of_a_message_is_not_followed(queue, admin, tmp_path, monkeypatch):
    (tmp_path / 'secret').write_bytes(b'a secret')
    name = waiting(queue)
    real = admin._locate
    monkeypatch.setattr(admin, '_locate', lambda named: (real(named), replace())[0])

    def replace():
        if not at(queue, 'new', name).is_symlink():
            at(queue, 'new', name).unlink()
            at(queue, 'new', name).symlink_to(tmp_path / 'secret')

    with pytest.raises(QueueError, match='cannot be read: Too many levels of symbolic links'):
        admin.content(name)


def test_a_file_that_may_not_be_opened_is_shown_with_the_reason(queue, admin):
    name = waiting(queue)

    with intercepted(Fault('EMFILE', 2)):
        (entry,) = admin.entries(['waiting'])

    assert (entry.id, entry.state) == (name, 'waiting')
    assert entry.last_reply == 'This file cannot be read: Too many open files.'


def test_a_folder_that_is_missing_is_an_error(queue, admin):
    at(queue, 'held').rmdir()

    with pytest.raises(QueueError, match=f'The folder {queue.place("held")} cannot be read: No such file'):
        list(admin.entries(['held']))


def test_looking_at_messages_changes_and_holds_nothing(queue, admin):
    for make in EVERYTHING.values():
        make(queue)
    before = {path: path.stat() for path in Path(queue.path).rglob('*')}

    with no_open_files_are_left():
        listed(admin)
        admin.stats(UNDELIVERED)
        admin.oldest(STATES)
        for entry in admin.entries(STATES):
            admin.content(entry.id)

    after = {path: path.stat() for path in Path(queue.path).rglob('*')}
    assert after.keys() == before.keys()
    assert [stat.st_mtime_ns for stat in after.values()] == [stat.st_mtime_ns for stat in before.values()]


def test_the_content_is_byte_for_byte_and_of_a_damaged_file_all_there_is(queue, admin):
    bare = serialize_header(QueueHeader('', ('a@x.example',), NOW)) + b'Subject: bare\n\n\x00\xff\n'
    at(queue, 'dead', 'bare').write_bytes(bare)

    assert admin.content(waiting(queue)) == CONTENT
    assert admin.content('bare') == b'Subject: bare\n\n\x00\xff\n'
    assert admin.content(corrupt(queue)) == GARBAGE


def test_stats_count_everything(queue, admin, clock):
    for make in EVERYTHING.values():
        make(queue)
    clock.now += 600

    stats = admin.stats(['dead'])

    assert {state: counted.messages for state, counted in stats.by_state.items()} == dict.fromkeys(STATES, 1)
    assert stats.by_state['waiting'].by_age[1] == 1
    assert list(stats.by_domain) == ['x.example']


def test_the_oldest_is_the_one_that_has_been_in_the_queue_for_the_longest_time(queue, admin, clock, monkeypatch):
    monkeypatch.setattr(maildir_admin, 'OLDEST_FEW', 2)
    for _ in range(3):
        dead(queue)
        clock.now += 1
    clock.now += DAY
    oldest = waiting(queue)
    clock.now += 2
    waiting(queue)
    for name, _ in listed(admin, ['dead']):
        # They have an old name, and a new start.
        admin.retry(name)
    corrupt(queue)

    assert admin.oldest(STATES).id == oldest
    assert admin.oldest(['dead']) is None


def test_the_names_are_not_read_once_for_every_few_messages_with_a_new_start(queue, admin, clock, monkeypatch):
    monkeypatch.setattr(maildir_admin, 'OLDEST_FEW', 1)
    for _ in range(30):
        dead(queue)
        clock.now += 1
    clock.now += DAY
    for name, _ in listed(admin, ['dead']):
        admin.retry(name)
    readings = []
    files = MaildirFolders.files
    monkeypatch.setattr(MaildirFolders, 'files', lambda self, folder: readings.append(folder) or files(self, folder))

    assert admin.oldest(['waiting']).state == 'waiting'
    assert readings == ['new'] * 2
    assert admin.oldest(['corrupt']) is None


# --- which message ----------------------------------------------------------


def test_the_beginning_of_an_id_is_enough_if_no_other_begins_so(queue, admin, clock):
    first = waiting(queue)
    clock.now += 1
    second = waiting(queue)

    assert admin.find(second[:10]).id == second
    assert admin.find(first[:-1]).id == first
    with pytest.raises(NoSuchMessage, match='18000 is the beginning of 2 ids; give more of it: ') as raised:
        admin.find('18000')
    assert first in str(raised.value)
    assert second in str(raised.value)


def test_of_many_messages_a_few_are_named(queue, admin):
    for _ in range(7):
        waiting(queue)

    with pytest.raises(NoSuchMessage, match=r'beginning of 7 ids; give more of it: .*, \.\.\.$') as raised:
        admin.delete('1')
    assert str(raised.value).count('.M') == 5
    assert where(queue) == {'new': 7}


def test_an_id_is_complete_even_if_others_begin_with_it(queue, admin):
    queue.put_claimed(ENVELOPE).settle(Settlement(('a@x.example',), due=NOW, burials=(Burial(('b@x.example',), 'no'),)))
    (name,) = (path.name for path in at(queue, 'new').iterdir())
    at(queue, 'new', name).rename(at(queue, 'new', f'{name},stumbles=2,deaths=1'))

    assert admin.find(name).state == 'waiting'
    assert admin.find(f'{name},stumbles=2,deaths=1').id == name
    assert admin.find(f'{name}.').state == 'dead'
    with pytest.raises(NoSuchMessage, match='2 ids'):
        admin.find(name[:-1])


@pytest.mark.parametrize(
    'id', ['', '.', '..', '../secret', 'new', 'new/', '/etc/passwd', '../queue/new/x', 'a\0b', '*', 'nobody', '\udcff']
)
def test_what_is_not_the_name_of_a_message_finds_nothing(queue, admin, tmp_path, id):
    (tmp_path / 'secret').write_bytes(b'a secret')
    waiting(queue)
    for method in (admin.find, admin.content, admin.hold, admin.unhold, admin.retry, admin.release, admin.delete):
        with pytest.raises(NoSuchMessage, match='There is no message in the queue whose id begins with '):
            method(id)
    assert where(queue) == {'new': 1}
    assert (tmp_path / 'secret').exists()


def test_a_message_that_moves_on_is_looked_for_again(queue, admin, monkeypatch):
    name = waiting(queue)
    real, moves = admin._locate, itertools.chain([('new', 'cur'), ('cur', 'new')], itertools.repeat(None))

    def locate(id):
        found = real(id)
        move = next(moves)
        if move:
            at(queue, move[0], name).rename(at(queue, move[1], name))
        return found

    monkeypatch.setattr(admin, '_locate', locate)

    assert admin.find(name).id == name
    moves = itertools.chain([('new', 'cur'), ('cur', 'new')], itertools.repeat(None))
    assert admin.content(name) == CONTENT
    moves = itertools.chain([('new', 'cur'), ('cur', 'new')], itertools.repeat(None))
    assert admin.delete(name).id == name


@pytest.mark.parametrize('method', ['find', 'content', 'delete'])
def test_a_message_that_never_stays_is_on_its_way(queue, admin, monkeypatch, method):
    monkeypatch.setattr(admin, '_locate', lambda named: ('new', 'gone'))

    with pytest.raises(NoSuchMessage, match='The message gone is on its way just now'):
        getattr(admin, method)('gone')


# --- hold and unhold --------------------------------------------------------


def test_a_message_that_is_held_is_not_delivered_until_somebody_says_so(queue, admin, told):
    name = waiting(queue, due=NOW - 5)

    entry = admin.hold(name[:-1])

    assert (entry.id, entry.state, entry.due) == (name, 'held', NOW - 5)
    assert where(queue) == {'held': 1}
    assert list(queue.claim_due(LATER)) == []
    assert queue.recover(LATER) == type(queue.recover(LATER))()
    assert queue.counts()['held'] == 1
    assert told(status='held', id=name, msgid='<1@site.example>')

    entry = admin.unhold(name)

    assert (entry.id, entry.state, entry.due, entry.queued_at) == (name, 'waiting', NOW - 5, NOW)
    assert claim(queue, now=NOW).envelope == ENVELOPE
    assert told(status='unheld', id=name)


def test_what_the_name_of_a_file_counts_is_kept(queue, admin):
    name = waiting(queue)
    at(queue, 'new', name).rename(at(queue, 'new', f'{name},stumbles=2,deaths=1'))

    assert admin.hold(name).id == name
    assert [path.name for path in at(queue, 'held').iterdir()] == [f'{name},stumbles=2,deaths=1']
    admin.unhold(name)
    assert [path.name for path in at(queue, 'new').iterdir()] == [f'{name},stumbles=2,deaths=1']


@pytest.mark.parametrize(('method', 'folder'), [('hold', 'held'), ('retry', 'new')])
def test_the_death_of_a_deliverer_is_counted_whoever_finds_the_message(queue, admin, method, folder):
    name = orphan(queue)

    assert getattr(admin, method)(name).id == name

    assert [path.name for path in at(queue, folder).iterdir()] == [f'{name},deaths=1']
    assert where(queue) == {folder: 1}


# --- retry ------------------------------------------------------------------


def test_a_message_that_waits_is_due_now(queue, admin, told):
    name = waiting(queue, due=NOW + HOUR)

    entry = admin.retry(name)

    assert (entry.id, entry.state, entry.due, entry.queued_at) == (name, 'waiting', NOW, NOW)
    assert claim(queue, now=NOW).id == name
    assert told(status='retried', id=name)


def test_a_message_that_is_due_keeps_its_place(queue, admin):
    name = waiting(queue, due=NOW - HOUR)

    assert admin.retry(name).due == NOW - HOUR


def test_a_dead_letter_gets_a_new_chance(queue, admin, clock, told):
    name = dead(queue)
    clock.now += 30 * DAY

    entry = admin.retry(name)

    assert (entry.id, entry.state, entry.due, entry.queued_at, entry.retries) == (
        name,
        'waiting',
        clock.now,
        clock.now,
        0,
    )
    assert entry.last_reply == '550 5.1.1 no such user'
    assert where(queue) == {'new': 1}
    assert header_of(queue, 'new', name)[1] == CONTENT
    assert told(status='retried', id=name, msgid='<1@site.example>')
    taken = claim(queue, now=clock.now)
    # Its lifetime begins anew: one more deferral does not end it.
    result = ExponentialBackoff().decide(
        taken.envelope.recipients, taken.attempts, taken.queued_at, deferred(*ENVELOPE.recipients), clock.now
    )
    assert result.waiting == ENVELOPE.recipients
    assert result.burials == ()
    assert result.due - clock.now < 400


def deferred(*recipients):
    return SendResult({recipient: Reply(451, 'later') for recipient in recipients})


def test_the_content_of_a_dead_letter_goes_out_byte_for_byte(queue, admin):
    content = b'Subject: bare\n\nline\r\n\x00\xff'
    at(queue, 'dead', 'bare').write_bytes(serialize_header(QueueHeader('', ('a@x.example',), NOW)) + content)

    admin.retry('bare')

    assert header_of(queue, 'new', 'bare') == (QueueHeader('', ('a@x.example',), NOW), content)


def test_the_name_of_a_dead_letter_does_not_grow_for_ever(queue, admin):
    dead(queue)

    for _ in range(40):
        ((name, _),) = listed(admin)
        assert admin.retry(name).state == 'waiting'
        claim(queue, now=NOW).settle(Settlement(burials=(Burial(ENVELOPE.recipients, 'no'),)))

    ((name, state),) = listed(admin)
    assert (state, len(name) < 170) == ('dead', True)


def test_a_new_name_is_told(queue, admin, told):
    at(queue, 'dead', 'x' * 200).write_bytes(serialize_header(QueueHeader('', ('a@x.example',), NOW)) + CONTENT)

    entry = admin.retry('x')

    assert listed(admin) == [(entry.id, 'waiting')]
    assert told(status='retried', id='x' * 200, new_id=entry.id)


@pytest.mark.parametrize('folder', ['new', 'cur', 'held'])
def test_a_dead_letter_takes_nobody_s_place(queue, admin, folder):
    data = serialize_header(QueueHeader('', ('a@x.example',), NOW)) + CONTENT
    for place in (folder, 'dead'):
        at(queue, place, 'same').write_bytes(data)
    at(queue, folder, 'same').rename(at(queue, 'corrupt', 'aside'))
    real = maildir_admin._Taken._is_alive

    def comes_back(taken):
        at(queue, 'corrupt', 'aside').rename(at(queue, folder, 'same'))
        return real(taken)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maildir_admin._Taken, '_is_alive', comes_back)
        entry = admin.retry('same')

    assert entry.id != 'same'
    assert at(queue, folder, 'same').read_bytes() == data
    assert at(queue, 'new', entry.id).exists()


# --- expire -----------------------------------------------------------------


def test_what_is_damaged_held_or_not_dead_for_so_long_is_kept(queue, admin, clock, told):
    old = dead(queue, reason='1')
    clock.now += 1
    in_hand = dead(queue, reason='2')
    clock.now += 1
    moved = dead(queue, reason='3')
    clock.now += 90 * DAY
    young = dead(queue)
    # A move from a database leaves the due time behind, which is from before its death.
    os.utime(at(queue, 'dead', young), (1, 1))
    # Copied without its times: it is kept for longer, and not for less.
    os.utime(at(queue, 'dead', moved), (clock.now, clock.now))
    at(queue, 'dead', 'damaged').write_bytes(GARBAGE)
    os.utime(at(queue, 'dead', 'damaged'), (1, 1))

    with contextlib.closing(queue.take('dead', in_hand)):
        assert admin.expire(clock.now - 30 * DAY, 100) == [old]

    assert {name for name, _ in listed(admin)} == {in_hand, moved, young, 'damaged'}
    assert told(status='discarded', id=old, error='1')


def test_a_dead_letter_that_cannot_be_removed_does_not_keep_the_others(queue, admin, clock, told, monkeypatch):
    names = []
    for _ in range(3):
        clock.now += 1
        names.append(dead(queue))
    real = LockedFile.remove

    def remove(file):
        if file.name == names[1]:
            raise OSError(errno.EACCES, 'Permission denied')
        return real(file)

    monkeypatch.setattr(LockedFile, 'remove', remove)

    assert set(admin.expire(clock.now + DAY, 100)) == {names[0], names[2]}
    assert [name for name, _ in listed(admin)] == [names[1]]
    assert told(status='trouble', problem='is a dead letter that cannot be removed')


def test_nothing_is_opened_that_cannot_be_old_enough(queue, admin, clock, monkeypatch):
    for _ in range(3):
        clock.now += DAY
        dead(queue)
    monkeypatch.setattr(MaildirFolders, 'take', None)

    assert admin.expire(NOW, 100) == []


# --- release ----------------------------------------------------------------


def test_a_message_in_doubt_that_is_released_waits_with_its_whole_life_before_it(queue, admin, clock, told):
    name = in_doubt(queue)
    clock.now += 30 * DAY

    entry = admin.release(name)

    assert (entry.id, entry.state, entry.due, entry.queued_at) == (name, 'waiting', clock.now, clock.now)
    assert claim(queue, now=clock.now).envelope == ENVELOPE
    assert told(status='released', id=name)
    assert queue.counts()['in doubt'] == 0


# --- delete -----------------------------------------------------------------


@pytest.mark.parametrize('state', STATES)
def test_whatever_nobody_delivers_can_be_deleted(queue, admin, told, state):
    name = EVERYTHING[state](queue)

    entry = admin.delete(name)

    assert (entry.id, entry.state) == (name, state)
    assert where(queue) == {}
    assert told(status='deleted', id=name, state=state)


# --- flush ------------------------------------------------------------------


def test_everything_that_waits_is_due_now(queue, admin, told):
    due = waiting(queue, due=NOW - 5)
    later = [waiting(queue, due=NOW + HOUR) for _ in range(3)]
    resting = held(queue)

    assert admin.flush() == 3

    assert [taken.id for taken in queue.claim_due(NOW)] == [due, *sorted(later)]
    assert admin.find(resting).state == 'held'
    assert told(status='flushed', messages=3)


def test_what_vanishes_or_is_held_by_somebody_is_not_flushed(queue, admin):
    names = [waiting(queue, due=NOW + HOUR) for _ in range(2)]
    with queue_file_held(queue, 'new', names[0]):
        assert admin.flush() == 1

    assert [admin.find(name).due for name in names] == [NOW + HOUR, NOW]


def queue_file_held(queue, folder, name):
    return contextlib.closing(MaildirQueue(queue.path).take(folder, name))


# --- what cannot be done ----------------------------------------------------

CAN = {
    'hold': {'waiting', 'in progress'},
    'unhold': {'held'},
    'retry': {'waiting', 'in progress', 'dead'},
    'release': {'in doubt'},
}
WORDS = {
    'waiting': 'it is waiting.',
    'in progress': 'its delivery was interrupted; the next mq-run resumes it.',
    'held': 'it is held; unhold it first.',
    'dead': 'it is a dead letter; it can be retried, or deleted.',
    'in doubt': 'it is in doubt; release it, or delete it.',
    'corrupt': 'its file is damaged; it can only be looked at, or deleted.',
}


@pytest.mark.parametrize('method', CAN)
@pytest.mark.parametrize('state', STATES)
def test_each_thing_can_be_done_in_its_states_only(queue, admin, told, method, state):
    name = EVERYTHING[state](queue)
    told.clear()
    before = where(queue)

    if state in CAN[method]:
        assert getattr(admin, method)(name).id == name
        return
    with pytest.raises(WrongState) as raised:
        getattr(admin, method)(name)

    done = {'hold': 'held', 'unhold': 'unheld', 'retry': 'retried', 'release': 'released'}[method]
    assert str(raised.value) == f'{name} cannot be {done}: {WORDS[state]}'
    assert where(queue) == before
    assert told() == []


@pytest.mark.parametrize('method', ['hold', 'retry', 'delete', 'unhold', 'release'])
def test_what_is_being_delivered_is_never_touched(queue, method):
    taken = queue.put_claimed(ENVELOPE)
    admin = MaildirQueue(queue.path).admin

    assert admin.find(taken.id).state == 'in progress'
    with pytest.raises(WrongState, match=r': it is being delivered right now\. Try again in a moment\.$'):
        getattr(admin, method)(taken.id)

    assert where(queue) == {'cur': 1}
    taken.settle(Settlement())
    assert where(queue) == {}


def test_what_is_being_committed_is_never_touched(queue):
    staging = stage(queue, (ENVELOPE, False))
    admin = MaildirQueue(queue.path).admin

    for method in (admin.release, admin.delete):
        with pytest.raises(WrongState, match='its transaction is being committed right now'):
            method(staging._files[0].name)

    staging.publish()
    assert where(queue) == {'new': 1}


def test_two_people_do_not_disturb_each_other(queue, admin):
    name = dead(queue)

    with queue_file_held(queue, 'dead', name), pytest.raises(WrongState, match='it is in use right now'):
        admin.retry(name)

    assert admin.retry(name).state == 'waiting'


@pytest.mark.parametrize(('method', 'folder'), [('retry', 'dead'), ('release', 'prepared')])
def test_a_damaged_file_cannot_be_tried_again(queue, admin, method, folder):
    at(queue, folder, 'damaged').write_bytes(GARBAGE)

    with pytest.raises(WrongState, match=r'its file is damaged\. The line "X-Queue-Meta-End: end" is missing'):
        getattr(admin, method)('damaged')

    assert at(queue, folder, 'damaged').read_bytes() == GARBAGE
    assert where(queue) == {folder: 1}


# --- when something fails, or somebody dies ---------------------------------

CHANGES = [
    ('hold', waiting, {'held'}),
    ('hold', orphan, {'held'}),
    ('unhold', held, {'new'}),
    ('retry', partial(waiting, due=NOW + HOUR), {'new'}),
    ('retry', orphan, {'new'}),
    ('retry', dead, {'new'}),
    ('release', in_doubt, {'new'}),
    ('delete', waiting, set()),
    ('delete', dead, set()),
]


@pytest.mark.parametrize('lasts', [False, True], ids=['once', 'from then on'])
@pytest.mark.parametrize('error', CAN_FAIL)
@pytest.mark.parametrize(('method', 'make', 'after'), CHANGES)
def test_if_a_system_call_fails_there_is_one_message_still_and_it_is_told(queue, method, make, after, error, lasts):
    for number in itertools.count(1):
        with intercepted(without_sync):
            clear(queue)
            name = make(queue)
            # A thread may still have a folder open.
            queue.flush()
            (before,) = where(queue)
        fault = Fault(error, number, lasts=lasts)
        failed = False
        with no_open_files_are_left(), intercepted(fault):
            try:
                getattr(queue.admin, method)(name)
            except QueueError:
                failed = True

        left = set(where(queue))
        if fault.hit is None:
            assert not failed
            assert left == after
            return
        # Whether or not it was done when it failed: nothing is doubled, and nobody keeps a lock.
        assert left in ({before}, after, {before, 'tmp'})
        if left:
            assert number_of_messages(queue) == 1
            (folder,) = left - {'tmp'}
            assert header_of(queue, folder, next(at(queue, folder).iterdir()).name)[1] == CONTENT
            assert MaildirQueue(queue.path).take(folder, next(at(queue, folder).iterdir()).name)
        else:
            assert method == 'delete'


def number_of_messages(queue):
    return sum(number for folder, number in where(queue).items() if folder != 'tmp')


def test_a_flush_that_fails_says_what_and_keeps_nothing(queue, admin):
    name = waiting(queue, due=NOW + HOUR)

    with (
        no_open_files_are_left(),
        intercepted(Fault('EROFS', 2)),
        pytest.raises(QueueError, match=f'{name} cannot be made due: Read-only file system'),
    ):
        admin.flush()


@pytest.mark.parametrize('number', [1, 2])
def test_a_file_that_may_not_be_opened_cannot_be_changed(queue, admin, number):
    name = waiting(queue)

    with intercepted(Fault('EACCES', number)), pytest.raises(QueueError, match='Permission denied'):
        admin.hold(name)

    assert where(queue) == {'new': 1}


def test_changes_are_durable_when_they_return(queue, admin):
    synced = []

    def watch(call):
        if call.name == 'open' and (path := Path(call.args[0])).is_dir():
            synced.append(path.name)
        return call()

    name = waiting(queue)
    with intercepted(watch):
        admin.hold(name)
        admin.unhold(name)
        admin.delete(name)

    assert synced == ['held', 'new', 'new', 'held', 'new']


def test_whatever_people_do_while_mail_is_delivered_each_message_arrives_once(queue, admin, tmp_path):
    notes = Notes(tmp_path / 'notes')
    envelopes = [Envelope('s@x.example', (f'{number}@x.example',), CONTENT) for number in range(20)]
    for envelope in envelopes:
        waiting(queue, envelope=envelope)

    def deliver(connection):
        chance = random.Random(os.getpid())
        mine = MaildirQueue(queue.path)
        while not connection.poll():
            for taken in mine.claim_due(LATER):
                if chance.random() < 0.5:
                    taken.settle(Settlement(burials=(Burial(taken.envelope.recipients, 'no'),)))
                else:
                    notes.add(f'delivered {taken.envelope.recipients[0]}')
                    taken.settle(Settlement())

    chance = random.Random(4711)
    end = time.monotonic() + 60
    with intercepted(without_sync), Child(deliver) as one, Child(deliver) as other:
        while len(notes.delivered) < len(envelopes):
            assert time.monotonic() < end, listed(admin)
            for name, state in listed(admin):
                method = {'waiting': 'hold', 'held': 'unhold', 'dead': 'retry'}.get(state, 'find')
                with contextlib.suppress(NoSuchMessage, WrongState):
                    getattr(admin, method if chance.random() < 0.8 else 'find')(name)
        one.tell()
        other.tell()
        assert (one.wait(), other.wait()) == (0, 0)

    assert where(queue) == {}
    assert sorted(notes.delivered) == sorted(envelope.recipients[0] for envelope in envelopes)


def test_messages_that_have_ended_processes_are_named(queue):
    for folder, name in [('new', 'a'), ('new', 'b,deaths=1'), ('new', 'c,stumbles=9,deaths=2'), ('cur', 'd,deaths=4')]:
        Path(queue.place(folder, name)).write_bytes(GARBAGE)

    assert sorted(queue.admin.crashing(2, 10)) == ['c', 'd']
    assert len(queue.admin.crashing(1, 2)) == 2


@pytest.mark.parametrize('suffix', [',deaths=2', ',stumbles=1', ',stumbles=3,deaths=1'])
def test_the_whole_id_of_a_message_is_its_id_after_setbacks_too(queue, admin, suffix):
    """Lists give such ids to commands and pages."""
    names = [put(queue) for _ in range(3)]
    for name in names:
        at(queue, 'new', name).rename(at(queue, 'new', name + suffix))
    ids = [entry.id for entry in admin.entries(STATES)]
    assert ids == names

    assert [admin.find(ExactId(name)).id for name in ids] == names
    assert [admin.hold(ExactId(name)).id for name in ids] == names
    assert [admin.unhold(ExactId(name)).id for name in ids] == names
    assert admin.delete(ExactId(names[0])).id == names[0]
    with pytest.raises(NoSuchMessage):
        admin.find(ExactId(names[0]))
    with pytest.raises(NoSuchMessage):
        admin.find(ExactId(names[1][:-1]))


def test_many_messages_with_setbacks_are_changed_without_a_look_through_all_files_for_each(queue, admin, monkeypatch):
    for n in range(20):
        at(queue, 'new', f'{NOW}.{n},deaths=1').write_bytes(at(queue, 'new', put(queue)).read_bytes())
    looked_through = []
    real = MaildirFolders.files
    monkeypatch.setattr(
        MaildirFolders, 'files', lambda self, folder: looked_through.append(folder) or real(self, folder)
    )

    for n in range(20):
        admin.hold(ExactId(f'{NOW}.{n}'))

    assert sum(folder == 'new' for folder in looked_through) == 1
