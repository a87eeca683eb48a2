"""
How fast a queue is drained over a line with a round trip of 20 ms, each way from the start of its process to its end.

The unit is a plain loop of the system calls that it takes, over as many connections (see plain_loop.py).
"""

from __future__ import annotations

from benchmarks.common import KIB, options
from benchmarks.drain import SIZE, measure_drains, print_drains
from benchmarks.servers import long_line, measured_round_trip, sink, sink_name
from benchmarks.ways import ours, peers, plain_loop

ROUND_TRIP_MS = 20


def main() -> None:
    parser = options(__doc__, rounds=3, peers='other packages')
    parser.add_argument(
        '--messages', type=int, default=200, help='for each connection of ours and of the unit (%(default)s)'
    )
    arguments = parser.parse_args()
    number, others = arguments.messages, peers(arguments.peers)
    ways = [(way, way.connections * number) for way in (plain_loop(1), plain_loop(5), ours(1), ours(5))]
    # Fewer say as much of those that take many round trips for each message; but a process has to start for them too.
    ways += [(way, max(1, number // 10 if way.connections == 1 else number * way.connections // 2)) for way in others]
    # The line itself takes about a millisecond longer than it was told to; what is meant is the whole way.
    line = 2 * ROUND_TRIP_MS - measured_round_trip(SIZE, round_trip_ms=ROUND_TRIP_MS) * 1000
    bare, loaded = (measured_round_trip(size, round_trip_ms=line) * 1000 for size in (1, SIZE))
    with sink() as near, long_line(near, line) as port:
        drained = measure_drains(ways, port, arguments.rounds)
    print_drains(
        f'drain_line: {SIZE // KIB} KiB each to {sink_name()} over a long line; medians of {arguments.rounds} rounds.\n'
        f'A round trip takes bare sockets {bare:.2f} ms with one octet, and {loaded:.2f} ms with {SIZE}: with one of\n'
        f'them for each message one connection cannot do more than {1000 / loaded:.1f} a second.',
        ways,
        drained,
    )


if __name__ == '__main__':
    main()
