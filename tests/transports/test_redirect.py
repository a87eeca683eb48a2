"""A transport that sends everything to one address: what it offers, and what it makes of the answers."""

from __future__ import annotations

import copy

import pytest

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.results import Offer, Reply, SendResult
from pyramid_mailqueue.testing import Close, ScriptedSMTPServer
from pyramid_mailqueue.transports.debug import DebugInbox
from pyramid_mailqueue.transports.maildir import MaildirBackend
from pyramid_mailqueue.transports.redirect import redirecting
from pyramid_mailqueue.transports.smtp import SMTPTransport
from tests.transports.stream_parts import stream

ME = 'me@site.example'
BOTH = ('ada@x.example', 'bob@x.example')
CONTENT = b'Subject: hello\r\n\r\nHello\r\n'
FIELD = b'X-Original-Recipients: ada@x.example,\r\n bob@x.example\r\n'


class Answering:
    """A transport that notes what it is offered, and answers with what it was given."""

    name = 'answering'

    def __init__(self, answer):
        self.answer = answer
        self.offers = []

    def send(self, *offer):
        self.offers.append(offer)
        return self.answer


@pytest.fixture
def server():
    with ScriptedSMTPServer() as server:
        yield server


@pytest.fixture
def smtp(server):
    transport = SMTPTransport(hostname=server.host, port=server.port)
    yield redirecting(transport, ME)
    transport.close()


def offers(*recipients):
    """What asks for these offers one after the other."""
    waiting = [Offer('', names, CONTENT) for names in recipients]
    return lambda: waiting.pop(0) if waiting else None


def test_the_one_is_offered_and_his_reply_is_everybodys():
    reply = Reply(451, 'later')
    inner = Answering(SendResult({ME: reply}, 'somewhere', queued=True))

    result = redirecting(inner, ME).send('shop@site.example', BOTH, CONTENT)

    assert [offer[:3] for offer in inner.offers] == [('shop@site.example', (ME,), FIELD + CONTENT)]
    assert result == SendResult(dict.fromkeys(BOTH, reply), f'somewhere (redirected to {ME})', queued=True)


def test_a_message_for_the_one_is_offered_as_it_is():
    inner = Answering(answer=True)
    redirecting(inner, ME).send('', (ME,), CONTENT)

    assert [offer[:3] for offer in inner.offers] == [('', (ME,), CONTENT)]


@pytest.mark.parametrize('answer', [True, False])
def test_a_plain_answer_is_passed_on(answer):
    assert redirecting(Answering(answer), ME).send('', BOTH, CONTENT) is answer


def test_silence_and_trouble_stay_what_they_are():
    trouble = ServerTrouble('no connection')

    assert redirecting(Answering(SendResult()), ME).send('', BOTH, CONTENT) == SendResult()
    assert redirecting(Answering(SendResult(trouble=trouble)), ME).send('', BOTH, CONTENT).trouble is trouble


def test_the_name_says_it():
    assert redirecting(Answering(answer=True), ME).name == f'answering (redirected to {ME})'
    assert redirecting(object(), ME).name == f'object (redirected to {ME})'


def test_what_redirects_already_is_left_alone():
    transport = redirecting(Answering(answer=True), ME)

    assert redirecting(transport, ME) is transport


def test_a_transport_has_what_it_has_and_nothing_more(tmp_path):
    inbox, queue = redirecting(DebugInbox(tmp_path / 'inbox'), ME), redirecting(MaildirBackend(tmp_path / 'queue'), ME)

    assert inbox.connect() is None
    assert not inbox.leads_to(MaildirBackend(tmp_path / 'queue')._queue)
    assert queue.leads_to(MaildirBackend(tmp_path / 'queue')._queue)
    assert copy.copy(inbox).name == inbox.name
    assert not hasattr(inbox, 'path')
    inbox.close()
    redirecting(Answering(answer=True), ME).close()


def test_a_stream_stays_a_stream(smtp, server):
    more = offers(('carl@x.example',), (ME,))
    results = list(stream(smtp, Offer('', BOTH, CONTENT), more))

    assert [tuple(result.replies) for result in results] == [BOTH, ('carl@x.example',), (ME,)]
    assert {result.transport for result in results} == {f'smtp:127.0.0.1:{server.port} (redirected to {ME})'}
    assert all(reply.accepted for result in results for reply in result.replies.values())
    assert [message.recipients for message in server.messages] == [(ME,)] * 3
    assert [message.content for message in server.messages] == [
        FIELD + CONTENT,
        b'X-Original-Recipients: carl@x.example\r\n' + CONTENT,
        CONTENT,
    ]
    (session,) = server.sessions
    # One for EHLO, one to begin with, and one for each message: the next one's commands go with the content.
    assert session.round_trips <= 2 + 3


def test_a_stream_that_breaks_off_breaks_off(smtp, server):
    server.script['.'] = ['250 2.0.0 taken', Close('421 4.3.2 closing')]
    more = offers(('carl@x.example',), ('dora@x.example',))

    results = until_trouble(stream(smtp, Offer('', BOTH, CONTENT), more))

    assert results[0].accepted == BOTH
    assert all(not result.accepted for result in results[1:])
    assert 'dora@x.example' not in {name for result in results for name in result.replies}


def until_trouble(found):
    """What came before the trouble, which there must be."""
    results = []
    try:
        for result in found:
            results.append(result)
            if result.trouble is not None:
                return results
    except ServerTrouble:
        return results
    raise AssertionError('there was no trouble')


def test_who_stops_listening_ends_the_stream(smtp, server):
    results = stream(smtp, Offer('', BOTH, CONTENT), offers(('carl@x.example',)))
    assert next(results).accepted == BOTH
    results.close()
    smtp.abort()

    assert len(server.messages) == 1
