"""
Mail as part of the transaction, for Pyramid and WSGI applications.

In a Pyramid application::

    config.include('pyramid_mailqueue')     # settings: mailqueue.*
    request.mailer.send(message)            # in a view: sent if, and only if, the transaction commits

Without Pyramid, :func:`mailer_from_settings` returns the same mailer, which joins ``transaction.manager``.

Without a transaction a program puts together a :class:`~.delivery.handler.MessageHandler` of its own::

    handler = MessageHandler([init_smtp_mailer(settings), MaildirBackend('/path/to/queue')])
    handler.send_message(message)           # sent or, if that fails, queued

These parts are imported on first use, so that other programs do not wait for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

from pyramid_mailqueue import interfaces
from pyramid_mailqueue.exceptions import (
    AddressError,
    ConfigurationError,
    MailqueueError,
    MessageError,
    MessageTooLarge,
    NoActiveTransaction,
    NoRecipients,
    NoSuchMessage,
    QueueError,
    QueueFileError,
    ServerTrouble,
    TooManyRecipients,
    WrongState,
)

if TYPE_CHECKING:
    from pyramid_mailqueue.delivery.handler import MessageHandler
    from pyramid_mailqueue.delivery.plugins import MQAction, MQSignal, PluginMessage, PluginRegistry, registry
    from pyramid_mailqueue.delivery.runner import RunReport
    from pyramid_mailqueue.events import MailBuried, MailDeferred, MailDelivered, MailEvent, MailQueued
    from pyramid_mailqueue.mailer import Mailer
    from pyramid_mailqueue.message.addresses import check_address
    from pyramid_mailqueue.message.envelope import Envelope
    from pyramid_mailqueue.queue_runner import QueuedMessage, enqueue_message, one_shot_queue_run
    from pyramid_mailqueue.queues.entries import QueueEntry, QueueStats, Tally
    from pyramid_mailqueue.results import Burial, Dropped, Offer, Recovery, Reply, SendResult, Settlement
    from pyramid_mailqueue.settings import Rate, Settings
    from pyramid_mailqueue.transactions import ITransactionSource
    from pyramid_mailqueue.transports.maildir import MaildirBackend
    from pyramid_mailqueue.wiring import init_smtp_mailer

    #: The version in setup.cfg; looked up on access.
    __version__: str

__all__ = [
    'AddressError',
    'Burial',
    'ConfigurationError',
    'Dropped',
    'Envelope',
    'IMailer',
    'ITransactionSource',
    'ITransport',
    'MQAction',
    'MQSignal',
    'MailBuried',
    'MailDeferred',
    'MailDelivered',
    'MailEvent',
    'MailQueued',
    'MaildirBackend',
    'Mailer',
    'MailqueueError',
    'MessageError',
    'MessageHandler',
    'MessageTooLarge',
    'NoActiveTransaction',
    'NoRecipients',
    'NoSuchMessage',
    'Offer',
    'PluginMessage',
    'PluginRegistry',
    'QueueEntry',
    'QueueError',
    'QueueFileError',
    'QueueStats',
    'QueuedMessage',
    'Rate',
    'Recovery',
    'Reply',
    'RunReport',
    'SendResult',
    'ServerTrouble',
    'Settings',
    'Settlement',
    'Tally',
    'TooManyRecipients',
    'WrongState',
    'check_address',
    'enqueue_message',
    'get_mailer',
    'includeme',
    'init_smtp_mailer',
    'mailer_from_settings',
    'one_shot_queue_run',
    'registry',
]

_LATER = {
    'Burial': 'results',
    'Dropped': 'results',
    'Envelope': 'message.envelope',
    'ITransactionSource': 'transactions',
    'MQAction': 'delivery.plugins',
    'MQSignal': 'delivery.plugins',
    'MailBuried': 'events',
    'MailDeferred': 'events',
    'MailDelivered': 'events',
    'MailEvent': 'events',
    'MailQueued': 'events',
    'MaildirBackend': 'transports.maildir',
    'Mailer': 'mailer',
    'MessageHandler': 'delivery.handler',
    'Offer': 'results',
    'PluginMessage': 'delivery.plugins',
    'PluginRegistry': 'delivery.plugins',
    'QueueEntry': 'queues.entries',
    'QueueStats': 'queues.entries',
    'QueuedMessage': 'queue_runner',
    'Rate': 'settings',
    'Recovery': 'results',
    'Reply': 'results',
    'RunReport': 'delivery.runner',
    'SendResult': 'results',
    'Settings': 'settings',
    'Settlement': 'results',
    'Tally': 'queues.entries',
    'check_address': 'message.addresses',
    'enqueue_message': 'queue_runner',
    'init_smtp_mailer': 'wiring',
    'one_shot_queue_run': 'queue_runner',
    'registry': 'delivery.plugins',
}

# Aliases, which mypy's plugin for zope.interface accepts after @implementer; it would refuse a class that it does not
# know as an interface.
IMailer: TypeAlias = interfaces.IMailer
ITransport: TypeAlias = interfaces.ITransport

# The order of an action that comes after those of the application, which may register transports and change settings.
_LAST = 1000


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == '__version__':
            from importlib.metadata import version

            return version(__name__)
        if name not in _LATER:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        return getattr(import_module(f'{__name__}.{_LATER[name]}'), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def mailer_from_settings(settings: Mapping[str, object], manager: Any = None, prefix: str = 'mailqueue.') -> Mailer:
    """
    Return a mailer for an application without Pyramid, or for a script.

    One per process is enough, for all of its threads: each mailer has its own connections and delivery thread.

    :param settings: a mapping with ``mailqueue.*`` keys
    :param manager: the transaction manager that ``send()`` joins; None is the one of the thread
        (``transaction.manager``), which is not explicit: mail that is never committed is only logged
    :raises ConfigurationError: a setting is missing, unknown, malformed, or contradicts another one
    """
    from pyramid_mailqueue.settings import Settings
    from pyramid_mailqueue.transactions import ManagerTransaction
    from pyramid_mailqueue.wiring import build_mailer

    return build_mailer(Settings.from_mapping(settings, prefix), transactions=ManagerTransaction(manager))


def get_mailer(request: Any) -> IMailer:
    """
    Return the mailer of *request*, bound to its transaction; the same as ``request.mailer``.

    A mailer that the application has registered itself is returned as it is, unless it is an `IBindableMailer`.

    It works wherever there is a request, but ``send()`` raises :class:`NoActiveTransaction` where nothing will commit:
    if neither pyramid_tm nor repoze.tm is active for the request, in an exception view, or after the commit; unless you
    have begun a transaction yourself (``with request.tm:``).  In a script it is up to you to commit.
    """
    from pyramid_mailqueue.transactions import RequestTransaction

    mailer: IMailer = request.registry.getUtility(IMailer)
    return mailer.bound_to(RequestTransaction(request)) if interfaces.IBindableMailer.providedBy(mailer) else mailer


def includeme(config: Any) -> None:
    """
    Set up mail for a Pyramid application, from its ``mailqueue.*`` settings.

    Registers a utility for :class:`~.interfaces.IMailer`, unless there is one, and adds ``request.mailer``.  The
    settings are read when the configuration is committed, after all other actions, so the application may still change
    them after this call; a setting that cannot be used raises :class:`ConfigurationError` then.  A transport that
    ``mailqueue.transports`` names may be registered as a utility for :class:`~.interfaces.ITransport` of that name.
    """
    from pyramid_mailqueue.including import name_place

    def register() -> None:
        from pyramid_mailqueue.events import notify
        from pyramid_mailqueue.settings import Settings
        from pyramid_mailqueue.transactions import ThreadTransaction
        from pyramid_mailqueue.wiring import build_mailer

        registry = config.registry
        if registry.queryUtility(IMailer) is not None:
            # Such as that of an application's tests.
            return
        mailer = build_mailer(
            Settings.from_mapping(registry.settings),
            transactions=ThreadTransaction(),
            lookup=partial(registry.queryUtility, ITransport),
            notify=partial(notify, registry),
        )
        registry.registerUtility(mailer, IMailer)

    name_place(config)
    config.action('pyramid_mailqueue', register, order=_LAST)
    config.add_request_method(get_mailer, 'mailer', reify=True)
    config.add_subscriber('pyramid_mailqueue.transactions.watch_request', 'pyramid.events.NewRequest')
