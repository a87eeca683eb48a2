"""
Paints on a terminal: tables, and the bar of a run.

All that needs rich is here, which is imported by :mod:`~.cli.terminal` if it is installed.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, cast

from rich.console import Console, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pyramid_mailqueue.cli.columns import Column
from pyramid_mailqueue.cli.service import all_handlers, is_terminal

__all__ = ['Painter']

# Columns.  With room for less than the smaller one no bar is drawn.
_SMALLEST_BAR = 10
_LARGEST_BAR = 40


class Painter:
    """See the module.  It paints on *stream*, a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)

    @property
    def width(self) -> int:
        """The number of its columns, now."""
        return self._console.width

    @property
    def can_repaint(self) -> bool:
        """Whether it can paint over a line: not with ``TERM=dumb``."""
        return self._console.is_interactive

    # --- tables ---

    def print_table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, with_titles: bool) -> None:
        """Print *rows*, as far as there is room for their columns."""
        shown = [self.width >= column.from_width for column in columns]
        table = Table(box=None, pad_edge=False, show_header=with_titles, header_style='bold')
        for column in itertools.compress(columns, shown):
            table.add_column(
                column.title,
                justify='right' if column.is_number else 'left',
                no_wrap=column.is_whole,
                overflow='fold',
            )
        for row in rows:
            # Text, not markup: a subject such as "[red]" means itself.
            cells = (Text(cell, column.styles.get(cell, '')) for column, cell in zip(columns, row, strict=True))
            table.add_row(*itertools.compress(cells, shown))
        self._console.print(table)

    # --- the bar ---

    @contextmanager
    def bar(self) -> Iterator[Callable[[str, int, int | None], None]]:
        """
        Yield a function that shows a bar: with its words, how far it is, and the whole, which is None if unknown.

        What is logged meanwhile appears above the bar, which is removed at the end of the block.
        """
        # The bar goes before the handlers get their streams back: what is logged in between would be painted over.
        with (
            self._diverted_logging(),
            Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False) as live,
        ):
            yield lambda words, done, total: live.update(_row(words, done, total, self.width), refresh=True)

    @contextmanager
    def _diverted_logging(self) -> Iterator[None]:
        """
        Let log handlers write above the bar.

        Each holds the stream that it was created with, so it does not use the one with which rich replaces
        ``sys.stderr``.
        """
        terminals = [stream for stream in (sys.stderr, sys.stdout) if stream and is_terminal(stream)]
        diverted = []
        try:
            for handler in all_handlers():
                if isinstance(handler, logging.StreamHandler) and handler.stream in terminals:
                    proxy = cast('TextIO', FileProxy(self._console, handler.stream))
                    diverted.append((handler, handler.setStream(proxy)))
            yield
        finally:
            for handler, former in diverted:
                handler.setStream(former)


def _row(words: str, done: int, total: int | None, width: int) -> RenderableType:
    """Return one line for any width: a longer one would leave remains on the terminal."""
    text = Text(words, no_wrap=True, overflow='crop')
    room = min(width - len(words) - 1, _LARGEST_BAR)
    if room < _SMALLEST_BAR:
        return text
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total, done, width=room), text)
    return row
