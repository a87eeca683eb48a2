"""The how-to cards about relays and messages do what they say: their code is run, their settings are read."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import io
import json
import logging
import logging.config
import re
import shlex
import socket
import sys
import threading
import types
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import docutils.nodes
import pytest
from pyramid.config import Configurator
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool
from webtest import TestApp
from zope.interface.verify import verifyObject

from pyramid_mailqueue import ITransport, MessageTooLarge, Settings, mailer_from_settings
from pyramid_mailqueue.cli.config import read_app_settings
from pyramid_mailqueue.cli.queue import main as mq_queue
from pyramid_mailqueue.cli.run import main as mq_run
from pyramid_mailqueue.cli.send_test import main as mq_send_test
from pyramid_mailqueue.interfaces import ISender
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.settings import known_keys
from pyramid_mailqueue.testing import EXTENSIONS, ScriptedSMTPServer, captured_mail
from pyramid_mailqueue.transports.smtp.server import tls_mode
from tests.test_docs import ROOT, literals_of, parse

CARDS = (
    *('amazon-ses', 'attachments', 'bounces', 'development', 'dkim', 'local-postfix'),
    *('one-click-unsubscribe', 'own-transport', 'postmark', 'staging', 'templates'),
)
RELAYS = ('amazon-ses', 'local-postfix', 'postmark')
LOGGERS = ('delivery', 'smtp')


def path_of(card):
    return ROOT / f'docs/howto/{card}.rst'


def blocks_of(card, language=None):
    blocks = parse(path_of(card)).findall(docutils.nodes.literal_block)
    return [block.astext() for block in blocks if language is None or language in block['classes']]


def namespace_of(card, changes=()):
    """Run the only Python block of a card; return what it defines."""
    (code,) = blocks_of(card, 'python')
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    namespace = {}
    exec(compile(code, str(path_of(card)), 'exec', dont_inherit=True), namespace)
    return namespace


def rows_of(card, title):
    """Return the cells of each row of a card's table whose first column has this title."""
    for table in parse(path_of(card)).findall(docutils.nodes.table):
        head, *rows = (list(row.findall(docutils.nodes.entry)) for row in table.findall(docutils.nodes.row))
        if head[0].astext() == title:
            return rows
    raise AssertionError(f'{card} has no table {title}')


def fits(shown, said):
    """Whether *said* is what a card has *shown*, where an ellipsis is anything."""
    return re.fullmatch('.*'.join(map(re.escape, shown.split('…'))), said) is not None


@pytest.fixture
def ini_of(tmp_path):
    """Write the settings of a card to an ini file, with a queue of this test in it: ``ini_of(card, key=value)``."""

    def ini_of(card, name='production.ini', **own):
        (block,) = [block for block in blocks_of(card, 'ini') if block.startswith('[app:main]')]
        block = block.replace('/var/spool/shop', '%(here)s/queue')
        own = {f'mailqueue.{key}': value for key, value in own.items()}
        kept = [line for line in block.splitlines() if line.partition(' = ')[0] not in own]
        path = tmp_path / name
        path.write_text('\n'.join([*kept, *(f'{key} = {value}' for key, value in own.items()), '']))
        return path

    return ini_of


@pytest.fixture
def run(capsys):
    """Call a command; return its exit status and the lines that it has printed to stdout and stderr."""

    def run(command, *arguments):
        with pytest.raises(SystemExit) as ended:
            command([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out.splitlines(), printed.err.splitlines()

    return run


@pytest.fixture
def make_mailer():
    with contextlib.ExitStack() as stack:

        def make_mailer(settings):
            mailer = mailer_from_settings(settings)
            stack.callback(mailer.handler.close)
            stack.callback(mailer.close)
            return mailer

        yield make_mailer


@pytest.fixture
def server():
    with ScriptedSMTPServer() as server:
        yield server


# --- every card --------------------------------------------------------------


def test_there_is_a_test_for_each_card():
    assert all(path_of(card).is_file() for card in CARDS)


@pytest.mark.parametrize('card', CARDS)
def test_a_card_is_one_screen_of_plain_restructured_text(card):
    lines = path_of(card).read_text('utf-8').splitlines()

    assert parse(path_of(card)).astext()
    assert max(map(len, lines)) <= 120
    assert len(lines) <= 110


@pytest.mark.parametrize('card', CARDS)
def test_every_link_leads_somewhere(card):
    targets = [node['refuri'] for node in parse(path_of(card)).findall(docutils.nodes.reference)]

    assert [it for it in targets if '://' not in it and not (path_of(card).parent / it).is_file()] == []


@pytest.mark.parametrize('card', CARDS)
def test_no_card_names_a_setting_that_does_not_exist(card):
    named = set(re.findall(r'(?<![\w.])mailqueue\.([a-z_]+)', path_of(card).read_text('utf-8')))

    assert named <= known_keys().keys() | {*LOGGERS}


@pytest.mark.parametrize('card', [card for card in CARDS if any('[app:main]' in it for it in blocks_of(card, 'ini'))])
def test_the_settings_of_a_card_can_be_used(card, ini_of):
    written = Settings.from_mapping(read_app_settings(str(ini_of(card)), None, {}))

    assert written.queue_dir is not None


def commands():
    """Each of our commands in a card, in a block or in a sentence."""
    for card in CARDS:
        document = parse(path_of(card))
        lines = [
            line.strip()
            for block in document.findall(docutils.nodes.literal_block)
            for line in block.astext().split('\n')
        ]
        for line in (*lines, *literals_of(document)):
            if re.match(r'mq-[a-z-]+ \S+\.ini', line):
                yield pytest.param(card, shlex.split(line), id=f'{card}: {line}')


@pytest.mark.parametrize(('card', 'command'), list(commands()))
def test_every_command_can_be_run(card, command, tmp_path, ini_of, run, server, monkeypatch):
    name, ini, *arguments = command
    ini_of('local-postfix', ini, smtp_port=server.port, smtp_hostname='127.0.0.1')
    MaildirQueue(tmp_path / 'queue')
    monkeypatch.chdir(tmp_path)

    status, _, _ = run({'mq-queue': mq_queue, 'mq-run': mq_run, 'mq-send-test': mq_send_test}[name], ini, *arguments)

    assert status == 0
    assert len(server.messages) == (name == 'mq-send-test')


# --- relays ------------------------------------------------------------------


def test_the_tls_of_each_relay_is_what_its_card_says(ini_of):
    used = {}
    for card in RELAYS:
        read = Settings.from_mapping(read_app_settings(str(ini_of(card)), None, {}))
        has_credentials = read.smtp_username is not None
        used[card] = (
            *(read.smtp_port, has_credentials),
            tls_mode(
                read.smtp_tls, read.smtp_hostname, read.smtp_port, has_credentials=has_credentials, has_ca_file=False
            ),
        )

    assert used == {
        'amazon-ses': (587, True, 'starttls'),
        'local-postfix': (25, False, 'opportunistic'),
        'postmark': (587, True, 'starttls'),
    }
    for port, mode in {25: 'starttls', 465: 'implicit', 2465: 'starttls', 2525: 'starttls', 2587: 'starttls'}.items():
        assert tls_mode(None, 'relay.example', port, has_credentials=True, has_ca_file=False) == mode


OUTCOMES = {'It waits': ('waiting', 1), 'It is a dead letter': ('dead', 1), 'All mail waits as it was': ('waiting', 0)}


@pytest.mark.parametrize(
    ('reply', 'outcome'),
    [(cells[0].astext(), cells[1].astext().split('.')[0].split(',')[0]) for cells in rows_of('amazon-ses', 'SES says')],
)
def test_what_becomes_of_a_message_when_ses_says_no(reply, outcome, make_settings, make_mailer, message):
    step = 'AUTH' if reply.startswith('535') else '.'
    with ScriptedSMTPServer({step: reply}, extensions=(*EXTENSIONS, 'AUTH PLAIN LOGIN')) as server:
        mailer = make_mailer(make_settings(server, smtp_username='AKIA', smtp_password='secret'))
        mailer.send_immediately(message('An order'))

    (entry,) = mailer.queue.admin.entries({'waiting', 'dead'})
    assert (entry.state, entry.retries) == OUTCOMES[outcome]


def test_the_limits_of_the_relays_hold_before_anything_is_sent(ini_of, server, make_mailer, message):
    for card in RELAYS:
        settings = read_app_settings(str(ini_of(card)), None, {})
        large = bytes(message('Large')) + bytes(int(settings['mailqueue.max_message_size']))
        mailer = make_mailer(settings | {'mailqueue.smtp_hostname': '127.0.0.1', 'mailqueue.smtp_port': server.port})

        with pytest.raises(MessageTooLarge):
            mailer.send_immediately(large)


@pytest.mark.parametrize('card', ['amazon-ses', 'postmark'])
def test_a_message_for_more_recipients_is_split(card, ini_of, make_mailer, server, message):
    settings = read_app_settings(str(ini_of(card)), None, {})
    of_server = {'smtp_hostname': '127.0.0.1', 'smtp_port': server.port, 'smtp_username': '', 'smtp_password': ''}
    mailer = make_mailer(settings | {f'mailqueue.{key}': value for key, value in of_server.items()})

    mailer.send_immediately(message('To many'), recipients=[f'{number}@x.example' for number in range(60)])

    assert sorted(len(it.recipients) for it in server.messages) == [10, 50]


def test_without_max_message_size_a_message_that_the_server_does_not_take_is_a_dead_letter(
    make_settings, make_mailer, message
):
    with ScriptedSMTPServer(extensions=(*EXTENSIONS[:1], 'SIZE 100')) as server:
        mailer = make_mailer(make_settings(server))
        mailer.send_immediately(message('Too large'))

    assert mailer.queue.counts()['dead'] == 1
    assert 'DATA' not in server.sessions[0].commands


def test_the_fields_for_postmark_go_out_as_they_are_set(make_settings, make_mailer, server, message):
    made = message('Welcome')
    (code,) = blocks_of('postmark', 'python')
    exec(code, {'message': made})

    make_mailer(make_settings(server)).send_immediately(made)

    sent = message_from_bytes(server.messages[0].content)
    assert [sent[f'X-PM-{name}'] for name in ('Message-Stream', 'KeepID', 'Tag')] == ['outbound', 'true', 'welcome']


def test_the_dialog_with_postfix_is_the_one_that_is_shown(ini_of, run, queue_dir):
    (shown,) = blocks_of('local-postfix', 'text')
    MaildirQueue(queue_dir)
    said = re.findall(r'  S: (.*)', shown)
    script = dict(zip(('MAIL', 'RCPT', 'DATA', '.'), said, strict=True))
    with ScriptedSMTPServer(script) as server:
        ini = ini_of('local-postfix', smtp_hostname='127.0.0.1', smtp_port=server.port)
        status, printed, _ = run(mq_send_test, ini, '--to=ada@x.example')

    # The size depends on the name of this machine.
    lines = [re.sub(r'(SIZE=|<)\d+', r'\g<1>417', line) for line in printed[-len(shown.splitlines()) :]]
    assert status == 0
    for expected, line in zip(shown.splitlines(), lines, strict=True):
        assert fits(expected.replace('localhost:25', f'127.0.0.1:{server.port}'), line)


def test_main_cf_has_a_name_and_a_value_in_each_line():
    (block,) = blocks_of('local-postfix', 'cfg')
    lines = [line for line in block.splitlines() if not line.startswith('#')]

    assert all(re.fullmatch(r'[a-zA-Z_]+ =( \S+)?', line) for line in lines)
    assert len(lines) == len({line.partition(' ')[0] for line in lines})


def test_a_percent_sign_in_a_password_is_written_twice(ini_of):
    ini = ini_of('amazon-ses', smtp_password='a%%b')

    assert read_app_settings(str(ini), None, {})['mailqueue.smtp_password'] == 'a%b'


# --- a transport of your own -------------------------------------------------


class API(ThreadingHTTPServer):
    """An HTTP API for mail: ``status`` is what it says, None that it hangs up; ``letters`` has what it was sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Endpoint)
        self.status = 202
        self.letters = []


class Endpoint(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        self.server.letters.append((self.path, self.headers['Authorization'], json.loads(body)))
        if self.server.status is None:
            return
        answer = json.dumps({'id': f'm-{len(self.server.letters)}'}).encode()
        self.send_response(self.server.status)
        self.send_header('Content-Length', str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.fixture
def api():
    with API() as api:
        thread = threading.Thread(target=api.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield api
        api.shutdown()
        thread.join()


@pytest.fixture
def http_mail(api, tmp_path, monkeypatch):
    """The module of the card, for an API of this test, without TLS."""
    (code,) = blocks_of('own-transport', 'python')
    assert code.startswith('# shop/http_mail.py\n')
    (tmp_path / 'shop').mkdir()
    (tmp_path / 'shop/__init__.py').touch()
    (tmp_path / 'shop/http_mail.py').write_text(
        code.replace("'api.mail.example'", f"'127.0.0.1:{api.server_port}'").replace(
            'HTTPSConnection', 'HTTPConnection'
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('MAIL_API_TOKEN', 'a-token')
    yield importlib.import_module('shop.http_mail')
    for name in ('shop.http_mail', 'shop'):
        sys.modules.pop(name, None)


def test_mq_send_test_sends_over_the_api_and_says_what_is_shown(http_mail, api, ini_of, run, queue_dir):
    MaildirQueue(queue_dir)
    (shown,) = blocks_of('own-transport', 'text')

    status, printed, _ = run(mq_send_test, ini_of('own-transport'), '--from=shop@site.example', '--to=ada@x.example')

    assert status == 0
    assert all(fits(expected, line) for expected, line in zip(shown.splitlines(), printed, strict=True))
    ((path, authorization, letter),) = api.letters
    assert (path, authorization) == ('/messages', 'Bearer a-token')
    assert (letter['from'], letter['to']) == ('shop@site.example', ['ada@x.example'])
    raw = base64.b64decode(letter['raw'])
    assert raw.startswith(b'Subject: ')
    assert message_from_bytes(raw)['To'] == 'ada@x.example'


def test_the_transport_keeps_the_contract(http_mail):
    assert verifyObject(ISender, http_mail.HTTPTransport('x.example', 'secret'), tentative=True)


@pytest.mark.parametrize(
    ('status', 'state', 'retries'),
    [
        *((status, 'gone', 0) for status in (200, 202)),
        *((status, 'dead', 1) for status in (400, 413, 422)),
        *((status, 'waiting', 1) for status in (302, 418, 500, 502, 504, None)),
        *((status, 'waiting', 0) for status in (401, 403, 404, 429, 503)),
    ],
)
def test_what_becomes_of_a_message_is_what_the_table_says(
    status, state, retries, http_mail, api, make_settings, make_mailer, message
):
    api.status = status
    mailer = make_mailer(make_settings(transports='shop.http_mail.from_settings'))

    result = mailer.send_immediately(message('An order'))

    entries = [(entry.state, entry.retries) for entry in mailer.queue.admin.entries({'waiting', 'dead'})]
    assert entries == ([] if state == 'gone' else [(state, retries)])
    assert len(api.letters) == 1
    unknown = [reply.outcome_unknown for reply in result.replies.values()]
    assert unknown == ([] if (state, retries) == ('waiting', 0) else [status is None])


def test_mail_waits_as_it_was_where_nobody_listens(http_mail, make_settings, make_mailer, message, monkeypatch):
    # The port is taken, so that nobody else answers there.
    with socket.socket() as deaf:
        deaf.bind(('127.0.0.1', 0))
        monkeypatch.setattr(http_mail, 'HOST', f'127.0.0.1:{deaf.getsockname()[1]}')
        mailer = make_mailer(make_settings(transports='shop.http_mail.from_settings'))
        mailer.send_immediately(message('An order'))

    assert [it.retries for it in mailer.queue.admin.entries({'waiting'})] == [0]
    assert mailer.handler.is_backing_off


def test_the_api_gets_what_smtp_could_not_deliver(http_mail, api, make_settings, make_mailer, message):
    with ScriptedSMTPServer({'RCPT': '451 4.7.1 later'}) as server:
        mailer = make_mailer(make_settings(server, transports='smtp shop.http_mail.from_settings'))
        result = mailer.send_immediately(message('An order'))

    assert result.accepted == ('ada@elsewhere.example',)
    assert len(api.letters) == 1


def test_a_transport_may_be_registered_by_its_name(http_mail, api, make_app, make_settings, message):
    def configure(config):
        config.registry.registerUtility(http_mail.from_settings(None), ITransport, 'http')

    def view(request):
        return request.mailer.send(message('An order'))

    make_app(view, make_settings(transports='http', delivery='inline'), configure=configure).get('/')

    assert len(api.letters) == 1


def test_the_names_in_the_table_are_those_of_the_code():
    (code,) = blocks_of('own-transport', 'python')
    text = ''.join(cells[1].astext() for cells in rows_of('own-transport', 'What the API says'))

    for name in ('Reply(250', 'Reply(550', 'outcome_unknown=True', 'ServerTrouble'):
        assert name in text
        assert name in code


# --- the message -------------------------------------------------------------


def tree_of(part, depth=0):
    words = [part.get_content_disposition(), part.get_filename()]
    yield '    ' * depth + part.get_content_type(), ', '.join(word for word in words if word)
    for inner in part.iter_parts() if part.is_multipart() else ():
        yield from tree_of(inner, depth + 1)


def test_the_parts_of_a_message_arrive_as_they_are_shown(make_settings, make_mailer, server):
    logo, invoice = b'\x89PNG\r\n\x1a\nlogo', b'%PDF-1.7\n' + bytes(range(256))
    made = namespace_of('attachments')['invoice_mail']('ada@x.example', logo, invoice)
    make_mailer(make_settings(server)).send_immediately(made)

    read = message_from_bytes(server.messages[0].content, policy=default)

    (shown,) = blocks_of('attachments', 'text')
    assert [(line.rstrip(), words) for line, words in tree_of(read)] == [
        (line.rstrip(), words)
        for line, _, words in (re.split(r'(?<=\S)( {2,}|$)', it, maxsplit=1) for it in shown.splitlines())
    ]
    html = read.get_body(('html',))
    image, attached = [part for part in read.walk() if part.get_filename()]
    assert read.get_body(('plain',)).get_content() == 'Thank you.  The invoice is attached.\r\n'
    assert f'src="cid:{image["Content-ID"][1:-1]}"' in html.get_content()
    assert (image.get_content(), attached.get_content()) == (logo, invoice)
    assert attached in list(read.iter_attachments())


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """What the card defines, with its templates in a package ``shop``."""
    folder = tmp_path / 'shop/letters'
    folder.mkdir(parents=True)
    (tmp_path / 'shop/__init__.py').touch()
    templates = [block for block in blocks_of('templates') if '{{ url }}' in block]
    names = [name for name in literals_of(parse(path_of('templates'))) if name.startswith('shop/letters/')]
    for name, template in zip(names, templates, strict=True):
        (tmp_path / name).write_text(template)
    monkeypatch.syspath_prepend(tmp_path)
    yield namespace_of('templates')
    sys.modules.pop('shop', None)


@pytest.fixture
def make_captured_app():
    """Make an app of one view whose mail is captured."""

    def make_captured_app(view, configure=lambda config: None):
        with Configurator(settings={}) as config:
            config.include('pyramid_tm')
            config.include('pyramid_mailqueue.testing')
            config.add_route('view', '/')
            config.add_view(view, route_name='view', renderer='json')
            configure(config)
        return TestApp(config.make_wsgi_app())

    return make_captured_app


def test_a_mail_of_templates_is_escaped_in_html_only(letters, make_captured_app):
    app = make_captured_app(letters['sign_up'], lambda config: config.add_route('confirm', '/confirm'))

    app.post('/', {'name': 'Ada & Söhne', 'email': 'ada@x.example'})

    (mail,) = captured_mail(app)
    assert mail.recipients == ('ada@x.example',)
    assert 'Hello Ada & Söhne,\n' in mail.text
    assert 'Hello Ada &amp; Söhne,' in mail.html
    assert 'http://localhost/confirm' in mail.text
    assert 'href="http://localhost/confirm"' in mail.html


def test_a_name_that_a_template_does_not_get_is_an_error(letters):
    with pytest.raises(Exception, match="'url' is undefined"):
        letters['compose']('welcome', 'Welcome', name='Ada', subject='another one')


def test_a_subject_with_a_line_end_is_refused(letters):
    with pytest.raises(ValueError, match='linefeed'):
        letters['compose']('welcome', 'Welcome\nBcc: eve@x.example', name='Ada', url='/')


# --- signatures --------------------------------------------------------------


@pytest.fixture
def dkim(monkeypatch):
    """In place of dkimpy: a signature that holds for the very bytes that were signed."""
    module = types.ModuleType('dkim')

    def sign(content, selector, domain, key):
        digest = hashlib.sha256(content).hexdigest()
        return f'DKIM-Signature: v=1; s={selector.decode()};\r\n d={domain.decode()}; b={digest}\r\n'.encode()

    module.sign = sign
    monkeypatch.setitem(sys.modules, 'dkim', module)


def is_signed(content):
    signature, signed = re.fullmatch(
        rb'(?s)(?:X-Original-Recipients: .*?\r\n)?(DKIM-Signature: .*?\r\n .*?\r\n)(.*)', content
    ).groups()
    return hashlib.sha256(signed).hexdigest().encode() in signature


@pytest.mark.parametrize('own', [{}, {'redirect_all_to': 'me@site.example'}], ids=['as ever', 'redirected'])
def test_what_was_signed_arrives_byte_for_byte(own, dkim, tmp_path, make_app, make_settings, server):
    (tmp_path / 'dkim.pem').write_bytes(b'a key')
    made = EmailMessage()
    made['From'] = 'Bücher <shop@site.example>'
    made['To'] = 'ada@x.example'
    made['Bcc'] = 'bob@x.example'
    made['Subject'] = 'Eine lange Überschrift, ' * 20
    made.set_content('.\nGrüße, ' + 'und eine lange Zeile ' * 100 + '\n\nFrom here on\n \n\n')
    changes = [("'/etc/shop/dkim.pem'", repr(str(tmp_path / 'dkim.pem')))]
    send_signed = namespace_of('dkim', changes)['send_signed']
    settings = make_settings(server, delivery='inline', **own)

    made_id = make_app(lambda request: send_signed(request, made), settings).get('/').text

    (arrived,) = server.messages
    assert is_signed(arrived.content)
    assert made_id.encode() in arrived.content
    assert b'bob@x.example' not in arrived.content.partition(b'DKIM-Signature')[2]
    assert arrived.content.partition(b'DKIM-Signature')[2].isascii()
    assert arrived.recipients == (('me@site.example',) if own else ('ada@x.example', 'bob@x.example'))


# --- bounces -----------------------------------------------------------------


def test_bounces_go_to_an_address_of_their_own(make_app, make_settings, server, message):
    send = namespace_of('bounces')['send_to_customer']
    bare = message('No author')
    del bare['From']

    def view(request):
        send(request, message('An order'), 7)
        send(request, bare, 8)
        request.mailer.send(message('An automatic answer'), sender='')
        returned = message('Return-Path')
        returned['Return-Path'] = '<other@site.example>'
        request.mailer.send(returned)
        return ''

    make_app(view, make_settings(server, delivery='inline')).get('/')

    sent = [(it.sender, message_from_bytes(it.content)['From']) for it in server.messages]
    assert sent == [
        ('bounces+7@site.example', 'shop@site.example'),
        ('bounces+8@site.example', 'bounces+8@site.example'),
        ('', 'shop@site.example'),
        ('shop@site.example', 'shop@site.example'),
    ]
    assert not any(b'\nReturn-Path:' in it.content for it in server.messages)
    assert any(
        command == 'MAIL FROM:<bounces+7@site.example>' or command.startswith('MAIL FROM:<bounces+7@site.example> ')
        for session in server.sessions
        for command in session.commands
    )


# --- unsubscribing -----------------------------------------------------------


@pytest.fixture
def subscriptions():
    engine = create_engine('sqlite://', poolclass=StaticPool, connect_args={'check_same_thread': False})
    with engine.begin() as connection:
        connection.execute(text('CREATE TABLE subscription (number TEXT)'))
        connection.execute(text("INSERT INTO subscription VALUES ('7'), ('8')"))
    with Session(engine) as session:
        yield session
    engine.dispose()


def numbers_in(session):
    return session.execute(text('SELECT number FROM subscription ORDER BY number')).scalars().all()


@pytest.fixture
def club(subscriptions, make_captured_app, message):
    """An app that mails to subscriber 7, and whose other views want a login and a CSRF token."""
    card = namespace_of('one-click-unsubscribe')

    def view(request):
        news = message('News')
        card['add_unsubscribe'](request, news, '7')
        request.mailer.send(news)
        return {}

    def configure(config):
        config.add_settings({'shop.secret': 'a secret ' * 10})
        config.set_default_csrf_options(require_csrf=True)
        config.add_request_method(lambda request: subscriptions, 'dbsession', reify=True)
        config.set_security_policy(Nobody())
        config.set_default_permission('be a member')
        config.add_route('account', '/account')
        config.add_view(lambda request: {}, route_name='account', renderer='json')
        card['includeme'](config)

    return make_captured_app(view, configure)


class Nobody:
    """Permits the first page, and nothing else that needs a permission."""

    def identity(self, request):
        return None

    def authenticated_userid(self, request):
        return None

    def permits(self, request, context, permission):
        return request.path == '/'


ONE_CLICK = {'List-Unsubscribe': 'One-Click'}


def test_one_click_unsubscribes(club, subscriptions):
    club.get('/account', status=403)
    club.get('/')
    (mail,) = captured_mail(club)
    url = mail.message['List-Unsubscribe'][1:-1]
    assert mail.message['List-Unsubscribe-Post'] == 'List-Unsubscribe=One-Click'
    assert url.startswith('https://')
    path = re.sub('^https://[^/]+', '', url)

    club.get(path, status=404)
    club.post(path, status=400)
    club.post(path[:-1] + ('0' if path[-1] != '0' else '1'), ONE_CLICK, status=404)
    club.post(path.replace('/7/', '/8/'), ONE_CLICK, status=404)
    club.post('/unsubscribe/7/%C3%BC', ONE_CLICK, status=404)
    assert numbers_in(subscriptions) == ['7', '8']

    club.reset()
    for content_type in ('multipart/form-data', 'application/x-www-form-urlencoded'):
        answer = club.post(path, ONE_CLICK, content_type=content_type, status=200)
        assert 'Set-Cookie' not in answer.headers
        assert numbers_in(subscriptions) == ['8']


def test_a_long_url_goes_out_as_it_is(make_settings, make_mailer, server, message):
    news = message('News')
    url = 'https://site.example/unsubscribe/' + 'x' * 400
    news['List-Unsubscribe'] = f'<{url}>'
    make_mailer(make_settings(server)).send_immediately(news)

    assert f'List-Unsubscribe: <{url}>\r\n'.encode() in server.messages[0].content
    # Else the remark about the standard library is no longer true.
    assert url.encode() not in news.as_bytes()


# --- sites that are no production -----------------------------------------------


def test_all_mail_of_a_staging_site_goes_to_one_address(ini_of, server, make_mailer, caplog):
    warning, header, line = blocks_of('staging', 'text')
    made = EmailMessage()
    made['From'], made['To'], made['Bcc'] = 'shop@site.example', 'ada@x.example', 'bob@x.example'
    made['Subject'] = 'Your order'
    made.set_content('Thank you.')
    settings = read_app_settings(str(ini_of('staging', smtp_hostname='127.0.0.1', smtp_port=server.port)), None, {})
    caplog.set_level(logging.INFO)

    make_mailer(settings).send_immediately(made)

    (arrived,) = server.messages
    assert arrived.recipients == ('me@site.example',)
    assert arrived.content.decode().replace('\r\n', '\n').startswith(f'{header}\n')
    said = [(record.name, f'{record.levelname} {record.getMessage()}') for record in caplog.records]
    assert ('mailqueue.delivery', warning) in said
    (told,) = [text for name, text in said if name == 'mailqueue.delivery_log']
    for part in re.findall(r'\w+=(?:"[^"]*"|\S+)', line.replace('localhost:25', f'127.0.0.1:{server.port}')):
        assert part in told


def test_a_queue_that_was_copied_from_production_is_redirected(ini_of, server, make_mailer, message, run):
    ini = ini_of('staging', smtp_hostname='127.0.0.1', smtp_port=server.port)
    settings = read_app_settings(str(ini), None, {})
    of_production = {key: value for key, value in settings.items() if key != 'mailqueue.redirect_all_to'}
    make_mailer(of_production).enqueue(message('From production'))

    status, _, _ = run(mq_run, ini)

    assert status == 0
    assert [it.recipients for it in server.messages] == [('me@site.example',)]


def test_mail_of_a_developer_ends_in_a_file_that_looks_as_shown(ini_of, run, tmp_path, monkeypatch):
    ini_of('development', 'development.ini', smtp_local_hostname='www.site.example')
    monkeypatch.chdir(tmp_path)
    (shown,) = [block for block in blocks_of('development', 'text') if 'Return-Path' in block]
    (typed,) = [block for block in blocks_of('development') if block.startswith('mq-')]
    init, send, cat = map(shlex.split, typed.splitlines())

    assert run(mq_queue, *init[1:])[0] == 0
    assert run(mq_send_test, *send[1:])[0] == 0

    (path,) = tmp_path.glob(cat[1])
    said = path.read_bytes().decode().split('\r\n')
    for expected, line in zip(shown.splitlines(), said, strict=False):
        dateless = r'\w+, \d+ \w+ \d{4} [\d:]+ \+0000'
        assert re.sub(dateless, 'now', line) == re.sub(dateless, 'now', expected)


def test_the_dialog_is_logged_as_shown(make_settings, make_mailer, message, monkeypatch):
    (config,) = [block for block in blocks_of('development', 'ini') if '[loggers]' in block]
    (shown,) = [block for block in blocks_of('development', 'text') if 'DEBUG' in block]
    printed = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', printed)
    logging.config.fileConfig(io.StringIO(config), disable_existing_loggers=False)

    with ScriptedSMTPServer({'MAIL': '250 2.1.0 Ok'}) as server:
        make_mailer(make_settings(server)).send_immediately(message('An order'))

    lines = re.sub(r'SIZE=\d+', 'SIZE=417', printed.getvalue()).splitlines()
    assert set(shown.replace('localhost:25', f'127.0.0.1:{server.port}').splitlines()) <= {*lines}
