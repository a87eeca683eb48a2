"""Programs that have little memory."""

from __future__ import annotations

import resource
import subprocess
import sys

__all__ = ['run_with_memory']


def run_with_memory(octets, code, *arguments):
    """Run a program in a process of its own, whose memory has so many octets; return what it prints."""
    ended = subprocess.run(
        [sys.executable, '-c', code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (octets, octets)),
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
