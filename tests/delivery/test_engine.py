"""The loop: several connections and several transports in one thread, and what may take long with its helpers."""

from __future__ import annotations

import select
import threading
import time

import pytest

from pyramid_mailqueue.delivery import engine as engine_module
from pyramid_mailqueue.delivery.engine import MAX_PENDING, Engine
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.run import Due
from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.results import Reply, SendResult
from pyramid_mailqueue.transports.base import Transport
from tests.delivery.conftest import Says
from tests.parts.connections import Given, Streams, deliver_all

YES, NO = True, False
LATER = Reply(451, 'later', '4.3.0')


@pytest.fixture
def claimed(queue, envelope):
    """Claims of so many messages, to ``m0@x.example`` and so on."""

    def claimed(number):
        return [queue.put_claimed(envelope(f'm{index}')) for index in range(number)]

    return claimed


def m(*numbers):
    return [(f'm{number}@x.example',) for number in numbers]


with_and_without_helpers = pytest.mark.parametrize('has_helpers', [True, False])


class Waits(Transport):
    """A plain transport; the calls for some recipients wait for *event*."""

    name = 'waits'

    def __init__(self, event, *recipients, answer=YES):
        self.event = event
        self.recipients = recipients
        self.answer = answer
        self.asked = []
        self.under_way = self.most = 0
        self.lock = threading.Lock()

    def send(self, sender, recipients, content):
        with self.lock:
            self.asked.append(recipients)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        if recipients in self.recipients:
            assert self.event.wait(30)
        with self.lock:
            self.under_way -= 1
        return self.answer


class Picky(Streams):
    """Its connections cannot take the second message."""

    def connect(self, instead_of=None):
        connection = super().connect(instead_of)
        submit = connection.submit

        def submit_if_fit(offer):
            if offer.recipients == m(1)[0]:
                raise ValueError('no')
            submit(offer)

        connection.submit = submit_if_fit
        return connection


# --- several transports -----------------------------------------------------


def test_a_server_that_takes_its_time_keeps_no_message_from_another_server(queue, claimed, make_event):
    second_is_done = make_event()

    class Slow(Streams):
        def connect(self, instead_of=None):
            assert second_is_done.wait(30)
            return super().connect(instead_of)

    # The first is for the second transport, which waits; the others are for the first.
    first = Streams(NO, YES)
    second = Slow(YES)
    given = Given(*claimed(5))
    given.on_ended = lambda *_: second_is_done.set() if len(given.results) == 4 else None

    results = deliver_all(MessageHandler([first, second]), given, has_helpers=True)

    assert [claim.envelope.recipients for claim, _ in results] == m(1, 2, 3, 4, 0)
    assert (first.offered, second.offered) == (m(0, 1, 2, 3, 4), m(0))
    assert queue.state == {}


@with_and_without_helpers
def test_who_has_it_is_written_down_though_the_next_server_backs_off(queue, envelope, trouble, has_helpers):
    seen = []
    partly = SendResult({'ada@x.example': Reply(250, 'ok'), 'bob@x.example': LATER})
    third = Streams(YES, before=lambda _: seen.extend(header.recipients for header in queue.headers('cur')))
    handler = MessageHandler([Streams(partly), Streams(YES), third])
    handler.routes[1].backoff.begin(trouble)

    deliver_all(handler, Given(queue.put_claimed(envelope('ada', 'bob'))), has_helpers=has_helpers)

    assert third.offered == seen == [('bob@x.example',)]
    assert queue.state == {}


def test_a_back_off_that_ends_while_a_message_is_read_leaves_it_to_the_server(queue, claimed, trouble):
    handler = MessageHandler([Streams(YES)])
    handler.routes[0].backoff.begin(trouble)

    class Reads(Given):
        def next(self):
            handler.routes[0].backoff.end()
            return super().next()

    assert len(deliver_all(handler, Reads(*claimed(2)))) == 2
    assert queue.state == {}


def test_only_so_many_messages_wait_for_another_transport(queue, claimed, make_event):
    go_on = make_event()
    first, second = Streams(NO), Waits(go_on, *m(0))
    given = Given(*claimed(3 * MAX_PENDING))
    looked = []

    def before(recipients):
        looked.append(len(given.claims))
        if len(looked) == MAX_PENDING:
            threading.Timer(0.2, go_on.set).start()

    first.before = before
    results = deliver_all(MessageHandler([first, second]), given, has_helpers=True)

    assert len(results) == len(second.asked) == 3 * MAX_PENDING
    # Two are in hand of the first, and one in that of the second.
    begun = 3 * MAX_PENDING - looked[MAX_PENDING + 2]
    assert begun <= MAX_PENDING + 4


@with_and_without_helpers
def test_a_transport_without_connections_is_called_for_one_message_after_the_other(queue, claimed, says, has_helpers):
    transport = says(YES)

    results = deliver_all(MessageHandler([transport]), Given(*claimed(5)), has_helpers=has_helpers)

    assert transport.asked == m(0, 1, 2, 3, 4)
    assert len(results) == 5


def test_it_is_called_for_several_at_once_if_there_may_be_as_many_connections(queue, claimed, make_event):
    event = make_event()
    transport = Waits(event, *m(*range(1, 8)))
    threading.Timer(0.3, event.set).start()

    deliver_all(MessageHandler([transport]), Given(*claimed(8)), connections=3, has_helpers=True)

    assert (transport.most, len(transport.asked)) == (3, 8)
    assert transport.asked[0] == m(0)[0], 'the first is alone: it finds out whether anything works'


def test_trouble_beside_others_leaves_the_message_to_them(queue, claimed, make_event, trouble, caplog):
    event = make_event()

    class Limited(Waits):
        """It takes two at a time, and no more."""

        def send(self, sender, recipients, content):
            if self.under_way >= 2:
                event.set()
                raise trouble
            return super().send(sender, recipients, content)

    transport = Limited(event, *m(1, 2))

    results = deliver_all(MessageHandler([transport]), Given(*claimed(8)), connections=3, has_helpers=True)

    assert [result.trouble for _, result in results] == [None] * 8
    assert caplog.messages.count(f'{trouble} The run goes on with fewer connections.') == 1
    assert queue.state == {}


# --- a connection -----------------------------------------------------------


@with_and_without_helpers
def test_what_a_spent_connection_has_in_hand_goes_over_another_one_which_knows_that(queue, claimed, has_helpers):
    transport = Streams(YES, YES, 'spent', by_connection=[[YES]])
    given = Given(*claimed(4))

    results = deliver_all(MessageHandler([transport]), given, has_helpers=has_helpers)

    assert [claim.envelope.recipients for claim, _ in results] == m(0, 1, 2, 3)
    assert transport.offered == m(0, 1, 2, 3, 2, 3)
    assert transport.instead_of == [None, transport.connections[0]]
    assert all(connection.is_released for connection in transport.connections)


@with_and_without_helpers
def test_a_connection_with_a_defect_is_an_attempt_at_its_oldest_message_and_no_other(
    queue, claimed, caplog, has_helpers
):
    transport = Streams(YES, KeyError('no such region'), by_connection=[[YES]])

    results = deliver_all(MessageHandler([transport]), Given(*claimed(4)), has_helpers=has_helpers)

    assert len(results) == 4
    assert [header.recipients for header in queue.headers('new')] == m(1)
    assert [header.last_reply for header in queue.headers('new')] == [
        "451 4.3.0 the transport failed: KeyError: 'no such region'"
    ]
    assert len(transport.connections) == 2
    assert caplog.text.count('The transport streams failed') == 1


@with_and_without_helpers
def test_a_transport_that_cannot_connect_because_of_a_defect_fails_for_each_message(
    queue, claimed, caplog, has_helpers
):
    class Defect(Streams):
        def connect(self, instead_of=None):
            raise KeyError('no such region')

    results = deliver_all(MessageHandler([Defect(YES)]), Given(*claimed(2)), has_helpers=has_helpers)

    assert [str(reply) for _, result in results for reply in result.replies.values()] == [
        "451 4.3.0 the transport failed: KeyError: 'no such region'"
    ] * 2
    assert queue.state == {'waiting': 2}


def test_a_message_that_a_connection_cannot_take_is_an_attempt_and_the_others_are_sent(queue, claimed, caplog):
    transport = Picky(YES)

    deliver_all(MessageHandler([transport]), Given(*claimed(3)))

    assert transport.offered == m(0, 2)
    assert [header.recipients for header in queue.headers('new')] == m(1)


@with_and_without_helpers
def test_a_connection_that_cannot_be_released_keeps_no_message_from_being_sent(queue, claimed, caplog, has_helpers):
    class Stays(Streams):
        def connect(self, instead_of=None):
            connection = super().connect(instead_of)

            def fail():
                raise KeyError('no such region')

            connection.release = fail
            return connection

    assert len(deliver_all(MessageHandler([Stays(YES)]), Given(*claimed(3)), has_helpers=has_helpers)) == 3
    assert queue.state == {}
    assert 'The transport streams failed' in caplog.text


def test_more_answers_than_offers_are_left_alone(queue, claimed):
    class Talks(Streams):
        def connect(self, instead_of=None):
            connection = super().connect(instead_of)
            advance = connection.advance

            def advance_and_talk(events=0):
                yield from advance(events)
                if not connection.hand:
                    yield YES

            connection.advance = advance_and_talk
            return connection

    assert len(deliver_all(MessageHandler([Talks(YES)]), Given(*claimed(2)))) == 2
    assert queue.state == {}


def test_trouble_that_a_connection_raises_is_that_of_its_oldest_message(queue, claimed, trouble):
    class Raises(Streams):
        def connect(self, instead_of=None):
            connection = super().connect(instead_of)

            def advance(events=0):
                raise trouble
                yield

            connection.advance = advance
            return connection

    transport = Raises(YES)
    results = deliver_all(MessageHandler([transport]), Given(*claimed(2)))

    assert results[0][1].trouble is trouble
    assert len(transport.connections) == 1
    assert queue.state == {'waiting': 2}


@pytest.mark.parametrize(
    ('error', 'said'),
    [
        (ServerTrouble('mail.example:25 is down'), []),
        (KeyError('region'), ["451 4.3.0 the transport failed: KeyError: 'region'"]),
    ],
)
def test_a_connection_that_is_no_generator_may_raise_at_once(queue, claimed, error, said):
    class Raises(Streams):
        def connect(self, instead_of=None):
            connection = super().connect(instead_of)

            def advance(events=0):
                raise error

            connection.advance = advance
            return connection

    results = deliver_all(MessageHandler([Raises(YES)]), Given(*claimed(1)))

    assert [str(reply) for reply in results[0][1].replies.values()] == said
    assert queue.state == {'waiting': 1}


def test_a_connection_that_answers_with_nothing_has_not_taken_the_message(queue, claimed):
    assert len(deliver_all(MessageHandler([Streams(None, YES)]), Given(*claimed(2)))) == 2
    assert [header.recipients for header in queue.headers('new')] == m(0)


class _Odd:
    """An answer that is neither true nor false."""

    def __bool__(self):
        raise ValueError('ambiguous')


@with_and_without_helpers
@pytest.mark.parametrize('kind', [Says, Streams])
def test_an_answer_that_cannot_be_read_is_an_attempt_and_the_others_are_sent(queue, claimed, kind, has_helpers):
    results = deliver_all(MessageHandler([kind(_Odd(), YES)]), Given(*claimed(3)), has_helpers=has_helpers)

    assert len(results) == 3
    assert [(header.recipients, header.attempts) for header in queue.headers('new')] == [(*m(0), 1)]


def test_a_connection_whose_time_is_over_is_looked_at_though_nothing_has_come(queue, claimed, trouble):
    class Silent(Streams):
        def connect(self, instead_of=None):
            connection = super().connect(instead_of)
            advance = connection.advance
            looks = []

            def look(events=0):
                looks.append(events)
                return advance(1 if len(looks) > 2 else 0)

            connection.advance = look
            connection.wait = lambda: (select.POLLPRI, 0.01)
            return connection

    # An event that never comes, and a descriptor that is never ready.
    assert len(deliver_all(MessageHandler([Silent(YES)]), Given(*claimed(1)))) == 1


# --- helpers ----------------------------------------------------------------


def test_what_takes_long_to_be_written_keeps_others_from_its_connection_and_from_no_other(
    queue, envelope, claimed, make_event, monkeypatch
):
    claims = [queue.put_claimed(envelope('ada', 'bob')), *claimed(4)]
    written = make_event()
    settle = type(claims[0]).settle

    def settle_later(claim, settlement):
        if claim is claims[0]:
            assert written.wait(30)
        return settle(claim, settlement)

    monkeypatch.setattr(type(claims[0]), 'settle', settle_later)
    given = Given(*claims)
    # What was announced behind it waits, too.
    given.on_ended = lambda *_: written.set() if len(given.results) == 3 else None
    transport = Streams(SendResult({'ada@x.example': Reply(250, 'ok'), 'bob@x.example': LATER}), YES)

    results = deliver_all(MessageHandler([transport]), given, connections=2, has_helpers=True)

    assert [claim for claim, _ in results[3:]] == claims[:2]
    assert len(transport.connections) == 2
    assert queue.state == {'waiting': 1}


def test_a_run_that_is_over_while_that_is_written_leaves_what_was_announced_as_it_was(
    queue, envelope, claimed, monkeypatch
):
    claims = [queue.put_claimed(envelope('ada', 'bob')), *claimed(2)]
    given = Given(*claims)
    settle = type(claims[0]).settle

    def settle_last(claim, settlement):
        given.is_over = True
        return settle(claim, settlement)

    monkeypatch.setattr(type(claims[0]), 'settle', settle_last)
    transport = Streams(SendResult({'ada@x.example': Reply(250, 'ok'), 'bob@x.example': LATER}), YES)

    results = deliver_all(MessageHandler([transport]), given, has_helpers=True)

    assert ([claim for claim, _ in results], given.released) == (claims[:1], [claims[1]])
    assert transport.offered[1:] == m(0)


def test_without_a_pipe_the_loop_does_everything_itself(queue, claimed, monkeypatch):
    def no_more_files():
        raise OSError(24, 'Too many open files')

    monkeypatch.setattr(engine_module, 'Helpers', no_more_files)

    results = deliver_all(MessageHandler([Streams(NO, YES)]), Given(*claimed(3)), has_helpers=True)

    assert len(results) == 3
    assert queue.state == {'waiting': 1}


def test_without_threads_the_loop_does_everything_itself(queue, claimed, monkeypatch):
    def no_more_threads(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, 'start', no_more_threads)

    results = deliver_all(MessageHandler([Streams(NO, YES)]), Given(*claimed(3)), has_helpers=True)

    assert len(results) == 3
    assert queue.state == {'waiting': 1}


def test_a_defect_in_a_helper_ends_the_loop_and_its_message_stays_claimed(queue, claimed, monkeypatch):
    claims = claimed(3)
    settle = type(claims[0]).settle

    def defect(claim, settlement):
        if claim is claims[0]:
            raise ZeroDivisionError
        return settle(claim, settlement)

    monkeypatch.setattr(type(claims[0]), 'settle', defect)

    with pytest.raises(ZeroDivisionError):
        deliver_all(MessageHandler([Streams(NO)]), Given(*claims), has_helpers=True)

    assert claims[0].id in [file.name for file in queue.files('cur')]


@with_and_without_helpers
def test_after_a_defect_the_other_connections_finish_what_they_have_under_way(queue, claimed, has_helpers):
    class Policy:
        asked = 0

        def decide(self, recipients, *attempt):
            if recipients == m(3)[0]:
                raise ZeroDivisionError
            return MessageHandler([]).retry_policy.decide(recipients, *attempt)

    transport = Streams(YES)
    given = Given(*claimed(9))

    with pytest.raises(ZeroDivisionError):
        deliver_all(MessageHandler([transport], retry_policy=Policy()), given, connections=3, has_helpers=has_helpers)

    answered = {claim.envelope.recipients for claim, _ in given.results} | {*m(3)}
    assert {*transport.answered} == answered, 'what a server has is not given back'
    assert {claim.envelope.recipients for claim in given.released}.isdisjoint(answered)
    assert len(queue.files('cur')) == 1 + len(given.claims), 'the message of the defect stays claimed'


@with_and_without_helpers
def test_after_a_defect_what_was_submitted_and_not_sent_is_not_waited_for(queue, claimed, has_helpers):
    class Policy:
        def decide(self, *attempt):
            raise ZeroDivisionError

    given = Given(*claimed(3))
    transport = Picky(YES)

    with pytest.raises(ZeroDivisionError):
        deliver_all(MessageHandler([transport], retry_policy=Policy()), given, has_helpers=has_helpers)

    assert [claim.envelope.recipients for claim in given.released] == m(0)
    assert transport.connections[0].is_released


def test_a_connection_that_opens_when_everything_is_done_is_released(queue, claimed, make_event, until, monkeypatch):
    monkeypatch.setattr(engine_module, 'GIVE_UP_SECONDS', 0.01)
    go_on = make_event()

    class Slow(Streams):
        aborted = 0

        def connect(self, instead_of=None):
            if self.connections:
                assert go_on.wait(30)
            return super().connect(instead_of)

        def abort(self):
            self.aborted += 1

    transport = Slow(YES)
    results = deliver_all(MessageHandler([transport]), Given(*claimed(5)), connections=2, has_helpers=True)
    assert (len(results), len(transport.connections), transport.aborted) == (5, 1, 1)
    go_on.set()

    until(lambda: len(transport.connections) == 2 and transport.connections[1].is_released)


# --- an interruption --------------------------------------------------------


@with_and_without_helpers
@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit])
def test_an_interruption_settles_what_was_answered_and_releases_the_rest(queue, claimed, error, has_helpers):
    class Policy:
        asked = 0

        def decide(self, *attempt):
            self.asked += 1
            if self.asked == 2:
                raise error
            return MessageHandler([]).retry_policy.decide(*attempt)

    given = Given(*claimed(5))
    handler = MessageHandler([Streams(YES)], retry_policy=Policy())

    with pytest.raises(error):
        Engine(handler, has_helpers=has_helpers).run(given)

    assert [claim.envelope.recipients for claim, _ in given.results] == m(0, 1)
    assert [claim.envelope.recipients for claim in given.released] == m(2)
    assert queue.state == {'waiting': 1, 'in progress': 2}, 'the source has the last two'


def test_between_two_transactions_it_settles_what_was_said_of_the_first(queue, envelope):
    class Interrupts(Streams):
        def connect(self, instead_of=None):
            connection = super().connect(instead_of)
            submit = connection.submit

            def submit_once(offer):
                if self.offered:
                    raise KeyboardInterrupt
                submit(offer)

            connection.submit = submit_once
            return connection

    transport = Interrupts(SendResult({'ada@x.example': Reply(250, 'ok')}))
    given = Given(queue.put_claimed(envelope('ada', 'bob')))

    with pytest.raises(KeyboardInterrupt):
        deliver_all(MessageHandler([transport]), given)

    assert [(header.recipients, header.attempts) for header in queue.headers('new')] == [(('bob@x.example',), 0)]


# --- the source -------------------------------------------------------------


def test_nothing_is_opened_for_nothing(says):
    transport = Streams(YES)

    assert deliver_all(MessageHandler([transport]), Given(), has_helpers=True) == []
    assert transport.connections == []


def test_no_more_connections_are_opened_than_there_are_messages_for_them(queue, claimed):
    transport = Streams(YES)

    deliver_all(MessageHandler([transport]), Given(*claimed(4)), connections=5)

    # The first has two in hand when it has worked.
    assert len(transport.connections) <= 3


def test_a_source_that_says_when_to_ask_again_is_asked_again(queue, claimed):
    class Later(Given):
        asked = 0

        def look(self, number):
            return 0 if self.asked < 3 else super().look(number)

        def pause(self):
            self.asked += 1
            return 0.01 if self.claims else None

    given = Later(*claimed(2))

    assert len(deliver_all(MessageHandler([Streams(YES)]), given, has_helpers=True)) == 2
    assert given.asked >= 3


def test_what_waits_for_the_rate_does_not_wait_for_a_slow_server(queue, claimed, make_event):
    go_on = make_event()
    first, second = Streams(NO, YES), Waits(go_on, *m(0))

    allowed_at = 0.0

    def one_each_time(recipients):
        nonlocal allowed_at
        seconds = max(0.0, allowed_at - time.monotonic())
        if recipients and not seconds:
            allowed_at = time.monotonic() + 0.1
        return seconds

    ended = []

    def note(claim, result):
        ended.append(claim.envelope.recipients)
        if len(ended) == 2:
            go_on.set()

    due = Due(iter(claimed(3)), limit=None, is_stopped=lambda: False)
    due.take_from_rate, due.on_ended = one_each_time, note

    Engine(MessageHandler([first, second]), has_helpers=True).run(due)

    assert ended == m(1, 2, 0)
    assert not due.is_rate_reached


def test_a_thread_that_hangs_while_it_claims_keeps_nobody_from_releasing_the_rest(queue, claimed, make_event, until):
    go_on = make_event()
    claims = claimed(1)
    asked = []

    def claim_due():
        yield from claims
        asked.append(True)
        go_on.wait(30)

    due = Due(claim_due(), limit=None, is_stopped=lambda: False)
    threading.Thread(target=due.look, args=[2], daemon=True).start()
    until(lambda: asked)

    due.release()

    assert queue.state == {'waiting': 1}


def test_a_server_that_is_down_is_tried_once_and_all_messages_have_the_reason(queue, claimed):
    down = ServerTrouble('it is down')

    class Down(Streams):
        def connect(self, instead_of=None):
            self.connections.append(None)
            raise down

    transport = Down(YES)
    results = deliver_all(MessageHandler([transport]), Given(*claimed(3)), has_helpers=True)

    assert [result.trouble for _, result in results] == [down] * 3
    assert len(transport.connections) == 1
    assert queue.state == {'waiting': 3}
