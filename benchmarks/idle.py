"""What a run costs that has nothing to do, as cron starts it every minute; beside Python and its modules for mail."""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.common import MB, Outcome, measure, options, print_table, run
from benchmarks.servers import free_port
from benchmarks.ways import Way, ours, peers

NOTHING = 'python -c pass'
IMPORTS = "python -c 'import smtplib, email'"


def main() -> None:
    parser = options(__doc__, rounds=10, peers='the runners of other packages')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix='benchmark-') as folder:
        turns = {
            NOTHING: partial(run, [sys.executable, '-c', 'pass']),
            IMPORTS: partial(run, [sys.executable, '-c', 'import smtplib, email']),
        }
        for way in (ours(), *peers(arguments.peers)):
            turns[way.name] = partial(_run_idle, way, Path(folder, way.package))
        measured = measure(turns, arguments.rounds, lambda outcome: f'{outcome.cpu * 1000:.0f} ms of CPU')

    def cells(way: str) -> tuple[str, ...]:
        milliseconds = 1000 * measured.median(way, _cpu)
        more = milliseconds - 1000 * measured.median(IMPORTS, _cpu)
        ratio = measured.ratio(way, NOTHING, _cpu)
        peak = measured.median(way, lambda outcome: outcome.peak / MB)
        return f'{milliseconds:.1f} ms', f'{more:+.1f} ms', f'{ratio:.2f}', f'{peak:.1f} MB'

    title = f'idle: CPU seconds of a run over an empty queue; medians of {arguments.rounds} rounds'
    print_table(title, ('CPU', 'over imports', 'to python', 'peak memory'), measured.rows(cells))


def _run_idle(way: Way, folder: Path) -> Outcome:
    if not folder.exists():
        way.fill(folder, 0, 0)
    return way.drain(folder, free_port())


def _cpu(outcome: Outcome) -> float:
    return outcome.cpu


if __name__ == '__main__':
    main()
