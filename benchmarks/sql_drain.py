"""
How fast a queue in a PostgreSQL that waits for the disk is drained into a server on this machine.

Several workers are several processes of ``mq-run`` that share the work.  Each way is timed from the start of its first
process to the end of its last one.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.common import KIB, Failed, measure, options, print_table, progress, run
from benchmarks.databases import TABLE, Source, Sql, create_queue_tables, schema, server, write_sql_ini
from benchmarks.post_office import THREADS
from benchmarks.servers import sink, sink_name
from benchmarks.ways import mq_run

SIZE = 4 * KIB

Argument = str | Path


@dataclass(frozen=True)
class Queue:
    """
    A table of messages, and a copy of it from which it is filled again.

    :param fill: puts so many messages into the table
    :param is_left: what is true of a row that was not sent
    """

    url: str
    table: str
    fill: Callable[[int], None]
    is_left: str = 'true'

    def refill(self, number: int) -> None:
        with contextlib.closing(Sql(self.url)) as sql:
            if not sql("SELECT 1 FROM pg_tables WHERE tablename = 'filled' AND schemaname = current_schema"):
                progress(f'filling {self.table}')
                self.fill(number)
                # Whatever the table keeps uncompressed is that here, too.
                sql(f'CREATE TABLE filled (LIKE {self.table} INCLUDING STORAGE)')
                sql(f'INSERT INTO filled SELECT * FROM {self.table}')
            sql(f'TRUNCATE {self.table} CASCADE')
            sql(f'INSERT INTO {self.table} OVERRIDING SYSTEM VALUE SELECT * FROM filled')
            sql.settle_down(self.table)

    def left(self) -> int:
        with contextlib.closing(Sql(self.url)) as sql:
            return sql(f'SELECT count(*) FROM {self.table} WHERE {self.is_left}')[0][0]


@dataclass(frozen=True)
class Way:
    """
    :param commands: what is started at the same time
    :param unit: the name of the way that it is measured by
    """

    name: str
    queue: Queue
    commands: list[list[Argument]]
    unit: str


def main() -> None:
    parser = options(__doc__, rounds=3, peers='django-post_office')
    parser.add_argument('--messages', type=int, default=20_000, help='in each queue (%(default)s)')
    parser.add_argument('--workers', type=int, nargs='+', default=[1, 4], help='numbers of processes (%(default)s)')
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='benchmark-')))
        port = stack.enter_context(sink())
        postgres = stack.enter_context(server())
        ways = _ours(stack.enter_context(schema(postgres)), folder, port, arguments.workers)
        if arguments.peers:
            theirs = stack.enter_context(schema(postgres))
            ways += _post_office(arguments.peers, theirs, folder, port, arguments.workers)
        turns = {way.name: partial(_turn, way, arguments.messages) for way in ways}
        measured = measure(turns, arguments.rounds, lambda rate: f'{rate:.0f}/s')
    units = {way.name: way.unit for way in ways}

    def cells(way: str) -> tuple[str, ...]:
        ratio = f'{measured.ratio(way, units[way], float):.2f}' if units[way] in measured.results else ''
        return f'{measured.median(way, float):.0f}', ratio

    title = (
        f'sql_drain: {arguments.messages:,} messages of {SIZE // KIB} KiB each to {sink_name()} on this machine; '
        f'medians of {arguments.rounds} rounds'
    )
    print_table(title, ('a second', 'to post_office'), measured.rows(cells))


def _turn(way: Way, messages: int) -> float:
    way.queue.refill(messages)
    with ThreadPoolExecutor(len(way.commands)) as threads:
        outcomes = [*threads.map(run, way.commands)]
    left = way.queue.left()
    if left:
        raise Failed(f'{left} messages were not sent')
    ended = max(outcome.started + outcome.seconds for outcome in outcomes)
    return messages / (ended - min(outcome.started for outcome in outcomes))


def _ours(url: str, folder: Path, port: int, workers: list[int]) -> list[Way]:
    create_queue_tables(url)

    def fill(number: int) -> None:
        with contextlib.closing(Source(url, SIZE)) as source:
            source.put(number)

    queue = Queue(url, TABLE, fill)
    ini = write_sql_ini(folder, url, port)
    return [Way(_mq_run(number), queue, [[mq_run(), ini]] * number, _peer(number)) for number in workers]


def _post_office(python: Path, url: str, folder: Path, port: int, workers: list[int]) -> list[Way]:
    libpq = url.replace('postgresql+psycopg://', 'postgresql://')
    command = [python, '-m', 'benchmarks.post_office']

    def fill(number: int) -> None:
        run([*command, 'fill', folder, str(number), str(SIZE), libpq])

    # Their statuses are numbers, and 0 is "sent".
    queue = Queue(url, 'post_office_email', fill, 'status IS DISTINCT FROM 0')
    return [
        Way(_peer(number), queue, [[*command, 'send', folder, str(port), str(number), libpq]], _peer(number))
        for number in workers
    ]


def _mq_run(number: int) -> str:
    return f'mq-run, {number} worker{"s" if number > 1 else ""}'


def _peer(number: int) -> str:
    return f'django-post_office, {number} process{"es" if number > 1 else ""} of {THREADS} threads'


if __name__ == '__main__':
    main()
