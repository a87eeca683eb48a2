"""What an application calls: ``send``, ``send_immediately`` and ``enqueue``, over a real SMTP server."""

from __future__ import annotations

import io
import re
from email import message_from_bytes, policy

import pytest
import transaction

from pyramid_mailqueue import (
    AddressError,
    MessageError,
    MessageTooLarge,
    NoActiveTransaction,
    NoRecipients,
    QueueError,
    mailer_from_settings,
)
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.testing import ScriptedSMTPServer, Wait


@pytest.fixture
def make_mailer(make_settings):
    mailers = []

    def make_mailer(server, manager=None, **own):
        mailers.append(mailer_from_settings(make_settings(server, **own), manager))
        return mailers[-1]

    yield make_mailer
    for mailer in mailers:
        mailer.close()


@pytest.fixture
def mailer(make_mailer, smtp_server):
    return make_mailer(smtp_server)


@pytest.fixture(autouse=True)
def _new_transaction():
    transaction.begin()
    yield
    transaction.abort()


def waiting(mailer):
    return {state: number for state, number in mailer.queue.counts().items() if number}


def subjects(envelopes):
    return [message_from_bytes(envelope.content)['subject'] for envelope in envelopes]


# --- send -------------------------------------------------------------------


def test_send_returns_the_message_id_of_what_arrives(mailer, smtp_server, message):
    message_id = mailer.send(message('hello'))
    transaction.commit()
    (received,) = smtp_server.wait_for(1)

    arrived = message_from_bytes(received.content, policy=policy.default)
    assert re.fullmatch(r'<\S+@\S+>', message_id)
    assert (arrived['Message-ID'], arrived['Subject']) == (message_id, 'hello')
    assert (received.mail_from, received.rcpt_tos) == ('shop@site.example', ['ada@elsewhere.example'])


def test_a_message_id_of_the_application_is_kept(mailer, message):
    mail = message('hello')
    mail['Message-ID'] = '<order-1@site.example>'

    assert mailer.send(mail) == '<order-1@site.example>'


def test_sender_and_recipients_may_differ_from_the_header(mailer, smtp_server, message):
    mailer.send(message('to one'), sender='bounces@site.example', recipients='eve@elsewhere.example')
    mailer.send(message('to two'), recipients=['Eve <eve@elsewhere.example>', 'bob@elsewhere.example'])
    transaction.commit()

    assert sorted((received.mail_from, *received.rcpt_tos) for received in smtp_server.wait_for(2)) == [
        ('bounces@site.example', 'eve@elsewhere.example'),
        ('shop@site.example', 'eve@elsewhere.example', 'bob@elsewhere.example'),
    ]


def test_the_message_of_the_caller_is_not_changed(mailer, smtp_server, message):
    mail = message('secret copy')
    mail['Bcc'] = 'eve@elsewhere.example'
    before = mail.as_bytes()
    mailer.send(mail)
    mailer.enqueue(mail)
    mailer.send_immediately(mail)
    transaction.commit()

    assert mail.as_bytes() == before
    for received in smtp_server.wait_for(2):
        assert received.rcpt_tos == ['ada@elsewhere.example', 'eve@elsewhere.example']
        assert b'eve' not in received.content


def test_what_the_caller_does_to_the_message_afterwards_does_not_matter(mailer, smtp_server, message):
    mail = message('as it was')
    mailer.send(mail)
    mail.replace_header('Subject', 'changed')
    transaction.commit()

    assert subjects(smtp_server.wait_for(1)) == ['as it was']


def test_bytes_and_files_are_messages_too(mailer, smtp_server, message):
    mailer.send(message('bytes').as_bytes())
    mailer.send(io.BytesIO(message('a file').as_bytes()))
    transaction.commit()

    assert sorted(subjects(smtp_server.wait_for(2))) == ['a file', 'bytes']


def test_the_default_sender_is_for_messages_that_have_none(make_mailer, smtp_server, message):
    mailer = make_mailer(smtp_server, default_sender='noreply@site.example')
    mail = message('no From')
    del mail['From']
    mailer.send(mail)
    mailer.send(message('with From'))
    transaction.commit()

    assert sorted(received.mail_from for received in smtp_server.wait_for(2)) == [
        'noreply@site.example',
        'shop@site.example',
    ]


# --- who delivers -----------------------------------------------------------


def test_background_does_not_wait_for_the_server(make_mailer, make_event, message, until):
    answer = make_event()
    with ScriptedSMTPServer({'connect': Wait(answer)}) as server:
        mailer = make_mailer(server)
        mailer.send(message('hello'))
        transaction.commit()
        after_the_commit = waiting(mailer)
        answer.set()
        server.wait_for(lambda: len(server.messages) == 1)
        until(lambda: not waiting(mailer))

    assert sum(after_the_commit.values()) == 1


def test_inline_is_delivered_when_the_commit_returns(make_mailer, smtp_server, message):
    mailer = make_mailer(smtp_server, delivery='inline')
    mailer.send(message('hello'))
    transaction.commit()

    assert (subjects(smtp_server.received), waiting(mailer)) == (['hello'], {})


def test_queue_leaves_it_to_mq_run(make_mailer, smtp_server, message):
    mailer = make_mailer(smtp_server, delivery='queue')
    mailer.send(message('hello'))
    transaction.commit()

    assert (smtp_server.received, waiting(mailer)) == ([], {'waiting': 1})


@pytest.mark.parametrize('default', ['background', 'inline', 'queue'])
def test_each_message_may_choose_its_way(make_mailer, smtp_server, message, until, default):
    mailer = make_mailer(smtp_server, delivery=default)
    mailer.send(message('waits'), delivery='queue')
    mailer.send(message('inline'), delivery='inline')
    transaction.commit()
    arrived_at_once = subjects(smtp_server.received)
    mailer.send(message('background'), delivery='background')
    transaction.commit()

    assert arrived_at_once == ['inline']
    assert subjects(smtp_server.wait_for(2)) == ['inline', 'background']
    until(lambda: waiting(mailer) == {'waiting': 1})


@pytest.mark.parametrize('delivery', ['later', '', 'Queue', True])
def test_an_unknown_way_is_an_error_that_names_the_known_ones(mailer, message, delivery):
    with pytest.raises(ValueError, match='background, inline, queue'):
        mailer.send(message('hello'), delivery=delivery)
    transaction.commit()

    assert waiting(mailer) == {}


# --- what cannot be sent ----------------------------------------------------

IMPOSSIBLE = {
    'an address with a line break': ({'recipients': 'a@b.example>\r\nDATA'}, AddressError),
    'an address without a domain': ({'recipients': ['ada']}, AddressError),
    'a sender that is none': ({'sender': 'no address'}, AddressError),
    'nobody': ({'recipients': []}, NoRecipients),
}


@pytest.mark.parametrize('method', ['send', 'send_immediately', 'enqueue'])
@pytest.mark.parametrize(('arguments', 'error'), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_can_never_be_sent_is_an_error_where_it_is_handed_in(
    mailer, smtp_server, message, method, arguments, error
):
    with pytest.raises(error) as caught:
        getattr(mailer, method)(message('impossible'), **arguments)
    transaction.commit()

    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MessageError)
    assert (smtp_server.received, waiting(mailer)) == ([], {})


@pytest.mark.parametrize('method', ['send', 'send_immediately', 'enqueue'])
def test_a_message_that_is_too_large_is_an_error_that_names_the_setting(make_mailer, smtp_server, message, method):
    mailer = make_mailer(smtp_server, max_message_size='1K')
    mail = message('large')
    mail.set_content('x' * 70 + '\n' * 1024)

    with pytest.raises(MessageTooLarge, match=r'mailqueue\.max_message_size'):
        getattr(mailer, method)(mail)
    transaction.commit()

    assert (smtp_server.received, waiting(mailer)) == ([], {})


def test_a_refused_message_does_not_harm_the_others_of_its_transaction(mailer, smtp_server, message):
    mailer.send(message('good'))
    with pytest.raises(NoRecipients):
        mailer.send(message('bad'), recipients=[])
    transaction.commit()

    assert subjects(smtp_server.wait_for(1)) == ['good']


# --- outside of a transaction -----------------------------------------------


def test_send_immediately_tells_that_the_message_is_sent(mailer, smtp_server, message):
    result = mailer.send_immediately(message('now'))
    transaction.abort()

    assert (result.accepted, result.queued, bool(result)) == (('ada@elsewhere.example',), False, True)
    assert (subjects(smtp_server.received), waiting(mailer)) == (['now'], {})


def test_send_immediately_queues_what_the_server_defers(make_mailer, message):
    with ScriptedSMTPServer({'RCPT': '451 4.3.0 try again later'}) as server:
        mailer = make_mailer(server)
        result = mailer.send_immediately(message('later'))

    assert (result.deferred, result.queued, bool(result)) == (('ada@elsewhere.example',), True, True)
    assert waiting(mailer) == {'waiting': 1}


def test_send_immediately_is_false_if_one_of_two_is_refused_and_tells_who(make_mailer, message):
    with ScriptedSMTPServer({'RCPT TO:<eve@elsewhere.example>': '550 5.1.1 no such user'}) as server:
        mailer = make_mailer(server)
        result = mailer.send_immediately(
            message('to both'), recipients=['ada@elsewhere.example', 'eve@elsewhere.example']
        )

    assert (bool(result), result.queued) == (False, False)
    assert (result.accepted, result.failed) == (('ada@elsewhere.example',), ('eve@elsewhere.example',))
    assert waiting(mailer) == {'dead': 1}


def test_send_immediately_buries_what_the_server_refuses(make_mailer, message):
    with ScriptedSMTPServer({'RCPT': '550 5.1.1 no such user'}) as server:
        mailer = make_mailer(server)
        result = mailer.send_immediately(message('never'))

    assert (result.refused, result.queued, bool(result)) == (('ada@elsewhere.example',), False, False)
    assert waiting(mailer) == {'dead': 1}


def test_send_immediately_queues_while_the_server_is_down(mailer, smtp_server, message):
    smtp_server.stop()

    results = [mailer.send_immediately(message(subject)) for subject in ('one', 'two')]

    assert [(result.queued, bool(result)) for result in results] == [(True, True)] * 2
    assert all(str(smtp_server.port) in str(result.trouble) for result in results)
    assert waiting(mailer) == {'waiting': 2}


def test_send_immediately_has_the_message_in_the_queue_before_the_attempt(make_mailer, message):
    seen = []

    def look(command):
        seen.append(waiting(mailer))

    with ScriptedSMTPServer({'MAIL': look}) as server:
        mailer = make_mailer(server)
        mailer.send_immediately(message('durable'))

    assert seen == [{'in progress': 1}]


class Flushed(MaildirQueue):
    """A queue that notes when it is told to make durable what was settled."""

    def __init__(self, settings):
        super().__init__(settings.queue_dir)
        self.flushed_with = []

    def flush(self):
        super().flush()
        self.flushed_with.append(self.counts()['in progress'])


def test_send_immediately_makes_its_outcome_durable(make_mailer, smtp_server, message):
    mailer = make_mailer(smtp_server, queue=f'{__name__}.Flushed')
    mailer.send_immediately(message('now'))

    assert mailer.queue.flushed_with == [0]


class Interrupted:
    """A transport during whose work somebody presses Ctrl-C."""

    def __init__(self, settings):
        pass

    def send(self, sender, recipients, content):
        raise KeyboardInterrupt


def test_a_message_whose_attempt_is_interrupted_waits(make_mailer, message):
    mailer = make_mailer(None, transports=f'{__name__}.Interrupted')

    with pytest.raises(KeyboardInterrupt):
        mailer.send_immediately(message('interrupted'))

    assert waiting(mailer) == {'waiting': 1}


def test_enqueue_makes_it_wait_whatever_the_transaction_does(mailer, smtp_server, message):
    message_id = mailer.enqueue(message('later'))
    transaction.abort()

    (claim,) = mailer.queue.claim_due(2**40)
    assert claim.envelope.message_id == message_id
    claim.release()
    assert (smtp_server.received, waiting(mailer)) == ([], {'waiting': 1})


@pytest.mark.parametrize('method', ['send_immediately', 'enqueue'])
def test_a_queue_that_cannot_take_it_is_an_error_that_names_the_directory(mailer, queue_dir, message, method):
    (queue_dir / 'tmp').rmdir()

    with pytest.raises(QueueError, match=str(queue_dir)):
        getattr(mailer, method)(message('no room'))

    assert waiting(mailer) == {}


# --- the transaction it joins -----------------------------------------------


def test_a_mailer_joins_the_manager_that_it_is_given(make_mailer, smtp_server, message):
    manager = transaction.TransactionManager(explicit=True)
    mailer = make_mailer(smtp_server, manager, delivery='inline')
    with manager:
        mailer.send(message('ours'))
        transaction.abort()

    assert subjects(smtp_server.received) == ['ours']


def test_an_explicit_manager_needs_a_begin(make_mailer, smtp_server, message):
    manager = transaction.TransactionManager(explicit=True)
    mailer = make_mailer(smtp_server, manager)

    with pytest.raises(NoActiveTransaction, match=r'send_immediately.*enqueue'):
        mailer.send(message('nobody commits this'))


def test_a_closed_mailer_leaves_mail_to_mq_run(mailer, smtp_server, message):
    mailer.send(message('late'))
    mailer.close()
    transaction.commit()

    assert (smtp_server.received, waiting(mailer)) == ([], {'waiting': 1})
