"""
How long it takes to claim messages in a PostgreSQL that waits for the disk, by how many are waiting.

Either all of them are due, or only those that are claimed.  The claim is the statement that takes 50 messages, as each
of a run's does but for the first few; nothing of their contents is read by it.  *Nothing due* is the question that
``mq-run --watch`` asks every few seconds.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from functools import partial
from operator import itemgetter

from benchmarks.common import Failed, measure, options, print_table, progress
from benchmarks.databases import TABLE, Source, Sql, create_queue_tables, schema, server
from pyramid_mailqueue.queues.sql.queue import CLAIM_BATCH, SQLQueue
from pyramid_mailqueue.results import Settlement

#: Contents that are larger than 2 KB are not kept in the row; with this size a row is as large as theirs.
SIZE = 300

HOUR = 3600


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument(
        '--waiting', type=int, nargs='+', default=[1_000, 10_000, 100_000, 1_000_000], help='%(default)s'
    )
    parser.add_argument('--claims', type=int, default=40, help='in each round (%(default)s)')
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(server())
        turns = {}
        for which, due in (('all are due', -HOUR), (f'{CLAIM_BATCH} are due', HOUR)):
            for number in arguments.waiting:
                url = stack.enter_context(schema(postgres))
                backlog = stack.enter_context(contextlib.closing(Backlog(url, number, due)))
                turns[f'{number:,} wait, {which}'] = partial(backlog.claim, arguments.claims)
        measured = measure(turns, arguments.rounds, lambda times: f'{1000 * times[0]:.2f} ms, {1000 * times[1]:.2f} ms')

    def cells(way: str) -> tuple[str, ...]:
        return tuple(f'{1000 * measured.median(way, itemgetter(which)):.2f} ms' for which in (0, 1))

    title = f'sql_backlog: seconds of a claim of {CLAIM_BATCH} messages; medians of {arguments.rounds} rounds'
    print_table(title, ('claim', 'nothing due'), measured.rows(cells))


class Backlog:
    """A queue in which so many messages wait, which are due in so many seconds."""

    def __init__(self, url: str, number: int, due: float) -> None:
        create_queue_tables(url)
        self._sql = Sql(url)
        self._source = Source(url, SIZE)
        self._queue = SQLQueue(url)
        progress(f'filling a queue: {number:,} messages')
        self._source.put(number, due)
        self._sql.settle_down(TABLE)

    def close(self) -> None:
        self._queue.close()
        self._source.close()
        self._sql.close()

    def claim(self, times: int) -> tuple[float, float]:
        """Return the medians of the seconds of a claim of what is oldest, and of a claim that finds nothing."""
        found, nothing = [], []
        for _ in range(times):
            # Older than all others.
            self._source.put(CLAIM_BATCH, -2 * HOUR)
            start = time.perf_counter()
            claims = self._queue._claim_after((-math.inf, ''), time.time(), CLAIM_BATCH)
            found.append(time.perf_counter() - start)
            if len(claims) != CLAIM_BATCH:
                raise Failed(f'{len(claims)} messages were claimed')
            for claim in claims:
                claim.settle(Settlement())
            self._queue.flush()
            start = time.perf_counter()
            if self._queue._claim_after((-math.inf, ''), time.time() - 1.5 * HOUR, CLAIM_BATCH):
                raise Failed('something was due')
            nothing.append(time.perf_counter() - start)
        return statistics.median(found), statistics.median(nothing)


if __name__ == '__main__':
    main()
