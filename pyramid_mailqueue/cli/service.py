"""
A command as a service: notifications for systemd, and new log files after a rotation.

One rule holds for all output, to stdout and stderr, to log files and to systemd: it neither ends nor slows the
delivery.  What cannot be written at once is left out, and the mail is delivered all the same.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

from pyramid_mailqueue.exceptions import described

__all__ = [
    'all_handlers',
    'guard_logs',
    'is_terminal',
    'notify_systemd',
    'reopen_log_files',
    'steady_outputs',
    'stream_at',
]

#: How long to wait for a reader that has stopped reading, in seconds; after that not at all, until it reads again.
READER_PATIENCE = 0.5

FORMER = 'logging continues in the old file'


def notify_systemd(*states: str, environ: Mapping[str, str] = os.environ) -> bool:
    """
    Notify systemd of the state of this process, if systemd has asked for it (``Type=notify``); see sd_notify(3).

    It never waits and never raises.

    :param states: one assignment each: ``READY=1``, ``RELOADING=1``, ``STOPPING=1``, ``STATUS=free text``; line breaks
        in them become blanks, so that the reply of a server cannot be another assignment
    :return: whether the notification was sent; False without systemd
    """
    address = environ.get('NOTIFY_SOCKET', '')
    if not address.startswith(('/', '@')):
        return False
    lines = [' '.join(state.splitlines()) for state in states]
    if 'RELOADING=1' in lines:
        # Type=notify-reload requires it: by the time systemd knows that this is about its own request.
        lines.append(f'MONOTONIC_USEC={time.monotonic_ns() // 1000}')
    if address.startswith('@'):
        # An abstract socket of Linux, which is not a file; the kernel writes its name with a NUL at the beginning.
        address = f'\0{address[1:]}'
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0)
            sock.sendto('\n'.join(lines).encode('utf-8', 'replace'), address)
    except (OSError, ValueError):
        return False
    return True


# --- stdout and stderr ------------------------------------------------------


@contextmanager
def steady_outputs() -> Iterator[None]:
    """Keep standard streams and guarded log handlers from raising or waiting for long within the ``with`` block."""
    _open_missing_descriptors()
    try:
        with redirect_stdout(_steady(sys.stdout)), redirect_stderr(_steady(sys.stderr)):
            yield
    finally:
        for handler in all_handlers():
            if guard := _LogGuard.of(handler):
                guard.remove()


def _open_missing_descriptors() -> None:
    """Open closed standard descriptors as /dev/null: else a queue file would become stdout or stderr."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _steady(stream: TextIO | None) -> TextIO:
    """Return what writes to *stream* by the rule of this module; *stream* itself if it has no file, as in tests."""
    if stream is None:
        return Path(os.devnull).open('w', encoding='utf-8')
    try:
        return cast('TextIO', _SteadyStream(stream))
    except (AttributeError, OSError, ValueError):
        return stream


class _SteadyStream:
    """Writes text to the file of *stream*, bypassing its buffer, which would retry failed writes."""

    def __init__(self, stream: TextIO) -> None:
        self._fd = stream.fileno()
        self._stream = stream
        self._is_stuck = False
        with suppress(OSError):
            stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        data = text.encode(self._stream.encoding, 'backslashreplace')
        with suppress(OSError):
            # A pipe or a socket that is ready has room for so much.
            while data and self._is_ready():
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
        return len(text)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def _is_ready(self) -> bool:
        self._is_stuck = not _is_writable(self._fd, 0 if self._is_stuck else READER_PATIENCE)
        return not self._is_stuck


def _is_writable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


def is_terminal(stream: TextIO) -> bool:
    """Whether *stream* is a terminal, and open."""
    try:
        return stream.isatty()
    except ValueError:
        # It is closed.
        return False


def stream_at(path: Path) -> TextIO | None:
    """
    Return stdout or stderr if *path* leads there, as ``/dev/stdout`` does; None if it is a file of its own.

    A socket, such as the journal's, cannot be opened by its name.
    """
    with suppress(OSError):
        there = path.stat()
        for fd, stream in enumerate((sys.stdout, sys.stderr), 1):
            if not stat.S_ISREG(there.st_mode) and os.path.samestat(there, os.fstat(fd)):
                return stream
    return None


# --- log files --------------------------------------------------------------


def guard_logs() -> None:
    """Guard the log handlers that exist now, until the end of :func:`steady_outputs`."""
    for handler in all_handlers():
        if not _LogGuard.of(handler):
            _LogGuard(handler)


class _LogGuard:
    """
    Contains the trouble of a log handler: one line on stderr when it begins, and one when it is over.

    Its methods replace the handler's, and are called with the handler's lock held.
    """

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self._emit: Callable[[logging.LogRecord], None] = handler.emit
        self._error: BaseException | None = None
        name = getattr(handler, 'baseFilename', None) or repr(handler)
        self._writing = _Trouble(f'{name} cannot be written', 'mail is delivered all the same', f'{name} is written')
        self._moving = _Trouble(f'{name} cannot be reopened', FORMER, f'{name} is open')
        handler.emit = self.emit
        handler.handleError = self.note_error
        if hasattr(handler, 'reopenIfNeeded'):
            # A WatchedFileHandler: it would close the old file first.
            handler.reopenIfNeeded = self.follow

    @classmethod
    def of(cls, handler: logging.Handler) -> _LogGuard | None:
        """Return the guard of *handler*, if it has one."""
        guard = getattr(handler.emit, '__self__', None)
        return guard if isinstance(guard, cls) else None

    def remove(self) -> None:
        """Restore the handler's own methods."""
        for name in ('emit', 'handleError', 'reopenIfNeeded'):
            vars(self._handler).pop(name, None)

    def emit(self, record: logging.LogRecord) -> None:
        """See :meth:`logging.Handler.emit`."""
        self._error = None
        with _Contained() as attempt:
            if _is_stuck(self._handler):
                raise BlockingIOError(errno.EAGAIN, 'it is not being read')
            self._emit(record)
        self._writing.see(attempt.error or self._error)

    def note_error(self, record: logging.LogRecord) -> None:
        """See :meth:`logging.Handler.handleError`; called while an exception is handled."""
        self._error = sys.exc_info()[1]

    def follow(self) -> None:
        """Switch to a new file if the old one was moved away; keep the old one while no new one can be opened."""
        stream = self._handler.stream
        if stream is None:
            return
        with _Contained() as attempt:
            if not _is_at(self._handler.baseFilename, stream.fileno()):
                _reopen(self._handler)
        self._moving.see(attempt.error)


class _Trouble:
    """Reports a trouble: once for each reason, and when it is over."""

    def __init__(self, problem: str, consequence: str, relief: str) -> None:
        self._problem = problem
        self._consequence = consequence
        self._relief = relief
        self._told = ''

    def see(self, error: BaseException | None) -> None:
        """Note the outcome; None is success."""
        reason = '' if error is None else _reason(error)
        if reason and reason != self._told:
            _complain(f'{self._problem} ({reason}); {self._consequence}')
        elif self._told and not reason:
            _complain(f'{self._relief} again')
        self._told = reason


class _Contained(AbstractContextManager['_Contained']):
    """Keeps what its ``with`` block raises, and suppresses it if it is an :class:`Exception`, unlike Ctrl-C."""

    error: BaseException | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """See the class."""
        self.error = error
        return isinstance(error, Exception)


def _reason(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or described(error)


def _is_stuck(handler: logging.Handler) -> bool:
    """Whether a record could not be written without waiting for a reader."""
    channel: Any = getattr(handler, 'stream', None) or getattr(handler, 'socket', None)
    if isinstance(channel, _SteadyStream):
        return False
    with suppress(AttributeError, OSError, ValueError):
        return not _is_writable(channel.fileno(), 0)
    return False


def _is_at(path: str, fd: int) -> bool:
    """Whether the open file is still the one at *path*."""
    with suppress(OSError):
        return os.path.samestat(Path(path).stat(), os.fstat(fd))
    return False


def reopen_log_files() -> None:
    """
    Reopen the file of each file handler under its name, as logrotate asks by SIGHUP.

    A file that cannot be opened is reported on stderr; its handler keeps the file that it has.  Must not be called from
    a signal handler: the interrupted thread may hold the lock of a log handler.
    """
    for handler in all_handlers():
        if not isinstance(handler, logging.FileHandler):
            continue
        with _Contained() as attempt:
            _reopen(handler)
        if attempt.error is not None:
            _complain(f'{handler.baseFilename} cannot be reopened ({_reason(attempt.error)}); {FORMER}')


def all_handlers() -> Iterable[logging.Handler]:
    """Return each handler that any logger has, once; and the targets of handlers such as ``MemoryHandler``."""
    # A copy: other threads may ask for new loggers meanwhile.
    loggers = [logging.root, *list(logging.root.manager.loggerDict.values())]
    handlers = [handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers]
    targets = [getattr(handler, 'target', None) for handler in handlers]
    return dict.fromkeys([*handlers, *(target for target in targets if isinstance(target, logging.Handler))])


def _reopen(handler: logging.FileHandler) -> None:
    handler.acquire()
    try:
        former = handler.stream
        if not former:
            # With delay=True, and nothing was logged yet: the first record opens it.
            return
        # A file that was not moved away must not be emptied.
        handler.mode = handler.mode.replace('w', 'a').replace('x', 'a')
        if Path(handler.baseFilename).is_fifo():
            # Opening it would wait for a reader.
            raise OSError(errno.ENXIO, 'it is a pipe')
        # The new one first: if it cannot be opened, the old one remains.
        handler.stream = handler._open()  # noqa: SLF001 - where subclasses, too, open their file; there is no public way
    finally:
        handler.release()
    with suppress(OSError):
        former.close()


def _complain(line: str) -> None:
    with suppress(OSError, ValueError):
        print(f'mq-run: {line}', file=sys.stderr)
