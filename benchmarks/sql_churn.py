"""
What a steady load leaves behind in a PostgreSQL that waits for the disk: dead rows, and what they do to claims.

``mq-run`` sends what is due, and as many messages are put in as it has sent, so that the same number is always waiting.
Each time that a part of them has gone through, the sizes are told, and what it takes to find the next 50: the pages
that are looked at, which no neighbour of the machine can change, and the time.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import KIB, MB, Failed, options, print_table, progress
from benchmarks.databases import TABLE, Source, Sql, create_queue_tables, schema, server, sizes, write_sql_ini
from benchmarks.servers import sink
from benchmarks.ways import mq_run
from pyramid_mailqueue.queues.sql.queue import CLAIM_BATCH

SIZE = 4 * KIB

#: As PostgreSQL comes, and what becomes of it where something keeps VACUUM from its work.
WAYS = {'autovacuum': 'autovacuum_enabled = true', 'no vacuum': 'autovacuum_enabled = false'}

#: The part of a claim that looks for messages.
_FIND = (
    f"SELECT id FROM {TABLE} WHERE state = 'waiting' AND due <= extract(epoch FROM clock_timestamp()) "
    f"AND (due, id) > ('-infinity', '') ORDER BY due, id LIMIT {CLAIM_BATCH} FOR UPDATE SKIP LOCKED"
)

#: Seconds; only what does not go on takes so long.
DEADLINE = 60


def main() -> None:
    parser = options(__doc__, rounds=1)
    parser.add_argument('--messages', type=int, default=100_000, help='that go through (%(default)s)')
    parser.add_argument('--waiting', type=int, default=1_000, help='all the time (%(default)s)')
    parser.add_argument('--workers', type=int, default=1, help='processes of mq-run (%(default)s)')
    arguments = parser.parse_args()
    with sink() as port, server() as postgres:
        for name, parameter in WAYS.items():
            for _ in range(arguments.rounds):
                with schema(postgres) as url, contextlib.closing(Sql(url)) as sql:
                    create_queue_tables(url)
                    sql(f'ALTER TABLE {TABLE} SET ({parameter}, toast.{parameter})')
                    _report(name, url, sql, port, arguments)


def _report(name, url, sql, port, arguments) -> None:
    started = time.monotonic()
    rows = dict(_samples(url, sql, port, arguments))
    rate = arguments.messages / (time.monotonic() - started)
    title = (
        f'sql_churn: {arguments.messages:,} messages of {SIZE // KIB} KiB go through, {rate:.0f} a second, and '
        f'{arguments.waiting:,} wait; {name}'
    )
    columns = ('rows', 'indexes', 'contents', 'dead rows', 'vacuums', 'pages of a claim', 'time of a claim')
    print_table(title, columns, rows)


def _samples(url, sql, port, arguments) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield what is told, each time that a part of the messages has gone through."""
    with contextlib.closing(Source(url, SIZE)) as source:
        source.put(arguments.waiting)
        sql.settle_down(TABLE)
        put, step, following = arguments.waiting, arguments.messages // 5, 0
        with _workers(url, port, arguments.workers):
            end = time.monotonic() + DEADLINE
            while following <= arguments.messages:
                missing = arguments.waiting - sql(f'SELECT count(*) FROM {TABLE}')[0][0]
                if missing > 0:
                    source.put(missing)
                    put += missing
                    end = time.monotonic() + DEADLINE
                elif time.monotonic() > end:
                    raise Failed('nothing goes on')
                through = put - arguments.waiting
                if through >= following:
                    progress(f'{through:,} messages are through')
                    yield f'{following:,}', _sample(sql)
                    following += step
                time.sleep(0.02)


def _sample(sql: Sql) -> tuple[str, ...]:
    megabytes = (f'{size / MB:.1f} MB' for size in sizes(sql))
    ((dead, vacuums),) = sql(
        f"SELECT n_dead_tup, autovacuum_count FROM pg_stat_user_tables WHERE relid = '{TABLE}'::regclass"
    )
    plans = [_plan(sql) for _ in range(5)]
    pages = statistics.median(plan['Plan']['Shared Hit Blocks'] + plan['Plan']['Shared Read Blocks'] for plan in plans)
    milliseconds = statistics.median(plan['Execution Time'] for plan in plans)
    return *megabytes, f'{dead:,}', f'{vacuums}', f'{pages:.0f}', f'{milliseconds:.2f} ms'


def _plan(sql: Sql) -> dict:
    (told,) = sql(f'EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {_FIND}')[0]
    return (json.loads(told) if isinstance(told, str) else told)[0]


@contextlib.contextmanager
def _workers(url: str, port: int, number: int) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix='benchmark-') as folder:
        ini = write_sql_ini(Path(folder), url, port)
        workers = [_started([mq_run(), ini, '--watch', '0.2']) for _ in range(number)]
        try:
            yield
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait(DEADLINE)


def _started(command: list[str | Path]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == '__main__':
    main()
