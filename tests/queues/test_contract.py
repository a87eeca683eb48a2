"""
What every queue promises: `IMailQueue`, `IStaging`, `IClaim` and `IQueueAdmin`, put to the test.

Another queue joins by a factory in ``QUEUES``.  What is special about one queue (its files, its crashes) is tested in
a module of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time

import pytest
from zope.interface.verify import verifyObject

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.exceptions import NoSuchMessage, WrongState
from pyramid_mailqueue.interfaces import IClaim, IMailQueue, IQueueAdmin, IStaging
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.entries import POSSIBLE, STATES, ExactId, QueueEntry
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.memory import MemoryQueue
from pyramid_mailqueue.queues.sql import SQLQueue
from pyramid_mailqueue.results import Burial, Recovery, Settlement
from pyramid_mailqueue.testing import Close, ScriptedSMTPServer
from pyramid_mailqueue.transports.smtp import SMTPTransport
from tests.parts.clock import Clock
from tests.parts.databases import create_queue_tables
from tests.parts.maildir import stage
from tests.parts.sql_queue import QueueWithSession
from tests.parts.states import ENVELOPE, MAKE, entries, make_dead, make_held, make_waiting

CONTENT = ENVELOPE.content
OTHER = Envelope('', ('eve@y.example',), CONTENT)
ADA, BOB = ENVELOPE.recipients

# Later than all that the file system notes, and not so late that the clock of a database would doubt it.
NOW = int(time.time()) + 3600
HOUR = 3600


def sql_queue(kind):
    def make(request, **options):
        url = request.getfixturevalue('make_database')(kind)
        create_queue_tables(url)
        queue = QueueWithSession(url, **options)
        request.addfinalizer(queue.close)
        return queue

    return make


QUEUES = {
    'maildir': lambda request, **options: MaildirQueue(request.getfixturevalue('tmp_path') / 'queue', **options),
    'memory': lambda request, **options: MemoryQueue(**options),
    **{kind: sql_queue(kind) for kind in ('sqlite', 'postgresql+psycopg')},
}

# A row commits with the transaction of its session, or it is not there: nobody has to decide about it.
NEVER_IN_DOUBT = {kind for kind in QUEUES if kind.startswith(('sqlite', 'postgresql'))}


@pytest.fixture
def clock():
    """Ahead of the machine's: whatever takes its times from that is in the past."""
    return Clock(NOW)


@pytest.fixture(params=QUEUES.values(), ids=QUEUES)
def make_queue(request, clock):
    """Make a queue of each kind, with the options of its class."""
    return lambda **options: request.param(request, clock=clock, **options)


def for_queues_with(names, values):
    """Parametrize a test as pytest does, but leave out queues in which no message is ever in doubt where one has to."""
    sets = [value if isinstance(value, tuple) else (value,) for value in values]
    params = [
        pytest.param(make, *values, id='-'.join((kind, *map(str, values))))
        for kind, make in QUEUES.items()
        for values in sets
        if not (kind in NEVER_IN_DOUBT and 'in doubt' in values)
    ]
    return pytest.mark.parametrize(f'make_queue, {names}', params, indirect=['make_queue'])


@pytest.fixture
def queue(make_queue):
    return make_queue()


@pytest.fixture
def admin(queue):
    return queue.admin


def here(queue):
    return {state: number for state, number in queue.counts().items() if number}


def put(queue, envelope=ENVELOPE, *, due=None):
    """Put a message into the queue, due at a time that only an attempt can give."""
    name = queue.put(envelope)
    if due is not None:
        queue.claim(name).settle(Settlement(envelope.recipients, due=due))
    return name


def claim_one(queue, now=NOW):
    """Claim what is due, which must be one message."""
    (found,) = queue.claim_due(now)
    return found


def run_at_once(*works):
    """Run each of *works* in a thread, all from the same moment on; raise what one of them could not cope with."""
    barrier = threading.Barrier(len(works))
    failures = []

    def run(work):
        barrier.wait()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - told in the thread of the test
            failures.append(error)

    threads = [threading.Thread(target=run, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_every_part_has_what_its_contract_asks_for(queue):
    verifyObject(IMailQueue, queue)
    verifyObject(IQueueAdmin, queue.admin)
    verifyObject(IStaging, queue.staging())
    verifyObject(IClaim, queue.put_claimed(ENVELOPE))


# --- into the queue ---------------------------------------------------------


def test_a_new_queue_is_empty_and_counts_every_state(queue):
    assert queue.counts() == dict.fromkeys(STATES, 0)
    assert (queue.count_due(NOW), list(queue.claim_due(NOW))) == (0, [])


def test_what_is_put_waits_and_is_due(queue):
    name = queue.put(ENVELOPE)

    assert here(queue) == {'waiting': 1}
    assert queue.count_due(NOW) == 1
    taken = claim_one(queue)
    assert (taken.id, taken.envelope) == (name, ENVELOPE)


def test_those_who_wait_are_counted_as_far_as_somebody_wants_to_know(queue):
    names = [queue.put(ENVELOPE) for _ in range(3)]
    queue.admin.hold(names[0])

    assert [queue.count_waiting(most) for most in (3, 2)] == [2, 2]
    assert queue.count_waiting(1) > 1


def test_what_is_put_claimed_is_nobody_elses(queue):
    taken = queue.put_claimed(ENVELOPE)

    assert here(queue) == {'in progress': 1}
    assert (queue.count_due(NOW), list(queue.claim_due(NOW)), queue.claim(taken.id)) == (0, [], None)
    assert (taken.envelope, taken.attempts, taken.queued_at) == (ENVELOPE, 0, NOW)


def test_the_name_of_a_message_is_text_without_blanks_and_its_own(queue):
    names = [queue.put(ENVELOPE) for _ in range(20)]

    assert len(set(names)) == 20
    assert not any(set(' \t\r\n') & set(name) for name in names)


def test_the_content_comes_out_byte_for_byte(queue):
    content = b'Subject: \xff\r\n\r\n.\r\n..\r\n\x00\xff no line end'
    queue.put(Envelope('"a, b"@x.example', ('j\u00fcrgen@x.example', '"c,d"@x.example'), content))

    envelope = claim_one(queue).envelope

    assert (envelope.sender, envelope.content) == ('"a, b"@x.example', content)
    assert envelope.recipients == ('j\u00fcrgen@x.example', '"c,d"@x.example')


# --- staging ----------------------------------------------------------------


def test_nothing_is_in_the_queue_before_it_is_published(queue):
    staging = queue.staging()
    staging.add(ENVELOPE, claimed=True)
    staging.add(OTHER, claimed=False)
    added = here(queue), list(queue.claim_due(NOW))
    staging.prepare()
    prepared = here(queue), list(queue.claim_due(NOW)), queue.recover(NOW)

    assert (added, prepared) == (({}, []), ({}, [], Recovery()))
    staging.discard()


def test_what_is_published_is_claimed_or_waits_as_it_was_added(queue):
    first, second, third = stage(queue, (ENVELOPE, True), (OTHER, False), (OTHER, True)).publish()

    assert (first.envelope, second, third.envelope) == (ENVELOPE, None, OTHER)
    other = claim_one(queue)
    assert other.envelope == OTHER
    assert first.begin()
    assert third.begin()
    assert here(queue) == {'in progress': 3}


@pytest.mark.parametrize('alone', [True, False])
def test_it_is_the_same_whether_or_not_others_take_part_in_the_transaction(queue, alone):
    staging = queue.staging()
    staging.add(ENVELOPE, claimed=False)
    staging.prepare(alone=alone)
    staging.publish()

    assert claim_one(queue).envelope == ENVELOPE


def test_an_empty_staging_may_go_every_way(queue):
    for last in ('publish', 'discard', 'leave_in_doubt'):
        staging = queue.staging()
        staging.prepare()
        assert not getattr(staging, last)()

    assert here(queue) == {}


def test_discard_tells_what_is_dropped_and_may_be_repeated(queue):
    not_prepared = queue.staging()
    not_prepared.add(ENVELOPE, claimed=True)
    staging = stage(queue, (ENVELOPE, True), (OTHER, False))

    assert list(not_prepared.discard()) == [ENVELOPE]
    assert list(staging.discard()) == [ENVELOPE, OTHER]
    assert [list(staging.discard()) for _ in range(2)] == [[], []]
    assert here(queue) == {}


def test_discard_is_blind_to_what_is_published(queue):
    staging = stage(queue, (ENVELOPE, True), (OTHER, False))
    claimed, _ = staging.publish()

    assert list(staging.discard()) == []
    assert claimed.begin()
    assert here(queue) == {'in progress': 1, 'waiting': 1}


def test_after_a_discard_a_staging_may_be_used_again(queue):
    staging = stage(queue, (ENVELOPE, False))
    staging.discard()
    staging.add(OTHER, claimed=False)
    staging.prepare()
    staging.publish()

    assert claim_one(queue).envelope == OTHER


def test_what_was_added_since_a_mark_can_be_dropped(queue):
    staging = queue.staging()
    beginning = staging.mark()
    staging.add(ENVELOPE, claimed=False)
    mark = staging.mark()
    staging.add(OTHER, claimed=False)
    staging.add(ENVELOPE, claimed=True)

    dropped = [list(staging.rollback(mark)) for _ in range(2)]
    staging.prepare()
    assert list(staging.publish()) == [None]

    assert dropped == [[OTHER, ENVELOPE], []]
    assert claim_one(queue).envelope == ENVELOPE
    other = queue.staging()
    other.add(OTHER, claimed=False)
    assert list(other.rollback(beginning)) == [OTHER]


@for_queues_with('state', ['in doubt'])
def test_what_is_left_in_doubt_is_neither_dropped_nor_sent(queue, state):
    staging = stage(queue, (ENVELOPE, True), (OTHER, False))
    staging.leave_in_doubt()

    assert list(staging.discard()) == []
    assert list(queue.claim_due(NOW)) == []
    assert here(queue) == {state: 2}


def test_what_was_not_even_prepared_cannot_be_in_doubt(queue):
    staging = queue.staging()
    staging.add(ENVELOPE, claimed=True)
    staging.leave_in_doubt()

    assert here(queue) == {}


def test_stagings_do_not_meet(queue):
    one, other = stage(queue, (ENVELOPE, False)), stage(queue, (OTHER, False))
    one.discard()
    other.publish()

    assert claim_one(queue).envelope == OTHER


# --- messages in doubt ------------------------------------------------------


@for_queues_with(
    'state, in_doubt, field, then',
    [
        ('in doubt', 'hold', 'in_doubt', 'in doubt'),
        ('in doubt', 'send', 'sent', 'waiting'),
        ('in doubt', 'discard', 'discarded', None),
    ],
)
def test_what_is_done_with_messages_in_doubt_is_a_setting(make_queue, state, in_doubt, field, then):
    queue = make_queue(in_doubt=in_doubt)
    stage(queue, (ENVELOPE, True), (OTHER, False)).leave_in_doubt()
    names = {entry.id for entry in entries(queue, state)}

    recovery = queue.recover(NOW)

    assert len(names) == 2
    assert {name: set(getattr(recovery, name)) for name in Recovery.__slots__} == {
        **{name: set() for name in Recovery.__slots__},
        field: names,
    }
    assert here(queue) == ({then: 2} if then else {})
    assert {taken.envelope for taken in queue.claim_due(NOW)} == ({ENVELOPE, OTHER} if then == 'waiting' else set())


def test_what_is_not_in_doubt_is_none_of_recovers_business(queue):
    waiting, later, held = put(queue), put(queue, due=NOW + HOUR), put(queue)
    queue.admin.hold(held)
    claim = queue.put_claimed(ENVELOPE)
    prepared = stage(queue, (OTHER, True))

    assert queue.recover(NOW) == Recovery()

    assert here(queue) == {'waiting': 2, 'held': 1, 'in progress': 1}
    assert {entry.id for entry in entries(queue, 'waiting')} == {waiting, later}
    claim.release()
    assert [taken.envelope for taken in prepared.publish()] == [OTHER]


# --- out of the queue -------------------------------------------------------


def test_what_is_due_for_longest_comes_first(queue):
    names = {age: put(queue, due=NOW - age) for age in (30, 10, 40, 20)}

    assert queue.count_due(NOW) == 4
    assert [taken.id for taken in queue.claim_due(NOW)] == [names[age] for age in (40, 30, 20, 10)]


def test_a_message_is_not_claimed_before_it_is_asked_for(queue):
    put(queue)
    put(queue)

    claims = queue.claim_due(NOW)
    before = here(queue)
    first = next(claims)
    while_it_is_held = here(queue)
    claims.close()

    assert (before, while_it_is_held) == ({'waiting': 2}, {'waiting': 1, 'in progress': 1})
    first.release()
    assert here(queue) == {'waiting': 2}


def test_a_message_that_is_not_due_waits(queue, clock):
    name = put(queue, due=NOW + 10)

    assert (queue.count_due(NOW + 9), list(queue.claim_due(NOW + 9)), queue.claim(name)) == (0, [], None)
    clock.now += 10
    assert queue.count_due(NOW + 10) == 1
    assert queue.claim(name).id == name


def test_a_claim_is_one_persons(queue):
    name = put(queue)
    mine, yours = queue.claim_due(NOW), queue.claim_due(NOW)
    first = next(mine)

    assert (next(yours, None), queue.claim(name), next(mine, None)) == (None, None, None)
    first.release()
    assert queue.claim(name).id == name


def test_one_message_can_be_claimed_by_its_name(queue):
    put(queue)
    wanted = put(queue, OTHER)

    taken = queue.claim(wanted)

    assert (taken.id, taken.envelope) == (wanted, OTHER)
    assert here(queue) == {'waiting': 1, 'in progress': 1}


def test_what_is_not_there_or_does_not_wait_cannot_be_claimed_by_its_name(queue, admin):
    gone, held = put(queue), put(queue)
    queue.claim(gone).settle(Settlement())
    admin.hold(held)
    buried = put(queue)
    queue.claim(buried).settle(Settlement(burials=(Burial(ENVELOPE.recipients, 'no'),)))

    assert [queue.claim(name) for name in (gone, held, buried, 'nobody')] == [None] * 4


def test_a_message_that_is_given_back_does_not_come_twice_in_one_run(queue):
    names = [put(queue, due=NOW - age) for age in (3, 2, 1)]

    found = []
    for taken in queue.claim_due(NOW):
        found.append(taken.id)
        taken.release()

    assert found == names


def test_what_others_have_done_meanwhile_is_passed_over(queue, admin):
    names = [put(queue, due=NOW - age) for age in (50, 40, 30, 20, 10)]
    claims = queue.claim_due(NOW)
    first = next(claims)
    queue.claim(names[1]).settle(Settlement(ENVELOPE.recipients, due=NOW + HOUR))
    queue.claim(names[2]).settle(Settlement())
    admin.hold(names[3])

    assert [first.id, *(taken.id for taken in claims)] == [names[0], names[4]]


# --- the end of a claim -----------------------------------------------------


def test_what_is_done_leaves_the_queue(queue):
    queue.put_claimed(ENVELOPE).settle(Settlement())

    assert here(queue) == {}


def test_what_waits_keeps_its_name_its_age_and_who_is_open(queue, clock):
    taken = queue.put_claimed(ENVELOPE)
    clock.now += 60
    taken.settle(Settlement((BOB,), due=NOW + HOUR, last_reply='451 4.3.0 later'))

    (entry,) = entries(queue)
    clock.now += HOUR
    again = claim_one(queue, clock.now)

    assert (entry.id, entry.state, entry.recipients, entry.retries) == (taken.id, 'waiting', (BOB,), 1)
    assert (entry.queued_at, entry.last_attempt, entry.due) == (NOW, NOW + 60, NOW + HOUR)
    assert entry.last_reply == '451 4.3.0 later'
    assert (again.id, again.envelope) == (taken.id, Envelope('shop@site.example', (BOB,), CONTENT))
    assert (again.attempts, again.queued_at) == (1, NOW)


def test_every_attempt_is_counted(queue):
    name = queue.put(ENVELOPE)

    seen = []
    for _ in range(3):
        taken = queue.claim(name)
        seen.append(taken.attempts)
        taken.settle(Settlement(ENVELOPE.recipients, due=NOW))

    assert seen == [0, 1, 2]


def test_a_servers_trouble_is_no_attempt_and_keeps_the_due_time(queue):
    put(queue, due=NOW - 10)
    (before,) = entries(queue)
    claim_one(queue).settle(Settlement(ENVELOPE.recipients, counted=False))

    assert entries(queue) == [before]


def test_a_servers_trouble_half_way_keeps_who_is_open(queue):
    put(queue, due=NOW - 10)
    claim_one(queue).settle(Settlement((BOB,), counted=False))

    (entry,) = entries(queue)
    assert (entry.recipients, entry.due, entry.retries) == ((BOB,), NOW - 10, 1)


def test_a_message_at_which_the_server_stumbles_keeps_no_other_from_it(queue):
    stumbling, innocent = put(queue, due=NOW - 20), put(queue, due=NOW - 10)
    queue.claim(stumbling).settle(Settlement(ENVELOPE.recipients, counted=False, stumbled=True))

    # Which of them comes first is the queue's business, but both do.
    assert {taken.id for taken in queue.claim_due(NOW)} == {stumbling, innocent}


@pytest.mark.parametrize('step', ['MAIL', 'RCPT'])
def test_a_sender_at_which_the_session_ends_keeps_no_other_from_its_mail_and_is_given_up_in_the_end(queue, clock, step):
    put(queue, Envelope('bad@site.example', ('bad@x.example',), CONTENT))
    for name in 'abcde':
        put(queue, Envelope('shop@site.example', (f'{name}@x.example',), CONTENT))

    def of_bad(command):
        return Close('421 4.3.2 closed') if '<bad@' in command else None

    with ScriptedSMTPServer({step: of_bad}) as server:
        transport = SMTPTransport(hostname=server.host, port=server.port, local_hostname='c.example')
        runner = Runner(queue, MessageHandler([transport], clock=clock), clock=clock)
        first, second = runner.run(), runner.run()
        clock.now += 6 * 24 * HOUR
        third = runner.run()

    assert (first.sent, second.sent, third.refused) == (5, 0, 1)
    assert sorted(message.recipients for message in server.messages) == [(f'{name}@x.example',) for name in 'abcde']
    assert here(queue) == {'dead': 1}
    assert '421 4.3.2 closed' in entries(queue)[0].last_reply


def test_the_last_reply_is_kept_until_there_is_another_one(queue):
    name = queue.put(ENVELOPE)
    replies = []
    for reply in ('451 one', '', '452 two'):
        queue.claim(name).settle(Settlement(ENVELOPE.recipients, due=NOW, last_reply=reply))
        replies.append(queue.admin.find(name).last_reply)

    assert replies == ['451 one', '451 one', '452 two']


def test_who_is_given_up_becomes_a_dead_letter_and_the_others_wait(queue, clock):
    taken = queue.put_claimed(Envelope('s@x.example', ('a@x.example', 'b@x.example', 'c@x.example'), CONTENT))
    clock.now += 5
    burials = (Burial(('a@x.example',), '550 no such user'), Burial(('b@x.example',), '552 too large'))
    taken.settle(Settlement(('c@x.example',), due=NOW + HOUR, last_reply='451 later', burials=burials))

    assert here(queue) == {'waiting': 1, 'dead': 2}
    dead = {entry.last_reply: entry for entry in entries(queue, 'dead')}
    assert {reason: entry.recipients for reason, entry in dead.items()} == {
        '550 no such user': ('a@x.example',),
        '552 too large': ('b@x.example',),
    }
    assert {(entry.retries, entry.queued_at, entry.last_attempt, entry.due) for entry in dead.values()} == {
        (1, NOW, NOW + 5, None)
    }
    assert {queue.admin.content(entry.id) for entry in dead.values()} == {CONTENT}
    assert len({entry.id for entry in entries(queue)}) == 3
    (waiting,) = entries(queue, 'waiting')
    assert (waiting.id, waiting.recipients, waiting.last_reply) == (taken.id, ('c@x.example',), '451 later')


def test_a_message_that_is_given_back_is_exactly_as_it_was(queue):
    put(queue, due=NOW - 10)
    before = entries(queue)
    taken = claim_one(queue)
    taken.release()

    assert entries(queue) == before
    assert claim_one(queue).attempts == 1


def test_a_claim_keeps_those_who_are_open_and_goes_on(queue):
    taken = queue.put_claimed(ENVELOPE)
    taken.keep((BOB,))

    assert here(queue) == {'in progress': 1}
    assert (taken.envelope.recipients, taken.attempts) == ((BOB,), 0)
    taken.release()
    again = claim_one(queue)
    assert (again.id, again.envelope.recipients, again.envelope.content) == (taken.id, (BOB,), CONTENT)


ENDS = {
    'settle': lambda taken: taken.settle(Settlement()),
    'defer': lambda taken: taken.settle(Settlement((ADA,), due=NOW + HOUR)),
    'bury': lambda taken: taken.settle(Settlement(burials=(Burial((ADA,), 'no'),))),
    'release': lambda taken: taken.release(),
}
AFTER = {**ENDS, 'keep': lambda taken: taken.keep((BOB,))}


@pytest.mark.parametrize('first', ENDS.values(), ids=ENDS)
@pytest.mark.parametrize('second', AFTER.values(), ids=AFTER)
def test_a_claim_ends_once(queue, first, second):
    taken = queue.put_claimed(ENVELOPE)
    first(taken)
    before = entries(queue)
    second(taken)

    assert entries(queue) == before


def test_a_claim_that_has_ended_says_nothing_about_the_next_one(queue):
    name = queue.put(ENVELOPE)
    former = queue.claim(name)
    former.release()
    present = queue.claim(name)
    former.settle(Settlement())
    former.release()

    assert here(queue) == {'in progress': 1}
    present.settle(Settlement())
    assert here(queue) == {}


def test_flush_may_be_called_at_any_time(queue):
    queue.flush()
    queue.put_claimed(ENVELOPE).settle(Settlement())
    queue.flush()
    queue.flush()

    assert here(queue) == {}


# --- what a person sees -----------------------------------------------------


@pytest.fixture
def makes(queue):
    """Those of ``MAKE`` that can be made in this queue."""
    return {state: make for state, make in MAKE.items() if state != 'in doubt' or not isinstance(queue, SQLQueue)}


def test_a_message_tells_all_there_is_to_know(queue, admin, clock):
    content = b'Message-ID: <7@x.example>\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n\r\nHello\r\n'
    name = put(queue, Envelope('', ('ada@x.example',), content), due=NOW + HOUR)

    assert admin.find(name) == QueueEntry(
        name,
        'waiting',
        '',
        ('ada@x.example',),
        retries=1,
        queued_at=NOW,
        due=NOW + HOUR,
        last_attempt=NOW,
        subject='Gr\u00fc\u00dfe',
        message_id='<7@x.example>',
        size=len(content),
    )
    assert admin.content(name) == content


def test_messages_are_listed_in_the_order_in_which_they_came(queue, admin, clock, makes):
    names = []
    for make in (*makes.values(), make_waiting):
        names.append(make(queue))
        clock.now += 1

    assert [entry.id for entry in admin.entries(STATES)] == names
    assert [entry.id for entry in admin.entries(['waiting'])] == [names[0], names[-1]]
    assert [entry.id for entry in admin.entries([])] == []


@for_queues_with('state, method', [('dead', 'retry'), ('in doubt', 'release')])
def test_what_has_a_new_start_is_listed_as_the_new_message_that_it_is(queue, admin, clock, state, method):
    def names(count, make):
        for _ in range(count):
            clock.now += 10
            yield make(queue)

    first, *others = names(5, MAKE[state])
    between = [*names(3, make_waiting)]
    for name in (others[2], first):
        clock.now += 10
        getattr(admin, method)(name)
    last = [*names(2, make_waiting)]
    clock.now += 10
    getattr(admin, method)(others[0])

    listed = list(admin.entries(STATES))
    assert [entry.id for entry in listed] == [others[1], others[3], *between, others[2], first, *last, others[0]]
    ages = [entry.queued_at for entry in listed]
    assert ages == sorted(ages)


def test_counts_lists_and_stats_agree(queue, admin, makes):
    taken = queue.put_claimed(ENVELOPE)
    expected = dict.fromkeys(STATES, 0) | {'in progress': 1}
    for (state, make), number in zip(makes.items(), itertools.count(1), strict=False):
        for _ in range(number):
            make(queue)
        expected[state] = number

    assert queue.counts() == expected
    assert {state: len(entries(queue, state)) for state in STATES} == expected
    stats = admin.stats(['waiting', 'dead'])
    assert {state: tally.messages for state, tally in stats.by_state.items()} == expected
    assert {domain: tally.messages for domain, tally in stats.by_domain.items()} == {'x.example': 4}
    taken.release()


def test_the_oldest_is_the_one_that_came_first(queue, admin, clock):
    first = queue.put(ENVELOPE)
    clock.now += 100
    second = make_held(queue)

    assert admin.oldest(['waiting', 'held']).id == first
    assert admin.oldest(['held']).id == second
    assert admin.oldest(['dead']) is None


def test_the_beginning_of_a_name_is_enough_where_no_other_begins_so(queue, admin):
    name = queue.put(ENVELOPE)

    assert admin.find(name[:-1]).id == name
    queue.put(ENVELOPE)
    common = name[:2]
    ids = ', '.join(sorted(entry.id for entry in entries(queue)))
    with pytest.raises(NoSuchMessage, match=f'^{common} is the beginning of 2 ids; give more of it: {ids}$'):
        admin.find(common)
    for _ in range(5):
        queue.put(ENVELOPE)
    some = ', '.join(sorted(entry.id for entry in entries(queue))[:5])
    with pytest.raises(NoSuchMessage, match=f'^{common} is the beginning of 7 ids; give more of it: {some}, ...$'):
        admin.hold(common)
    for nobody in ('', 'nobody', '../new', f'{name}x'):
        with pytest.raises(NoSuchMessage, match='no message'):
            admin.find(nobody)


@pytest.mark.parametrize('method', ['find', 'content', *POSSIBLE])
def test_of_an_exact_id_the_whole_is_meant(queue, admin, method):
    name = queue.put(ENVELOPE)
    before = entries(queue)

    for beginning in (name[:-1], ''):
        with pytest.raises(NoSuchMessage):
            getattr(admin, method)(ExactId(beginning))
    assert entries(queue) == before
    assert admin.find(ExactId(name)).id == name


def test_looking_changes_nothing(queue, admin, makes):
    for make in makes.values():
        make(queue)
    before = entries(queue)

    for entry in before:
        admin.find(entry.id)
        admin.content(entry.id)
    admin.stats(STATES)
    admin.oldest(STATES)

    assert entries(queue) == before


# --- what a person does -----------------------------------------------------


def test_what_is_held_is_not_delivered_and_then_as_it_was(queue, admin):
    name = put(queue, due=NOW - 10)
    before = admin.find(name)
    held = admin.hold(name)

    assert (held.state, held.due) == ('held', NOW - 10)
    assert list(queue.claim_due(NOW)) == []
    assert admin.unhold(name) == before
    assert claim_one(queue).id == name


def test_what_waits_is_due_now_when_it_is_retried(queue, admin):
    later, soon = put(queue, due=NOW + HOUR), put(queue, due=NOW - 10)

    assert (admin.retry(later).due, admin.retry(soon).due) == (NOW, NOW - 10)
    assert [taken.id for taken in queue.claim_due(NOW)] == [soon, later]


@for_queues_with('state, method', [('dead', 'retry'), ('in doubt', 'release')])
def test_a_new_start_is_like_a_new_message(queue, admin, clock, state, method):
    name = MAKE[state](queue)
    clock.now += HOUR

    entry = getattr(admin, method)(name)

    assert (entry.state, entry.queued_at, entry.due, entry.retries) == ('waiting', NOW + HOUR, NOW + HOUR, 0)
    taken = claim_one(queue, NOW + HOUR)
    assert (taken.envelope, taken.attempts, taken.queued_at) == (ENVELOPE, 0, NOW + HOUR)


def test_a_dead_letter_may_be_retried_and_die_again(queue, admin):
    for _ in range(3):
        name = admin.retry(make_dead(queue) if not entries(queue) else entries(queue)[0].id).id
        queue.claim(name).settle(Settlement(burials=(Burial(ENVELOPE.recipients, '550 still no'),)))

    assert here(queue) == {'dead': 1}


DAY = 24 * HOUR


def test_dead_letters_that_are_old_enough_are_removed_and_told(queue, admin, clock, makes, caplog):
    caplog.set_level('INFO', 'mailqueue.queue_log')
    others = [make(queue) for state, make in makes.items() if state != 'dead']
    waiting_for_long = put(queue, due=NOW + DAY)
    first = make_dead(queue, reply='550 5.1.1 no such user')
    clock.now += 10 * DAY
    # It came long ago, and has died only now.
    queue.claim(waiting_for_long).settle(Settlement(burials=(Burial(ENVELOPE.recipients, 'given up'),)))
    second = make_dead(queue)
    before = {entry.id for entry in entries(queue)}
    caplog.clear()

    assert admin.expire(clock.now - 10 * DAY, 100) == []
    assert list(admin.expire(clock.now - 10 * DAY + 1, 100)) == [first]
    assert {entry.id for entry in entries(queue)} == before - {first}
    assert {second, *others} < before
    (record,) = caplog.records
    told = record.mailqueue
    assert (told['status'], told['id'], told['msgid']) == ('discarded', first, '<1@site.example>')
    assert (told['to'], told['error']) == ('ada@x.example,bob@x.example', '550 5.1.1 no such user')
    assert 'keep_dead' in told['reason']


def test_no_more_dead_letters_are_removed_than_was_said(queue, admin, clock):
    names = {make_dead(queue) for _ in range(5)}
    clock.now += DAY

    removed = {*admin.expire(clock.now, 2)} | {*admin.expire(clock.now, 2)}
    assert len(removed) == 4
    assert {entry.id for entry in entries(queue)} == names - removed
    assert len(admin.expire(clock.now, 2)) == 1
    assert here(queue) == {}


def test_a_dead_letter_that_was_retried_is_dead_for_a_short_time_when_it_dies_again(queue, admin, clock):
    name = make_dead(queue)
    clock.now += 10 * DAY
    taken = queue.claim(admin.retry(name).id)
    taken.settle(Settlement(burials=(Burial(ENVELOPE.recipients, '550 still no'),)))

    assert list(admin.expire(clock.now - DAY, 100)) == []
    assert here(queue) == {'dead': 1}


@for_queues_with('state', MAKE)
def test_whatever_nobody_delivers_can_be_deleted(queue, admin, state):
    name = MAKE[state](queue)

    assert (admin.delete(name).id, here(queue)) == (name, {})
    with pytest.raises(NoSuchMessage):
        admin.find(name)


def test_everything_that_waits_is_due_after_a_flush(queue, admin, caplog):
    caplog.set_level('INFO', 'mailqueue.queue_log')
    put(queue, due=NOW + HOUR)
    put(queue, due=NOW + 2 * HOUR)
    put(queue, due=NOW - 10)
    admin.hold(put(queue, due=NOW + HOUR))

    assert (admin.flush(), admin.flush()) == (2, 0)
    assert queue.count_due(NOW) == 3
    told = [record.mailqueue for record in caplog.records if record.mailqueue['status'] == 'flushed']
    assert told == [{'status': 'flushed', 'messages': number} for number in (2, 0)]


@pytest.mark.parametrize('method', POSSIBLE)
@for_queues_with('state', MAKE)
def test_each_thing_can_be_done_in_its_states_only(queue, admin, method, state):
    name = MAKE[state](queue)
    before = entries(queue)

    if state in POSSIBLE[method]:
        assert getattr(admin, method)(name).id == name
    else:
        with pytest.raises(WrongState, match=name):
            getattr(admin, method)(name)
        assert entries(queue) == before


REASONS = {
    'waiting': 'it is waiting',
    'held': 'it is held; unhold it first',
    'dead': 'it is a dead letter; it can be retried, or deleted',
    'in doubt': 'it is in doubt; release it, or delete it',
}
DONE = {'hold': 'held', 'unhold': 'unheld', 'retry': 'retried', 'release': 'released', 'delete': 'deleted'}


@pytest.mark.parametrize('method', POSSIBLE)
@for_queues_with('state', MAKE)
def test_each_change_is_told_in_the_same_words(queue, admin, method, state, caplog):
    caplog.set_level('INFO', 'mailqueue.queue_log')
    name = MAKE[state](queue)
    caplog.clear()

    if state in POSSIBLE[method]:
        entry = getattr(admin, method)(name[:-1])
        (record,) = caplog.records
        told = {'status': DONE[method], 'id': name, 'state': entry.state, 'msgid': '<1@site.example>'}
        assert (record.levelname, record.mailqueue) == ('INFO', told)
    else:
        with pytest.raises(WrongState) as raised:
            getattr(admin, method)(name[:-1])
        assert str(raised.value) == f'{name} cannot be {DONE[method]}: {REASONS[state]}.'
        assert caplog.records == []


@pytest.mark.parametrize('method', POSSIBLE)
def test_what_is_being_delivered_is_never_touched(queue, admin, method):
    taken = queue.put_claimed(ENVELOPE)

    with pytest.raises(WrongState, match=taken.id):
        getattr(admin, method)(taken.id)

    taken.settle(Settlement())
    assert here(queue) == {}


@pytest.mark.parametrize('method', POSSIBLE)
def test_nothing_can_be_done_with_a_message_that_is_not_there(admin, method):
    with pytest.raises(NoSuchMessage, match='no message'):
        getattr(admin, method)('nobody')


# --- several threads --------------------------------------------------------


def test_threads_put_stage_and_claim_without_losing_or_sharing_a_message(queue):
    taken = []
    staged = [Envelope('', (f'{number}@staged.example',), CONTENT) for number in range(30)]
    waiting = [Envelope('', (f'{number}@put.example',), CONTENT) for number in range(30)]

    def put_all():
        for envelope in waiting:
            queue.put(envelope)

    def stage_all():
        for envelope in staged:
            stage(queue, (envelope, False)).publish()

    def take():
        while len(taken) < 60:
            for claim in queue.claim_due(NOW):
                taken.append(claim.envelope)
                claim.settle(Settlement())

    run_at_once(put_all, stage_all, take, take, take)

    assert len(taken) == 60
    assert set(taken) == {*staged, *waiting}
    assert here(queue) == {}


def test_whatever_threads_do_with_messages_each_of_them_ends_once(queue, admin):
    """Two deliver, deferring and giving back at random, and two people meddle, until everything is done."""
    # A question to a database takes its time, and those who meddle ask without end.
    names = {queue.put(ENVELOPE) for _ in range(10 if isinstance(queue, SQLQueue) else 40)}
    done = []

    def deliver():
        chance = random.Random(4711)
        while len(done) < len(names):
            for claim in queue.claim_due(NOW):
                fate = chance.random()
                if fate < 0.3:
                    claim.release()
                elif fate < 0.5:
                    claim.settle(Settlement(ENVELOPE.recipients, due=NOW))
                else:
                    done.append(claim.id)
                    claim.settle(Settlement())

    def meddle():
        chance = random.Random(815)
        while len(done) < len(names):
            name = chance.choice(sorted(names))
            for method in ('hold', 'unhold', 'retry', 'find'):
                with contextlib.suppress(NoSuchMessage, WrongState):
                    getattr(admin, method)(name)
            for entry in admin.entries(['held']):
                with contextlib.suppress(NoSuchMessage, WrongState):
                    admin.unhold(entry.id)

    run_at_once(deliver, deliver, meddle, meddle)

    assert sorted(done) == sorted(names)
    assert here(queue) == {}


def test_one_claim_that_two_threads_end_ends_once(queue):
    for _ in range(50):
        taken = queue.put_claimed(ENVELOPE)
        run_at_once(lambda: taken.settle(Settlement()), taken.release)  # noqa: B023 - both have ended before the next
        for again in queue.claim_due(NOW):
            again.settle(Settlement())

    assert here(queue) == {}
