"""The demo for tests: with ports that are free, in a folder of the test, and as a process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INI = ROOT / 'demo' / 'development.ini'
DEADLINE = 30  # seconds; only a failing test waits that long


def until(condition, what):
    """Return the first true value of *condition*, or fail."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f'waited in vain: {what}')


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(('127.0.0.1', 0))) for _ in range(count)]
        return [bound.getsockname()[1] for bound in sockets]


def write_ini(folder, ports):
    """The demo's own ini file, moved to where %(here)s is a temporary directory."""
    text = INI.read_text()
    text, http = re.subn(r'(?m)^listen = 127\.0\.0\.1:6543$', f'listen = 127.0.0.1:{ports["http"]}', text)
    text, smtp = re.subn(r'(?m)^mailqueue\.smtp_port = 6525$', f'mailqueue.smtp_port = {ports["smtp"]}', text)
    assert (http, smtp) == (1, 1)
    path = folder / 'development.ini'
    path.write_text(text)
    return path


@contextlib.contextmanager
def running(*command):
    """A command of the demo, and a function that waits for what it says; ended by force if need be."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = []
    reader = threading.Thread(target=lambda: [output.append(line) for line in process.stdout])
    reader.start()

    def said(pattern):
        until(lambda: re.search(pattern, ''.join(output)) or not reader.is_alive(), f'{pattern} in {output}')
        return re.search(pattern, ''.join(output)) or pytest.fail(f'no {pattern} in {output}')

    try:
        yield process, said
    finally:
        process.kill()
        process.wait(DEADLINE)
        reader.join(DEADLINE)
        process.stdout.close()


def end(process):
    process.send_signal(signal.SIGINT)
    return process.wait(DEADLINE)
