"""
From settings to what sends: the handler with its transports, and the composer of new messages.

Not imported by a run that finds nothing; see :mod:`~.wiring`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.retry import ExponentialBackoff
from pyramid_mailqueue.events import MailEvent
from pyramid_mailqueue.interfaces import ITransport
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.message.redirect import redirected
from pyramid_mailqueue.queues.rate_file import RateFile
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.transports.redirect import redirecting

__all__ = ['build_compose', 'make_handler']


def make_handler(
    settings: Settings, transports: Sequence[ITransport], notify: Callable[[MailEvent], None] | None = None
) -> MessageHandler:
    """Return a handler over *transports*."""
    to = settings.redirect_all_to
    return MessageHandler(
        transports if to is None else [redirecting(transport, to) for transport in transports],
        retry_policy=ExponentialBackoff(settings.retry_first, settings.retry_max, settings.lifetime),
        plugins=settings.plugins,
        connections=settings.smtp_connections,
        take_from_rate=_rate(settings),
        notify=notify,
    )


def _rate(settings: Settings) -> Callable[[int], float] | None:
    # One without the other is a mistake that wiring has found.
    if settings.rate_limit is None or settings.queue_dir is None:
        return None
    return RateFile(settings.queue_dir / 'rate', settings.rate_limit).take


def build_compose(settings: Settings) -> Callable[..., Envelope]:
    """Return a function that makes an envelope of a message, a sender and recipients."""
    compose = partial(
        Envelope.from_message,
        default_sender=settings.default_sender,
        max_size=settings.max_message_size,
        local_hostname=settings.smtp_local_hostname,
    )
    to = settings.redirect_all_to
    if to is None:
        return compose
    # Here, so that a queue never holds what must not be sent.
    return lambda *args, **options: redirected(compose(*args, **options), to)
