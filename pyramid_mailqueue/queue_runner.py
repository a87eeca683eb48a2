"""
A queue directory for programs that bring their own settings: put a message into it, and deliver what is due.

These are the functions of mailqueue-runner, under their names there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, overload

from zope.interface import implementer

from pyramid_mailqueue.cli.common import read_settings, refuse_root, require_queue
from pyramid_mailqueue.cli.config import setup_logging
from pyramid_mailqueue.cli.run import tell_of
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.route import Route
from pyramid_mailqueue.delivery.runner import Runner, RunReport
from pyramid_mailqueue.exceptions import ConfigurationError, QueueError
from pyramid_mailqueue.interfaces import IClaim, IMailQueue
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.base import WrappedClaim
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.results import Settlement
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.transports.redirect import redirecting
from pyramid_mailqueue.wiring import build_handler, build_queue

__all__ = ['QueuedMessage', 'enqueue_message', 'one_shot_queue_run']


@overload
def enqueue_message(
    msg: Any,
    queue_path: str | os.PathLike[str],
    sender: str | None = None,
    recipients: Iterable[str] | str | None = None,
    *,
    return_msg: Literal[False] = False,
    in_progress: bool = False,
) -> str: ...


@overload
def enqueue_message(
    msg: Any,
    queue_path: str | os.PathLike[str],
    sender: str | None = None,
    recipients: Iterable[str] | str | None = None,
    *,
    return_msg: Literal[True],
    in_progress: bool = False,
) -> QueuedMessage: ...


def enqueue_message(
    msg: Any,
    queue_path: str | os.PathLike[str],
    sender: str | None = None,
    recipients: Iterable[str] | str | None = None,
    *,
    return_msg: bool = False,
    in_progress: bool = False,
) -> str | QueuedMessage:
    """
    Make a message durable in a queue directory, now, outside of any transaction.

    :param msg: whatever :meth:`~.envelope.Envelope.from_message` takes; it also says what *sender* and *recipients* are
        by default
    :param queue_path: the queue directory; it is created if it is missing
    :param return_msg: return the message, in progress, for :meth:`~.delivery.handler.MessageHandler.send_message`.  It
        waits as soon as the process ends, or drops it.  Otherwise the message waits for ``mq-run``, and its path is
        returned
    :param in_progress: only together with *return_msg*, because the returned message holds the claim
    :raises MessageError: the message can never be sent
    :raises QueueError: the directory cannot be used, or cannot take the message
    """
    if in_progress and not return_msg:
        raise ValueError('in_progress=True needs return_msg=True: a message is in progress for as long as it is held.')
    envelope = Envelope.from_message(msg, sender, recipients)
    queue = MaildirQueue(queue_path)
    if return_msg:
        return QueuedMessage(queue, queue.put_claimed(envelope))
    return queue.place('new', queue.put(envelope))


@implementer(IClaim)
class QueuedMessage(WrappedClaim):
    """
    See `IClaim`.  A message that a program holds, to be sent once.

    Unlike that of a claim of a run, its end is durable at once.

    :param queue: the queue that it is in
    :param claim: of the message
    :ivar is_over: it was settled, abandoned or released
    """

    def __init__(self, queue: IMailQueue, claim: IClaim) -> None:
        super().__init__(claim)
        self._queue = queue
        self._is_over = False

    @property
    def queue(self) -> IMailQueue:
        """See `IClaim`."""
        return self._queue

    @property
    def is_over(self) -> bool:
        """Whether it was settled, abandoned or released."""
        return self._is_over

    def settle(self, settlement: Settlement) -> QueueError | None:
        """See `IClaim`."""
        unwritten = self._claim.settle(settlement)
        self._end()
        return unwritten

    def abandon(self) -> None:
        """See `IClaim`."""
        self._claim.abandon()
        self._end()

    def release(self) -> None:
        """See `IClaim`."""
        self._claim.release()
        self._end()

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._queue.flush()


def one_shot_queue_run(
    queue_dir: str | os.PathLike[str],
    config_path: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RunReport:
    """
    Make one run over a queue directory, as ``mq-run`` does, and print what that prints.  Return what was done.

    :param queue_dir: the queue directory
    :param config_path: an ini file to read, as ``mq-run`` does; or else *settings*
    :param options: ``verbose``: print a summary even if there was nothing to do; ``quiet``: print nothing
    :param settings: the keys of a ``[mqrunner]`` section, with ``mailqueue.`` in front or without, and two more:
        ``basic_logging_configured`` leaves logging to the program, and ``mh`` is a
        :class:`~.delivery.handler.MessageHandler` of its own.  For other keys see
        :meth:`~.settings.Settings.from_program`
    :raises ConfigurationError: a key or the directory cannot be used
    :raises QueueError: the queue cannot be read
    """
    if (config_path is None) == (settings is None):
        raise ConfigurationError('Give one_shot_queue_run() either config_path or settings.')
    path = Path(queue_dir).absolute()
    given = settings or {}
    read = _read(given, path) if config_path is None else read_settings(os.fspath(config_path), None, str(path), {})
    refuse_root(path, 'the program')
    require_queue(read)
    if not given.get('basic_logging_configured'):
        setup_logging(None if config_path is None else os.fspath(config_path), {}, read)
    queue = build_queue(read)
    handler: MessageHandler = given.get('mh') or build_handler(read)
    handler = handler.for_queue(queue, read.plugins)
    if read.redirect_all_to is not None:
        # A handler of the program's own knows nothing of the settings of the run.
        handler.routes = [
            Route(redirecting(route.transport, read.redirect_all_to), route.backoff) for route in handler.routes
        ]
    runner = Runner(queue, handler, keep_dead=read.keep_dead)
    report = runner.run()
    if not (options or {}).get('quiet'):
        tell_of(report, runner, verbose=bool((options or {}).get('verbose')))
    return report


def _read(given: Mapping[str, Any], queue_dir: Path) -> Settings:
    own = dict(given)
    own['mailqueue.queue_dir' if 'mailqueue.queue_dir' in own else 'queue_dir'] = queue_dir
    return Settings.from_program(own, needs_server=given.get('mh') is None)
