"""Several ``mq-run --watch`` on one database, which are killed and stopped at random; and the database restarted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import pytest

from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.sql.leases import BATCH
from tests.conftest import SMTPServer
from tests.parts.databases import create_queue_tables

# MAILQUEUE_TESTS_LONG=1 takes a few minutes.
MESSAGES = 5_000 if os.environ.get('MAILQUEUE_TESTS_LONG') else 1_000

WORKERS = 4
CONNECTIONS = 2

# Seconds.
LEASE = 1
DEADLINE = 30 + MESSAGES / 20


class SlowServer(SMTPServer):
    """Takes everything, after a while: so that there is always something under way."""

    async def handle_DATA(self, server, session, envelope):
        await asyncio.sleep(0.02)
        return await super().handle_DATA(server, session, envelope)

    def deliveries(self):
        """How often each message was taken, by its recipient."""
        return Counter(recipient for envelope in [*self.received] for recipient in envelope.rcpt_tos)


@pytest.fixture
def server():
    server = SlowServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def start_worker(tmp_path):
    """Start ``mq-run --watch`` on a database; whatever runs in the end is killed."""
    workers = []

    def start_worker(url, server):
        # One of its own: another worker may be about to read what is written anew.
        ini = tmp_path / f'app-{len(workers)}.ini'
        ini.write_text(
            f"""
            [app:main]
            sqlalchemy.url = {url.replace('%', '%%')}
            mailqueue.queue = sql
            mailqueue.sql_lease = {LEASE}s
            mailqueue.smtp_hostname = 127.0.0.1
            mailqueue.smtp_port = {server.port}
            mailqueue.smtp_connections = {CONNECTIONS}
            mailqueue.plugins = none
            """.replace('            ', '')
        )
        command = [sys.executable, '-m', 'pyramid_mailqueue.cli.run', ini, '--watch', '0.2']
        with (tmp_path / 'workers.log').open('ab') as log:
            workers.append(subprocess.Popen(command, stdout=log, stderr=log))
        return workers[-1]

    yield start_worker
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            worker.send_signal(signal.SIGKILL)
            worker.send_signal(signal.SIGCONT)
        worker.wait()


def put_many(queue, number):
    recipients = [f'{it}@x.example' for it in range(number)]
    for recipient in recipients:
        queue.put(Envelope('shop@site.example', (recipient,), b'Subject: hello\r\n\r\nHello.\r\n'))
    return recipients


def has_more(server, count):
    return len(server.received) > count


def left_in(queue):
    return sum(queue.counts().values())


def test_whoever_is_killed_or_stopped_no_message_is_lost_and_few_come_twice(
    postgres_url, make_queue, server, start_worker
):
    queue, chance = make_queue(postgres_url), random.Random(4711)
    recipients = put_many(queue, MESSAGES)
    workers = [start_worker(postgres_url, server) for _ in range(WORKERS)]
    kills, stops, stopped = 0, 0, {}
    end = time.monotonic() + DEADLINE

    while left_in(queue):
        assert time.monotonic() < end, queue.counts()
        number = chance.randrange(WORKERS)
        now = time.monotonic()
        for other in [other for other, until in stopped.items() if until < now]:
            workers[other].send_signal(signal.SIGCONT)
            del stopped[other]
        if number in stopped:
            pass
        elif chance.random() < 0.5:
            workers[number].kill()
            workers[number].wait()
            workers[number] = start_worker(postgres_url, server)
            kills += 1
        elif len(stopped) < WORKERS - 1:
            workers[number].send_signal(signal.SIGSTOP)
            stopped[number] = now + LEASE * chance.uniform(0.5, 3)
            stops += 1
        time.sleep(chance.uniform(0.2, 1))
    for other in stopped:
        workers[other].send_signal(signal.SIGCONT)
    for worker in workers:
        worker.terminate()
        # Who was not yet there to hear it has been ended by it.
        assert worker.wait(60) in (0, -signal.SIGTERM)

    taken = server.deliveries()
    assert set(taken) == set(recipients)
    assert (kills > 0, stops > 0) == (True, True)
    # What was taken by the server, and not deleted yet: what a batch holds, and what each connection has under way.
    repeats = sum(taken.values()) - len(taken)
    assert repeats <= (kills + stops) * (BATCH + CONNECTIONS)
    print(f'{kills} kills, {stops} stops: {repeats} messages came twice')
    assert left_in(queue) == 0


def test_who_was_stopped_for_longer_than_the_lease_sends_nothing_that_others_have(
    postgres_url, make_queue, server, start_worker, until
):
    queue = make_queue(postgres_url)
    recipients = put_many(queue, 200)
    frozen = start_worker(postgres_url, server)
    until(lambda: len(server.received) > 20)
    frozen.send_signal(signal.SIGSTOP)
    start_worker(postgres_url, server)
    until(lambda: not left_in(queue))

    before = server.deliveries()
    frozen.send_signal(signal.SIGCONT)
    frozen.terminate()
    assert frozen.wait(60) == 0

    assert set(before) == set(recipients)
    assert server.deliveries() == before
    # What was taken from the frozen one before it could say so.
    assert sum(before.values()) - len(before) <= BATCH + CONNECTIONS


def test_when_the_database_is_restarted_the_workers_come_back_and_nothing_is_lost(
    own_postgres, make_queue, server, start_worker, until
):
    url = own_postgres.url('psycopg')
    create_queue_tables(url)
    queue = make_queue(url)
    recipients = put_many(queue, 300)
    workers = [start_worker(url, server) for _ in range(2)]
    for how in (signal.SIGINT, signal.SIGQUIT):
        until(partial(has_more, server, len(server.received) + 50))
        own_postgres.stop(how)
        time.sleep(0.3)
        own_postgres.start()
    end = time.monotonic() + DEADLINE
    while left_in(queue):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert [worker.poll() for worker in workers] == [None, None]
    for worker in workers:
        worker.terminate()
        assert worker.wait(60) == 0
    queue.close()

    taken = server.deliveries()
    assert set(taken) == set(recipients)
    assert sum(taken.values()) - len(taken) <= 2 * 2 * (BATCH + CONNECTIONS)
