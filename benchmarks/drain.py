"""
How fast a queue is drained into a server on this machine, each way from the start of its process to its end.

The unit is a plain loop of the system calls that it takes, over as many connections (see plain_loop.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.common import KIB, Measured, measure, options, print_table, progress
from benchmarks.servers import sink, sink_name
from benchmarks.ways import Way, copy_queue, ours, peers, plain_loop

__all__ = ['measure_drains', 'print_drains']

SIZE = 4 * KIB


def main() -> None:
    parser = options(__doc__, rounds=5, peers='other packages')
    parser.add_argument('--messages', type=int, default=4000, help='in each queue (%(default)s)')
    arguments = parser.parse_args()
    number = arguments.messages
    ways = [(plain_loop(1), number), (plain_loop(4), number), (ours(1), number), (ours(4), number)]
    # One of them would take minutes.
    ways += [(way, max(1, number // 20) if way.package == 'runner' else number) for way in peers(arguments.peers)]
    with sink() as port:
        drained = measure_drains(ways, port, arguments.rounds)
    title = f'drain: {SIZE // KIB} KiB each to {sink_name()} on this machine; medians of {arguments.rounds} rounds'
    print_drains(title, ways, drained)


def measure_drains(ways: Sequence[tuple[Way, int]], port: int, rounds: int) -> Measured[float]:
    """Return the rate of each way, which has so many messages to send to the server at *port*, in messages a second."""
    with tempfile.TemporaryDirectory(prefix='benchmark-') as temporary:
        folder = Path(temporary)
        turns = {way.name: partial(_turn, way, number, folder, port) for way, number in ways}
        return measure(turns, rounds, lambda rate: f'{rate:.0f}/s')


def _turn(way: Way, messages: int, folder: Path, port: int) -> float:
    filled = folder / f'{way.package}-{messages}'
    if not filled.exists():
        progress(f'filling a queue: {way.package}')
        way.fill(filled, messages, SIZE)
    copy_queue(filled, folder / 'turn')
    return messages / way.drain(folder / 'turn', port).seconds


def print_drains(title: str, ways: Sequence[tuple[Way, int]], drained: Measured[float]) -> None:
    """Print the rates, and their ratios to the plain loop with as many connections, or with the most that it has."""
    units = {way.connections: way.name for way, _ in ways if way.is_unit}
    units_of = {way.name: units.get(way.connections, units[max(units)]) for way, _ in ways}
    messages_of = {way.name: number for way, number in ways}

    def cells(way: str) -> tuple[str, str, str]:
        ratio = drained.ratio(way, units_of[way], float)
        return f'{messages_of[way]}', f'{drained.median(way, float):.1f}', f'{ratio:.2f}'

    print_table(title, ('messages', 'a second', 'to plain'), drained.rows(cells))


if __name__ == '__main__':
    main()
