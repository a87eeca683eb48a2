"""
System calls that fail, or are the last thing that a process does.

The queue makes all its system calls through the modules ``os`` and ``fcntl``.  :func:`intercepted` stands between them,
and hands each call to whoever wants to count it, to fail it or to die of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal

from pyramid_mailqueue.queues import locked_file, maildir, maildir_admin, maildir_claim, maildir_folders

#: The functions of ``os`` and ``fcntl`` with which the queue touches files and folders.
SYSTEM_CALLS = frozenset({
    'access', 'chmod', 'close', 'fchmod', 'flock', 'fstat', 'fsync', 'makedirs', 'open', 'pread', 'rename', 'scandir',
    'stat', 'unlink', 'utime', 'writev',
})  # fmt: skip

#: The modules that make them.
MODULES = (locked_file, maildir, maildir_admin, maildir_claim, maildir_folders)

#: Those that change something.
CHANGES = frozenset({'chmod', 'fchmod', 'makedirs', 'rename', 'unlink', 'utime', 'writev'})


@contextlib.contextmanager
def intercepted(around):
    """
    Call ``around(call)`` in the place of each system call of the queue that is made in this block.

    *around* is any callable that takes a :class:`Call`; what it returns or raises is the outcome.
    """
    try:
        for module in MODULES:
            module.os = _Module(os, around)
        locked_file.fcntl = _Module(fcntl, around)
        yield around
    finally:
        for module in MODULES:
            module.os = os
        locked_file.fcntl = fcntl


class _Module:
    """A module whose system calls go through *around*."""

    def __init__(self, module, around):
        self._module = module
        self._around = around

    def __getattr__(self, name):
        function = getattr(self._module, name)
        if name not in SYSTEM_CALLS:
            return function
        return lambda *args, **kwargs: self._around(Call(function, args, kwargs))


class Call:
    """One system call that is about to be made: ``call()`` makes it."""

    def __init__(self, function, args, kwargs):
        self.name = function.__name__
        self.args = args
        self._call = lambda: function(*args, **kwargs)

    def __call__(self):
        return self._call()

    def __repr__(self):
        return f'{self.name}{self.args}'

    @property
    def opens_for_writing(self):
        return self.name == 'open' and bool(self.args[1] & (os.O_RDWR | os.O_CREAT))

    @property
    def creates(self):
        return self.name == 'open' and bool(self.args[1] & os.O_CREAT)


class Log:
    """Remembers the calls, and makes them."""

    def __init__(self):
        self.calls = []

    def __call__(self, call):
        self.calls.append(call)
        return call()

    @property
    def names(self):
        return [call.name for call in self.calls]


#: Which calls can come back with which error.
CAN_FAIL = {
    'ENOSPC': lambda call: call.creates or call.name in {'fsync', 'makedirs', 'rename', 'writev'},
    'EIO': lambda call: call.name not in {'access', 'flock'},
    'EACCES': lambda call: call.name in {'chmod', 'makedirs', 'open', 'rename', 'scandir', 'unlink', 'utime'},
    'EROFS': lambda call: call.opens_for_writing or call.name in CHANGES,
    'EMFILE': lambda call: call.name in {'open', 'scandir'},
    'ENOLCK': lambda call: call.name == 'flock',
}


class Fault:
    """
    Of the calls that can fail with the errno of this name, the *number*-th does, and with *lasts* also all that follow.

    ``hit`` is the call that failed first; None if there are not so many.
    """

    def __init__(self, name, number, *, lasts=False):
        self.error = getattr(errno, name)
        self._can_fail = CAN_FAIL[name]
        self._number = number
        self._lasts = lasts
        self._count = 0
        self.hit = None

    def __call__(self, call):
        if self._fails(call):
            self.hit = self.hit or call
            if call.name == 'close':
                # Whatever Linux answers, the file is closed.
                call()
            raise OSError(self.error, os.strerror(self.error))
        return without_sync(call)

    def _fails(self, call):
        if not self._can_fail(call):
            return False
        self._count += 1
        return self._count == self._number or (self._lasts and self._count > self._number)


class Death:
    """The process is killed right before or after its *number*-th call."""

    def __init__(self, number, moment):
        self._number = number
        self._moment = moment
        self._count = 0

    def __call__(self, call):
        self._count += 1
        if self._count < self._number:
            return without_sync(call)
        if self._moment == 'after':
            without_sync(call)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError('this process should be dead')


def without_sync(call):
    """Make the call, unless it is for power cuts, which a test cannot make."""
    return None if call.name == 'fsync' else call()
