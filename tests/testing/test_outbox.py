"""``config.include('pyramid_mailqueue.testing')``, as the tests of an application use it: WebTest and pyramid_tm."""

from __future__ import annotations

import base64
import threading
from email.message import EmailMessage

import pytest
import transaction
from hypothesis import given
from hypothesis import strategies as st
from pyramid import testing
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationExecutionError
from pyramid.request import apply_request_extensions
from webtest import TestApp

from pyramid_mailqueue import ConfigurationError, IMailer, MessageError, NoActiveTransaction, NoRecipients, get_mailer
from pyramid_mailqueue.events import MailDelivered, MailEvent, MailQueued
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.testing import CapturedMail, captured_mail, mail_discarded, make_mailer
from pyramid_mailqueue.transactions import ManagerTransaction
from tests.parts.strategies import odd_contents

pytest_plugins = ['pytester']

TESTING = 'pyramid_mailqueue.testing'


@pytest.fixture(autouse=True)
def _no_transaction_of_this_thread():
    transaction.abort()
    yield
    transaction.abort()


def main(global_config, *, views=(), include=('pyramid_tm', 'pyramid_mailqueue'), **settings):
    """The factory of an application that knows nothing of tests: each view is the route of its name."""
    with Configurator(settings=settings) as config:
        for name in include:
            config.include(name)
        for view in views:
            config.add_route(view.__name__, f'/{view.__name__}')
            config.add_view(view, route_name=view.__name__, renderer='string')
        return config.make_wsgi_app()


@pytest.fixture
def make_app():
    """Make the application as its tests do: with a setting that is for tests."""

    def make_app(*views, **settings):
        return TestApp(main({}, views=views, **{'pyramid.includes': TESTING, 'mailqueue.plugins': 'none'} | settings))

    return make_app


def new_message(subject='Hello', to='ada@x.example', text='Hello, Ada.\n'):
    message = EmailMessage()
    message['From'] = 'Shop <shop@site.example>'
    message['To'] = to
    message['Subject'] = subject
    message.set_content(text)
    return message


def greet(request):
    return request.mailer.send(new_message(request.params.get('subject', 'Hello')))


def fail_after(request):
    request.mailer.send(new_message('dropped'))
    request.tm.doom()


def subjects(mails):
    return [mail.subject for mail in mails]


# --- what was sent ----------------------------------------------------------


def test_mail_that_was_committed_is_in_the_outbox(make_app):
    app = make_app(greet)
    response = app.get('/greet')

    (mail,) = captured_mail(app)
    assert (mail.sender, mail.recipients) == ('shop@site.example', ('ada@x.example',))
    assert (mail.subject, mail.text, mail.html) == ('Hello', 'Hello, Ada.\n', '')
    assert mail.message_id == response.text
    assert mail.message['From'].addresses[0].display_name == 'Shop'
    assert repr(mail) == "<CapturedMail 'Hello' to ada@x.example>"


@given(odd_contents())
def test_whatever_was_sent_can_be_looked_at(content):
    mail = CapturedMail(Envelope('', ('ada@x.example',), content))

    for text in (mail.subject, mail.text, mail.html, mail.message_id, repr(mail)):
        assert text.encode() is not None
    for value in mail.message.values():
        assert isinstance(value, str)
    assert isinstance(mail.message.get_content_type(), str)
    assert list(mail.message.iter_attachments()) is not None


def test_a_field_that_the_library_cannot_read_takes_no_other_with_it():
    content = b'From: <"\r\nTo: ada@x.example\r\nSubject: Hello\r\n\r\n'
    message = CapturedMail(Envelope('', ('ada@x.example',), content)).message

    # From Python 3.15 on it can be read.
    assert message['From'] in ('', '<>')
    assert message['To'].addresses[0].addr_spec == 'ada@x.example'
    assert message['Subject'] == 'Hello'


@given(st.text(st.characters(codec='utf-8', categories=['L', 'N', 'P', 'S', 'Zs']), max_size=60).map(str.strip))
def test_a_subject_is_what_the_application_has_set(subject):
    message = new_message(subject)

    assert CapturedMail(Envelope.from_message(message)).subject == message['Subject']


@pytest.mark.parametrize('cte', ['8bit', 'base64', 'quoted-printable'])
def test_a_text_is_what_the_application_has_set(cte):
    message = new_message()
    message.set_content('Grüße\n\naus Köln\n', cte=cte)

    assert CapturedMail(Envelope.from_message(message)).text == 'Grüße\n\naus Köln\n'


def test_the_line_ends_in_base64_are_those_of_python():
    content = b'Content-Transfer-Encoding: base64\r\n\r\n' + base64.encodebytes(b'a\r\nb\r\n')

    assert CapturedMail(Envelope('', ('ada@x.example',), content)).text == 'a\nb\n'


def test_the_outbox_has_what_would_have_gone_out(make_app):
    def order(request):
        message = new_message('Bestellung für Jürgen', to='"Jürgen" <j@x.example>')
        message['Bcc'] = 'archive@site.example'
        message.add_alternative('<p>Hello</p>', subtype='html')
        message.add_attachment(b'%PDF', maintype='application', subtype='pdf', filename='order.pdf')
        request.mailer.send(message, sender='bounces@site.example')

    app = make_app(order)
    app.get('/order')

    (mail,) = captured_mail(app)
    assert mail.envelope.sender == 'bounces@site.example'
    assert mail.recipients == ('j@x.example', 'archive@site.example')
    assert mail.message['Bcc'] is None
    assert mail.subject == 'Bestellung für Jürgen'
    assert mail.html == '<p>Hello</p>\n'
    assert [(part.get_filename(), part.get_content()) for part in mail.message.iter_attachments()] == [
        ('order.pdf', b'%PDF')
    ]


def test_a_message_without_a_subject_and_a_body_is_none_the_less_there():
    mail = CapturedMail(Envelope('', ('a@x.example',), b'Content-Type: application/pdf\r\n\r\n%PDF'))

    assert (mail.subject, mail.text, mail.html) == ('', '', '')


def test_mail_is_in_the_order_in_which_it_was_committed(make_app):
    def several(request):
        request.mailer.send(new_message('first'), delivery='queue')
        request.mailer.enqueue(new_message('outside'))
        request.mailer.send(new_message('second'), delivery='background')
        request.mailer.send(new_message('third'), delivery='inline')
        assert request.mailer.send_immediately(new_message('at once')).accepted == ('ada@x.example',)

    app = make_app(several)
    app.get('/several')

    assert subjects(captured_mail(app)) == ['outside', 'at once', 'first', 'second', 'third']


@pytest.mark.parametrize('delivery', ['background', 'inline'])
def test_mail_is_delivered_before_the_request_returns_and_subscribers_hear_of_it(make_app, delivery):
    seen = []

    def remember(event):
        seen.append((type(event), event.message_id, threading.current_thread()))

    app = make_app(greet, **{'mailqueue.delivery': delivery})
    app.app.registry.registerHandler(remember, [MailEvent])
    response = app.get('/greet')

    assert seen == [(kind, response.text, threading.current_thread()) for kind in (MailQueued, MailDelivered)]
    assert not any(app.app.registry.getUtility(IMailer).queue.counts().values())


def test_what_is_left_to_mq_run_waits_and_is_in_the_outbox(make_app):
    app = make_app(greet, **{'mailqueue.delivery': 'queue'})
    app.get('/greet')

    assert len(captured_mail(app)) == 1
    assert app.app.registry.getUtility(IMailer).queue.counts()['waiting'] == 1


def test_every_request_has_the_same_outbox(make_app):
    seen = []

    def look(request):
        seen.append(request.mailer.outbox)

    app = make_app(greet, look)
    app.get('/greet')
    app.get('/look')
    app.get('/greet')

    assert seen == [captured_mail(app)]
    assert seen[0] is captured_mail(app)
    assert len(seen[0]) == 2


# --- what was not sent ------------------------------------------------------


def test_mail_of_a_transaction_that_fails_is_discarded(make_app):
    def fail(request):
        request.mailer.send(new_message('dropped too'))
        raise RuntimeError

    app = make_app(fail_after, fail)
    app.get('/fail_after')
    with pytest.raises(RuntimeError):
        app.get('/fail')

    outbox = captured_mail(app)
    assert outbox == []
    assert subjects(outbox.discarded) == ['dropped', 'dropped too']
    assert mail_discarded(app) == outbox.discarded == get_mailer(app.app).mail_discarded


def test_mail_of_a_savepoint_that_is_rolled_back_is_discarded(make_app):
    def half(request):
        request.mailer.send(new_message('kept'))
        savepoint = request.tm.savepoint()
        request.mailer.send(new_message('dropped'))
        assert subjects(request.mailer.outbox.pending) == ['kept', 'dropped']
        savepoint.rollback()
        assert subjects(request.mailer.outbox.pending) == ['kept']

    app = make_app(half)
    app.get('/half')

    outbox = captured_mail(app)
    assert (subjects(outbox), subjects(outbox.discarded), outbox.pending) == (['kept'], ['dropped'], [])


def test_mail_is_pending_in_a_transaction_of_the_test_that_never_commits(make_app):
    """As in the tests of Pyramid's cookiecutter: the test begins, dooms and aborts the transaction."""
    tm = transaction.TransactionManager(explicit=True)
    tm.begin()
    tm.doom()
    app = make_app(greet)
    app.extra_environ |= {'tm.active': True, 'tm.manager': tm}

    app.get('/greet?subject=one')
    app.get('/greet?subject=two')

    outbox = captured_mail(app)
    assert (list(outbox), subjects(outbox.pending), outbox.discarded) == ([], ['one', 'two'], [])
    tm.abort()
    assert (list(outbox), outbox.pending, subjects(outbox.discarded)) == ([], [], ['one', 'two'])


def test_mail_that_is_left_in_doubt_was_neither_sent_nor_discarded():
    mailer = make_mailer()
    staging = mailer.queue.staging()
    staging.add(Envelope('', ('a@x.example',), b'Subject: Hello\r\n\r\n'), claimed=False)
    staging.prepare()
    staging.leave_in_doubt()
    staging.discard()

    assert (list(mailer.outbox), mailer.outbox.pending, mailer.outbox.discarded) == ([], [], [])
    assert mailer.queue.counts()['in doubt'] == 1


# --- what the real one refuses, this one does -------------------------------


def test_what_can_never_be_sent_is_refused(make_app):
    refused = []

    def try_it(request):
        nobody = EmailMessage()
        nobody['From'] = 'shop@site.example'
        large = new_message(text='x' * 2000)
        for message, options in (
            (nobody, {}),
            (new_message(), {'recipients': 'ada@x.example\r\nRCPT TO:<eve@x.example>'}),
            (large, {}),
            ('Subject: text\r\n\r\n', {}),
        ):
            with pytest.raises(MessageError) as caught:
                request.mailer.send(message, **options)
            refused.append(type(caught.value))
        with pytest.raises(ValueError, match='delivery must be one of'):
            request.mailer.send(new_message(), delivery='pigeon')

    app = make_app(try_it, **{'mailqueue.max_message_size': '1K'})
    app.get('/try_it')

    assert refused[0] is NoRecipients
    assert (len(refused), list(captured_mail(app)), captured_mail(app).discarded) == (4, [], [])


def test_mail_that_nobody_would_commit_is_refused():
    app = TestApp(main({}, views=[greet], include=['pyramid_mailqueue'], **{'pyramid.includes': TESTING}))

    with pytest.raises(NoActiveTransaction):
        app.get('/greet')

    assert captured_mail(app) == []


def test_mail_of_an_exception_view_is_refused(make_app):
    def explode(request):
        raise RuntimeError

    def apologize(request):
        with pytest.raises(NoActiveTransaction):
            request.mailer.send(new_message())
        request.mailer.send_immediately(new_message('Sorry'))
        return request.response

    with Configurator(settings={'pyramid.includes': TESTING}) as config:
        config.include('pyramid_tm')
        config.add_route('explode', '/explode')
        config.add_view(explode, route_name='explode')
        config.add_exception_view(apologize, context=RuntimeError)
        app = TestApp(config.make_wsgi_app())
    app.get('/explode')

    assert subjects(captured_mail(app)) == ['Sorry']


BAD = {
    'an unknown key': ({'mailqueue.smtp_hots': 'localhost'}, 'mailqueue.smtp_hots'),
    'a bad value': ({'mailqueue.lifetime': 'for ever'}, 'mailqueue.lifetime'),
    'a relative path': ({'mailqueue.queue_dir': 'mailqueue'}, 'mailqueue.queue_dir'),
    'a contradiction': ({'mailqueue.smtp_username': 'me'}, 'mailqueue.smtp_password'),
}


@pytest.mark.parametrize(('bad', 'key'), BAD.values(), ids=BAD)
def test_a_setting_that_cannot_be_used_is_told(make_app, bad, key):
    with pytest.raises(ConfigurationExecutionError) as caught:
        make_app(**bad)

    assert isinstance(caught.value.evalue, ConfigurationError)
    assert key in str(caught.value.evalue)


def test_the_settings_of_production_may_stay(make_app, tmp_path):
    app = make_app(
        greet,
        **{
            'mailqueue.queue_dir': str(tmp_path / 'queue'),
            'mailqueue.smtp_hostname': 'mail.site.example',
            'mailqueue.smtp_port': '587',
            'mailqueue.smtp_username': 'me',
            'mailqueue.smtp_password': 'secret',
            'mailqueue.transports': 'smtp shop.transports:Backup',
            'mailqueue.rate_limit': '1/day',
            'mailqueue.delivery': '',
            'mailqueue.smtp_local_hostname': ' ',
        },
    )
    app.get('/greet')
    app.get('/greet')

    assert len(captured_mail(app)) == 2
    assert not (tmp_path / 'queue').exists()


# --- how it is included -----------------------------------------------------


@pytest.mark.parametrize(
    'include',
    [
        (TESTING,),
        (TESTING, 'pyramid_mailqueue'),
        ('pyramid_mailqueue', TESTING),
        (TESTING, TESTING),
    ],
)
def test_it_may_be_included_before_after_or_instead_of_the_real_one(include):
    app = TestApp(main({}, views=[greet], include=('pyramid_tm', *include)))
    app.get('/greet')

    assert len(captured_mail(app)) == 1


def test_a_view_can_be_tested_without_an_application():
    with testing.testConfig(settings={}) as config:
        config.include(TESTING)
        tm = transaction.TransactionManager(explicit=True)
        request = testing.DummyRequest(tm=tm, environ={'tm.active': True, 'tm.manager': tm})
        apply_request_extensions(request)
        with tm:
            greet(request)

        assert subjects(captured_mail()) == ['Hello']
        assert captured_mail(config) is captured_mail(request) is get_mailer(request).outbox


def test_without_pyramid_a_mailer_can_be_made_for_tests():
    manager = transaction.TransactionManager(explicit=True)
    mailer = make_mailer({'mailqueue.default_sender': 'shop@site.example'}, ManagerTransaction(manager))
    message = EmailMessage()
    message['To'] = 'ada@x.example'
    with manager:
        mailer.send(message)
    with pytest.raises(NoActiveTransaction):
        mailer.send(message)

    assert [mail.sender for mail in mailer.outbox] == ['shop@site.example']


def test_a_mailer_for_tests_joins_the_transaction_of_the_thread():
    mailer = make_mailer()
    mailer.send(new_message('dropped'))
    transaction.abort()
    with transaction.manager:
        mailer.send(new_message('sent'))

    assert (subjects(mailer.outbox), subjects(mailer.outbox.discarded)) == (['sent'], ['dropped'])


def test_middleware_around_an_application_is_seen_through(make_app):
    class Middleware:
        def __init__(self, app):
            self.app = app

        def __call__(self, environ, start_response):
            return self.app(environ, start_response)

    app = make_app(greet)
    wrapped = TestApp(Middleware(app.app))
    wrapped.get('/greet')

    assert captured_mail(wrapped) is captured_mail(app)
    assert len(captured_mail(wrapped)) == 1


def test_a_mailer_of_the_applications_own_that_wraps_ours_has_its_mail_captured(make_app):
    class Wrapping:
        def __init__(self, wrapped):
            self.wrapped = wrapped

        def send(self, message):
            message.replace_header('Subject', 'wrapped')
            return self.wrapped.send(message)

    def order(request):
        registry = request.registry
        registry.registerUtility(Wrapping(registry.getUtility(IMailer)), IMailer)
        return get_mailer(request).send(new_message())

    app = make_app(order)
    app.get('/order')

    assert subjects(captured_mail(app)) == ['wrapped']


def test_who_has_a_real_mailer_is_told_what_to_do(make_settings, smtp_server):
    app = TestApp(main({}, views=[greet], **make_settings(smtp_server)))

    with pytest.raises(ConfigurationError, match=r'pyramid\.includes = pyramid_mailqueue\.testing'):
        captured_mail(app)


# --- from test to test ------------------------------------------------------


def test_an_outbox_that_is_cleared_has_forgotten_everything(make_app):
    app = make_app(greet, fail_after)
    app.get('/greet')
    app.get('/fail_after')
    outbox = captured_mail(app)
    mailer = make_mailer()
    mailer.send(new_message())
    outbox.clear()
    mailer.outbox.clear()

    assert (list(outbox), outbox.discarded, mailer.outbox.pending) == ([], [], [])
    app.get('/greet?subject=next')
    assert subjects(captured_mail(app)) == ['next']


CONFTEST = """
    import pytest
    from webtest import TestApp
    from pyramid.config import Configurator
    from pyramid_mailqueue.testing.fixtures import captured_mail

    def send(request):
        request.mailer.send(b'From: shop@site.example\\r\\nTo: ada@x.example\\r\\n\\r\\n')
        return request.response

    @pytest.fixture(scope={scope!r})
    def app():
        with Configurator(settings={{'mailqueue.plugins': 'none'}}) as config:
            config.include('pyramid_tm')
            config.include('pyramid_mailqueue.testing')
            config.add_route('send', '/')
            config.add_view(send, route_name='send')
            return TestApp(config.make_wsgi_app())
"""
TESTS = """
    def test_one(captured_mail, app):
        app.get('/')
        app.get('/')
        assert len(captured_mail()) == 2

    def test_without_the_fixture(app):
        app.get('/')

    def test_two(captured_mail, app):
        assert captured_mail() == captured_mail().discarded == []
        app.get('/')
        (mail,) = captured_mail()
        assert captured_mail(app) is captured_mail()

    def test_three(app, captured_mail):
        assert captured_mail() == []
        assert app.get('/').status_code == len(captured_mail()) * 200
"""


@pytest.mark.parametrize('scope', ['session', 'function'])
def test_with_the_fixture_each_test_begins_with_an_empty_outbox(pytester, scope):
    pytester.makeconftest(CONFTEST.format(scope=scope))
    pytester.makepyfile(TESTS)

    result = pytester.runpytest_subprocess('-p', 'no:cacheprovider', '-W', 'ignore')

    result.assert_outcomes(passed=4)
