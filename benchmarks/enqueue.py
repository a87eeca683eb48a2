"""
What it takes to put one message into the queue, in a transaction of its own, so that a power cut cannot lose it.

Its limit is what the disk takes (1.5 times a plain loop that creates a file, writes, fsyncs and renames it twice, and
fsyncs the directory) and what Python takes to serialise the message.  All are timed in turns, message by message.
"""

# Single system calls are the subject here.
# ruff: noqa: PTH102, PTH104

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from email import policy
from pathlib import Path

import transaction

from benchmarks.common import KIB, Measured, new_message, options, print_table, progress
from pyramid_mailqueue.application import build_mailer
from pyramid_mailqueue.settings import Settings

SIZE = 4 * KIB

PLAIN = 'plain loop: open, write, fsync, 2 renames, fsync of the directory'
SERIALISING = 'message.as_bytes(policy=SMTP)'
LIMIT = '1.5 * plain loop + serialising'
OURS = 'transaction.begin(), mailer.send(message), transaction.commit()'


def main() -> None:
    parser = options(__doc__, rounds=10)
    parser.add_argument('--messages', type=int, default=200, help='in each round (%(default)s)')
    arguments = parser.parse_args()
    measured: Measured[float] = Measured({way: [] for way in (PLAIN, SERIALISING, LIMIT, OURS)}, {})
    for number in range(1, arguments.rounds + 1):
        # A new directory for each: where many files were removed, creating others is slow for a while.
        with tempfile.TemporaryDirectory(prefix='benchmark-') as folder:
            medians = _round(Path(folder), arguments.messages)
        for way, seconds in medians.items():
            measured.results[way].append(seconds)
        progress(f'round {number} of {arguments.rounds}: {medians[OURS] / medians[LIMIT]:.2f} of the limit')

    def cells(way: str) -> tuple[str, ...]:
        milliseconds = 1000 * measured.median(way, float)
        ratios = (measured.ratio(way, unit, float) for unit in (PLAIN, LIMIT))
        return f'{milliseconds:.3f} ms', *(f'{ratio:.2f}' for ratio in ratios)

    title = f'enqueue: one message of {SIZE // KIB} KiB, durably; medians of {arguments.rounds} rounds'
    print_table(title, ('p50', 'to plain', 'to limit'), measured.rows(cells))


def _round(folder: Path, messages: int) -> dict[str, float]:
    """Return the median of the seconds that each way took."""
    message = new_message(SIZE)
    content = message.as_bytes(policy=policy.SMTP)
    settings = {'mailqueue.queue_dir': folder / 'queue', 'mailqueue.smtp_hostname': 'localhost'}
    mailer = build_mailer(Settings.from_mapping({**settings, 'mailqueue.delivery': 'queue'}))
    plain = PlainLoop(folder)

    def send() -> None:
        transaction.begin()
        mailer.send(message)
        transaction.commit()

    ways: dict[str, Callable[[], object]] = {
        PLAIN: lambda: plain.store(content),
        SERIALISING: lambda: message.as_bytes(policy=policy.SMTP),
        OURS: send,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(messages):
        for way, call in ways.items():
            times[way].append(_seconds(call))
    mailer.close()
    medians = {way: statistics.median(seconds) for way, seconds in times.items()}
    return {**medians, LIMIT: 1.5 * medians[PLAIN] + medians[SERIALISING]}


class PlainLoop:
    """The system calls that make a message durable, in directories of their own, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.tmp, self.prepared, self.new = (f'{folder}/plain-{name}' for name in ('tmp', 'prepared', 'new'))
        for path in (self.tmp, self.prepared, self.new):
            os.mkdir(path)
        self.numbers = itertools.count()

    def store(self, content: bytes) -> None:
        name = next(self.numbers)
        fd = os.open(f'{self.tmp}/{name}', os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(fd, content)
        os.fsync(fd)
        os.close(fd)
        os.rename(f'{self.tmp}/{name}', f'{self.prepared}/{name}')
        os.rename(f'{self.prepared}/{name}', f'{self.new}/{name}')
        fd = os.open(self.new, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == '__main__':
    main()
