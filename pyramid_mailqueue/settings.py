"""
Every ``mailqueue.*`` key, parsed once, typed and frozen.

The fields of :class:`Settings` are the one table of keys: name, type, default, parser and help text.  The
error messages are made from it, and a test compares the docs with it.
"""

# ruff: noqa: RUF009  The calls in the class body return field(), once for each class, as dataclasses means it.

from __future__ import annotations

import dataclasses
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pyramid_mailqueue.exceptions import AddressError, ConfigurationError
from pyramid_mailqueue.hosts import is_ip_address, is_loopback
from pyramid_mailqueue.message.addresses import check_address, parse_mailbox

__all__ = ['Key', 'Rate', 'Settings', 'default_tls', 'known_keys', 'parse_duration']

T = TypeVar('T')
Parser = Callable[[object], T]

IMPLICIT_TLS_PORT = 465

# Keys with another name in mailqueue-runner: its name, and ours.
_THEIR_NAMES = (('from', 'default_sender'), ('logging_config', 'logging_conf'))
_THEIRS = frozenset({'smtp_tls_verify', *(theirs for theirs, _ in _THEIR_NAMES)})

# Keys of other packages that do not exist here, and what to do instead.
_NOT_HERE = {
    'smtp_tls_verify': (
        'there is no such key, because certificates are verified wherever TLS is required. Remove it; '
        'a certificate of your own goes into the file that smtp_tls_ca_file names'
    )
}


@dataclass(frozen=True)
class Rate:
    """
    A limit for sending.

    :param count: how many sends, at most
    :param seconds: in any time of this length
    """

    count: int
    seconds: float


# --- parsers: an ini's text or an object set in code -> a typed value; ValueError says what the value must be --------

_CONTROL = re.compile(r'[\x00-\x1f\x7f]')
_DIGITS = re.compile(r'\s*([0-9]{1,15})\s*')
_DURATION = re.compile(r'\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([smhd]?)\s*')
_SIZE = re.compile(r'\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kmgt]?)(?:i?b)?\s*', re.IGNORECASE | re.ASCII)
_RATE = re.compile(r'\s*([0-9]{1,15})\s*/\s*([a-z]+)\s*')
_FACTORY = re.compile(r'[^\W\d]\w*(?:[.:][^\W\d]\w*)+')
_TRANSPORT = re.compile(r'[A-Za-z0-9_.:-]+')
_LABEL = r'[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?'
_DOMAIN = re.compile(rf'{_LABEL}(?:\.{_LABEL})*')
_HOST_NAME = re.compile(r'[\w-]{1,63}(?:\.[\w-]{1,63})*\.?')
_ADDRESS_LITERAL = re.compile(r'\[(?:(?P<ipv6>IPv6:))?(?P<address>[^\[\]%]+)\]', re.IGNORECASE)

_SECONDS = {'': 1, 's': 1, 'm': 60, 'h': 3600, 'd': 86400}
_PERIODS = _SECONDS | {'second': 1, 'sec': 1, 'minute': 60, 'min': 60, 'hour': 3600, 'day': 86400}
_MOST_SENDS = 1_000_000
_YES = frozenset(('t', 'true', 'y', 'yes', 'on', '1'))
_NO = frozenset(('f', 'false', 'n', 'no', 'off', '0'))


def _text(value: object) -> str:
    if not isinstance(value, str) or _CONTROL.search(value.strip()):
        raise ValueError('must be text in one line')
    return value.strip()


def _secret(value: object) -> str:
    # Not stripped: an app that reads a password from elsewhere means every character of it.
    if not isinstance(value, str) or _CONTROL.search(value):
        raise ValueError('must be text in one line')
    return value


def _choice(*words: str) -> Parser[str]:
    def parse(value: object) -> str:
        word = value.strip() if isinstance(value, str) else value
        if word not in words:
            raise ValueError(f'must be {_or(words)}')
        return str(word)

    return parse


def _whole(least: int, most: int) -> Parser[int]:
    def parse(value: object) -> int:
        match = _DIGITS.fullmatch(value) if isinstance(value, str) else None
        number = int(match[1]) if match else value
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
            raise ValueError(f'must be a whole number from {least} to {most}')
        return number

    return parse


def _duration(least: str = '', most: str = '3650d') -> Parser[float]:
    """Return a parser for a time span; its result is in seconds."""
    bounds = f'from {least} to {most}' if least else f'greater than 0, at most {most}'

    def parse(value: object) -> float:
        seconds = _seconds(value)
        if not (0 < seconds <= _seconds(most) and seconds >= (_seconds(least) if least else 0)):
            raise ValueError(f'must be seconds such as 300, or 90s, 5m, 1.5h or 2d; {bounds}')
        return float(seconds)

    return parse


def parse_duration(value: object) -> float:
    """Return a time span such as 300, ``90s`` or ``1.5h`` in seconds.  Raises ValueError: what it must be."""
    return _duration()(value)


def _none_or(parse: Parser[T]) -> Parser[T | None]:
    """Return a parser that takes ``none``, too."""

    def parse_it(value: object) -> T | None:
        if value is None or (isinstance(value, str) and value.strip() == 'none'):
            return None
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(str(error).replace('must be ', 'must be none, or ', 1)) from error

    return parse_it


def _seconds(value: object) -> float:
    """Return *value* in seconds; not a number (NaN), which is in no range, if it is no time span."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    return float(match[1]) * _SECONDS[match[2]] if match else math.nan


def _size(value: object) -> int:
    """Return *value* in bytes.  K, M, G and T are powers of 1024, with or without ``B`` or ``iB`` behind them."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    size = int(float(match[1]) * 1024 ** ' kmgt'.index(match[2].lower() or ' ')) if match else value
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError('must be bytes such as 10485760, or 512K, 10M or 1G (1K is 1024 bytes); at least 1')
    return size


def _rate(value: object) -> Rate | None:
    if isinstance(value, str) and value.strip() == 'none':
        return None
    match = _RATE.fullmatch(value) if isinstance(value, str) else None
    rate = Rate(int(match[1]), _PERIODS.get(match[2], math.nan)) if match else value
    if isinstance(rate, Rate) and 1 <= rate.count <= _MOST_SENDS and 0 < rate.seconds < math.inf:
        return rate
    raise ValueError(
        'must be none, or a number and a time such as 14/second, 200/minute, 5000/hour or 50000/day; '
        f'the number from 1 to {_MOST_SENDS}'
    )


def _flag(value: object) -> bool:
    word = str(value).strip().lower()
    if word not in _YES | _NO:
        raise ValueError('must be true or false')
    return word in _YES


def _path(value: object) -> Path:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or _CONTROL.search(path := path.strip()):
        raise ValueError('must be a path in one line')
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as exc:
        raise ValueError('must be a path; this one begins with the home directory of an unknown user') from exc
    if not expanded.is_absolute():
        raise ValueError(
            f'must be an absolute path, such as %(here)s/{path.lstrip("./")} in an ini file; '
            'a relative one would be another place for a cron job than for the web process'
        )
    return expanded


def _readable_file(value: object) -> Path:
    path = _path(value)
    try:
        # A named pipe is not opened: that would wait for a writer.
        if stat.S_ISREG(path.stat().st_mode):
            path.open('rb').close()
            return path
    except OSError as exc:
        raise ValueError(f'must be a file that can be read ({exc.strerror})') from exc
    raise ValueError('must be a file that can be read (it is no regular file)')


def _words(value: object) -> tuple[str, ...]:
    items = re.split(r'[\s,]+', value.strip().strip(',')) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item.strip() for item in items):
        raise ValueError('must be names, separated by blanks or commas')
    return tuple(item.strip() for item in items)


def _transports(value: object) -> tuple[str, ...]:
    names = _words(value)
    if not names or len(set(names)) < len(names) or not all(map(_TRANSPORT.fullmatch, names)):
        raise ValueError('must be one or more of smtp, inbox and names of transports, in their order, each only once')
    return names


def _plugins(value: object) -> tuple[str, ...]:
    names = _words(value)
    return () if names == ('none',) else names


def _queue(value: object) -> str:
    name = _text(value)
    if name not in ('maildir', 'sql') and not _FACTORY.fullmatch(name):
        raise ValueError('must be maildir, sql, or the dotted name of a factory')
    return name


def _host(value: object) -> str:
    host = _text(value)
    if host.startswith('[') and host.endswith(']'):
        host = host[1:-1]
    if is_ip_address(host) or (_HOST_NAME.fullmatch(host) and len(host) <= 253):
        return host
    if re.fullmatch(r'(?:\[.*\]|[^:]*):[0-9]*', host):
        raise ValueError('must be a host name or an IP address alone; the port is set by smtp_port')
    raise ValueError('must be a host name or an IP address')


def _ehlo_name(value: object) -> str:
    """RFC 5321 section 4.1.1.1: a domain or an address literal."""
    name = _text(value)
    literal = _ADDRESS_LITERAL.fullmatch(name)
    if (_DOMAIN.fullmatch(name) and len(name) <= 255) or (
        literal and (':' in literal['address']) == bool(literal['ipv6']) and is_ip_address(literal['address'])
    ):
        return name
    raise ValueError('must be a domain name, or an address such as [192.0.2.1] or [IPv6:2001:db8::1]')


def _address(value: object) -> str:
    text = _text(value)
    try:
        return check_address(text)
    except AddressError as exc:
        why = 'Write it without a name and angle brackets' if '<' in text else str(exc).rstrip('.')
        raise ValueError(f'must be one mail address such as noreply@example.org. {why}') from exc


def _mailbox(value: object) -> str:
    text = _text(value)
    try:
        parse_mailbox(text)
    except AddressError as exc:
        why = str(exc).rstrip('.')
        raise ValueError(f'must be one mail address such as Shop <noreply@example.org>. {why}') from exc
    return text


def _attribute(value: object) -> str:
    if not isinstance(value, str) or not value.strip().isidentifier():
        raise ValueError('must be the name of an attribute of the request')
    return value.strip()


def _ca_file(value: object) -> Path:
    path = _path(value)
    # Only this key needs it, and it takes a tenth of an idle run.
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as exc:
        raise ValueError(f'must be a file of certificates in PEM format ({exc.reason})') from exc
    except OSError as exc:
        raise ValueError(f'must be a file that can be read ({exc.strerror})') from exc
    if not context.cert_store_stats()['x509']:
        raise ValueError('must be a file of certificates in PEM format; there is none in it')
    return path


def _or(words: Iterable[str]) -> str:
    *others, last = words
    return f'{", ".join(others)} or {last}'


# --- the table of keys ------------------------------------------------------


class Key(NamedTuple):
    """
    One key, for the docs and for error messages.

    :param name: without the prefix
    :param default: as it would be written in an ini file, or None
    :param help: one sentence
    :param secret: whether its value must never be shown
    """

    name: str
    default: str | None
    help: str
    secret: bool


def _key(parse: Parser[T], default: str, help: str) -> T:
    """Declare a field whose *default* is written as in an ini file."""
    return field(default=parse(default), metadata={'parse': parse, 'default': default, 'help': help})


def _optional(parse: Parser[T], help: str, *, secret: bool = False) -> T | None:
    """Declare a field that has no value unless it is set."""
    return field(default=None, repr=not secret, metadata={'parse': parse, 'default': None, 'help': help})


@dataclass(frozen=True)
class Settings:
    """
    The settings of this package: one field for each key.  Times are in seconds, sizes in bytes.

    :meth:`from_mapping` checks what it reads.  The constructor checks nothing: it is for code that knows its values.
    """

    queue: str = _key(_queue, 'maildir', 'Where messages wait: maildir, sql, or the dotted name of a factory.')
    queue_dir: Path | None = _optional(_path, 'The directory of the queue, required with maildir; created if missing.')
    transports: tuple[str, ...] = _key(
        _transports, 'smtp', 'The transports to try for a message, in this order: smtp, inbox, or names of others.'
    )
    delivery: str = _key(
        _choice('background', 'inline', 'queue'),
        'background',
        'When a message is first tried: by a thread after the commit, before the commit returns, or by mq-run only.',
    )
    default_sender: str | None = _optional(
        _mailbox, 'The sender of a message that names none, in its envelope and its From; also as Name <address>.'
    )

    smtp_hostname: str | None = _optional(_host, 'The name or IP address of the mail server.')
    smtp_port: int = _key(_whole(1, 65535), '25', 'The port of the mail server.')
    smtp_username: str | None = _optional(_text, 'The user name for the mail server.')
    smtp_password: str | None = _optional(_secret, 'The password for the mail server.', secret=True)
    smtp_local_hostname: str | None = _optional(
        _ehlo_name, 'Host name sent in EHLO; the fully qualified name of this host if not set.'
    )
    smtp_tls: str | None = _optional(
        _choice('starttls', 'implicit', 'opportunistic', 'off'),
        'How the connection is encrypted; if not set, implicit on port 465, opportunistic to this host without '
        'smtp_tls_ca_file, else starttls.',
    )
    smtp_tls_ca_file: Path | None = _optional(
        _ca_file, "The certificates (PEM) that the mail server's must be signed by; the system's if not set."
    )
    smtp_connections: int = _key(_whole(1, 100), '4', 'How many connections one mq-run uses at once, at most.')
    smtp_connect_timeout: float = _key(_duration(most='1d'), '10s', 'How long connecting may take.')
    smtp_timeout: float = _key(_duration(most='1d'), '300s', 'How long the answer to one command may take.')
    smtp_data_timeout: float = _key(
        _duration(most='1d'), '600s', 'How long the answer to a whole message may take; too short sends mail twice.'
    )
    smtp_idle_timeout: float = _key(_duration(most='1d'), '30s', 'How long a connection is kept for the next message.')

    retry_first: float = _key(_duration(), '5m', 'How long a message waits after its first attempt.')
    retry_max: float = _key(_duration(), '4000s', 'How long a message waits at most; each wait is twice the last.')
    lifetime: float = _key(_duration(), '5d', 'How long a message is tried before it is given up.')
    keep_dead: float | None = _key(
        _none_or(_duration()), 'none', 'How long a dead letter is kept before mq-run removes it; none is for ever.'
    )
    max_recipients: int = _key(_whole(1, 1_000_000), '100', 'How many recipients are given to the server at once.')
    rate_limit: Rate | None = _optional(
        _rate, 'How many recipients all processes of this queue may send to in a time: such as 14/second.'
    )
    max_message_size: int | None = _optional(_size, 'How large a message may be.')
    redirect_all_to: str | None = _optional(
        _address,
        'The address that all mail goes to, instead of to its recipients: for a site that is tried out.',
    )
    in_doubt: str = _key(
        _choice('hold', 'send', 'discard'),
        'hold',
        'What mq-run does with a message whose process died between the commit and the publishing of its mail.',
    )

    sql_url: str | None = _optional(
        _text,
        'The database of the sql queue, for mq-run and attempts after a commit; sqlalchemy.url if not set.',
        secret=True,
    )
    sql_session: str = _key(_attribute, 'dbsession', "The attribute of the request that is the app's database session.")
    sql_lease: float = _key(_duration('1s', '1d'), '5m', 'How long a claim of the sql queue lasts without renewal.')
    sql_notify: bool = _key(_flag, 'false', 'Whether a new message wakes mq-run --watch (PostgreSQL).')

    plugins: tuple[str, ...] = _key(_plugins, '*', 'The plugins to load: names, * for all, or none.')
    logging_conf: Path | None = _optional(
        _readable_file, "The logging configuration of mq-run, instead of the ini file's own."
    )
    delivery_log: Path | None = _optional(_path, 'The file in which mq-run logs each result for a recipient.')
    queue_log: Path | None = _optional(_path, 'The file in which mq-run logs what happens to messages in the queue.')

    @classmethod
    def from_mapping(cls, settings: Mapping[str, object], prefix: str = 'mailqueue.') -> Settings:
        """
        Read the settings of an app; keys without *prefix* belong to others.

        Values are text or already typed; an empty text means not set.  Raises
        :class:`~.exceptions.ConfigurationError`, which names every key that cannot be used, one a line.
        """
        own = {key[len(prefix) :]: value for key, value in settings.items() if key.startswith(prefix)}
        return _with_database_of(settings, _read(own, lambda name: prefix + name, _contradictions))

    @classmethod
    def from_mqrunner_section(cls, section: Mapping[str, object]) -> Settings:
        """
        Read a ``[mqrunner]`` section: the same keys without prefix, and those that mailqueue-runner has there.

        ``queue_dir`` may be missing, because the command line can name it; the caller has to check.  Raises
        :class:`~.exceptions.ConfigurationError`, as :meth:`from_mapping` does.
        """
        own = {key: value for key, value in section.items() if key not in ('here', '__file__')}
        return _read_as_mailqueue_runner(own, lambda name: f'[mqrunner] {name}', _smtp_contradictions)

    @classmethod
    def from_program(
        cls, settings: Mapping[str, object], prefix: str = 'mailqueue.', *, needs_server: bool = True
    ) -> Settings:
        """
        Read what a program passes: the keys of a ``[mqrunner]`` section, with *prefix* or without.

        With *prefix* every key is ours, and overrides the same one without it.  Without it a key is ours if it has the
        name of a key, here or in mailqueue-runner, or, where no key has the prefix, if it begins with ``smtp_``, so
        that a misspelling is reported.  Other keys are not ours: the settings of an app may be passed as they are.

        :param needs_server: whether ``smtp_hostname`` must be there
        :raises ConfigurationError: as :meth:`from_mapping` does
        """
        prefixed = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        names = known_keys().keys() | _THEIRS
        plain = {
            key: value for key, value in settings.items() if key in names or (not prefixed and key.startswith('smtp_'))
        }

        def full(name: str) -> str:
            return f'{prefix}{name}' if name in prefixed else name

        contradictions = _smtp_contradictions if needs_server else _no_contradictions
        result = _read_as_mailqueue_runner({**plain, **prefixed}, full, contradictions)
        return _with_database_of(settings, result)


def default_tls(hostname: str, port: int, *, has_ca_file: bool) -> str:
    """Return what ``smtp_tls`` is if it was not set.  With a CA file certificates are verified."""
    if port == IMPLICIT_TLS_PORT:
        return 'implicit'
    return 'opportunistic' if is_loopback(hostname) and not has_ca_file else 'starttls'


def known_keys() -> Mapping[str, Key]:
    """Return every key by its name without prefix, in the order of the docs."""
    return {
        f.name: Key(f.name, f.metadata['default'], f.metadata['help'], secret=not f.repr)
        for f in dataclasses.fields(Settings)
    }


# --- reading ----------------------------------------------------------------

# Builds the full name of a key, as its file spells it.
FullName = Callable[[str], str]


class _Contradiction(NamedTuple):
    names: set[str]
    text: str


Contradictions = Callable[[Settings, FullName], Iterator[_Contradiction]]


def _read(own: Mapping[str, object], full: FullName, contradictions: Contradictions) -> Settings:
    """Parse *own* (keys without prefix), or raise one error with all of its problems."""
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, value in own.items():
        if name not in fields:
            problems[name] = _unknown(name, value, full)
        elif not _is_unset(value):
            try:
                values[name] = fields[name].metadata['parse'](value)
            except ValueError as exc:
                shown = repr(value) if fields[name].repr else '(not shown)'
                problems[name] = f'{full(name)} = {shown}: {exc}.'
    if values.get('smtp_tls') == 'implicit' and 'smtp_port' not in problems:
        values.setdefault('smtp_port', IMPLICIT_TLS_PORT)
    settings = Settings(**values)
    texts = list(problems.values())
    # A key that could not be read has its default here, which contradicts nothing that the user wrote.
    texts += [text for names, text in contradictions(settings, full) if not names & problems.keys()]
    if texts:
        raise ConfigurationError('\n'.join(texts))
    return settings


def _with_database_of(app: Mapping[str, object], read: Settings) -> Settings:
    """Return *read* with the database of the app's other data, unless it names one."""
    url = app.get('sqlalchemy.url')
    return dataclasses.replace(read, sql_url=url) if read.sql_url is None and isinstance(url, str) else read


def _read_as_mailqueue_runner(own: Mapping[str, object], full: FullName, contradictions: Contradictions) -> Settings:
    """Read the keys of mailqueue-runner, beside our own."""
    ours = dict(own)
    spelled = {}
    for theirs, name in _THEIR_NAMES:
        value = ours.pop(theirs, None)
        if not _is_unset(value) and _is_unset(ours.get(name)):
            ours[name] = value
            spelled[name] = theirs
    if ours.get('smtp_tls') == 'yes':
        ours['smtp_tls'] = 'implicit' if str(ours.get('smtp_port')) == str(IMPLICIT_TLS_PORT) else 'starttls'
    if 'smtp_tls_verify' in ours and _is_what_we_do_anyway(ours['smtp_tls_verify'], ours):
        del ours['smtp_tls_verify']
    return _read(ours, lambda name: full(spelled.get(name, name)), contradictions)


def _is_what_we_do_anyway(verify: object, own: Mapping[str, object]) -> bool:
    """Whether ``smtp_tls_verify = verify`` asks for what follows from the other keys."""
    word = str(verify).strip().lower()
    if word not in _YES | _NO:
        return _is_unset(verify)
    port = IMPLICIT_TLS_PORT if str(own.get('smtp_port')) == str(IMPLICIT_TLS_PORT) else 0
    default = default_tls(str(own.get('smtp_hostname')), port, has_ca_file=bool(own.get('smtp_tls_ca_file')))
    return (word in _YES) == ((own.get('smtp_tls') or default) in ('starttls', 'implicit'))


def _no_contradictions(settings: Settings, full: FullName) -> Iterator[_Contradiction]:
    return iter(())


def _is_unset(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


_SECRET_NAME = re.compile('pass|pw|secret|token|url', re.IGNORECASE)


def _unknown(name: str, value: object, full: FullName) -> str:
    # Needed for a mistake only.
    import difflib

    keys = known_keys()
    near = difflib.get_close_matches(name.lower(), keys, n=1)
    # A misspelt name of a secret may have none of the words that would reveal it as one.
    is_secret = _SECRET_NAME.search(name) or any(keys[key].secret for key in near)
    problem = f'{full(name)} = {"(not shown)" if is_secret else repr(value)}: '
    if name in _NOT_HERE:
        return f'{problem}{_NOT_HERE[name]}.'
    hint = f'Did you mean {full(near[0])}?' if near else f'The keys are {", ".join(keys)}.'
    return f'{problem}there is no such key. {hint}'


def _contradictions(settings: Settings, full: FullName) -> Iterator[_Contradiction]:
    if settings.queue == 'maildir' and not settings.queue_dir:
        yield _Contradiction(
            {'queue', 'queue_dir'},
            f'{full("queue_dir")} is missing: with {full("queue")} = maildir it names the directory in which messages '
            'wait, such as %(here)s/mailqueue in an ini file.',
        )
    if settings.rate_limit and settings.queue != 'maildir' and not settings.queue_dir:
        yield _Contradiction(
            {'rate_limit', 'queue', 'queue_dir'},
            f'{full("queue_dir")} is missing: {full("rate_limit")} is set, and needs a directory for the file in which '
            'all processes count what they send.',
        )
    yield from _smtp_contradictions(settings, full)


def _smtp_contradictions(settings: Settings, full: FullName) -> Iterator[_Contradiction]:
    if 'smtp' in settings.transports and not settings.smtp_hostname:
        yield _Contradiction(
            {'transports', 'smtp_hostname'},
            f'{full("smtp_hostname")} is missing: {full("transports")} has smtp, so it must name the mail server, '
            'such as localhost.',
        )
    for one, other in (('smtp_username', 'smtp_password'), ('smtp_password', 'smtp_username')):
        if getattr(settings, one) is not None and getattr(settings, other) is None:
            yield _Contradiction({one, other}, f'{full(other)} is missing: {full(one)} is set. Set both, or neither.')
    yield from _tls_contradictions(settings, full)
    if settings.retry_first > settings.retry_max:
        yield _Contradiction(
            {'retry_first', 'retry_max'},
            f'{full("retry_first")} = {settings.retry_first:g}s is longer than {full("retry_max")} = '
            f'{settings.retry_max:g}s: the first wait is the shortest.',
        )


def _tls_contradictions(settings: Settings, full: FullName) -> Iterator[_Contradiction]:
    mode, port, host = settings.smtp_tls, settings.smtp_port, settings.smtp_hostname
    if mode == 'off' and settings.smtp_username is not None and host and not is_loopback(host):
        yield _Contradiction(
            {'smtp_tls', 'smtp_username', 'smtp_hostname'},
            f'{full("smtp_tls")} = off would send {full("smtp_password")} in clear text to {host}. '
            'Set it to starttls or implicit; off is for this host only.',
        )
    if mode in ('opportunistic', 'off') and settings.smtp_tls_ca_file:
        yield _Contradiction(
            {'smtp_tls', 'smtp_tls_ca_file'},
            f'{full("smtp_tls_ca_file")} is of no use with {full("smtp_tls")} = {mode}, which verifies no certificate. '
            'Remove one of them.',
        )
    # RFC 8314 section 3.3: on port 465 TLS begins with the first byte, and a client that waits for a greeting waits in
    # vain.  On any other port TLS may begin so, too; a server that begins in clear text there is detected at once.
    if port == IMPLICIT_TLS_PORT and mode not in (None, 'implicit'):
        yield _Contradiction(
            {'smtp_tls', 'smtp_port'},
            f'{full("smtp_tls")} = {mode} does not go with {full("smtp_port")} = {port}, where TLS is implicit. '
            'Set it to implicit, or remove it; for starttls the port is usually 587.',
        )
