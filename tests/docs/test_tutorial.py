"""The tutorial is what it says: its files are written, its commands are typed, and what it shows is what is seen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from tests.parts.demo import free_ports
from tests.parts.shown import COLUMNS, as_patterns, steps_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'docs/tutorial.rst'
TERMINALS = ('app', 'relay')
DEADLINE = 30  # seconds; only a test that fails waits that long

MODULES = {'mq-queue': 'cli.queue', 'mq-run': 'cli.start'}

# For a machine that has none.
CURL = """
import sys, urllib.error, urllib.request
*options, url = sys.argv[1:]
data = '&'.join(option for option in options if '=' in option)
try:
    answer = urllib.request.urlopen(f'http://{url}', data.encode())
except urllib.error.HTTPError as error:
    answer = error
print(answer.read().decode(), end='')
"""

# In place of a download: what an editable installation writes beside the package.
INSTALL = "import setuptools; setuptools.setup(script_args=['--quiet', 'egg_info'])"
REPLACED = {
    'python3 -m venv env': ('true',),
    '. env/bin/activate': ('true',),
    'pip install --quiet --editable .': (sys.executable, '-c', INSTALL),
}


class Terminal:
    """One in which a program runs, and goes on."""

    def __init__(self):
        self.process = None
        self._seen = ''
        self._shown = 0

    def start(self, command, **kwargs):
        self.stop()
        self._seen, self._shown = '', 0
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **kwargs
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self._seen += line

    def shows(self, text, replace):
        """Wait until it shows *text*, and not more than it has shown before."""
        end = time.monotonic() + DEADLINE
        while True:
            seen = replace(self._seen[self._shown :])
            if as_patterns(seen) == as_patterns(text):
                break
            is_hopeless = time.monotonic() > end or self.process.poll() is not None
            assert not is_hopeless, f'{seen}\n--- is not ---\n{text}'
            time.sleep(0.02)
        self._shown = len(self._seen)

    def stop(self):
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(DEADLINE)
            self.process.kill()
            self.process.wait()
            self._reader.join()
            self.process.stdout.close()
            self.process = None


class Desk:
    """Somebody who works through the page, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.terminals = {name: Terminal() for name in TERMINALS}
        self.status = 0
        smtp, http = free_ports(2)
        self._ports = {'8025': str(smtp), '6543': str(http)}
        bin_ = folder / 'bin'
        bin_.mkdir()
        commands = {
            name: f'import sys; from pyramid_mailqueue.{module} import main; main()' for name, module in MODULES.items()
        }
        if shutil.which('curl') is None:
            commands['curl'] = CURL
        for name, code in commands.items():
            (bin_ / name).write_text(f'#!{sys.executable}\n{code}\n')
            (bin_ / name).chmod(0o755)
        self._env = {
            **os.environ,
            'PATH': os.pathsep.join([str(bin_), str(Path(sys.executable).parent), os.environ['PATH']]),
            # The package of the page is found in its folder, which the commands run in.
            'PYTHONPATH': os.pathsep.join([str(ROOT), str(folder / 'tutorial')]),
            'PYTHONUNBUFFERED': '1',
            'PYTHONWARNINGS': 'ignore',
            'TERM': 'xterm',
            'COLUMNS': str(COLUMNS),
        }

    def _with_our_ports(self, text):
        for theirs, ours in self._ports.items():
            text = text.replace(theirs, ours)
        return text

    def _with_their_ports(self, text):
        for theirs, ours in self._ports.items():
            text = text.replace(ours, theirs)
        return text

    def follow(self, step):
        if step.kind == 'file':
            (self.folder / step.what).write_text(self._with_our_ports(step.text))
        elif step.what == '^C':
            self.terminals[step.terminal].stop()
        elif step.kind == 'output':
            self.terminals[step.terminal].shows(step.text, self._with_their_ports)
        elif step.terminal:
            terminal = self.terminals[step.terminal]
            terminal.start(self._command(step.what), cwd=self.folder, env=self._env)
            terminal.shows(step.text, self._with_their_ports)
            self._wait_for_port(step)
        else:
            self._type(step)

    def _command(self, typed):
        return REPLACED.get(typed) or ('sh', '-c', f'exec {self._with_our_ports(typed)}')

    def _wait_for_port(self, step):
        """What a person does who types no faster than a server starts."""
        port = self._ports['8025' if step.terminal == 'relay' else '6543']
        end = time.monotonic() + DEADLINE
        while True:
            with contextlib.suppress(OSError), contextlib.closing(_connect(port)):
                return
            assert time.monotonic() < end, f'{step.what} does not listen'
            time.sleep(0.05)

    def _type(self, step):
        if step.what.startswith('cd '):
            self.folder /= step.what.removeprefix('cd ')
            return
        if step.what == 'echo $?':
            assert str(self.status) == step.text.strip()
            return
        run = self._run_on_terminal if step.what.startswith('mq-queue') else self._run
        self.status, seen = run(self._command(step.what), cwd=self.folder, env=self._env)
        assert as_patterns(self._with_their_ports(seen)) == as_patterns(step.text)
        assert self.status in (0, 75)

    def _run(self, command, **kwargs):
        run = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE,
            check=False,
            **kwargs,
        )
        return run.returncode, run.stdout

    def _run_on_terminal(self, command, **kwargs):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 50, COLUMNS, 0, 0))
        with open(ours, 'rb', buffering=0) as screen:  # noqa: PTH123 - it has no path
            process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, **kwargs)
            os.close(theirs)
            seen = b''
            # Linux says EIO when the last writer has gone.
            with contextlib.suppress(OSError):
                while piece := screen.read(65536):
                    seen += piece
            return process.wait(DEADLINE), seen.decode()

    def leave(self):
        for terminal in self.terminals.values():
            terminal.stop()


def _connect(port):
    return socket.create_connection(('localhost', int(port)))


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.leave()


def test_what_the_tutorial_shows_is_what_one_sees(desk):
    for step in steps_of(PAGE, TERMINALS):
        desk.follow(step)
