"""The retry policy: sums to be done in one's head, and what becomes of each recipient."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zope.interface.verify import verifyObject

from pyramid_mailqueue.delivery.retry import ExponentialBackoff
from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.interfaces import IRetryPolicy
from pyramid_mailqueue.results import Burial, Reply, SendResult, Settlement

MINUTE, HOUR, DAY = 60, 3600, 86400
NOW = 1_800_000_000.0

ADA, BOB, EVE = 'ada@x.example', 'bob@x.example', 'eve@x.example'
OK, LATER, NEVER = Reply(250, 'ok', '2.1.5'), Reply(451, 'later', '4.3.0'), Reply(550, 'no such user', '5.1.1')
TROUBLE = ServerTrouble('mail.example:25 is down')

EXACT = ExponentialBackoff(jitter=0)


def decide(policy, result, *, recipients=(ADA,), attempts=0, age=0.0):
    return policy.decide(recipients, attempts, NOW - age, result, NOW)


def test_it_is_what_it_says():
    assert verifyObject(IRetryPolicy, ExponentialBackoff())


# --- when -------------------------------------------------------------------


@pytest.mark.parametrize(
    ('attempts_before', 'wait'),
    [
        (0, 5 * MINUTE),  # the first wait
        (1, 10 * MINUTE),  # 2 * 5
        (2, 20 * MINUTE),  # 2 * 10
        (3, 40 * MINUTE),  # 2 * 20
        (4, 4000),  # 2 * 40 min are 4800 s, and 4000 s is the most
        (5, 4000),
        (1_000, 4000),  # 2.0 ** 1000 * 300 is a number still, 2.0 ** 1024 is not
        (100_000, 4000),
    ],
)
def test_each_wait_is_twice_the_last_until_it_is_the_longest(attempts_before, wait):
    settlement = decide(EXACT, SendResult({ADA: LATER}), attempts=attempts_before)

    assert settlement == Settlement((ADA,), due=NOW + wait, last_reply='451 4.3.0 later')


def test_the_waits_can_be_set():
    policy = ExponentialBackoff(first=10, longest=25, jitter=0)

    # 10, 20, and 40 is more than 25
    assert [policy.wait_after(attempts, 'any') for attempts in (1, 2, 3)] == [10, 20, 25]


@given(st.integers(1, 200), st.text())
def test_the_jitter_is_a_tenth_at_most(attempts, seed):
    exact = EXACT.wait_after(attempts, seed)

    assert 0.9 * exact <= ExponentialBackoff().wait_after(attempts, seed) <= 1.1 * exact


def test_the_jitter_spreads_what_failed_together():
    waits = {ExponentialBackoff().wait_after(1, f'message {number}') for number in range(1000)}

    # 1000 messages in 60 seconds: nearly all at a time of their own, and some in each tenth of the range.
    assert len(waits) > 990
    assert {int((wait - 270) / 6) for wait in waits} == set(range(10))


def test_a_message_always_gets_the_same_schedule():
    dues = {decide(ExponentialBackoff(), SendResult({ADA: LATER}), attempts=3).due for _ in range(5)}

    assert len(dues) == 1


# --- until when -------------------------------------------------------------


@pytest.mark.parametrize(
    ('age', 'is_given_up'),
    [(0, False), (5 * DAY - 1, False), (5 * DAY, True), (30 * DAY, True), (-HOUR, False)],
)
def test_a_message_is_given_up_at_its_first_failure_after_five_days(age, is_given_up):
    settlement = decide(EXACT, SendResult({ADA: LATER}), attempts=100, age=age)

    assert bool(settlement.burials) == is_given_up
    assert bool(settlement.waiting) == (not is_given_up)


@pytest.mark.parametrize(
    ('lifetime', 'words'),
    [
        (5 * DAY, '5 days'),
        (2.5 * DAY, '2.5 days'),
        (36 * HOUR, '36 hours'),
        (90 * MINUTE, '90 minutes'),
        (90, '90 seconds'),
        (0, '0 seconds'),
    ],
)
def test_the_reason_names_the_lifetime_and_the_last_reply(lifetime, words):
    policy = ExponentialBackoff(lifetime=lifetime)

    (burial,) = decide(policy, SendResult({ADA: LATER}), age=lifetime).burials

    assert burial == Burial((ADA,), f'given up after {words}; the last reply was: 451 4.3.0 later')


def test_no_message_is_given_up_because_of_an_outage():
    settlement = decide(EXACT, SendResult(trouble=TROUBLE), age=365 * DAY)

    assert settlement == Settlement((ADA,), counted=False)


# --- who --------------------------------------------------------------------


def test_when_everybody_has_it_the_message_is_done():
    settlement = decide(EXACT, SendResult({ADA: OK, BOB: OK}), recipients=(ADA, BOB))

    assert settlement == Settlement()


def test_a_refusal_is_final_and_names_the_reply():
    settlement = decide(EXACT, SendResult({ADA: NEVER}))

    assert settlement == Settlement(burials=(Burial((ADA,), '550 5.1.1 no such user'),))


def test_refusals_with_the_same_words_are_one_dead_letter():
    other = Reply(552, 'full', '5.2.2')

    settlement = decide(EXACT, SendResult({ADA: NEVER, BOB: other, EVE: NEVER}), recipients=(ADA, BOB, EVE))

    assert settlement.burials == (Burial((ADA, EVE), '550 5.1.1 no such user'), Burial((BOB,), '552 5.2.2 full'))


def test_each_recipient_goes_its_own_way():
    settlement = decide(EXACT, SendResult({ADA: OK, BOB: LATER, EVE: NEVER}), recipients=(ADA, BOB, EVE))

    assert settlement == Settlement(
        waiting=(BOB,),
        due=NOW + 5 * MINUTE,
        last_reply='451 4.3.0 later',
        burials=(Burial((EVE,), '550 5.1.1 no such user'),),
    )


def test_after_the_lifetime_refused_and_deferred_are_buried_with_their_own_reasons():
    settlement = decide(EXACT, SendResult({ADA: LATER, EVE: NEVER}), recipients=(ADA, EVE), age=6 * DAY)

    assert settlement == Settlement(
        burials=(
            Burial((EVE,), '550 5.1.1 no such user'),
            Burial((ADA,), 'given up after 5 days; the last reply was: 451 4.3.0 later'),
        )
    )


def test_trouble_alone_is_no_attempt_and_leaves_the_due_time_alone():
    assert decide(EXACT, SendResult(trouble=TROUBLE)) == Settlement((ADA,), due=None, counted=False)


def test_who_always_makes_the_server_hang_up_is_given_up_after_the_lifetime():
    trouble = ServerTrouble('mail.example:25 hung up.', in_message=True)

    young, old = (decide(EXACT, SendResult(trouble=trouble), age=days * DAY) for days in (4, 6))

    assert young == Settlement((ADA,), counted=False, stumbled=True)
    assert old == Settlement(
        burials=(Burial((ADA,), 'given up after 5 days; the last trouble was: mail.example:25 hung up.'),)
    )


def test_an_outage_that_lasts_longer_than_the_lifetime_buries_nobody():
    assert decide(EXACT, SendResult(trouble=TROUBLE), age=6 * DAY) == Settlement((ADA,), counted=False)


def test_trouble_half_way_keeps_those_who_were_not_reached():
    result = SendResult({ADA: OK, EVE: NEVER}, trouble=TROUBLE)

    settlement = decide(EXACT, result, recipients=(ADA, BOB, EVE))

    # Bob waits as he was: nobody has said anything of him.
    assert settlement == Settlement(
        waiting=(BOB,), due=None, counted=False, burials=(Burial((EVE,), '550 5.1.1 no such user'),)
    )


def test_trouble_after_a_deferral_is_an_attempt():
    settlement = decide(EXACT, SendResult({ADA: LATER}, trouble=TROUBLE), recipients=(ADA, BOB))

    assert settlement == Settlement((ADA, BOB), due=NOW + 5 * MINUTE, last_reply='451 4.3.0 later')


RECIPIENTS = tuple(f'{name}@x.example' for name in 'abcdef')


@given(
    recipients=st.lists(st.sampled_from(RECIPIENTS), min_size=1, unique=True).map(tuple),
    replies=st.dictionaries(st.sampled_from(RECIPIENTS), st.builds(Reply, st.integers(0, 999), st.text(max_size=3))),
    trouble=st.sampled_from([None, TROUBLE]),
    attempts=st.integers(0, 10_000),
    age=st.floats(-DAY, 10 * DAY),
)
def test_every_recipient_is_accepted_or_waits_or_is_buried(recipients, replies, trouble, attempts, age):
    result = SendResult(replies, trouble=trouble)

    settlement = decide(ExponentialBackoff(), result, recipients=recipients, attempts=attempts, age=age)

    accepted = [recipient for recipient in recipients if recipient in result.accepted]
    buried = [recipient for burial in settlement.burials for recipient in burial.recipients]
    assert sorted([*accepted, *settlement.waiting, *buried]) == sorted(recipients)
    assert all(burial.reason for burial in settlement.burials) or '' in {reply.text for reply in replies.values()}
    assert settlement.due is None or settlement.due > NOW
    assert settlement.counted or settlement.due is None
