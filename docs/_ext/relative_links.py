"""
Links that work in a checkout work on the site: `Settings <settings.rst>`__, `levels <../logs.rst#the-levels>`__.

A link to a page leads to that page of the site, and one to any other file of the project to a copy to download.  A link
to what is not there, be it a file or an anchor in a page, is a warning, and so fails the build.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

__all__ = ['DownloadLinks', 'PageLinks', 'setup']

logger = logging.getLogger(__name__)

# The pages that consist of a document beside docs/.
OUTSIDE = {
    'project/changes': '../CHANGES.rst',
    'project/code_of_conduct': '../CODE_OF_CONDUCT.rst',
    'project/contributing': '../CONTRIBUTING.rst',
    'project/readme': '../README.rst',
}
PAGES = {path: page for page, path in OUTSIDE.items()}


class DownloadLinks(SphinxTransform):
    """Turns links to other files than pages into downloads, before Sphinx collects these."""

    default_priority = 400

    def apply(self, **_: Any) -> None:
        """Turn those of one document."""
        for link, path, _anchor in _relative_links(self.document, self.env):
            if not path.endswith('.rst'):
                download = addnodes.download_reference('', reftarget=f'/{path}', refdoc=self.env.docname)
                download += nodes.literal('', link.astext(), classes=['download'])
                link.replace_self(download)


class PageLinks(SphinxPostTransform):
    """Turns links to pages into those of the site, when all pages have been read."""

    default_priority = 5

    def run(self, **_: Any) -> None:
        """Turn those of one page."""
        for link, path, anchor in _relative_links(self.document, self.env):
            page = PAGES.get(path, path.removesuffix('.rst'))
            if page not in self.env.found_docs:
                logger.warning('there is no such page: %s', link['refuri'], location=link)
            elif anchor and anchor not in self._ids_of(page):
                logger.warning('the page has no such anchor: %s', link['refuri'], location=link)
            else:
                docname = self.env.docname
                link.replace_self(make_refnode(self.app.builder, docname, page, anchor, link.children))

    def _ids_of(self, page: str) -> set[str]:
        return {id_ for node in self.env.get_doctree(page).findall(nodes.Element) for id_ in node['ids']}


def _relative_links(document: nodes.document, env: BuildEnvironment) -> Iterator[tuple[nodes.reference, str, str]]:
    """Yield the links to files: each with its path in docs/ and its anchor."""
    folder = env.srcdir / Path(OUTSIDE.get(env.docname, env.docname)).parent
    for link in [*document.findall(nodes.reference)]:
        url = urlsplit(link.get('refuri', ''))
        if url.path and not (url.scheme or url.netloc or link.get('internal')):
            path = os.path.relpath(folder / url.path, env.srcdir)
            yield link, path, url.fragment


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the transforms."""
    app.add_transform(DownloadLinks)
    app.add_post_transform(PageLinks)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
