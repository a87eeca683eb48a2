"""
What a command owes to those who keep it running: word for systemd, and new log files after a rotation.

Neither can fail: a service that delivers mail does not stop because nobody listens to it.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

__all__ = ['all_handlers', 'notify_systemd', 'reopen_log_files']


def notify_systemd(*states: str, environ: Mapping[str, str] = os.environ) -> bool:
    """
    Tell systemd how this process is, if systemd has asked for it (``Type=notify``); see sd_notify(3).

    It never waits and never raises.

    :param states: one assignment each: ``READY=1``, ``RELOADING=1``, ``STOPPING=1``, ``STATUS=what a person may read``;
        line breaks in them become blanks, so that the words of a server cannot be another assignment
    :return: whether the word is on its way; False where there is no systemd
    """
    address = environ.get('NOTIFY_SOCKET', '')
    if not address.startswith(('/', '@')):
        return False
    lines = [' '.join(state.splitlines()) for state in states]
    if 'RELOADING=1' in lines:
        # Type=notify-reload takes no other word for it: by the time it knows that this is about its own request.
        lines.append(f'MONOTONIC_USEC={time.monotonic_ns() // 1000}')
    if address.startswith('@'):
        # Linux has names of sockets that are no files; the kernel writes them with a NUL at the beginning.
        address = f'\0{address[1:]}'
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0)
            sock.sendto('\n'.join(lines).encode('utf-8', 'replace'), address)
    except (OSError, ValueError):
        return False
    return True


def reopen_log_files() -> None:
    """
    Let each file handler go on in a file that is newly opened under its name: what logrotate asks for by SIGHUP.

    A file that cannot be opened is told of on stderr; its handler goes on with the file that it has.  Not to be called
    from a signal handler: the thread that was interrupted may hold the lock of a log handler.
    """
    for handler in all_handlers():
        if not isinstance(handler, logging.FileHandler):
            continue
        try:
            _reopen(handler)
        except Exception as error:  # noqa: BLE001 - whatever a handler of others does, the rest has its turn
            reason = (isinstance(error, OSError) and error.strerror) or error
            _complain(f'{handler.baseFilename} cannot be opened anew ({reason}); logging goes on in the former file')


def all_handlers() -> Iterable[logging.Handler]:
    """Return each handler that any logger has, once; and those that a ``MemoryHandler`` stands before."""
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
        # The new one first: if it cannot be had, there is still the former.
        handler.stream = handler._open()  # noqa: SLF001 - where subclasses, too, open their file; there is no public way
    finally:
        handler.release()
    with suppress(OSError):
        former.close()


def _complain(line: str) -> None:
    with suppress(OSError, ValueError):
        print(f'mq-run: {line}', file=sys.stderr)
