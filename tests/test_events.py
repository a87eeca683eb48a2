"""What an application hears of its mail, with ``config.add_subscriber``."""

from __future__ import annotations

import threading

import pytest
import transaction
from pyramid.registry import Registry

from pyramid_mailqueue import (
    IMailer,
    ITransport,
    MailBuried,
    MailDeferred,
    MailDelivered,
    MailEvent,
    MailQueued,
    MessageHandler,
    SendResult,
    ServerTrouble,
)
from pyramid_mailqueue.events import notify
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import Reply
from pyramid_mailqueue.transports.base import as_transport
from pyramid_mailqueue.transports.maildir import MaildirBackend

ADA, BOB, EVE = 'ada@elsewhere.example', 'bob@elsewhere.example', 'eve@elsewhere.example'
# The simplest answers.
YES, NO = True, False


@pytest.fixture(autouse=True)
def _no_transaction_of_this_thread():
    transaction.abort()
    yield
    transaction.abort()


class Says:
    """A transport that gives one answer; ``asked`` counts how often."""

    name = 'says'

    def __init__(self, answer):
        self.answer = answer
        self.asked = 0

    def send(self, sender, recipients, content):
        self.asked += 1
        return self.answer


@pytest.fixture
def listening_app(make_app, make_settings):
    """
    Make an app whose events are in ``heard``: ``listening_app(view, answer)``.

    *subscribers* are there before the one that keeps the events.
    """

    def listening_app(view, answer=YES, *, subscribers=(), delivery='inline', **own):
        heard = []

        def configure(config):
            config.registry.registerUtility(Says(answer), ITransport, 'says')
            for subscriber in subscribers:
                config.add_subscriber(subscriber, MailEvent)
            config.add_subscriber(heard.append, MailEvent)

        app = make_app(view, make_settings(transports='says', delivery=delivery, **own), configure=configure)
        app.heard = heard
        return app

    return listening_app


def told(heard):
    return [(type(event).__name__, event.recipients) for event in heard]


@pytest.mark.parametrize('delivery', ['background', 'inline'])
def test_mail_is_queued_and_delivered(listening_app, message, until, delivery):
    app = listening_app(lambda request: request.mailer.send(message('hello')), delivery=delivery)

    response = app.get('/')

    until(lambda: len(app.heard) == 2)
    queued, delivered = app.heard
    assert told(app.heard) == [('MailQueued', (ADA,)), ('MailDelivered', (ADA,))]
    assert queued.message_id == delivered.message_id == response.text
    assert queued.id == delivered.id
    assert delivered.via == 'says'
    assert delivered.envelope.recipients == (ADA,)


def test_mail_for_mq_run_is_only_queued_and_its_name_is_not_told(listening_app, message):
    app = listening_app(lambda request: request.mailer.send(message('hello')), delivery='queue')

    response = app.get('/')

    (queued,) = app.heard
    assert (type(queued), queued.id, queued.message_id) == (MailQueued, '', response.text)


def test_mail_that_is_deferred_says_when_it_is_tried_again(listening_app, message):
    answer = SendResult({ADA: Reply(451, 'later', '4.3.0')})
    app = listening_app(lambda request: request.mailer.send(message('hello')), answer)

    app.get('/')

    _, deferred = app.heard
    assert isinstance(deferred, MailDeferred)
    assert (deferred.reason, deferred.attempts) == ('451 4.3.0 later', 1)
    queue = app.app.registry.getUtility(IMailer).queue
    assert deferred.due == pytest.approx(queue.admin.find(deferred.id).due, abs=1e-3)


def test_mail_that_is_given_up_says_why(listening_app, message):
    app = listening_app(
        lambda request: request.mailer.send(message('hello')), SendResult({ADA: Reply(550, 'no such user', '5.1.1')})
    )

    app.get('/')

    _, buried = app.heard
    assert isinstance(buried, MailBuried)
    assert buried.reason == '550 5.1.1 no such user'


def test_each_recipient_is_in_the_event_of_what_became_of_it(listening_app, message):
    def view(request):
        return request.mailer.send(message('hello'), recipients=[ADA, BOB, EVE])

    replies = {ADA: Reply(250), BOB: Reply(451), EVE: Reply(550)}
    app = listening_app(view, SendResult(replies))

    app.get('/')

    assert told(app.heard) == [
        ('MailQueued', (ADA, BOB, EVE)),
        ('MailDelivered', (ADA,)),
        ('MailDeferred', (BOB,)),
        ('MailBuried', (EVE,)),
    ]


def test_mail_of_an_aborted_transaction_is_not_told(listening_app, message):
    def view(request):
        request.mailer.send(message('hello'))
        request.tm.doom()

    app = listening_app(view)
    app.get('/')

    assert app.heard == []


def test_mail_of_a_savepoint_that_was_rolled_back_is_not_told(listening_app, message):
    def view(request):
        kept = request.mailer.send(message('kept'))
        savepoint = request.tm.savepoint()
        request.mailer.send(message('dropped'))
        savepoint.rollback()
        return kept

    app = listening_app(view, delivery='queue')
    response = app.get('/')

    assert [event.message_id for event in app.heard] == [response.text]


def test_mail_outside_of_a_transaction_is_told(listening_app, message):
    def view(request):
        request.mailer.enqueue(message('later'))
        request.mailer.send_immediately(message('now'))

    app = listening_app(view)
    app.get('/')

    assert told(app.heard) == [('MailQueued', (ADA,)), ('MailQueued', (ADA,)), ('MailDelivered', (ADA,))]
    enqueued, _, delivered = app.heard
    assert app.app.registry.getUtility(IMailer).queue.admin.find(enqueued.id).state == 'waiting'
    assert delivered.id != enqueued.id


def test_a_server_in_trouble_is_no_event(listening_app, message):
    class Down:
        def send(self, sender, recipients, content):
            raise ServerTrouble('down')

    app = listening_app(lambda request: request.mailer.send(message('hello')))
    app.app.registry.getUtility(IMailer).handler.routes[0].transport = as_transport(Down())
    app.get('/')

    assert told(app.heard) == [('MailQueued', (ADA,))]


def test_one_may_subscribe_to_one_kind_alone(make_app, make_settings, recorder, message):
    heard = []

    def configure(config):
        config.registry.registerUtility(recorder, ITransport, 'recorder')
        config.add_subscriber(heard.append, MailDelivered)

    settings = make_settings(transports='recorder', delivery='inline')
    make_app(lambda request: request.mailer.send(message('hello')), settings, configure=configure).get('/')

    assert told(heard) == [('MailDelivered', (ADA,))]


def test_events_stay_in_their_application(listening_app, message, tmp_path):
    apps = [
        listening_app(lambda request: request.mailer.send(message('hello')), queue_dir=str(tmp_path / name))
        for name in ('one', 'two')
    ]

    apps[0].get('/')

    assert (len(apps[0].heard), len(apps[1].heard)) == (2, 0)


# --- subscribers with a defect ----------------------------------------------


def bad_subscriber(event):
    raise RuntimeError('a defect of the application')


def bad_exit(event):
    raise SystemExit('no reason to end the process')


def test_a_subscriber_that_raises_is_logged_by_its_name_and_changes_nothing(listening_app, message, caplog):
    app = listening_app(
        lambda request: request.mailer.send(message('hello')), subscribers=[bad_subscriber, bad_exit], delivery='inline'
    )

    app.get('/', status=200)

    assert told(app.heard) == [('MailQueued', (ADA,)), ('MailDelivered', (ADA,))]
    assert [record.getMessage() for record in caplog.records if record.name == 'mailqueue.plugins'] == [
        f'A subscriber of {kind} failed: {__name__}.{name}'
        for kind in ('MailQueued', 'MailDelivered')
        for name in ('bad_subscriber', 'bad_exit')
    ]
    assert 'a defect of the application' in caplog.text
    handler = app.app.registry.getUtility(IMailer).handler
    assert handler.routes[0].transport.sender.asked == 1


def test_the_delivery_thread_outlives_a_subscriber_that_raises(listening_app, message, until):
    threads = set()

    def note_thread(event):
        threads.add(threading.current_thread())
        raise RuntimeError('a defect of the application')

    app = listening_app(
        lambda request: request.mailer.send(message('hello')), subscribers=[note_thread], delivery='background'
    )
    for _ in range(2):
        app.get('/')

    until(lambda: told(app.heard).count(('MailDelivered', (ADA,))) == 2)
    assert len(threads) == 2, 'the one of the requests and the one that delivers'


def test_an_object_without_a_name_is_shown_as_it_is(caplog):
    class Subscriber:
        def __call__(self, event):
            raise RuntimeError('a defect of the application')

        def __repr__(self):
            return '<the third subscriber>'

    registry = Registry('test')
    registry.registerHandler(Subscriber(), [MailQueued])

    notify(registry, MailQueued(id='', envelope=Envelope('', (ADA,), b''), recipients=(ADA,)))

    assert caplog.messages == ['A subscriber of MailQueued failed: <the third subscriber>']


# --- with a handler of one's own --------------------------------------------


def test_what_another_queue_has_taken_is_told_as_queued(tmp_path):
    heard = []
    handler = MessageHandler([Says(NO), MaildirBackend(tmp_path / 'queue')], notify=heard.append)

    handler.send_message(b'Subject: hello\r\n\r\n', sender='shop@site.example', recipients=[ADA, BOB])

    assert told(heard) == [('MailQueued', (ADA, BOB))]


def test_what_nobody_keeps_is_no_event():
    heard = []

    handler = MessageHandler([Says(NO)], notify=heard.append)

    handler.send_message(b'Subject: hello\r\n\r\n', sender='shop@site.example', recipient=ADA)

    assert heard == []
