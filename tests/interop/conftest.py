"""
mailqueue-runner as it is on PyPI, in a virtual environment of its own.

That is made once, in pytest's cache, and kept there for later sessions.
"""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

RELEASE = 'mailqueue-runner[plugins]==1.0.0'

#: So long may the package index take, in seconds.
PATIENCE = 120


def install(folder):
    """Install the release into *folder*; return why that cannot be, or None."""
    installed = folder / 'installed'
    pip = [folder / 'venv/bin/python', '-m', 'pip', '--disable-pip-version-check', '--retries', '1', '--timeout', '10']
    with (folder / 'lock').open('w') as lock:
        # Another session may be at it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if installed.exists():
            return None
        for command in (
            [sys.executable, '-m', 'venv', '--clear', folder / 'venv'],
            [*pip, 'install', '--quiet', '--no-input', RELEASE],
        ):
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                return f'{RELEASE} cannot be installed: nothing within {PATIENCE} seconds'
            except subprocess.CalledProcessError as error:
                last = (error.stderr.strip() or error.stdout.strip() or 'no reason given').splitlines()[-1]
                return f'{RELEASE} cannot be installed: {last}'
        installed.touch()
    return None


@pytest.fixture(scope='session')
def _environment(request, tmp_path_factory):
    name = f'{re.sub("[^a-z0-9.]+", "-", RELEASE)}-{sysconfig.get_python_version()}'
    cache = getattr(request.config, 'cache', None)
    folder = Path(cache.mkdir(name)) if cache is not None else tmp_path_factory.mktemp(name)
    return install(folder), folder / 'venv/bin'


@pytest.fixture(scope='session')
def their_bin(_environment):
    """Where their commands and their Python are."""
    why_not, folder = _environment
    if why_not:
        pytest.skip(why_not)
    return folder
