"""The claims of one run, as the threads that deliver them see it."""

from __future__ import annotations

import os
import threading

import pytest

from pyramid_mailqueue.delivery.supply import PATIENCE, Supply
from pyramid_mailqueue.exceptions import QueueError, QueueFileError
from pyramid_mailqueue.results import Settlement

NOW = 1_000_000


class Due:
    """What is due, claimed when it is asked for; ``asked_in_vain`` is set when there is no more."""

    def __init__(self, queue, asked_in_vain):
        self.claims = queue.claim_due(NOW)
        self.asked_in_vain = asked_in_vain

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return next(self.claims)
        except StopIteration:
            self.asked_in_vain.set()
            raise


@pytest.fixture
def due(queue, make_event):
    return Due(queue, make_event())


@pytest.fixture
def put(queue, envelope):
    """Put so many messages into the queue; return their names, oldest due first."""

    def put(count):
        names = []
        for number in range(count):
            names.append(queue.put(envelope(f'r{number}')))
            os.utime(queue.place('new', names[-1]), (NOW - count + number,) * 2)
        return names

    return put


@pytest.fixture
def in_thread():
    """Call something in a thread: ``in_thread(call)`` returns a function that waits for what it returns."""
    threads = []

    def in_thread(call):
        results = []
        threads.append(thread := threading.Thread(target=lambda: results.append(call())))
        thread.start()

        def result():
            thread.join(30)
            return results[0]

        return result

    yield in_thread
    for thread in threads:
        thread.join(30)


def ids(claims):
    return [claim and claim.id for claim in claims]


# --- the order --------------------------------------------------------------


def test_claims_are_handed_out_oldest_due_first_and_made_when_they_are_asked_for(queue, due, put):
    names = put(3)
    share = Supply(due).share()

    assert queue.state == {'waiting': 3}
    claims = [share.take(), share.take_now()]
    assert queue.state == {'waiting': 1, 'in progress': 2}
    assert ids([*claims, share.take(), share.take_now(), share.take()]) == [*names, None, None]


def test_no_claim_is_handed_out_twice_and_each_thread_gets_its_own_in_order(due, put, in_thread):
    names = put(60)
    supply = Supply(due)
    shares = [supply.share() for _ in range(4)]

    def take_all(share):
        taken = []
        while (claim := share.take_now()) is not None:
            taken.append(claim.id)
        return taken

    taken = [result() for result in [in_thread(lambda share=share: take_all(share)) for share in shares]]

    assert sorted(name for names in taken for name in names) == sorted(names)
    assert all(own == sorted(own, key=names.index) for own in taken)


def test_no_more_are_handed_out_than_the_limit_allows(queue, due, put):
    names = put(3)
    share = Supply(due, limit=2).share()

    assert ids([share.take(), share.take(), share.take_now(), share.take()]) == [*names[:2], None, None]
    assert queue.state['waiting'] == 1


def test_what_is_ready_is_handed_out_in_order_and_no_more_is_claimed_for_it_than_was_asked_for(queue, due, put):
    names = put(5)
    supply = Supply(due, limit=4)
    share = supply.share()

    assert [supply.ready(2), supply.ready(2)] == [2, 2]
    assert queue.state == {'waiting': 3, 'in progress': 2}
    assert ids([share.take()]) == names[:1]
    assert supply.ready(9) == 3
    assert ids([share.take() for _ in range(4)]) == [*names[1:4], None]


# --- before the session is open ---------------------------------------------


def test_who_is_opening_a_session_is_not_waited_for_and_holds_nothing(due, put):
    put(1)
    supply = Supply(due)
    share, opening = supply.share(), supply.share()

    assert supply.opening == 2
    share.done_with(share.take())
    assert supply.opening == 1
    assert share.take() is None
    assert opening.take_now() is None
    assert supply.opening == 0


def test_who_could_not_open_a_session_leaves_what_there_is_to_the_others(due, put):
    names = put(2)
    supply = Supply(due)
    share, opening = supply.share(), supply.share()
    assert supply.ready(2) == 2

    assert opening.hand_over(())
    assert supply.opening == 1
    assert not share.hand_over(())
    assert ids([share.take(), share.take(), share.take()]) == [*names, None]


def test_a_session_is_opened_ahead_only_if_the_rate_allows_a_message(due, put):
    put(3)
    for take, allows in ((lambda _: 0, True), (lambda _: 7, False), (lambda _: 1 / 0, False)):

        def take_from_rate(count, take=take):
            assert count == 0
            try:
                return take(count)
            except ZeroDivisionError:
                raise QueueError('the file rate cannot be read') from None

        supply = Supply(due, take_from_rate=take_from_rate)
        assert supply.share().opens_first is allows
        assert bool(supply.ready(1)) is allows


# --- one session too many ---------------------------------------------------


def test_what_is_handed_over_is_the_next_that_others_get(due, put):
    names = put(4)
    supply = Supply(due)
    first, second = supply.share(), supply.share()
    first.take()
    taken = [second.take(), second.take_now()]

    assert second.hand_over(taken)
    assert not second.has_claims
    assert ids([first.take_now(), first.take_now(), first.take_now()]) == names[1:]


def test_what_was_handed_over_does_not_count_twice_for_the_limit(due, put):
    names = put(4)
    supply = Supply(due, limit=2)
    first, second = supply.share(), supply.share()
    second.hand_over([second.take()])

    assert ids([first.take_now(), first.take_now(), first.take_now()]) == [*names[:2], None]


def test_nothing_can_be_handed_over_by_the_last_thread(due, put):
    put(2)
    supply = Supply(due)
    first, second, third = supply.share(), supply.share(), supply.share()

    assert first.hand_over([first.take()])
    assert second.hand_over([])
    claim = third.take()
    assert not third.hand_over([claim])
    assert third.has_claims


@pytest.mark.parametrize('how', ['took nothing more', 'lost'])
def test_who_has_ended_takes_over_nothing(due, put, how):
    put(1)
    supply = Supply(due)
    first, second = supply.share(), supply.share()
    claim = second.take()
    second.succeeded()
    if how == 'lost':
        first.lost()
    else:
        assert first.take() is None

    assert not second.hand_over([claim])


def test_who_has_nothing_more_waits_for_what_a_new_thread_may_hand_over(due, put, in_thread):
    names = put(2)
    supply = Supply(due)
    old, new = supply.share(), supply.share()
    old.done_with(old.take())
    assert old.succeeded()
    claim = new.take()
    taken = in_thread(old.take)
    # It waits: it has asked, and holds the lock until it does.
    due.asked_in_vain.wait(30)

    assert new.hand_over([claim])
    assert ids([taken(), old.take()]) == [names[1], None]


@pytest.mark.parametrize('how', ['succeeded', 'has nothing more either', 'lost', 'the run is over'])
def test_who_waits_for_a_new_thread_ends_when_it_is_new_no_longer(due, put, in_thread, how):
    put(2)
    supply = Supply(due)
    old, new = supply.share(), supply.share()
    old.take()
    old.succeeded()
    new.take()
    taken = in_thread(old.take)
    due.asked_in_vain.wait(30)
    if how == 'succeeded':
        assert new.succeeded()
    elif how == 'lost':
        new.lost()
    elif how == 'the run is over':
        supply.end()
    else:
        assert new.take() is None

    assert taken() is None


def test_only_the_first_success_of_a_thread_is_one(due):
    share = Supply(due).share()

    assert [share.succeeded() for _ in range(3)] == [True, False, False]


def test_who_has_handed_over_is_new_no_longer(due, put, in_thread):
    names = put(1)
    supply = Supply(due)
    first, second = supply.share(), supply.share()
    second.hand_over([second.take()])

    # As when a message that was partly accepted before is settled after that.
    assert not second.succeeded()
    assert ids([first.take()]) == names
    assert in_thread(first.take)() is None


# --- a rate -----------------------------------------------------------------


class Rate:
    """Answers one after the other; ``asked`` has for how many recipients."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def __call__(self, count):
        if not count:
            return 0
        self.asked.append(count)
        answer = self.answers.pop(0) if self.answers else 0
        if isinstance(answer, Exception):
            raise answer
        return answer() if callable(answer) else answer


def test_each_message_is_taken_from_the_rate_with_all_its_recipients(queue, envelope):
    queue.put(envelope('ada', 'bob', 'eve'))
    rate = Rate()
    share = Supply(queue.claim_due(queue.clock() + 1), take_from_rate=rate).share()

    assert share.take()
    assert rate.asked == [3]


def test_what_the_rate_does_not_allow_at_once_is_the_next_one_still(due, put):
    names = put(2)
    share = Supply(due, take_from_rate=Rate(0.001)).share()

    assert ids([share.take_now(), share.take_now(), share.take_now()]) == [None, *names]


def test_who_has_nothing_else_to_do_waits_for_the_rate_and_asks_again(due, put):
    names = put(1)
    rate = Rate(0.001, 0.001)

    assert ids([Supply(due, take_from_rate=rate).share().take()]) == names
    assert rate.asked == [1, 1, 1]


def test_who_waits_for_the_rate_sees_that_the_run_is_over(due, put, queue):
    put(1)
    supply = Supply(due, take_from_rate=Rate(lambda: supply.end() or PATIENCE))
    share = supply.share()

    assert share.take() is None
    supply.release()
    assert queue.state == {'waiting': 1}


def test_a_rate_that_allows_nothing_for_long_ends_the_run_when_somebody_has_nothing_else_to_do(due, put, queue):
    names = put(3)
    supply = Supply(due, take_from_rate=Rate(0, PATIENCE + 1, PATIENCE + 1))
    share = supply.share()

    assert ids([share.take(), share.take_now()]) == [names[0], None]
    assert not supply.is_rate_reached
    assert ids([share.take(), share.take_now()]) == [None] * 2
    assert supply.ready(1) == 0
    assert (supply.is_rate_reached, supply.error, supply.is_over) == (True, None, False)
    supply.release()
    assert queue.state == {'waiting': 3}


@pytest.mark.parametrize('error', [OSError(5, 'Input/output error'), QueueError('The file cannot be used')])
@pytest.mark.parametrize('how', ['take', 'take_now'])
def test_a_rate_that_cannot_be_read_ends_the_run(due, put, queue, error, how):
    put(2)
    supply = Supply(due, take_from_rate=Rate(error))

    assert getattr(supply.share(), how)() is None
    assert (supply.error, supply.is_over) == (error, True)
    supply.release()
    assert queue.state == {'waiting': 2}


class Unreadable:
    id = 'unreadable'

    @property
    def recipients(self):
        raise QueueFileError('Envelope-to is missing')


def test_a_message_that_cannot_be_read_is_left_to_who_tells_of_it():
    rate, claim = Rate(), Unreadable()

    assert Supply(iter([claim]), take_from_rate=rate).share().take() is claim
    assert rate.asked == []


# --- the end ----------------------------------------------------------------


def test_a_queue_that_cannot_be_read_ends_the_run_and_the_first_error_is_kept(queue, put):
    put(1)

    def claims():
        yield from queue.claim_due(NOW)
        raise QueueError('first')

    supply = Supply(claims())
    share = supply.share()
    assert share.take()

    assert (share.take_now(), share.take(), share.is_over) == (None, None, True)
    assert str(supply.error) == 'first'


def test_after_the_end_nothing_is_handed_out(due, put):
    put(2)
    supply = Supply(due)
    share = supply.share()
    supply.end()

    assert (share.is_over, supply.ready(1), share.take_now(), share.take()) == (True, 0, None, None)


def test_whether_there_is_more(due, put):
    put(3)
    supply = Supply(due)
    share, other = supply.share(), supply.share()
    claim = share.take()
    supply.end()
    assert supply.has_more(), 'in hand'

    share.done_with(claim)
    assert supply.has_more(), 'in the queue'

    supply.release()
    rest = Supply(due)
    share, other = rest.share(), rest.share()
    assert rest.ready(2) == 1
    assert rest.has_more(), 'before anybody has begun'

    assert share.hand_over([share.take()])
    assert rest.has_more(), 'handed over'

    other.done_with(other.take())
    assert not rest.has_more()


def test_who_looks_whether_there_is_more_does_not_exceed_the_limit(due, put):
    names = put(3)
    supply = Supply(due, limit=2)
    share = supply.share()

    assert supply.has_more()
    assert ids([share.take(), share.take(), share.take()]) == [*names[:2], None]


def test_beyond_the_limit_there_is_no_more(due, put):
    put(2)
    supply = Supply(due, limit=1)
    share = supply.share()
    share.done_with(share.take())

    assert not supply.has_more()


def test_everything_that_is_not_settled_is_given_back_as_it_was(queue, due, put):
    put(6)
    before = [(file.name, file.stat().st_ino, file.stat().st_mtime_ns) for file in queue.files('new')]
    supply = Supply(due)
    # Taken and in hand, taken and handed over, and looked at to see whether there is more.
    in_hand, handing_over = supply.share(), supply.share()
    assert supply.ready(4) == 4
    in_hand.take()
    handing_over.hand_over([handing_over.take(), handing_over.take_now()])
    assert queue.state == {'waiting': 2, 'in progress': 4}

    supply.release()
    supply.release()

    assert [(file.name, file.stat().st_ino, file.stat().st_mtime_ns) for file in queue.files('new')] == before


def test_what_a_defect_has_shown_over_stays_claimed(queue, due, put):
    put(2)
    supply = Supply(due)
    share = supply.share()
    share.take().settle(Settlement())
    share.take()
    share.lost()
    supply.release()

    assert queue.state == {'in progress': 1}
