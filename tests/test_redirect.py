"""``mailqueue.redirect_all_to``: the header of a message, and all ways on which it could leave."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from email import message_from_bytes
from email.header import decode_header, make_header

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramid_mailqueue import IMailer, ITransport, init_smtp_mailer
from pyramid_mailqueue.application import build_mailer
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.exceptions import AddressError
from pyramid_mailqueue.message.addresses import check_address
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.message.redirect import MOST_IN_A_FIELD, original_recipients, redirected
from pyramid_mailqueue.queue_runner import one_shot_queue_run
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.transports.redirect import redirecting
from pyramid_mailqueue.wiring import build_runner

ME = 'me@site.example'
CONTENT = b'Message-ID: <1@site.example>\r\nTo: ada@x.example\r\nSubject: hello\r\n\r\nHello\r\n'


def original(content):
    """Those whom a message would have gone to, decoded."""
    values = message_from_bytes(content).get_all('X-Original-Recipients', [])
    decoded = [str(make_header(decode_header(value.replace('\r\n', '')))) for value in values]
    return [name.strip() for value in decoded for name in value.split(',')]


# --- the envelope and its header --------------------------------------------


def test_everybody_is_replaced_by_the_one_and_named_in_the_header():
    envelope = redirected(Envelope('shop@site.example', ('ada@x.example', 'bob@x.example'), CONTENT), ME)

    assert (envelope.sender, envelope.recipients) == ('shop@site.example', (ME,))
    assert envelope.content == b'X-Original-Recipients: ada@x.example,\r\n bob@x.example\r\n' + CONTENT


def test_what_goes_there_already_is_left_alone():
    envelope = Envelope('', (ME,), CONTENT)

    assert redirected(envelope, ME) is envelope
    assert redirected(redirected(Envelope('', ('ada@x.example', ME), CONTENT), ME), ME).content.count(b'X-Orig') == 1


def test_a_message_without_a_header_is_still_one():
    envelope = redirected(Envelope('', ('ada@x.example',), b'\r\nHello\r\n'), ME)

    assert envelope.content == b'X-Original-Recipients: ada@x.example\r\n\r\nHello\r\n'


def test_addresses_that_are_not_ascii_are_encoded():
    recipients = ('jürgen@x.example', 'ada@x.example', '"a b"@x.example', '=?utf-8?q?x?=@x.example')

    field = original_recipients(recipients)

    assert field.isascii()
    assert b' ada@x.example,\r\n "a b"@x.example,\r\n' in field
    assert original(field + b'\r\n') == list(recipients)


def test_many_recipients_are_named_in_several_fields():
    recipients = [f'{number}@x.example' for number in range(2 * MOST_IN_A_FIELD + 1)]

    fields = original_recipients(recipients)

    assert fields.count(b'X-Original-Recipients: ') == 3
    assert original(fields + b'\r\n') == recipients


@st.composite
def addresses(draw):
    """Whatever may stand in an envelope."""
    local = draw(st.text(st.characters(codec='utf-8'), min_size=1, max_size=70))
    if draw(st.booleans()):
        local = '"' + re.sub(r'(["\\])', r'\\\1', local) + '"'
    try:
        return check_address(f'{local}@x.example')
    except AddressError:
        return 'ada@x.example'


@given(st.lists(addresses(), min_size=1, max_size=5))
def test_nothing_breaks_out_of_the_field(recipients):
    fields = original_recipients(recipients)

    assert fields.isascii()
    assert all(len(line) < 900 for line in fields.split(b'\r\n'))
    message = message_from_bytes(fields + b'\r\nbody')
    assert message.keys() == ['X-Original-Recipients']
    assert message.get_payload() == 'body'
    assert re.fullmatch(rb'X-Original-Recipients: [ -~]+(\r\n [ -~]+)*\r\n', fields)
    if not any(re.search(r'[,\s]', recipient) for recipient in recipients):
        assert original(fields + b'\r\n') == list(recipients)


# --- applications, and what delivers for them -------------------------------


@pytest.fixture
def told(caplog):
    """The warnings of the delivery so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


ANNOUNCED = f'mailqueue.redirect_all_to = {ME}: all mail goes there instead of to its recipients.'


def test_a_new_message_is_in_the_queue_for_the_one_only(make_app, make_settings, smtp_server, message, queue_dir, told):
    def view(request):
        mail = message('hello')
        mail['Bcc'] = 'secret@x.example'
        request.mailer.send(mail, delivery='queue')

    app = make_app(view, make_settings(smtp_server, redirect_all_to=ME))
    app.get('/')

    (path,) = (queue_dir / 'new').iterdir()
    header, _, content = path.read_bytes().partition(b'X-Queue-Meta-End: end\r\n')
    assert f'Envelope-to: {ME}\r\n'.encode() in header
    assert b'elsewhere.example' not in header
    assert original(content) == ['ada@elsewhere.example', 'secret@x.example']
    assert told() == [ANNOUNCED]


@pytest.mark.parametrize('delivery', ['background', 'inline'])
def test_a_message_that_is_tried_at_once_goes_to_the_one(make_app, make_settings, smtp_server, message, delivery):
    app = make_app(
        lambda request: request.mailer.send(message('hello')),
        make_settings(smtp_server, redirect_all_to=ME, delivery=delivery),
    )
    app.get('/')

    (received,) = smtp_server.wait_for(1)
    assert received.rcpt_tos == [ME]
    assert original(received.content) == ['ada@elsewhere.example']


def test_what_was_in_the_queue_before_goes_to_the_one(make_settings, smtp_server, queue_dir, told, caplog):
    caplog.set_level(logging.INFO, 'mailqueue.delivery_log')
    queue = MaildirQueue(queue_dir)
    for number in range(3):
        queue.put(Envelope('', (f'a{number}@x.example', f'b{number}@x.example'), CONTENT))

    report = build_runner(Settings.from_mapping(make_settings(smtp_server, redirect_all_to=ME))).run()

    assert (report.sent, not any(queue.counts().values())) == (3, True)
    assert [received.rcpt_tos for received in smtp_server.received] == [[ME]] * 3
    assert sorted(original(received.content) for received in smtp_server.received) == [
        [f'a{number}@x.example', f'b{number}@x.example'] for number in range(3)
    ]
    assert told() == [ANNOUNCED]
    logged = [record.mailqueue for record in caplog.records if record.name == 'mailqueue.delivery_log']
    assert len(logged) == 6
    assert {event['via'] for event in logged} == {
        f'smtp:127.0.0.1:{smtp_server.socket.getsockname()[1]} (redirected to {ME})'
    }


@pytest.mark.parametrize(('command', 'more'), [('run', []), ('send_test', ['--to=ada@x.example'])])
def test_commands_say_so_and_do_so(make_settings, smtp_server, queue_dir, tmp_path, command, more):
    queue = MaildirQueue(queue_dir)
    if command == 'run':
        queue.put(Envelope('', ('ada@x.example',), CONTENT))
    ini = tmp_path / 'app.ini'
    settings = make_settings(smtp_server, redirect_all_to=ME)
    ini.write_text('[app:main]\n' + '\n'.join(f'{key} = {value}' for key, value in settings.items()))

    done = subprocess.run(
        [sys.executable, '-m', f'pyramid_mailqueue.cli.{command}', str(ini), *more],
        capture_output=True,
        text=True,
        check=True,
    )

    (received,) = smtp_server.received
    assert (received.rcpt_tos, original(received.content)) == ([ME], ['ada@x.example'])
    assert done.stderr == f'WARNING mailqueue.delivery: {ANNOUNCED}\n'


def test_a_claim_that_an_application_takes_up_goes_to_the_one(make_settings, smtp_server, queue_dir):
    MaildirQueue(queue_dir).put(Envelope('', ('ada@x.example',), CONTENT))
    mailer = build_mailer(Settings.from_mapping(make_settings(smtp_server, redirect_all_to=ME)))
    (claim,) = mailer.queue.claim_due(1 << 33)

    assert mailer.handler.deliver(claim).accepted == ('ada@x.example',)

    assert [received.rcpt_tos for received in smtp_server.received] == [[ME]]
    mailer.handler.close()
    mailer.close()


def test_the_transport_of_an_application_gets_one_recipient_too(make_app, make_settings, message):
    offers = []

    class Own:
        def send(self, sender, recipients, content):
            offers.append(recipients)
            return True

    def view(request):
        result = request.mailer.send_immediately(message('hello'))
        assert result.accepted == (ME,)
        assert result.transport == f'Own (redirected to {ME})'

    make_app(
        view,
        make_settings(redirect_all_to=ME, transports='own'),
        configure=lambda config: config.registry.registerUtility(Own(), ITransport, 'own'),
    ).get('/')

    assert offers == [(ME,)]


def test_a_message_is_refused_as_it_would_be_without(make_settings, smtp_server, message):
    mailer = build_mailer(Settings.from_mapping(make_settings(smtp_server, redirect_all_to=ME)))

    with pytest.raises(AddressError):
        mailer.enqueue(message('hello'), recipients='nobody')
    mailer.close()


def test_who_does_not_redirect_hears_and_sees_nothing_of_it(make_app, make_settings, smtp_server, message, told):
    app = make_app(lambda request: request.mailer.send(message('hello')), make_settings(smtp_server, delivery='inline'))
    app.get('/')

    (received,) = smtp_server.received
    assert (received.rcpt_tos, original(received.content), told()) == (['ada@elsewhere.example'], [], [])
    assert app.app.registry.getUtility(IMailer).handler.routes[0].transport.name == 'smtp'


# --- programs that bring their own ------------------------------------------


def test_a_transport_that_a_program_makes_of_the_same_settings_redirects(smtp_server):
    settings = {'smtp_hostname': '127.0.0.1', 'smtp_port': smtp_server.port, 'redirect_all_to': ME}

    result = MessageHandler([init_smtp_mailer(settings)]).send_message(CONTENT, sender='', recipient='ada@x.example')

    assert result
    assert [received.rcpt_tos for received in smtp_server.received] == [[ME]]


@pytest.mark.parametrize('knows', [True, False])
def test_a_run_with_a_handler_of_the_programs_own_redirects(smtp_server, queue_dir, knows):
    MaildirQueue(queue_dir).put(Envelope('', ('ada@x.example',), CONTENT))
    server = {'smtp_hostname': '127.0.0.1', 'smtp_port': smtp_server.port}
    handler = MessageHandler([init_smtp_mailer(server | ({'redirect_all_to': ME} if knows else {}))])

    one_shot_queue_run(
        queue_dir,
        options={'quiet': True},
        settings={'redirect_all_to': ME, 'mh': handler, 'basic_logging_configured': True, 'plugins': 'none'},
    )

    (received,) = smtp_server.received
    assert (received.rcpt_tos, original(received.content)) == ([ME], ['ada@x.example'])


def test_what_is_not_known_to_send_nothing_is_not_passed_on():
    class Transport:
        def send(self, sender, recipients, content):
            return True

        def send_in_some_new_way(self, *args):
            raise AssertionError('past the redirection')

        def leads_to(self, queue):
            return queue == 'mine'

    transport = redirecting(Transport(), 'me@site.example')

    assert transport.leads_to('mine')
    assert not hasattr(transport, 'send_in_some_new_way')
    assert transport.connect() is None
