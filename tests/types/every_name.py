"""A user's file with every public name, for mypy and pyright at their strictest: see ``tests/test_types.py``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pyramid_mailqueue
import pyramid_mailqueue.testing
from pyramid_mailqueue import (
    AddressError,
    Burial,
    ConfigurationError,
    Dropped,
    Envelope,
    IMailer,
    ITransactionSource,
    ITransport,
    MailBuried,
    MailDeferred,
    MailDelivered,
    MaildirBackend,
    Mailer,
    MailEvent,
    MailQueued,
    MailqueueError,
    MessageError,
    MessageHandler,
    MessageTooLarge,
    MQAction,
    MQSignal,
    NoActiveTransaction,
    NoRecipients,
    NoSuchMessage,
    Offer,
    PluginMessage,
    PluginRegistry,
    QueuedMessage,
    QueueEntry,
    QueueError,
    QueueFileError,
    QueueStats,
    Rate,
    Recovery,
    Reply,
    RunReport,
    SendResult,
    ServerTrouble,
    Settings,
    Settlement,
    Tally,
    TooManyRecipients,
    WrongState,
    check_address,
    enqueue_message,
    get_mailer,
    includeme,
    init_smtp_mailer,
    mailer_from_settings,
    one_shot_queue_run,
    registry,
)
from pyramid_mailqueue.interfaces import (
    IBindableMailer,
    IClaim,
    IConnection,
    IDispatcher,
    IMailQueue,
    IQueueAdmin,
    IRetryPolicy,
    ISender,
    ISessionQueue,
    ISessionStaging,
    IStaging,
)
from pyramid_mailqueue.testing import (
    EXTENSIONS,
    Answer,
    CapturedMail,
    CapturingMailer,
    Close,
    Drip,
    Outbox,
    ReceivedMessage,
    ScriptedSMTPServer,
    ServerSession,
    Silence,
    Wait,
    captured_mail,
    mail_discarded,
    make_mailer,
)
from pyramid_mailqueue.transports.base import Transport

# --- sending ----------------------------------------------------------------


class Request:
    """What the views of an application use of a request."""

    def __init__(self, mailer: IMailer) -> None:
        self.mailer = mailer


def view(request: Request, message: EmailMessage) -> str:
    mailer: IMailer = get_mailer(request)
    result: SendResult = mailer.send_immediately(message, 'shop@site.example', [check_address('ada@x.example')])
    if not result or result.queued:
        mailer.enqueue(message, recipients='ada@x.example')
    return request.mailer.send(message, delivery='inline')


def configure(config: Any, settings: Mapping[str, object]) -> None:
    includeme(config)
    pyramid_mailqueue.includeme(config)
    pyramid_mailqueue.testing.includeme(config)
    mailer: Mailer = mailer_from_settings(settings, prefix='mail.')
    as_a_contract: IMailer = mailer
    config.registry.registerUtility(as_a_contract, IMailer)
    queue: IMailQueue = mailer.queue
    print(queue.counts()['waiting'], queue.admin)
    mailer.close()


class OwnMailer:
    """Fits the contract; it need not say so to a type checker."""

    def __init__(self, wrapped: IMailer) -> None:
        self._wrapped = wrapped

    def send(
        self,
        message: Any,
        sender: str | None = None,
        recipients: Sequence[str] | str | None = None,
        delivery: str | None = None,
        session: Any = None,
    ) -> str:
        return self._wrapped.send(message, sender, recipients, delivery, session)

    def send_immediately(
        self, message: Any, sender: str | None = None, recipients: Sequence[str] | str | None = None
    ) -> SendResult:
        return self._wrapped.send_immediately(message, sender, recipients)

    def enqueue(self, message: Any, sender: str | None = None, recipients: Sequence[str] | str | None = None) -> str:
        return self._wrapped.enqueue(message, sender, recipients)


class OwnBindableMailer(OwnMailer):
    def bound_to(self, transactions: ITransactionSource) -> IMailer:
        print(transactions.manager, transactions.current(), transactions.of_request('dbsession'))
        return OwnMailer(self)


def wrapped(mailer: IMailer) -> IBindableMailer:
    if IBindableMailer.providedBy(mailer):
        return mailer
    return OwnBindableMailer(mailer)


# --- the parts --------------------------------------------------------------


class Pigeons(Transport):
    name = 'pigeons'

    def send(self, sender: str, recipients: Sequence[str], content: bytes, /) -> SendResult:
        return SendResult({recipient: Reply(250, 'has left', '2.0.0') for recipient in recipients}, self.name)

    def close(self) -> None:
        pass


class Doves:
    """The least that a transport can be; its arguments may have other names."""

    def send(self, from_addr: str, to_addrs: tuple[str, ...], message: bytes) -> bool:
        return True


class Flock(Pigeons):
    """One of these leaves for each message."""

    def connect(self, instead_of: IConnection | None = None) -> IConnection | None:
        return None


def make_pigeons(settings: Settings) -> ITransport:
    limit: Rate | None = settings.rate_limit
    print(limit and limit.count / limit.seconds)
    return Pigeons()


def handler_of(settings: Mapping[str, object]) -> MessageHandler:
    transports: list[ISender] = [init_smtp_mailer(settings), MaildirBackend('/path/to/queue'), Doves()]
    return MessageHandler(transports, retry_policy=Once(), plugins=('one',))


class Once:
    def decide(
        self, recipients: Sequence[str], attempts: int, queued_at: float, result: SendResult, now: float
    ) -> Settlement:
        return Settlement(burials=(Burial(tuple(recipients), 'tried once'),)) if attempts else Settlement(due=now)


policy: IRetryPolicy = Once()


def deliver(handler: MessageHandler, message: bytes, queue_dir: Path) -> bool:
    path: str = enqueue_message(message, queue_dir, 'shop@site.example', ['ada@x.example'])
    held: QueuedMessage = enqueue_message(message, queue_dir, return_msg=True, in_progress=True)
    as_a_claim: IClaim = held
    print(path, as_a_claim.envelope.content, as_a_claim.attempts + 1, as_a_claim.queued_at - 1)
    was_sent: SendResult = handler.send_message(held)
    report: RunReport = one_shot_queue_run(
        queue_dir, options={'verbose': True}, settings={'smtp_hostname': 'localhost', 'mh': handler}
    )
    recovery: Recovery = report.recovery
    trouble: ServerTrouble | None = report.trouble
    print(recovery.orphans, trouble, report.sent + report.deferred)
    return bool(was_sent)


def offered(offer: Offer) -> Envelope:
    envelope = Envelope(offer.sender, offer.recipients, offer.content)
    text: str = envelope.message_id
    return Envelope.from_message(envelope.content, default_sender=text)


def look(queue: IMailQueue, now: float) -> list[IClaim]:
    admin: IQueueAdmin = queue.admin
    entries: Iterator[QueueEntry] = admin.entries(['waiting'])
    stats: QueueStats = admin.stats(['dead'])
    waiting: Tally = stats.by_state['waiting']
    print([entry.recipients for entry in entries], stats.by_domain, waiting.oldest)
    admin.hold(admin.find('1').id)
    return list(queue.claim_due(now))


def stage(queue: IMailQueue, envelope: Envelope, dispatcher: IDispatcher, session: object) -> None:
    if ISessionQueue.providedBy(queue):
        in_session: ISessionStaging = queue.staging()
        in_session.join(session)
    staging: IStaging = queue.staging()
    staging.add(envelope, claimed=True)
    staging.prepare()
    published: Sequence[IClaim | Dropped | None] = staging.publish()
    dispatcher.dispatch([claim for claim in published if claim and not isinstance(claim, Dropped)])


# --- what happened ----------------------------------------------------------


def on_any(event: MailEvent) -> str:
    match event:
        case MailQueued():
            return event.message_id
        case MailDelivered():
            return event.via
        case MailDeferred():
            return f'{event.reason} {(event.due or 0.0) + event.attempts}'
        case MailBuried():
            return event.reason
        case _:
            return ', '.join(event.envelope.recipients)


def on_failure(_: object, msg: PluginMessage, send_result: SendResult) -> MQAction | None:
    settlement: Settlement | None = send_result.settlement
    print(settlement and settlement.due, msg.queue_date.year, msg.msg_id or '', send_result.replies)
    return MQAction.DISCARD if msg.retries > 1 else None


def initialize(context: dict[str, Any], registry: PluginRegistry) -> None:
    signal: MQSignal = MQSignal.delivery_failed
    registry.connect(signal, on_failure)
    registry.connect(MQSignal.delivery_successful, on_failure)
    context['text'] = signal.upper()


def terminate(context: dict[str, Any]) -> None:
    if registry.has_receivers(MQSignal.delivery_failed):
        registry.disconnect(MQSignal.delivery_failed, on_failure)


def what_is_wrong(call: Callable[[], object]) -> str:
    try:
        call()
    except ServerTrouble as error:
        return f'{error} {error.code}'
    except (NoRecipients, TooManyRecipients, MessageTooLarge, AddressError) as error:
        as_message_error: MessageError = error
        return str(as_message_error)
    except (MessageError, ConfigurationError, NoActiveTransaction, NoSuchMessage, WrongState):
        return 'mistake'
    except (QueueFileError, QueueError) as error:
        as_any: MailqueueError = error
        return str(as_any)
    return ''


# --- in tests ---------------------------------------------------------------


def test_something() -> None:
    mailer: CapturingMailer = make_mailer({})
    outbox: Outbox = captured_mail()
    mails: Collection[CapturedMail] = [*outbox, *mailer.outbox, *outbox.discarded, *mail_discarded()]
    for mail in mails:
        message: EmailMessage = mail.message
        print(message['From'], mail.text + mail.html + mail.subject, mail.recipients)
    script: dict[str, Answer] = {
        'EHLO': '250-site.example\r\n250 ' + EXTENSIONS[0],
        'MAIL': [Wait(threading.Event(), '250 ok'), Drip('250 ok', 0.1), Silence()],
        'RCPT': Close('421 bye'),
    }
    with ScriptedSMTPServer(script, tls=None) as server:
        received: list[ReceivedMessage] = server.messages
        sessions: list[ServerSession] = server.sessions
        print(server.host, server.port, received, sessions)
