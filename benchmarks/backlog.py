"""
What a run costs when very many messages wait and few of them are due.

Told are the seconds from the start of the process until a server on this machine has the first message, and the peak
of the memory.  The directory and the times of the messages are in the memory of the kernel, as they are every minute.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from email import policy
from functools import partial
from pathlib import Path

from benchmarks.common import (
    KIB,
    MB,
    RECIPIENT,
    SENDER,
    Failed,
    measure,
    new_message,
    options,
    print_table,
    progress,
    run,
)
from benchmarks.servers import watched_sink
from benchmarks.ways import ours
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.queue_file import QueueHeader, serialize_header

DUE = 50
#: Small ones: nobody reads them.
SIZE = 1 * KIB
#: What a file of this size takes on most file systems, in octets.
ROOM = 4 * KIB


@dataclass(frozen=True)
class Run:
    """
    :param first: seconds until the server had the first message
    :param seconds: until the end of the process
    :param peak: the most memory that it had, in octets
    """

    first: float
    seconds: float
    peak: int


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument('--waiting', type=int, default=100_000, help='how many messages are in the queue (%(default)s)')
    parser.add_argument('--million', action='store_true', help='do it with 1,000,000 messages too')
    arguments = parser.parse_args()
    numbers = [DUE, arguments.waiting] + ([1_000_000] if arguments.million else [])
    with tempfile.TemporaryDirectory(prefix='benchmark-') as folder:
        turns = {f'{number:,} in the queue': partial(_turn, Path(folder, str(number)), number) for number in numbers}
        measured = measure(turns, arguments.rounds, lambda run: f'{run.first:.2f} s, {run.peak / MB:.1f} MB')
        progress('removing the queues')

    def cells(way: str) -> tuple[str, ...]:
        first, seconds = measured.median(way, lambda run: run.first), measured.median(way, lambda run: run.seconds)
        return f'{first:.2f} s', f'{seconds:.2f} s', f'{measured.median(way, lambda run: run.peak / MB):.1f} MB'

    title = f'backlog: {DUE} messages are due, to a sink in Python; medians of {arguments.rounds} rounds'
    print_table(title, ('first message', 'whole run', 'peak memory'), measured.rows(cells))


def _turn(folder: Path, number: int) -> Run:
    queue = folder / 'queue'
    if not folder.exists():
        if shutil.disk_usage(folder.parent).free < 2 * ROOM * number:
            raise Failed('there is not enough room on the disk; TMPDIR chooses another one')
        progress(f'filling a queue: {number:,} messages')
        MaildirQueue(queue)
        _put(queue, 'waiting', number - DUE, time.time() + 3600)
    _put(queue, 'due', DUE, time.time() - 3600)
    os.sync()
    with watched_sink() as (port, arrivals):
        outcome = run(ours().command(folder, port))
    if len(arrivals) != DUE:
        raise Failed(f'{len(arrivals)} messages of {DUE} were sent')
    return Run(arrivals[0] - outcome.started, outcome.seconds, outcome.peak)


def _put(queue: Path, name: str, number: int, due: float) -> None:
    """Write messages as the package does, without waiting for the disk each time."""
    header = serialize_header(QueueHeader(SENDER, (RECIPIENT,), queued_at=time.time()))
    data = header + new_message(SIZE).as_bytes(policy=policy.SMTP)
    for count in range(number):
        fd = os.open(queue / 'new' / f'{name}-{count}', os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, data)
        os.utime(fd, (due, due))
        os.close(fd)


if __name__ == '__main__':
    main()
