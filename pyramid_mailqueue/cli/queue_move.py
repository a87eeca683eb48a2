"""The command of ``mq-queue`` that moves messages between the two queues."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pyramid_mailqueue.cli.common import EX_NOT_DONE, EX_OK, complain
from pyramid_mailqueue.cli.output import print_json
from pyramid_mailqueue.display import numbered, printable
from pyramid_mailqueue.queues.moving import MOST_MESSAGES, MOVED, Move
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.wiring import open_move

__all__ = ['move']

#: Seconds between two lines on a terminal.
BETWEEN_LINES = 2

#: Of the messages that cannot be moved, so many are listed.
SOME = 20


def move(settings: Settings, arguments: argparse.Namespace) -> int:
    """Move all that can be moved, and report what was left behind."""
    left = None
    with open_move(settings, to=arguments.to) as work, _heard_signals() as heard:
        try:
            work.run(lambda: bool(heard), _progress(work, arguments.prog))
            left = {state: number for state, number in work.source.counts().items() if number}
        finally:
            # What was done is reported, even if one of the queues fails.
            _tell(work, left, arguments)
    if heard and not work.report.is_complete:
        complain(arguments.prog, 'the move is not complete; do it again')
        return 128 + heard[0]
    return EX_NOT_DONE if left or work.report.half_way else EX_OK


@contextmanager
def _heard_signals() -> Iterator[list[int]]:
    """Yield the signals received so far.  The first one stops the move after its batch; the next one is not caught."""
    heard: list[int] = []
    former: dict[int, Any] = {}

    def hear(number: int, _frame: FrameType | None) -> None:
        heard.append(number)
        restore()

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            former[number] = signal.signal(number, hear)
    try:
        yield heard
    finally:
        restore()


def _progress(work: Move, prog: str) -> Callable[[], None]:
    """Return the function that prints the progress on a terminal, now and then."""
    if sys.stderr is None or not sys.stderr.isatty():
        return lambda: None
    begin = last = time.monotonic()

    def tell() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= BETWEEN_LINES:
            last = now
            moved = work.report.moved.total()
            print(f'{prog}: {moved} moved, {moved / (now - begin):.0f}/s', file=sys.stderr, flush=True)

    return tell


def _tell(work: Move, left: Mapping[str, int] | None, arguments: argparse.Namespace) -> None:
    report = work.report
    if arguments.json:
        refused = [{'id': id_, 'reason': reason} for id_, reason in report.refused.items()]
        moved = {state: report.moved[state] for state in MOVED}
        print_json(
            {'moved': moved, 'settled': report.settled, 'half_way': report.half_way, 'refused': refused, 'left': left}
        )
        return
    if report.settled:
        print('Messages that an interrupted move had left half-way are in one of the queues again.')
    if left is not None or report.moved:
        messages = numbered(report.moved.total(), 'message')
        print(f'{messages} moved to {printable(work.target.name)}{_by_state(report.moved)}')
    for id_, reason in list(report.refused.items())[:SOME]:
        complain(arguments.prog, f'{id_} cannot be moved: {reason}')
    if len(report.refused) > SOME:
        complain(arguments.prog, f'{len(report.refused) - SOME} more cannot be moved')
    if report.half_way:
        most = report.half_way * MOST_MESSAGES
        complain(
            arguments.prog,
            f'up to {most} messages are half-way, in doubt: they are not delivered until you run the move again',
        )
    if left:
        print(f'left in {printable(work.source.name)}{_by_state(left)}')


def _by_state(numbers: Mapping[str, int]) -> str:
    told = ', '.join(f'{number} {state}' for state, number in numbers.items())
    return f': {told}' if told else ''
