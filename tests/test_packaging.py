"""What a release holds: built as for an upload, then looked into."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution
from pathlib import Path

import pytest

import pyramid_mailqueue
from tests.pythons import suites
from tests.pythons.minima import minima, read_setup
from tests.release.dist import LEFTOVERS, build, epoch_of

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'pyramid_mailqueue'
MODULES = [
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    for path in sorted(PACKAGE.rglob('*.py'))
]

# Of a release in the tests, which may be of no commit.
EPOCH = 1_795_505_291


@pytest.fixture(scope='module')
def setup():
    return read_setup()


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    """The folder with a source distribution, and with the wheel that is built of it; both from a clean tree."""
    folder = tmp_path_factory.mktemp('release')
    build(ROOT, folder, EPOCH)
    return folder


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope='module')
def wheel(dist):
    (path,) = dist.glob('*.whl')
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope='module')
def sdist_names(dist):
    (path,) = dist.glob('*.tar.gz')
    with tarfile.open(path) as archive:
        return {name.partition('/')[2] for name in archive.getnames()}


@pytest.fixture(scope='module')
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith('.dist-info/METADATA'))
    return BytesParser().parsebytes(wheel.read(name))


def test_a_release_is_the_same_bytes_whoever_builds_it_and_when(dist, tmp_path):
    shutil.copytree(ROOT, tmp_path / 'tree', ignore=LEFTOVERS)
    for path in (tmp_path / 'tree').rglob('*'):
        os.utime(path, (1, 1))
        path.chmod(0o700 if path.is_dir() or path.stat().st_mode & 0o100 else 0o600)
    # What an installation for development leaves behind names more files.
    (tmp_path / 'tree/pyramid_mailqueue.egg-info').mkdir()
    (tmp_path / 'tree/pyramid_mailqueue.egg-info/SOURCES.txt').write_text('setup.py\nleftover.txt\n')
    (tmp_path / 'tree/leftover.txt').touch()
    umask = os.umask(0o077)
    try:
        build(tmp_path / 'tree', tmp_path / 'again', EPOCH)
    finally:
        os.umask(umask)

    assert hashes_of(tmp_path / 'again') == hashes_of(dist)


def hashes_of(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_time_of_a_release_is_that_of_its_commit(tmp_path, monkeypatch):
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    monkeypatch.setenv('SOURCE_DATE_EPOCH', '7')
    assert epoch_of(tmp_path) == 7
    monkeypatch.delenv('SOURCE_DATE_EPOCH')
    with pytest.raises(SystemExit, match='set SOURCE_DATE_EPOCH'):
        epoch_of(tmp_path)

    author = ['-c', 'user.name=Ada', '-c', 'user.email=ada@x.example']
    for name in ('AUTHOR', 'COMMITTER'):
        monkeypatch.setenv(f'GIT_{name}_DATE', f'{EPOCH} +0000')
    run('git', '-C', tmp_path, 'init', '--quiet')
    run('git', '-C', tmp_path, *author, 'commit', '--quiet', '--allow-empty', '--message=x')

    assert epoch_of(tmp_path) == EPOCH


def test_a_release_passes_the_checks_of_the_package_index(dist):
    run(sys.executable, '-m', 'twine', 'check', '--strict', *dist.iterdir())


def test_the_wheel_holds_the_package_its_type_marker_and_the_license_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if '.dist-info/' not in name}
    info = {name.partition('.dist-info/')[2] for name in wheel.namelist()}

    sources = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob('*') if path.is_file()}
    assert names == {name for name in sources if '__pycache__' not in name}
    assert 'pyramid_mailqueue/py.typed' in names
    assert 'licenses/LICENSE' in info


def test_the_source_distribution_holds_all_that_make_test_needs(sdist_names):
    needed = {
        '.github/workflows/test.yml',
        '.pre-commit-config.yaml',
        '.readthedocs.yaml',
        'CHANGES.rst',
        'CODE_OF_CONDUCT.rst',
        'LICENSE',
        'Makefile',
        'README.rst',
        'SECURITY.md',
        'noxfile.py',
        'pyproject.toml',
        'requirements-dist.txt',
        'requirements-test.txt',
    }
    needed |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob('tests/**/*.py')}
    needed |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob('docs/**/*.rst')}
    needed |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob('docs/**/*.py')}

    assert needed - sdist_names == set()


def test_the_changes_begin_with_this_version(metadata):
    changes = (ROOT / 'CHANGES.rst').read_text('utf-8')

    newest = re.search(r'^(\d\S*) \((?:unreleased|\d{4}-\d\d-\d\d)\)\n-+$', changes, re.MULTILINE)

    assert newest, 'no heading such as "0.1.0 (unreleased)" or "0.1.0 (2026-11-24)" in CHANGES.rst'
    assert metadata['Version'] == newest[1]


def test_the_version_is_that_of_the_metadata(metadata):
    assert pyramid_mailqueue.__version__ == metadata['Version']


@pytest.mark.parametrize('module', ['run', 'queue', 'send_test'])
def test_each_command_tells_its_version(capsys, module):
    command = importlib.import_module(f'pyramid_mailqueue.cli.{module}')

    with pytest.raises(SystemExit) as exit_:
        command.main(['--version'])

    name = f'mq-{module.replace("_", "-")}'
    assert (exit_.value.code, capsys.readouterr().out) == (0, f'{name} {pyramid_mailqueue.__version__}\n')


def test_the_license_is_told_to_programs_too(metadata):
    assert metadata['License-Expression'] == 'MIT'
    assert metadata.get_all('License-File') == ['LICENSE']


def test_every_command_can_be_started(setup):
    for line in setup['options.entry_points']['console_scripts'].strip().splitlines():
        name, _, target = line.partition('=')
        command = EntryPoint(name.strip(), target.strip(), 'console_scripts').load()

        assert callable(command)


@pytest.mark.parametrize('name', MODULES)
def test_all_names_that_a_module_offers_are_there(name):
    module = importlib.import_module(name)

    missing = [public for public in getattr(module, '__all__', ()) if not hasattr(module, public)]

    assert not missing


def test_the_package_offers_what_it_exports_and_nothing_else():
    ours = {
        name
        for name in dir(pyramid_mailqueue)
        if not name.startswith('_')
        and getattr(getattr(pyramid_mailqueue, name), '__module__', '').startswith('pyramid_mailqueue')
    }

    assert ours == set(pyramid_mailqueue.__all__)


def test_what_the_package_imports_is_required(setup):
    extras = setup['options.extras_require']
    lists = [setup['options']['install_requires'], *(extras[name] for name in ('sql', 'dashboard', 'cli'))]
    required = {normalized(requirement) for lines in lists for requirement in lines.strip().splitlines()}
    provided = {module for name in required for module in modules_of(name)}
    # Whoever imports fixtures for pytest has it.
    own = {PACKAGE / 'testing/fixtures.py': {'pytest'}}

    for path in PACKAGE.rglob('*.py'):
        known = {'pyramid_mailqueue'} | sys.stdlib_module_names | provided | own.get(path, set())
        missing = imported_by(path) - known
        assert not missing, f'{path.relative_to(ROOT)} imports {missing}: add what provides it to setup.cfg'


def test_the_oldest_versions_are_those_that_are_known_to_work(setup):
    oldest = minima(setup)

    # Before these the SQL queue could not start, errors of hooks before a commit vanished, and a misspelt sslmode was
    # taken for a database that is away.
    assert {'SQLAlchemy==2.0.11', 'transaction==3.0.1', 'psycopg==3.2.1'} <= set(oldest)


@pytest.mark.parametrize('wrong', ['blinker', 'blinker==1.6', 'blinker>=1.6,<2', 'idna>=3.5'])
def test_a_requirement_without_a_lower_bound_of_its_own_is_refused(wrong):
    setup = {'options': {'install_requires': f'\nidna>=3.4\n{wrong}'}, 'options.extras_require': {}}

    with pytest.raises(ValueError, match=wrong.partition('>')[0]):
        minima(setup)


def test_the_tests_install_all_that_the_package_may_use(setup):
    extras = setup['options.extras_require']
    testing = {normalized(requirement) for requirement in extras['testing'].split()}

    for name in ('sql', 'dashboard', 'cli', 'demo'):
        missing = {normalized(requirement) for requirement in extras[name].split()} - testing
        assert not missing, f'the bounds of {missing} are not tried'


def test_the_classifiers_begin_with_the_oldest_python_that_is_allowed(setup):
    assert setup['options']['python_requires'] == f'>={suites.versions(setup)[0]}'


def test_a_suite_that_fails_fails_them_all_and_a_python_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(suites, 'versions', lambda setup: ['3.10', '3.11', '3.14', '3.15'])
    monkeypatch.setattr(suites, 'find', {'3.10': 'old', '3.11': 'broken'}.get)
    monkeypatch.setattr(suites.debian, 'provide', {'3.14': 'made'}.get)
    monkeypatch.setattr(suites, 'run', lambda target, python, *_, **__: python != 'broken')
    monkeypatch.setattr(sys, 'argv', ['suites'])

    assert suites.main() == 1

    assert capsys.readouterr().out.split('\n')[1:-1] == [
        'Python 3.10: passed',
        'Python 3.11: FAILED',
        'Python 3.14: passed',
        'Python 3.15: MISSING: there is none here, so nothing was tried',
    ]


def test_the_ends_are_the_oldest_python_with_the_oldest_versions_and_the_newest_that_is_here(monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(suites, 'versions', lambda setup: ['3.10', '3.11', '3.13', '3.15'])
    monkeypatch.setattr(suites, 'find', {'3.11': 'old', '3.13': 'new'}.get)
    monkeypatch.setattr(suites, 'run', lambda *arguments: runs.append(arguments) or True)
    monkeypatch.setattr(sys, 'argv', ['suites', '--plain'])

    assert suites.main() == 0

    assert runs == [('plain', 'old', 'oldest', 'MINIMA=yes'), ('plain', 'new', 'newest')]


def test_a_python_is_found_only_if_it_can_make_an_environment(monkeypatch, tmp_path):
    version = f'{sys.version_info.major}.{sys.version_info.minor}'
    for folder, target in (('shim', '/bin/false'), ('pyenv/versions/3.10.2/bin', '/bin/false')):
        tmp_path.joinpath(folder).mkdir(parents=True)
        tmp_path.joinpath(folder, f'python{version}').symlink_to(target)
    real = tmp_path / f'pyenv/versions/{version}.9/bin' / f'python{version}'
    real.parent.mkdir(parents=True)
    monkeypatch.setenv('PATH', str(tmp_path / 'shim'))
    monkeypatch.setenv('PYENV_ROOT', str(tmp_path / 'pyenv'))

    assert suites.find(version) is None
    real.symlink_to(sys.executable)
    assert suites.find(version) == real


def modules_of(distribution_name):
    """The first parts of the names of the modules of a distribution; none if it is not installed."""
    try:
        files = distribution(distribution_name).files
    except PackageNotFoundError:
        return set()
    return {file.parts[0].removesuffix('.py') for file in files}


def normalized(requirement):
    """The name of a distribution, without its version, as PEP 503 compares it."""
    return re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', requirement)[0]).lower()


def imported_by(path):
    modules = set()
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.partition('.')[0])
    return modules
