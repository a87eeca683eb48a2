from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from textwrap import dedent

import plaster
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from paste.deploy import loadapp

from pyramid_mailqueue.cli.config import (
    _INI_PATH,
    parse_override,
    read_app_settings,
    read_mqrunner_section,
    setup_logging,
)
from pyramid_mailqueue.cli.sources import _INI_SCHEMES
from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.settings import Settings


def write(folder, **files):
    """Write ``name='text'`` to ``name.ini`` each; return the path of ``app.ini``."""
    for name, text in files.items():
        (folder / f'{name}.ini').write_text(text)
    return str(folder / 'app.ini')


@pytest.fixture
def app_ini(tmp_path):
    return lambda text: write(tmp_path, app=text)


LOG_NAMES = ('mailqueue.delivery_log', 'mailqueue.queue_log', 'mqtest')


@pytest.fixture
def own_logging():
    """Logging as in a fresh process; afterwards as it was."""
    loggers = [logging.getLogger(), *map(logging.getLogger, LOG_NAMES)]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    loggers[0].handlers.clear()
    loggers[0].setLevel(logging.WARNING)
    yield
    for logger, handlers, level, propagate in before:
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def error_of(function, *args):
    with pytest.raises(ConfigurationError) as caught:
        function(*args)
    return str(caught.value)


# --- the same settings as the app -------------------------------------------

APP_MODULE = """
class App(dict):
    pass

def make_app(global_conf, **local_conf):
    return App(local_conf)

def make_filter(global_conf, **local_conf):
    return lambda app: app
"""


@pytest.fixture(scope='module')
def installed_app(tmp_path_factory):
    """An app that is its own settings: as ``call:mqtestapp:make_app``, and as ``egg:mqtestapp``."""
    folder = tmp_path_factory.mktemp('site')
    (folder / 'mqtestapp.py').write_text(APP_MODULE)
    egg = folder / 'mqtestapp-1.0.dist-info'
    egg.mkdir()
    (egg / 'METADATA').write_text('Metadata-Version: 2.1\nName: mqtestapp\nVersion: 1.0\n')
    (egg / 'entry_points.txt').write_text('[paste.app_factory]\nmain = mqtestapp:make_app\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
        sys.modules.pop('mqtestapp', None)


INI_FILES = {
    'an app by its egg': {
        'app': """
            [app:main]
            use = egg:mqtestapp
            mailqueue.smtp_hostname = localhost
            mailqueue.queue_dir = %(here)s/mailqueue
            Case.Is = Kept
            """
    },
    'an application by a function': {'app': '[application: main]\nuse = call:mqtestapp:make_app\na = 1'},
    'an app by a factory': {'app': '[app:main]\npaste.app_factory = mqtestapp:make_app\na = %(b)s\nb = 50%%'},
    'what is in [DEFAULT] is not for the app, unless it asks': {
        'app': """
            [DEFAULT]
            mailqueue.smtp_port = 26
            host = mail.example.org
            empty =
            refers_to_empty = %(empty)s
            [app:main]
            use = egg:mqtestapp
            mailqueue.smtp_port = 27
            mailqueue.smtp_hostname = %(host)s
            get mailqueue.default_sender = sender
            set sender = noreply@%(host)s
            get refers_to_empty = refers_to_empty
            get where = here
            """
    },
    'another section, with values nearer to the app': {
        'app': """
            [app:main]
            use = base
            set level = main
            a = main
            [app:base]
            use = egg:mqtestapp
            a = base
            b = base
            get level = level
            """
    },
    'another file, below': {
        'app': """
            [DEFAULT]
            b = global in app.ini
            [app:main]
            use = config:conf/base.ini#shop
            set c = set in app.ini
            a = main
            """,
        'conf/base': """
            [DEFAULT]
            d = global in base.ini
            [app:shop]
            use = config:../more%%20conf.ini
            a = shop
            b = shop
            c = shop
            d = shop
            where = %(here)s
            get c = c
            get outer_here = here
            """,
        'more conf': '[app:main]\nuse = egg:mqtestapp\nwhere_else = %(here)s\nfile = %(__file__)s',
    },
    'a pipeline': {
        'app': """
            [pipeline:main]
            pipeline = tm errors
                shop
            [filter:tm]
            paste.filter_factory = mqtestapp:make_filter
            a = of the filter
            [filter:errors]
            use = call:mqtestapp:make_filter
            [app:shop]
            use = egg:mqtestapp
            a = of the app
            """
    },
    'an app that uses a pipeline, whose own settings nobody gets': {
        'app': """
            [app:main]
            use = piped
            a = main
            [pipeline:piped]
            pipeline = shop
            [app:shop]
            use = egg:mqtestapp
            b = shop
            """
    },
    'a filter-app': {
        'app': """
            [filter-app:main]
            paste.filter_factory = mqtestapp:make_filter
            next = shop
            a = of the filter
            [app:shop]
            use = egg:mqtestapp
            a = of the app
            """
    },
    'filter-with': {
        'app': """
            [app:main]
            use = egg:mqtestapp
            filter-with = tm
            require = mqtestapp
            a = main
            [filter:tm]
            paste.filter_factory = mqtestapp:make_filter
            """
    },
    'an app that uses one with filter-with, which keeps the settings for itself': {
        'app': """
            [app:main]
            use = filtered
            a = main
            [app:filtered]
            use = egg:mqtestapp
            filter-with = tm
            b = filtered
            [filter:tm]
            paste.filter_factory = mqtestapp:make_filter
            """
    },
    'an app that uses one with filter-with and a factory': {
        'app': """
            [app:main]
            use = explicit
            a = main
            [app:explicit]
            paste.app_factory = mqtestapp:make_app
            filter-with = tm
            a = explicit
            b = explicit
            [filter:tm]
            paste.filter_factory = mqtestapp:make_filter
            """
    },
}


@pytest.mark.parametrize('files', INI_FILES.values(), ids=INI_FILES)
def test_the_settings_are_those_that_the_app_gets_from_pastedeploy(tmp_path, installed_app, files):
    (tmp_path / 'conf').mkdir()
    path = write(tmp_path, **{name: dedent(text) for name, text in files.items()})

    assert read_app_settings(path, None, {}) == loadapp(f'config:{path}')


keys = st.sampled_from(['a', 'b', 'c', 'here'])
values = st.text('xy', min_size=1, max_size=2) | st.sampled_from(['%(a)s', '%(b)s-', '%(here)s', '%%', ''])
lines = st.dictionaries(keys, values, max_size=3).map(
    lambda pairs: [f'{key} = {value}' for key, value in pairs.items()]
)
verbs = st.lists(st.tuples(st.sampled_from(['set', 'get']), keys, keys), max_size=3, unique_by=lambda verb: verb[:2])
sections = st.tuples(lines, verbs.map(lambda verbs: [f'{verb} {one} = {two}' for verb, one, two in verbs]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(defaults=st.tuples(lines, lines), chain=st.lists(sections, min_size=3, max_size=3))
def test_chains_of_sections_and_files_are_followed_as_by_pastedeploy(tmp_path, installed_app, defaults, chain):
    texts = ['\n'.join([*settings, *verbs, '']) for settings, verbs in chain]
    outer, inner = ('\n'.join(['[DEFAULT]', *default, '']) for default in defaults)
    path = write(
        tmp_path,
        app=f'{outer}[app:main]\nuse = second\n{texts[0]}[app:second]\nuse = config:other.ini#third\n{texts[1]}',
        other=f'{inner}[app:third]\nuse = call:mqtestapp:make_app\n{texts[2]}',
    )
    try:
        expected = loadapp(f'config:{path}')
    except Exception:  # noqa: BLE001  KeyError, RecursionError, errors of configparser: it is one error for us
        error_of(read_app_settings, path, None, {})
    else:
        assert read_app_settings(path, None, {}) == expected


def test_nothing_is_imported_or_even_looked_for(tmp_path, app_ini, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'mqtestboom.py').write_text('raise SystemExit("imported")')

    for use in ('use = call:mqtestboom:app', 'use = egg:no-such-package', 'paste.app_factory = mqtestboom:app', ''):
        path = app_ini(
            f'[pipeline:main]\npipeline = egg:no-such-filter shop\n[app:shop]\n{use}\nrequire = nothing\na = 1'
        )
        assert read_app_settings(path, None, {}) == {'a': '1'}
    assert 'mqtestboom' not in sys.modules


# --- which file, which section ----------------------------------------------

TWO_APPS = """
[DEFAULT]
mailqueue.smtp_hostname = localhost
[composite:main]
use = egg:Paste#urlmap
/ = shop
[app:shop]
a = of the shop
[application:blog]
a = of the blog
[server:main]
use = egg:waitress
"""


@pytest.mark.parametrize(
    ('fragment', 'name', 'value'),
    [('', 'shop', 'of the shop'), ('#blog', None, 'of the blog'), ('#blog', 'shop', 'of the shop')],
)
def test_the_section_is_named_by_the_option_or_behind_the_file(app_ini, fragment, name, value):
    assert read_app_settings(app_ini(TWO_APPS) + fragment, name, {})['a'] == value


def test_the_file_may_be_named_relative_to_where_one_is(tmp_path, app_ini, monkeypatch):
    app_ini('[app:main]\nwhere = %(here)s')
    (tmp_path / 'bin').mkdir()
    monkeypatch.chdir(tmp_path / 'bin')

    assert read_app_settings('../app.ini', None, {}) == {'where': str(tmp_path)}


@pytest.mark.parametrize('name', ['app.conf', 'app.cfg', 'app.config', 'app', 'a b%20c.ini'])
def test_an_ini_file_may_have_any_name(tmp_path, name):
    (tmp_path / name).write_text('[app:main]\na = 1\n[app:other]\na = 2')

    assert read_app_settings(str(tmp_path / name), None, {}) == {'a': '1'}
    assert read_app_settings(f'{tmp_path / name}#other', None, {}) == {'a': '2'}


def test_the_schemes_of_pastedeploy_name_ini_files_too(app_ini):
    path = app_ini('[app:main]\nuse = egg:no-such-package\na = %(b)s')

    assert read_app_settings(f'pastedeploy://{path}?b=1', None, {}) == {'a': '1'}


def test_per_cent_signs_in_the_name_of_a_folder_are_no_variables(tmp_path):
    folder = tmp_path / '50%(a)s'
    folder.mkdir()

    assert read_app_settings(write(folder, app='[app:main]\na = %(here)s'), None, {}) == {'a': str(folder)}


# --- overrides --------------------------------------------------------------


@pytest.mark.parametrize(
    ('text', 'pair'),
    [
        ('mailqueue.smtp_port=26', ('mailqueue.smtp_port', '26')),
        (' key = a=b ', ('key', 'a=b')),
        ('mailqueue.smtp_username=', ('mailqueue.smtp_username', '')),
    ],
)
def test_an_override_is_split_at_the_first_equals_sign(text, pair):
    assert parse_override(text) == pair


@pytest.mark.parametrize('text', ['mailqueue.smtp_port', '=26', ''])
def test_an_override_without_key_or_value_says_how_it_is_written(text):
    assert error_of(parse_override, text) == (
        f'--set {text}: must be written key=value, such as mailqueue.smtp_port=2525.'
    )


def test_overrides_fill_in_variables_and_come_before_the_settings_of_the_app(tmp_path):
    path = write(
        tmp_path,
        app='[DEFAULT]\nhost = one\n[app:main]\nuse = config:base.ini\nmailqueue.smtp_hostname = %(host)s\na = app',
        base='[DEFAULT]\nhost = two\n[app:main]\nb = %(host)s\nc = base',
    )

    assert read_app_settings(path, None, {'host': '100%', 'a': '%(set)s', 'c': ''}) == {
        'mailqueue.smtp_hostname': '100%',
        'host': '100%',
        'a': '%(set)s',
        'b': '100%',
        'c': '',
    }


# --- errors -----------------------------------------------------------------

ERRORS = {
    'no section of this name': (
        '[app:shop]\n[server:main]',
        'app.ini: there is no section [app:main]; there is [app:shop]. Name the section of the app with --name, ',
    ),
    'no app at all': ('[server:main]\n[mqrunner]', 'no section [app:main]; there is [server:main], [mqrunner].'),
    'an empty file': ('', 'app.ini: there is no section [app:main]; there is nothing.'),
    'two sections of one name': (
        '[app:main]\n[pipeline:main]',
        'app.ini: which is the app "main", [app:main], [pipeline:main]? Rename one.',
    ),
    'several apps': (
        TWO_APPS,
        'app.ini: [composite:main] holds several apps. Choose the one that sends the mail with --name: shop, blog.',
    ),
    'a circle': (
        '[app:main]\nuse = a\n[app:a]\nuse = config:app.ini',
        'app.ini: [app:main] leads back to itself: [app:main] in {path} -> [app:a] in {path} -> [app:main] in {path}.',
    ),
    'use of nothing': ('[app:main]\nuse = a', 'app.ini: there is no section [app:a]; there is [app:main].'),
    'use of an unknown scheme': (
        '[app:main]\nuse = eg:shop',
        '[app:main] in {path}: eg:shop begins with neither egg:, call: nor config:.',
    ),
    'use of a missing file': ('[app:main]\nuse = config:no.ini', 'no.ini: cannot be read (No such file or directory).'),
    'a missing variable': (
        '[app:main]\na = %(db_url)s',
        '[app:main] a refers to %(db_url)s, which is not there. Set it in [app:main] or [DEFAULT], or with --set db_ur',
    ),
    'a missing variable in [DEFAULT]': ('[DEFAULT]\na = %(b)s\n[app:main]', 'app.ini: [DEFAULT] a refers to %(b)s'),
    'a variable that refers to itself': ('[app:main]\na = %(a)s', 'app.ini: [app:main] a refers to itself.'),
    'a per cent sign': (
        '[app:main]\nmailqueue.smtp_password = 50%',
        'app.ini: [app:main] mailqueue.smtp_password holds a single %. Write %% for a per cent sign.',
    ),
    'get of nothing': ('[app:main]\nget a = b', 'app.ini: [app:main] get a = b: there is no global setting b.'),
    'a filter-app without next': ('[filter-app:main]\nuse = egg:x', 'app.ini: [filter-app:main] next is missing.'),
    'an empty pipeline': ('[pipeline:main]\npipeline =', 'app.ini: [pipeline:main] pipeline is missing.'),
    'settings of a pipeline': (
        '[pipeline:main]\npipeline = shop\na = 1\nb = 1',
        'app.ini: [pipeline:main] can hold nothing but pipeline; move a, b to the section of the app.',
    ),
    'a line that is none': (
        '[app:main]\nmailqueue.smtp_password hush',
        'app.ini, line 2: it is neither "key = value" nor "[section]".',
    ),
    'a line above all sections': ('a = hush\n[app:main]', 'app.ini, line 1: it stands in no [section].'),
    'a key twice': ('[app:main]\na = hush\na = hush', 'app.ini, line 3: a is set for the second time in [app:main].'),
    'a section twice': ('[app:main]\n[app:main]', 'app.ini, line 2: this is the second section [app:main].'),
    'a queue directory in [DEFAULT]': (
        '[DEFAULT]\nmailqueue.queue_dir = /q\n[app:main]\nmailqueue.queue_dir = /q',
        'app.ini: [DEFAULT] mailqueue.queue_dir does not reach the app, even if its section sets it as well: ',
    ),
}


@pytest.mark.parametrize(('text', 'message'), ERRORS.values(), ids=ERRORS)
def test_an_error_names_file_section_and_key_but_no_secret(app_ini, text, message):
    path = app_ini(text)

    error = error_of(read_app_settings, path, None, {})

    assert message.format(path=path) in error
    assert 'hush' not in error
    assert str(Path(path).parent) in error


def test_a_queue_directory_in_default_is_fine_where_another_one_counts(app_ini):
    path = app_ini('[DEFAULT]\nmailqueue.queue_dir = /q\nmailqueue.queue = x\n[app:main]\nget mailqueue.queue = kind')

    assert read_app_settings(path, None, {'mailqueue.queue_dir': '/other', 'kind': 'maildir'})
    assert read_app_settings(path, None, {'kind': 'sql', 'mailqueue.queue': 'sql'})


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / 'latin.ini').write_bytes(b'[app:main]\na = \xe9\n')

    for function in (read_app_settings, lambda uri, _, overrides: read_mqrunner_section(uri, overrides)):
        assert error_of(function, str(tmp_path / 'no.ini'), None, {}) == (
            f'{tmp_path}/no.ini: cannot be read (No such file or directory).'
        )
        assert error_of(function, str(tmp_path), None, {}) == f'{tmp_path}: cannot be read (Is a directory).'
        assert error_of(function, str(tmp_path / 'latin.ini'), None, {}).startswith(
            f'{tmp_path}/latin.ini: cannot be read: it is not UTF-8'
        )


# --- other sources than ini files -------------------------------------------

LOADER_MODULE = """
import logging

class Loader:
    def __init__(self, uri):
        self.uri = uri
    def get_wsgi_app_settings(self, name=None, defaults=None):
        return {'path': self.uri.path, 'name': name, 'a': 'of the file', **defaults}
    def get_settings(self, section=None, defaults=None):
        return {'section': section} if 'runner' in self.uri.path else {}
    def setup_logging(self, defaults=None):
        if self.uri.path == 'broken':
            raise LookupError('no logging here')
        logging.getLogger('mqtest').setLevel(defaults['level'])
"""


@pytest.fixture
def installed_loader(tmp_path, monkeypatch):
    """A plaster loader for ``*.mqtest`` and ``mqtest://``."""
    (tmp_path / 'mqtestloader.py').write_text(LOADER_MODULE)
    for egg, names in (('mqtestloader', ('file+mqtest', 'mqtest', 'mqtwice')), ('mqtestother', ('mqtwice',))):
        folder = tmp_path / f'{egg}-1.0.dist-info'
        folder.mkdir()
        (folder / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {egg}\nVersion: 1.0\n')
        entry_points = '\n'.join(f'{name} = mqtestloader:Loader' for name in names)
        (folder / 'entry_points.txt').write_text(f'[plaster.loader_factory]\n{entry_points}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop('mqtestloader', None)


@pytest.mark.usefixtures('installed_loader')
def test_other_sources_are_left_to_their_plaster_loader():
    assert read_app_settings('/etc/app.mqtest#shop', None, {'a': '1'}) == {
        'path': '/etc/app.mqtest',
        'name': 'shop',
        'a': '1',
    }
    assert read_mqrunner_section('mqtest://x', {}) is None
    assert read_mqrunner_section('mqtest://runner', {'smtp_port': '1'}) == {'section': 'mqrunner', 'smtp_port': '1'}


@pytest.mark.usefixtures('installed_loader', 'own_logging')
def test_other_sources_set_up_their_own_logging():
    setup_logging('mqtest://x', {'level': 'ERROR'}, Settings())

    assert logging.getLogger('mqtest').level == logging.ERROR


@pytest.mark.usefixtures('installed_loader')
def test_what_a_loader_raises_names_the_source():
    assert error_of(setup_logging, 'mqtest://broken', {}, Settings()) == (
        'mqtest://broken: cannot be used (LookupError: no logging here).'
    )


@pytest.mark.usefixtures('installed_loader')
def test_a_source_with_two_loaders_or_none_is_an_error():
    assert error_of(read_app_settings, 'mqtwice://x', None, {}).startswith('mqtwice://x: Multiple plaster loaders')
    assert error_of(read_app_settings, 'mqnone://x', None, {}) == (
        'mqnone://x: nothing is installed that reads such a source. Name an ini file.'
    )


# --- [mqrunner] -------------------------------------------------------------


def test_the_mqrunner_section_is_read_with_known_defaults_and_overrides(app_ini):
    path = app_ini(
        '[DEFAULT]\nsmtp_hostname = mail.example.org\nsmtp_port = 26\nhost = x\n'
        '[mqrunner]\nqueue_dir = %(here)s/queue\nsmtp_port = 27\nfrom = me@example.org\ntypo = 1'
    )

    assert read_mqrunner_section(path, {'from': 'you@example.org', 'smtp_timeout': '1m'}) == {
        'smtp_hostname': 'mail.example.org',
        'smtp_port': '27',
        'smtp_timeout': '1m',
        'queue_dir': f'{Path(path).parent}/queue',
        'from': 'you@example.org',
        'typo': '1',
    }


def test_without_an_mqrunner_section_there_is_none(app_ini):
    assert read_mqrunner_section(app_ini('[app:main]'), {}) is None


def test_an_error_in_the_mqrunner_section_names_it(app_ini):
    path = app_ini('[mqrunner]\nsmtp_password = 50%')

    assert error_of(read_mqrunner_section, path, {}) == (
        f'{path}: [mqrunner] smtp_password holds a single %. Write %% for a per cent sign.'
    )


# --- logging ----------------------------------------------------------------

LOGGING = """
[loggers]
keys = root
[handlers]
keys = file
[formatters]
keys = plain
[logger_root]
level = INFO
handlers = file
[handler_file]
class = FileHandler
args = ('%(here)s/%(name)s', 'w')
formatter = plain
[formatter_plain]
format = %(levelname)s %(message)s
"""


@pytest.mark.usefixtures('own_logging')
def test_the_logging_of_the_ini_file_is_set_up_and_loggers_that_exist_stay(tmp_path, app_ini):
    logger = logging.getLogger('mqtest')

    setup_logging(app_ini(f'[app:main]\n{LOGGING}'), {'name': 'app.log'}, Settings())
    logger.info('hello')

    assert (tmp_path / 'app.log').read_text() == 'INFO hello\n'


@pytest.mark.usefixtures('own_logging')
def test_logging_conf_comes_before_the_logging_of_the_ini_file(tmp_path, app_ini):
    path = app_ini('[loggers]\nkeys = nonsense')
    (tmp_path / 'logging.conf').write_text(f'[DEFAULT]\nname = own.log\n{LOGGING}')

    setup_logging(path, {}, Settings(logging_conf=tmp_path / 'logging.conf'))
    logging.getLogger('mqtest').info('hello')

    assert (tmp_path / 'own.log').read_text() == 'INFO hello\n'


@pytest.mark.usefixtures('own_logging')
def test_without_any_logging_configuration_warnings_go_to_stderr(app_ini, capsys):
    setup_logging(app_ini('[app:main]'), {}, Settings())
    logging.getLogger('mqtest').setLevel(logging.INFO)

    logging.getLogger('mqtest').info('not this')
    logging.getLogger('mqtest').warning('but this')

    assert capsys.readouterr() == ('', 'WARNING mqtest: but this\n')


@pytest.mark.usefixtures('own_logging')
def test_a_log_of_its_own_gets_its_lines_alone_and_outlives_a_rotation(tmp_path, app_ini, capsys):
    path = tmp_path / 'log' / 'delivery.log'
    logger = logging.getLogger('mailqueue.delivery_log')
    setup_logging(app_ini('[app:main]'), {}, Settings(delivery_log=path))

    logger.warning('first')
    path.rename(tmp_path / 'old')
    logger.info('second: \N{EURO SIGN}')

    assert capsys.readouterr() == ('', '')
    stamp = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4}'
    assert re.fullmatch(rf'{stamp} WARNING first\n', (tmp_path / 'old').read_text('utf-8'))
    assert re.fullmatch(rf'{stamp} INFO second: \N{{EURO SIGN}}\n', path.read_text('utf-8'))


@pytest.mark.usefixtures('own_logging')
@pytest.mark.parametrize('key', ['delivery_log', 'queue_log'])
def test_a_log_that_cannot_be_written_is_named(tmp_path, app_ini, key):
    (tmp_path / 'file').write_text('')

    for path, why in ((tmp_path, 'Is a directory'), (tmp_path / 'file' / 'log', 'Not a directory')):
        assert error_of(setup_logging, app_ini('[app:main]'), {}, Settings(**{key: path})) == (
            f'mailqueue.{key} = {path}: cannot be written ({why}).'
        )


@pytest.mark.usefixtures('own_logging')
@pytest.mark.parametrize(
    ('text', 'variables', 'why'),
    [
        ('[loggers]\nkeys = root', {}, "KeyError: 'formatters'"),
        (LOGGING.replace('FileHandler', 'nothing.Handler'), {'name': 'x'}, "No module named 'nothing'"),
        (LOGGING.replace('%(here)s', '%(here)s/none'), {'name': 'x'}, 'No such file or directory'),
        (LOGGING, {}, "'name'"),
    ],
)
def test_a_logging_configuration_that_cannot_be_used_is_named(tmp_path, app_ini, text, variables, why):
    path = app_ini(text)
    (tmp_path / 'logging.conf').write_text(text)

    conf = tmp_path / 'logging.conf'

    for file, source in ((path, Settings()), (conf, Settings(logging_conf=conf))):
        error = error_of(setup_logging, path, variables, source)
        assert error.startswith(f'{file}: the logging configuration cannot be used (')
        assert why in error


def test_a_missing_logging_conf_is_named(tmp_path, app_ini):
    path = tmp_path / 'no.conf'

    assert error_of(setup_logging, app_ini('[app:main]'), {}, Settings(logging_conf=path)) == (
        f'{path}: cannot be read (No such file or directory).'
    )


# --- plain paths --------------------------------------------------------------


@given(st.from_regex(_INI_PATH, fullmatch=True))
@example('app.ini')
@example('/srv/shop/production.conf#shop')
@example('../a.b/app.cfg#')
def test_plaster_would_read_a_plain_path_just_so(uri):
    plain = _INI_PATH.fullmatch(uri)
    url = plaster.parse_uri(uri)

    assert plain
    assert (url.path, url.fragment or None) == (plain[1], plain[2] or None)
    assert url.scheme in _INI_SCHEMES
    assert not url.options
