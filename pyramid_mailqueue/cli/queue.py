"""
``mq-queue``: show the messages in the queue of an application, and change them.

It reads the application's own ini file, as ``mq-run`` does, and runs alongside it and the web processes.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pyramid_mailqueue.cli import queue_change, queue_init, queue_look, queue_move
from pyramid_mailqueue.cli.common import (
    add_ini_arguments,
    blaming,
    duration,
    exit_status_of,
    read_settings,
    refuse_root,
    require_queue,
)
from pyramid_mailqueue.cli.config import parse_override, setup_logging
from pyramid_mailqueue.cli.monitor import UNKNOWN
from pyramid_mailqueue.cli.output import print_json
from pyramid_mailqueue.display import printable
from pyramid_mailqueue.exceptions import ConfigurationError, MailqueueError
from pyramid_mailqueue.interfaces import IMailQueue
from pyramid_mailqueue.queues.base import has_admin
from pyramid_mailqueue.queues.entries import POSSIBLE, STATES
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.wiring import build_queue

__all__ = ['main']

T = TypeVar('T')

NAME = 'mq-queue'

_DESCRIPTION = """\
Show the messages in the queue of an application, and change them.

A message is in one of these states:
  waiting      it is delivered when it is due
  in progress  it is being delivered
  held         it is not delivered until you unhold it
  dead         it was given up, for some of its recipients or for all
  in doubt     its process died during the commit: only you can find out whether it is to be sent;
               or during a move, which another "move" completes
  corrupt      its file cannot be read
"""

_EPILOG = """\
An ID is what "list" shows, or a unique beginning of it.

  mq-queue app.ini list --state dead --recipient @example.org
  mq-queue app.ini show 1764000000.M12
  mq-queue app.ini COMMAND --help

exit status ("check" has its own):
  0    done
  1    a message was not found, or its state does not allow this; the others are done
  2    the command line cannot be used
  70   a defect of pyramid_mailqueue
  74   the output cannot be written
  75   the queue cannot be read or written now
  78   the configuration cannot be used, or there is no queue where it says

Run it as the user that the application runs as: both must be able to read and write the queue.
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command with the arguments *argv*, those of the process if None, and exit."""
    if sys.stdout is None:
        # It was closed before the command began.
        sys.stdout = Path(os.devnull).open('w')  # noqa: SIM115 - until the process ends
    # Any text of a sender can be printed on any terminal.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    arguments = _parsed(sys.argv[1:] if argv is None else argv)
    if arguments.run is queue_look.check:
        sys.exit(_as_plugin(arguments))
    # For these the queue does not exist yet, or there are two.
    start = _with_settings if arguments.run in (queue_init.init, queue_move.move) else _with_queue
    sys.exit(exit_status_of(NAME, lambda: start(arguments.run, arguments)))


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; an unusable one ends the process."""
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
        if arguments.run is queue_change.change:
            _check_which(arguments)
    except _UsageError as error:
        if next((word for word in argv if word in parser.commands), '') == 'check':
            error.parser.print_usage(sys.stderr)
            _tell_unknown(str(error), is_json='--json' in argv)
            sys.exit(UNKNOWN)
        error.parser.exit(2, f'{error.parser.format_usage()}{error.parser.prog}: error: {error}\n')
    return arguments


def _check_which(arguments: argparse.Namespace) -> None:
    """Require that messages are either named by id or chosen by options."""
    options = ('states', 'recipient', 'sender', 'older_than', 'newer_than', 'message_id')
    is_chosen = any(getattr(arguments, option) is not None for option in options)
    if bool(arguments.ids) == is_chosen:
        arguments.parser.error(
            f'name the messages to {arguments.action}, or choose them by an option such as --recipient'
            if not is_chosen
            else 'name messages, or choose them by options; not both'
        )
    for state in arguments.states or ():
        if state not in POSSIBLE[arguments.action]:
            possible = ', '.join(map(repr, POSSIBLE[arguments.action]))
            arguments.parser.error(f'{arguments.action} is for messages that are {possible}, and not {state!r}')


def _with_queue(work: Callable[[IMailQueue, argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    queue = _with_settings(_open_queue, arguments)
    try:
        return work(queue, arguments)
    finally:
        queue.close()


def _with_settings(work: Callable[[Settings, argparse.Namespace], T], arguments: argparse.Namespace) -> T:
    overrides = dict(map(parse_override, arguments.overrides))
    with blaming(arguments.ini):
        settings = read_settings(arguments.ini, arguments.name, arguments.queue_dir, overrides)
        refuse_root(settings.queue_dir, NAME)
        if arguments.changes:
            # Commands that change nothing need not be able to write the logs.
            require_queue(settings)
            setup_logging(arguments.ini, overrides, settings)
        return work(settings, arguments)


def _open_queue(settings: Settings, arguments: argparse.Namespace) -> IMailQueue:
    queue = build_queue(settings, access='use' if arguments.changes else 'look')
    if not has_admin(queue):
        raise ConfigurationError(f'mailqueue.queue = {settings.queue}: this queue has nothing for {NAME} to show.')
    return queue


# --- the command line -------------------------------------------------------


class _UsageError(Exception):
    def __init__(self, parser: argparse.ArgumentParser, problem: str) -> None:
        super().__init__(problem)
        self.parser = parser


class _Parser(argparse.ArgumentParser):
    """
    Raises errors for the caller to handle: monitoring has its own exit statuses.

    :ivar commands: the names of all commands
    """

    commands: Collection[str] = ()

    def error(self, message: str) -> NoReturn:
        raise _UsageError(self, message)


def _parser() -> _Parser:
    parser = _Parser(
        prog=NAME,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_ini_arguments(parser)
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    parser.commands = commands.choices
    _add_looking(partial(_add, commands.add_parser))
    _add_doing(partial(_add, commands.add_parser))
    _add_watching(partial(_add, commands.add_parser))
    _add_setting_up(partial(_add, commands.add_parser))
    return parser


Run = Callable[[Any, argparse.Namespace], int]
Add = Callable[..., argparse.ArgumentParser]


def _add(
    add_parser: Add,
    name: str,
    run: Run,
    help: str,
    description: str = '',
    *,
    changes: bool = False,
) -> argparse.ArgumentParser:
    parser = add_parser(
        name,
        help=help,
        description=f'{help[0].upper()}{help[1:]}.\n\n{description}'.rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, action=name, changes=changes, parser=parser, prog=NAME)
    if run not in (queue_look.print_metrics, queue_init.init):
        parser.add_argument(
            '--json', action='store_true', help='print JSON, for programs (see "Operations" in the documentation)'
        )
    return parser


def _add_looking(add: Add) -> None:
    parser = add('list', queue_look.list_messages, 'list messages, oldest first')
    _add_states(parser.add_argument, 'only messages in this state')
    parser.add_argument(
        '--recipient',
        metavar='TEXT',
        help='only messages for an address with TEXT in it, such as ada@example.org or @example.org',
    )
    parser.add_argument(
        '--sender', metavar='TEXT', help='the same for the envelope sender; "<>" finds those that have none'
    )
    _add_ages(parser)

    parser = add(
        'show',
        queue_look.show_message,
        'show all that is known about a message',
        'Its envelope, what happened to it, what the server said last, its header, and its text: all of it decoded.',
    )
    parser.add_argument('ids', nargs=1, metavar='ID')
    parser.add_argument('--raw', action='store_true', help='print the message itself, byte for byte, and nothing else')

    parser = add(
        'stats',
        queue_look.show_stats,
        'count messages by state, by domain of the recipients, and by age',
        'The columns are ages in minutes: "20" has the messages that are more than 10 and at most 20 minutes old.\n'
        'A message for several domains is counted in each of them.',
    )
    _add_states(
        parser.add_argument, 'count the domains of messages in this state (default: of all that are to be delivered)'
    )
    parser.add_argument(
        '--top', type=_whole, default=20, metavar='N', help='show the N largest domains (default: 20; JSON has all)'
    )


def _add_doing(add: Add) -> None:
    parser = add(
        'retry',
        queue_change.change,
        'try messages with the next run of mq-run',
        'A waiting message becomes due now.  A dead letter waits again as if it had just been queued: it has no\n'
        'attempts, and its whole lifetime before it.',
        changes=True,
    )
    which = _add_which(parser)
    which(
        '--all',
        action='store_const',
        dest='states',
        const=POSSIBLE['retry'],
        help='everything that waits, and every dead letter',
    )
    _add_dead(which)

    for name, help_, description in (
        ('hold', 'keep messages from being delivered until you unhold them', ''),
        (
            'unhold',
            'let held messages wait again',
            'Their age does not change: one that is older than mailqueue.lifetime is given up at its next failure.',
        ),
        (
            'release',
            'let messages in doubt be sent',
            'Do this when you know that their transaction has committed.  If it has not, delete them.',
        ),
    ):
        _add_which(add(name, queue_change.change, help_, description, changes=True))

    parser = add(
        'delete',
        queue_change.change,
        'remove messages for good',
        'In any state, unless they are being delivered.  On a terminal you are asked first; elsewhere messages chosen\n'
        'by options are deleted only with --yes.',
        changes=True,
    )
    _add_dead(_add_which(parser))

    add('flush', queue_change.flush, 'make everything that waits due now, for the next run of mq-run', changes=True)


def _add_watching(add: Add) -> None:
    parser = add(
        'check',
        queue_look.check,
        'check the state of the queue, as a Nagios plugin',
        'Critical if a limit is exceeded, a warning if there are dead letters, messages in doubt or corrupt files.\n'
        'The exit status is 0 (OK), 1 (warning), 2 (critical), or 3 (unknown: the queue cannot be read).',
    )
    parser.add_argument(
        '--max-age', type=duration, metavar='AGE', help='how old a message to be delivered may be, such as 1h'
    )
    parser.add_argument('--max-waiting', type=_whole, metavar='N', help='how many messages may wait')
    add(
        'metrics',
        queue_look.print_metrics,
        'print metrics for Prometheus',
        "In its text format: write it to a file for node_exporter's textfile collector, or serve it.",
    )


def _add_setting_up(add: Add) -> None:
    parser = add(
        'init',
        queue_init.init,
        'create the queue: its directory, or its tables in a database (mailqueue.queue = sql)',
        'What is there already is left as it is.  The application creates the directory, too, when it starts.\n'
        'Run this as the user that the application runs as.',
    )
    parser.add_argument('--sql', action='store_true', help='change nothing, and print the statements')

    parser = add(
        'move',
        queue_move.move,
        'move messages between the directory and the database of the ini file',
        'Messages that wait, are held or are dead move with all their data.  Those that are being delivered, in doubt\n'
        'or corrupt stay.  mq-run and the application may run meanwhile, with either queue.  If the move is\n'
        'interrupted, run it again: no message is lost or in both queues, and the few that were half-way are settled.\n'
        'The exit status is 1 if something is left behind.',
        changes=True,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument('--to-sql', action='store_const', dest='to', const='sql', help='into the database')
    where.add_argument('--to-maildir', action='store_const', dest='to', const='maildir', help='into the directory')


def _add_which(parser: argparse.ArgumentParser) -> Callable[..., object]:
    """Add the ids, and the options that choose messages; return what adds another option for their state."""
    parser.add_argument('ids', nargs='*', metavar='ID')
    which = parser.add_mutually_exclusive_group()
    _add_states(which.add_argument, 'all messages in this state')
    parser.add_argument(
        '--recipient',
        type=_whole_address,
        metavar='ADDRESS',
        help='all messages for ada@example.org, or for the domain @example.org',
    )
    parser.add_argument(
        '--sender', type=_whole_address, metavar='ADDRESS', help='the same for the envelope sender; "<>" is no sender'
    )
    _add_ages(parser)
    parser.add_argument('-y', '--yes', action='store_true', help='do not ask')
    parser.add_argument('--dry-run', action='store_true', help='show which messages are meant, and change nothing')
    return which.add_argument


def _add_dead(add_argument: Callable[..., object]) -> None:
    add_argument('--dead', action='store_const', dest='states', const=('dead',), help='every dead letter')


def _add_ages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--older-than', type=duration, metavar='AGE', help='only messages older than 30m, 4h or 2d')
    parser.add_argument('--newer-than', type=duration, metavar='AGE', help='only messages newer than that')
    parser.add_argument('--message-id', type=_some_text, metavar='ID', help='only messages with this Message-ID')


def _some_text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError('it must not be empty')
    return text


def _whole_address(text: str) -> str:
    """Return the text that finds exactly this address or domain: similar ones must not be changed."""
    local, at, domain = text.removeprefix('<').removesuffix('>').rpartition('@')
    if text == '<>':
        return text
    if not (at and domain):
        raise argparse.ArgumentTypeError(f'{text!r} is neither an address nor @domain')
    return f'<{local}@{domain}>' if local else f'@{domain}>'


def _add_states(add_argument: Callable[..., object], help_: str) -> None:
    add_argument(
        '--state',
        action='append',
        type=_state,
        dest='states',
        metavar='STATE',
        help=f'{help_}: {", ".join(map(repr, STATES))}; may be repeated',
    )


def _state(text: str) -> str:
    state = text.replace('-', ' ').replace('_', ' ')
    if state not in STATES:
        raise argparse.ArgumentTypeError(f'{text!r} is no state; the states are {", ".join(STATES)}')
    return state


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number')
    return int(text)


def _as_plugin(arguments: argparse.Namespace) -> int:
    """Run the check; report any outcome on stdout, and as one of the four statuses of Nagios."""
    try:
        status = _with_queue(queue_look.check, arguments)
        sys.stdout.flush()
    except MailqueueError as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = 'interrupted'
    except Exception as error:  # noqa: BLE001 - any other status would be taken for critical
        traceback.print_exc()
        problem = f'a defect of pyramid_mailqueue: {type(error).__name__}'
    else:
        return status
    _tell_unknown(problem, is_json=arguments.json)
    return UNKNOWN


def _tell_unknown(problem: str, *, is_json: bool) -> None:
    problem = printable(' '.join(problem.splitlines()))
    if is_json:
        print_json({'status': 'UNKNOWN', 'problems': [problem], 'counts': {}, 'oldest': None})
    else:
        print(f'MAILQUEUE UNKNOWN - {problem}')


if __name__ == '__main__':
    main()
