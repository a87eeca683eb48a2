"""
The help of a command as it prints it, with each of its subcommands in a section of its own.

::

    .. command-help:: pyramid_mailqueue.cli.queue
"""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Iterator
from importlib import import_module
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

__all__ = ['CommandHelp', 'setup']

# What a terminal of the usual width shows, whatever the build runs in.
TERMINAL = {'COLUMNS': '80', 'NO_COLOR': '1'}


class CommandHelp(SphinxDirective):
    """The directive: its argument is the module of a command."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a section for the command, and one in it for each subcommand."""
        module = import_module(self.arguments[0])
        self.env.note_dependency(inspect.getfile(module))
        parser = module._parser()
        with mock.patch.dict(os.environ, TERMINAL):
            top = self._section(parser)
            top += [self._section(subcommand) for subcommand in _subcommands_of(parser)]
        return [top]

    def _section(self, parser: argparse.ArgumentParser) -> nodes.section:
        # Without the "INI" that argparse puts between a command and its subcommand.
        name = ' '.join(word for word in parser.prog.split() if word != 'INI')
        section = nodes.section('', nodes.title('', name), names=[nodes.fully_normalize_name(name)])
        self.state.document.note_implicit_target(section, section)
        section += nodes.literal_block('', f'$ {name} --help\n{parser.format_help()}', language='console')
        return section


def _subcommands_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive('command-help', CommandHelp)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
