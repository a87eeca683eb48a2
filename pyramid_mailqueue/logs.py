"""
The logs of what happens to messages, for people and for programs.

``mailqueue.delivery_log`` has every result for a recipient, ``mailqueue.queue_log`` what became of a
message in the queue (queued, deferred, buried, discarded), ``mailqueue.smtp`` the dialog with the server.  One line is
one event, as ``key=value`` pairs; ``record.mailqueue`` holds the same as a dict.

Logging never interrupts the work: our loggers are :class:`Log`, which raise no Exception, whatever a handler raises.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pyramid_mailqueue.display import printable
from pyramid_mailqueue.message.envelope import Envelope

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

__all__ = [
    'Log',
    'delivery_log',
    'log_event',
    'log_queued',
    'log_trouble',
    'name_of',
    'queue_log',
    'why',
]


class Log(_Adapter):
    """
    The logger of a name.  It raises no Exception, and each record is one line that any terminal shows as text.

    :param name: as for :func:`logging.getLogger`
    """

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name), {})

    def log(self, level: int, msg: object, *args: object, stacklevel: int = 1, **kwargs: Any) -> None:
        """See :meth:`logging.Logger.log`."""
        if not self.isEnabledFor(level):
            return
        with suppress(Exception):
            self.logger.log(level, msg, *map(_shown, args), stacklevel=stacklevel + 1, **kwargs)


def _shown(value: object) -> object:
    text = str(value)
    return value if text.isprintable() else printable(text)


delivery_log = Log('mailqueue.delivery_log')
queue_log = Log('mailqueue.queue_log')


def log_event(logger: Log, level: int, **fields: object) -> None:
    """
    Log one event; fields that are None or empty are left out.

    The values contain text from servers and senders, so line breaks and quotes in them are escaped: none can forge a
    log line.
    """
    if not logger.isEnabledFor(level):
        return
    told = {key: value for key, value in fields.items() if value not in (None, '')}
    line = ' '.join(f'{key}={_quoted(str(value))}' for key, value in told.items())
    logger.log(level, '%s', line, extra={'mailqueue': told}, stacklevel=2)


def _quoted(value: str) -> str:
    if value.isprintable() and not any(c in ' "=' for c in value):
        return value
    escaped = value.replace('\\', '\\\\').replace('"', '\\"')
    return '"' + ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in escaped) + '"'


def log_queued(id: str, envelope: Envelope) -> None:
    """Log that a message is in the queue."""
    if not queue_log.isEnabledFor(logging.INFO):
        return
    told = {'from': f'<{envelope.sender}>', 'to': ','.join(envelope.recipients)}
    log_event(queue_log, logging.INFO, status='queued', id=id, msgid=envelope.message_id, **told)


def log_trouble(problem: str, path: str, error: Exception, level: int = logging.ERROR) -> None:
    """Log a file of the queue that needs attention, and what cannot be done with it."""
    log_event(queue_log, level, status='trouble', file=path, problem=problem, error=why(error))


def why(error: Exception) -> str:
    """The text of the operating system, without the paths that the error names."""
    return getattr(error, 'strerror', None) or str(error)


def name_of(receiver: Any) -> str:
    """Return the dotted name of *receiver*, which has raised; its repr if it has none."""
    name = getattr(receiver, '__qualname__', None)
    return f'{receiver.__module__}.{name}' if name else repr(receiver)
