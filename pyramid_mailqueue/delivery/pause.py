"""
The rest that a transport is given after its server's trouble.

An outage must not cost a connection attempt for each message: the first trouble begins a pause of five seconds, and
each further one that follows without a success between them one of twice that, up to five minutes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.forks import call_in_children

__all__ = ['Pause']


class Pause:
    """
    Whether something rests, and since which trouble.  May be used from any thread.

    :param first: the length of the first pause, in seconds
    :param longest: no pause is longer, in seconds
    :param clock: seconds that only go forward
    """

    def __init__(self, first: float = 5, longest: float = 300, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._first = first
        self._longest = longest
        self._clock = clock
        self._until = float('-inf')
        self.length = 0.0
        self.trouble: ServerTrouble | None = None
        self._make_lock()
        call_in_children(self._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    @property
    def is_active(self) -> bool:
        """Whether it rests now."""
        return self._clock() < self._until

    def begin(self, trouble: ServerTrouble) -> None:
        """Begin a pause, unless another thread has already begun one."""
        with self._lock:
            if self.is_active:
                return
            self.length = min(self.length * 2 or self._first, self._longest)
            self.trouble = trouble
            self._until = self._clock() + self.length

    def end(self) -> None:
        """There was a success: no pause, and the next one is short again."""
        with self._lock:
            self.length = 0.0
            self._until = float('-inf')
            self.trouble = None
