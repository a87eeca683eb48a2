"""The pages for those who come from other packages: what they show is run, with these packages as they are on PyPI."""

from __future__ import annotations

import importlib.util
import smtplib
import subprocess
import sys
import textwrap
from email import message_from_bytes
from email.message import EmailMessage
from email.mime.text import MIMEText
from pathlib import Path

import docutils.nodes
import pytest
import transaction
from pyramid.config import Configurator
from webtest import TestApp

from pyramid_mailqueue.queues.maildir.queue_file import read_header
from pyramid_mailqueue.testing import ScriptedSMTPServer, captured_mail, make_mailer
from tests.parts.pages import ROOT, parse

SENDER, ADA, BOB = 'shop@site.example', 'ada@x.example', 'bob@x.example'


def blocks_of(name):
    """Return the Python samples of a page."""
    blocks = parse(ROOT / f'docs/{name}.rst').findall(docutils.nodes.literal_block)
    return [block.astext() for block in blocks if 'python' in block['classes']]


def shell_of(name):
    """Return the other samples of a page: what is typed."""
    blocks = parse(ROOT / f'docs/{name}.rst').findall(docutils.nodes.literal_block)
    return [block.astext() for block in blocks if 'python' not in block['classes']]


def row_of_readme(what):
    """Return what the README says of another package."""
    (cell,) = (
        row.children[1].astext()
        for row in parse(ROOT / 'README.rst').findall(docutils.nodes.row)
        if row.children[0].astext() == what
    )
    return cell


def written(subject):
    """A message as applications have made them for these packages."""
    message = MIMEText('Grüße\n.\nEnde\n', 'plain', 'utf-8')
    message['Subject'] = subject
    message['From'] = SENDER
    message['To'] = ADA
    return message


@pytest.fixture
def script(tmp_path):
    """Run a sample in a Python of its own, where the two directories of the docs are in this test's folder."""

    def script(text, before=''):
        text = text.replace('/var/spool', str(tmp_path))
        path = tmp_path / 'script.py'
        path.write_text(f'{textwrap.dedent(before)}\n{text}\n')
        return subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    return script


@pytest.fixture
def moved(tmp_path):
    """The messages in the new queue: envelope and subject, in the order of their names."""

    def moved():
        found = []
        for path in sorted((tmp_path / 'shop/new').iterdir()):
            with path.open('rb') as file:
                header = read_header(file)
                found.append((header.sender, header.recipients, message_from_bytes(file.read())))
        return found

    return moved


def files_of(folder):
    return sorted(path.name for path in folder.rglob('*') if path.is_file())


@pytest.fixture(params=['repoze', 'zope'])
def old_queue(request, tmp_path):
    """``add(subject, recipients)`` puts a message into a queue of another package, as its users do."""
    delivery = pytest.importorskip(f'{request.param}.sendmail.delivery')
    queued = delivery.QueuedMailDelivery(str(tmp_path / 'shop-old'))

    def add(subject, recipients, sender=SENDER):
        message = written(subject)
        with transaction.manager:
            queued.send(sender, recipients, message if request.param == 'repoze' else message.as_bytes())

    add.package = request.param
    add.page = f'from-{request.param}-sendmail'
    return add


# --- repoze.sendmail, zope.sendmail, and with the former pyramid_mailer -------


def test_an_old_queue_is_moved(old_queue, script, moved, tmp_path):
    old_queue('Eins', [ADA, BOB])
    old_queue('Zwei', [ADA], sender='Shop <shop@site.example>')

    done = script(blocks_of(old_queue.page)[-1])

    assert done.returncode == 0, done.stderr
    found = sorted(moved(), key=lambda it: it[2]['Subject'])
    assert [(sender, to) for sender, to, _ in found] == [(SENDER, (ADA, BOB)), (SENDER, (ADA,))]
    assert [message['Subject'] for *_, message in found] == ['Eins', 'Zwei']
    assert [message.get_payload(decode=True).decode().splitlines() for *_, message in found] == [
        ['Grüße', '.', 'Ende']
    ] * 2
    assert all(not name.startswith('X-') for *_, message in found for name in message)
    assert files_of(tmp_path / 'shop-old') == []


def test_what_cannot_be_moved_stays_and_is_told(old_queue, script, moved, tmp_path):
    old_queue('Eins', ['no address'])
    old_queue('Zwei', [ADA])

    done = script(blocks_of(old_queue.page)[-1], before='import logging; logging.basicConfig()')

    assert [message['Subject'] for *_, message in moved()] == ['Zwei']
    assert 'AddressError' in done.stderr
    sending, kept = files_of(tmp_path / 'shop-old')
    # Its link is looked at again after three hours.
    assert sending == f'.sending-{kept}'


def test_an_old_queue_is_delivered_by_its_own_command(old_queue, tmp_path):
    old_queue('Eins', [ADA])
    command = Path(sys.executable).with_name({'repoze': 'qp', 'zope': 'zope-sendmail'}[old_queue.package])
    page = (ROOT / f'docs/{old_queue.page}.rst').read_text()
    assert f'    {command.name} --hostname mail.site.example --port 25 /var/spool/shop-old\n' in page

    with ScriptedSMTPServer() as server:
        subprocess.run(
            [command, '--hostname', server.host, '--port', str(server.port), tmp_path / 'shop-old'],
            check=True,
            timeout=60,
        )

    assert [message.recipients for message in server.messages] == [(ADA,)]
    assert files_of(tmp_path / 'shop-old') == []


@pytest.mark.parametrize('old_queue', ['repoze'], indirect=True)
def test_what_was_refused_or_interrupted_there_is_moved_once_or_not_at_all(old_queue, script, moved, tmp_path):
    for subject in ('refused', 'interrupted', 'waiting'):
        old_queue(subject, [ADA])
    for path in (tmp_path / 'shop-old/new').iterdir():
        subject = message_from_bytes(path.read_bytes())['Subject']
        if subject == 'refused':
            path.rename(path.with_name(f'.rejected-{path.name}'))
        elif subject == 'interrupted':
            path.with_name(f'.sending-{path.name}').hardlink_to(path)
    commands = next(text for text in shell_of(old_queue.page) if '.sending-*' in text)

    subprocess.run(['sh', '-ec', commands.replace('/var/spool', str(tmp_path))], check=True, timeout=60)
    for _ in range(2):
        script(blocks_of(old_queue.page)[-1])

    assert sorted(message['Subject'] for *_, message in moved()) == ['interrupted', 'waiting']
    assert files_of(tmp_path / 'shop-old') == []
    assert len(files_of(tmp_path / 'shop-refused')) == 1


def test_there_a_server_that_is_down_delays_mail_by_hours_or_lets_it_be_sent_twice(old_queue, script, tmp_path):
    """See "What is different" on both pages."""
    old_queue('Eins', [ADA])
    run = {
        'repoze': 'from repoze.sendmail.queue import QueueProcessor\nQueueProcessor(Server(), QUEUE).send_messages()',
        'zope': 'from zope.sendmail.queue import QueueProcessorThread\nit = QueueProcessorThread()\n'
        'it.setMailer(Server()); it.setQueuePath(QUEUE); it.run(forever=False)',
    }[old_queue.package]
    before = f"""
    QUEUE = {str(tmp_path / 'shop-old')!r}
    class Server:
        def send(self, *_):
            print('asked')
            if is_down:
                raise ConnectionRefusedError
    """

    assert script(run, before.replace('is_down', 'True')).stdout == 'asked\n'

    said = [script(run, before.replace('is_down', 'False')).stdout for _ in range(2)]

    assert ''.join(said) == {'repoze': 'asked\nasked\n', 'zope': ''}[old_queue.package]
    module = pytest.importorskip(f'{old_queue.package}.sendmail.queue')
    assert module.MAX_SEND_TIME == 3 * 3600


@pytest.mark.parametrize('package', ['repoze', 'zope'])
def test_what_the_readme_says_of_an_outage(package, unused_port):
    """The mail of one votes, and that of the other is sent in the second phase, when the database has committed."""
    delivery = pytest.importorskip(f'{package}.sendmail.delivery')
    mailer = pytest.importorskip(f'{package}.sendmail.mailer').SMTPMailer('127.0.0.1', unused_port)
    transaction.manager.begin()
    message = written('Eins')
    delivery.DirectMailDelivery(mailer).send(SENDER, [ADA], message if package == 'repoze' else message.as_bytes())
    other = Witness(transaction.manager)
    transaction.manager.get().join(other)

    with pytest.raises(ConnectionRefusedError):
        transaction.manager.commit()

    transaction.manager.abort()
    assert ('tpc_finish' in other.steps) == (package == 'repoze')
    name, what = {
        'repoze': ('repoze.sendmail 4.5', 'commit() raises, although the database has committed.'),
        'zope': ('zope.sendmail 7.3', 'commit() raises, and the database rolls back.'),
    }[package]
    assert row_of_readme(f'{name}, direct delivery') == what


class Witness:
    """A database that sorts before all others."""

    def __init__(self, manager):
        self.transaction_manager = manager
        self.steps = []

    def sortKey(self):
        return ''

    def __getattr__(self, name):
        if name.startswith(('tpc_', 'commit', 'abort')):
            return lambda txn: self.steps.append(name)
        raise AttributeError(name)


@pytest.fixture
def unused_port():
    with ScriptedSMTPServer() as server:
        port = server.port
    with pytest.raises(OSError, match='refused'):
        smtplib.SMTP('127.0.0.1', port)
    return port


def test_a_mailer_is_registered_as_a_utility_of_zope(tmp_path):
    component = pytest.importorskip('zope.component')
    message = EmailMessage()
    message.set_content('Hello.')
    text = blocks_of('from-zope-sendmail')[0].replace('/var/spool', str(tmp_path))

    with transaction.manager:
        exec(text, {'message': message})

    (name,) = (path for folder in ('new', 'cur') for path in (tmp_path / 'shop' / folder).iterdir())
    assert b'Envelope-to: ada@x.example' in name.read_bytes()
    from pyramid_mailqueue import IMailer

    mailer = component.getUtility(IMailer)
    mailer.close()
    component.getSiteManager().unregisterUtility(mailer, IMailer)


# --- pyramid_mailer -----------------------------------------------------------


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::SyntaxWarning')
def test_a_view_for_pyramid_mailer_works():
    pytest.importorskip('pyramid_mailer')
    namespace = {}
    exec(blocks_of('from-pyramid_mailer')[0], namespace)
    with Configurator(settings={}) as config:
        config.include('pyramid_tm')
        config.include('pyramid_mailqueue.testing')
        config.add_route('welcome', '/')
        config.add_view(namespace['welcome'], route_name='welcome', renderer='json')
    app = TestApp(config.make_wsgi_app())

    answer = app.post('/', {'email': ADA})

    (mail,) = captured_mail(app)
    assert (mail.message_id, mail.subject, mail.recipients) == (answer.json['message_id'], 'Welcome', (ADA,))
    assert [part.get_filename() for part in mail.message.iter_attachments()] == ['terms.txt']


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::SyntaxWarning')
def test_its_settings_are_those_on_the_page():
    mailer = pytest.importorskip('pyramid_mailer.mailer').Mailer
    page = (ROOT / 'docs/from-pyramid_mailer.rst').read_text()
    names = ['host', 'port', 'username', 'password', 'tls', 'ssl', 'keyfile', 'certfile', 'queue_path', 'debug']

    # Each of them is known there: another one would be an error of its mailer.
    mailer(**dict.fromkeys([*names, 'default_sender', 'sendmail_app', 'sendmail_template']))

    assert [name for name in [*names, 'default_sender', 'sendmail_app'] if f'mail.{name}' not in page] == []


# --- django-post_office --------------------------------------------------------

DJANGO = """
import django
from django.conf import settings
from django.core.management import call_command

settings.configure(
    DATABASES={'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': ':memory:'}},
    DEFAULT_AUTO_FIELD='django.db.models.BigAutoField',
    INSTALLED_APPS=['django.contrib.contenttypes', 'post_office'],
    TEMPLATES=[{'BACKEND': 'django.template.backends.django.DjangoTemplates'}],
    USE_TZ=True,
)
django.setup()
call_command('migrate', verbosity=0)

from datetime import timedelta
from django.utils import timezone
from post_office import mail
from post_office.models import Email

for subject in ('Eins', 'Grüße'):
    mail.send('ada@x.example', 'shop@site.example', subject=subject, message='Grüße', html_message='<p>é</p>',
              bcc='bob@x.example')
mail.send('ada@x.example', 'shop@site.example', subject='later', scheduled_time=timezone.now() + timedelta(days=1))
"""


def test_the_rows_of_django_post_office_are_moved(script, moved):
    # It cannot be imported without settings of Django.
    if importlib.util.find_spec('post_office') is None:
        pytest.skip('There is no django-post_office here: see requirements-test.txt')
    (text,) = blocks_of('from-django-post_office')

    done = script(f'{text}\nprint([*Email.objects.order_by("id").values_list("status", flat=True)])', DJANGO)

    assert done.returncode == 0, done.stderr
    assert done.stdout == '[0, 0, 2]\n'  # sent, sent, queued
    found = moved()
    assert [(sender, sorted(to)) for sender, to, _ in found] == [(SENDER, [ADA, BOB])] * 2
    assert [part.get_content_type() for part in found[0][2].walk()] == [
        'multipart/alternative', 'text/plain', 'text/html',
    ]  # fmt: skip
    assert 'bob' not in str(found[0][2])


# --- Flask-Mail ----------------------------------------------------------------


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """The module of the page, which tests import."""
    pytest.importorskip('flask_mail')
    application, keep, tests = blocks_of('from-flask-mail')
    (tmp_path / 'shop.py').write_text(application.replace('/var/spool', str(tmp_path)) + f'\n{keep}')
    (tmp_path / 'test_shop.py').write_text(tests)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'shop', raising=False)
    import shop

    yield shop
    shop.mailer.close()
    sys.modules.pop('shop')


def test_a_flask_application_sends_what_it_commits(shop, tmp_path):
    shop.app.test_client().post('/order', data={'email': ADA})

    (path,) = (path for folder in ('new', 'cur') for path in (tmp_path / 'shop' / folder).iterdir())
    assert b'Envelope-to: ada@x.example' in path.read_bytes()


def test_the_test_of_the_flask_application_passes(shop, tmp_path):
    namespace = {}
    exec((tmp_path / 'test_shop.py').read_text(), namespace)

    namespace['test_an_order_is_confirmed']()


def test_a_message_of_flask_mail_is_sent_unless_it_would_add_fields(shop, tmp_path):
    from flask_mail import BadHeaderError, Mail, Message

    shop.mailer = make_mailer()
    Mail(shop.app)
    with shop.app.app_context(), transaction.manager:
        shop.send(Message('Your order', [ADA], 'It is on its way.', sender=('Shop', SENDER), bcc=[BOB]))
        evil = Message('x\nX-Evil: yes', [ADA], 'x', sender=SENDER)
        with pytest.raises(BadHeaderError):
            shop.send(evil)
        # This is what the page warns of.
        assert b'\nX-Evil: yes' in evil.as_bytes()

    (mail,) = shop.mailer.outbox
    assert (mail.sender, sorted(mail.recipients), mail.subject) == (SENDER, [ADA, BOB], 'Your order')
    assert 'Bcc' not in mail.message
