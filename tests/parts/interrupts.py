"""Something that interrupts a thread at any moment: Ctrl-C, or the time limit of a server."""

from __future__ import annotations

import contextlib
import sys

__all__ = ['Interrupted', 'interrupting']


# The functions of the package, and of weak sets, that are called when an object is gone.
DESTRUCTORS = {'__del__', 'abandon', '_remove', 'remove'}


class Interrupted(BaseException):
    pass


@contextlib.contextmanager
def interrupting(number, package='pyramid_mailqueue'):
    """
    Raise :class:`Interrupted` in this thread at the so-manieth moment at which Python could do that.

    That is when a function of *package* begins or returns, or one that it has called; one in C when it returns.  The
    list that is given has the number when that has happened.
    """
    hit = []
    left = number

    def profile(frame, event, called):
        nonlocal left
        if event == 'c_call' or not _is_of(frame, package) or _is_end_of_with(event, called):
            return
        left -= 1
        if left <= 0 and not _is_in_destructor(frame):
            sys.setprofile(None)
            hit.append(number)
            raise Interrupted

    sys.setprofile(profile)
    try:
        yield hit
    finally:
        sys.setprofile(None)


def _is_end_of_with(event, called):
    """Since Python 3.14 they are seen.  Between a lock and its "with" block an interruption would leave it held."""
    return event == 'c_return' and called.__name__ in ('__enter__', '__exit__')


def _is_of(frame, package):
    """Whether it is in *package*, or is called from there."""
    return any(it is not None and it.f_globals.get('__name__', '').startswith(package) for it in (frame, frame.f_back))


def _is_in_destructor(frame):
    """There an error would only be printed."""
    while frame is not None:
        if frame.f_code.co_name in DESTRUCTORS:
            return True
        frame = frame.f_back
    return False
