"""
The back-off of a transport after its server's trouble.

An outage must not cost a connection attempt for each message: the first trouble begins a back-off of five seconds, and
each further one without a success in between one of twice the length, up to five minutes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.forks import call_in_children

__all__ = ['BackOff']


class BackOff:
    """
    Whether there is a back-off, and because of which trouble.  May be used from any thread.

    :param first: the length of the first one, in seconds
    :param longest: none is longer, in seconds
    :param clock: seconds that only go forward
    """

    def __init__(self, first: float = 5, longest: float = 300, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._first = first
        self._longest = longest
        self._clock = clock
        self._length = 0.0
        self._until = float('-inf')
        self._trouble: ServerTrouble | None = None
        self._make_lock()
        call_in_children(self._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    @property
    def trouble(self) -> ServerTrouble | None:
        """The trouble that began the present back-off; None if there is none."""
        if self._trouble is None:
            # The usual case, checked for each message.
            return None
        with self._lock:
            return self._trouble if self._clock() < self._until else None

    @property
    def is_in_trouble(self) -> bool:
        """Whether there was no success since the last trouble, although the back-off may be over."""
        if self._trouble is None:
            return False
        with self._lock:
            return self._length > 0

    @property
    def seconds(self) -> float:
        """How long the back-off still lasts."""
        with self._lock:
            return max(0.0, self._until - self._clock())

    def begin(self, trouble: ServerTrouble) -> None:
        """Begin a back-off, unless another thread has already begun one."""
        with self._lock:
            now = self._clock()
            if now < self._until:
                return
            self._length = min(self._length * 2 or self._first, self._longest)
            self._trouble = trouble
            self._until = now + self._length

    def end(self) -> None:
        """Note a success: the back-off ends, and the next one is short again."""
        if self._trouble is None:
            return
        with self._lock:
            self._length = 0.0
            self._until = float('-inf')
            self._trouble = None
