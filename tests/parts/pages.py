"""The documents, as docutils reads them."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import docutils.core
import docutils.nodes
from docutils.parsers.rst import Directive, directives

__all__ = ['DOCS', 'ROOT', 'directives_of', 'name_of', 'parse']

ROOT = Path(__file__).parent.parent.parent

# Not docs/project, whose pages are those of the root once more.
DOCS = sorted([*ROOT.glob('*.rst'), *ROOT.glob('docs/*.rst'), *ROOT.glob('docs/howto/*.rst')])

# What these documents have beside plain reStructuredText.  Sphinx reads it, and GitHub leaves it out.
OF_SPHINX = {
    'docs/api.rst': ['autoclass', 'autodata', 'autoexception', 'autofunction', 'automodule', 'py:data'],
    'docs/commands.rst': ['command-help'],
    'docs/index.rst': ['toctree'],
}


class OfSphinx(Directive):
    """Leaves a comment that a test can read."""

    optional_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self):
        name, *_options = '\n'.join(self.arguments).split('\n')
        return [docutils.nodes.comment('', '', directive=self.name, argument=name, content=[*self.content])]


def parse(path):
    """Return the document; any complaint of the parser is an error (level 1 is "info")."""
    settings = {'report_level': 1, 'halt_level': 1}
    with _known(OF_SPHINX.get(name_of(path), ())):
        return docutils.core.publish_doctree(path.read_text('utf-8'), str(path), settings_overrides=settings)


@contextmanager
def _known(names):
    with mock.patch.dict(directives._directives, dict.fromkeys(names, OfSphinx)):
        yield


def directives_of(path):
    """Return the directives of Sphinx in a document: the name, the argument and the lines of each."""
    comments = [node for node in parse(path).findall(docutils.nodes.comment) if 'directive' in node]
    return [(node['directive'], node['argument'], node['content']) for node in comments]


def name_of(path):
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
