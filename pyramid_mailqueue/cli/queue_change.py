"""The commands of ``mq-queue`` that do something with messages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable, Iterator

from pyramid_mailqueue.cli.common import EX_NOT_DONE, EX_OK, complain
from pyramid_mailqueue.cli.output import as_json, print_json, print_json_list
from pyramid_mailqueue.exceptions import NoSuchMessage, WrongState
from pyramid_mailqueue.interfaces import IMailQueue, IQueueAdmin
from pyramid_mailqueue.queues.entries import QueueEntry
from pyramid_mailqueue.queues.words import few, numbered, printable

__all__ = ['delete', 'flush', 'hold', 'release', 'retry', 'unhold']

Act = Callable[[str], QueueEntry]


def hold(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Keep messages from being delivered."""
    return _do(queue.admin.hold, arguments.ids, 'held', arguments)


def unhold(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Let messages wait again that were held."""
    return _do(queue.admin.unhold, arguments.ids, 'waits again', arguments)


def release(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Let messages in doubt be sent."""
    return _do(queue.admin.release, arguments.ids, 'waits, due now', arguments)


def retry(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Try messages with the next run."""
    if arguments.ids:
        return _do(queue.admin.retry, arguments.ids, 'waits, due now', arguments)
    return _retry_all(queue.admin, arguments)


def _retry_all(admin: IQueueAdmin, arguments: argparse.Namespace) -> int:
    complaints: list[str] = []

    def retried() -> Iterator[QueueEntry]:
        for entry in admin.entries(arguments.states):
            try:
                yield admin.retry(entry.id)
            except NoSuchMessage:
                # It was delivered, or deleted, since it was listed.
                continue
            except WrongState as error:
                complaints.append(str(error))

    if arguments.json:
        print_json_list(map(as_json, retried()))
    else:
        print(numbered(sum(1 for _ in retried()), 'message'), 'due now')
    for complaint in complaints:
        complain(arguments.prog, complaint)
    return EX_NOT_DONE if complaints else EX_OK


def _do(act: Act, ids: Iterable[str], done: str, arguments: argparse.Namespace) -> int:
    """Do something with each message, and tell of it; those with which it cannot be done do not stop the others."""
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
        # What was done is told, also if the queue fails at the next.
        if arguments.json:
            print_json_list(map(as_json, entries))
    return status


def delete(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Remove messages for good; somebody who can answer is asked first."""
    ids, status = arguments.ids, EX_OK
    if not arguments.yes and sys.stdin is not None and sys.stdin.isatty():
        found, status = _find(queue.admin, ids, arguments)
        if found and not _is_confirmed(found):
            complain(arguments.prog, 'nothing is deleted')
            found, status = [], EX_NOT_DONE
        ids = [entry.id for entry in found]
    return max(status, _do(queue.admin.delete, ids, 'deleted', arguments))


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


def _is_confirmed(entries: Collection[QueueEntry]) -> bool:
    """Ask on the terminal; the output may be a file."""
    for entry in entries:
        told = (entry.id, entry.state, f'to {few(entry.recipients) or "-"}', entry.subject)
        print('  '.join(map(printable, told)).rstrip(), file=sys.stderr)
    print(f'Delete {numbered(len(entries), "message")} for good? [y/N] ', end='', file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ('y', 'yes')


def flush(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Make everything that waits due now."""
    flushed = queue.admin.flush()
    if arguments.json:
        print_json({'flushed': flushed})
    else:
        print(f'{numbered(flushed, "message")} made due now')
    return EX_OK
