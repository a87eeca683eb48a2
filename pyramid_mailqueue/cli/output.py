"""The output of commands about a queue: tables on a terminal, plain text in a pipe, JSON for programs."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pyramid_mailqueue.cli.columns import Column
from pyramid_mailqueue.cli.terminal import painter_on
from pyramid_mailqueue.display import printable, timestamp

if TYPE_CHECKING:
    from pyramid_mailqueue.queues.entries import QueueEntry

__all__ = [
    'as_json',
    'print_json',
    'print_json_list',
    'print_table',
]

#: A table is laid out so many rows at a time, so that the first ones need not wait for the last.
ROWS_AT_ONCE = 500


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


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """Print *rows*: with rich if it is installed and this is a terminal, else in plain columns, two blanks apart."""
    safe = (tuple(map(printable, row)) for row in rows)
    painter = painter_on(sys.stdout)
    show = _show_plain if painter is None else painter.print_table
    for number, chunk in enumerate(_chunks(safe)):
        show(columns, chunk, with_titles=number == 0)
    if painter is not None:
        _tell_left_out(columns, painter.width)


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


def _tell_left_out(columns: Sequence[Column], width: int) -> None:
    left_out = [column.title for column in columns if width < column.from_width]
    if left_out:
        print(f'\nnot shown in {width} columns: {", ".join(left_out)}')
