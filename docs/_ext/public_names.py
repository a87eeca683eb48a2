"""
References in docstrings to public names: documented where users import them, and named where they are defined.

So :meth:`~.envelope.Envelope.from_message` leads to ``pyramid_mailqueue.Envelope.from_message``.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

__all__ = ['setup']

PLACES = ('', '.interfaces', '.exceptions', '.testing', '.queues.entries')


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Node | None:
    """Return a reference to the public name that *node* may mean, without the modules in front of it."""
    if node.get('refdomain') != 'py':
        return None
    domain = env.get_domain('py')
    name = node['reftarget'].lstrip('.')
    while name:
        for place in PLACES:
            found = f'pyramid_mailqueue{place}.{name}'
            if found in domain.objects:
                return domain.resolve_xref(env, node['refdoc'], app.builder, 'obj', found, node, content)
        module, _, name = name.partition('.')
        if not module.islower():
            break
    return None


def make_python(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Return a signature with "..." for defaults that are no Python, such as <factory>: the rest has its links then."""
    return signature and re.sub(r'<(function )?\w+>', '...', signature), returns


def setup(app: Sphinx) -> dict[str, bool]:
    """Register what autodoc and the references call."""
    app.connect('missing-reference', resolve)
    app.connect('autodoc-process-signature', make_python)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
