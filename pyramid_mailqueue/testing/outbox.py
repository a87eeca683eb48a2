"""
The mail that an application has sent in a test.

Only the end is simulated: a :class:`CapturingMailer` is the mailer that the application has in production, with its
envelopes, its data manager and its queue's two phases.  But the queue is in memory, and every attempt succeeds.  The
outbox sees what goes through the queue::

    send() --> pending --commit--> the outbox itself
                  |
                  +----abort, or a savepoint that is rolled back--> discarded

Mail is tried before the commit returns, also if ``mailqueue.delivery = background``: a test need not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from functools import cached_property
from typing import Any

from zope.interface import implementer

from pyramid_mailqueue.delivery.dispatch import InlineDispatcher
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.events import MailEvent
from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.interfaces import IClaim, IMailer, ITransport
from pyramid_mailqueue.mailer import Mailer
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.contents import body_of
from pyramid_mailqueue.queues.entries import subject_of
from pyramid_mailqueue.queues.memory.messages import MemoryMessages
from pyramid_mailqueue.queues.memory.queue import MemoryClaim, MemoryQueue, MemoryStaging
from pyramid_mailqueue.results import Reply, SendResult
from pyramid_mailqueue.sending import build_compose
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.transactions import ITransactionSource, ManagerTransaction
from pyramid_mailqueue.transports.base import Transport

__all__ = ['CapturedMail', 'CapturingMailer', 'Outbox', 'captured_mail', 'mail_discarded', 'make_mailer']

#: The name under which the mailer is registered a second time: one of the application's own may wrap it.
CAPTURING = 'pyramid_mailqueue.testing'

# What is required in production, and of no use here.
_NOT_NEEDED = {'mailqueue.queue_dir': '/nowhere', 'mailqueue.smtp_hostname': 'localhost'}


def _field(name: str, value: str) -> Any:
    """Return a field of a message as the library reads it; with an empty value if that raises an exception."""
    try:
        return default.header_factory(name, value)
    except Exception:  # noqa: BLE001 - whatever an odd field makes the library raise, the others can be read
        return default.header_factory(name, '')


_TOLERANT = default.clone(header_factory=_field)


@dataclass(frozen=True, repr=False)
class CapturedMail:
    """
    One message, as it would have gone out.

    :param envelope: the sender and the recipients that a server would have been told, and the bytes of the content
    """

    envelope: Envelope

    def __repr__(self) -> str:
        return f'<CapturedMail {self.subject!r} to {", ".join(self.recipients)}>'

    @property
    def sender(self) -> str:
        """The envelope sender; ``''`` is the null sender."""
        return self.envelope.sender

    @property
    def recipients(self) -> tuple[str, ...]:
        """All recipients of the message, ``Bcc`` too."""
        return self.envelope.recipients

    @property
    def message_id(self) -> str:
        """What ``send()`` has returned."""
        return self.envelope.message_id

    @cached_property
    def message(self) -> EmailMessage:
        """The content, parsed: its headers are decoded, and its line ends are those of Python."""
        return message_from_bytes(self._content, policy=_TOLERANT)

    @property
    def subject(self) -> str:
        """The subject, decoded; ``''`` if there is none."""
        return subject_of(self.envelope.content)

    @property
    def text(self) -> str:
        """The body in plain text; ``''`` if there is none."""
        return self._body('plain')

    @property
    def html(self) -> str:
        """The body in HTML; ``''`` if there is none."""
        return self._body('html')

    def _body(self, kind: str) -> str:
        # Those of a part in base64 are decoded only here.
        return body_of(self._content, kind).replace('\r\n', '\n')

    @property
    def _content(self) -> bytes:
        return self.envelope.content.replace(b'\r\n', b'\n')


class Outbox(list[CapturedMail]):
    """
    The mail that was committed, or sent outside of a transaction, in its order.

    :ivar discarded: what was dropped by an abort, or by a savepoint that was rolled back
    """

    def __init__(self) -> None:
        super().__init__()
        self.discarded: list[CapturedMail] = []
        self._open: dict[CapturingStaging, None] = {}

    @property
    def pending(self) -> list[CapturedMail]:
        """
        The mail of transactions that have not ended.

        For tests that run an application in a transaction of their own, which never commits.
        """
        return [CapturedMail(envelope) for staging in list(self._open) for envelope in staging.envelopes]

    def clear(self) -> None:
        """Forget everything, for the next test."""
        super().clear()
        self.discarded.clear()
        self._open.clear()

    def begin(self, staging: CapturingStaging) -> None:
        """Note that a transaction has mail."""
        self._open[staging] = None

    def end(self, staging: CapturingStaging) -> None:
        """Note that it has none any more."""
        self._open.pop(staging, None)


class CapturingQueue(MemoryQueue):
    """See `IMailQueue`."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox()

    def staging(self) -> CapturingStaging:
        """See `IMailQueue`."""
        return CapturingStaging(self._messages, self.outbox)

    def put(self, envelope: Envelope) -> str:
        """See `IMailQueue`."""
        self.outbox.append(CapturedMail(envelope))
        return super().put(envelope)

    def put_claimed(self, envelope: Envelope) -> MemoryClaim:
        """See `IMailQueue`."""
        self.outbox.append(CapturedMail(envelope))
        return super().put_claimed(envelope)


class CapturingStaging(MemoryStaging):
    """See `IStaging`."""

    def __init__(self, messages: MemoryMessages, outbox: Outbox) -> None:
        super().__init__(messages)
        self._outbox = outbox

    @property
    def envelopes(self) -> list[Envelope]:
        """What was added, and is not decided yet."""
        return [envelope for envelope, _ in self._added]

    def add(self, envelope: Envelope, claimed: bool) -> None:
        """See `IStaging`."""
        super().add(envelope, claimed)
        self._outbox.begin(self)

    def rollback(self, mark: object) -> list[Envelope]:
        """See `IStaging`."""
        return self._discarded(super().rollback(mark))

    def publish(self) -> list[IClaim | None]:
        """See `IStaging`."""
        self._outbox.extend(map(CapturedMail, self.envelopes))
        self._outbox.end(self)
        return super().publish()

    def discard(self) -> list[Envelope]:
        """See `IStaging`."""
        self._outbox.end(self)
        return self._discarded(super().discard())

    def _discarded(self, envelopes: list[Envelope]) -> list[Envelope]:
        self._outbox.discarded.extend(map(CapturedMail, envelopes))
        return envelopes


@implementer(ITransport)
class AcceptingTransport(Transport):
    """See `ITransport`.  The queue has captured what is sent here."""

    name = 'testing'

    def send(self, sender: str, recipients: tuple[str, ...], content: bytes) -> SendResult:
        """See `ITransport`."""
        reply = Reply(250, 'captured by a test', '2.0.0', from_server=False)
        return SendResult(dict.fromkeys(recipients, reply), self.name)


class CapturingMailer(Mailer):
    """See `IMailer`.  What it sends is in its :attr:`outbox`."""

    @property
    def outbox(self) -> Outbox:
        """The mail that was sent; the same list for all requests."""
        assert isinstance(self.queue, CapturingQueue)
        return self.queue.outbox

    @property
    def mail_discarded(self) -> list[CapturedMail]:
        """The mail that an abort, or the rollback of a savepoint, has dropped: the ``discarded`` of the outbox."""
        return self.outbox.discarded


def make_mailer(
    settings: Mapping[str, object] | None = None,
    transactions: ITransactionSource | None = None,
    notify: Callable[[MailEvent], None] | None = None,
) -> CapturingMailer:
    """
    Return a mailer for the tests of an application without Pyramid, in the place of ``mailer_from_settings()``.

    :param settings: a mapping with ``mailqueue.*`` keys, of which none is required
    :param transactions: knows the transaction to join; None is the manager of the thread (``transaction.manager``)
    :param notify: called with each event (see :mod:`~.events`)
    :raises ConfigurationError: a setting is unknown, malformed, or contradicts another one
    """
    given = dict(settings or {})
    missing = {key: value for key, value in _NOT_NEEDED.items() if not str(given.get(key) or '').strip()}
    read = Settings.from_mapping({**given, **missing})
    queue = CapturingQueue()
    handler = MessageHandler([AcceptingTransport()], plugins=read.plugins, notify=notify)
    inline = InlineDispatcher(handler, queue)
    return CapturingMailer(
        queue,
        handler,
        {'background': inline, 'inline': inline},
        build_compose(read),
        delivery=read.delivery,
        transactions=transactions or ManagerTransaction(),
        notify=notify,
    )


def captured_mail(app: Any = None) -> Outbox:
    """
    Return the outbox of an application that has included ``pyramid_mailqueue.testing``.

    :param app: a Pyramid application, a ``TestApp`` of WebTest around one, a configurator, a request, or a registry.
        None is the configuration of this thread (``pyramid.testing.setUp()``), or else the application that was made
        last
    :raises ConfigurationError: there is none
    """
    for registry in _registries(app):
        for name in ('', CAPTURING):
            mailer = registry.queryUtility(IMailer, name)
            if isinstance(mailer, CapturingMailer):
                return mailer.outbox
    raise ConfigurationError(
        'No application here captures its mail: in tests it has to include pyramid_mailqueue.testing, for instance by '
        'the setting pyramid.includes = pyramid_mailqueue.testing.'
    )


def mail_discarded(app: Any = None) -> list[CapturedMail]:
    """Return the mail that an abort has dropped; see :func:`captured_mail`."""
    return captured_mail(app).discarded


def _registries(app: Any) -> Sequence[Any]:
    if app is None:
        # Programs without Pyramid have no registry.
        from pyramid import config, threadlocal

        return [threadlocal.get_current_registry(), *filter(None, [config.global_registries.last])]
    while not hasattr(app, 'queryUtility'):
        # Of an application, a request or a configurator; TestApp, and middleware as a rule, have the application.
        app = getattr(app, 'registry', None) or app.app
    return [app]
