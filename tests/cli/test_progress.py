"""What is seen of a run, on a real terminal with a process behind it, and nothing where there is none."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time

import pytest

from pyramid_mailqueue.cli import progress as module
from pyramid_mailqueue.cli.progress import open_progress

# Seconds; only a test that fails waits that long.
DEADLINE = 30

# The child does what it is told on stdin, line by line, while its progress is shown: as in life, but ten times as fast.
CHILD = """
import logging, sys, warnings
from pyramid_mailqueue.cli import progress as module
from pyramid_mailqueue.cli.common import exit_status_of
from pyramid_mailqueue.cli.progress import open_progress

for pause in ('_PATIENCE', '_BETWEEN_BARS', '_BETWEEN_LINES'):
    setattr(module, pause, getattr(module, pause) / 10)
{before}
try:
    with open_progress(sys.stderr, total={total}) as progress:
        for line in sys.stdin:
            exec(line)
except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
except ZeroDivisionError:
    print('failed', file=sys.stderr)

def work():
    print('summary')
    return 0

sys.exit(exit_status_of('mq-run', work))
"""
WITHOUT_RICH = 'sys.modules["rich"] = None'
IMPORTED = 'print("rich" in sys.modules, flush=True)'


class Screen:
    """As much of a terminal as a bar needs; it refuses what it does not know."""

    BEGUN = re.compile(r'\x1b(\[[?\d;]*)?')
    TOKENS = re.compile(r'\x1b\[(\??[\d;]*)([A-Za-z])|([\r\n])|([^\x1b\x00-\x1f]+)')

    def __init__(self, width):
        self.width = width
        self.lines = ['']
        self.row = self.column = 0
        self.cursor = True
        self.begun = ''

    def feed(self, text):
        text, self.begun = self.begun + text, ''
        position = 0
        while position < len(text):
            if self.BEGUN.fullmatch(text, position):
                # The kernel has passed on what the child had written at once in two pieces.
                self.begun = text[position:]
                return
            token = self.TOKENS.match(text, position)
            assert token, f'not understood: {text[position:]!r}'
            position = token.end()
            argument, command, control, plain = token.groups()
            if command:
                self.control(argument, command)
            elif control == '\r':
                self.column = 0
            elif control == '\n':
                self.down()
            else:
                self.write(plain)

    def control(self, argument, command):
        if (argument, command) in (('?25', 'h'), ('?25', 'l')):
            self.cursor = command == 'h'
        elif command == 'K':
            assert argument == '2'
            self.lines[self.row] = ''
        elif command == 'A':
            self.row = max(0, self.row - int(argument))
        else:
            assert command == 'm'

    def down(self):
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append('')

    def write(self, text):
        for character in text:
            if self.column == self.width:
                self.column = 0
                self.down()
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def text(self):
        return '\n'.join(line.rstrip() for line in self.lines).rstrip('\n')


class Terminal:
    """A child process whose stderr, or more, is a terminal."""

    def __init__(self, code, *, width, streams, env):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, width, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, '-c', code],
            stdin=subprocess.PIPE,
            stdout=slave if 'stdout' in streams else subprocess.PIPE,
            stderr=slave if 'stderr' in streams else subprocess.PIPE,
            text=True,
            env=env,
        )
        os.close(slave)
        self.screen = Screen(width or 80)
        self.decoder = codecs.getincrementaldecoder('utf-8')()
        self.raw = ''

    def tell(self, line):
        self.process.stdin.write(f'{line}\n')
        self.process.stdin.flush()

    def read(self):
        """Show what has come; False at the end."""
        assert select.select([self.master], [], [], DEADLINE)[0], f'nothing came any more; there is:\n{self.raw!r}'
        try:
            data = os.read(self.master, 65536)
        except OSError:
            # All who had the other end are gone.
            data = b''
        text = self.decoder.decode(data)
        self.raw += text
        self.screen.feed(text)
        return bool(data)

    def wait_for(self, text):
        end = time.monotonic() + DEADLINE
        while text not in self.screen.text():
            assert time.monotonic() < end, f'{text!r} did not come; there is:\n{self.screen.text()}'
            assert self.read(), f'the end came before {text!r}; there is:\n{self.screen.text()}'
        return self.screen.text()

    def end(self):
        """Let the child come to its end, and return what is left on the screen."""
        self.process.stdin.close()
        while self.read():
            pass
        self.process.wait(DEADLINE)
        return self.screen.text()

    def close(self):
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream:
                stream.close()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal():
    """Start a child on a terminal: ``terminal(total=40, before='code')``."""
    terminals = []

    def terminal(*, total=None, before='', width=120, streams=('stderr',), **env):
        clean = {name: value for name, value in os.environ.items() if name not in CHOICES}
        code = CHILD.format(total=total, before=textwrap.dedent(before))
        env = {**clean, 'TERM': 'xterm', 'PYTHONIOENCODING': 'utf-8', **env}
        terminals.append(Terminal(code, width=width, streams=streams, env=env))
        return terminals[-1]

    yield terminal
    for started in terminals:
        started.close()


# What people set to say how they like their terminals.
CHOICES = {'COLUMNS', 'LINES', 'NO_COLOR', 'FORCE_COLOR', 'TTY_COMPATIBLE', 'TTY_INTERACTIVE', 'COLORTERM', 'TERM'}


# --- a bar ------------------------------------------------------------------


def test_a_bar_shows_how_far_the_run_is(terminal):
    screen = terminal(total=4000)
    screen.tell('progress.update(1200, 1190, 8, 2)')

    bar = screen.wait_for('1200 of 4000')

    assert re.fullmatch(r'[━╺╸]+ 1200 of 4000, \d+/s, about \d+ s left; 1190 sent, 8 deferred, 2 refused', bar)
    assert not screen.screen.cursor


def test_the_bar_grows_in_its_place(terminal):
    screen = terminal(total=4000)
    for done in (1, 2000, 4000):
        screen.tell(f'progress.update({done}, {done}, 0, 0)')
        assert screen.wait_for(f' {done} of 4000,').count('\n') == 0


def test_nothing_of_the_bar_is_left_in_the_end(terminal):
    screen = terminal(total=4000)
    screen.tell('progress.update(1200, 1190, 8, 2)')
    screen.wait_for('1200')

    assert screen.end() == ''
    assert screen.screen.cursor
    assert screen.process.stdout.read() == 'summary\n'


def test_nothing_of_the_bar_is_left_after_an_error(terminal):
    screen = terminal(total=4000)
    screen.tell('progress.update(1200, 1190, 8, 2)')
    screen.wait_for('1200')
    screen.tell('1/0')

    assert screen.end() == 'failed'
    assert screen.screen.cursor


def test_nothing_of_the_bar_is_left_after_ctrl_c(terminal):
    screen = terminal(total=4000)
    screen.tell('progress.update(1200, 1190, 8, 2)')
    screen.wait_for('1200')
    screen.process.send_signal(signal.SIGINT)

    assert screen.wait_for('interrupted') == 'interrupted'
    screen.end()
    assert screen.screen.cursor
    assert screen.process.returncode == 0


@pytest.mark.parametrize('total', [None, 1000])
def test_if_nobody_knows_how_many_there_are_there_is_a_count_and_a_rate(terminal, total):
    screen = terminal(total=total)
    screen.tell('progress.update(1200, 1200, 0, 0)')

    bar = screen.wait_for('1200')

    assert re.fullmatch(r'\S+ +1200, \d+/s; 1200 sent, 0 deferred, 0 refused', bar)


def test_the_total_may_be_told_later(terminal):
    screen = terminal()
    screen.tell('progress.update(1200, 1200, 0, 0)')
    screen.wait_for('1200,')
    screen.tell('progress.total = 4000')

    screen.wait_for('1200 of 4000,')


@pytest.mark.parametrize('width', [1, 2, 9, 20, 50, 70, 80])
def test_the_bar_stays_on_one_line_of_a_narrow_terminal(terminal, width):
    screen = terminal(total=4000, width=width)
    for done in (1200, 2400):
        screen.tell(f'progress.update({done}, {done}, 0, 0)')
        bar = screen.wait_for(str(done)[:width])
        assert '\n' not in bar
        assert len(bar) <= width

    assert screen.end() == ''


def test_a_terminal_of_unknown_size_has_a_bar(terminal):
    screen = terminal(total=4000, width=0)
    screen.tell('progress.update(1200, 1200, 0, 0)')

    screen.wait_for('1200 of 4000')

    assert screen.end() == ''


def test_a_terminal_that_becomes_narrower_is_kept_to(terminal):
    screen = terminal(total=4000)
    screen.tell('progress.update(1200, 1200, 0, 0)')
    screen.wait_for('━ 1200')
    fcntl.ioctl(screen.master, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 30, 0, 0))
    screen.tell('progress.update(2400, 2400, 0, 0)')

    bar = screen.wait_for('2400')

    assert bar.startswith('2400 of 4000')
    assert len(bar) <= 30


def test_a_terminal_that_knows_nothing_but_ascii_has_a_bar(terminal):
    screen = terminal(total=4000, before=LOGGING, PYTHONIOENCODING='ascii')
    screen.tell('progress.update(1200, 1200, 0, 0)')
    screen.wait_for('1200')
    screen.tell('logging.warning("caf\\xe9")')
    screen.tell('progress.update(2400, 2400, 0, 0)')

    logged, bar = screen.wait_for('2400').splitlines()

    assert logged == r'WARNING caf\xe9'
    assert bar.startswith('---')


def test_colours_can_be_switched_off(terminal):
    def styles(**env):
        screen = terminal(total=4000, **env)
        screen.tell('progress.update(1200, 1200, 0, 0)')
        screen.wait_for('1200')
        return re.findall(r'\x1b\[[\d;]*m', screen.raw)

    assert styles()
    assert not styles(NO_COLOR='1')


# --- what is logged meanwhile -----------------------------------------------

LOGGING = """
    logging.basicConfig(format='%(levelname)s %(message)s')
    former = logging.root.handlers[0].stream
"""


def test_what_is_logged_appears_above_the_bar(terminal):
    screen = terminal(total=4000, before=LOGGING)
    screen.tell('progress.update(1200, 1200, 0, 0)')
    screen.wait_for('1200')
    for number in range(3):
        screen.tell(f'logging.warning("number %d [bold] 50%%", {number})')
    screen.tell('progress.update(2400, 2400, 0, 0)')

    *logged, bar = screen.wait_for('2400').splitlines()

    assert logged == [f'WARNING number {number} [bold] 50%' for number in range(3)]
    assert bar.startswith('━')
    assert screen.end().splitlines() == logged


def test_what_is_written_to_stderr_appears_above_the_bar(terminal):
    screen = terminal(total=4000)
    screen.tell('progress.update(1200, 1200, 0, 0)')
    screen.wait_for('1200')
    screen.tell('print("one\\ntwo", file=sys.stderr)')
    screen.tell('warnings.warn("three")')
    screen.tell('progress.update(2400, 2400, 0, 0)')

    *written, bar = screen.wait_for('2400').splitlines()

    # From Python 3.13 on a warning is followed by its line of the source, which this one has not.
    assert [line for line in written if line] == ['one', 'two', '<string>:1: UserWarning: three']
    assert bar.startswith('━')


def test_what_is_logged_to_stdout_on_the_same_terminal_appears_above_the_bar(terminal):
    screen = terminal(total=4000, streams=('stdout', 'stderr'), before='logging.basicConfig(stream=sys.stdout)')
    screen.tell('progress.update(1200, 1200, 0, 0)')
    screen.wait_for('1200')
    screen.tell('logging.warning("one")')
    screen.tell('progress.update(2400, 2400, 0, 0)')

    *logged, bar = screen.wait_for('2400').splitlines()

    assert logged == ['WARNING:root:one']
    assert bar.startswith('━')
    assert screen.end().splitlines() == [*logged, 'summary']


def test_what_is_logged_to_another_place_goes_there(terminal):
    screen = terminal(total=4000, before='logging.basicConfig(stream=sys.stdout)')
    screen.tell('progress.update(1200, 1200, 0, 0)')
    screen.wait_for('1200')
    screen.tell('logging.warning("one")')

    assert screen.end() == ''
    assert screen.process.stdout.read() == 'WARNING:root:one\nsummary\n'


def test_lines_that_threads_log_at_once_stay_whole(terminal):
    screen = terminal(total=4000, before=LOGGING)
    screen.tell('progress.update(1200, 1200, 0, 0)')
    screen.wait_for('1200')
    screen.tell('import threading')
    screen.tell('log = lambda name: [logging.warning("%s %d", name, n) for n in range(50)]')
    screen.tell('threads = [threading.Thread(target=log, args=(name,)) for name in "abcd"]')
    screen.tell('[thread.start() for thread in threads]')
    screen.tell('[thread.join() for thread in threads]')

    assert sorted(screen.end().splitlines()) == sorted(f'WARNING {name} {n}' for name in 'abcd' for n in range(50))


def test_the_handlers_have_their_streams_back_in_the_end(terminal):
    after = 'import atexit; atexit.register(lambda: print(former is logging.root.handlers[0].stream, flush=True))'
    screen = terminal(total=4000, before=LOGGING)
    screen.tell('progress.update(1200, 1200, 0, 0)')
    screen.wait_for('1200')
    screen.tell(after)

    screen.end()

    assert screen.process.stdout.read() == 'summary\nTrue\n'


# --- lines ------------------------------------------------------------------


@pytest.mark.parametrize(
    ('before', 'env'),
    [
        pytest.param(WITHOUT_RICH, {}, id='without rich'),
        pytest.param('', {'TERM': 'dumb'}, id='dumb'),
        pytest.param('', {'TERM': 'unknown'}, id='unknown'),
    ],
)
def test_without_a_bar_there_are_lines(terminal, before, env):
    screen = terminal(total=4000, before=before, **env)
    screen.tell('progress.update(1200, 1190, 8, 2)')
    screen.wait_for('\n')
    screen.tell('progress.update(2000, 1990, 8, 2)')
    screen.wait_for('2000 of')

    first, *_, last = screen.end().splitlines()

    assert re.fullmatch(r'mq-run: 1200 of 4000, \d+/s, about \d+ s left; 1190 sent, 8 deferred, 2 refused', first)
    assert last.startswith('mq-run: 2000 of 4000, ')
    assert '\x1b' not in screen.raw


def test_what_is_logged_stands_between_the_lines(terminal):
    screen = terminal(total=4000, before=f'{WITHOUT_RICH}\nlogging.basicConfig()')
    screen.tell('progress.update(1200, 1190, 8, 2)')
    screen.wait_for('1200')
    screen.tell('logging.warning("one")')

    lines = screen.end().splitlines()

    assert lines.count('WARNING:root:one') == 1
    assert {line[:13] for line in lines} == {'mq-run: 1200 ', 'WARNING:root:'}


# --- nothing ----------------------------------------------------------------


def test_without_a_terminal_nothing_is_shown_and_no_thread_started(terminal):
    screen = terminal(total=4000, streams=())
    screen.tell('progress.update(1200, 1200, 0, 0)')
    screen.tell('import threading; print(threading.active_count())')
    screen.tell(IMPORTED)

    out, err = screen.process.communicate(timeout=DEADLINE)

    assert (out, err) == ('1\nFalse\nsummary\n', '')


def test_a_stream_that_is_closed_shows_nothing(tmp_path):
    stream = (tmp_path / 'file').open('w')
    stream.close()

    with open_progress(stream, total=1) as progress:
        progress.update(1, 1, 0, 0)


def test_a_process_without_stderr_shows_nothing():
    with open_progress(None, total=1) as progress:
        progress.update(1, 1, 0, 0)


def test_a_process_without_stdout_has_a_bar(terminal):
    screen = terminal(total=4000, before=f'sys.stdout = None\n{textwrap.dedent(LOGGING)}')
    screen.tell('progress.update(1200, 1200, 0, 0)')

    screen.wait_for('1200 of 4000')

    assert screen.end() == ''


def test_a_run_that_has_nothing_to_do_shows_nothing_and_imports_nothing(terminal):
    screen = terminal(total=0)
    # Longer than it takes until a bar would appear.
    screen.tell('import time; time.sleep(0.7)')
    screen.tell(IMPORTED)

    assert screen.end() == ''
    assert screen.raw == ''
    assert screen.process.stdout.read() == 'False\nsummary\n'


def test_a_run_that_is_over_at_once_shows_nothing(terminal):
    screen = terminal(total=1, before='module._PATIENCE = 600')
    screen.tell('progress.update(1, 1, 0, 0)')

    assert screen.end() == ''
    assert screen.raw == ''


@pytest.mark.parametrize('term', ['xterm', 'dumb'])
def test_a_run_goes_on_when_its_terminal_goes_away(terminal, term):
    screen = terminal(total=4000, before=LOGGING, TERM=term)
    screen.tell('import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)')
    screen.tell('progress.update(1200, 1200, 0, 0)')
    screen.wait_for('1200')
    os.close(screen.master)
    screen.master = os.open(os.devnull, os.O_RDONLY)
    screen.tell('logging.warning("one")')
    # Longer than it takes until something is painted again.
    screen.tell('import time; time.sleep(0.5)')

    out, _ = screen.process.communicate(timeout=DEADLINE)

    assert out == 'summary\n'
    assert screen.process.returncode == 0


def test_a_run_that_is_interrupted_while_it_starts_to_paint_ends_as_it_should(monkeypatch):
    class Interrupted(threading.Thread):
        def start(self):
            raise KeyboardInterrupt

    class Tty:
        def isatty(self):
            return True

    monkeypatch.setattr(module.threading, 'Thread', Interrupted)

    with pytest.raises(KeyboardInterrupt), open_progress(Tty(), total=1):
        pytest.fail('it was interrupted')


# --- the numbers ------------------------------------------------------------


def test_the_rate_is_that_of_the_last_ten_seconds():
    rate = module._Rate(100)
    assert rate.per_second == 0

    for now, done, expected in (
        (102, 200, 100),  # 200 in 2 s
        (104, 400, 100),  # 400 in 4 s
        (110, 400, 40),  # 400 in 10 s
        (112, 500, 30),  # 300 since 102
        (122, 500, 0),  # none since 112
        (222, 600, 1),  # 100 since 122
    ):
        rate.add(now, done)
        assert rate.per_second == expected


@pytest.mark.parametrize(
    ('state', 'words'),
    [
        ((0, 0, 0, 0, 40, 0), '0 of 40, 0.0/s; 0 sent, 0 deferred, 0 refused'),
        ((10, 8, 1, 1, 40, 0.5), '10 of 40, 0.5/s, about 60 s left; 8 sent, 1 deferred, 1 refused'),
        ((10, 10, 0, 0, 1000, 0.5), '10 of 1000, 0.5/s, about 33 min left; 10 sent, 0 deferred, 0 refused'),
        ((10, 10, 0, 0, 10000, 0.5), '10 of 10000, 0.5/s, about 6 h left; 10 sent, 0 deferred, 0 refused'),
        ((4000, 4000, 0, 0, 4000, 310.4), '4000 of 4000, 310/s, about 0 s left; 4000 sent, 0 deferred, 0 refused'),
        ((4001, 4001, 0, 0, 4000, 310.4), '4001, 310/s; 4001 sent, 0 deferred, 0 refused'),
        ((4001, 4001, 0, 0, None, 310.4), '4001, 310/s; 4001 sent, 0 deferred, 0 refused'),
    ],
)
def test_a_person_is_told_what_is_known(state, words):
    assert module._State(*state).words == words
