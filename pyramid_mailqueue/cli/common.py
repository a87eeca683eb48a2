"""Shared by all commands: exit statuses, the ini file on the command line, and error messages."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TextIO

from pyramid_mailqueue.cli.config import has_app, read_app_settings, read_mqrunner_section
from pyramid_mailqueue.display import printable, user_name
from pyramid_mailqueue.exceptions import ConfigurationError, QueueError
from pyramid_mailqueue.settings import Settings, parse_duration
from pyramid_mailqueue.wiring import build_maildir_queue

__all__ = [
    'EX_CONFIG',
    'EX_INTERRUPTED',
    'EX_IOERR',
    'EX_NOT_DONE',
    'EX_OK',
    'EX_SOFTWARE',
    'EX_TEMPFAIL',
    'EX_UNAVAILABLE',
    'add_ini_arguments',
    'add_runner_arguments',
    'blaming',
    'complain',
    'duration',
    'exit_status_of',
    'parse_runner_arguments',
    'read_settings',
    'refuse_root',
    'require_queue',
    'silence_stdout',
]

# Most are names and numbers of sysexits.h, which init systems and mail servers know.
EX_OK = 0
# A message was not found, or is in a state in which this cannot be done.
EX_NOT_DONE = 1
EX_UNAVAILABLE = 69
EX_SOFTWARE = 70
EX_IOERR = 74
EX_TEMPFAIL = 75
EX_CONFIG = 78
# What shells report for a command that Ctrl-C has ended.
EX_INTERRUPTED = 130


# --- the command line -------------------------------------------------------


#: Where mailqueue-runner looks for its configuration if no file is named.
_CONFIGURATIONS = (Path('~/.mailqueue-runner.conf'), Path('/etc/mailqueue-runner.conf'))


class _TellVersion(argparse.Action):
    """Looks up the version on request."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        # Looking it up takes longer than an idle run.
        from pyramid_mailqueue.version import __version__

        print(parser.prog, __version__)
        parser.exit()


def add_ini_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the ini file, ``--name``, ``--set`` and ``--queue-dir``; and ``--version``."""
    parser.add_argument(
        'ini', metavar='INI', help="the application's ini file, as pserve takes it: app.ini or app.ini#name"
    )
    _add_ini_options(parser)


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the same, and the two forms of mailqueue-runner, ``QUEUE`` and ``-C``; see :func:`parse_runner_arguments`."""
    parser.add_argument(
        'ini',
        nargs='?',
        metavar='INI',
        help="the application's ini file, as pserve takes it: app.ini or app.ini#name",
    )
    parser.add_argument('queue', nargs='?', metavar='QUEUE', help='the queue directory, the same as --queue-dir')
    parser.add_argument('-C', '--config', metavar='INI', help='the ini file, as mailqueue-runner takes it')
    _add_ini_options(parser)


def _add_ini_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--version', action=_TellVersion, nargs=0, help="show the package's version and exit")
    parser.add_argument('-n', '--name', help='the name of the application in the ini file (default: main)')
    parser.add_argument(
        '--set',
        action='append',
        default=[],
        dest='overrides',
        metavar='KEY=VALUE',
        help='use this value for %%(KEY)s in the ini file, and instead of the setting KEY; may be repeated',
    )
    parser.add_argument('--queue-dir', metavar='DIRECTORY', help='the queue directory, overriding that of the ini file')


def parse_runner_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments of :func:`add_runner_arguments`; set ``ini`` and ``queue_dir`` from any of their forms."""
    arguments = parser.parse_intermixed_args(argv)
    places = [place for place in (arguments.config, arguments.ini, arguments.queue) if place]
    places = places or [str(path) for path in map(Path.expanduser, _CONFIGURATIONS) if path.exists()][:1]
    if not places:
        parser.error('the following arguments are required: INI')
    others = [place for place in (*places[1:], arguments.queue_dir) if place]
    if len(others) > 1:
        parser.error(f'name one queue directory, not several: {", ".join(others)}')
    arguments.ini = places[0]
    arguments.queue_dir = next(iter(others), None)
    return arguments


def duration(text: str) -> float:
    """Read the time span of an option, in seconds."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_settings(
    ini: str, name: str | None, queue_dir: str | None, overrides: Mapping[str, str], *, needs_queue: bool = True
) -> Settings:
    """
    Return the settings of the app, or those of the [mqrunner] section.

    The section is used if it exists, and either its queue directory is known or the file has no app.

    :param name: the name of the app from the command line; None if not given.  With a name the section is not used
    :param queue_dir: the queue directory, likewise; it overrides the one in the ini file
    :param needs_queue: whether a [mqrunner] section without a queue directory is an error
    :raises ConfigurationError: the file or a setting cannot be used
    """
    given = {'queue_dir': Path(queue_dir).absolute()} if queue_dir else {}
    section = read_mqrunner_section(ini, overrides) if name is None else None
    if section is not None:
        has_queue = given or section.get('queue_dir') or section.get('queue', 'maildir') != 'maildir'
        if has_queue or not has_app(ini, overrides):
            if needs_queue and not has_queue:
                raise ConfigurationError(
                    '[mqrunner] queue_dir is missing. Set it there, or name the queue directory with --queue-dir.'
                )
            return Settings.from_mqrunner_section({**section, **given})
    of_app = read_app_settings(ini, name, overrides)
    return Settings.from_mapping({**of_app, **{f'mailqueue.{key}': value for key, value in given.items()}})


def require_queue(settings: Settings) -> None:
    """Raise ConfigurationError if there is no queue.  Call it before log files are opened: that creates directories."""
    if settings.queue == 'maildir' and settings.queue_dir is not None:
        build_maildir_queue(settings, 'look')


def refuse_root(queue_dir: Path | None, command: str) -> None:
    """Raise ConfigurationError if root works on another user's queue: that user could not open root's files."""
    if queue_dir is None or os.geteuid() != 0:
        return
    # The application creates the folders inside, so their owner counts first.
    places = (queue_dir / 'new', queue_dir, *queue_dir.parents)
    try:
        owner = next(path for path in places if path.exists()).stat().st_uid
    except OSError as error:
        raise QueueError(f'The queue directory {queue_dir} cannot be used: {error.strerror}') from error
    if owner == 0:
        return
    user = user_name(owner)
    raise ConfigurationError(
        f'mailqueue.queue_dir = {queue_dir} belongs to the user {user}, and this is root: the application could not '
        f'open the files that root leaves there. Run {command} as {user}, for instance with: '
        f'sudo -u {user} {command} ...'
    )


# --- errors -----------------------------------------------------------------


@contextmanager
def blaming(ini: str) -> Iterator[None]:
    """Name the file in each line of a ConfigurationError that does not name one."""
    try:
        yield
    except ConfigurationError as error:
        name = Path(ini.partition('#')[0]).name
        # The advice in the text may name one, too, as "mq-queue app.ini init" does.
        lines = (line if name in line.partition(':')[0] else f'{ini}: {line}' for line in str(error).splitlines())
        raise ConfigurationError('\n'.join(lines)) from error


def exit_status_of(command: str, work: Callable[[], int]) -> int:
    """Call *work* and return its exit status.  An exception is mapped to a status, an error also reported on stderr."""
    try:
        status = work()
        # It is None if it was closed before the command began.
        if sys.stdout is not None:
            sys.stdout.flush()
    except ConfigurationError as error:
        complain(command, str(error))
        status = EX_CONFIG
    except QueueError as error:
        complain(command, str(error))
        status = EX_TEMPFAIL
    except MemoryError:
        complain(command, 'there is not enough memory for this.')
        status = EX_TEMPFAIL
    except KeyboardInterrupt:
        status = EX_INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe.
        silence_stdout()
        status = EX_OK
    except OSError as error:
        complain(command, f'the output cannot be written: {error.strerror}')
        silence_stdout()
        status = EX_IOERR
    except Exception:  # noqa: BLE001 - last resort: any error is reported and gets a status
        complain(command, 'this is a defect of pyramid_mailqueue; please report it with these lines:')
        with suppress(OSError, ValueError):
            traceback.print_exc()
        status = EX_SOFTWARE
    _let_go_of_stderr()
    return status


def _let_go_of_stderr() -> None:
    """Flush stderr; a terminal that has gone away does not change the exit status."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):
        _silence(sys.stderr)


def complain(command: str, text: str) -> None:
    """Print *text*, one line or several, to stderr.  A failure to print it is ignored."""
    with suppress(OSError, ValueError):
        for line in text.splitlines():
            print(f'{command}: {printable(line)}', file=sys.stderr)


def silence_stdout() -> None:
    """Discard all further output to stdout."""
    _silence(sys.stdout)


def _silence(stream: TextIO) -> None:
    """Redirect *stream* to /dev/null: else the interpreter would try to flush it at exit, and report a failure."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
