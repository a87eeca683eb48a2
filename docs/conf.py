"""The configuration of the site: "make docs" builds it into docs/_build, and Read the Docs does the same."""

from __future__ import annotations

import builtins
import logging
import os
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / '_ext'))

import contracts

project = 'pyramid_mailqueue'
author = 'pyramid_mailqueue contributors'
project_copyright = author
release = version = metadata.version(project)

extensions = [
    'sphinx.ext.autodoc',
    'sphinx_copybutton',
    # Of our own, in _ext.
    'command_help',
    'public_names',
    'relative_links',
]
exclude_patterns = ['_build', '_ext']
html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['tables.css']
html_title = f'{project} {release}'

# A name in single backquotes, as in "See `IMailQueue`."
default_role = 'any'

# A glob may find nothing, such as howto/*.  (This warning has no type that suppress_warnings could name.)
_directives = logging.getLogger('sphinx.sphinx.directives.other')
_directives.addFilter(lambda record: 'toctree glob pattern' not in str(record.msg))

# Prompts and output are not what a reader wants to paste.
copybutton_exclude = '.linenos, .gp, .go'

# --- the reference ---------------------------------------------------------

autodoc_default_options = {'members': True, 'member-order': 'bysource'}
autodoc_typehints_format = 'short'
autodoc_preserve_defaults = True
# It is not installed for the site.
autodoc_mock_imports = ['pytest']
maximum_signature_line_length = 90

contracts.show_as_classes()

# --- names of other packages -----------------------------------------------

# Only on Read the Docs: elsewhere the build needs no network, and gives the same result with and without.
if 'READTHEDOCS' in os.environ:
    extensions.append('sphinx.ext.intersphinx')
intersphinx_mapping = {
    'python': ('https://docs.python.org/3', None),
    'pyramid': ('https://docs.pylonsproject.org/projects/pyramid/en/latest', None),
    'transaction': ('https://transaction.readthedocs.io/en/latest', None),
    'zope.interface': ('https://zopeinterface.readthedocs.io/en/latest', None),
    'sqlalchemy': ('https://docs.sqlalchemy.org/en/20', None),
}

# So without those inventories these names lead nowhere, which is no fault.  A name of ours that leads nowhere is one.
nitpicky = True
_foreign = '|'.join(
    [*sys.stdlib_module_names, *dir(builtins), 'pyramid', 'sqlalchemy', 'transaction', r'zope\.interface']
)
nitpick_ignore_regex = [(r'py:\w+', rf'({_foreign})(\..+)?')]

# What docstrings of public names say of the inside.
nitpick_ignore = [
    ('py:class', 'pyramid_mailqueue.exceptions.E'),
    ('py:class', 'delivery.waiting.Wait'),
    ('py:data', 'MAX_RECIPIENTS_OCTETS'),
    ('py:mod', 'contract'),
    ('py:mod', 'queues.sql.session'),
]
