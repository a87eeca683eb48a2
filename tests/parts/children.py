"""Child processes, forked from the process of the tests: they are warm, and need no time to start."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import posix
import signal
import traceback
import warnings
from pathlib import Path

DEADLINE = 60


class Child:
    """
    A forked child that runs *function*, and hands it its end of a connection.

    With ``with``, the child is dead at the end of the block.
    """

    def __init__(self, function):
        self.connection, theirs = multiprocessing.Pipe()
        self.pid = fork(self._run, function, theirs)
        self.status = None
        theirs.close()

    def _run(self, function, connection):
        self.connection.close()
        function(connection)

    def hear(self):
        """Return the next thing that the child says.  Fails the test if it is dead, or silent for too long."""
        assert self.connection.poll(DEADLINE), 'the child says nothing'
        try:
            return self.connection.recv()
        except EOFError:
            raise AssertionError(f'the child has ended with {self.wait()}') from None

    def tell(self, what=None):
        self.connection.send(what)

    def kill(self):
        """End the child as a power cut would, and return when it is dead."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self):
        """Wait for the child to end; return its exit status, or, negative, the signal that killed it."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.kill()
        self.connection.close()


def run_in_child(function):
    """Return what *function* returns in a forked child."""
    with Child(lambda connection: connection.send(function())) as child:
        return child.hear()


def fork(function, *args):
    """Run *function* in a forked child and return the child's process id."""
    with warnings.catch_warnings():
        # Threads that other tests have left, such as idle delivery threads, are of no interest to the child.
        warnings.simplefilter('ignore', DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function(*args)
        status = 0
    except BaseException:  # noqa: BLE001 - whatever it is, the child must not go on with the tests of its parent
        traceback.print_exc()
    finally:
        # Not os._exit(): coverage makes that write a file first, of which kill() would leave a half.
        posix._exit(status)


@contextlib.contextmanager
def no_open_files_are_left(closes=None):
    """
    What the block opens, it closes; and it closes the file descriptor *closes*, if that is given.

    What else is closed meanwhile does not count: other tests leave sockets to the garbage collector.
    """
    before = open_files()
    before.pop(str(closes), None)
    yield
    left = {number: what for number, what in open_files().items() if before.get(number) != what}
    assert not left, f'left open: {left}'


def open_files():
    """What each file descriptor of this process means."""
    found = {}
    for path in Path('/proc/self/fd').iterdir():
        # The folder itself is open only while it is read.
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = str(path.readlink())
    return found
