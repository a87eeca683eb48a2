"""The output of commands about a queue: tables on a terminal, plain text in a pipe, JSON for programs."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from pyramid_mailqueue.display import printable, timestamp

if TYPE_CHECKING:
    from pyramid_mailqueue.queues.entries import QueueEntry

__all__ = [
    'STYLES',
    'Column',
    'as_json',
    'print_json',
    'print_json_list',
    'print_table',
]

#: A table is laid out so many rows at a time, so that the first ones need not wait for the last.
ROWS_AT_ONCE = 500

STYLES = {'held': 'yellow', 'in progress': 'cyan', 'dead': 'red', 'in doubt': 'red', 'corrupt': 'red'}


# --- JSON -------------------------------------------------------------------


def as_json(entry: QueueEntry) -> dict[str, Any]:
    """Return a message in the form that every command prints as JSON (see "Operations" in the documentation)."""
    return {
        'id': entry.id,
        'state': entry.state,
        'sender': entry.sender,
        'recipients': entry.recipients,
        'retries': entry.retries,
        'queued_at': timestamp(entry.queued_at),
        'due': timestamp(entry.due),
        'last_attempt': timestamp(entry.last_attempt),
        'last_reply': entry.last_reply,
        'subject': entry.subject,
        'message_id': entry.message_id,
        'size': entry.size,
    }


def print_json(value: object) -> None:
    """Print *value* as JSON, in ASCII, which every terminal or pipe can take."""
    print(json.dumps(value))


def print_json_list(values: Iterable[object]) -> None:
    """Print a list of *values*, one a line, each as soon as it is available."""
    before = '['
    try:
        for value in values:
            print(before + json.dumps(value), end='')
            before = ',\n '
    finally:
        # After a failure the output is a complete list, too.
        print(']' if before != '[' else '[]')


# --- tables -----------------------------------------------------------------


class Column(NamedTuple):
    """
    A column of a table.

    :param title: its heading
    :param is_number: it is aligned to the right
    :param is_whole: it is never broken or cut off, so that it can be copied
    :param from_width: a terminal with fewer columns does not show it
    :param styles: the style of a cell that has this text, on a terminal
    """

    title: str
    is_number: bool = False
    is_whole: bool = False
    from_width: int = 0
    styles: Mapping[str, str] = MappingProxyType({})


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """Print *rows*: with rich if it is installed and this is a terminal, else in plain columns, two blanks apart."""
    safe = (tuple(map(printable, row)) for row in rows)
    is_rich = sys.stdout.isatty() and _has_rich()
    show = _show_rich if is_rich else _show_plain
    for number, chunk in enumerate(_chunks(safe)):
        show(columns, chunk, with_titles=number == 0)
    if is_rich:
        _tell_left_out(columns)


def _has_rich() -> bool:
    from importlib.util import find_spec

    return find_spec('rich') is not None


def _chunks(rows: Iterator[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Yield the rows in chunks: at least one chunk, for the titles."""
    yield list(itertools.islice(rows, ROWS_AT_ONCE))
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        yield chunk


def _show_plain(columns: Sequence[Column], rows: list[tuple[str, ...]], *, with_titles: bool) -> None:
    lines = [tuple(column.title for column in columns), *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines if with_titles else rows:
        cells = (
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        )
        print('  '.join(cells).rstrip())


def _show_rich(columns: Sequence[Column], rows: list[tuple[str, ...]], *, with_titles: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    shown = [console.width >= column.from_width for column in columns]
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
    console.print(table)


def _tell_left_out(columns: Sequence[Column]) -> None:
    from rich.console import Console

    width = Console().width
    left_out = [column.title for column in columns if width < column.from_width]
    if left_out:
        print(f'\nnot shown in {width} columns: {", ".join(left_out)}')
