"""The ways to drain a queue: each has its own queue, filled by its own API, and a command that delivers from it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Failed, Outcome, run
from benchmarks.post_office import THREADS
from benchmarks.servers import HOST

__all__ = ['Way', 'copy_queue', 'mq_run', 'ours', 'peers', 'plain_loop', 'write_ini']

Argument = str | Path


@dataclass(frozen=True)
class Way:
    """
    One way to drain a queue.

    :param name: what people see
    :param package: what fills the queue, as ``benchmarks.fill`` knows it
    :param python: what has that package
    :param connections: how many it uses at once
    :param command: makes the command that drains the queue in a folder, to a server at a port of this host
    :param left: how many messages are still in the queue in a folder, or were put aside
    :param is_unit: whether the others are measured by it
    """

    name: str
    package: str
    python: Argument
    connections: int
    command: Callable[[Path, int], list[Argument]]
    left: Callable[[Path], int]
    is_unit: bool = False

    def fill(self, folder: Path, messages: int, size: int) -> None:
        """Raises Failed."""
        folder.mkdir()
        run([self.python, '-m', 'benchmarks.fill', self.package, folder, str(messages), str(size)])

    def drain(self, folder: Path, port: int) -> Outcome:
        """Raises Failed, also if something is left."""
        outcome = run(self.command(folder, port))
        left = self.left(folder)
        if left:
            raise Failed(f'{left} messages were not sent')
        return outcome


def plain_loop(connections: int) -> Way:
    def command(folder: Path, port: int) -> list[Argument]:
        script = Path(__file__).with_name('plain_loop.py')
        return [sys.executable, script, folder / 'queue', str(port), str(connections)]

    name = _named('plain loop', connections)
    return Way(name, 'ours', sys.executable, connections, command, _files_in_queue, is_unit=True)


def ours(connections: int = 4) -> Way:
    def command(folder: Path, port: int) -> list[Argument]:
        return [mq_run(), write_ini(folder, port, connections)]

    return Way(_named('mq-run', connections), 'ours', sys.executable, connections, command, _files_in_queue)


def mq_run() -> Path:
    """The installed command, as cron starts it."""
    return Path(sys.executable).with_name('mq-run')


def peers(python: Path | None) -> list[Way]:
    """Return the ways of other packages, which *python* has; none if there is no such python."""
    if python is None:
        return []

    def zope(folder: Path, port: int) -> list[Argument]:
        command = python.with_name('zope-sendmail')
        return [command, '--hostname', HOST, '--port', str(port), '--no-tls', folder / 'queue']

    def repoze(folder: Path, port: int) -> list[Argument]:
        return [python.with_name('qp'), '--hostname', HOST, '--port', str(port), '--no-tls', folder / 'queue']

    def runner(folder: Path, port: int) -> list[Argument]:
        config = folder / 'runner.conf'
        config.write_text(f'[mqrunner]\nsmtp_hostname = {HOST}\nsmtp_port = {port}\n')
        # Its command has the same name as ours, and an environment with both has one of them.
        start = 'from schwarz.mailqueue.cli import one_shot_queue_run_main; one_shot_queue_run_main()'
        return [python, '-c', start, '--config', config, folder / 'queue']

    def post_office(folder: Path, port: int) -> list[Argument]:
        return [python, '-m', 'benchmarks.post_office', 'send', folder, str(port), '1']

    def version(package: str) -> str:
        ask = f'from importlib.metadata import version; print(version({package!r}))'
        done = subprocess.run([python, '-c', ask], capture_output=True, text=True, check=False)
        return f'{package} {done.stdout.strip() or "(missing)"}'

    return [
        Way(version('zope.sendmail'), 'zope', python, 1, zope, _files_in_queue),
        Way(version('repoze.sendmail'), 'repoze', python, 1, repoze, _files_in_queue),
        Way(version('mailqueue-runner'), 'runner', python, 1, runner, _files_in_queue),
        Way(
            f'{version("django-post_office")}, SQLite, {THREADS} threads',
            'post_office',
            python,
            THREADS,
            post_office,
            _unsent_in_database,
        ),
    ]


def copy_queue(filled: Path, folder: Path) -> None:
    """Make *folder* a copy of a filled one, and wait until the disk has it, as if it had been filled a while ago."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(filled, folder)
    os.sync()


def _named(name: str, connections: int) -> str:
    return f'{name}, {connections} connection{"s" if connections > 1 else ""}'


def write_ini(folder: Path, port: int, connections: int) -> Path:
    ini = folder / 'app.ini'
    ini.write_text(
        '[app:main]\n'
        'use = egg:shop\n'
        'mailqueue.queue_dir = %(here)s/queue\n'
        f'mailqueue.smtp_hostname = {HOST}\n'
        f'mailqueue.smtp_port = {port}\n'
        f'mailqueue.smtp_connections = {connections}\n'
    )
    return ini


def _files_in_queue(folder: Path) -> int:
    return sum(path.is_file() for path in Path(folder, 'queue').rglob('*'))


def _unsent_in_database(folder: Path) -> int:
    """Its statuses are numbers, and 0 is "sent"."""
    with contextlib.closing(sqlite3.connect(folder / 'post_office.sqlite')) as database:
        return database.execute('SELECT count(*) FROM post_office_email WHERE status IS NOT 0').fetchone()[0]
