"""The commands of ``mq-queue`` that change messages."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from pyramid_mailqueue.cli.common import EX_NOT_DONE, EX_OK, complain
from pyramid_mailqueue.cli.output import as_json, print_json, print_json_list
from pyramid_mailqueue.cli.queue_look import choice_of, print_entries
from pyramid_mailqueue.display import few, numbered, printable
from pyramid_mailqueue.exceptions import NoSuchMessage, QueueError, WrongState
from pyramid_mailqueue.interfaces import IMailQueue, IQueueAdmin
from pyramid_mailqueue.queues.entries import POSSIBLE, ExactId, QueueEntry

__all__ = ['change', 'flush']

Act = Callable[[str], QueueEntry]

#: If so many messages in a row cannot be read or written, the queue is at fault and not the message.
FAILURES = 3

#: A question about many messages lists so many of them.
NAMED = 10


class _Words(NamedTuple):
    """The texts for a change: for one message, after its id; for several, after their number; and the question."""

    one: str
    many: str
    question: str


_WORDS = {
    'retry': _Words('waits, due now', 'due now', 'Retry {}?'),
    'hold': _Words('held', 'held', 'Hold {}?'),
    'unhold': _Words('waits again', 'waiting again', 'Let {} wait again?'),
    'release': _Words('waits, due now', 'due now', 'Let {} be sent?'),
    'delete': _Words('deleted', 'deleted', 'Delete {} for good?'),
}


def change(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Apply the action to the messages that are named, or to those that the options choose."""
    if not arguments.ids:
        return _change_chosen(queue.admin, arguments)
    ids, status = arguments.ids, EX_OK
    if arguments.dry_run or (arguments.action == 'delete' and _can_ask(arguments)):
        found, status = _find(queue.admin, ids, arguments)
        if arguments.dry_run:
            print_entries(found, arguments)
            return status
        if found and not _is_confirmed(found, len(found), arguments):
            found, status = [], EX_NOT_DONE
        ids = [entry.id for entry in found]
    return max(status, _do(getattr(queue.admin, arguments.action), ids, _WORDS[arguments.action].one, arguments))


# --- those that are chosen ---------------------------------------------------


def _change_chosen(admin: IQueueAdmin, arguments: argparse.Namespace) -> int:
    """Apply the action to each message that the options choose: exactly those that the question was about."""
    states, choice, now = arguments.states or POSSIBLE[arguments.action], choice_of(arguments), time.time()
    chosen = (entry for entry in admin.entries(states) if choice.takes(entry, now))
    if arguments.dry_run:
        print_entries(chosen, arguments)
        return EX_OK
    some = list(itertools.islice(chosen, NAMED))
    ids = [ExactId(entry.id) for entry in itertools.chain(some, chosen)]
    if ids and not arguments.yes:
        if _can_ask(arguments):
            if not _is_confirmed(some, len(ids), arguments):
                return EX_NOT_DONE
        elif arguments.action == 'delete':
            complain(arguments.prog, f'nothing is deleted: say --yes to delete {numbered(len(ids), "message")}')
            return EX_NOT_DONE
    return _do_all(admin, ids, states, arguments)


def _do_all(admin: IQueueAdmin, ids: Iterable[ExactId], states: Collection[str], arguments: argparse.Namespace) -> int:
    """Apply the action to each message; one for which it is impossible does not stop the others."""
    complaints: list[str] = []
    done = _done(admin, ids, states, arguments.action, complaints)
    number = 0
    try:
        if arguments.json:
            print_json_list(map(as_json, done))
        else:
            for _ in done:
                number += 1
    finally:
        # What was done is reported, even if the queue fails at the next message.
        if not arguments.json:
            print(numbered(number, 'message'), _WORDS[arguments.action].many)
        for complaint in complaints:
            complain(arguments.prog, complaint)
    return EX_NOT_DONE if complaints else EX_OK


def _done(
    admin: IQueueAdmin, ids: Iterable[ExactId], states: Collection[str], action: str, complaints: list[str]
) -> Iterator[QueueEntry]:
    act: Act = getattr(admin, action)
    failures = 0
    for id_ in ids:
        try:
            # Another process may have changed it since it was chosen.
            if admin.find(id_).state in states:
                yield act(id_)
            failures = 0
        except NoSuchMessage:
            # It was delivered, or deleted.
            continue
        except WrongState as error:
            complaints.append(str(error))
        except QueueError as error:
            failures += 1
            if failures == FAILURES:
                raise
            complaints.append(str(error))


# --- those that are named ----------------------------------------------------


def _do(act: Act, ids: Iterable[str], done: str, arguments: argparse.Namespace) -> int:
    """Apply the action to each message, and report it; one for which it is impossible does not stop the others."""
    entries: list[QueueEntry] = []
    status = EX_OK
    try:
        for id_ in ids:
            try:
                entry = act(id_)
            except (NoSuchMessage, WrongState) as error:
                complain(arguments.prog, str(error))
                status = EX_NOT_DONE
                continue
            entries.append(entry)
            if not arguments.json:
                before = '' if entry.id.startswith(id_) else f'{printable(id_)} is now '
                print(f'{before}{printable(entry.id)}: {done}')
    finally:
        # What was done is reported, even if the queue fails at the next message.
        if arguments.json:
            print_json_list(map(as_json, entries))
    return status


def _find(admin: IQueueAdmin, ids: Iterable[str], arguments: argparse.Namespace) -> tuple[list[QueueEntry], int]:
    found: dict[str, QueueEntry] = {}
    status = EX_OK
    for id_ in ids:
        try:
            entry = admin.find(id_)
        except NoSuchMessage as error:
            complain(arguments.prog, str(error))
            status = EX_NOT_DONE
        else:
            found[entry.id] = entry
    return list(found.values()), status


# --- a question ---------------------------------------------------------------


def _can_ask(arguments: argparse.Namespace) -> bool:
    return not arguments.yes and sys.stdin is not None and sys.stdin.isatty()


def _is_confirmed(some: Collection[QueueEntry], number: int, arguments: argparse.Namespace) -> bool:
    """Ask on the terminal; the output may be a file."""
    for entry in some:
        told = (entry.id, entry.state, f'to {few(entry.recipients) or "-"}', entry.subject)
        print('  '.join(map(printable, told)).rstrip(), file=sys.stderr)
    if number > len(some):
        print(f'... and {numbered(number - len(some), "message")} more', file=sys.stderr)
    question = _WORDS[arguments.action].question.format(numbered(number, 'message'))
    print(f'{question} [y/N] ', end='', file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ('y', 'yes'):
        return True
    complain(arguments.prog, f'nothing is {_WORDS[arguments.action].many}')
    return False


# --- all ----------------------------------------------------------------------


def flush(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Make all waiting messages due now."""
    flushed = queue.admin.flush()
    if arguments.json:
        print_json({'flushed': flushed})
    else:
        print(f'{numbered(flushed, "message")} made due now')
    return EX_OK
