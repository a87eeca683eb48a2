"""
What a mail adds to a request: with the relay near, a 20 ms line away, and dead; beside pyramid_mailer.

Every way gets its turn in every round, so that a machine whose speed changes does the same to all of them.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.servers import HOST, free_port, long_line, sink

APP = Path(__file__).with_name('request_app.py')
ROUNDS = 5
REQUESTS = 200


def ours(python, folder, delivery, port, which='ours'):
    settings = {
        'mailqueue.queue_dir': str(Path(folder, f'{which}-{delivery}-{port}')),
        'mailqueue.delivery': delivery,
        'mailqueue.smtp_hostname': HOST,
        'mailqueue.smtp_port': port,
    }
    return [python, APP, which, json.dumps(settings)]


def pyramid_mailer(peers, folder, port):
    """Queued if there is no *port*."""
    settings = (
        {'mail.queue_path': str(Path(folder, 'peer'))} if port is None else {'mail.host': HOST, 'mail.port': port}
    )
    return [peers, APP, 'pyramid_mailer', json.dumps(settings)]


def main() -> None:
    python, peers = sys.executable, sys.argv[1] if len(sys.argv) > 1 else None
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        near = stack.enter_context(sink())
        far = stack.enter_context(long_line(near))
        ways = {
            'no mail': [python, APP, 'nothing', '{}'],
            'queue': ours(python, folder, 'queue', near),
            'background, relay near': ours(python, folder, 'background', near),
            'background, relay 20 ms away': ours(python, folder, 'background', far),
            'background, relay dead': ours(python, folder, 'background', free_port()),
        }
        if peers:
            ways |= {
                'queue, a message of pyramid_mailer': ours(peers, folder, 'queue', near, 'ours-same'),
                'pyramid_mailer, queued without fsync': pyramid_mailer(peers, folder, None),
                'pyramid_mailer, direct, relay near': pyramid_mailer(peers, folder, near),
                'pyramid_mailer, direct, 20 ms away': pyramid_mailer(peers, folder, far),
            }
        report({way: statistics.median(times) for way, times in measure(ways).items()})


def measure(ways):
    times = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, command in ways.items():
            # A request to a far relay takes so long that fewer say as much.
            number = REQUESTS if 'direct, 20 ms' not in way else 20
            done = subprocess.run([*command, str(number)], check=True, capture_output=True, text=True)
            times[way].append(statistics.median(map(float, done.stdout.split())))
    return times


def report(medians):
    unit = medians['queue']
    print(f'{"one request with one mail of 4 KiB":40} {"p50":>9} {"to queue":>9}')
    for way, seconds in medians.items():
        print(f'{way:40} {seconds * 1000:6.2f} ms {seconds / unit:8.2f}')
    peer = medians.get('pyramid_mailer, queued without fsync')
    if peer:
        same = medians['queue, a message of pyramid_mailer']
        print(f'\ndurable enqueue to pyramid_mailer without fsync, the same message: {same / peer:.2f}')


if __name__ == '__main__':
    main()
