"""What GitHub, pre-commit and nox read: it parses, and it says the same as the Makefile and the requirements."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pythons.minima import read_setup
from tests.pythons.suites import versions

yaml = pytest.importorskip('yaml', reason='There is no PyYAML here: see requirements-test.txt')

ROOT = Path(__file__).parent.parent
FILES = [ROOT / '.pre-commit-config.yaml', ROOT / '.readthedocs.yaml', *sorted(ROOT.glob('.github/**/*.yml'))]
FORMS = [path for path in sorted(ROOT.glob('.github/ISSUE_TEMPLATE/*.yml')) if path.name != 'config.yml']


def read(path):
    return yaml.safe_load(path.read_text('utf-8'))


@pytest.fixture(scope='module')
def jobs():
    return read(ROOT / '.github/workflows/test.yml')['jobs']


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_every_file_can_be_read(path):
    assert isinstance(read(path), dict)


def test_the_workflow_runs_commands_of_the_makefile(jobs):
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text('utf-8'), re.MULTILINE))
    commands = {step['run'] for job in jobs.values() for step in job['steps'] if 'run' in step}

    assert commands == {'make test', 'make test-ends'}
    assert {command.removeprefix('make ') for command in commands} <= targets


def test_the_workflow_tests_each_python_that_is_released(jobs):
    pythons = jobs['test']['strategy']['matrix']['python']

    assert all(isinstance(version, str) for version in pythons), '3.10 without quotes is 3.1'
    assert pythons == [version for version in versions(read_setup()) if version != '3.15']


@pytest.mark.parametrize('path', FORMS, ids=lambda path: path.name)
def test_each_form_has_what_github_requires(path):
    form = read(path)

    assert form['name']
    assert form['description']
    fields = [field for field in form['body'] if field['type'] != 'markdown']
    assert {field['type'] for field in fields} <= {'textarea', 'input', 'dropdown', 'checkboxes'}
    assert len({field['id'] for field in fields}) == len(fields)
    assert all(field['attributes']['label'] for field in fields)


def test_pre_commit_has_the_linter_of_the_tests():
    (pinned,) = re.findall(r'^ruff==(\S+)$', (ROOT / 'requirements-test.txt').read_text('utf-8'), re.MULTILINE)
    revisions = {
        repo['repo'].rpartition('/')[2]: repo['rev'] for repo in read(ROOT / '.pre-commit-config.yaml')['repos']
    }

    assert revisions['ruff-pre-commit'] == f'v{pinned}'
