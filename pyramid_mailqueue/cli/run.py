"""
``mq-run``: deliver the mail that waits in the queue of an application.

It reads the application's own ini file, without importing the application, and is made for cron: nothing is printed
when there was nothing to do.
"""

from __future__ import annotations

if __name__ == '__main__':
    # Before the imports below, which are slow.
    from pyramid_mailqueue.cli.signals import EarlySignals

    SIGNALS = EarlySignals()

import argparse
import math
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pyramid_mailqueue.cli.common import (
    EX_OK,
    EX_TEMPFAIL,
    add_runner_arguments,
    blaming,
    complain,
    duration,
    exit_status_of,
    parse_runner_arguments,
    read_settings,
    refuse_root,
    require_queue,
)
from pyramid_mailqueue.cli.config import parse_override, read_app_settings, run_log, setup_logging
from pyramid_mailqueue.cli.progress import open_progress
from pyramid_mailqueue.cli.service import guard_logs, notify_systemd, reopen_log_files, steady_outputs
from pyramid_mailqueue.cli.signals import EarlySignals
from pyramid_mailqueue.delivery.runner import STOP_SECONDS, Runner, RunReport, Stop
from pyramid_mailqueue.exceptions import ConfigurationError, QueueError
from pyramid_mailqueue.interfaces import IMailer, IMailQueue
from pyramid_mailqueue.queues.base import completed
from pyramid_mailqueue.results import Recovery
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.wiring import build_runner

__all__ = ['main']

#: How often ``--watch`` looks again, in seconds.
WATCH_INTERVAL = 5

#: The summary counts at most so many waiting messages: a database would be slow to count all of a long backlog.
MOST_WAITING = 10_000

STOPPED = 'stopped; what was not delivered waits for the next run'

_EPILOG = """\
exit status:
  0   the run is complete; messages that were deferred wait for a later one
  70  a defect of pyramid_mailqueue
  75  the mail server or the queue cannot be used now, or the run was told to stop (SIGTERM, SIGINT); what is left waits
  78  the configuration cannot be used, or there is no queue where it says
  with --watch: 0 when told to stop; trouble is reported once, and retried

from cron, every minute:
  * * * * *  www-data  /srv/app/venv/bin/mq-run /srv/app/production.ini

Run it as the user that the application runs as: both must be able to read and write the queue.
"""


def main(argv: Sequence[str] | None = None, *, signals: EarlySignals | None = None) -> NoReturn:
    """
    Run the command with the arguments *argv*, those of the process if None, and exit.

    :param signals: those received while it started; by default they are caught from now on
    """
    signals = signals or EarlySignals()
    parser = _parser()
    arguments = parse_runner_arguments(parser, _with_interval(sys.argv[1:] if argv is None else argv))
    if arguments.app and arguments.queue_dir:
        parser.error('with --app the queue is that of the application: leave out the queue directory')
    with steady_outputs():
        sys.exit(exit_status_of('mq-run', lambda: _run(arguments, signals)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='mq-run',
        description='Deliver the mail that waits in the queue of an application, oldest first.',
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_runner_arguments(parser)
    parser.add_argument(
        '--app',
        action='store_true',
        help='load the application and use the mailer that it has registered, with its transports',
    )
    parser.add_argument(
        '--watch',
        nargs='?',
        type=duration,
        const=WATCH_INTERVAL,
        metavar='SECONDS',
        help='keep running, and look again every so many seconds (default: 5), until told to stop',
    )
    parser.add_argument('--max-messages', type=_number, metavar='N', help='begin no more than N messages')
    parser.add_argument('--max-time', type=duration, metavar='SECONDS', help='begin no message after so long')
    parser.add_argument('-v', '--verbose', action='store_true', help='print a summary even if there was nothing to do')
    return parser


def _with_interval(argv: Sequence[str]) -> list[str]:
    """Give ``--watch`` its default where no time follows: argparse would take the name of the ini file for one."""
    told = list(argv)
    for index, argument in enumerate(told):
        follower = told[index + 1] if index + 1 < len(told) else ''
        if argument == '--watch' and not re.fullmatch(r'[0-9][0-9.]*[smhd]?', follower):
            told[index] = f'--watch={WATCH_INTERVAL}'
    return told


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError('must be a whole number, 1 or more')
    return int(text)


def _run(arguments: argparse.Namespace, early: EarlySignals) -> int:
    try:
        with (
            _heard_signals(early, reopens_logs=arguments.watch is not None) as signals,
            closing(_build_runner(arguments)) as runner,
            signals.work_begins(),
        ):
            return _work(runner, signals, arguments)
    except _StoppedAtOnce:
        if arguments.watch is not None:
            return EX_OK
        _complain(STOPPED)
        return EX_TEMPFAIL


def _work(runner: Runner, signals: _Signals, arguments: argparse.Namespace) -> int:
    guard_logs()
    if arguments.watch is None:
        return _run_once(runner, signals, arguments)
    with runner.queue.listening(signals.on_mail):
        return _watch(runner, signals, arguments)


def _run_once(runner: Runner, signals: _Signals, arguments: argparse.Namespace) -> int:
    total = runner.queue.count_due(time.time()) if sys.stderr and sys.stderr.isatty() else None
    if total and arguments.max_messages is not None:
        total = min(total, arguments.max_messages)
    try:
        with open_progress(sys.stderr, total=total) as progress:
            report = runner.run(
                signals.stop,
                max_messages=arguments.max_messages,
                max_seconds=arguments.max_time,
                on_progress=lambda so_far: progress.update(so_far.done, so_far.sent, so_far.deferred, so_far.refused),
            )
    except QueueError:
        # What was done before is reported.
        _summarize(runner.report, runner, verbose=False)
        raise
    tell_of(report, runner, verbose=arguments.verbose)
    return EX_TEMPFAIL if report.trouble or report.stopped else EX_OK


def _watch(runner: Runner, signals: _Signals, arguments: argparse.Namespace) -> int:
    """Make one run after the other, until told to stop.  Trouble is reported once, and retried."""
    left, told = arguments.max_messages, ''
    end = math.inf if arguments.max_time is None else time.monotonic() + arguments.max_time
    signals.reload = runner.reload
    notify_systemd('READY=1')
    while not signals.stop.requested and left != 0 and (rest := end - time.monotonic()) > 0:
        guard_logs()
        try:
            runner.round(signals.stop, max_messages=left, max_seconds=None if arguments.max_time is None else rest)
            trouble: Exception | None = runner.report.trouble
        except QueueError as error:
            trouble = error
        left = None if left is None else max(0, left - runner.report.done)
        if runner.report.done or runner.report.recovery != Recovery():
            _summarize(runner.report, runner, verbose=False)
        if trouble is not None and str(trouble) != told:
            _complain_of(trouble)
        told = '' if trouble is None else str(trouble)
        notify_systemd(f'STATUS={told or "waiting for mail"}')
        if left != 0:
            backoff_seconds = runner.backoff_seconds
            signals.sleep(min(max(arguments.watch, backoff_seconds), end - time.monotonic()), at_least=backoff_seconds)
    notify_systemd('STOPPING=1')
    return EX_OK


def tell_of(report: RunReport, runner: Runner, *, verbose: bool) -> None:
    """
    Print what a run did; nothing if there was nothing to do, because cron mails any output.

    :param verbose: print a summary in any case
    """
    if report.trouble:
        _complain_of(report.trouble)
    if report.stopped:
        _complain(STOPPED)
    _summarize(report, runner, verbose=verbose)


def _complain_of(trouble: Exception) -> None:
    _complain(str(trouble))
    # For logs that go elsewhere.
    run_log.warning('%s Mail waits in the queue.', trouble)


def _complain(text: str) -> None:
    complain('mq-run', text)


class _StoppedAtOnce(KeyboardInterrupt):
    """Raised while no message is in progress.  An application that is being loaded reacts as to Ctrl-C."""


class _Signals:
    """What the signals received so far ask for."""

    def __init__(self) -> None:
        self.stop = Stop(on_news=self._tend_to_logs, on_ending=_tell_ending)
        self._is_working = False
        self._logs_are_stale = False
        self._has_mail = False
        self.reload: Callable[[], None] = _do_nothing

    @contextmanager
    def work_begins(self) -> Iterator[None]:
        """Within the ``with`` block, a stop finishes the messages in progress first."""
        self._is_working = True
        try:
            yield
        finally:
            self._is_working = False

    def on_stop(self, _number: int, _frame: FrameType | None) -> None:
        """Stop after the messages in progress: a process that dies during one counts against it."""
        self.stop.request()
        if not self._is_working:
            raise _StoppedAtOnce

    def on_rotation(self, _number: int, _frame: FrameType | None) -> None:
        """Have the log files reopened, and the certificate authorities read again."""
        self._logs_are_stale = True
        self.stop.wake()

    def on_mail(self) -> None:
        """Look for new mail now.  Called by any thread."""
        self._has_mail = True
        self.stop.wake()

    def sleep(self, seconds: float, *, at_least: float = 0) -> None:
        """Return after so many seconds; when mail has come, but not before *at_least*; or when told to stop."""
        now = time.monotonic()
        until, earliest = now + seconds, now + min(at_least, seconds)
        while not self.stop.requested and (rest := (earliest if self._has_mail else until) - time.monotonic()) > 0:
            self.stop.wait(rest)
        self._has_mail = False

    def _tend_to_logs(self) -> None:
        """Reopen the log files if requested: not in the signal handler, which may have interrupted a logger."""
        if self._logs_are_stale:
            self._logs_are_stale = False
            notify_systemd('RELOADING=1')
            reopen_log_files()
            self.reload()
            run_log.info(
                'SIGHUP: the log files are reopened and the certificate authorities are read again. Settings and '
                'passwords are those of the start: restart to change them.'
            )
            notify_systemd('READY=1')


def _do_nothing() -> None:
    return None


def _tell_ending() -> None:
    _complain(f'stopping: finishing messages in progress (at most {STOP_SECONDS} s)')


@contextmanager
def _heard_signals(early: EarlySignals, *, reopens_logs: bool) -> Iterator[_Signals]:
    signals = _Signals()
    try:
        early.hand_over(
            {
                signal.SIGTERM: signals.on_stop,
                signal.SIGINT: signals.on_stop,
                signal.SIGHUP: signals.on_rotation if reopens_logs else signals.on_stop,
            }
        )
        yield signals
    finally:
        early.restore()


def _build_runner(arguments: argparse.Namespace) -> Runner:
    overrides = dict(map(parse_override, arguments.overrides))
    build = _runner_of_app if arguments.app else _runner_of_ini
    with blaming(arguments.ini):
        return build(arguments, overrides)


def _runner_of_ini(arguments: argparse.Namespace, overrides: dict[str, str]) -> Runner:
    settings = read_settings(arguments.ini, arguments.name, arguments.queue_dir, overrides)
    refuse_root(settings.queue_dir, 'mq-run')
    require_queue(settings)
    setup_logging(arguments.ini, overrides, settings)
    guard_logs()
    return build_runner(settings, lookup=_look_up)


def _look_up(name: str) -> None:
    """Raise ConfigurationError for a transport that only the registry of the application has, which is not loaded."""
    if name not in ('smtp', 'inbox') and not {'.', ':'} & set(name):
        raise ConfigurationError(
            f'mailqueue.transports = {name}: only the application knows the transport of this name. Use --app.'
        )


def _runner_of_app(arguments: argparse.Namespace, overrides: dict[str, str]) -> Runner:
    """Return a runner for the queue and the transports of the mailer that the application has registered."""
    # Mistakes in the file first: PasteDeploy's words for them may show a password.  The settings are not checked: the
    # application may set the rest in its code.
    settings = read_app_settings(arguments.ini, arguments.name, overrides)

    def path_of(key: str) -> Path | None:
        value = settings.get(f'mailqueue.{key}')
        return Path(value).expanduser().absolute() if value else None

    refuse_root(path_of('queue_dir'), 'mq-run')
    places = Settings(
        logging_conf=path_of('logging_conf'), delivery_log=path_of('delivery_log'), queue_log=path_of('queue_log')
    )
    setup_logging(arguments.ini, overrides, places)
    guard_logs()
    with _import_warnings_ignored():
        # Pyramid, and plaster.
        from pyramid_mailqueue.cli.application import load

        registry = load(arguments.ini, arguments.name, overrides)
    mailer: Any = registry and registry.queryUtility(IMailer)
    if mailer is None:
        raise ConfigurationError('the application has no mailer. Does it call config.include("pyramid_mailqueue")?')
    keep_dead = {'keep_dead': (registry.settings or {}).get('mailqueue.keep_dead')}
    kept = Settings.from_program(keep_dead, needs_server=False).keep_dead
    try:
        return Runner(completed(mailer.queue), mailer.handler, keep_dead=kept)
    except AttributeError as error:
        raise ConfigurationError(
            f'the application has a mailer of its own, {type(mailer).__name__}, and mq-run --app needs the queue and '
            f'the handler of one: {error}.'
        ) from error


@contextmanager
def _import_warnings_ignored() -> Iterator[None]:
    """Ignore warnings of other packages on import, meant for developers: they are no reason for cron to send mail."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter('ignore')
        yield


def _summarize(report: RunReport, runner: Runner, *, verbose: bool) -> None:
    recovery = report.recovery
    done = {
        'recovered': len(recovery.orphans),
        'in doubt': len(recovery.in_doubt) + len(recovery.half_way),
        'released': len(recovery.sent),
        'discarded': len(recovery.discarded),
        'expired': len(recovery.expired),
        'sent': report.sent,
        'deferred': report.deferred,
        'refused': report.refused + len(recovery.buried),
    }
    if not (verbose or report.trouble or any(done.values())):
        return
    told = [f'{number} {what}' for what, number in done.items() if number] or [
        '0 sent' if report.trouble else 'nothing to do'
    ]
    try:
        waiting = f'; {_count_waiting(runner.queue)} waiting'
    except QueueError:
        # The rest of the summary holds.  If the queue is still unavailable, the next run reports it.
        waiting = ''
    print(f'mq-run: {", ".join(told)}{waiting}', flush=True)


def _count_waiting(queue: IMailQueue) -> int | str:
    number = queue.count_waiting(MOST_WAITING)
    return number if number != MOST_WAITING + 1 else f'more than {MOST_WAITING}'


if __name__ == '__main__':
    main(signals=SIGNALS)
