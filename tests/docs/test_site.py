"""The site has all pages, all public names and all commands.  (That it can be built, "make docs" checks.)"""

from __future__ import annotations

import configparser
import fnmatch
import importlib
import pkgutil
import re

import pytest

from tests.parts.pages import ROOT, directives_of

DOCS = ROOT / 'docs'
PUBLIC = ['pyramid_mailqueue', *(f'pyramid_mailqueue.{name}' for name in ('interfaces', 'exceptions', 'testing'))]


def documented():
    """Return the names in the reference; those of whole modules are not among them."""
    return [argument for directive, argument, _ in directives_of(DOCS / 'api.rst') if directive != 'automodule']


@pytest.mark.parametrize('name', PUBLIC)
def test_every_public_name_is_in_the_reference(name):
    module = importlib.import_module(name)
    # A name may be there as that of the module from which users import it.
    there = [pkgutil.resolve_name(documented_name) for documented_name in documented()]

    missing = [public for public in module.__all__ if not any(getattr(module, public) is one for one in there)]

    assert not missing


def test_the_reference_names_nothing_twice():
    names = documented()

    assert len(names) == len(set(names))


def test_every_command_is_on_the_page_of_commands_and_no_other():
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg', 'utf-8')
    lines = setup['options.entry_points']['console_scripts'].strip().splitlines()
    modules = [module for _, module, _ in directives_of(DOCS / 'commands.rst')]

    names = [importlib.import_module(module)._parser().prog for module in modules]

    assert sorted(names) == sorted(line.partition('=')[0].strip() for line in lines)


def test_every_page_is_in_the_contents_once():
    pages = {path.relative_to(DOCS).with_suffix('').as_posix() for path in DOCS.rglob('*.rst')}
    pages = {page for page in pages if not page.startswith(('_', 'index'))}
    entries = [entry for _, _, content in directives_of(DOCS / 'index.rst') for entry in content if entry]
    patterns = [re.sub(r'.*<(.+)>', r'\1', entry) for entry in entries]

    found = [page for pattern in patterns for page in fnmatch.filter(pages, pattern)]

    assert sorted(found) == sorted(pages)


@pytest.mark.parametrize('path', sorted(ROOT.glob('*.rst')), ids=lambda path: path.name)
def test_each_document_of_the_root_is_a_page_of_the_site(path):
    page = DOCS / f'project/{path.stem.lower()}.rst'
    links = (DOCS / '_ext/relative_links.py').read_text('utf-8')

    assert page.read_text('utf-8').endswith(f'\n.. include:: ../../{path.name}\n')
    assert f"'project/{page.stem}': '../{path.name}',\n" in links


def test_read_the_docs_builds_what_make_docs_builds():
    text = (ROOT / '.readthedocs.yaml').read_text('utf-8')

    files = re.findall(r'(?:configuration|requirements): (.+)', text)
    assert files == ['docs/conf.py', 'docs/requirements.txt']
    assert all((ROOT / name).is_file() for name in files)
    assert 'fail_on_warning: true' in text
