"""How much memory it takes to deliver one large message: the peak over that of an idle run, by the message's size."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.common import KIB, MB, measure, options, print_table, progress
from benchmarks.servers import sink
from benchmarks.ways import Way, copy_queue, ours, peers


@dataclass(frozen=True)
class Peaks:
    """In octets; *factor* is what the message takes, in messages."""

    idle: int
    loaded: int
    seconds: float
    factor: float


def main() -> None:
    parser = options(__doc__, rounds=3, peers='other packages')
    parser.add_argument('--megabytes', type=float, default=25, help='the size of the message (%(default)s)')
    arguments = parser.parse_args()
    size = int(arguments.megabytes * MB)
    ways = [ours(), *peers(arguments.peers)]
    with tempfile.TemporaryDirectory(prefix='benchmark-') as folder, sink() as port:
        turns = {way.name: partial(_turn, way, size, Path(folder), port) for way in ways}
        measured = measure(turns, arguments.rounds, lambda peaks: f'{peaks.factor:.2f} times the message')

    def cells(way: str) -> tuple[str, ...]:
        idle, loaded = (measured.median(way, value) / MB for value in (lambda p: p.idle, lambda p: p.loaded))
        factor, seconds = (measured.median(way, value) for value in (lambda p: p.factor, lambda p: p.seconds))
        return f'{idle:.1f} MB', f'{loaded:.1f} MB', f'{factor:.2f}', f'{seconds:.2f} s'

    title = f'large: one message of {arguments.megabytes:g} MB; medians of {arguments.rounds} rounds'
    print_table(title, ('idle peak', 'peak', 'more, by size', 'run'), measured.rows(cells))


def _turn(way: Way, size: int, folder: Path, port: int) -> Peaks:
    empty, filled = folder / f'{way.package}-empty', folder / way.package
    if not filled.exists():
        progress(f'filling a queue: {way.package}')
        way.fill(empty, 0, KIB)
        way.fill(filled, 1, size)
    copy_queue(filled, folder / 'turn')
    idle = way.drain(empty, port)
    loaded = way.drain(folder / 'turn', port)
    return Peaks(idle.peak, loaded.peak, loaded.seconds, (loaded.peak - idle.peak) / size)


if __name__ == '__main__':
    main()
