"""
From settings to objects: queues, transports, and the runner of ``mq-run``.

An idle run imports all of this, so what delivers is made by :mod:`~.sending`, and what only applications need by
:mod:`~.application`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.exceptions import ConfigurationError, QueueError, described
from pyramid_mailqueue.interfaces import IMailQueue, ITransport
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.queues.base import completed
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.inspection import NoQueue
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.transports.debug import DebugInbox
from pyramid_mailqueue.transports.smtp import SMTPTransport

if TYPE_CHECKING:
    from pyramid_mailqueue.delivery.handler import MessageHandler
    from pyramid_mailqueue.events import MailEvent
    from pyramid_mailqueue.queues.moving import Move
    from pyramid_mailqueue.queues.sql import SQLQueue
    from pyramid_mailqueue.sql_wiring import SQLWiring

__all__ = [
    'build_handler',
    'build_maildir_queue',
    'build_queue',
    'build_runner',
    'build_smtp',
    'build_sql_queue',
    'open_move',
]

log = Log('mailqueue.delivery')

DAY = 86400

Lookup = Callable[[str], Any]


def build_runner(settings: Settings, *, lookup: Lookup | None = None) -> Runner:
    """Return the :class:`~.delivery.runner.Runner` that *settings* describe; see :func:`~.application.build_mailer`."""
    queue = build_queue(settings)
    # Mistakes in the settings show at every run; a handler is made when there is something to deliver.
    transports = _transports(settings, lookup)
    _check_rate(settings)
    return Runner(queue, lambda: _handler(settings, transports), keep_dead=settings.keep_dead)


def _leave_unsaid(_error: QueueError) -> None:
    """Do nothing: the next use of the queue raises the same, or works."""


def build_queue(
    settings: Settings, *, access: str = 'use', on_away: Callable[[QueueError], None] = _leave_unsaid
) -> IMailQueue:
    """
    Return the queue that *settings* describe.

    :param access: of one in a directory: ``'create'``, ``'use'`` or ``'look'`` (see `.MaildirFolders`).  Only the first
        makes a queue where there is none, so that a command with a misspelt name does not
    :param on_away: called with the error of a database that is away; its tables are checked when it is back
    :raises ConfigurationError: something that the settings name cannot be used
    """
    if settings.queue == 'maildir':
        return build_maildir_queue(settings, access)
    if settings.queue == 'sql':
        return _sql(settings).checked_queue(on_away)
    return completed(_call_factory('mailqueue.queue', settings.queue, settings))


def build_maildir_queue(settings: Settings, access: str = 'use') -> MaildirQueue:
    """Return the queue in a directory; see :func:`build_queue`."""
    if settings.queue_dir is None:
        raise ConfigurationError('mailqueue.queue_dir is missing: name the directory in which messages are to wait.')
    try:
        return MaildirQueue(
            settings.queue_dir, in_doubt=settings.in_doubt, horizon=settings.retry_max + DAY, access=access
        )
    except NoQueue as error:
        other = '' if settings.queue == 'maildir' else '--set mailqueue.queue=maildir '
        raise ConfigurationError(
            f'mailqueue.queue_dir = {settings.queue_dir}: {error.lack}. The application creates its queue there when '
            f'it starts, and so does: mq-queue app.ini {other}init'
        ) from error
    except QueueError as error:
        raise ConfigurationError(f'mailqueue.queue_dir = {settings.queue_dir}: {error}') from error


def _sql(settings: Settings) -> SQLWiring:
    try:
        # SQLAlchemy is an extra, and takes longer to import than all the rest.
        from pyramid_mailqueue.sql_wiring import SQLWiring
    except ImportError as error:
        raise ConfigurationError(
            f"mailqueue.queue = sql needs SQLAlchemy ({error}): pip install 'pyramid_mailqueue[sql]'"
        ) from error
    return SQLWiring(settings)


def build_sql_queue(settings: Settings) -> SQLQueue:
    """Return the queue in a database, whose tables need not be there yet.  Raises ConfigurationError."""
    return _sql(settings).queue()


def open_move(settings: Settings, *, to: str) -> AbstractContextManager[Move]:
    """
    Return a context: the move between the directory and the database that *settings* name, whichever is in use.

    :param to: ``'sql'`` or ``'maildir'``
    :raises ConfigurationError: one of them is not named, or cannot be used
    :raises QueueError: one of them cannot be used now
    """
    # Messages in doubt are left behind, whatever mq-run would do about them: the move reports them.
    directory = build_maildir_queue(replace(settings, in_doubt='hold'))
    return _sql(settings).move(directory, to=to)


def build_handler(
    settings: Settings, lookup: Lookup | None = None, notify: Callable[[MailEvent], None] | None = None
) -> MessageHandler:
    """Return a handler over the transports that *settings* name.  Raises ConfigurationError."""
    transports = _transports(settings, lookup)
    _check_rate(settings)
    return _handler(settings, transports, notify)


def _check_rate(settings: Settings) -> None:
    if settings.rate_limit is not None and settings.queue_dir is None:
        raise ConfigurationError(
            'mailqueue.queue_dir is missing: mailqueue.rate_limit keeps its count in a file of this directory.'
        )


def _handler(
    settings: Settings, transports: Sequence[ITransport], notify: Callable[[MailEvent], None] | None = None
) -> MessageHandler:
    # All that delivers, which an idle run does without.
    from pyramid_mailqueue.sending import make_handler

    return make_handler(settings, transports, notify)


def _transports(settings: Settings, lookup: Lookup | None) -> list[ITransport]:
    transports = [_transport(name, settings, lookup) for name in settings.transports]
    if settings.redirect_all_to is not None:
        log.warning(
            'mailqueue.redirect_all_to = %s: all mail goes there instead of to its recipients.',
            settings.redirect_all_to,
        )
    return transports


def _transport(name: str, settings: Settings, lookup: Lookup | None) -> ITransport:
    transport = lookup(name) if lookup is not None else None
    if transport is None:
        build = _TRANSPORTS.get(name) or partial(_call_factory, 'mailqueue.transports', name)
        transport = build(settings)
    if not callable(getattr(transport, 'send', None)):
        raise ConfigurationError(
            f'mailqueue.transports = {name}: a transport needs a method send(sender, recipients, content), '
            f'and {transport!r} has none.'
        )
    found: ITransport = transport
    return found


def build_smtp(settings: Settings) -> SMTPTransport:
    """Return the transport for the mail server that *settings* name.  Raises ConfigurationError."""
    if settings.smtp_hostname is None:
        raise ConfigurationError('mailqueue.smtp_hostname is missing: name the mail server to send over.')
    return SMTPTransport(
        hostname=settings.smtp_hostname,
        port=settings.smtp_port,
        username=settings.smtp_username,
        password=settings.smtp_password,
        local_hostname=settings.smtp_local_hostname,
        tls=settings.smtp_tls,
        tls_ca_file=settings.smtp_tls_ca_file,
        connect_timeout=settings.smtp_connect_timeout,
        timeout=settings.smtp_timeout,
        data_timeout=settings.smtp_data_timeout,
        idle_timeout=settings.smtp_idle_timeout,
        max_recipients=settings.max_recipients,
    )


def _inbox(settings: Settings) -> ITransport:
    if settings.queue_dir is None:
        raise ConfigurationError('mailqueue.transports = inbox needs mailqueue.queue_dir: it keeps mail in its inbox/.')
    return DebugInbox(settings.queue_dir / 'inbox')


_TRANSPORTS: dict[str, Callable[[Settings], ITransport]] = {'smtp': build_smtp, 'inbox': _inbox}


def _call_factory(key: str, name: str, settings: Settings) -> Any:
    """Import the factory of a dotted name, ``package.module.name`` or ``package.module:name``, and call it."""
    module, _, attribute = name.replace(':', '.').rpartition('.')
    if not module:
        raise ConfigurationError(
            f'{key} = {name}: nothing of this name is registered, and it is not the dotted name of a factory.'
        )
    try:
        return getattr(import_module(module), attribute)(settings)
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f'{key} = {name}: this factory failed. {described(error)}') from error
