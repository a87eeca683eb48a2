"""The columns of a table, however it is printed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = ['STYLES', 'Column']

STYLES = {'held': 'yellow', 'in progress': 'cyan', 'dead': 'red', 'in doubt': 'red', 'corrupt': 'red'}


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
