"""
``mq-send-test``: send one message the way an application sends its mail, and show what happens.

It uses the settings of the ini file, the queue, a claim and the transports.  Only the end differs: there is one
attempt, and then the message is removed, whatever the outcome.
"""

from __future__ import annotations

import argparse
import getpass
import io
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from email.message import EmailMessage
from typing import NoReturn

from zope.interface import implementer

from pyramid_mailqueue.cli.common import (
    EX_OK,
    EX_TEMPFAIL,
    EX_UNAVAILABLE,
    add_runner_arguments,
    blaming,
    complain,
    exit_status_of,
    parse_runner_arguments,
    read_settings,
    refuse_root,
    require_queue,
    silence_stdout,
)
from pyramid_mailqueue.cli.config import parse_override, setup_logging
from pyramid_mailqueue.cli.dialog import STEP_SECONDS, Dialog, advice, is_final, say, shown_dialog
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.exceptions import ConfigurationError, MessageError, QueueError
from pyramid_mailqueue.hosts import domain_of_this_host
from pyramid_mailqueue.interfaces import IClaim, IMailQueue, IRetryPolicy
from pyramid_mailqueue.logs import delivery_log, queue_log
from pyramid_mailqueue.message.addresses import parse_mailbox
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.base import WrappedClaim
from pyramid_mailqueue.queues.memory import MemoryQueue
from pyramid_mailqueue.results import SendResult, Settlement
from pyramid_mailqueue.sending import build_compose
from pyramid_mailqueue.settings import Settings, default_tls
from pyramid_mailqueue.wiring import build_handler, build_queue

__all__ = ['main']

NAME = 'mq-send-test'

_DESCRIPTION = """\
Send one message to see whether mail leaves, and if it does not, why.

It is sent as the application sends its mail: with the settings of its ini file, its queue and its mail server.  The
dialog with the server is shown, except for passwords and content.  Nothing else in the queue is touched, and nothing
stays behind: there is one attempt.
"""

_EPILOG = """\
  mq-send-test production.ini --to=me@site.example
  mq-send-test production.ini --to=me@site.example --set mailqueue.smtp_port=587
  mq-send-test mailqueue-runner.ini /var/spool/shop --to=me@site.example

exit status:
  0   the server has accepted the message
  2   the command line cannot be used
  69  it was refused, or cannot be sent in this way at all
  70  a defect of pyramid_mailqueue
  75  it was not sent, and may be later: no connection, a temporary refusal, a rate limit
  78  the configuration cannot be used, or there is no queue where it says

"Accepted" is not "arrived": look into the mailbox, into its spam folder too, and then into the log of the server.

Run it as the user that the application runs as: both must be able to read and write the queue.
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command with the arguments *argv*, those of the process if None, and exit."""
    arguments = parse_runner_arguments(_parser(), argv)
    if arguments.quiet:
        silence_stdout()
    # Any reply of a server can be printed on any terminal.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    sys.exit(exit_status_of(NAME, lambda: _send(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_runner_arguments(parser)
    parser.add_argument('--to', required=True, type=_address, metavar='ADDRESS', help='the recipient of the message')
    parser.add_argument(
        '--from',
        dest='sender',
        type=_address,
        metavar='ADDRESS',
        help='its sender (default: mailqueue.default_sender, else this user at this host)',
    )
    parser.add_argument('--quiet', action='store_true', help='print errors only')
    parser.add_argument('-v', '--verbose', action='store_true', help='show the dialog, which is the default')
    return parser


def _address(text: str) -> str:
    try:
        return parse_mailbox(text)
    except MessageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# --- the attempt ------------------------------------------------------------


def _send(arguments: argparse.Namespace) -> int:
    overrides = dict(map(parse_override, arguments.overrides))
    with blaming(arguments.ini):
        settings = read_settings(arguments.ini, arguments.name, arguments.queue_dir, overrides, needs_queue=False)
        refuse_root(settings.queue_dir, NAME)
        require_queue(settings)
        setup_logging(arguments.ini, overrides, settings, printed=(delivery_log.name, queue_log.name))
        queue, handler = _build(settings)
        envelope = _compose(settings, arguments.sender, arguments.to)
    say(f'{NAME}: from <{envelope.sender}> to <{envelope.recipients[0]}>, by {_way(settings)}')
    with _interruptible(), closing(handler), shown_dialog() as dialog:
        result = _attempt(queue, handler, envelope)
    if result is None:
        complain(NAME, _rate_is_reached(settings, handler))
        return EX_TEMPFAIL
    return _tell(result, envelope, settings, dialog)


def _build(settings: Settings) -> tuple[IMailQueue, MessageHandler]:
    # Plugins may record the outcomes of real mail.
    handler = build_handler(replace(_impatient(settings), plugins=()), _look_up)
    handler.retry_policy = OneAttempt()
    if settings.queue == 'maildir' and settings.queue_dir is None:
        # A [mqrunner] section needs no queue directory for this.
        return MemoryQueue(), handler
    return build_queue(settings), handler


def _impatient(settings: Settings) -> Settings:
    """Shorten the timeouts: those of the application are for real mail, which must not be sent twice."""
    names = ('smtp_connect_timeout', 'smtp_timeout', 'smtp_data_timeout')
    return replace(settings, **{name: min(getattr(settings, name), STEP_SECONDS) for name in names})


def _look_up(name: str) -> None:
    """Raise ConfigurationError for a transport that only the registry of the application has, which is not loaded."""
    if name not in ('smtp', 'inbox') and not {'.', ':'} & set(name):
        raise ConfigurationError(
            f'mailqueue.transports = {name}: only the application knows the transport of this name. '
            'Try another one with --set mailqueue.transports=smtp.'
        )


def _compose(settings: Settings, sender: str | None, recipient: str) -> Envelope:
    host = settings.smtp_local_hostname or domain_of_this_host() or 'localhost'
    message = EmailMessage()
    message['Subject'] = f'Test from {host}'
    message['To'] = recipient
    # RFC 3834: vacation responders must not answer.
    message['Auto-Submitted'] = 'auto-generated'
    message.set_content(f'{NAME} has sent this from {host}.  If you read it, mail gets through.\n')
    try:
        address = parse_mailbox(sender or settings.default_sender or f'{_user()}@{host}')
        message['From'] = address
        return build_compose(settings)(message, address, recipient)
    except MessageError as error:
        raise ConfigurationError(f'The test message cannot be made: {error}') from error


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # This user id has no name, as in many containers.
        return 'postmaster'


def _attempt(queue: IMailQueue, handler: MessageHandler, envelope: Envelope) -> SendResult | None:
    """Return the result of the attempt; None if the rate limit allows none now."""
    claim = ClaimForOneAttempt(queue.put_claimed(envelope))
    try:
        return handler.deliver(claim) if handler.may_send(claim) else None
    finally:
        claim.release()
        queue.flush()


@implementer(IRetryPolicy)
class OneAttempt:
    """See `IRetryPolicy`.  Nothing is tried again, and there are no dead letters."""

    def decide(
        self, recipients: Sequence[str], attempts: int, queued_at: float, result: SendResult, now: float
    ) -> Settlement:
        """See `IRetryPolicy`."""
        return Settlement()


@implementer(IClaim)
class ClaimForOneAttempt(WrappedClaim):
    """See `IClaim`.  However it ends, the message is removed, even if Ctrl-C interrupts the attempt."""

    def settle(self, settlement: Settlement) -> QueueError | None:
        """See `IClaim`."""
        return self._claim.settle(Settlement())

    def keep(self, recipients: tuple[str, ...]) -> None:
        """See `IClaim`."""

    def release(self) -> None:
        """See `IClaim`."""
        self._claim.settle(Settlement())

    abandon = release


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does: the message must not stay behind."""
    # The parent process may have set one of them to be ignored, as nohup does.
    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    former = {number: signal.signal(number, signal.default_int_handler) for number in heard}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# --- the report -------------------------------------------------------------


def _way(settings: Settings) -> str:
    """Where the message goes, in words."""
    server = settings.smtp_hostname
    names = [f'smtp ({server}, port {settings.smtp_port})' if name == 'smtp' else name for name in settings.transports]
    return ', then '.join(names)


def _rate_is_reached(settings: Settings, handler: MessageHandler) -> str:
    limit = settings.rate_limit
    assert limit
    return (
        f'not sent: mailqueue.rate_limit = {limit.count}/{limit.seconds:g}s allows no more now. '
        f'Try again in {math.ceil(handler.backoff_seconds)} seconds.'
    )


def _tell(result: SendResult, envelope: Envelope, settings: Settings, dialog: Dialog) -> int:
    """Print the outcome, and return the exit status."""
    trouble, reply = result.trouble, result.replies.get(envelope.recipients[0])
    if reply is not None and reply.accepted:
        say(f'{NAME}: sent. {result.transport} has accepted {envelope.message_id} and said: {reply}')
        return EX_OK
    for_good = reply.refused if reply is not None else trouble is not None and is_final(dialog.step, trouble)
    said = trouble if reply is None else f'{result.transport} says: {reply}'
    complain(NAME, f'failed, and {"it is no use to try again as it is" if for_good else "may work later"}. {said}')
    if 'smtp' in settings.transports:
        for line in advice(dialog.step, trouble, **_words(settings, envelope)):
            complain(NAME, f'  {line}')
    return EX_UNAVAILABLE if for_good else EX_TEMPFAIL


def _words(settings: Settings, envelope: Envelope) -> dict[str, str]:
    host = settings.smtp_hostname or ''
    tls = settings.smtp_tls or default_tls(host, settings.smtp_port, has_ca_file=settings.smtp_tls_ca_file is not None)
    return {
        'host': host,
        'port': str(settings.smtp_port),
        'starttls': '' if tls == 'implicit' else ' -starttls smtp',
        'sender': envelope.sender,
        'recipient': envelope.recipients[0],
    }


if __name__ == '__main__':
    main()
