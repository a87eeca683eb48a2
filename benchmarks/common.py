"""What the benchmarks share: the message, running a command and what it took, rounds, tables."""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Generic, TypeVar

__all__ = [
    'KIB',
    'MB',
    'RECIPIENT',
    'ROOT',
    'SENDER',
    'Failed',
    'Measured',
    'Outcome',
    'measure',
    'new_message',
    'options',
    'print_table',
    'progress',
    'run',
]

KIB = 1024
MB = 1_000_000

#: What ``python -m benchmarks.NAME`` has to be started in.
ROOT = Path(__file__).parent.parent

SENDER = 'shop@site.example'
RECIPIENT = 'someone@site.example'

_LINE = 'A line of text, as long as a line of a mail is, and no longer than that.\n'

T = TypeVar('T')


def new_message(size: int = 4 * KIB) -> EmailMessage:
    """Return a message of about *size* octets, as a view makes it: without ``Message-ID`` and ``Date``."""
    message = EmailMessage()
    message['From'], message['To'], message['Subject'] = SENDER, RECIPIENT, 'Your order'
    # The header needs some room, and each end of a line takes one octet more on its way.
    message.set_content(_LINE * max(1, (size - 200) // (len(_LINE) + 1)))
    return message


# --- running commands -------------------------------------------------------


class Failed(Exception):
    """A way did not do what was to be measured; the text says what happened, in one line."""


@dataclass(frozen=True)
class Outcome:
    """
    What a process took.

    :param started: ``time.monotonic()``, which is the same in all processes of a machine
    :param seconds: from its start to its end
    :param cpu: seconds of CPU, the kernel's included
    :param peak: the most memory that it had, in octets
    """

    started: float
    seconds: float
    cpu: float
    peak: int


def run(command: Sequence[str | os.PathLike[str]], timeout: float = 300) -> Outcome:
    """Run a command to its end, which has to be a success.  Raises Failed."""
    launcher = [sys.executable, '-I', '-S', Path(__file__).with_name('launch.py'), *command]
    with subprocess.Popen(
        launcher, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            told, said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise Failed(f'not done after {timeout:.0f} s') from error
        finally:
            if process.returncode is None:
                # The launcher and what it launched.
                os.killpg(process.pid, signal.SIGKILL)
    last_words = (said.strip().splitlines() or ['nothing was said'])[-1]
    if process.returncode:
        raise Failed(f'cannot be started: {last_words}')
    started, ended, cpu, peak, status = told.split()
    if status != '0':
        raise Failed(f'exit status {status}: {last_words}')
    return Outcome(float(started), float(ended) - float(started), float(cpu), int(peak))


# --- rounds -----------------------------------------------------------------


@dataclass
class Measured(Generic[T]):
    """
    The results of each way, in the order of the rounds.

    :param failures: what went wrong with those that have to be left out
    """

    results: dict[str, list[T]]
    failures: dict[str, Failed]

    def rows(self, cells: Callable[[str], Sequence[str]]) -> dict[str, Sequence[str] | Failed]:
        """What `print_table` prints: *cells* of each way, or why it has none."""
        return {way: self.failures.get(way) or cells(way) for way in self.results}

    def median(self, way: str, value: Callable[[T], float]) -> float:
        return statistics.median(map(value, self.results[way]))

    def ratio(self, way: str, unit: str, value: Callable[[T], float]) -> float:
        """The median of the ratios of each round, where the machine was equally slow for both; NaN if there is none."""
        pairs = zip(self.results[way], self.results[unit], strict=False)
        ratios = [value(result) / value(one) for result, one in pairs]
        return statistics.median(ratios) if ratios else math.nan


def measure(ways: Mapping[str, Callable[[], T]], rounds: int, show: Callable[[T], str]) -> Measured[T]:
    """Let each way have its turn in each round; one that fails is left out from then on."""
    measured: Measured[T] = Measured({way: [] for way in ways}, {})
    for number in range(1, rounds + 1):
        for way, take_turn in ways.items():
            if way in measured.failures:
                continue
            try:
                result = take_turn()
            except Failed as failure:
                measured.failures[way] = failure
                progress(f'round {number} of {rounds}: {way}: {failure}')
                continue
            measured.results[way].append(result)
            progress(f'round {number} of {rounds}: {way}: {show(result)}')
    return measured


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- what people see --------------------------------------------------------


def options(description: str | None, *, rounds: int, peers: str = '') -> argparse.ArgumentParser:
    """
    Return a parser for the command line of a benchmark.

    :param description: the docstring of the module
    :param rounds: how many there are by default
    :param peers: what is compared if the other packages are there; empty if nothing is
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if peers:
        parser.add_argument(
            'peers',
            nargs='?',
            type=_program,
            help=f'the python of a virtual environment with benchmarks/peers.txt, for {peers}',
        )
    parser.add_argument(
        '--rounds', type=int, default=rounds, help='in each of them every way has its turn (%(default)s)'
    )
    return parser


def _program(path: str) -> Path:
    if not os.access(path, os.X_OK):
        raise argparse.ArgumentTypeError(f'{path} is no program')
    # Not resolved: what a virtual environment has lies beside its link.
    return Path(path).absolute()


def print_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str] | Failed]) -> None:
    """Print the cells of each row below the names of their columns; or why there is nothing to print."""
    whole = [columns, *(cells for cells in rows.values() if not isinstance(cells, Failed))]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    width = max(map(len, rows))
    print(title, end='\n\n')
    for name, cells in {'': columns, **rows}.items():
        if isinstance(cells, Failed):
            text = f'failed: {cells}'
        else:
            text = '  '.join(f'{cell:>{space}}' for cell, space in zip(cells, widths, strict=True))
        print(f'{name:{width}}  {text}'.rstrip())
    print(flush=True)
