"""
System calls that fail, or are the last thing that a process does.

The queue makes all its system calls through the modules ``os`` and ``fcntl``, the SMTP transport its own through a
socket and a poll object.  :func:`intercepted` stands between them, and hands each call to whoever wants to count it, to
fail it or to die of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import itertools
import os
import pkgutil
import select
import signal
import socket
import threading

from pyramid_mailqueue.delivery import engine
from pyramid_mailqueue.queues import maildir
from pyramid_mailqueue.transports import base

#: The functions of ``os`` and ``fcntl`` with which the queue touches files and folders.
SYSTEM_CALLS = frozenset({
    'access', 'chmod', 'close', 'closerange', 'fchmod', 'flock', 'fstat', 'fsync', 'makedirs', 'open', 'pread',
    'rename', 'scandir', 'stat', 'unlink', 'utime', 'writev',
})  # fmt: skip

#: The methods with which the transport talks to a server.
SOCKET_CALLS = frozenset({'close', 'recv', 'send', 'sendall', 'shutdown'})

_REAL = {'fcntl': fcntl, 'os': os}


def _callers():
    """The modules of the queue's package that make system calls, each with the name of what it makes them through."""
    modules = [
        importlib.import_module(found.name) for found in pkgutil.iter_modules(maildir.__path__, f'{maildir.__name__}.')
    ]
    members = [(module, name, it) for module in modules for name, it in vars(module).items()]
    missed = [name for _, name, it in members if getattr(it, '__module__', None) in {'posix', *_REAL}]
    assert not missed, f'imported by name, and so past what intercepts them: {missed}'
    return [(module, name) for module, name, _ in members if name in _REAL]


CALLERS = _callers()

#: The modules that wait for servers.
WAITING = (base, engine)

#: Those that change something.
CHANGES = frozenset({'chmod', 'fchmod', 'makedirs', 'rename', 'unlink', 'utime', 'writev'})


@contextlib.contextmanager
def intercepted(around):
    """
    Call ``around(call)`` in the place of each system call of the queue that is made in this block.

    *around* is any callable that takes a :class:`Call`; what it returns or raises is the outcome.  A transport's calls
    are among them if it is made in this block with ``connect=connecting(around)``.

    Not among them are the calls of threads that other tests have left behind.
    """
    left_behind = {*threading.enumerate()} - {threading.current_thread()}

    def around_ours(call):
        return call() if threading.current_thread() in left_behind else around(call)

    try:
        for module, name in CALLERS:
            setattr(module, name, _Through(around_ours, _REAL[name], SYSTEM_CALLS))
        for module in WAITING:
            module.select = _Select(around_ours)
        yield around
    finally:
        for module, name in CALLERS:
            setattr(module, name, _REAL[name])
        for module in WAITING:
            module.select = select


def connecting(around):
    """Return what a transport connects with, so that the calls of its socket go through *around*."""

    def connect(address, timeout):
        sock = around(Call(socket.create_connection, (address, timeout), {}))
        return _Through(around, sock, SOCKET_CALLS)

    return connect


class _Through:
    """A module or an object; those of its functions that are system calls go through *around*."""

    def __init__(self, around, target, names):
        self._around = around
        self._target = target
        self._names = names

    def __getattr__(self, name):
        function = getattr(self._target, name)
        if name not in self._names:
            return function
        return lambda *args, **kwargs: self._around(Call(function, args, kwargs))


class _Select:
    """The module ``select``, whose poll objects ask the system through *around*."""

    def __init__(self, around):
        self._around = around

    def poll(self):
        return _Through(self._around, select.poll(), {'poll'})

    def __getattr__(self, name):
        return getattr(select, name)


class Call:
    """One system call that is about to be made: ``call()`` makes it."""

    def __init__(self, function, args, kwargs):
        self.name = function.__name__
        self.function = function
        self.args = args
        self._kwargs = kwargs

    def __call__(self):
        return self.function(*self.args, **self._kwargs)

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
    'EIO': lambda call: call.name not in {'access', 'closerange', 'flock'},
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

    def __init__(self, name, number, *, lasts=False, can_fail=None):
        self.error = getattr(errno, name)
        self._can_fail = can_fail or CAN_FAIL[name]
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


class Refusal:
    """All calls for which ``fails(call)`` is true fail with the errno of this name."""

    def __init__(self, name, fails):
        self.error = getattr(errno, name)
        self._fails = fails

    def __call__(self, call):
        if self._fails(call):
            raise OSError(self.error, os.strerror(self.error))
        return without_sync(call)


class Freeze:
    """The process is stopped before the *number*-th of its calls of these names, until somebody lets it go on."""

    def __init__(self, number, names):
        self._number = number
        self._names = names
        self._numbers = itertools.count(1)

    def __repr__(self):
        return f'freeze before call {self._number}'

    def __call__(self, call):
        if call.name in self._names and next(self._numbers) == self._number:
            # For this thread: of a signal for the process it would hear later.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return without_sync(call)


class Death:
    """
    The process is killed right before or after its *number*-th call, counted over all of its threads.

    :param counts: called with a call, says whether it is counted; by default all are
    """

    def __init__(self, number, moment, counts=lambda call: True):
        self._number = number
        self._moment = moment
        self._counts = counts
        self._numbers = itertools.count(1)

    def __repr__(self):
        return f'death {self._moment} call {self._number}'

    def __call__(self, call):
        if not self._counts(call) or next(self._numbers) < self._number:
            return without_sync(call)
        if self._moment == 'after':
            without_sync(call)
        raise _killed()


class DeathInSend:
    """
    The process is killed when the network has taken a part of what the *number*-th ``send`` gives it.

    ``cut(octets)`` says how many of them.
    """

    def __init__(self, number, cut):
        self._number = number
        self._cut = cut
        self._numbers = itertools.count(1)

    def __repr__(self):
        return f'death in send {self._number}'

    def __call__(self, call):
        if call.name != 'send' or next(self._numbers) < self._number:
            return without_sync(call)
        (octets,) = call.args
        call.function(octets[: self._cut(bytes(octets))])
        raise _killed()


def _killed():
    os.kill(os.getpid(), signal.SIGKILL)
    return AssertionError('this process should be dead')


def without_sync(call):
    """Make the call, unless it is for power cuts, which a test cannot make."""
    return None if call.name == 'fsync' else call()
