"""Each situation on the page is brought about, its commands are typed, and what the page shows is what is seen."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shlex
import ssl
import subprocess
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import docutils.core
import docutils.nodes
import pytest
import transaction
import trustme

from pyramid_mailqueue import mailer_from_settings
from pyramid_mailqueue.cli import queue, run, send_test
from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.testing import EXTENSIONS, Close, ScriptedSMTPServer
from tests.parts.demo import free_ports
from tests.parts.faults import Refusal, intercepted, without_sync
from tests.parts.maildir import clear, forget, stage
from tests.parts.shown import COLUMNS, as_patterns, steps_of

PAGE = Path(__file__).parents[2] / 'docs/troubleshooting.rst'
STEPS = [step for step in steps_of(PAGE) if step.kind == 'command']

COMMANDS = {'mq-queue': queue.main, 'mq-run': run.main, 'mq-send-test': send_test.main}
ADA, BOB, CYD = 'ada@home.example', 'bob@work.example', 'cyd@work.example'
MINUTE, HOUR = 60, 3600
AWAY = '451 4.3.0 try again later'


class Screen(io.StringIO):
    def isatty(self):
        return True


class World:
    """The shop of the page in a folder: its queue, its ini file, its logs and what is typed."""

    def __init__(self, folder):
        self.folder = folder
        self.queue = MaildirQueue(folder / 'queue', clock=lambda: time.time() - self._age)
        self._age = 0
        self._number = 4710
        self._ids = {}
        self._seen, self.status = '', 0
        (folder / 'log').mkdir()
        self.ini()

    def ini(self, port=None, **own):
        self.port = port or free_ports(1)[0]
        settings = {
            'queue_dir': self.folder / 'queue',
            'default_sender': 'shop@site.example',
            'smtp_hostname': '127.0.0.1',
            'smtp_port': self.port,
            'smtp_local_hostname': 'shop.site.example',
            'delivery_log': self.folder / 'log/delivery.log',
            'queue_log': self.folder / 'log/queue.log',
            'plugins': 'none',
            **own,
        }
        keys = '\n'.join(f'mailqueue.{name} = {value}' for name, value in settings.items())
        (self.folder / 'production.ini').write_text(f'[app:main]\nuse = egg:shop\n{keys}\n')

    def envelope(self, *to, sender='shop@site.example', subject='Your order', text='Thank you.  It is on its way.'):
        self._number += 1
        header = {
            'From': sender,
            'To': ', '.join(to),
            'Subject': f'{subject} {self._number}',
            'Date': 'Tue, 24 Nov 2026 07:28:11 +0000',
            'Message-ID': f'<179550529127.{self._number}.8080822255445987428@site.example>',
        }
        lines = [*(f'{name}: {value}' for name, value in header.items()), '', text, '']
        return Envelope(sender, to, '\r\n'.join(lines).encode())

    def put(self, *to, age=0, **own):
        self._age = age
        try:
            return self.queue.put(self.envelope(*to, **own))
        finally:
            self._age = 0

    @contextlib.contextmanager
    def serving(self, script=None, *, settings=None, **options):
        with ScriptedSMTPServer(script, **options) as server:
            self.ini(server.port, **(settings or {}))
            yield server

    # --- between the page and this machine ---

    def as_here(self, command):
        for theirs, ours in self._places:
            command = command.replace(theirs, ours)
        return re.sub(r'(?<= )\d{10}\S*', lambda match: self._id_here(match[0]), command)

    def as_there(self, text):
        for theirs, ours in self._places:
            text = text.replace(ours, theirs)
        text = text.replace(f'127.0.0.1:{self.port}', 'mail.site.example:587').replace(str(self.port), '587')
        return text.replace('127.0.0.1', 'mail.site.example').replace('scripted.test', 'mail.site.example')

    @property
    def _places(self):
        return (
            ('/var/spool/shop', f'{self.folder}/queue'),
            ('/var/log/shop', f'{self.folder}/log'),
            ('production.ini', f'{self.folder}/production.ini'),
        )

    def _id_here(self, beginning):
        (found,) = {ours for theirs, ours in self._ids.items() if theirs.startswith(beginning)}
        return found

    def type(self, command):
        """Return what is seen, as the page has it."""
        if command == 'echo $?':
            self._seen = f'{self.status}\n'
            return self._seen
        command, _, last = command.partition(' | tail -n ')
        name, *arguments = re.sub("'(.*)'", lambda match: match[1].replace(' ', '\0'), self.as_here(command)).split()
        if name in COMMANDS:
            self.status, seen = self._call(name, [argument.replace('\0', ' ') for argument in arguments])
        else:
            done = subprocess.run(self.as_here(command), shell=True, capture_output=True, text=True, check=True)
            self.status, seen = 0, done.stdout
        if last:
            seen = ''.join(seen.splitlines(keepends=True)[-int(last) :])
        self._seen = seen
        return self.as_there(seen)

    def remember(self, shown):
        """Which id of the page is which here."""
        pattern = r'\d{10}\.M\d+P\d+Q\d+R\w{8}\.[\w.-]*\w'
        self._ids |= dict(zip(re.findall(pattern, shown), re.findall(pattern, self._seen), strict=True))

    def _call(self, name, arguments):
        # Cron has no terminal.
        screen = io.StringIO() if name == 'mq-run' else Screen()
        with _logging_as_before(), contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            try:
                COMMANDS[name](arguments)
            except SystemExit as exit_:
                return exit_.code, screen.getvalue()
        raise AssertionError(f'{name} does not exit')

    def log_as_the_application(self):
        return _logging_to(self.folder / 'log/app.log')


@contextlib.contextmanager
def _logging_as_before():
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        for logger, handlers, level, propagate in before:
            for handler in logger.handlers[:]:
                if handler not in handlers:
                    logger.removeHandler(handler)
                    handler.close()
            logger.setLevel(level)
            logger.propagate = propagate


@contextlib.contextmanager
def _logging_to(path):
    with _logging_as_before():
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
        logger = logging.getLogger('mailqueue')
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        yield


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(COLUMNS))
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setattr('sys.argv', ['mq-queue'])
    return World(tmp_path)


# --- the situations: each yields for as many commands as are typed in it -----


def mail_is_not_going_out(world):
    world.put(ADA, age=3.5 * HOUR)
    world.put(BOB, CYD, age=12 * MINUTE)
    yield 5


def the_queue_grows(world):
    with intercepted(without_sync):
        ages = {'home.example': (7,), 'work.example': (3, 25), 'school.example': (100,)}
        for domain, minutes in ages.items():
            for age in minutes:
                world.put(f'ada@{domain}', age=(age - 0.5) * MINUTE)
        yield 1
        clear(world.queue)
        for number in range(60):
            domain = ('home.example', 'work.example', 'home.example', 'school.example')[number % 4]
            world.put(f'ada@{domain}', age=(1.9 * number + 1.5) * MINUTE)
        yield 1
        with world.serving():
            yield 2


def somebody_got_it_twice(world):
    name = world.put(ADA)
    with world.serving({'.': [Close()]}):
        world.type('mq-run production.ini')
        world.queue.admin.retry(name)
        world.type('mq-run production.ini')
        yield 1
        forget(world.queue.put_claimed(world.envelope(BOB)))
        yield 2


def somebody_did_not_get_it(world):
    manager = transaction.TransactionManager(explicit=True)
    settings = {'queue_dir': str(world.folder / 'queue'), 'smtp_hostname': '127.0.0.1', 'delivery': 'queue'}
    mailer = mailer_from_settings({f'mailqueue.{name}': value for name, value in settings.items()}, manager=manager)
    with world.log_as_the_application():
        for envelope in (world.envelope(CYD), world.envelope(CYD)):
            manager.begin()
            mailer.send(envelope.content, sender=envelope.sender, recipients=envelope.recipients)
            manager.abort() if '4711' in str(envelope.content) else manager.commit()
    mailer.close()
    with world.serving({'RCPT': [AWAY]}):
        world.type('mq-run production.ini')
        yield 4


def a_message_is_in_doubt(world):
    forget(stage(world.queue, (world.envelope(ADA), False)))
    with world.serving():
        yield 7


def dead_letters(world):
    world.put(BOB)
    with world.serving({'RCPT': [f'550 5.1.1 <{BOB}>: no such user']}):
        yield 6


def the_disk_is_full(world):
    world.put(ADA)
    world.put(BOB, CYD)
    is_full = Refusal('ENOSPC', lambda call: call.creates or call.name == 'writev')
    with world.serving({f'RCPT TO:<{CYD}>': [AWAY]}) as server:
        with intercepted(is_full):
            with pytest.raises(QueueError) as refused:
                world.put(ADA)
            assert 'cannot take the message: No space left on device' in str(refused.value)
            assert 'cannot take the message: No space left on device' in PAGE.read_text('utf-8')
            assert world.type('mq-queue production.ini check').startswith('MAILQUEUE OK')
            yield 3
        yield 2
        assert [it.recipients for it in server.messages] == [(ADA,), (BOB,), (BOB, CYD)]


def the_certificate_has_expired(world):
    authority, now = trustme.CA(), datetime.now(timezone.utc)
    authority.cert_pem.write_to_path(world.folder / 'ca.pem')
    settings = {'smtp_tls': 'starttls', 'smtp_tls_ca_file': world.folder / 'ca.pem'}
    world.put(ADA)
    for end in (now - timedelta(days=1), now + timedelta(days=90)):
        certificate = authority.issue_cert('127.0.0.1', not_before=now - timedelta(days=90), not_after=end)
        with world.serving(tls=_context(certificate), settings=settings):
            yield 1


def _context(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def the_password_has_changed(world):
    world.put(ADA)
    login = {'smtp_username': 'shop', 'smtp_password': 'secret'}
    extensions = (*EXTENSIONS, 'AUTH PLAIN LOGIN')
    with world.serving({'AUTH': '535 5.7.8 authentication failed'}, extensions=extensions, settings=login):
        yield 1
    with world.serving(extensions=extensions, settings={**login, 'smtp_password': 'new'}):
        yield 2


def a_loop_floods_the_queue(world):
    with intercepted(without_sync):
        for number in range(240):
            age = 40 + 10 * number if number < 2 else 70 + 0.9 * number
            what = {'sender': 'errors@site.example', 'subject': 'Error', 'text': 'No such page'}
            world.put('alerts@home.example', age=age, **what)
        for number in range(4):
            world.put(f'ada@{"work" if number % 2 else "school"}.example', age=(20 * number + 12) * MINUTE)
        with world.serving() as server:
            yield 5
            assert {message.sender for message in server.messages} == {'shop@site.example'}
        yield 1


SITUATIONS = {
    situation.__name__: situation
    for situation in (
        mail_is_not_going_out,
        the_queue_grows,
        somebody_got_it_twice,
        somebody_did_not_get_it,
        a_message_is_in_doubt,
        dead_letters,
        the_disk_is_full,
        the_certificate_has_expired,
        the_password_has_changed,
        a_loop_floods_the_queue,
    )
}


def as_shown(text):
    """Without what depends on chance (the first wait is 5 minutes, give or take 10 %), or on how fast this is."""
    return as_patterns(re.sub(r'\b[45]m\b', 'SOON', re.sub(r'\boldest=\d+s', 'oldest=SECONDS', text)))


def name_of(section):
    return section.lower().replace(' ', '_')


def played(world, name):
    """Yield each command of a situation as the page has it, with what is seen here."""
    steps = [step for step in STEPS if name_of(step.section) == name]
    for number in SITUATIONS[name](world):
        for _ in range(number):
            step = steps.pop(0)
            yield step, world.type(step.what)
    assert not steps


@pytest.mark.parametrize('name', SITUATIONS)
def test_what_the_page_shows_is_what_one_sees(world, name):
    for step, seen in played(world, name):
        assert as_shown(seen) == as_shown(step.text), step.what
        world.remember(step.text)


def test_every_situation_on_the_page_is_brought_about():
    assert list(dict.fromkeys(name_of(step.section) for step in STEPS)) == list(SITUATIONS)


def _commands_in_passing():
    settings = {'report_level': 1, 'halt_level': 1}
    page = docutils.core.publish_doctree(PAGE.read_text('utf-8'), settings_overrides=settings)
    texts = [node.astext() for node in page.findall(docutils.nodes.literal)]
    texts += [line for node in page.findall(docutils.nodes.literal_block) for line in node.astext().splitlines()]
    return [text for text in texts if re.match(r'mq-\S+ production\.ini', text)]


@pytest.mark.parametrize('command', _commands_in_passing())
def test_a_command_that_is_named_in_passing_can_be_typed(command):
    name, *arguments = shlex.split(command)
    parsers = {'mq-queue': queue._parser, 'mq-run': run._parser, 'mq-send-test': send_test._parser}

    assert parsers[name]().parse_args(arguments).ini == 'production.ini'
