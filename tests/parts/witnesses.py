"""Who watches a process that dies: a database that has committed or not, and whoever the mail has arrived at."""

from __future__ import annotations

import os

import transaction

from pyramid_mailqueue.datamanager import MailDataManager
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import Reply, SendResult

CONTENT = b'Subject: hello\r\nMessage-ID: <1@site.example>\r\n\r\nhello\r\n'
FIRST, SECOND = (Envelope('sender@site.example', (f'{name}@x.example',), CONTENT) for name in ('first', 'second'))
ENVELOPE_OF_THREE = Envelope(
    'sender@site.example', ('accepted@x.example', 'deferred@x.example', 'refused@x.example'), CONTENT
)
MIXED = {'deferred@x.example': Reply(451, 'later'), 'refused@x.example': Reply(550, 'no such user')}


class Notes:
    """A file of lines that outlives the processes that write it."""

    def __init__(self, path):
        self._path = path
        path.write_text('')

    def add(self, line):
        # One write at the end of the file: lines of several processes do not mix.
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, f'{line}\n'.encode())
        os.close(fd)

    def __contains__(self, line):
        return line in self._lines

    @property
    def _lines(self):
        return self._path.read_text().splitlines()

    @property
    def delivered(self):
        """The recipients who got a message, in the order of time."""
        return [line.removeprefix('delivered ') for line in self._lines if line.startswith('delivered ')]


class Recording:
    """A transport that accepts for everybody, but for those for whom it is told to say something else."""

    def __init__(self, notes, replies=None):
        self._notes = notes
        self._replies = replies or {}

    def send(self, sender, recipients, content):
        replies = {recipient: self._replies.get(recipient, Reply(250, 'ok')) for recipient in recipients}
        for recipient, reply in replies.items():
            if reply.accepted:
                self._notes.add(f'delivered {recipient}')
        return SendResult(replies)


class TwoPhase:
    """A database that commits in the second phase, before the mail is published."""

    transaction_manager = None
    key = 'database'

    def __init__(self, notes):
        self._notes = notes

    def sortKey(self):
        return self.key

    def tpc_begin(self, txn): ...

    commit = tpc_vote = tpc_abort = abort = tpc_begin

    def tpc_finish(self, txn):
        self._notes.add('committed')


class OnePhase(TwoPhase):
    """As a session of zope.sqlalchemy without two phases: it commits when it is asked for its vote."""

    key = '~sqlalchemy:1'

    def tpc_vote(self, txn):
        self._notes.add('committed')

    def tpc_finish(self, txn): ...


class Dispatcher:
    """Delivers what is dispatched when it is told to."""

    def __init__(self):
        self.claims = []

    def dispatch(self, claims):
        self.claims += claims


def commit_two(queue, notes, database, transport=None):
    """Commit two messages and a row; then deliver what this process has claimed, if there is a *transport*."""
    manager = transaction.TransactionManager(explicit=True)
    txn = manager.begin()
    txn.join(database(notes))
    dispatcher = Dispatcher()
    mail = MailDataManager(txn, manager, queue.staging(), {'background': dispatcher})
    mail.add(FIRST, 'background')
    mail.add(SECOND, 'background' if transport else 'queue')
    manager.commit()
    notes.add('acknowledged')
    if transport:
        handler = MessageHandler([transport])
        for claim in dispatcher.claims:
            assert claim.begin()
            handler.deliver(claim)
        queue.flush()
