"""The contracts, and whoever says that it keeps one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from zope.interface import implementedBy
from zope.interface.verify import verifyClass, verifyObject

import pyramid_mailqueue
from pyramid_mailqueue import interfaces
from pyramid_mailqueue.cli.send_test import ClaimForOneAttempt, OneAttempt
from pyramid_mailqueue.delivery.dispatch import BackgroundDispatcher, InlineDispatcher
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.retry import ExponentialBackoff
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.interfaces import (
    IBindableMailer,
    IClaim,
    IConnection,
    IDispatcher,
    IMailer,
    IMailQueue,
    IQueueAdmin,
    IRetryPolicy,
    ISessionQueue,
    ISessionStaging,
    IStaging,
    ITransport,
)
from pyramid_mailqueue.mailer import Mailer
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queue_runner import QueuedMessage
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.memory import MemoryQueue
from pyramid_mailqueue.queues.sql import SQLQueue
from pyramid_mailqueue.results import Reply, SendResult
from pyramid_mailqueue.testing import ScriptedSMTPServer
from pyramid_mailqueue.testing.outbox import AcceptingTransport, make_mailer
from pyramid_mailqueue.transports.base import as_transport
from pyramid_mailqueue.transports.debug import DebugInbox
from pyramid_mailqueue.transports.maildir import MaildirBackend
from pyramid_mailqueue.transports.redirect import redirecting
from pyramid_mailqueue.transports.smtp import SMTPTransport

CONTRACTS = [getattr(interfaces, name) for name in interfaces.__all__]


def implementers():
    """Every class of the package that says it keeps a contract."""
    for found in pkgutil.walk_packages(pyramid_mailqueue.__path__, 'pyramid_mailqueue.'):
        module = importlib.import_module(found.name)
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == found.name:
                yield from ((cls, contract) for contract in CONTRACTS if contract in implementedBy(cls))


@pytest.fixture
def objects(queue_dir, tmp_path):
    """An object for each contract and class."""
    queue = MaildirQueue(queue_dir)
    handler = MessageHandler([])
    background = BackgroundDispatcher(handler, queue)
    envelope = Envelope('a@site.example', ('b@site.example',), b'Subject: hello\r\n\r\nHello\r\n')
    claim = queue.put_claimed(envelope)
    in_memory = MemoryQueue()
    capturing = make_mailer()
    in_database = SQLQueue(f'sqlite:///{tmp_path}/queue.sqlite')
    in_database.database.create_tables()
    with ScriptedSMTPServer() as server:
        smtp = SMTPTransport(hostname=server.host, port=server.port, tls='off')
        session, redirected = smtp.connect(), redirecting(smtp, 'me@site.example').connect()
    yield [
        (IBindableMailer, Mailer(queue, handler, {}, Envelope.from_message)),
        (IMailQueue, queue),
        (IQueueAdmin, queue.admin),
        (IStaging, queue.staging()),
        (IClaim, claim),
        (IClaim, QueuedMessage(in_memory, in_memory.put_claimed(envelope))),
        (IMailQueue, in_memory),
        (IQueueAdmin, in_memory.admin),
        (IStaging, in_memory.staging()),
        (IClaim, in_memory.put_claimed(envelope)),
        (ISessionQueue, in_database),
        (IQueueAdmin, in_database.admin),
        (ISessionStaging, in_database.staging()),
        (IClaim, in_database.put_claimed(envelope)),
        (IBindableMailer, capturing),
        (IMailQueue, capturing.queue),
        (IStaging, capturing.queue.staging()),
        (ITransport, AcceptingTransport()),
        (ITransport, SMTPTransport(hostname='localhost')),
        (ITransport, redirecting(SMTPTransport(hostname='localhost'), 'me@site.example')),
        (ITransport, redirecting(SimpleNamespace(send=None), 'me@site.example')),
        (ITransport, redirecting(DebugInbox(tmp_path / 'inbox'), 'me@site.example')),
        (ITransport, MaildirBackend(tmp_path / 'other queue')),
        (ITransport, DebugInbox(tmp_path / 'inbox')),
        (ITransport, as_transport(SimpleNamespace(send=None))),
        (IConnection, session),
        (IConnection, redirected),
        (IRetryPolicy, ExponentialBackoff()),
        (IRetryPolicy, OneAttempt()),
        (IClaim, ClaimForOneAttempt(in_memory.put_claimed(envelope))),
        (IDispatcher, InlineDispatcher(handler, queue)),
        (IDispatcher, background),
    ]
    session.release()
    redirected.release()
    claim.release()
    background.close()
    in_database.close()


def test_every_object_keeps_its_contract(objects):
    for contract, obj in objects:
        assert verifyObject(contract, obj)


def test_no_class_that_promises_a_contract_is_forgotten_here(objects):
    assert {(type(obj), contract) for contract, obj in objects} == set(implementers())


@pytest.mark.parametrize(('cls', 'contract'), list(implementers()))
def test_every_class_has_the_methods_of_its_contract(cls, contract):
    assert verifyClass(contract, cls)


@pytest.mark.parametrize('contract', CONTRACTS)
def test_every_contract_is_prose(contract):
    for name in contract:
        assert contract[name].__doc__, f'{contract.__name__}.{name} says nothing'


def test_a_contract_counts_the_arguments_that_a_caller_gives():
    assert IMailer['enqueue'].getSignatureString() == '(message, sender=None, recipients=None)'
    assert ITransport['send'].getSignatureString() == '(sender, recipients, content)'
    assert ITransport['name'].__doc__ == 'A short name for logs; the name of the class where there is none.'


def test_an_interface_that_a_user_derives_is_written_as_any_other_without_self():
    def sign(message, key=None):
        """Sign it."""

    # What a class statement does.
    derived = type(IMailer)('ISigningMailer', (IMailer,), {'sign': sign})

    assert derived['sign'].getSignatureString() == '(message, key=None)'
    assert derived.extends(IMailer)


# --- nothing is asked for that is not declared ------------------------------


def only(contract, obj):
    """The same object, with nothing but the members that its contract declares."""

    class Only:
        def __getattr__(self, name):
            if name not in contract:
                raise AttributeError(name)
            value = getattr(obj, name)
            return (lambda *args, **options: declared(value(*args, **options))) if callable(value) else value

    return Only()


def declared(value):
    """What a member returns, likewise."""
    if isinstance(value, list | Iterator):
        return map(declared, value) if isinstance(value, Iterator) else [*map(declared, value)]
    kept = [contract for contract in (IStaging, IClaim) if contract.providedBy(value)]
    return only(kept[0], value) if kept else value


class Recorder:
    """A server that is asked to come back later once."""

    name = 'recorder'

    def __init__(self):
        self.sent = []

    def send(self, sender, recipients, content):
        self.sent.append(recipients)
        reply = Reply(250) if len(self.sent) > 1 else Reply(451, 'later')
        return SendResult(dict.fromkeys(recipients, reply))

    def close(self):
        pass


def test_parts_of_ones_own_need_no_more_than_their_contracts_declare(make_app, message):
    recorder, memory = Recorder(), MemoryQueue()
    queue, transport = only(IMailQueue, memory), only(ITransport, recorder)
    handler = MessageHandler([transport], retry_policy=only(IRetryPolicy, ExponentialBackoff(1, 2, 3)))
    inline = only(IDispatcher, InlineDispatcher(handler, queue))
    mailer = Mailer(queue, handler, {'inline': inline}, Envelope.from_message, delivery='inline')
    assert verifyObject(IMailQueue, queue, tentative=True)

    def view(request):
        request.mailer.send(message('later'))
        savepoint = request.tm.savepoint()
        request.mailer.send(message('never'))
        savepoint.rollback()
        request.mailer.enqueue(message('with the next run'))
        return ''

    app = make_app(view, {}, configure=lambda config: config.registry.registerUtility(mailer, IMailer))
    app.get('/')
    assert len(recorder.sent) == 1
    assert memory.counts()['waiting'] == 2

    memory.admin.flush()
    report = Runner(queue, handler).run()

    assert (report.sent, report.trouble) == (2, None)
    assert mailer.send_immediately(message('now'))
    assert len(recorder.sent) == 4
    assert not any(memory.counts().values())
