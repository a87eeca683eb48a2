"""One attempt at one message: who is asked, how the claim ends, and what is told of it."""

from __future__ import annotations

import logging
import re

import pytest

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.plugins import MQSignal
from pyramid_mailqueue.delivery.results import Burial, Reply, SendResult, Settlement
from pyramid_mailqueue.delivery.retry import ExponentialBackoff
from pyramid_mailqueue.exceptions import QueueFileError, ServerTrouble
from pyramid_mailqueue.testing import Close, ScriptedSMTPServer
from pyramid_mailqueue.transports.maildir import MaildirBackend
from pyramid_mailqueue.transports.smtp import SMTPTransport

ADA, BOB, EVE = 'ada@x.example', 'bob@x.example', 'eve@x.example'
OK, LATER, NEVER = Reply(250, 'ok', '2.1.5'), Reply(451, 'later', '4.3.0'), Reply(550, 'no such user', '5.1.1')
# The simplest answers.
YES, NO = True, False

FIVE_MINUTES = 300


class PlainTransport:
    """As a user may write one: nothing but ``send``."""

    def __init__(self, answer):
        self.answer = answer

    def send(self, sender, recipients, content):
        return self.answer


class OldResult:
    """A result as other packages have them."""

    def __init__(self, was_sent, *, queued=False):
        self.was_sent = was_sent
        self.queued = queued

    def __bool__(self):
        return self.was_sent


@pytest.fixture
def smtp():
    """A transport to a scripted server: ``smtp(server)``."""
    transports = []

    def smtp(server):
        transports.append(SMTPTransport(hostname=server.host, port=server.port, local_hostname='app.example'))
        return transports[-1]

    yield smtp
    for transport in transports:
        transport.close()


# --- who is asked -----------------------------------------------------------


def test_the_second_transport_is_asked_only_for_who_is_still_open(queue, envelope, says):
    first = says(SendResult({ADA: OK, BOB: LATER, EVE: NEVER}))
    second = says(SendResult({BOB: OK}))

    result = MessageHandler([first, second]).deliver(queue.claimed(envelope('ada', 'bob', 'eve')))

    assert (first.asked, second.asked) == ([(ADA, BOB, EVE)], [(BOB,)])
    assert result.replies == {ADA: OK, BOB: OK, EVE: NEVER}
    assert queue.state == {'dead': 1}


def test_the_second_transport_is_not_asked_if_nobody_is_open(queue, envelope, says):
    second = says(YES)

    MessageHandler([says(YES), second]).deliver(queue.claimed(envelope()))

    assert second.asked == []
    assert queue.state == {}


def test_what_the_last_transport_said_holds(queue, envelope, says):
    busy = Reply(450, 'mailbox busy', '4.2.1')

    result = MessageHandler([says(SendResult({ADA: LATER})), says(SendResult({ADA: busy}))]).deliver(
        queue.claimed(envelope())
    )

    assert result.replies == {ADA: busy}
    assert queue.headers('new')[0].last_reply == '450 4.2.1 mailbox busy'


# --- what a transport may answer --------------------------------------------


@pytest.mark.parametrize(
    ('answer', 'state'),
    [
        (True, {}),
        (1, {}),
        (OldResult(YES), {}),
        (OldResult(YES, queued=True), {}),
        (SendResult({ADA: OK}), {}),
        (False, {'waiting': 1}),
        (None, {'waiting': 1}),
        (OldResult(NO), {'waiting': 1}),
        (SendResult({ADA: LATER}), {'waiting': 1}),
        # Silence is no success.
        (SendResult(), {'waiting': 1}),
        (SendResult(queued=True), {'waiting': 1}),
        # Somebody else's reply is nobody's.
        (SendResult({BOB: OK}), {'waiting': 1}),
        (SendResult({ADA: NEVER}), {'dead': 1}),
    ],
)
def test_any_object_with_a_send_method_is_a_transport(queue, envelope, answer, state):
    result = MessageHandler([PlainTransport(answer)]).deliver(queue.claimed(envelope()))

    assert queue.state == state
    assert bool(result) == (state != {'dead': 1})


@pytest.mark.parametrize('answer', [False, SendResult(), SendResult({BOB: OK})])
def test_each_attempt_that_got_an_answer_counts(queue, envelope, answer):
    MessageHandler([PlainTransport(answer)]).deliver(queue.claimed(envelope()))

    (header,) = queue.headers('new')
    assert (header.attempts, header.recipients) == (1, (ADA,))


def test_a_message_that_a_transport_has_put_into_another_queue_is_told_as_queued(queue, envelope, tmp_path, says, told):
    other = MaildirBackend(tmp_path / 'other')

    result = MessageHandler([says(SendResult({ADA: LATER})), other]).deliver(queue.claimed(envelope()))

    assert result.queued
    assert queue.state == {}
    assert told('status', 'via', 'smtp', 'error') == [('queued', 'maildir', None, '451 4.3.0 later')]


def test_a_transport_that_raises_counts_as_an_attempt_and_shows_where_it_fell(queue, envelope, says, told, caplog):
    result = MessageHandler([says(KeyError('no such region'))]).deliver(queue.claimed(envelope()))

    (header,) = queue.headers('new')
    assert header.attempts == 1
    # The file keeps a reply without parentheses or quotes that would end its comment.
    assert header.last_reply == "451 4.3.0 the transport failed: KeyError: 'no such region'"
    assert result.trouble is None
    assert 'Traceback' in caplog.text


def test_after_a_transport_that_raises_the_next_one_is_asked(queue, envelope, says):
    second = says(YES)

    MessageHandler([says(RuntimeError('a defect')), second]).deliver(queue.claimed(envelope()))

    assert second.asked == [(ADA,)]
    assert queue.state == {}


def test_a_name_of_its_own_is_not_required(queue, envelope, told):
    MessageHandler([PlainTransport(YES)]).deliver(queue.claimed(envelope()))

    assert told('via') == [('PlainTransport',)]


# --- trouble ----------------------------------------------------------------


def snapshot(queue):
    """Everything that could change of the waiting messages."""
    files = queue.files('new')
    return [(file.name, file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in files]


def test_trouble_leaves_the_message_exactly_as_it_was(queue, envelope, says, trouble, told):
    queue.put(envelope())
    before = snapshot(queue)
    (claim,) = queue.claim_due(queue.clock() + 1)

    result = MessageHandler([says(trouble)]).deliver(claim)

    assert snapshot(queue) == before
    assert result.trouble is trouble
    assert result.settlement == Settlement((ADA,), counted=False)
    assert result, 'it waits'
    assert told('status') == []


def test_while_all_rest_no_attempt_is_made(queue, envelope, says, trouble):
    transport = says(trouble, YES)
    handler = MessageHandler([transport])

    results = [handler.deliver(queue.claimed(envelope())) for _ in range(3)][-1:]

    assert handler.is_paused
    assert transport.asked == [(ADA,)]
    assert results[0].trouble is trouble


def test_when_the_rest_is_over_a_success_ends_the_trouble(queue, envelope, says, trouble):
    transport = says(trouble, YES)
    handler = MessageHandler([transport])
    queue.put(envelope())
    (claim,) = queue.claim_due(queue.clock() + 1)
    handler.deliver(claim)
    handler.routes[0].pause._until = 0

    (claim,) = queue.claim_due(queue.clock() + 1)
    handler.deliver(claim)

    assert not handler.is_paused
    assert queue.state == {}


def test_after_trouble_of_the_first_transport_the_second_is_asked_and_the_first_rests(
    queue, envelope, says, trouble, caplog
):
    first, second = says(trouble, name='first'), says(YES)
    handler = MessageHandler([first, second])

    results = [handler.deliver(queue.claimed(envelope())) for _ in range(3)]

    assert (len(first.asked), len(second.asked)) == (1, 3)
    assert [result.trouble for result in results] == [None] * 3
    assert not handler.is_paused
    assert queue.state == {}
    # Once for each rest, not for each message.
    assert caplog.messages.count('The transport first rests: mail.example:25 is down') == 1


def test_trouble_of_a_fallback_is_no_reason_to_end_a_run(queue, envelope, says, trouble, caplog):
    handler = MessageHandler([says(SendResult({ADA: LATER})), says(trouble, name='fallback')])

    result = handler.deliver(queue.claimed(envelope()))

    assert result.trouble is None
    assert queue.headers('new')[0].attempts == 1
    assert 'The transport fallback rests: mail.example:25 is down' in caplog.messages


def test_if_every_transport_is_in_trouble_so_is_the_run(queue, envelope, says, trouble):
    other = ServerTrouble('backup.example:25 is down too')
    handler = MessageHandler([says(trouble), says(other)])

    results = [handler.deliver(queue.claimed(envelope())) for _ in range(2)]

    assert [result.trouble for result in results] == [other, other]
    assert handler.is_paused
    assert [header.attempts for header in queue.headers('new')] == [0, 0]


def test_a_message_waits_if_there_is_no_transport_at_all(queue, envelope):
    handler = MessageHandler([])

    handler.deliver(queue.claimed(envelope()))

    assert not handler.is_paused, 'there is nothing whose rest could end'
    assert queue.state == {'waiting': 1}


# --- over a real connection -------------------------------------------------


def test_partly_accepted_leaves_only_the_open_recipients_in_the_queue(queue, envelope, smtp):
    script = {f'RCPT TO:<{BOB}>': '451 4.3.0 later', f'RCPT TO:<{EVE}>': '550 5.1.1 no such user'}
    sent = envelope('ada', 'bob', 'eve')
    with ScriptedSMTPServer(script) as server:
        result = MessageHandler([smtp(server)]).deliver(queue.claimed(sent))

    (waiting,) = queue.headers('new')
    (dead,) = queue.headers('dead')
    assert [message.recipients for message in server.messages] == [(ADA,)]
    assert (waiting.recipients, waiting.attempts, waiting.last_reply) == ((BOB,), 1, '451 4.3.0 later')
    assert (dead.recipients, dead.last_reply) == ((EVE,), '550 5.1.1 no such user')
    assert all(file.read_bytes().endswith(sent.content) for file in (*queue.files('new'), *queue.files('dead')))
    assert result.queued


def test_who_has_accepted_is_not_asked_again(queue, envelope, smtp):
    with ScriptedSMTPServer({f'RCPT TO:<{BOB}>': ['451 4.3.0 later']}) as server:
        handler = MessageHandler([smtp(server)])
        handler.deliver(queue.claimed(envelope('ada', 'bob')))
        (claim,) = queue.claim_due(queue.clock() + 2 * FIVE_MINUTES)
        handler.deliver(claim)

    assert [message.recipients for message in server.messages] == [(ADA,), (BOB,)]
    assert queue.state == {}


def test_a_connection_lost_after_the_final_dot_is_deferred(queue, envelope, smtp):
    with ScriptedSMTPServer({'.': [Close()]}) as server:
        handler = MessageHandler([smtp(server)])
        result = handler.deliver(queue.claimed(envelope()))
        (header,) = queue.headers('new')
        handler.routes[0].pause.end()
        (claim,) = queue.claim_due(queue.clock() + 2 * FIVE_MINUTES)
        handler.deliver(claim)

    assert result.deferred == (ADA,)
    assert header.attempts == 1
    assert 'may have been delivered' in header.last_reply
    assert len(server.messages) == 1
    assert queue.state == {}


# --- what follows -----------------------------------------------------------


def test_the_due_time_of_a_deferred_message_is_the_policys(queue, envelope, says):
    now = int(queue.clock()) + 100
    handler = MessageHandler([says(NO)], retry_policy=ExponentialBackoff(first=77, jitter=0), clock=lambda: now)

    result = handler.deliver(queue.claimed(envelope()))

    assert result.settlement.due == now + 77
    assert queue.files('new')[0].stat().st_mtime == now + 77


def test_a_policy_of_ones_own_decides(queue, envelope, says):
    class NeverAgain:
        def decide(self, recipients, attempts, queued_at, result, now):
            return Settlement(burials=(Burial(tuple(recipients), 'one attempt is enough'),))

    MessageHandler([says(NO)], retry_policy=NeverAgain()).deliver(queue.claimed(envelope()))

    assert [header.last_reply for header in queue.headers('dead')] == ['one attempt is enough']


class Claim:
    """A claim of some other queue, which writes down how it ended."""

    id = 'claim-1'
    attempts = 0
    queued_at = 0.0

    def __init__(self, envelope, steps):
        self._envelope = envelope
        self.steps = steps

    @property
    def envelope(self):
        if isinstance(self._envelope, Exception):
            raise self._envelope
        return self._envelope

    def settle(self, settlement):
        self.steps.append('settled')

    def keep(self, recipients):
        self.steps.append(f'kept {recipients}')

    def release(self):
        self.steps.append('released')


@pytest.mark.parametrize(
    'error', [QueueFileError('Envelope-to is missing'), OSError(5, 'Input/output error'), PermissionError(13, 'no')]
)
def test_a_message_that_cannot_be_read_is_left_alone_and_logged(says, error, told, caplog):
    transport = says(YES)
    claim = Claim(error, [])

    result = MessageHandler([transport]).deliver(claim)

    assert claim.steps == ['released']
    assert transport.asked == []
    assert (bool(result), result.settlement) == (False, None)
    assert caplog.messages == [f'claim-1 cannot be read, and is left alone: {error}']


def test_close_closes_every_transport_that_can_be_closed(says):
    transports = [says(YES), PlainTransport(YES), says(YES)]

    MessageHandler(transports).close()

    assert [transport.closed for transport in (transports[0], transports[2])] == [1, 1]


# --- what is told -----------------------------------------------------------


def test_failure_is_signalled_before_the_claim_is_settled_and_all_else_told_after_it(envelope, says, listen):
    steps = []

    class Steps(logging.Handler):
        def emit(self, record):
            steps.append(record.name)

    def failed(sender, msg, send_result):
        steps.append('failed')

    def successful(sender, msg, send_result):
        steps.append('successful')

    loggers = [logging.getLogger(f'mailqueue.{name}') for name in ('delivery_log', 'queue_log')]
    handler = Steps()
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    listen(MQSignal.delivery_successful, successful)
    listen(MQSignal.delivery_failed, failed)
    result = SendResult({ADA: OK, BOB: LATER})
    try:
        MessageHandler([says(result)]).deliver(Claim(envelope('ada', 'bob'), steps))
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)

    assert steps == [
        f"kept ('{BOB}',)", 'failed', 'settled', 'mailqueue.delivery_log', 'mailqueue.delivery_log',
        'mailqueue.queue_log', 'successful',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('replies', 'signals'),
    [
        ({ADA: OK, BOB: OK}, ['successful']),
        ({ADA: OK, BOB: LATER}, ['failed', 'successful']),
        ({ADA: OK, BOB: NEVER}, ['failed', 'successful']),
        ({ADA: LATER, BOB: LATER}, ['failed']),
        ({ADA: NEVER, BOB: NEVER}, ['failed']),
    ],
)
def test_receivers_hear_of_success_and_of_failure(queue, envelope, says, listen, replies, signals):
    heard = []

    def successful(sender, msg, send_result):
        heard.append(('successful', msg.id, send_result))

    def failed(sender, msg, send_result):
        heard.append(('failed', msg.id, send_result))

    listen(MQSignal.delivery_successful, successful)
    listen(MQSignal.delivery_failed, failed)
    claim = queue.claimed(envelope('ada', 'bob'))

    result = MessageHandler([says(SendResult(replies))]).deliver(claim)

    assert heard == [(signal, claim.id, result) for signal in signals]


def test_receivers_hear_nothing_of_an_outage(queue, envelope, says, trouble, listen):
    def receive(sender, msg, send_result):
        raise AssertionError('nothing has happened to this message')

    listen(MQSignal.delivery_failed, receive)

    MessageHandler([says(trouble)]).deliver(queue.claimed(envelope()))


def test_a_receiver_can_read_the_message_it_hears_of(queue, envelope, says, listen):
    heard = []

    def receive(sender, msg, send_result):
        heard.append((msg.envelope, msg.retries))

    listen(MQSignal.delivery_successful, receive)
    sent = envelope()

    MessageHandler([says(YES)]).deliver(queue.claimed(sent))

    assert heard == [(sent, 0)]


def test_a_receiver_that_raises_changes_nothing(queue, envelope, says, listen, caplog):
    heard = []

    def bad(sender, msg, send_result):
        raise RuntimeError('a plugin with a defect')

    def good(sender, msg, send_result):
        heard.append(msg.id)

    transport = says(YES)
    claim = queue.claimed(envelope())
    for receiver in (bad, good):
        listen(MQSignal.delivery_successful, receiver)

    result = MessageHandler([transport]).deliver(claim)

    assert result.accepted == (ADA,)
    assert queue.state == {}
    assert heard == [claim.id]
    assert 'a plugin with a defect' in caplog.text


def test_each_result_for_a_recipient_is_one_event(queue, envelope, says, told):
    sent = envelope('ada', 'bob', 'eve')
    claim = queue.claimed(sent)

    MessageHandler([says(SendResult({ADA: OK, BOB: LATER, EVE: NEVER}, 'smtp:mx.example:25'))]).deliver(claim)

    same = (claim.id, sent.message_id, '<shop@site.example>', 1)
    assert told('status', 'id', 'msgid', 'from', 'attempts', 'to', 'via', 'smtp', 'error') == [
        ('sent', *same, ADA, 'smtp:mx.example:25', '250 2.1.5 ok', None),
        ('deferred', *same, BOB, 'smtp:mx.example:25', '451 4.3.0 later', None),
        ('buried', *same, EVE, 'smtp:mx.example:25', '550 5.1.1 no such user', None),
        ('deferred', *same, BOB, None, None, '451 4.3.0 later'),
        ('buried', *same, EVE, None, None, '550 5.1.1 no such user'),
    ]


def test_an_event_is_a_line_of_pairs(queue, envelope, says, told, caplog):
    sent = envelope()
    claim = queue.claimed(sent)

    MessageHandler([says(SendResult({ADA: OK}))]).deliver(claim)

    assert re.sub(r'delay=\d+\.\d', 'delay=0.1', caplog.messages[-1]) == (
        f'status=sent id={claim.id} msgid={sent.message_id} from=<shop@site.example> to={ADA} via=says '
        'attempts=1 delay=0.1 smtp="250 2.1.5 ok"'
    )


def test_what_a_server_did_not_say_is_not_told_as_its_reply(queue, envelope, says, told):
    for answer in (YES, NO):
        MessageHandler([says(answer)]).deliver(queue.claimed(envelope()))

    assert told('status', 'smtp', 'error')[:2] == [
        ('sent', None, None),
        ('deferred', None, '451 4.3.0 the transport did not take the message'),
    ]


def test_the_delay_is_counted_from_the_queue_and_never_negative(queue, envelope, says, told):
    for clock in (lambda: queue.clock() + 100.05, lambda: 0):
        MessageHandler([says(YES)], clock=clock).deliver(queue.claimed(envelope()))

    (late,), (negative,) = told('delay')
    assert 100 <= float(late) < 160
    assert negative == '0.0'


def test_a_dead_letter_is_an_error_in_the_log(queue, envelope, says, told, caplog):
    MessageHandler([says(SendResult({ADA: NEVER}))]).deliver(queue.claimed(envelope()))

    assert [(record.name, record.levelname) for record in caplog.records] == [
        ('mailqueue.queue_log', 'INFO'),
        ('mailqueue.delivery_log', 'INFO'),
        ('mailqueue.queue_log', 'ERROR'),
    ]
