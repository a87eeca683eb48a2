"""
Run a command, and tell what it took: ``python -I -S launch.py COMMAND ARGUMENTS...``.

Prints when it started and when it had ended (``time.monotonic()``), the seconds of CPU, the peak of its memory in
octets, and its exit status; what it says itself goes to stderr.

A process of its own because it has to be small: Linux counts what a parent had in memory when it started a process into
the peak of that process.
"""

import os
import sys
import time


def main() -> None:
    started = time.monotonic()
    child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(child, 0)
    ended = time.monotonic()
    cpu = usage.ru_utime + usage.ru_stime
    print(started, ended, cpu, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status))


if __name__ == '__main__':
    main()
