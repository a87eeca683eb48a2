"""Keeping to a limit: against a simple model of it, between real processes, with a file that somebody has spoilt."""

from __future__ import annotations

import gc
import logging
import math
import os
import resource
import signal
import stat
import struct
import tempfile
import threading
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.queues import rate_file
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.rate_file import RateFile
from pyramid_mailqueue.results import Settlement
from pyramid_mailqueue.settings import Rate
from tests.parts.children import Child, fork, no_open_files_are_left, open_files, run_in_child
from tests.parts.clock import Clock
from tests.parts.faults import Fault, intercepted
from tests.parts.maildir import ENVELOPE

NOW = 1_800_000_000.0
LIMIT = Rate(3, 10)

# The format: magic, places, the place of the oldest time, the last take: how many and when; then the times.
HEADER = struct.Struct('<8sQQQd')


@pytest.fixture
def clock():
    return Clock(NOW)


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'rate'


@pytest.fixture
def make(path, clock):
    """Make one more user of the same file: ``make(count, seconds)``."""

    def make(count=LIMIT.count, seconds=LIMIT.seconds):
        return RateFile(path, Rate(count, seconds), clock=clock)

    return make


@pytest.fixture
def limiter(make):
    return make()


def taken_at_once(limiter):
    """Take until there is no more, and return how often that was."""
    count = 0
    while not limiter.take():
        count += 1
    return count


def take_at(limiter, clock, *moments):
    """Take one at each of these moments, in seconds from now on."""
    begin = clock.now
    for moment in moments:
        clock.now = begin + moment
        assert limiter.take() == 0


# --- one user ---------------------------------------------------------------


def test_as_many_are_granted_as_the_limit_has(limiter):
    assert [limiter.take() for _ in range(4)] == [0, 0, 0, 10]


def test_each_send_is_free_again_after_the_period(limiter, clock):
    take_at(limiter, clock, 0, 4, 5)

    waits = []
    for _ in range(4):
        waits.append(limiter.take())
        clock.now += waits[-1]

    assert waits == [5, 0, 4, 0]


def test_a_moment_before_the_period_is_over_is_too_early(limiter, clock):
    taken_at_once(limiter)

    clock.now = math.nextafter(NOW + 10, 0)
    assert 0 < limiter.take() < 1e-6
    clock.now = NOW + 10
    assert limiter.take() == 0


def test_there_is_no_edge_at_which_twice_as_many_pass(limiter, clock):
    take_at(limiter, clock, 9, 9.5, 9.75)

    clock.now = NOW + 10
    assert limiter.take() == 9


def test_a_refusal_takes_nothing(limiter, clock):
    take_at(limiter, clock, 0, 1, 2)
    for _ in range(10):
        limiter.take()

    clock.now = NOW + 10
    assert limiter.take() == 0


def test_a_limit_of_one_is_a_distance(make, clock):
    limiter = make(1, 0.5)

    assert [limiter.take(), limiter.take()] == [0, 0.5]
    clock.now += 0.5
    assert limiter.take() == 0


def test_several_are_taken_together_or_not_at_all(limiter, clock):
    take_at(limiter, clock, 0, 1)

    assert limiter.take(2) == 9
    assert limiter.take(3) == 10
    assert limiter.take(1) == 0
    clock.now = NOW + 10
    assert limiter.take(2) == 1
    assert limiter.take(1) == 0


def test_more_than_the_limit_has_are_granted_when_it_is_free_and_use_it_up(limiter, clock):
    take_at(limiter, clock, 0)

    assert limiter.take(100) == 10
    clock.now += 10
    assert limiter.take(100) == 0
    assert limiter.take() == 10
    clock.now += 10
    assert taken_at_once(limiter) == 3


def test_who_takes_nothing_hears_whether_there_is_something_to_take(limiter, make, clock):
    assert limiter.take(0) == 0
    assert taken_at_once(limiter) == 3
    assert limiter.take(0) == limiter.take() == 10
    clock.now += 10
    assert make().take(0) == 0
    assert taken_at_once(limiter) == 3


def test_less_than_nothing_cannot_be_taken(limiter):
    with pytest.raises(ValueError, match='cannot be taken'):
        limiter.take(-1)


# --- a model ----------------------------------------------------------------


class Model:
    """All sends are remembered, and counted each time; as many of them as the largest limit so far."""

    def __init__(self):
        self.sends = []
        self.places = 0

    def take(self, rate, count, now):
        self.places = max(self.places, rate.count)
        self.sends = [min(when, now) for when in self.sends]
        may_stay = rate.count - min(count, rate.count)
        recent = [when for when in self.sends if now - when < rate.seconds]
        if len(recent) > may_stay:
            return recent[len(recent) - may_stay - 1] + rate.seconds - now
        self.sends = [*self.sends, *[now] * count][-self.places :]
        return 0


# Fractions of seconds that floats can hold; now and then the clock is set back.
forward = st.integers(0, 40).map(lambda sixteenths: sixteenths / 16)
steps = st.one_of(forward, forward, forward, st.integers(-800, 800).map(lambda sixteenths: sixteenths / 16))
rates = st.builds(Rate, st.integers(1, 8), st.sampled_from([0.25, 1, 2.5, 10]))


@given(
    st.lists(rates, min_size=1, max_size=3),
    st.lists(st.tuples(steps, st.integers(0, 2), st.integers(1, 10), st.booleans()), max_size=40),
)
def test_whatever_is_taken_by_whom_and_when_it_is_as_if_all_sends_were_counted_anew(limits, takes):
    clock, model = Clock(NOW), Model()
    with tempfile.TemporaryDirectory() as folder:
        limiters = [RateFile(f'{folder}/rate', rate, clock=clock) for rate in limits]
        for step, user, count, begins_anew in takes:
            user %= len(limits)
            if begins_anew:
                limiters[user] = RateFile(f'{folder}/rate', limits[user], clock=clock)
            clock.now += step

            wait = limiters[user].take(count)

            assert wait == model.take(limits[user], count, clock.now)
            assert wait <= limits[user].seconds


@given(
    rates,
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.lists(st.tuples(forward, st.integers(0, 2), st.integers(1, 4)), max_size=40),
)
def test_no_window_has_more_sends_than_the_limit_had_at_its_end(rate, counts, takes):
    clock, sends = Clock(NOW), []
    with tempfile.TemporaryDirectory() as folder:
        # One period, so that a user with a higher limit cannot have let pass what another one then has to forget.
        limiters = [RateFile(f'{folder}/rate', Rate(count, rate.seconds), clock=clock) for count in counts]
        for step, user, count in takes:
            limiter = limiters[user % len(counts)]
            count = min(count, limiter.rate.count)
            clock.now += step
            if limiter.take(count) == 0:
                sends += [clock.now] * count
                assert sum(when > clock.now - rate.seconds for when in sends) <= limiter.rate.count


# --- several users ----------------------------------------------------------


def test_all_that_use_the_file_keep_the_limit_together(make, clock):
    assert [make().take(), make().take(), make().take(2), make().take()] == [0, 0, 10, 0]
    assert run_in_child(lambda: make().take()) == 10


def test_a_process_that_ends_leaves_behind_what_it_took(make):
    assert run_in_child(lambda: taken_at_once(make())) == 3

    assert make().take() == 10


class RecordingClock:
    """The real time; ``last`` is what this thread was told of it last."""

    def __init__(self):
        self._told = threading.local()

    def __call__(self):
        self._told.last = time.time()
        return self._told.last

    @property
    def last(self):
        return self._told.last


def take_for_real(limiter, wanted):
    """Take *wanted* times, now and then two at once; return at which times that was granted."""
    times = []
    while len(times) < wanted:
        count = 1 + len(times) % 2
        wait = limiter.take(count)
        if wait:
            time.sleep(wait)
        else:
            times += [limiter._clock.last] * count
    return times


def assert_limit_was_kept(times, rate):
    times = sorted(times)
    assert all(after - before >= rate.seconds for before, after in zip(times, times[rate.count :], strict=False))


def test_processes_that_take_as_fast_as_they_can_keep_the_limit(path):
    rate = Rate(20, 0.1)

    def take(connection):
        limiter = RateFile(path, rate, clock=RecordingClock())
        connection.recv()
        connection.send(take_for_real(limiter, 30))
        connection.recv()

    children = [Child(take) for _ in range(4)]
    for child in children:
        child.tell()
    times = [when for child in children for when in child.hear()]
    for child in children:
        child.kill()

    assert len(times) >= 120
    assert_limit_was_kept(times, rate)


def in_threads(count, function):
    results = []
    threads = [threading.Thread(target=lambda: results.append(function())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize('is_shared', [True, False])
def test_threads_that_take_as_fast_as_they_can_keep_the_limit(path, is_shared):
    rate = Rate(20, 0.1)
    shared = RateFile(path, rate, clock=RecordingClock())

    def take():
        return take_for_real(shared if is_shared else RateFile(path, rate, clock=RecordingClock()), 30)

    times = [when for taken in in_threads(4, take) for when in taken]

    assert len(times) >= 120
    assert_limit_was_kept(times, rate)


def test_of_many_that_create_the_file_at_once_all_use_the_same(path, clock):
    ready = threading.Barrier(8)

    def take():
        limiter = RateFile(path, LIMIT, clock=clock)
        ready.wait()
        return limiter.take()

    assert sorted(in_threads(8, take)) == [0, 0, 0, 10, 10, 10, 10, 10]


# --- forked children, and killed ones ---------------------------------------


def test_a_forked_child_goes_on_with_an_open_file_of_its_own(limiter, path):
    limiter.take()

    def take():
        inherited = str(path) in open_files().values()
        return inherited, limiter.take()

    assert run_in_child(take) == (False, 0)
    assert [limiter.take(), limiter.take()] == [0, 10]


def test_a_child_that_is_forked_in_the_midst_of_a_take_waits_for_its_end(path):
    parent, children = os.getpid(), []

    def take(connection):
        connection.send('begins')
        connection.send(limiter.take(2))

    def fork_a_child():
        if os.getpid() == parent:
            # Here the parent holds the lock, in an open file that the child shares.
            children.append(Child(take))
            assert children[0].hear() == 'begins'
            assert not children[0].connection.poll(0.05)
        return NOW

    limiter = RateFile(path, LIMIT, clock=fork_a_child)

    assert limiter.take(2) == 0
    with children[0] as child:
        assert child.hear() == 10


def test_what_a_child_does_cannot_let_others_into_the_take_of_its_parent(path, clock):
    def fork_and_take():
        child = fork(lambda: None)
        os.waitpid(child, 0)
        other = threading.Thread(target=lambda: waits.append(RateFile(path, LIMIT, clock=clock).take(2)))
        other.start()
        other.join(0.05)
        others.append(other)
        assert not waits
        return NOW

    waits, others = [], []
    limiter = RateFile(path, LIMIT, clock=fork_and_take)

    assert limiter.take(2) == 0
    others[0].join()
    assert waits == [10]


class Deadly:
    """The module ``os``, whose *number*-th ``pwrite`` kills the process, right before or after it."""

    def __init__(self, number, moment):
        self._countdown = number
        self._moment = moment

    def __getattr__(self, name):
        return getattr(os, name)

    def pwrite(self, *args):
        self._countdown -= 1
        if self._countdown:
            return os.pwrite(*args)
        if self._moment == 'after':
            os.pwrite(*args)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError('this process should be dead')


# The last take is the fourth: its first writes are the two halves of the take before it, around the end of the ring.
@pytest.mark.parametrize(
    ('number', 'moment', 'is_taken'),
    [(1, 'before', 0), (1, 'after', 0), (2, 'before', 0), (2, 'after', 0), (3, 'before', 0), (3, 'after', 1)],
)
def test_a_take_that_is_killed_has_taken_all_or_nothing(make, clock, number, moment, is_taken):
    limiter = make(5, 10)
    take_at(limiter, clock, 0, 1, 2)
    clock.now = NOW + 11
    assert limiter.take(4) == 0, 'two places to the end of the ring, and two from its beginning'

    def die(connection):
        rate_file.os = Deadly(number, moment)
        make(5, 10).take()

    clock.now = NOW + 12
    with Child(die) as child:
        assert child.wait() == -signal.SIGKILL

    assert taken_at_once(make(5, 10)) == 1 - is_taken
    clock.now = NOW + 21
    assert taken_at_once(make(5, 10)) == 4
    clock.now = NOW + 22
    assert taken_at_once(make(5, 10)) == 1


def test_processes_that_are_killed_while_they_take_let_nobody_have_more(path):
    rate = Rate(20, 0.1)

    def take(connection):
        limiter = RateFile(path, rate, clock=RecordingClock())
        while True:
            for when in take_for_real(limiter, 1):
                connection.send(when)

    times = []
    for _ in range(8):
        with Child(take) as victim, Child(take) as other:
            times += [child.hear() for _ in range(10) for child in (victim, other)]
            victim.kill()
            times += [other.hear() for _ in range(10)]

    assert_limit_was_kept(times, rate)


# --- the clock --------------------------------------------------------------


@pytest.mark.parametrize('step', [0.001, 5, 3600, NOW - 1])
def test_a_clock_that_is_set_back_makes_nobody_wait_for_longer_than_a_period(limiter, make, clock, step):
    taken_at_once(limiter)

    clock.now -= step
    assert limiter.take() == 10
    clock.now += 9.5
    assert make().take() == 0.5
    clock.now += 0.5
    assert taken_at_once(make()) == 3


def test_a_clock_that_is_set_back_makes_nobody_wait_for_less_than_a_period(limiter, clock):
    taken_at_once(limiter)

    clock.now -= 3600
    limiter.take()
    clock.now = math.nextafter(clock.now + 10, 0)
    assert limiter.take() > 0


def test_what_was_sent_before_the_clock_was_set_back_is_noticed_even_if_there_is_room_for_more(limiter, clock):
    take_at(limiter, clock, 0, 0)

    clock.now -= 3600
    assert limiter.take() == 0
    clock.now += 10
    assert taken_at_once(limiter) == 3


def test_a_clock_that_begins_in_1970_is_a_clock(path):
    assert taken_at_once(RateFile(path, LIMIT, clock=Clock(0))) == 3


# --- a changed limit --------------------------------------------------------


@pytest.mark.parametrize(
    ('seconds', 'later', 'left'),
    [(10, 0, 2), (100, 0, 2), (1, 0, 2), (1, 1, 5), (10, 1, 2), (10, 10, 5)],
)
def test_a_higher_limit_counts_what_was_sent_before(make, clock, seconds, later, left):
    taken_at_once(make(3, 10))

    clock.now += later
    assert taken_at_once(make(5, seconds)) == left


def test_a_lower_limit_counts_what_was_sent_before(make, clock):
    take_at(make(5, 10), clock, 0, 1, 2, 3, 4)

    assert make(2, 10).take() == 9, 'the last but one must go'
    clock.now = NOW + 13
    assert taken_at_once(make(2, 10)) == 1


def test_a_limit_that_is_lowered_and_raised_again_has_forgotten_nothing(make, clock):
    taken_at_once(make(5, 10))

    make(2, 10).take()
    make(1, 5).take()
    assert make(5, 10).take() == 10
    assert taken_at_once(make(6, 10)) == 1


def test_processes_with_an_old_and_a_new_limit_keep_each_its_own(make, clock, path):
    old, new = make(2, 10), make(4, 10)

    assert [new.take(), old.take(), old.take(), new.take(), new.take(), new.take()] == [0, 0, 10, 0, 0, 10]
    inode = path.stat().st_ino
    clock.now += 10
    assert [old.take(), old.take(), old.take(), new.take()] == [0, 0, 10, 0]
    assert path.stat().st_ino == inode, 'the file is not written anew for each of them'


def test_a_process_that_has_the_file_open_notices_that_another_one_has_replaced_it(make):
    old = make(2, 10)
    old.take()

    make(4, 10).take(3)

    assert old.take() == 10


def test_a_process_that_waits_for_the_lock_when_the_file_is_replaced_takes_the_new_one(path, clock, make, until):
    """The waiter has opened the file that loses its name before its lock is free."""
    make(2, 10).take()
    waits = []
    waiter = threading.Thread(target=lambda: waits.append(make(2, 10).take()))

    def let_the_waiter_come():
        if not waiter.ident:
            waiter.start()
            until(lambda: list(open_files().values()).count(str(path)) == 2)
        return NOW

    assert RateFile(path, Rate(5, 10), clock=let_the_waiter_come).take(4) == 0
    waiter.join()

    assert waits == [10]


# --- the file ---------------------------------------------------------------


@pytest.mark.parametrize('umask', [0, 0o022, 0o077, 0o777])
def test_the_file_can_be_read_and_written_by_its_owner_and_by_nobody_else(make, path, umask):
    def take():
        os.umask(umask)
        return make().take()

    assert run_in_child(take) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_there_is_room_for_all_takes_from_the_beginning(make, path):
    limiter = make(10_000, 60)
    limiter.take()
    size = path.stat().st_size

    assert path.stat().st_blocks * 512 >= size
    for count in (1, 999, 9000):
        limiter.take(count)
    assert path.stat().st_size == size


def test_the_file_is_the_only_one(limiter, tmp_path):
    taken_at_once(limiter)

    assert [path.name for path in tmp_path.iterdir()] == ['rate']


def test_nothing_is_open_before_the_first_take_and_nothing_afterwards(make):
    with no_open_files_are_left():
        limiter = make()
        with no_open_files_are_left():
            make()
        limiter.take()
        del limiter
        gc.collect()


def test_who_removes_the_file_begins_anew(limiter, make, path):
    taken_at_once(limiter)

    path.unlink()

    assert limiter.take() == 0
    assert taken_at_once(make()) == 2


def test_a_queue_in_the_same_directory_does_not_mind(path, limiter, tmp_path, clock):
    taken_at_once(limiter)

    queue = MaildirQueue(tmp_path, clock=clock)
    queue.put(ENVELOPE)
    (claim,) = queue.claim_due(clock.now)
    claim.settle(Settlement())
    queue.recover(clock.now)

    assert sum(queue.counts().values()) == 0
    assert limiter.take() == 10


# --- a damaged file ---------------------------------------------------------


def header_with(**changes):
    def change(content):
        names = ('magic', 'places', 'oldest', 'last_count', 'last_time')
        values = dict(zip(names, HEADER.unpack(content[: HEADER.size]), strict=True)) | changes
        return HEADER.pack(*values.values()) + content[HEADER.size :]

    return change


DAMAGES = {
    'cut off in the header': (lambda content: content[: HEADER.size - 1], 'it is too short'),
    'cut off behind the header': (lambda content: content[: HEADER.size], 'its numbers do not fit together'),
    'cut off at the end': (lambda content: content[:-1], 'its numbers do not fit together'),
    'longer': (lambda content: content + b'\0', 'its numbers do not fit together'),
    'all zeros': (lambda content: bytes(len(content)), 'it begins with something else'),
    'of somebody else': (lambda content: b'Dear diary,\n' * 100, 'it begins with something else'),
    'of another version': (header_with(magic=b'mqrate9\n'), 'it begins with something else'),
    'no places': (lambda content: header_with(places=0)(content)[: HEADER.size], 'its numbers do not fit together'),
    'too many places': (header_with(places=2**64 - 1), 'its numbers do not fit together'),
    'the oldest is nowhere': (header_with(oldest=3), 'its numbers do not fit together'),
    'the last take had none': (header_with(last_count=0), 'its numbers do not fit together'),
    'the last take had too many': (header_with(last_count=4), 'its numbers do not fit together'),
}


@pytest.mark.parametrize(('damage', 'told'), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize('is_open', [True, False])
def test_a_damaged_file_is_replaced_with_a_warning(limiter, make, path, caplog, damage, told, is_open):
    taken_at_once(limiter)
    path.write_bytes(damage(path.read_bytes()))
    user = limiter if is_open else make()

    assert taken_at_once(user) == 3

    (record,) = caplog.records
    assert (record.name, record.levelno) == ('mailqueue.queue_log', logging.WARNING)
    assert record.mailqueue['file'] == str(path)
    assert record.mailqueue['problem'] == (f'was damaged ({told}), and is replaced by one without the sends so far')
    assert make().take() == 10


def test_an_empty_file_is_a_new_one(limiter, path, caplog):
    path.touch()

    assert taken_at_once(limiter) == 3
    assert not caplog.records


@pytest.mark.parametrize('when', [math.nan, math.inf, NOW + 1e6])
@pytest.mark.parametrize(('where', 'wait'), [('the last take', 8), ('the place that is asked for', 9)])
def test_a_time_that_cannot_be_true_becomes_the_last_one_and_now(limiter, clock, path, where, wait, when):
    take_at(limiter, clock, 0, 1, 2)
    content = path.read_bytes()
    if where == 'the last take':
        content = header_with(last_time=when)(content)
    else:
        content = content[: HEADER.size] + struct.pack('<d', when) + content[HEADER.size + 8 :]
    path.write_bytes(content)

    assert limiter.take() == wait
    clock.now += 10
    assert taken_at_once(limiter) == 3


@pytest.mark.parametrize('count', [1, 2, 3])
def test_a_log_handler_that_takes_itself_does_not_wait_for_ever(limiter, path, count):
    class Mailing(logging.Handler):
        def emit(self, record):
            waits.append(limiter.take(count))

    waits = []
    path.write_text('damaged')
    logger, handler = logging.getLogger('mailqueue.queue_log'), Mailing()
    logger.addHandler(handler)
    try:
        assert limiter.take() == 0
    finally:
        logger.removeHandler(handler)

    assert waits == [10 if count == 3 else 0]


# --- a file that cannot be used ---------------------------------------------


def refusal_of(limiter, count=1):
    with no_open_files_are_left(), pytest.raises(QueueError) as refusal:
        limiter.take(count)
    return str(refusal.value)


def refusal(path, why):
    return f'The file {path}, in which sends are counted for mailqueue.rate_limit, cannot be created or used: {why}'


def no_folder(path):
    pass


def a_file_for_a_folder(path):
    path.parent.touch()


def a_folder_for_a_file(path):
    path.mkdir(parents=True)


def a_link(path):
    path.parent.mkdir()
    path.symlink_to(path.parent / 'elsewhere')


def a_folder_for_the_draft(path):
    Path(f'{path}.new').mkdir(parents=True)


@pytest.mark.parametrize(
    ('obstacle', 'why'),
    [
        (no_folder, 'No such file or directory'),
        (a_file_for_a_folder, 'Not a directory'),
        (a_folder_for_a_file, 'Is a directory'),
        (a_link, 'Too many levels of symbolic links'),
        (a_folder_for_the_draft, 'Is a directory'),
    ],
)
def test_an_obstacle_is_an_error_that_names_the_file(tmp_path, clock, obstacle, why):
    path = tmp_path / 'folder' / 'rate'
    obstacle(path)

    assert refusal_of(RateFile(path, LIMIT, clock=clock)) == refusal(path, why)


@pytest.mark.parametrize('is_there', [True, False])
def test_missing_permissions_are_an_error_that_names_the_file(tmp_path, path, make, is_there):
    def take():
        if not os.geteuid():
            os.setuid(65534)
        return refusal_of(make())

    if is_there:
        make().take()
    tmp_path.chmod(0)
    try:
        assert run_in_child(take) == refusal(path, 'Permission denied')
    finally:
        tmp_path.chmod(0o700)


def limit_file_size(size):
    """The kernel refuses what goes beyond, as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_file_for_which_there_is_no_room_is_an_error_and_can_be_created_later(make, path, tmp_path):
    def take():
        limit_file_size(10_000)
        return refusal_of(make(10_000, 60))

    assert run_in_child(take) == refusal(path, 'File too large')
    assert [found.name for found in tmp_path.iterdir()] == ['rate'], 'no draft is left'
    assert make(10_000, 60).take() == 0


@pytest.mark.parametrize(
    ('size', 'why'),
    [
        (HEADER.size + 16, 'File too large'),
        (HEADER.size + 24, 'not all of it can be written'),
    ],
)
def test_a_take_that_cannot_be_written_has_taken_nothing(make, clock, path, size, why):
    """The third and fourth of six places are to be written, and the file may not be so long."""
    make(6, 10).take()
    clock.now += 10
    make(6, 10).take()
    make(6, 10).take(2)
    before = path.read_bytes()

    def take():
        limit_file_size(size)
        return refusal_of(make(6, 10))

    assert run_in_child(take) == refusal(path, why)
    assert path.read_bytes()[: HEADER.size] == before[: HEADER.size]
    assert taken_at_once(make(6, 10)) == 3


def test_after_an_error_the_file_is_opened_anew(limiter, path):
    limiter.take()
    path.rename(path.with_suffix('.kept'))
    path.mkdir()
    with pytest.raises(QueueError):
        limiter.take()
    path.rmdir()
    path.with_suffix('.kept').rename(path)

    assert taken_at_once(limiter) == 2


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(make, path):
    taken_at_once(make())
    make().take()

    def cut_off():
        os.truncate(path, HEADER.size)
        return NOW + 10

    limiter = RateFile(path, LIMIT, clock=cut_off)

    assert refusal_of(limiter) == refusal(path, 'not all of it can be read')


def test_a_new_version_that_cannot_be_given_the_name_is_an_error_and_nothing_is_forgotten(make, path):
    taken_at_once(make(3, 10))

    with intercepted(Fault('EIO', 1)) as fault:
        fault._can_fail = lambda call: call.name == 'rename'
        assert refusal_of(make(5, 10)) == refusal(path, 'Input/output error')

    assert taken_at_once(make(5, 10)) == 2


def test_a_draft_that_a_killed_process_has_left_is_in_nobodys_way(make, path):
    Path(f'{path}.new').write_text('half a fi')

    assert taken_at_once(make()) == 3
    assert not Path(f'{path}.new').exists()
