"""
The oldest versions of all that setup.cfg requires, as constraints for pip: ``python -m tests.pythons.minima``.

With them the bounds are what is tested, and not what somebody once believed.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

SETUP = Path(__file__).resolve().parents[2] / 'setup.cfg'

# A name, perhaps with extras, which constraints may not have; one lower bound; perhaps the Pythons that it is for.
_REQUIREMENT = re.compile(r'([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)(\s*;.*)?')


def read_setup():
    parser = configparser.ConfigParser()
    parser.read(SETUP, 'utf-8')
    return parser


def requirements(setup):
    """Every requirement of the package and of its extras, as it is written."""
    for text in (setup['options']['install_requires'], *setup['options.extras_require'].values()):
        yield from text.strip().splitlines()


def minima(setup):
    """The constraints, in their order.  Raises ValueError for a requirement that has no lower bound, or another one."""
    found = {}
    for requirement in requirements(setup):
        match = _REQUIREMENT.fullmatch(requirement)
        if not match:
            raise ValueError(f'setup.cfg: {requirement!r} is not "name>=version"')
        name, version, marker = match.groups('')
        if found.setdefault((name, marker), version) != version:
            raise ValueError(f'setup.cfg: {name} has the bounds {found[name, marker]} and {version}')
    return [f'{name}=={version}{marker}' for (name, marker), version in sorted(found.items())]


# Pyramid 2.0 imports pkg_resources, which writes a warning to the stderr of every command since setuptools 80.9.
_SILENT = ['setuptools<80.9']

if __name__ == '__main__':
    print(*minima(read_setup()), *_SILENT, sep='\n')
