"""Sending without a transaction: transports of one's own, in an order of one's own, and messages in a queue."""

from __future__ import annotations

import logging
from email.message import EmailMessage, Message

import pytest

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.plugins import MQAction, MQSignal
from pyramid_mailqueue.exceptions import AddressError, MessageError, QueueError, WrongState
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queue_runner import QueuedMessage
from pyramid_mailqueue.results import Reply, SendResult
from pyramid_mailqueue.transports.maildir import MaildirBackend
from pyramid_mailqueue.transports.smtp.transaction import OUTCOME_UNKNOWN

ADA, BOB, EVE = 'ada@x.example', 'bob@x.example', 'eve@x.example'
SHOP = 'shop@site.example'
OK, LATER, NEVER = Reply(250, 'ok', '2.1.5'), Reply(451, 'later', '4.3.0'), Reply(550, 'no such user', '5.1.1')
# The simplest answers.
YES, NO = True, False
CONTENT = b'Subject: hello\r\nMessage-ID: <1@site.example>\r\nDate: Tue, 24 Nov 2026 07:28:11 +0000\r\n\r\nHello.\r\n'


class Keeps:
    """A transport that takes everything, and keeps it."""

    def __init__(self):
        self.sent = []

    def send(self, sender, recipients, content):
        self.sent.append((sender, recipients, content))
        return True


@pytest.fixture
def backend(queue_dir, queue):
    """The queue of the tests, as a transport."""
    return MaildirBackend(queue_dir)


@pytest.fixture
def old_message():
    made = Message()
    made['From'] = f'The shop <{SHOP}>'
    made['To'] = ADA
    made.set_payload('Hello.\n')
    return made


@pytest.fixture
def new_message():
    made = EmailMessage()
    made['From'] = f'The shop <{SHOP}>'
    made['To'] = ADA
    made.set_content('Hello.\n')
    return made


# --- in the order of the transports -----------------------------------------


def test_the_first_success_is_the_end(queue, backend, says, told):
    first = says(YES)

    result = MessageHandler([first, backend]).send_message(CONTENT, sender=SHOP, recipient=ADA)

    assert result
    assert result.queued is False
    assert first.asked == [(ADA,)]
    assert queue.state == {}
    assert told('status', 'to', 'via', 'id', 'attempts') == [('sent', ADA, 'says', None, None)]


@pytest.mark.parametrize('answer', ['no', 'later', 'trouble', 'unknown', 'defect'])
def test_what_cannot_be_sent_is_queued(queue, backend, says, trouble, answer):
    answers = {
        'no': NO,
        'later': SendResult({ADA: LATER}),
        'trouble': trouble,
        # Nobody else would try it later.
        'unknown': SendResult({ADA: OUTCOME_UNKNOWN}, trouble=trouble),
        'defect': RuntimeError('a defect'),
    }

    result = MessageHandler([says(answers[answer]), backend]).send_message(CONTENT, sender=SHOP, recipient=ADA)

    assert result
    assert result.queued is True
    (header,) = queue.headers('new')
    assert (header.sender, header.recipients, header.attempts) == (SHOP, (ADA,), 0)
    assert queue.files('new')[0].read_bytes().endswith(CONTENT)


def test_the_log_tells_why_it_was_queued(backend, says, trouble, told):
    for answer in (trouble, SendResult({ADA: LATER})):
        MessageHandler([says(answer), backend]).send_message(CONTENT, sender=SHOP, recipient=ADA)

    assert told('status', 'to', 'via', 'smtp', 'error') == [
        ('queued', ADA, 'maildir', None, 'mail.example:25 is down'),
        ('queued', ADA, 'maildir', None, '451 4.3.0 later'),
    ]


def test_always_enqueue(queue, backend):
    result = MessageHandler([backend]).send_message(CONTENT, sender=SHOP, recipients=(ADA, BOB))

    assert result
    assert result.queued
    assert [header.recipients for header in queue.headers('new')] == [(ADA, BOB)]


def test_never_enqueue(says, trouble, told, caplog):
    handler = MessageHandler([says(YES, NO, SendResult({ADA: NEVER}), trouble)])

    results = [handler.send_message(CONTENT, sender=SHOP, recipient=ADA) for _ in range(4)]

    assert list(map(bool, results)) == [True, False, False, False]
    assert [result.queued for result in results] == [False] * 4
    assert told('status', 'error')[-2:] == [('discarded', 'mail.example:25 is down')] * 2
    # Nothing is thrown away in silence.
    assert {record.levelname for record in caplog.records if record.name == 'mailqueue.queue_log'} == {'WARNING'}


@pytest.mark.parametrize('answer', [SendResult({ADA: OK, BOB: NEVER}), SendResult({ADA: OK, BOB: LATER})])
def test_never_enqueue_is_false_if_one_of_two_is_not_sent_to_and_says_who(says, answer, told):
    result = MessageHandler([says(answer)]).send_message(CONTENT, sender=SHOP, recipients=[ADA, BOB])

    assert not result
    assert (result.accepted, result.failed, result.queued) == ((ADA,), (BOB,), False)
    assert told('status', 'to') == [('sent', ADA), ('discarded', BOB), ('discarded', BOB)]


def test_who_was_not_tried_is_in_the_result_with_the_reason(says, trouble):
    broken_off = SendResult({ADA: OK}, trouble=trouble)

    results = [
        MessageHandler(transports).send_message(CONTENT, sender=SHOP, recipients=[ADA, BOB])
        for transports in ([says(broken_off)], [says(trouble)], [])
    ]

    assert list(map(bool, results)) == [False] * 3
    assert [result.failed for result in results] == [(BOB,), (ADA, BOB), (ADA, BOB)]
    assert [result.replies[BOB].text for result in results] == [
        'mail.example:25 is down',
        'mail.example:25 is down',
        'no transport has tried this recipient',
    ]


def test_without_any_transport_nothing_is_sent(told):
    assert not MessageHandler([]).send_message(CONTENT, sender=SHOP, recipient=ADA)
    assert told('status', 'to') == [('discarded', ADA), ('discarded', ADA)]


def test_only_who_is_still_open_is_queued(queue, backend, says, told):
    first = says(SendResult({ADA: OK, BOB: LATER}))

    result = MessageHandler([first, backend]).send_message(CONTENT, sender=SHOP, recipients=[ADA, BOB])

    assert result.accepted == (ADA, BOB)
    assert result.queued
    assert [header.recipients for header in queue.headers('new')] == [(BOB,)]
    assert told('status', 'to') == [('sent', ADA), ('queued', BOB)]


def test_while_a_server_rests_its_messages_are_queued_at_once(queue, backend, says, trouble):
    first = says(trouble)
    handler = MessageHandler([first, backend])

    results = [handler.send_message(CONTENT, sender=SHOP, recipient=ADA) for _ in range(3)]

    assert [result.queued for result in results] == [True] * 3
    assert len(first.asked) == 1
    assert queue.state == {'waiting': 3}


def test_what_the_rate_does_not_allow_is_queued(queue, backend, says):
    asked = []

    def take(number):
        asked.append(number)
        return 60.0

    first = says(YES)
    handlers = [MessageHandler(transports, take_from_rate=take) for transports in ([first], [first, backend])]

    results = [handler.send_message(CONTENT, sender=SHOP, recipients=[ADA, BOB]) for handler in handlers]

    assert list(map(bool, results)) == [False, True]
    assert [result.failed for result in results] == [(ADA, BOB), ()]
    assert asked == [2, 2]
    assert first.asked == []
    assert queue.state == {'waiting': 1}


# --- who is refused ---------------------------------------------------------


def test_who_is_refused_is_in_a_dead_letter_if_there_is_a_queue_for_it(queue, backend, says, told, caplog):
    first = says(SendResult({ADA: OK, BOB: NEVER, EVE: NEVER}))

    result = MessageHandler([first, backend]).send_message(CONTENT, sender=SHOP, recipients=[ADA, BOB, EVE])

    (header,) = queue.headers('dead')
    assert (header.recipients, header.last_reply) == ((BOB, EVE), '550 5.1.1 no such user')
    assert queue.state == {'dead': 1}
    assert not result
    assert (result.accepted, result.failed) == ((ADA,), (BOB, EVE))
    assert told('status', 'to') == [('sent', ADA), ('buried', BOB), ('buried', EVE), ('buried', f'{BOB},{EVE}')]
    assert caplog.records[-1].levelname == 'ERROR'


def test_if_everybody_is_refused_the_result_is_false(queue, backend, says):
    result = MessageHandler([says(SendResult({ADA: NEVER})), backend]).send_message(CONTENT, SHOP, ADA)

    assert not result
    assert not result.queued
    assert queue.state == {'dead': 1}


def test_a_dead_letter_that_cannot_be_kept_is_told_as_lost(says, told, caplog):
    class Full:
        name = 'full'

        def send(self, sender, recipients, content):
            raise QueueError('The disk is full')

        def bury(self, sender, content, burials):
            raise QueueError('The disk is full')

    result = MessageHandler([says(SendResult({ADA: NEVER})), Full()]).send_message(CONTENT, SHOP, ADA)

    assert not result
    assert told('status', 'to') == [('discarded', ADA), ('discarded', ADA)]
    assert 'The transport full cannot keep a dead letter' in caplog.messages


# --- what can be sent -------------------------------------------------------


def test_bytes_go_out_as_they_are():
    keeps = Keeps()

    MessageHandler([keeps]).send_message(CONTENT, sender=SHOP, recipient=ADA)

    assert keeps.sent == [(SHOP, (ADA,), CONTENT)]


@pytest.mark.parametrize('kind', ['old_message', 'new_message'])
def test_a_message_of_the_standard_library_says_who_sends_it_and_to_whom(kind, request):
    keeps = Keeps()

    assert MessageHandler([keeps]).send_message(request.getfixturevalue(kind))

    ((sender, recipients, content),) = keeps.sent
    assert (sender, recipients) == (SHOP, (ADA,))
    assert b'\r\nMessage-ID: <' in content


@pytest.mark.parametrize('recipients', [[ADA, BOB], (ADA, BOB), iter([ADA, BOB])])
def test_recipients_are_of_any_kind(recipients):
    keeps = Keeps()

    MessageHandler([keeps]).send_message(CONTENT, sender=SHOP, recipients=recipients)

    assert keeps.sent[0][1] == (ADA, BOB)


def test_recipient_and_recipients_contradict_each_other():
    with pytest.raises(MessageError, match='either recipient= or recipients='):
        MessageHandler([]).send_message(CONTENT, sender=SHOP, recipient=ADA, recipients=[BOB])


def test_without_a_sender_nothing_is_sent():
    with pytest.raises(AddressError, match='no sender'):
        MessageHandler([Keeps()]).send_message(CONTENT, recipient=ADA)


# --- a message that is in a queue already -----------------------------------


@pytest.fixture
def held(queue, envelope):
    return QueuedMessage(queue, queue.claimed(envelope()))


def test_a_queued_message_is_gone_when_it_is_sent(queue, held, says):
    result = MessageHandler([says(YES)]).send_message(held)

    assert (bool(result), result.queued) == (True, False)
    assert queue.state == {}
    assert held.is_over


@pytest.mark.parametrize('answer', ['no', 'trouble'])
def test_a_queued_message_waits_if_it_cannot_be_sent(queue, held, says, trouble, answer):
    result = MessageHandler([says(NO if answer == 'no' else trouble)]).send_message(held)

    assert (bool(result), result.queued) == (True, True)
    assert queue.state == {'waiting': 1}
    assert held.is_over


@pytest.mark.parametrize(
    ('answer', 'is_true', 'failed', 'state'),
    [
        (SendResult({ADA: OK, BOB: LATER}), True, (), {'waiting': 1}),
        (SendResult({ADA: OK, BOB: NEVER}), False, (BOB,), {'dead': 1}),
        (SendResult({ADA: LATER, BOB: NEVER}), False, (BOB,), {'waiting': 1, 'dead': 1}),
    ],
)
def test_of_a_queued_message_who_was_refused_has_failed_and_who_waits_has_not(
    queue, envelope, says, answer, is_true, failed, state
):
    held = QueuedMessage(queue, queue.claimed(envelope('ada', 'bob')))

    result = MessageHandler([says(answer)]).send_message(held)

    assert (bool(result), result.failed, result.queued) == (is_true, failed, 'waiting' in state)
    assert queue.state == state


def test_the_end_of_a_queued_message_is_durable_at_once(queue, held, says):
    before = queue.flushes

    MessageHandler([says(YES)]).send_message(held)

    assert queue.flushes == before + 1


def test_a_claim_of_a_run_is_a_queued_message_too(queue, envelope, says):
    queue.put(envelope())
    (claim,) = queue.claim_due(queue.clock() + 1)

    assert MessageHandler([says(YES)]).send_message(claim)
    assert queue.state == {}


@pytest.mark.parametrize(
    'who', [{'sender': SHOP, 'recipient': ADA}, {'recipients': [ADA]}, {'sender': f'The shop <{SHOP}>'}]
)
def test_sender_and_recipients_may_be_said_once_more(held, says, who):
    assert MessageHandler([says(YES)]).send_message(held, **who)


@pytest.mark.parametrize('who', [{'sender': EVE}, {'sender': ''}, {'recipient': BOB}, {'recipients': [ADA, BOB]}])
def test_a_queued_message_does_not_go_to_others_than_it_was_queued_for(queue, held, says, who):
    transport = says(YES)

    with pytest.raises(MessageError, match=f'{held.id} has another sender or other recipients'):
        MessageHandler([transport]).send_message(held, **who)

    assert transport.asked == []
    assert queue.state == {'in progress': 1}
    assert MessageHandler([transport]).send_message(held)


@pytest.mark.parametrize('answer', [YES, NO])
def test_a_queued_message_is_sent_once(held, says, answer):
    transport = says(answer)
    MessageHandler([transport]).send_message(held)

    with pytest.raises(WrongState, match=f'{held.id} was sent before'):
        MessageHandler([transport]).send_message(held)

    assert len(transport.asked) == 1


def test_a_queued_message_that_was_given_back_is_somebody_elses(queue, held, says):
    held.release()
    held.release()

    with pytest.raises(WrongState):
        MessageHandler([says(YES)]).send_message(held)

    assert queue.state == {'waiting': 1}


def test_a_queued_message_is_sent_as_it_is_whatever_another_program_has_put_there(queue, says):
    odd = queue.claimed(Envelope(SHOP, (ADA,), b'no header\r\n'))

    assert MessageHandler([says(YES)]).send_message(odd, sender=SHOP, recipient=ADA)


def test_a_queued_message_is_not_queued_once_more_in_its_own_queue(queue, backend, held, says):
    name = held.id

    result = MessageHandler([says(SendResult({ADA: LATER})), backend]).send_message(held)

    assert result.queued
    (file,) = queue.files('new')
    (header,) = queue.headers('new')
    assert (file.name, header.attempts, header.last_reply) == (name, 1, '451 4.3.0 later')


def test_a_queued_message_waits_for_the_rate(queue, held, says):
    transport = says(YES)

    result = MessageHandler([transport], take_from_rate=lambda number: 60.0).send_message(held)

    assert result.queued
    assert transport.asked == []
    assert queue.state == {'waiting': 1}


def test_an_interrupted_attempt_lets_a_queued_message_wait(queue, held, says):
    with pytest.raises(KeyboardInterrupt):
        MessageHandler([says(KeyboardInterrupt())]).send_message(held)

    assert queue.state == {'waiting': 1}


# --- who hears of it --------------------------------------------------------


def test_receivers_hear_of_messages_that_are_in_no_queue(backend, says, listen):
    heard = []

    def hear(signal):
        def receive(sender, msg, send_result):
            heard.append((signal, msg.id, msg.retries, msg.is_in_queue, bool(send_result), send_result.queued))
            return MQAction.DISCARD

        return receive

    receivers = {signal: hear(signal) for signal in (MQSignal.delivery_successful, MQSignal.delivery_failed)}
    for signal, receiver in receivers.items():
        listen(signal, receiver)

    for transports in ([says(YES)], [says(NO)], [says(NO), backend]):
        MessageHandler(transports).send_message(CONTENT, sender=SHOP, recipient=ADA)

    assert heard == [
        (MQSignal.delivery_successful, '', 0, False, True, False),
        (MQSignal.delivery_failed, '', 1, False, False, False),
        (MQSignal.delivery_successful, '', 0, False, True, True),
    ]


def test_each_signal_of_a_message_that_is_in_no_queue_is_about_its_own_recipients(backend, says, listen):
    heard = []

    def hear(signal):
        def receive(sender, msg, send_result):
            heard.append((signal, msg.to_addrs, bool(send_result), send_result.queued))
            return MQAction.DISCARD

        return receive

    receivers = {signal: hear(signal) for signal in (MQSignal.delivery_successful, MQSignal.delivery_failed)}
    for signal, receiver in receivers.items():
        listen(signal, receiver)
    everybody = SendResult({ADA: OK, BOB: LATER, EVE: NEVER})

    results = [
        MessageHandler(transports).send_message(CONTENT, sender=SHOP, recipients=[ADA, BOB, EVE])
        for transports in ([says(everybody)], [says(everybody), backend])
    ]

    assert heard == [
        (MQSignal.delivery_failed, (BOB, EVE), False, False),
        (MQSignal.delivery_successful, (ADA,), True, False),
        (MQSignal.delivery_failed, (EVE,), False, False),
        (MQSignal.delivery_successful, (ADA, BOB), True, True),
    ]
    assert [(bool(it), it.queued, it.discarded, it.failed) for it in results] == [
        (False, False, True, (BOB, EVE)),
        (False, True, True, (EVE,)),
    ]


def test_plugins_are_loaded_before_the_first_message(says, caplog):
    handler = MessageHandler([says(YES)], plugins=['no_such_plugin'])

    handler.send_message(CONTENT, sender=SHOP, recipient=ADA)

    assert [record.levelno for record in caplog.records if 'no_such_plugin' in record.getMessage()] == [logging.ERROR]
    handler.close()
