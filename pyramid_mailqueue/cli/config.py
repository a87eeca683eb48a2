"""
Read the settings of an app from its ini file, without importing the app.

PasteDeploy finds the settings of an app by loading its factory, which imports the app: seconds of work, and any side
effects, for a cron job that mostly finds nothing to do.  So its rules are implemented here once more, and the tests
compare the two.  Sources that are not ini files are left to their plaster loader.
"""

from __future__ import annotations

import configparser
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import unquote

from pyramid_mailqueue.exceptions import ConfigurationError, described
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.settings import Settings, known_keys

__all__ = ['has_app', 'parse_override', 'read_app_settings', 'read_mqrunner_section', 'run_log', 'setup_logging']

#: Repeats what a command prints, for logs that go elsewhere.
run_log = Log('mailqueue.run')

# A path, of characters that plaster leaves as they are: parsed without plaster, which takes a quarter of an idle run
# to import, and then searches all that is installed.
_INI_PATH = re.compile(r'((?!//)[\w./+~-]*[\w+~-]\.(?:ini|conf|cfg))(?:#([\w.+~-]*))?', re.ASCII)

_SCHEME = re.compile(r'([A-Za-z]+):')
# PasteDeploy's order; of each group the first prefix that is in the file counts.
_APP_PREFIXES = (('app', 'application'), ('composite', 'composit'), ('pipeline',), ('filter-app',))
_COMPOSITE = ('composite', 'composit')
_FACTORY_KEYS = ('paste.app_factory', 'paste.composite_factory', 'paste.composit_factory')

_QUEUE_DIR = 'mailqueue.queue_dir'


def parse_override(text: str) -> tuple[str, str]:
    """Split the ``key=value`` of an option ``--set``; the value may be empty, which means not set."""
    key, equals, value = text.partition('=')
    if not equals or not key.strip():
        raise ConfigurationError(f'--set {text}: must be written key=value, such as mailqueue.smtp_port=2525.')
    return key.strip(), value.strip()


def read_app_settings(uri: str, name: str | None, overrides: Mapping[str, str]) -> dict[str, str]:
    """
    Return the settings that the app in *uri* would be given.

    :param uri: an ini file, ``app.ini`` or ``app.ini#name``, or another source that plaster has a loader for
    :param name: the name of the app's section, overriding the one in *uri*; ``main`` if there is neither
    :param overrides: values for ``%(key)s`` in the file, which also override the app's own settings
    :raises ConfigurationError: the file cannot be used; the text names file, section and key
    """
    source = _locate(uri, overrides)
    name = name or source.name
    if source.loader is not None:
        with _blame(f'{uri}:'):
            return {**source.loader.get_wsgi_app_settings(name, dict(overrides)), **overrides}
    file = _IniFile(source.path, source.variables)
    settings = {**_find_app(file, name or 'main', {}, ()).app, **overrides}
    if settings.get('mailqueue.queue', 'maildir') == 'maildir' and not settings.get(_QUEUE_DIR):
        _look_for_queue_dir_in_defaults(file)
    return settings


def has_app(uri: str, overrides: Mapping[str, str]) -> bool:
    """Whether *uri* describes an app, under any name.  Raises :class:`~.exceptions.ConfigurationError`."""
    source = _locate(uri, overrides)
    return source.loader is not None or bool(_IniFile(source.path, source.variables).app_sections())


def read_mqrunner_section(uri: str, overrides: Mapping[str, str]) -> dict[str, str] | None:
    """
    Return the ``[mqrunner]`` section of *uri* for :meth:`.Settings.from_mqrunner_section`; None if there is none.

    Keys of ``[DEFAULT]`` count as well, if they are known ones.  Raises :class:`~.exceptions.ConfigurationError`.
    """
    source = _locate(uri, overrides)
    if source.loader is not None:
        with _blame(f'{uri}:'):
            section = source.loader.get_settings('mqrunner', dict(overrides))
        return {**section, **overrides} if section else None
    file = _IniFile(source.path, source.variables)
    if not file.parser.has_section('mqrunner'):
        return None
    own = [key for key in file.parser.options('mqrunner') if key not in file.parser.defaults() or key in known_keys()]
    return {**{key: file.get('mqrunner', key) for key in own}, **overrides}


def setup_logging(
    uri: str | None, overrides: Mapping[str, str], settings: Settings, printed: Collection[str] = (run_log.name,)
) -> None:
    """
    Set up the logging of a command: by ``logging_conf``, else by the ``[loggers]`` of *uri*, else warnings to stderr.

    ``delivery_log`` and ``queue_log`` are opened in any case.  Raises :class:`~.exceptions.ConfigurationError`.

    :param printed: loggers whose messages the command also prints; handlers on stdout or stderr skip them
    """
    file = _IniFile(settings.logging_conf, overrides) if settings.logging_conf else _logging_of(uri, overrides)
    paths = {key: path for key in ('delivery_log', 'queue_log') if (path := getattr(settings, key))}
    if file is None and not paths:
        _print_once(frozenset(printed))
        return
    # Where all is left to its default, an idle run does without.
    from pyramid_mailqueue.cli import log_files

    if file is not None:
        with _blame(f'{file.path}: the logging configuration'):
            log_files.configure(file.parser)
    _print_once(frozenset(printed))
    for key, path in paths.items():
        log_files.log_to(f'mailqueue.{key}', path)


# --- where the settings are -------------------------------------------------


class _Source(NamedTuple):
    """An ini file at *path*, or something else that *loader* reads."""

    path: str
    name: str | None
    variables: Mapping[str, str]
    loader: Any = None


def _locate(uri: str, overrides: Mapping[str, str]) -> _Source:
    if plain := _INI_PATH.fullmatch(uri):
        return _Source(plain[1], plain[2] or None, overrides)
    # See _INI_PATH.
    from pyramid_mailqueue.cli.sources import locate

    path, name, options, loader = locate(uri)
    return _Source(path, name, {**options, **overrides}, loader)


@contextmanager
def _blame(source: str) -> Iterator[None]:
    """Turn any exception of another package about *source* into a ConfigurationError."""
    try:
        yield
    except Exception as exc:
        raise ConfigurationError(f'{source} cannot be used ({described(exc)}).') from exc


# --- one ini file -----------------------------------------------------------


class _Parser(configparser.ConfigParser):
    def optionxform(self, optionstr: str) -> str:
        # As PasteDeploy: keys keep their case.
        return optionstr


class _IniFile:
    """
    One ini file.

    :param variables: values from the command line; they override ``[DEFAULT]``, and each ``%`` in them is literal
    :param inherited: the global settings of the file that uses this one; ``[DEFAULT]`` overrides them
    """

    def __init__(
        self, path: str | Path, variables: Mapping[str, str], inherited: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100  PasteDeploy's %(here)s: no "..", links as they are
        self.variables = variables
        here = {'here': _literal(str(self.path.parent)), '__file__': _literal(str(self.path))}
        self.parser = _Parser({**inherited, **here})
        self._read()
        self.parser.read_dict({configparser.DEFAULTSECT: {key: _literal(value) for key, value in variables.items()}})

    def _read(self) -> None:
        try:
            with self.path.open(encoding='utf-8') as stream:
                self.parser.read_file(stream)
        except OSError as exc:
            raise ConfigurationError(f'{self.path}: cannot be read ({exc.strerror}).') from exc
        except UnicodeDecodeError as exc:
            raise ConfigurationError(f'{self.path}: cannot be read: it is not UTF-8 ({exc.reason}).') from exc
        except configparser.Error as exc:
            raise ConfigurationError(f'{self.path}, {_syntax_error(exc)}.') from exc

    def get(self, section: str, key: str) -> str:
        """Return one value with its ``%(…)s`` filled in."""
        try:
            return self.parser.get(section, key)
        except configparser.InterpolationMissingOptionError as exc:
            raise self.error(
                section,
                f'{key} refers to %({exc.reference})s, which is not there. '
                f'Set it in [{section}] or [DEFAULT], or with --set {exc.reference}=...',
            ) from exc
        except configparser.InterpolationDepthError as exc:
            raise self.error(section, f'{key} refers to itself.') from exc
        except configparser.InterpolationError as exc:
            raise self.error(section, f'{key} holds a single %. Write %% for a per cent sign.') from exc

    def defaults(self) -> dict[str, str]:
        return {key: self.get(configparser.DEFAULTSECT, key) or value for key, value in self.parser.defaults().items()}

    def app_sections(self) -> list[str]:
        prefixes = tuple(f'{prefix}:' for group in _APP_PREFIXES for prefix in group)
        return [section for section in self.parser.sections() if section.startswith(prefixes)]

    def find_app_section(self, name: str) -> str:
        found = []
        for group in _APP_PREFIXES:
            candidates = ([s for s in self.app_sections() if _kind_and_name(s) == (prefix, name)] for prefix in group)
            found += next(filter(None, candidates), [])
        if len(found) > 1:
            raise ConfigurationError(f'{self.path}: which is the app "{name}", {_in_brackets(found)}? Rename one.')
        if not found:
            there = _in_brackets(self.app_sections() or self.parser.sections()) or 'nothing'
            raise ConfigurationError(
                f'{self.path}: there is no section [app:{name}]; there is {there}. '
                'Name the section of the app with --name, or after the file, as in app.ini#name.'
            )
        return found[0]

    def error(self, section: str, text: str) -> ConfigurationError:
        return ConfigurationError(f'{self.path}: [{section}] {text}')


def _literal(text: str) -> str:
    return text.replace('%', '%%')


def _kind_and_name(section: str) -> tuple[str, str]:
    kind, _, name = section.partition(':')
    return kind, name.strip()


def _in_brackets(sections: list[str]) -> str:
    return ', '.join(f'[{section}]' for section in sections)


def _syntax_error(exc: configparser.Error) -> str:
    """Return what is wrong and where, but not the line: it may hold a password."""
    if isinstance(exc, configparser.DuplicateOptionError):
        return f'line {exc.lineno}: {exc.option} is set for the second time in [{exc.section}]'
    if isinstance(exc, configparser.DuplicateSectionError):
        return f'line {exc.lineno}: this is the second section [{exc.section}]'
    if isinstance(exc, configparser.MissingSectionHeaderError):
        return f'line {exc.lineno}: it stands in no [section]'
    lines = ', '.join(str(number) for number, _ in getattr(exc, 'errors', ()))
    return f'line {lines}: it is neither "key = value" nor "[section]"'


# --- PasteDeploy's rules ----------------------------------------------------


class _Found(NamedTuple):
    """
    A section, or code.

    :param local: the settings of what was found; a section that uses it adds its own to them
    :param app: the settings of the app it leads to; the same object, unless filters are in between
    """

    local: dict[str, str]
    app: dict[str, str]


def _find_app(file: _IniFile, name: str, given: Mapping[str, str], trail: tuple[str, ...]) -> _Found:
    """
    Find what PasteDeploy's ``ConfigLoader.get_context`` finds, but load nothing.

    :param given: the global settings of the section that leads here
    :param trail: the sections that lead here
    """
    section = file.find_app_section(name)
    step = f'[{section}] in {file.path}'
    if step in trail:
        raise file.error(section, f'leads back to itself: {" -> ".join((*trail, step))}.')
    trail += (step,)
    local, global_conf = _read_section(file, section, given)
    filtered = local.pop('filter-with', None) is not None
    local.pop('require', None)

    kind, _ = _kind_and_name(section)
    if kind in _COMPOSITE:
        raise file.error(
            section,
            'holds several apps. Choose the one that sends the mail with --name: '
            f'{", ".join(name for kind, name in map(_kind_and_name, file.app_sections()) if kind not in _COMPOSITE)}.',
        )
    if kind == 'filter-app':
        return _Found(local, _follow(file, _required(file, section, local, 'next'), global_conf, trail).app)
    if kind == 'pipeline':
        return _Found(local, _follow(file, _last_of_pipeline(file, section, local), global_conf, trail).app)
    use = local.pop('use', None)
    if use is None:
        for key in _FACTORY_KEYS:
            local.pop(key, None)
        return _Found(local, local)
    found = _follow(file, use, global_conf, trail)
    found.local.update(local)
    return _Found(local, found.app) if filtered else found


def _follow(file: _IniFile, target: str, global_conf: Mapping[str, str], trail: tuple[str, ...]) -> _Found:
    """Follow *target*: a name in *file*, ``config:`` another file, or code, which has no settings of its own."""
    scheme = _SCHEME.match(target)
    if not scheme:
        return _find_app(file, target, global_conf, trail)
    if scheme[1].lower() in ('egg', 'call'):
        nothing: dict[str, str] = {}
        return _Found(nothing, nothing)
    if scheme[1].lower() != 'config':
        raise ConfigurationError(f'{trail[-1]}: {target} begins with neither egg:, call: nor config:.')
    path, _, name = target[scheme.end() :].partition('#')
    other = _IniFile(file.path.parent / unquote(path), file.variables, global_conf)
    return _find_app(other, name or 'main', global_conf, trail)


def _read_section(file: _IniFile, section: str, given: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the local and the global settings, with ``set`` and ``get`` applied."""
    defaults = file.defaults()
    global_conf = {**defaults, **given}
    local: dict[str, str] = {}
    wanted: dict[str, str] = {}
    for option in file.parser.options(section):
        if option.startswith('set '):
            global_conf[option[4:].strip()] = file.get(section, option)
        elif option.startswith('get '):
            wanted[option[4:].strip()] = file.get(section, option)
        elif option not in defaults:
            # What is in [DEFAULT] is global, even where the section sets it again.
            local[option] = file.get(section, option)
    for key, global_key in wanted.items():
        if global_key not in global_conf:
            raise file.error(section, f'get {key} = {global_key}: there is no global setting {global_key}.')
        local[key] = global_conf[global_key]
    return local, global_conf


def _required(file: _IniFile, section: str, local: Mapping[str, str], key: str) -> str:
    if not local.get(key):
        raise file.error(section, f'{key} is missing.')
    return local[key]


def _last_of_pipeline(file: _IniFile, section: str, local: Mapping[str, str]) -> str:
    elements = _required(file, section, local, 'pipeline')
    if len(local) > 1:
        others = ', '.join(key for key in local if key != 'pipeline')
        raise file.error(section, f'can hold nothing but pipeline; move {others} to the section of the app.')
    return elements.split()[-1]


def _look_for_queue_dir_in_defaults(file: _IniFile) -> None:
    if _QUEUE_DIR in file.parser.defaults():
        raise file.error(
            configparser.DEFAULTSECT,
            f'{_QUEUE_DIR} does not reach the app, even if its section sets it as well: what is in [DEFAULT] is no '
            'setting of an app. Move it to the section of the app.',
        )


# --- logging ----------------------------------------------------------------


def _logging_of(uri: str | None, overrides: Mapping[str, str]) -> _IniFile | None:
    """Return the file that has the logging configuration; None if that was left to a loader, or if there is none."""
    source = None if uri is None else _locate(uri, overrides)
    if source is not None and source.loader is not None:
        with _blame(f'{uri}:'):
            source.loader.setup_logging(dict(overrides))
        return None
    file = None if source is None else _IniFile(source.path, source.variables)
    if file is not None and file.parser.has_section('loggers'):
        return file
    _log_warnings_to_stderr()
    return None


def _print_once(names: Collection[str]) -> None:
    """Keep the records of these loggers, which the command prints itself, from handlers on stdout or stderr."""
    handlers = {logging.lastResort, *(handler for name in names for handler in _handlers_of(logging.getLogger(name)))}
    for handler in handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr):
            handler.addFilter(lambda record: record.name not in names)


def _handlers_of(logger: logging.Logger | None) -> Iterator[logging.Handler]:
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None


def _log_warnings_to_stderr() -> None:
    handler = logging.StreamHandler()
    # On the handler: a logger with a lower level, for a file of its own, must not make a cron job send mail.
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter('%(levelname)s %(name)s: %(message)s'))
    logging.getLogger().addHandler(handler)
