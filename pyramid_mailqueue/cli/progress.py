"""
The progress display of ``mq-run``.

On a terminal: a bar if rich is installed (the extra ``cli``), else a line every two seconds.  Nothing under cron and
systemd.  A separate thread draws; delivery only updates the counts.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TextIO

from pyramid_mailqueue.cli.service import is_terminal
from pyramid_mailqueue.cli.terminal import painter_on

__all__ = ['Progress', 'open_progress']

# Seconds.  A run that is shorter than the first shows nothing, and does not import rich.
_PATIENCE = 0.5
_BETWEEN_BARS = 0.2
_BETWEEN_LINES = 2
# Seconds over which the rate is averaged.
_WINDOW = 10


class Progress:
    """
    How far a run is, in messages.

    :param total: how many are due; None if unknown.  It may be set later, too
    """

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.counts = (0, 0, 0, 0)

    def update(self, done: int, sent: int, deferred: int, refused: int) -> None:
        """Set how many were tried so far, and their outcomes.  May be called from any thread, at any rate."""
        self.counts = done, sent, deferred, refused


@contextmanager
def open_progress(
    stream: TextIO | None, *, total: int | None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Progress]:
    """
    Show the progress of a run on *stream* until the end of the ``with`` block, if that is a terminal.

    Log lines on the terminal appear above the bar, and the bar is removed at the end of the block.  Without rich there
    are lines, which stay.

    :param stream: where it is shown: stderr, because stdout has the summary; None as ``sys.stderr`` may be
    :param total: how many messages are due; None if unknown.  It may be too small
    :param clock: seconds, from any beginning
    """
    progress = Progress(total)
    if stream is None or not is_terminal(stream):
        yield progress
        return
    over = threading.Event()
    painter = threading.Thread(target=_paint, args=(stream, progress, clock, over.wait), name='mq-run progress')
    try:
        painter.start()
        yield progress
    finally:
        over.set()
        # It is not, if its start was interrupted.
        if painter.is_alive():
            painter.join()


def _paint(stream: TextIO, progress: Progress, clock: Callable[[], float], is_over: Callable[[float], bool]) -> None:
    """
    Draw until the run has ended.

    :param is_over: waits so many seconds, and returns True as soon as the run has ended
    """
    rate = _Rate(clock())
    while True:
        if is_over(_PATIENCE):
            return
        if progress.total or progress.counts[0]:
            break
    # A terminal that has gone away does not end the delivery.
    with suppress(OSError), _display(stream) as (show, pause):
        while not is_over(pause):
            counts = progress.counts
            rate.add(clock(), counts[0])
            show(_State(*counts, progress.total, rate.per_second))


class _Rate:
    """Messages per second, over the last few seconds, so that a stalled run shows."""

    def __init__(self, now: float) -> None:
        self._samples = deque([(now, 0)])

    def add(self, now: float, done: int) -> None:
        self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[1][0] <= now - _WINDOW:
            self._samples.popleft()

    @property
    def per_second(self) -> float:
        (then, done_then), (now, done) = self._samples[0], self._samples[-1]
        return (done - done_then) / (now - then) if now > then else 0


class _State(NamedTuple):
    """What is shown at one moment."""

    done: int
    sent: int
    deferred: int
    refused: int
    counted: int | None
    per_second: float

    @property
    def total(self) -> int | None:
        """None also if more were done than counted: some became due meanwhile."""
        return None if self.counted is None or self.counted < self.done else self.counted

    @property
    def words(self) -> str:
        """``1200 of 4000, 310/s, about 9 s left; 1190 sent, 8 deferred, 2 refused``, as far as it is known."""
        told = [str(self.done) if self.total is None else f'{self.done} of {self.total}']
        told.append(f'{self.per_second:.0f}/s' if self.per_second >= 10 else f'{self.per_second:.1f}/s')
        if self.total is not None and self.per_second:
            told.append(f'about {_span((self.total - self.done) / self.per_second)} left')
        return f'{", ".join(told)}; {self.sent} sent, {self.deferred} deferred, {self.refused} refused'


def _span(seconds: float) -> str:
    if seconds < 90:
        return f'{seconds:.0f} s'
    if seconds < 90 * 60:
        return f'{seconds / 60:.0f} min'
    return f'{seconds / 3600:.0f} h'


# --- the display ------------------------------------------------------------


@contextmanager
def _display(stream: TextIO) -> Iterator[tuple[Callable[[_State], None], float]]:
    """Yield the function that shows the progress, and the seconds between two calls of it."""
    painter = painter_on(stream)
    if painter is None or not painter.can_repaint:
        # Line and line end in one write: print() would let a log line of another thread in between.
        yield lambda state: _write(stream, f'mq-run: {state.words}\n'), _BETWEEN_LINES
        return
    with painter.bar() as show:
        yield lambda state: show(state.words, state.done, state.total), _BETWEEN_BARS


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
