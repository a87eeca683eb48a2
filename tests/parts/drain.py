"""Messages whose recipients fare differently, the server that knows how, and a run that brings them there."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections import Counter
from pathlib import Path

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.queue_file import read_envelope
from pyramid_mailqueue.testing import ScriptedSMTPServer
from pyramid_mailqueue.transports.smtp import SMTPTransport
from tests.parts.faults import connecting, intercepted, without_sync
from tests.parts.maildir import HOUR, at, clear, names, put, where

#: A message with more recipients than that goes out in several transactions, and is kept in between.
MAX_RECIPIENTS = 3


def letter(name, *recipients, sender='sender@site.example'):
    content = f'Subject: {name}\r\nMessage-ID: <{name}@site.example>\r\n\r\n.{name}\r\n.\r\n{"." * 70}\r\n'
    return Envelope(sender, tuple(f'{recipient}@x.example' for recipient in recipients), content.encode())


# What becomes of a recipient is in its name.
MAIL = (
    letter('first', 'taken-1'),
    letter('mixed', 'taken-2', 'grey-2', 'refused-2'),
    letter('bounce', 'taken-3', sender=''),
    letter('many', 'taken-4a', 'grey-4', 'taken-4b', 'taken-4c', 'refused-4', 'taken-4d', 'taken-4e'),
    letter('grey', 'grey-5'),
    letter('refused', 'refused-6'),
    letter('last', 'taken-7'),
)


def letters(number):
    """Messages that are all taken."""
    return [letter(f'{n}', f'taken-{n}') for n in range(number)]


def everybody(fate, mail=MAIL):
    """A counter with one for each message and recipient of this fate."""
    return Counter(
        (name_of(envelope.content), recipient)
        for envelope in mail
        for recipient in envelope.recipients
        if recipient.startswith(fate)
    )


def name_of(content):
    return re.search(rb'\r\nMessage-ID: <(.*)@site.example>', content)[1].decode()


CONTENTS = {name_of(envelope.content): envelope.content for envelope in MAIL}


class Office:
    """A mail server: it puts off who is grey, and refuses who is refused."""

    def __init__(self):
        self.is_late = False
        self.server = ScriptedSMTPServer({'RCPT': self._answer_to, '.': self._on_content})
        self._sessions_to_wait_for = 0

    def _answer_to(self, command):
        if '<refused' in command:
            return '550 5.1.1 no such user'
        if '<grey' in command and not self.is_late:
            return '451 4.7.1 come back later'
        return None

    def _on_content(self, command):
        # A run opens its other sessions when the first message has its outcome: then nobody is to be too quick.
        if self.server.messages:
            self.server.wait_for(lambda: len(self.server.sessions) >= self._sessions_to_wait_for)

    def open_for(self, sessions):
        """Forget what was, and take more than one message when there are so many sessions."""
        self.is_late = False
        self.server.messages.clear()
        self.server.sessions.clear()
        self._sessions_to_wait_for = sessions

    def send_home(self):
        """Wait for nobody any more."""
        with self.server.recording():
            self._sessions_to_wait_for = 0

    @property
    def accepted(self):
        """How often each message was accepted for each recipient, by clients that are gone."""
        self.server.wait_for(lambda: all(session.is_over for session in self.server.sessions))
        for message in self.server.messages:
            assert message.content == CONTENTS[name_of(message.content)]
        return Counter((name_of(m.content), recipient) for m in self.server.messages for recipient in m.recipients)


def fill(queue, mail=MAIL):
    """Empty the queue, and put *mail* into it, due in its order."""
    clear(queue)
    with intercepted(without_sync):
        for number, envelope in enumerate(mail):
            put(queue, envelope, due=number + 1)


def drain(path, office, *, connections=1, around=without_sync, later=0):
    """What mq-run does: now, or so many seconds later."""
    with intercepted(around):
        transport = SMTPTransport(
            hostname=office.server.host,
            port=office.server.port,
            local_hostname='client.test',
            tls='off',
            max_recipients=MAX_RECIPIENTS,
            connect=connecting(around),
        )

        def clock():
            return time.time() + later

        handler = MessageHandler([transport], connections=connections, clock=clock)
        return Runner(MaildirQueue(path, clock=clock), handler, clock=clock).run()


def drain_in_runs(path, office, *, around=without_sync, most=10):
    """One run after the other, until one comes to its end; return how many ended because of an outcome or a folder."""
    for number in range(most):
        with contextlib.suppress(QueueError):
            drain(path, office, around=around)
            return number
    return most


def mq_run(queue, office, *, connections=1):
    """Return the command that does the same, with an ini file beside the queue."""
    keys = {
        'queue_dir': queue.path,
        'smtp_hostname': office.server.host,
        'smtp_port': office.server.port,
        'smtp_local_hostname': 'client.test',
        'smtp_connections': connections,
        'max_recipients': MAX_RECIPIENTS,
        'plugins': 'none',
    }
    ini = Path(f'{queue.path}.ini')
    ini.write_text('\n'.join(['[app:main]', 'use = egg:none', *(f'mailqueue.{k} = {v}' for k, v in keys.items())]))
    return [sys.executable, '-m', 'pyramid_mailqueue.cli.run', str(ini)]


@contextlib.contextmanager
def blaming(what):
    """Name what is to blame for an assertion that fails."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f'after a {what}') from error


def named_in(queue, folder):
    """How many files of a folder name each message and recipient; all of them are whole."""
    found = Counter()
    for name in names(queue, folder):
        with at(queue, folder, name).open('rb') as file:
            _, envelope = read_envelope(file.read())
        assert envelope.content == CONTENTS[name_of(envelope.content)]
        found.update((name_of(envelope.content), recipient) for recipient in envelope.recipients)
    return found


def assert_is_made_good(queue, office, *, in_hand):
    """
    What a run has left is made good by the next ones, which repeat only what was in hand; return that.

    :param in_hand: so many messages may have been accepted before, and not written down as such
    """
    repeated = assert_nobody_is_lost(queue, office)
    assert set(repeated.values()) <= {1}
    # Of a message that goes out in several transactions one was in hand.
    times = Counter(name for name, _ in repeated)
    assert len(times) <= in_hand
    assert all(recipients <= MAX_RECIPIENTS for recipients in times.values())
    # Versions that were being written.
    assert len(names(queue, 'tmp')) <= in_hand
    return repeated


def assert_nobody_is_lost(queue, office, *, later=0):
    """
    Let two runs go undisturbed, the second one when the server takes the grey ones too; return who got a message twice.

    :param later: in how many seconds the first one begins
    """
    drain(queue.path, office, later=later)
    accepted, taken = office.accepted, everybody('taken')
    assert accepted.keys() == taken.keys()
    assert named_in(queue, 'new') == everybody('grey')
    assert all(is_not_due(queue, name) for name in names(queue, 'new'))
    assert named_in(queue, 'dead') == everybody('refused')
    assert where(queue).keys() <= {'tmp', 'new', 'dead'}

    office.is_late = True
    drain(queue.path, office, later=later + 2 * HOUR)
    assert office.accepted - accepted == everybody('grey')
    assert named_in(queue, 'dead') == everybody('refused')
    assert where(queue).keys() <= {'tmp', 'dead'}
    return accepted - taken


def is_not_due(queue, name):
    return at(queue, 'new', name).stat().st_mtime > time.time() + 60
