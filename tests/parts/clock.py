"""A clock that a test moves."""

from __future__ import annotations


class Clock:
    """Called for the time, in seconds; a test sets :attr:`now`."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now
