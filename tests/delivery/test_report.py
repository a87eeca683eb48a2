"""What the logs have of an attempt: one line for what became of each recipient, and how much it matters."""

from __future__ import annotations

import pytest

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.retry import ExponentialBackoff
from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.results import Reply, SendResult

ADA, BOB, EVE = 'ada@x.example', 'bob@x.example', 'eve@x.example'
OK, LATER, NEVER = Reply(250, 'ok', '2.1.5'), Reply(451, 'later', '4.3.0'), Reply(550, 'no such user', '5.1.1')
# The simplest answers.
YES, NO = True, False
HOUR = 3600


@pytest.fixture
def levels(caplog, told):
    """The level at which each thing was told, by logger and status; without arrivals in the queue."""

    def levels():
        events = [
            (record.name.removeprefix('mailqueue.'), record.mailqueue['status'], record.levelname)
            for record in caplog.records
            if hasattr(record, 'mailqueue')
        ]
        return [event for event in events if event != ('queue_log', 'queued', 'INFO')]

    return levels


def test_each_recipient_has_one_line_however_many_transports_were_asked(queue, envelope, says, told):
    first = says(SendResult({ADA: LATER, BOB: LATER, EVE: LATER}), name='first')
    second = says(SendResult({ADA: OK, BOB: LATER, EVE: NEVER}), name='second')

    MessageHandler([first, second]).deliver(queue.claimed(envelope('ada', 'bob', 'eve')))

    assert told('status', 'to', 'via', 'smtp')[:3] == [
        ('sent', ADA, 'second', '250 2.1.5 ok'),
        ('deferred', BOB, 'second', '451 4.3.0 later'),
        ('buried', EVE, 'second', '550 5.1.1 no such user'),
    ]
    # And what became of the message.
    assert told('status', 'to', 'smtp', 'error')[3:] == [
        ('deferred', BOB, None, '451 4.3.0 later'),
        ('buried', EVE, None, '550 5.1.1 no such user'),
    ]


def test_who_was_not_reached_before_the_server_was_in_trouble_is_told_as_deferred(queue, envelope, says, told):
    result = SendResult({ADA: LATER}, trouble=ServerTrouble('mail.example:25 is down', in_message=True))

    MessageHandler([says(result)]).deliver(queue.claimed(envelope('ada', 'bob')))

    assert told('status', 'to', 'smtp', 'error')[:2] == [
        ('deferred', ADA, '451 4.3.0 later', None),
        ('deferred', BOB, None, 'mail.example:25 is down'),
    ]


def test_what_waits_uncounted_is_not_told(queue, envelope, says, told):
    result = SendResult({ADA: OK}, trouble=ServerTrouble('mail.example:25 is down', in_message=True))

    MessageHandler([says(result)]).deliver(queue.claimed(envelope('ada', 'bob')))

    assert told('status', 'to') == [('sent', ADA)]
    assert queue.state == {'waiting': 1}


def test_a_message_that_is_given_up_is_told_with_the_last_word_and_with_the_reason(queue, envelope, says, told):
    handler = MessageHandler([says(SendResult({ADA: LATER}))], retry_policy=ExponentialBackoff(lifetime=0))

    handler.deliver(queue.claimed(envelope()))

    assert told('status', 'smtp', 'error') == [
        ('buried', '451 4.3.0 later', None),
        ('buried', None, 'given up after 0 seconds; the last reply was: 451 4.3.0 later'),
    ]


@pytest.mark.parametrize(
    ('age', 'answer', 'expected'),
    [
        (0, YES, [('delivery_log', 'sent', 'INFO')]),
        (2 * HOUR, YES, [('delivery_log', 'sent', 'INFO')]),
        (0, NO, [('delivery_log', 'deferred', 'INFO'), ('queue_log', 'deferred', 'INFO')]),
        (HOUR - 60, NO, [('delivery_log', 'deferred', 'INFO'), ('queue_log', 'deferred', 'INFO')]),
        (HOUR + 60, NO, [('delivery_log', 'deferred', 'INFO'), ('queue_log', 'deferred', 'WARNING')]),
        (0, SendResult({ADA: NEVER}), [('delivery_log', 'buried', 'INFO'), ('queue_log', 'buried', 'ERROR')]),
    ],
)
def test_what_is_normal_is_info_what_waits_for_long_a_warning_and_a_dead_letter_an_error(
    queue, envelope, says, levels, age, answer, expected
):
    MessageHandler([says(answer)], clock=lambda: queue.clock() + age).deliver(queue.claimed(envelope()))

    assert levels() == expected


def test_what_nobody_listens_to_is_not_told(queue, envelope, says, caplog):
    MessageHandler([says(YES)]).deliver(queue.claimed(envelope()))

    assert caplog.records == []
