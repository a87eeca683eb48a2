"""Threads that do for a loop what may take long, and post what became of it into a pipe."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

__all__ = ['Helpers', 'Posted']


class Posted(NamedTuple):
    """
    Something that was done.

    :param done: to be called by the loop, with *found* and *error*
    :param found: what the work returned
    :param error: what it raised, if it did
    :param dispose: to be called with *found* if there is no loop any more
    """

    done: Callable[[Any, BaseException | None], None]
    found: Any
    error: BaseException | None
    dispose: Callable[[Any], None]

    def drop(self) -> None:
        """Take it where there is no loop any more."""
        if self.error is None:
            self.dispose(self.found)


class _Pipe:
    """A pipe into which may be written when it is closed: that meets no other file."""

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        os.set_blocking(self._write_fd, False)
        self._is_open = True
        self._lock = threading.Lock()

    def write(self) -> None:
        # A full pipe wakes who reads it, too.
        with self._lock, suppress(BlockingIOError):
            if self._is_open:
                os.write(self._write_fd, b'!')

    def close(self) -> None:
        with self._lock:
            self._is_open = False
            os.close(self.read_fd)
            os.close(self._write_fd)


class Helpers:
    """
    Any number of threads, as many as there are works at the same time; they are daemons, as a work may hang.

    All methods but :meth:`wake` are called by the thread of the loop.

    :raises OSError: there can be no pipe
    """

    def __init__(self) -> None:
        self._pipe = _Pipe()
        self._works: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._posted: queue.SimpleQueue[Posted] = queue.SimpleQueue()
        self._threads = 0
        self._busy = 0
        self._is_closed = False

    def fileno(self) -> int:
        """Return the descriptor that is ready to read when something was posted, or somebody woke the loop."""
        return self._pipe.read_fd

    @property
    def are_busy(self) -> bool:
        """Whether something was given that was not collected."""
        return self._busy > 0

    def wake(self) -> None:
        """Wake the loop.  May be called from any thread."""
        self._pipe.write()

    def give(
        self,
        work: Callable[[], Any],
        done: Callable[[Any, BaseException | None], None],
        dispose: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """
        Let a thread do *work*; see `Posted`.

        :raises RuntimeError: there can be no more threads
        """
        if self._busy == self._threads:
            threading.Thread(target=self._help, name='mailqueue-helper', daemon=True).start()
            self._threads += 1
        self._busy += 1
        self._works.put(lambda: self._post(work, done, dispose))

    def collect(self) -> Iterator[Posted]:
        """Yield what was posted since the last call."""
        with suppress(BlockingIOError):
            os.read(self._pipe.read_fd, 4096)
        with suppress(queue.Empty):
            while True:
                posted = self._posted.get_nowait()
                self._busy -= 1
                yield posted

    def close(self) -> None:
        """Let the threads end.  Those that have something in hand end later; what they post is dropped."""
        self._is_closed = True
        self._pipe.close()
        self._drop_posted()
        for _ in range(self._threads):
            self._works.put(None)

    # --- in the threads ---

    def _help(self) -> None:
        while (work := self._works.get()) is not None:
            work()

    def _post(
        self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None], dispose: Callable[[Any], None]
    ) -> None:
        found, error = None, None
        try:
            found = work()
        except BaseException as exc:  # noqa: BLE001 - the loop raises it
            error = exc
        self._posted.put(Posted(done, found, error, dispose))
        self.wake()
        if self._is_closed:
            self._drop_posted()

    def _drop_posted(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._posted.get_nowait().drop()
