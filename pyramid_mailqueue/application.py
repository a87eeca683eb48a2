"""
From settings to a mailer, and what else only applications need.

A delivery thread imports nothing: a fork during an import in another thread leaves the child with half a module, which
it can never use.  So the modules that it needs are imported here, or by :func:`build_mailer`.
"""

from __future__ import annotations

# Needed by a lookup of a host, and to look for plugins; both import it late.
import encodings.idna  # noqa: F401
import zipfile  # noqa: F401
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from pyramid_mailqueue.delivery.dispatch import BackgroundDispatcher, InlineDispatcher, threads_run_here
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.events import MailEvent
from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.interfaces import IDispatcher, IMailQueue, ITransport
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.mailer import Mailer
from pyramid_mailqueue.sending import build_compose
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.transactions import ITransactionSource, ManagerTransaction
from pyramid_mailqueue.transports.redirect import redirecting
from pyramid_mailqueue.wiring import Lookup, build_handler, build_queue, build_smtp

__all__ = ['build_mailer', 'init_smtp_mailer', 'mailer_from_settings']

log = Log('mailqueue.delivery')


def build_mailer(
    settings: Settings,
    *,
    transactions: ITransactionSource | None = None,
    lookup: Lookup | None = None,
    notify: Callable[[MailEvent], None] | None = None,
) -> Mailer:
    """
    Return the :class:`~.mailer.Mailer` that *settings* describe.

    :param transactions: knows the transaction to join; None is the manager of the thread
    :param lookup: finds a registered transport by its name, or returns None
    :param notify: called with each event (see :mod:`~.events`); must not raise
    :raises ConfigurationError: something that the settings name cannot be used
    """
    queue = build_queue(settings, access='create', on_away=_warn)
    handler = build_handler(settings, lookup, notify)
    _import_for_delivery(settings)
    dispatchers = _build_dispatchers(settings, handler, queue)
    return Mailer(
        queue,
        handler,
        dispatchers,
        build_compose(settings),
        delivery=settings.delivery,
        transactions=transactions,
        notify=notify,
    )


def _import_for_delivery(settings: Settings) -> None:
    """Import what a delivery thread needs of that which not every application does."""
    names = []
    if 'smtp' in settings.transports:
        names.append(f'{__package__}.transports.smtp.session')
    if settings.queue == 'sql':
        names.append(f'{__package__}.queues.sql.intake')
    for name in names:
        import_module(name)


def _build_dispatchers(settings: Settings, handler: MessageHandler, queue: IMailQueue) -> dict[str, IDispatcher]:
    inline = InlineDispatcher(handler, queue)
    if threads_run_here():
        return {'background': BackgroundDispatcher(handler, queue), 'inline': inline}
    if settings.delivery == 'background':
        log.warning(
            'mailqueue.delivery = background needs threads, and uWSGI runs without them: mail is delivered before the '
            'request returns. Start uWSGI with enable-threads, or set mailqueue.delivery = queue.'
        )
    return {'background': inline, 'inline': inline}


def _warn(error: QueueError) -> None:
    log.warning('%s', error)


def init_smtp_mailer(settings: Mapping[str, object]) -> ITransport:
    """
    Return a transport for the mail server that *settings* name, for a custom handler.

    :param settings: a mapping with keys such as ``smtp_hostname``, with ``mailqueue.`` in front or without; of the keys
        with another beginning only ``max_recipients`` and ``redirect_all_to`` matter
    :raises ConfigurationError: a key is missing, unknown or malformed, or contradicts another one
    """
    own = {
        key: value
        for key, value in settings.items()
        if key.startswith(('mailqueue.', 'smtp_')) or key in ('max_recipients', 'redirect_all_to')
    }
    read = Settings.from_program(own)
    transport = build_smtp(read)
    return transport if read.redirect_all_to is None else redirecting(transport, read.redirect_all_to)


def mailer_from_settings(settings: Mapping[str, object], manager: Any = None, prefix: str = 'mailqueue.') -> Mailer:
    """
    Return a mailer for an application without Pyramid, or for a script.

    One per process is enough, for all of its threads: each mailer has its own connections and delivery thread.

    :param settings: a mapping with ``mailqueue.*`` keys
    :param manager: the transaction manager that ``send()`` joins; None is the one of the thread
        (``transaction.manager``), which is not explicit: mail that is never committed is only logged
    :raises ConfigurationError: a setting is missing, unknown, malformed, or contradicts another one
    """
    return build_mailer(Settings.from_mapping(settings, prefix), transactions=ManagerTransaction(manager))
