"""A transport and what it may answer: the results that come of it."""

from __future__ import annotations

import pytest
from zope.interface import implementer

from pyramid_mailqueue.delivery.route import Route
from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.interfaces import ITransport
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import Burial, Offer, Reply, SendResult
from pyramid_mailqueue.transports.base import Transport, as_transport

ADA, BOB = 'ada@x.example', 'bob@x.example'
OK, LATER = Reply(250, 'ok', '2.1.5'), Reply(451, 'later', '4.3.0')
SILENCE = '451 4.3.0 the transport said nothing of this recipient'

# The simplest answers.
YES, NO = True, False


class Sends:
    """A transport with nothing but ``send``."""

    def __init__(self, answer=YES):
        self.answer = answer
        self.asked = []

    def send(self, sender, recipients, content):
        self.asked.append(Offer(sender, recipients, content))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def offer(*recipients):
    return Offer('shop@site.example', recipients or (ADA,), b'Subject: s\r\n\r\n')


def said(result):
    """What was said of each recipient."""
    return {recipient: str(reply) for recipient, reply in result.replies.items()}


# --- what it answers --------------------------------------------------------


@pytest.mark.parametrize(
    ('answer', 'text', 'via'),
    [
        (YES, '250 sent', 'Sends'),
        (NO, '451 4.3.0 the transport did not take the message', 'Sends'),
        (SendResult({ADA: LATER}), '451 4.3.0 later', 'Sends'),
        (SendResult({ADA: OK}, 'its own name'), '250 2.1.5 ok', 'its own name'),
    ],
)
def test_a_transport_may_answer_with_yes_or_no_or_say_it_for_each_recipient(answer, text, via):
    transport = Sends(answer)

    result = Route(transport).send(offer())

    assert transport.asked == [offer()]
    assert (said(result), result.transport) == ({ADA: text}, via)


def test_who_is_left_out_by_a_single_send_is_deferred_and_offered_again_over_a_connection():
    route, answer = Route(Sends()), SendResult({ADA: OK})

    sent, streamed = (route.read(answer, (ADA, BOB), may_go_on=may_go_on) for may_go_on in (False, True))

    assert said(sent) == {ADA: '250 2.1.5 ok', BOB: SILENCE}
    assert said(streamed) == {ADA: '250 2.1.5 ok'}


@pytest.mark.parametrize('answer', [SendResult(), SendResult({'Ada@x.example': OK}), SendResult(queued=True)])
@pytest.mark.parametrize('may_go_on', [True, False])
def test_who_speaks_of_nobody_that_was_asked_for_has_said_nothing(answer, may_go_on):
    result = Route(Sends()).read(answer, (ADA, BOB), may_go_on=may_go_on)

    assert said(result) == {ADA: SILENCE, BOB: SILENCE}


def test_somebody_elses_reply_is_left_out():
    assert Route(Sends(SendResult({BOB: LATER, ADA: OK}))).send(offer()).replies == {ADA: OK}


def test_with_trouble_those_who_are_left_out_are_open(trouble):
    result = Route(Sends(SendResult({ADA: OK}, trouble=trouble))).send(offer(ADA, BOB))

    assert (result.replies, result.trouble) == ({ADA: OK}, trouble)


# --- trouble and defects ----------------------------------------------------


def test_trouble_that_is_raised_is_that_of_the_message(trouble):
    result = Route(Sends(trouble)).send(offer())

    assert (result.replies, result.trouble, result.transport) == ({}, trouble, 'Sends')


def test_a_defect_of_a_transport_is_an_attempt(caplog):
    result = Route(Sends(KeyError('no such region'))).send(offer())

    assert said(result) == {ADA: "451 4.3.0 the transport failed: KeyError: 'no such region'"}
    assert [record.levelname for record in caplog.records] == ['ERROR']
    assert 'Traceback' in caplog.text


@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit])
def test_who_is_interrupted_is_heard(error):
    with pytest.raises(error):
        Route(Sends(error())).send(offer())


@pytest.mark.parametrize('in_message', [True, False])
def test_during_a_back_off_there_is_no_trouble_in_the_midst_of_the_message_that_waits(in_message):
    trouble = ServerTrouble('gone', code=421, in_message=in_message)

    result = Route(Sends()).still_in_trouble(trouble)

    assert (str(result.trouble), result.trouble.code, result.trouble.in_message) == ('gone', 421, False)
    assert result.transport == 'Sends'


# --- what an object need not have -------------------------------------------


class Queues(Sends):
    """A transport into a queue."""

    def __init__(self, *, is_full=False):
        super().__init__()
        self.is_full = is_full
        self.buried = []

    def leads_to(self, queue):
        return queue == 'mine'

    def bury(self, sender, content, burials):
        if self.is_full:
            raise OSError(28, 'No space left on device')
        self.buried.append((sender, content, burials))
        return True


ENVELOPE = Envelope('shop@site.example', (ADA,), b'Subject: s\r\n\r\n')
BURIALS = (Burial((ADA,), '550 no'),)


def test_whether_it_leads_back_into_a_queue_is_for_the_transport_to_say():
    assert [as_transport(Queues()).leads_to(queue) for queue in ('mine', 'other')] == [True, False]
    assert not as_transport(Sends()).leads_to('mine')


def test_dead_letters_are_kept_where_that_can_be_done(caplog):
    full, empty = Queues(is_full=True), Queues()

    assert [Route(it).bury(ENVELOPE, BURIALS) for it in (full, empty, Sends())] == [False, True, False]
    assert empty.buried == [('shop@site.example', b'Subject: s\r\n\r\n', BURIALS)]
    assert 'cannot keep a dead letter' in caplog.text


def test_every_member_that_an_object_has_is_used_and_all_others_are_added():
    @implementer(ITransport)
    class Whole(Sends):
        name = 'whole'
        called = ()

        def connect(self, instead_of=None):
            return 'a connection'

        def close(self):
            self.called = (*self.called, 'close')

        def abort(self):
            self.called = (*self.called, 'abort')

        def reload(self):
            self.called = (*self.called, 'reload')

    whole, least = Whole(), Sends()
    for transport in map(as_transport, (whole, least)):
        transport.close()
        transport.abort()
        transport.reload()

    assert whole.called == ('close', 'abort', 'reload')
    assert [as_transport(it).connect() for it in (whole, least)] == ['a connection', None]
    assert [as_transport(it).name for it in (whole, least)] == ['whole', 'Sends']


def test_a_connect_of_its_own_is_left_to_a_sender_that_is_no_declared_transport():
    class Client(Sends):
        def connect(self):
            raise AssertionError

    assert as_transport(Client()).connect() is None


def test_a_dead_letter_is_kept_where_nothing_is_returned_as_well():
    class Keeps(Sends):
        def __init__(self, answer):
            self.answer = answer

        def bury(self, *letter):
            return self.answer

    assert [Route(Keeps(it)).bury(ENVELOPE, BURIALS) for it in (None, True, False)] == [True, True, False]


def test_a_transport_that_is_whole_is_left_as_it_is():
    class Mine(Transport):
        name = 'mine'

    transport = Mine()

    assert as_transport(transport) is transport
    assert Route(transport).transport is transport
