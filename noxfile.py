"""
For those who have nox: the plain tests on each Python, with the oldest and with the newest dependencies.

``nox --list`` names the sessions.  They are the targets of the Makefile, in the same virtual environments; a Python
that is not on this machine is skipped, and nox says so.  All tests on each Python: ``make test-pythons``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent))

from tests.pythons.minima import read_setup
from tests.pythons.suites import find, run, versions

nox.options.sessions = ['tests', 'lint', 'docs']
nox.options.error_on_missing_interpreters = False

OLDEST, *LATER = versions(read_setup())

# The oldest dependencies have no wheels for later Pythons: psycopg-binary 3.2.1 ends with Python 3.12.
ENDS = [(OLDEST, 'oldest'), *((version, 'newest') for version in (OLDEST, *LATER))]


@nox.session(venv_backend='none')
@nox.parametrize(('version', 'dependencies'), ENDS, ids=[f'{version}-{which}' for version, which in ENDS])
def tests(session: nox.Session, version: str, dependencies: str) -> None:
    """The plain tests: without a browser, other mail software, and processes that are killed."""
    python = find(version)
    if python is None:
        session.skip(f'There is no Python {version} here, so nothing was tried')
    options = ['MINIMA=yes'] if dependencies == 'oldest' else []
    if not run('plain', python, f'{version}-{dependencies}', *options):
        session.error('The tests have failed.')


@nox.session(venv_backend='none')
def lint(session: nox.Session) -> None:
    """Linter, formatter and types, with the tools of ``make test``."""
    session.run('make', 'lint', external=True)


@nox.session(venv_backend='none')
def docs(session: nox.Session) -> None:
    """The site of the documentation."""
    session.run('make', 'docs', external=True)
