"""What a forked child does about the things it inherits: locks, threads, connections and claims."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from types import MethodType
from typing import Any, cast
from weakref import WeakKeyDictionary

__all__ = ['call_in_children']

# The functions of the live objects, in the order of their first registration.
_inherited: WeakKeyDictionary[Any, Callable[[Any], None]] = WeakKeyDictionary()


def call_in_children(method: Callable[[], None]) -> None:
    """
    Call a bound *method* first thing in every forked child, for as long as its object lives.

    An object has one such method; a second one replaces it.
    """
    bound = cast('MethodType', method)
    _inherited[bound.__self__] = bound.__func__


def _call_all() -> None:
    with ExitStack() as stack:
        # Each is called, even if another one fails.
        for found, function in reversed([*_inherited.items()]):
            stack.callback(function, found)


# Such a registration cannot be undone, so there is one for all.
os.register_at_fork(after_in_child=_call_all)
