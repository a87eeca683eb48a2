"""What a release holds: built as for an upload, then looked into."""

from __future__ import annotations

import ast
import configparser
import importlib
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

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'pyramid_mailqueue'
MODULES = [
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    for path in sorted(PACKAGE.rglob('*.py'))
]

LEFTOVERS = shutil.ignore_patterns(
    '.git', '.venv*', '*.egg-info', '__pycache__', '.*_cache', '.coverage*', '.hypothesis', 'build', 'dist', 'var'
)


@pytest.fixture(scope='module')
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg', 'utf-8')
    return parser


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    """The folder with a source distribution, and with the wheel that is built of it; both from a clean tree."""
    folder = tmp_path_factory.mktemp('release')
    shutil.copytree(ROOT, folder / 'tree', ignore=LEFTOVERS)
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder / 'dist', folder / 'tree')
    return folder / 'dist'


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
    needed = {'CHANGES.rst', 'LICENSE', 'Makefile', 'README.rst', 'pyproject.toml', 'requirements-test.txt'}
    needed |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob('tests/**/*.py')}
    needed |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob('docs/*.rst')}

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
