"""
``mq-run``: deliver what waits in the queue of an application.

It reads the application's own ini file, without importing the application, and is made for cron: nothing is printed
when there was nothing to do.
"""

from __future__ import annotations

import argparse

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pyramid_mailqueue.cli.config import parse_override, read_app_settings, read_mqrunner_section, setup_logging
from pyramid_mailqueue.delivery.runner import Runner, RunReport
from pyramid_mailqueue.exceptions import ConfigurationError, MailqueueError
from pyramid_mailqueue.settings import Settings

__all__ = ['main']

# The names and numbers of sysexits.h, which init systems and mail servers know.
EX_OK = 0
EX_SOFTWARE = 70
EX_TEMPFAIL = 75
EX_CONFIG = 78

_EPILOG = """\
exit status:
  0   the run is complete; messages that were deferred wait for a later one
  70  a defect of pyramid_mailqueue
  75  the mail server cannot be used now; what is left waits for the next run
  78  the configuration cannot be used

from cron, every minute:
  * * * * *  www-data  /srv/app/venv/bin/mq-run /srv/app/production.ini

Run it as the user that the application runs as: both must be able to read and write the queue.
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command with the arguments *argv*, those of the process if None, and exit."""
    arguments = _parser().parse_args(argv)
    sys.exit(_run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='mq-run',
        description='Deliver the mail that waits in the queue of an application, oldest first.',
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('ini', help="the application's ini file, as pserve takes it: app.ini or app.ini#name")
    parser.add_argument(
        'queue_dir', nargs='?', help='the queue directory, before the one in the ini file (needed for [mqrunner])'
    )
    parser.add_argument('-n', '--name', help='the name of the application in the ini file (default: main)')
    parser.add_argument(
        '--set',
        action='append',
        default=[],
        dest='overrides',
        metavar='KEY=VALUE',
        help='use this value for %%(KEY)s in the ini file, and before the setting KEY; may be repeated',
    )
    parser.add_argument(
        '--app',
        action='store_true',
        help='load the application and use the mailer that it has registered, with its transports',
    )
    parser.add_argument('-v', '--verbose', action='store_true', help='print a summary even if there was nothing to do')
    return parser


def _run(arguments: argparse.Namespace) -> int:
    try:
        report, runner = _deliver(arguments)
    except ConfigurationError as error:
        _complain(error)
        return EX_CONFIG
    except KeyboardInterrupt:
        print('mq-run: interrupted; what was not delivered waits for the next run', file=sys.stderr)
        return EX_TEMPFAIL
    except Exception:
        print('mq-run: this is a defect of pyramid_mailqueue; please report it with these lines:', file=sys.stderr)
        traceback.print_exc()
        return EX_SOFTWARE
    _summarize(report, runner, verbose=arguments.verbose)
    return EX_TEMPFAIL if report.trouble else EX_OK


def _complain(error: MailqueueError) -> None:
    for line in str(error).splitlines():
        print(f'mq-run: {line}', file=sys.stderr)


def _deliver(arguments: argparse.Namespace) -> tuple[RunReport, Runner]:
    build = _runner_of_app if arguments.app else _runner_of_ini
    runner = build(arguments, dict(map(parse_override, arguments.overrides)))
    return runner.run(), runner


def _runner_of_ini(arguments: argparse.Namespace, overrides: dict[str, str]) -> Runner:
    from pyramid_mailqueue.wiring import build_runner

    settings = _settings(arguments, overrides)
    setup_logging(arguments.ini, overrides, settings)
    return build_runner(settings)


def _settings(arguments: argparse.Namespace, overrides: dict[str, str]) -> Settings:
    """The settings of the app; if the queue directory is given and there is a [mqrunner] section, those of that."""
    given = {'queue_dir': Path(arguments.queue_dir).absolute()} if arguments.queue_dir else {}
    section = read_mqrunner_section(arguments.ini, overrides) if arguments.name is None else None
    if section is not None:
        return Settings.from_mqrunner_section({**section, **given})
    of_app = read_app_settings(arguments.ini, arguments.name, overrides)
    return Settings.from_mapping({**of_app, **{f'mailqueue.{key}': value for key, value in given.items()}})


def _runner_of_app(arguments: argparse.Namespace, overrides: dict[str, str]) -> Runner:
    """The runner over the queue and the transports of the mailer that the application has registered."""
    from pyramid_mailqueue.interfaces import IMailer

    registry = _load_app(arguments, overrides)
    mailer: Any = registry.queryUtility(IMailer)
    if mailer is None:
        raise ConfigurationError(
            f'{arguments.ini}: the application has no mailer. Does it call config.include("pyramid_mailqueue")?'
        )
    return Runner(mailer.queue, mailer.handler)


def _load_app(arguments: argparse.Namespace, overrides: dict[str, str]) -> Any:
    """Load the application, and return its registry; it may be wrapped in middleware, which has none."""
    import plaster
    from pyramid.config import global_registries

    try:
        loader = plaster.get_loader(arguments.ini, protocols=['wsgi'])
        loader.setup_logging(overrides)
        loader.get_wsgi_app(arguments.name, overrides)
    except Exception as error:
        # Pyramid wraps what is raised while it executes a deferred action.
        cause = getattr(error, 'evalue', error)
        if not isinstance(cause, ConfigurationError):
            traceback.print_exc()
            cause = ConfigurationError(f'{arguments.ini}: the application cannot be loaded: {error}')
        raise cause from error
    return global_registries.last


def _summarize(report: RunReport, runner: Runner, *, verbose: bool) -> None:
    """Say what was done, and nothing if that was nothing: cron would send it by mail."""
    if report.trouble:
        print(f'mq-run: {report.trouble}', file=sys.stderr)
    recovery = report.recovery
    done = {
        'recovered': len(recovery.orphans),
        'in doubt': len(recovery.in_doubt),
        'released': len(recovery.sent),
        'discarded': len(recovery.discarded),
        'sent': report.sent,
        'deferred': report.deferred,
        'refused': report.refused + len(recovery.buried),
    }
    if not (verbose or report.trouble or any(done.values())):
        return
    told = [f'{number} {what}' for what, number in done.items() if number] or ['nothing to do']
    waiting = runner.queue.counts().get('waiting', 0)
    print(f'mq-run: {", ".join(told)}; {waiting} waiting')
