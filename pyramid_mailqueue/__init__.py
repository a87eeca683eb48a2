"""
Mail as part of the transaction, for Pyramid and WSGI applications.

In a Pyramid application::

    config.include('pyramid_mailqueue')     # settings: mailqueue.*
    request.mailer.send(message)            # in a view: sent if, and only if, the transaction commits

Without Pyramid, :func:`mailer_from_settings` returns the same mailer, which joins ``transaction.manager``.

Without a transaction a program puts together a :class:`~.delivery.handler.MessageHandler` of its own::

    handler = MessageHandler([init_smtp_mailer(settings), MaildirBackend('/path/to/queue')])
    handler.send_message(message)           # sent or, if that fails, queued

All parts are imported on first use, so that other programs do not wait for them.
"""

from __future__ import annotations

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
    from pyramid_mailqueue.application import init_smtp_mailer, mailer_from_settings
    from pyramid_mailqueue.delivery.handler import MessageHandler
    from pyramid_mailqueue.delivery.plugins import MQAction, MQSignal, PluginMessage, PluginRegistry, registry
    from pyramid_mailqueue.delivery.runner import RunReport
    from pyramid_mailqueue.events import MailBuried, MailDeferred, MailDelivered, MailEvent, MailQueued
    from pyramid_mailqueue.including import get_mailer, includeme
    from pyramid_mailqueue.mailer import Mailer
    from pyramid_mailqueue.message.addresses import check_address
    from pyramid_mailqueue.message.envelope import Envelope
    from pyramid_mailqueue.queue_runner import QueuedMessage, enqueue_message, one_shot_queue_run
    from pyramid_mailqueue.queues.entries import QueueEntry, QueueStats, Tally
    from pyramid_mailqueue.results import Burial, Dropped, Offer, Recovery, Reply, SendResult, Settlement
    from pyramid_mailqueue.settings import Rate, Settings
    from pyramid_mailqueue.transactions import ITransactionSource
    from pyramid_mailqueue.transports.maildir import MaildirBackend
    from pyramid_mailqueue.version import __version__ as __version__

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
    '__version__': 'version',
    'check_address': 'message.addresses',
    'enqueue_message': 'queue_runner',
    'get_mailer': 'including',
    'includeme': 'including',
    'init_smtp_mailer': 'application',
    'mailer_from_settings': 'application',
    'one_shot_queue_run': 'queue_runner',
    'registry': 'delivery.plugins',
}

# Aliases, which mypy's plugin for zope.interface accepts after @implementer; it would refuse a class that it does not
# know as an interface.
IMailer: TypeAlias = interfaces.IMailer
ITransport: TypeAlias = interfaces.ITransport


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        return getattr(import_module(f'{__name__}.{_LATER[name]}'), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
