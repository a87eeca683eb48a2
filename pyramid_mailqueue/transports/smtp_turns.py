"""
Threads that take turns while their servers work at the same time.

Between two waits for its server a thread computes, and makes a dozen short system calls.  Python lets one thread
compute at a time, and each of these calls hands that on to whoever wants it: two threads that are busy together pass it
to and fro for every message, which costs them more than they win.  So a thread keeps its turn until it has to wait.

This is a courtesy and no lock.  Where the disk is slow, or a plugin hangs, the others go on without a turn.
"""

from __future__ import annotations

import threading

__all__ = ['Turn', 'Turns']

#: How long a thread waits for its turn, in seconds: much longer than others compute, and less than a disk takes.
COURTESY = 0.001


class Turns:
    """The turns of the threads that are to be considerate of each other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def new(self) -> Turn:
        """Return what one thread takes its turn with."""
        return Turn(self._lock)


class Turn:
    """One thread's."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._is_taken = False

    def take(self) -> bool:
        """Return when it is this thread's turn, or False after :data:`COURTESY`: then go on all the same."""
        self._is_taken = self._lock.acquire(timeout=COURTESY)
        return self._is_taken

    def give_up(self) -> None:
        """Call this before waiting.  A second call does nothing."""
        if self._is_taken:
            self._is_taken = False
            self._lock.release()
