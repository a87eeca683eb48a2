"""
The signals that arrive while a command starts.

Process 1, as which a container runs its command, has no default for SIGTERM: a signal before there is a handler is
lost, and the container is killed in the end.  So this module imports nothing slow.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

__all__ = ['EarlySignals']


class EarlySignals:
    """
    Keeps the signals that arrive while a command starts, for the handlers that are installed later.

    From its creation on; not those that are ignored, as by nohup.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._former: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._keep)

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        self._numbers.append(number)

    def hand_over(self, handlers: Mapping[int, Callable[[int, FrameType | None], None]]) -> None:
        """Install *handlers*, and call them for the signals that have arrived."""
        for number in self._former:
            signal.signal(number, handlers[number])
        while self._numbers:
            number = self._numbers.pop(0)
            handlers[number](number, None)

    def restore(self) -> None:
        """Restore the former handlers."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
