"""A transport and what it may do: the results that come of it, and when it has to rest."""

from __future__ import annotations

import pytest

from pyramid_mailqueue.delivery.pause import Pause
from pyramid_mailqueue.delivery.route import MAX_STUMBLES, Route
from pyramid_mailqueue.delivery.waiting import without_waits
from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import Burial, Offer, Reply, SendResult
from pyramid_mailqueue.testing import ScriptedSMTPServer
from pyramid_mailqueue.transports.smtp import SMTPTransport

ADA, BOB = 'ada@x.example', 'bob@x.example'
OK, LATER = Reply(250, 'ok', '2.1.5'), Reply(451, 'later', '4.3.0')
SILENCE = '451 4.3.0 the transport said nothing of this recipient'
NOTHING = '451 4.3.0 the transport said nothing of this message'

# The simplest answers.
YES, NO = True, False


def offer(number, *recipients):
    return Offer('shop@site.example', recipients or (ADA,), b'Subject: %d\r\n\r\n' % number)


class Streams:
    """A transport with ``stream``: takes all offers, and answers as *steps* say; an exception is raised."""

    name = 'streams'

    def __init__(self, *steps, ahead=1):
        self.steps = steps
        self.ahead = ahead
        self.asked = []
        self.is_closed = False

    def stream(self, first, more):
        self.asked.append(first)
        try:
            for step in self.steps:
                if len(self.asked) <= self.ahead and (following := more()) is not None:
                    self.asked.append(following)
                if isinstance(step, Exception):
                    raise step
                yield step
        finally:
            self.is_closed = True

    def send(self, sender, recipients, content):
        raise AssertionError('stream() goes before send()')


class Sends:
    """A transport with nothing but ``send``."""

    def __init__(self, *steps):
        self.steps = list(steps)
        self.asked = []

    def send(self, sender, recipients, content):
        self.asked.append(Offer(sender, recipients, content))
        step = self.steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        return step


def results(transport, *offers):
    """What comes of *offers*."""
    left = list(offers)
    return list(without_waits(Route(transport, Pause()).stream(left.pop(0), lambda: left.pop(0) if left else None)))


def said(results):
    """For each result, what was said of each recipient, or the trouble."""
    return [
        {recipient: str(reply) for recipient, reply in result.replies.items()} or str(result.trouble)
        for result in results
    ]


# --- what it answers --------------------------------------------------------


def test_without_a_stream_the_messages_are_sent_one_by_one():
    transport = Sends(YES, NO, SendResult({ADA: LATER}), SendResult({ADA: OK}, 'its own name'))
    offers = [offer(number) for number in range(4)]

    found = results(transport, *offers)

    assert transport.asked == offers
    assert said(found) == [
        {ADA: '250 sent'},
        {ADA: '451 4.3.0 the transport did not take the message'},
        {ADA: '451 4.3.0 later'},
        {ADA: '250 2.1.5 ok'},
    ]
    assert [result.transport for result in found] == ['Sends', 'Sends', 'Sends', 'its own name']


def test_the_next_message_is_asked_for_when_the_outcome_of_the_one_before_was_heard():
    transport, heard, asked_after = Sends(YES, YES), [], []
    left = [offer(2)]

    def more():
        asked_after.append(len(heard))
        return left.pop(0) if left else None

    for result in without_waits(Route(transport, Pause()).stream(offer(1), more)):
        assert len(transport.asked) == len(heard) + 1
        heard.append(result)

    assert asked_after == [1, 2]


@pytest.mark.parametrize(('kind', 'open_ones'), [(Sends, {}), (Streams, {BOB})])
def test_who_is_left_out_is_offered_again_by_a_stream_and_deferred_by_a_single_send(kind, open_ones):
    (result,) = results(kind(SendResult({ADA: OK})), offer(1, ADA, BOB))

    assert {ADA, BOB} - result.replies.keys() == set(open_ones)
    assert [str(reply) for reply in result.replies.values()] == ['250 2.1.5 ok', *([] if open_ones else [SILENCE])]


@pytest.mark.parametrize('answer', [SendResult(), SendResult({'Ada@x.example': OK}), SendResult(queued=True)])
@pytest.mark.parametrize('kind', [Sends, Streams])
def test_who_speaks_of_nobody_that_was_asked_for_has_said_nothing(kind, answer):
    (result,) = results(kind(answer), offer(1, ADA, BOB))

    assert said([result]) == [{ADA: SILENCE, BOB: SILENCE}]


def test_somebody_elses_reply_is_left_out():
    (result,) = results(Sends(SendResult({BOB: LATER, ADA: OK})), offer(1))

    assert result.replies == {ADA: OK}


@pytest.mark.parametrize('kind', [Sends, Streams])
def test_with_trouble_those_who_are_left_out_are_open(kind, trouble):
    transport = kind(SendResult({ADA: OK}, trouble=trouble))

    (result,) = results(transport, offer(1, ADA, BOB), offer(2))

    assert (result.replies, result.trouble) == ({ADA: OK}, trouble)


def test_results_of_a_stream_are_yielded_in_the_order_of_the_offers():
    offers = [offer(number) for number in range(3)]
    transport = Streams(YES, NO, SendResult({ADA: OK}), ahead=2)

    assert said(results(transport, *offers)) == [
        {ADA: '250 sent'},
        {ADA: '451 4.3.0 the transport did not take the message'},
        {ADA: '250 2.1.5 ok'},
    ]
    assert transport.asked == offers
    assert transport.is_closed


def test_who_listens_no_longer_ends_the_stream():
    transport = Streams(YES, YES)
    found = without_waits(Route(transport, Pause()).stream(offer(1), lambda: offer(2)))
    next(found)
    found.close()

    assert transport.is_closed


# --- trouble and defects ----------------------------------------------------


def test_after_trouble_the_stream_ends_and_what_was_offered_after_it_is_as_it_was(trouble):
    transport = Streams(YES, SendResult(trouble=trouble), YES)

    assert said(results(transport, offer(1), offer(2), offer(3))) == [{ADA: '250 sent'}, str(trouble)]
    assert transport.is_closed


@pytest.mark.parametrize('kind', [Sends, Streams])
def test_trouble_that_is_raised_is_that_of_the_oldest_message(kind, trouble):
    found = results(kind(YES, trouble), offer(1), offer(2), offer(3))

    assert said(found) == [{ADA: '250 sent'}, str(trouble)]
    assert found[1].transport in ('Sends', 'streams')


@pytest.mark.parametrize('kind', [Sends, Streams])
def test_a_defect_of_a_transport_is_an_attempt_at_the_oldest_message_and_no_other(kind, caplog):
    found = results(kind(YES, KeyError('no such region')), offer(1), offer(2), offer(3))

    assert said(found) == [
        {ADA: '250 sent'},
        {ADA: "451 4.3.0 the transport failed: KeyError: 'no such region'"},
    ]
    assert [record.levelname for record in caplog.records] == ['ERROR']
    assert 'Traceback' in caplog.text


def test_a_stream_that_says_nothing_at_all_is_an_attempt():
    assert said(results(Streams(), offer(1), offer(2))) == [{ADA: NOTHING}]


@pytest.mark.parametrize('late', [ServerTrouble('gone'), RuntimeError('a defect')])
def test_what_goes_wrong_when_everything_is_answered_has_happened_to_no_message(late):
    assert said(results(Streams(YES, late), offer(1))) == [{ADA: '250 sent'}]


def test_more_answers_than_offers_are_a_defect_and_nothing_else(caplog):
    assert said(results(Streams(YES, YES), offer(1))) == [{ADA: '250 sent'}]
    assert 'The transport streams failed' in caplog.text


@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit])
def test_who_is_interrupted_is_heard(error):
    with pytest.raises(error):
        results(Sends(error()), offer(1))


# --- a rest -----------------------------------------------------------------


def stumble():
    return ServerTrouble('it hung up', in_message=True)


def test_a_server_may_break_off_in_the_midst_of_two_messages_in_a_row_and_not_of_a_third():
    route, row = Route(Sends(), Pause()), {}

    assert [route.forgives(stumble(), row) for _ in range(7)] == [True, True, False] * 2 + [True]
    assert MAX_STUMBLES == 2


def test_a_success_in_between_begins_the_row_anew():
    route, row = Route(Sends(), Pause()), {}
    forgiven = []
    for _ in range(3):
        forgiven += [route.forgives(stumble(), row), route.forgives(stumble(), row)]
        route.worked(row)

    assert forgiven == [True] * 6


def test_trouble_of_the_server_is_not_forgiven(trouble):
    route = Route(Sends(), Pause())

    assert not route.forgives(trouble, {})


def test_the_row_is_counted_for_each_who_delivers():
    route = Route(Sends(), Pause())

    forgiven = [route.forgives(stumble(), {}) for _ in range(5)]

    assert forgiven == [True] * 5, 'a restart breaks off the sessions of all at once'


def test_a_success_ends_the_rest(trouble):
    route = Route(Sends(), Pause())
    route.backoff.begin(trouble)
    assert route.backoff.trouble is trouble

    route.worked({})

    assert route.backoff.trouble is None


@pytest.mark.parametrize('in_message', [True, False])
def test_who_rests_has_had_no_trouble_in_the_midst_of_the_message_that_waits(in_message):
    trouble = ServerTrouble('gone', code=421, in_message=in_message)

    result = Route(Sends(), Pause()).still_resting(trouble)

    assert (str(result.trouble), result.trouble.code, result.trouble.in_message) == ('gone', 421, False)
    assert result.transport == 'Sends'


# --- methods that a transport may have --------------------------------------


class Queues:
    """A transport into a queue."""

    def __init__(self, *, is_full=False):
        self.is_full = is_full
        self.buried = []

    def leads_to(self, queue):
        return queue == 'mine'

    def bury(self, sender, content, burials):
        if self.is_full:
            raise OSError(28, 'No space left on device')
        self.buried.append((sender, content, burials))


ENVELOPE = Envelope('shop@site.example', (ADA,), b'Subject: s\r\n\r\n')
BURIALS = (Burial((ADA,), '550 no'),)


def test_whether_it_leads_back_into_a_queue_is_for_the_transport_to_say():
    assert [Route(Queues(), Pause()).leads_to(queue) for queue in ('mine', 'other')] == [True, False]
    assert not Route(Sends(), Pause()).leads_to('mine')


def test_dead_letters_are_kept_where_that_can_be_done(caplog):
    full, empty = Queues(is_full=True), Queues()

    assert [Route(it, Pause()).bury(ENVELOPE, BURIALS) for it in (full, empty, Sends())] == [False, True, False]
    assert empty.buried == [('shop@site.example', b'Subject: s\r\n\r\n', BURIALS)]
    assert 'cannot keep a dead letter' in caplog.text


def test_close_abort_and_reload_are_passed_on_where_they_exist():
    class Closes:
        called = ()

        def close(self):
            self.called = (*self.called, 'close')

        def abort(self):
            self.called = (*self.called, 'abort')

        def reload(self):
            self.called = (*self.called, 'reload')

    transports = Closes(), Sends()
    for route in [Route(transport, Pause()) for transport in transports]:
        route.close()
        route.abort()
        route.reload()

    assert transports[0].called == ('close', 'abort', 'reload')


# --- with a real one --------------------------------------------------------


def test_the_smtp_transport_streams():
    offers = [offer(number) for number in range(3)]
    with ScriptedSMTPServer({'MAIL': [None, None, *['550 5.7.1 never'] * 2]}) as server:
        transport = SMTPTransport(hostname=server.host, port=server.port, local_hostname='c.example')
        found = results(transport, *offers)
        transport.close()

    assert said(found) == [{ADA: '250 2.0.0 accepted'}, {ADA: '250 2.0.0 accepted'}, {ADA: '550 5.7.1 never'}]
    assert [message.content for message in server.messages] == [it.content for it in offers[:2]]
    # The third has no content; a refusal of its sender could be about the first session.
    assert server.sessions[0].round_trips == 2 + len(['EHLO', 'MAIL RCPT DATA', 'QUIT'])
    assert len(server.sessions) == 2
