"""One attempt at one message: who is asked, how the claim ends, and what is told of it."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.plugins import MQSignal
from pyramid_mailqueue.delivery.retry import ExponentialBackoff
from pyramid_mailqueue.exceptions import QueueFileError, ServerTrouble
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.base import Claim
from pyramid_mailqueue.queues.maildir.queue_file import read_header
from pyramid_mailqueue.results import Burial, Reply, SendResult, Settlement
from pyramid_mailqueue.testing import EXTENSIONS, Close, ScriptedSMTPServer
from pyramid_mailqueue.transports.maildir import MaildirBackend
from pyramid_mailqueue.transports.smtp import SMTPTransport
from pyramid_mailqueue.transports.smtp.transaction import OUTCOME_UNKNOWN
from tests.parts.connections import Given, Streams, deliver_all

ADA, BOB, EVE, DAN = 'ada@x.example', 'bob@x.example', 'eve@x.example', 'dan@x.example'
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

    def smtp(server, **options):
        options = {'hostname': server.host, 'port': server.port, 'local_hostname': 'app.example', **options}
        transports.append(SMTPTransport(**options))
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

    assert handler.is_backing_off
    assert transport.asked == [(ADA,)]
    assert results[0].trouble is trouble


def test_when_the_rest_is_over_a_success_ends_the_trouble(queue, envelope, says, trouble):
    transport = says(trouble, YES)
    handler = MessageHandler([transport])
    queue.put(envelope())
    (claim,) = queue.claim_due(queue.clock() + 1)
    handler.deliver(claim)
    handler.routes[0].backoff._until = 0

    (claim,) = queue.claim_due(queue.clock() + 1)
    handler.deliver(claim)

    assert not handler.is_backing_off
    assert queue.state == {}


def test_after_trouble_of_the_first_transport_the_second_is_asked_and_the_first_rests(
    queue, envelope, says, trouble, caplog
):
    first, second = says(trouble, name='first'), says(YES)
    handler = MessageHandler([first, second])

    results = [handler.deliver(queue.claimed(envelope())) for _ in range(3)]

    assert (len(first.asked), len(second.asked)) == (1, 3)
    assert [result.trouble for result in results] == [None] * 3
    assert not handler.is_backing_off
    assert queue.state == {}
    # Once for each back-off, not for each message.
    assert caplog.messages.count('The transport first backs off: mail.example:25 is down') == 1


def test_trouble_of_a_fallback_is_no_reason_to_end_a_run(queue, envelope, says, trouble, caplog):
    handler = MessageHandler([says(SendResult({ADA: LATER})), says(trouble, name='fallback')])

    result = handler.deliver(queue.claimed(envelope()))

    assert result.trouble is None
    assert queue.headers('new')[0].attempts == 1
    assert 'The transport fallback backs off: mail.example:25 is down' in caplog.messages


def test_if_every_transport_is_in_trouble_so_is_the_run(queue, envelope, says, trouble):
    other = ServerTrouble('backup.example:25 is down too')
    handler = MessageHandler([says(trouble), says(other)])

    results = [handler.deliver(queue.claimed(envelope())) for _ in range(2)]

    assert [result.trouble for result in results] == [other, other]
    assert handler.is_backing_off
    assert [header.attempts for header in queue.headers('new')] == [0, 0]


def test_a_message_waits_if_there_is_no_transport_at_all(queue, envelope):
    handler = MessageHandler([])

    handler.deliver(queue.claimed(envelope()))

    assert not handler.is_backing_off, 'there is nothing whose rest could end'
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
        handler.routes[0].backoff.end()
        (claim,) = queue.claim_due(queue.clock() + 2 * FIVE_MINUTES)
        handler.deliver(claim)

    assert result.deferred == (ADA,)
    assert header.attempts == 1
    assert 'may have been delivered' in header.last_reply
    assert len(server.messages) == 1
    assert queue.state == {}


def test_a_second_server_is_asked_at_once_only_for_who_cannot_have_the_message_already(queue, envelope, smtp, says):
    fallback = says(YES)
    with ScriptedSMTPServer({f'RCPT TO:<{BOB}>': ['451 4.3.0 later'], '.': [Close()]}) as server:
        handler = MessageHandler([smtp(server), fallback])
        result = handler.deliver(queue.claimed(envelope('ada', 'bob', 'eve')))

    assert fallback.asked == [(BOB,)]
    assert (result.accepted, result.deferred, result.trouble) == ((BOB,), (ADA, EVE), None)
    (header,) = queue.headers('new')
    assert (header.recipients, header.attempts) == ((ADA, EVE), 1)
    assert 'may have been delivered' in header.last_reply

    # Later they are tried again, by whoever can.
    (claim,) = queue.claim_due(queue.clock() + 2 * FIVE_MINUTES)
    handler.deliver(claim)

    assert fallback.asked == [(BOB,), (ADA, EVE)]
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


class OtherClaim(Claim):
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

    def abandon(self):
        self.steps.append('abandoned')


@pytest.mark.parametrize('error', [MemoryError(), RecursionError(), ZeroDivisionError()])
def test_a_message_that_makes_the_program_fail_is_abandoned_and_the_others_are_delivered(says, error):
    steps = []
    good = OtherClaim(Envelope('a@x.example', ('b@x.example',), b'Hello\r\n'), steps)
    results = deliver_all(MessageHandler([says(YES)]), Given(OtherClaim(error, steps), good))

    assert [claim for claim, _ in results] == [good]
    assert steps == ['abandoned', 'settled']


@pytest.mark.parametrize(
    'error', [QueueFileError('Envelope-to is missing'), OSError(5, 'Input/output error'), PermissionError(13, 'no')]
)
def test_a_message_that_cannot_be_read_is_left_alone_and_logged(says, error, told, caplog):
    transport = says(YES)
    claim = OtherClaim(error, [])

    result = MessageHandler([transport]).deliver(claim)

    assert claim.steps == ['released']
    assert transport.asked == []
    assert (bool(result), result.settlement) == (False, None)
    assert caplog.messages == [f'claim-1 cannot be read, and is left alone: {error}']


# --- many messages, one after the other -------------------------------------


@pytest.fixture
def claimed(queue, envelope):
    """Claims of messages, each for some people: ``claimed('ada', 'bob eve')``."""

    def claimed(*messages):
        return [queue.claimed(envelope(*names.split())) for names in messages]

    return claimed


def recipients(headers):
    return [header.recipients for header in headers]


@pytest.mark.parametrize('why', ['large', 'deadly'])
def test_nothing_is_announced_behind_a_message_that_is_large_or_has_killed_its_deliverer(
    queue, envelope, claimed, why, monkeypatch
):
    first, last = claimed('ada', 'dan')
    if why == 'large':
        alone = queue.claimed(Envelope('shop@site.example', (BOB,), b'\r\n' + b'x' * 1_100_000))
    else:
        alone = queue.claimed(envelope('bob'))
        monkeypatch.setattr(type(alone), 'deaths', property(lambda claim: int(claim is alone)))
    under_way = []

    transport = Streams(YES, before=lambda _: under_way.append(tuple(transport.offered)))
    results = deliver_all(MessageHandler([transport]), Given(first, alone, last))

    assert len(results) == 3
    assert under_way == [((ADA,), (BOB,)), ((ADA,), (BOB,)), ((ADA,), (BOB,), (DAN,))]


def test_each_claim_is_settled_when_it_is_yielded_and_not_before(queue, claimed, smtp):
    claims = claimed('ada', 'bob', 'eve')
    states = []
    with ScriptedSMTPServer() as server:
        given = Given(*claims)
        given.on_ended = lambda claim, result: states.append(
            (claim, result.accepted, queue.state.get('in progress', 0))
        )
        deliver_all(MessageHandler([smtp(server)]), given)

    assert states == [(claims[0], (ADA,), 2), (claims[1], (BOB,), 1), (claims[2], (EVE,), 0)]
    assert len(server.sessions) == 1


def test_accepted_deferred_and_refused_in_the_middle_of_a_stream_go_their_own_ways(queue, claimed, smtp):
    script = {f'RCPT TO:<{BOB}>': '451 4.3.0 later', f'RCPT TO:<{EVE}>': '550 5.1.1 no such user'}
    with ScriptedSMTPServer(script) as server:
        results = deliver_all(MessageHandler([smtp(server)]), Given(*claimed('ada', 'ada bob eve dan', 'dan')))

    assert [message.recipients for message in server.messages] == [(ADA,), (ADA, DAN), (DAN,)]
    assert [result.trouble for _, result in results] == [None] * 3
    (waiting,), (dead,) = queue.headers('new'), queue.headers('dead')
    assert (waiting.recipients, waiting.attempts, waiting.last_reply) == ((BOB,), 1, '451 4.3.0 later')
    assert (dead.recipients, dead.last_reply) == ((EVE,), '550 5.1.1 no such user')
    assert len(server.sessions) == 1


@pytest.mark.parametrize('extensions', [EXTENSIONS, ()], ids=['all', 'none'])
@pytest.mark.parametrize(
    ('script', 'options'),
    [
        ({'RCPT': [None, None, '452 4.5.3 too many', '452 too many']}, {}),
        ({}, {'max_recipients': 2}),
    ],
    ids=['452', 'max_recipients'],
)
def test_who_has_a_message_is_written_down_before_its_next_transaction(
    queue, claimed, smtp, told, script, options, extensions
):
    many = claimed('ada bob eve dan')[0]
    written = []

    def on_mail(command):
        # Not its neighbour, which may be gone by the time it is read.
        with Path(queue.place('cur', many.id)).open('rb') as file:
            written.append(read_header(file).recipients)

    with ScriptedSMTPServer({**script, 'MAIL': on_mail}, extensions=extensions) as server:
        results = deliver_all(MessageHandler([smtp(server, **options)]), Given(many, *claimed('late')))

    transactions = [message.recipients for message in server.messages]
    assert sorted(transactions) == [(ADA, BOB), (EVE, DAN), ('late@x.example',)]
    assert (written[0], written[-1]) == ((ADA, BOB, EVE, DAN), (EVE, DAN))
    assert {claim: result.accepted for claim, result in results}[many] == (ADA, BOB, EVE, DAN)
    assert [to for status, to in told('status', 'to') if to != 'late@x.example'] == [ADA, BOB, EVE, DAN]
    assert queue.state == {}
    assert len(server.sessions) == 1


def test_between_two_transactions_nothing_is_written_if_nobody_was_accepted(queue, claimed, smtp):
    (claim,) = claimed('ada bob')
    before = queue.files('cur')[0].stat().st_ino
    inodes = []
    script = {
        f'RCPT TO:<{ADA}>': '550 5.1.1 no such user',
        'MAIL': lambda command: inodes.append(queue.files('cur')[0].stat().st_ino),
    }
    with ScriptedSMTPServer(script) as server:
        deliver_all(MessageHandler([smtp(server, max_recipients=1)]), Given(claim))

    assert inodes == [before, before]
    assert recipients(queue.headers('dead')) == [(ADA,)]


def test_a_receiver_that_raises_in_the_middle_of_a_stream_disturbs_neither_neighbour(
    queue, claimed, smtp, listen, caplog
):
    def bad(sender, msg, send_result):
        if BOB in msg.envelope.recipients:
            raise RuntimeError('a plugin with a defect')

    listen(MQSignal.delivery_successful, bad)
    listen(MQSignal.delivery_failed, bad)
    script = {f'RCPT TO:<{BOB}>': [None, '550 5.1.1 no such user']}
    with ScriptedSMTPServer(script) as server:
        deliver_all(MessageHandler([smtp(server)]), Given(*claimed('ada', 'bob', 'eve', 'bob', 'dan')))

    assert [message.recipients for message in server.messages] == [(ADA,), (BOB,), (EVE,), (DAN,)]
    assert queue.state == {'dead': 1}
    assert caplog.text.count('RuntimeError: a plugin with a defect') == 2
    assert len(server.sessions) == 1


def test_a_message_that_cannot_be_read_is_left_out_of_a_stream(queue, claimed, smtp, caplog):
    first, last = claimed('ada', 'bob')
    unreadable = OtherClaim(QueueFileError('Envelope-to is missing'), [])
    with ScriptedSMTPServer() as server:
        results = deliver_all(MessageHandler([smtp(server)]), Given(first, unreadable, last))

    assert [claim for claim, _ in results] == [first, last]
    assert unreadable.steps == ['released']
    assert server.sessions[0].round_trips == 2 + len(['EHLO', 'MAIL RCPT DATA'])


def test_with_nothing_to_do_nobody_is_called(says):
    transport = says(YES)

    assert deliver_all(MessageHandler([transport]), Given()) == []
    assert transport.asked == []


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interruption_gives_back_what_is_in_hand_as_it_was(queue, claimed, smtp):
    claims = claimed('ada', 'bob', 'eve')
    inodes = {file.name: file.stat().st_ino for file in queue.files('cur')}
    given = Given(*claims)
    with ScriptedSMTPServer() as server:
        given.on_ended = interrupt
        with pytest.raises(KeyboardInterrupt):
            deliver_all(MessageHandler([smtp(server)]), given)

    assert {file.name: file.stat().st_ino for file in queue.files('new')} == {claims[1].id: inodes[claims[1].id]}
    assert given.claims == [claims[2]]
    assert [message.recipients for message in server.messages] == [(ADA,)]


# --- several transports -----------------------------------------------------


def test_who_is_still_open_in_the_middle_of_a_stream_is_offered_to_the_second_transport(queue, claimed, told):
    first = Streams(SendResult({ADA: OK}), SendResult({BOB: OK, EVE: LATER, DAN: NEVER}), SendResult({ADA: OK}))
    written = []
    second = Streams(SendResult({EVE: OK}), before=lambda _: written.append(recipients(queue.headers('cur'))))

    results = deliver_all(MessageHandler([first, second]), Given(*claimed('ada', 'bob eve dan', 'ada')))

    assert (first.offered, second.offered) == ([(ADA,), (BOB, EVE, DAN), (ADA,)], [(EVE,)])
    assert written == [[(EVE, DAN)]], 'who was refused is nobody who has it'
    # The stream goes on before the second transport is asked.
    assert [result.accepted for _, result in results] == [(ADA,), (ADA,), (BOB, EVE)]
    assert recipients(queue.headers('dead')) == [(DAN,)]
    assert queue.state == {'dead': 1}


def test_a_transport_whose_back_off_is_over_gets_the_next_message_and_waits_for_no_other(queue, claimed, says, trouble):
    primary, fallback = says(trouble, YES), Streams(*[YES] * 5)
    handler = MessageHandler([primary, fallback])

    def end_backoff(_):
        if len(fallback.offered) == 3:
            handler.routes[0].backoff.end()

    fallback.before = end_backoff
    results = deliver_all(handler, Given(*claimed('ada', 'bob', 'eve', 'dan', 'zoe')))

    assert (primary.asked, fallback.offered) == ([(ADA,), (DAN,), ('zoe@x.example',)], [(ADA,), (BOB,), (EVE,)])
    assert len(results) == 5
    assert queue.state == {}


@pytest.mark.parametrize(('primarys', 'fallbacks'), [(True, False), (False, True), (True, True)])
def test_a_server_that_broke_off_in_the_midst_of_a_message_may_be_used_for_the_next(
    queue, claimed, says, primarys, fallbacks
):
    troubles = [ServerTrouble(f'{number} is gone', in_message=it) for number, it in enumerate((primarys, fallbacks))]
    handler = MessageHandler([says(trouble) for trouble in troubles])

    result = handler.deliver(*claimed('ada'))

    assert result.trouble.in_message
    assert not handler.is_backing_off
    assert queue.files('new')[0].name.endswith(',stumbles=1')


def test_if_neither_server_could_be_used_there_was_nothing_in_the_midst_of_it(queue, claimed, says):
    troubles = [ServerTrouble(f'{number} is gone') for number in range(2)]

    result = MessageHandler([says(trouble) for trouble in troubles]).deliver(*claimed('ada'))

    assert result.trouble is troubles[1]


# --- one connection too many ------------------------------------------------


class Two:
    """Two connections: the second opens when the first has worked, and both have messages under way."""

    def __init__(self, first, second, **options):
        self.transport = Streams(*first, by_connection=[second], **options)
        self.fallback = Streams(YES)
        self.fallback.name = 'fallback'
        self.handler = MessageHandler([self.transport, self.fallback])

    def deliver(self, *claims):
        self.given = Given(*claims)
        return deliver_all(self.handler, self.given, connections=2)


@pytest.mark.parametrize('where', ['connect', 'MAIL'])
def test_a_connection_too_many_leaves_what_it_has_in_hand_to_the_other_and_is_no_trouble(queue, claimed, caplog, where):
    trouble = ServerTrouble('too many connections', in_message=where == 'MAIL', at_mail=where == 'MAIL')
    two = Two([YES], [trouble] if where == 'connect' else [SendResult(trouble=trouble)])

    results = two.deliver(*claimed('ada', 'bob', 'eve', 'dan', 'zoe'))

    assert [result.trouble for _, result in results] == [None] * 5
    assert (len(two.transport.connections), two.fallback.offered, two.handler.backoff_seconds) == (2, [], 0)
    assert queue.state == {}
    assert caplog.messages.count(f'{trouble} The run goes on with fewer connections.') == 1


def test_where_there_are_no_others_the_transport_backs_off_and_the_next_one_is_asked(queue, claimed, says, trouble):
    fallback = says(YES)
    handler = MessageHandler([Streams(trouble), fallback])

    deliver_all(handler, Given(*claimed('ada', 'bob', 'eve')))

    assert fallback.asked == [(ADA,), (BOB,), (EVE,)]
    assert handler.backoff_seconds == 0
    assert handler.routes[0].backoff.trouble is trouble
    assert queue.state == {}


def test_a_server_that_has_not_worked_since_its_last_trouble_has_no_connection_too_many(queue, claimed, trouble):
    two = Two([YES], [SendResult(trouble=trouble)])

    def in_trouble(recipients):
        if len(two.transport.connections) == 2:
            two.handler.routes[0].backoff._trouble = trouble
            two.handler.routes[0].backoff._length = 5

    two.transport.before = in_trouble
    two.deliver(*claimed('ada', 'bob', 'eve', 'dan', 'zoe'))

    assert two.fallback.offered != []
    assert queue.state == {}


@pytest.mark.parametrize('reply', [OUTCOME_UNKNOWN, LATER])
def test_an_outcome_that_came_with_the_trouble_is_settled_and_the_rest_left_to_the_other(
    queue, claimed, told, reply, trouble
):
    two = Two([YES], [SendResult({EVE: reply}, trouble=trouble), YES])

    results = two.deliver(*claimed('ada', 'bob', 'bob', 'eve', 'dan', 'dan'))

    assert [result.trouble for _, result in results] == [None] * 6
    if reply is OUTCOME_UNKNOWN:
        assert two.fallback.offered == []
        assert [(it.recipients, it.attempts) for it in queue.headers('new')] == [((EVE,), 1)]
    else:
        assert two.fallback.offered == [(EVE,)]
        assert queue.state == {}


def test_a_server_that_broke_off_in_the_midst_of_a_message_may_have_the_next_at_once(queue, claimed):
    disconnect = ServerTrouble('it hung up', in_message=True)
    given = Given(*claimed('ada', 'bob'))

    results = deliver_all(MessageHandler([Streams(disconnect, YES)]), given)

    assert [(result.trouble, result.accepted) for _, result in results] == [(disconnect, ()), (None, (BOB,))]


# --- told to end ------------------------------------------------------------


def ending(given, recipients):
    """A callable that ends the work when those are under way."""

    def before(under_way):
        given.is_over |= under_way == recipients

    return before


def test_who_is_told_to_end_finishes_the_message_that_is_under_way_and_leaves_the_next_as_it_was(queue, claimed, told):
    claims = claimed('ada', 'bob', 'eve')
    inode = queue.files('cur')[1].stat().st_ino
    given = Given(*claims)
    transport = Streams(YES, YES, before=ending(given, (ADA,)))

    results = deliver_all(MessageHandler([transport]), given)

    assert [claim for claim, _ in results] == claims[:1]
    assert transport.offered == [(ADA,), (BOB,)]
    assert [(file.name, file.stat().st_ino) for file in queue.files('new')] == [(claims[1].id, inode)]
    assert told('status', 'to') == [('sent', ADA)]


def test_who_is_over_from_the_beginning_does_nothing(queue, claimed, says):
    transport, given = says(YES), Given(*claimed('ada'))
    given.is_over = True

    assert deliver_all(MessageHandler([transport]), given) == []
    assert transport.asked == []


@pytest.mark.parametrize('position', ['alone', 'behind another one'])
def test_a_message_that_is_cut_short_between_two_transactions_is_settled_and_told(queue, claimed, told, position):
    (many,), others = claimed('ada bob eve'), claimed('dan', 'zoe') if position != 'alone' else []
    given = Given(many, *others)
    answers = [SendResult({ADA: OK, BOB: NEVER}), YES, YES]
    transport = Streams(*answers, before=ending(given, (ADA, BOB, EVE) if position == 'alone' else (DAN,)))

    results = deliver_all(MessageHandler([transport]), given)

    assert {claim: result.accepted for claim, result in results}[many] == (ADA,)
    assert ('sent', ADA) in told('status', 'to')
    assert ((EVE,), 0) in [(header.recipients, header.attempts) for header in queue.headers('new')]
    assert recipients(queue.headers('dead')) == [(BOB,)]
    assert 'in progress' not in queue.state or queue.files('cur')[0].name == others[-1].id


def test_a_message_that_is_cut_short_before_the_second_transport_was_asked_is_deferred(queue, claimed, says, told):
    given = Given(*claimed('ada bob'))
    first, second = Streams(SendResult({ADA: LATER, BOB: OK}), before=ending(given, (ADA, BOB))), says(YES)

    deliver_all(MessageHandler([first, second]), given)

    assert second.asked == []
    assert [(header.recipients, header.attempts) for header in queue.headers('new')] == [((ADA,), 1)]
    assert told('status', 'to')[:2] == [('deferred', ADA), ('sent', BOB)]


def test_what_we_have_broken_off_ourselves_is_nobodys_fault(queue, claimed, told, caplog):
    claims = claimed('ada', 'bob')
    inodes = {file.name: file.stat().st_ino for file in queue.files('cur')}
    given = Given(*claims)
    handler = MessageHandler([Streams(ServerTrouble('closed', in_message=True), before=ending(given, (ADA,)))])

    assert deliver_all(handler, given) == []
    assert {file.name: file.stat().st_ino for file in queue.files('new')} == inodes, 'no stumble is counted in a name'
    assert (told('status'), handler.backoff_seconds) == ([], 0)
    assert [record for record in caplog.records if record.levelname != 'INFO'] == []


def test_what_we_have_broken_off_behind_its_final_dot_is_deferred(queue, claimed):
    given = Given(*claimed('ada', 'bob'))
    trouble = ServerTrouble('closed', in_message=True)
    unknown = SendResult({ADA: OUTCOME_UNKNOWN}, trouble=trouble)

    deliver_all(MessageHandler([Streams(unknown, before=ending(given, (ADA,)))]), given)

    waiting = {header.recipients: header for header in queue.headers('new')}
    assert [(key, header.attempts) for key, header in sorted(waiting.items())] == [((ADA,), 1), ((BOB,), 0)]
    assert 'may have been delivered' in waiting[ADA,].last_reply


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
        MessageHandler([says(result)]).deliver(OtherClaim(envelope('ada', 'bob'), steps))
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
def test_each_receiver_hears_of_those_whom_its_signal_is_about(queue, envelope, says, listen, replies, signals):
    heard = []

    def successful(sender, msg, send_result):
        assert (bool(send_result), send_result.queued, send_result.accepted) == (True, False, msg.to_addrs)
        heard.append(('successful', msg.id, msg.to_addrs, send_result.settlement))

    def failed(sender, msg, send_result):
        assert (bool(send_result), send_result.queued, send_result.failed) == (False, False, msg.to_addrs)
        heard.append(('failed', msg.id, msg.to_addrs, send_result.settlement))

    listen(MQSignal.delivery_successful, successful)
    listen(MQSignal.delivery_failed, failed)
    claim = queue.claimed(envelope('ada', 'bob'))

    result = MessageHandler([says(SendResult(replies))]).deliver(claim)

    told = {
        'successful': (result.accepted, Settlement()),
        'failed': ((*result.deferred, *result.refused), result.settlement),
    }
    assert heard == [(signal, claim.id, *told[signal]) for signal in signals]
    assert result.discarded is (False if 'failed' in signals else None)


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
