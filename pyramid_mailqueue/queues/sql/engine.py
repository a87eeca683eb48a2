"""Makes an engine of SQLAlchemy for a queue from the URL of a database."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import QueuePool

__all__ = [
    'AS_BYTES',
    'CONNECTIONS',
    'OLDEST',
    'SQLITE_PATIENCE',
    'file_of',
    'is_same_database',
    'make_engine',
    'shown',
    'without_passwords',
]

#: The option of a statement whose result is fetched as bytes, if the driver can: contents would come as digits.
AS_BYTES = 'mailqueue_as_bytes'

#: How many connections one process has, at most.
CONNECTIONS = 2

#: How long a statement waits for a lock of SQLite, in seconds.
SQLITE_PATIENCE = 15

#: The oldest version of a database that will do, by its dialect: for comparison, and for display.
OLDEST = {'postgresql': ((12,), 'PostgreSQL 12'), 'sqlite': ((3, 35), 'SQLite 3.35')}

_SEVERAL_HOSTS = 'of several hosts each is a parameter: ?host=db1.example:5432&host=db2.example:5432'

# For a URL without a port.
_PORTS = {'postgresql': 5432}

# Time limits for a host that vanished, or a lock of SQLite: in seconds, but tcp_user_timeout in milliseconds.
_CONNECT: Mapping[str, Mapping[str, Any]] = {
    'postgresql': {'connect_timeout': 10, 'keepalives_idle': 30, 'keepalives_interval': 10, 'tcp_user_timeout': 60_000},
    'sqlite': {'timeout': SQLITE_PATIENCE},
}


def make_engine(written: str | URL) -> Engine:
    """
    Return the engine of a queue.

    :param written: a URL as SQLAlchemy takes it
    :raises ArgumentError, NoSuchModuleError, ImportError, ValueError: this is no database for a queue
    """
    url = _parsed(written)
    dialect = url.get_backend_name()
    if dialect == 'postgres':
        raise ValueError('SQLAlchemy calls it postgresql:// and not postgres://')
    if dialect not in OLDEST:
        raise ValueError(f'{dialect} is neither postgresql nor sqlite')
    if url.get_dialect().is_async:
        raise ValueError(f'{url.drivername} is for asyncio')
    hosts = [host for value in url.normalized_query.get('host', ()) if ',' in value for host in value.split(',')]
    if any(re.fullmatch(r'[^:/]*:[0-9]*', host) for host in hosts):
        raise ValueError(f'several hosts with ports cannot be in one parameter: {_SEVERAL_HOSTS}')
    options = dict(_CONNECT[dialect])
    if url.get_driver_name() == 'psycopg':
        # A statement that was prepared on one connection is missing on another one, which a pooler may give us; and its
        # plan may be for a table that was empty then.
        options['prepare_threshold'] = None
    # The options in the URL take precedence.
    options = {key: value for key, value in options.items() if key not in url.query}
    if dialect == 'postgresql':
        # Except for this: texts are UTF-8, whatever the environment or the URL says.
        options['client_encoding'] = 'utf8'
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=CONNECTIONS,
        max_overflow=0,
        # There is one for each thread that has a turn (see :mod:`~.sql.database`), so no thread waits here.
        pool_timeout=1,
        isolation_level='AUTOCOMMIT',
        connect_args=options,
    )
    # Before SQLAlchemy asks anything: a standby answers nothing where the default is serializable.
    event.listen(engine, 'connect', _read_committed if dialect == 'postgresql' else _set_up_sqlite, insert=True)
    if engine.dialect.driver == 'psycopg':
        event.listen(engine, 'before_cursor_execute', _ask_for_bytes)
    return engine


#: Shorter ones, such as numbers, mean something else in texts.
SHORTEST_SECRET = 4

# Options without secrets: of libpq, of its drivers, and of SQLite.
_HARMLESS = frozenset({
    'application_name', 'cache', 'channel_binding', 'client_encoding', 'connect_timeout', 'dbname', 'gssencmode',
    'fallback_application_name', 'host', 'hostaddr', 'immutable', 'keepalives', 'keepalives_count', 'keepalives_idle',
    'keepalives_interval', 'load_balance_hosts', 'mode', 'nolock', 'options', 'passfile', 'port', 'prepare_threshold',
    'service', 'sslcert', 'sslcrl', 'sslkey', 'sslmode', 'sslnegotiation', 'sslrootcert', 'target_session_attrs',
    'tcp_user_timeout', 'timeout', 'uri', 'user', 'vfs',
})  # fmt: skip


# The part after the first @ would be taken for a host, a port, a database or an option, and shown as such.
_PASSWORD_WITH_AT = re.compile(r'[^:/]+://[^:/@]*:[^@]*@(?:[^?]*|[^?]*\?[^=&]*)@')


def shown(url: URL) -> str:
    """Return *url* for display, without its passwords, and without options that may hold one."""
    return url.difference_update_query([*_secrets(url)]).render_as_string(hide_password=True)


def without_passwords(text: str, url: URL) -> str:
    """Return *text*, which may quote from *url*, without the passwords of that."""
    options = [
        value
        for key, values in _secrets(url).items()
        for value in values
        if 'password' in key or len(value) >= SHORTEST_SECRET
    ]
    for secret in filter(None, [url.password, *options]):
        text = re.sub(rf'(?<!\w){re.escape(secret)}(?!\w)', '***', text)
    # In strings of parameters, and in URLs, inside the text.
    text = re.sub(r"(?i)(password\s*=\s*)('[^']*'|\S+)", r'\1***', text)
    return re.sub(r'(?<=://)([^\s:/@]*):[^\s@]*@', r'\1:***@', text)


def _secrets(url: URL) -> Mapping[str, Sequence[str]]:
    """Return the options in *url* that are not known to be without secrets."""
    return {
        key: values
        for key, values in url.normalized_query.items()
        if key not in _HARMLESS or (key == 'dbname' and any('=' in value or '://' in value for value in values))
    }


def is_same_database(one: str, other: str) -> bool:
    """Whether two URLs lead to the same database, as far as URLs can tell.  Raises ValueError for what is no URL."""
    try:
        return _identity(_parsed(one)) == _identity(_parsed(other))
    except ArgumentError as error:
        raise ValueError(str(error)) from error


def _identity(url: URL) -> Mapping[str, object]:
    """
    Return what identifies a database, in the URL and in the parameters of libpq that override it.

    The user, the driver and the other options may change.
    """
    query = url.normalized_query
    return {
        'dialect': url.get_backend_name(),
        'host': query.get('host', (url.host,)),
        'port': query.get('port', (str(url.port or _PORTS.get(url.get_backend_name())),)),
        # PostgreSQL defaults to the name of the user.
        'dbname': query.get('dbname', (url.database or query.get('user', (url.username,))[0],)),
        **{key: query[key] for key in ('hostaddr', 'service') if key in query},
    }


def file_of(engine: Engine) -> Path | None:
    """Return the file of a database of SQLite; None for PostgreSQL.  Raises ValueError if it is in memory."""
    if engine.dialect.name != 'sqlite':
        return None
    (name, *_), _options = engine.dialect.create_connect_args(engine.url)
    query = engine.url.query
    if name.startswith('file:'):
        name = unquote(urlsplit(name).path)
    if name in ('', ':memory:') or query.get('mode') == 'memory' or query.get('vfs') == 'memdb':
        raise ValueError('a database in memory cannot be shared with mq-run')
    return Path(name)


def _ask_for_bytes(_connection: Any, cursor: Any, _statement: str, _values: Any, context: Any, _many: bool) -> None:
    if context.execution_options.get(AS_BYTES):
        cursor.format = 1


def _read_committed(connection: Any, _record: Any) -> None:
    """A claim skips rows that others have changed meanwhile; with more isolation it would fail because of them."""
    with connection.cursor() as cursor:
        cursor.execute('SHOW default_transaction_isolation')
        if cursor.fetchone()[0] != 'read committed':
            # Only if needed: behind a pooler the connection is shared.
            cursor.execute('SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED')
    connection.commit()


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    """Read text that is not UTF-8 with escapes: it must not fail the other rows of its statement."""
    connection.text_factory = _as_text
    # The content of a message is deleted with it.
    connection.execute('PRAGMA foreign_keys = ON')


def _as_text(octets: bytes) -> str:
    return octets.decode('utf-8', 'backslashreplace')


def _parsed(url: str | URL) -> URL:
    """Raises ArgumentError, or ValueError, whose text has nothing of the password."""
    if isinstance(url, str) and _PASSWORD_WITH_AT.match(url):
        raise ValueError('it has more than one @; in a password it is written %40')
    try:
        return make_url(url)
    except ValueError:
        raise ValueError(f'its port is not a number ({_SEVERAL_HOSTS})') from None
