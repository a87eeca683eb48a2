"""Strace: what a child really asks of the kernel, and a kernel that fails or kills it on demand."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess

from tests.parts.children import Child

# prctl(2): any process of the same user may trace this one, even where only its ancestors may (Yama).
PR_SET_PTRACER = 0x59616D61
ANYBODY = ctypes.c_ulong(-1)

#: The system calls that change the queue or make it durable; "?": not every architecture has each of them.
CHANGES = (
    'flock',
    'fsync',
    'writev',
    'fchmod',
    'utimensat',
    '?unlink,?unlinkat',
    '?rename,?renameat,?renameat2',
)


def why_not():
    """Return why strace cannot be used here; None if it can."""
    if not shutil.which('strace'):
        return 'strace is not installed'
    with Child(wait_for_strace) as child:
        try:
            with traced(child, '-o', '/dev/null'):
                pass
        except AssertionError as error:
            return f'strace may not trace processes here: {error}'
    return None


def wait_for_strace(connection):
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANYBODY, 0, 0, 0)
    connection.send('ready')
    connection.recv()


@contextlib.contextmanager
def traced(child, *options):
    """In the block, *child* goes on under strace; it must have come to :func:`wait_for_strace`."""
    assert child.hear() == 'ready'
    with subprocess.Popen(['strace', *options, '-p', str(child.pid)], stderr=subprocess.PIPE, text=True) as strace:
        first = strace.stderr.readline()
        assert 'attached' in first, first
        child.tell('go')
        yield
        child.wait()
