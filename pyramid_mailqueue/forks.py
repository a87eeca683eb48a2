"""What a process has to do about things that it inherited from its parent: locks, threads, connections and claims."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

__all__ = ['call_in_children']


def call_in_children(method: Callable[[], None]) -> None:
    """
    Call a bound *method* first thing in every forked child, for as long as its object lives.

    There is no way to take such a registration back (see :func:`os.register_at_fork`), so only a weak reference is
    registered.
    """
    reference = weakref.WeakMethod(method)

    def call() -> None:
        found = reference()
        if found is not None:
            found()

    os.register_at_fork(after_in_child=call)
