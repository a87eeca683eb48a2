"""
Run the tests on every Python that the package is for: ``python -m tests.pythons.suites``, or ``make test-pythons``.

They are looked for on the PATH, among those of pyenv, and in a Debian of our own (see :mod:`tests.pythons.debian`).
Those that cannot be had are named at the end; a suite that has failed is a failure of the whole.

``--plain`` is for CI: the oldest Python that this machine has, with the oldest versions of all that is required, and
the newest one with the newest versions.  It leaves out what ``PLAIN`` in the Makefile says.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.pythons import debian
from tests.pythons.minima import read_setup

# Some that Debian installs lack what a virtual environment needs, and a shim of pyenv may stand for nothing.
_WORKS = 'import ensurepip, sqlite3, ssl, venv'


def versions(setup):
    """The Pythons that the package is for, oldest first."""
    return re.findall(r'^Programming Language :: Python :: (3\.\d+)$', setup['metadata']['classifiers'], re.MULTILINE)


def find(version):
    """Return the path of a Python of this machine; None if there is none."""
    pyenv = Path(os.environ.get('PYENV_ROOT') or Path.home() / '.pyenv', 'versions')
    folders = [*os.get_exec_path(), *sorted(pyenv.glob(f'{version}.*/bin'), key=_release, reverse=True)]
    paths = (Path(folder, f'python{version}') for folder in folders)
    return next((path for path in paths if os.access(path, os.X_OK) and _works(path)), None)


def _release(folder):
    return [int(number) for number in re.findall(r'\d+', folder.parent.name)]


def _works(python):
    return subprocess.run([python, '-c', _WORKS], capture_output=True, check=False).returncode == 0


def run(target, python, name, *options, within=lambda *command: command):
    """Run a target of the Makefile in a virtual environment of its own; return whether it has passed."""
    print(f'== {python}', flush=True)
    command = within('make', '--no-print-directory', target, f'PYTHON={python}', f'TEST=.venv-{name}', *options)
    return subprocess.run(command, cwd=debian.ROOT, check=False).returncode == 0


def run_all(all_versions):
    """The whole suite, on each Python that there is or can be made; return what became of each."""
    outcome = {}
    for version in all_versions:
        if python := find(version):
            outcome[version] = run('suite', python, version)
        elif python := debian.provide(version):
            outcome[version] = run('suite', python, version, within=debian.inside)
        else:
            outcome[version] = None
    return {f'Python {version}': passed for version, passed in outcome.items()}


def run_plain(all_versions):
    """The plain tests, on the oldest and the newest Python that there is; return what became of each."""
    found = {version: python for version in all_versions if (python := find(version))}
    if not found:
        return dict.fromkeys(f'Python {version}' for version in all_versions)
    oldest, *_, newest = [*found, *found]
    return {
        f'Python {oldest} with the oldest versions': run('plain', found[oldest], 'oldest', 'MINIMA=yes'),
        f'Python {newest} with the newest versions': run('plain', found[newest], 'newest'),
    }


def main():
    parser = argparse.ArgumentParser(description='Run the tests on every Python that the package is for.')
    parser.add_argument('--plain', action='store_true', help='the plain tests only, at both ends of what there is here')
    all_versions = versions(read_setup())
    outcome = run_plain(all_versions) if parser.parse_args().plain else run_all(all_versions)
    words = {True: 'passed', False: 'FAILED', None: 'MISSING: there is none here, so nothing was tried'}
    print('\n'.join(['', *(f'{name}: {words[passed]}' for name, passed in outcome.items())]))
    return int(False in outcome.values())


if __name__ == '__main__':
    sys.exit(main())
