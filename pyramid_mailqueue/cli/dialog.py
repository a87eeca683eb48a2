"""The dialog with a mail server: printed as it happens, and evaluated for advice if it fails."""

from __future__ import annotations

import logging
import re
import socket
import ssl
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from pyramid_mailqueue.cli.common import silence_stdout
from pyramid_mailqueue.display import printable
from pyramid_mailqueue.exceptions import ServerTrouble

__all__ = ['STEP_SECONDS', 'Dialog', 'advice', 'is_final', 'say', 'shown_dialog']

_LINE = re.compile(r'\S+ ([CS]): (\S+)(.*)', re.DOTALL)
_BAD = re.compile('[45][0-9][0-9]')

#: How long each step may take, at most, in seconds: the command is interactive.
STEP_SECONDS = 30

#: After so many seconds without a line from the server, what is awaited is printed.
QUIET_SECONDS = 2

_CONNECT, _GREETING, _CONTENT = 'connect', 'greeting', 'content'

#: What is awaited where it is not the reply to a command.
_AWAITED = {
    _CONNECT: 'a connection, and the greeting of the server',
    _CONTENT: 'the reply to the message',
}

_DNS = ('Is the name right, and does this machine know it?  getent hosts {host}',)
_TLS = (
    'Does TLS work without us?  openssl s_client -connect {host}:{port}{starttls} -verify_return_error',
    'Do smtp_port and smtp_tls fit together?  465 goes with implicit, 587 and 25 with starttls.',
)
_AUTH = ('Are mailqueue.smtp_username and smtp_password right?  Many providers require an app password.',)

# What to check, by the step at which the dialog ended.
_ADVICE = {
    _CONNECT: (
        *_DNS,
        'Is a server listening there?  nc -vz {host} {port}',
        'Is there a firewall in between?  Many providers let nothing out to port 25; 587 is for programs that log in.',
    ),
    _GREETING: (
        'Does the server know this machine?  It may take mail from some addresses only, or have a block list.',
    ),
    'EHLO': (
        'Does the server offer what is required, STARTTLS and AUTH?  If not, it may be the wrong port, or smtp_tls.',
        'Does it reject the host name sent in EHLO?  It is set by mailqueue.smtp_local_hostname.',
    ),
    'STARTTLS': _TLS,
    'AUTH': _AUTH,
    'MAIL': (
        'May the sender <{sender}> send here?  Try another one with --from, such as one of your own domain.',
        'Does the server want a login?  Then set mailqueue.smtp_username and smtp_password.',
    ),
    'RCPT': (
        'Does <{recipient}> exist?  Try an address in the domain of the server itself.',
        'If the server says "relay": it does not pass on mail for this machine.  It may want a login (smtp_username).',
    ),
    _CONTENT: ('Is it the content, for a spam filter?  Or a full disk there?  The log of the server says more.',),
}


class Dialog(logging.Handler):
    """
    Prints the dialog, and remembers how far it came.

    :ivar step: the step at which it ended: ``connect``, ``greeting``, a command such as ``RCPT``, or ``content``
    """

    def __init__(self) -> None:
        super().__init__()
        self._last = _CONNECT
        self._awaited: deque[str] = deque()
        self._refused = ''
        self._news = threading.Event()
        self._is_over = False

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging.  Raises nothing that could be taken for trouble with the server."""
        self._news.set()
        line = record.getMessage()
        match = _LINE.fullmatch(line)
        if match:
            self._note(match[1], match[2])
            line = f'{match[1]}: {match[2]}{match[3]}'.rstrip()
        say(f'  {line}')

    def _note(self, side: str, word: str) -> None:
        if side == 'C':
            self._last = _step_of(word)
            self._awaited.append(self._last)
            return
        if self._last == _CONNECT:
            self._last = _GREETING
        # Commands are sent in groups: a reply belongs to the first one without one.  (Each line of the reply to EHLO is
        # a line here, but nothing else is sent before the last of them.)
        step = self._awaited.popleft() if self._awaited else self._last
        if _BAD.match(word) and not self._refused:
            self._refused = step

    @property
    def step(self) -> str:
        """See the class."""
        return self._refused or (self._awaited[0] if self._awaited else self._last)

    def tell_silences(self) -> None:
        """Print what is awaited whenever the server is silent for a while; return after :meth:`end`."""
        while not self._is_over:
            if not self._news.wait(QUIET_SECONDS):
                say(f'  ... waiting for {self._awaited_now} (at most {STEP_SECONDS} seconds for each step)')
                self._news.wait()
            self._news.clear()

    @property
    def _awaited_now(self) -> str:
        step = self._awaited[0] if self._awaited else self._last
        if self._last == 'STARTTLS' and not self._awaited:
            return 'the server to begin with TLS'
        return _AWAITED.get(step, f'the reply to {step}')

    def end(self) -> None:
        """Note that the dialog is over."""
        self._is_over = True
        self._news.set()


def _step_of(word: str) -> str:
    """Return the step that begins with the command *word*, or with its stand-in in the log."""
    if word == 'DATA' or word.startswith('<'):
        return _CONTENT
    if word.startswith('['):
        return 'AUTH'
    return 'EHLO' if word == 'HELO' else word


def say(line: str) -> None:
    """Print a line at once.  If that fails, the command goes on without output."""
    try:
        print(printable(line), flush=True)
    except OSError:
        silence_stdout()


@contextmanager
def shown_dialog() -> Iterator[Dialog]:
    """Print the dialog with a server during the ``with`` block, and keep it from the handlers of parent loggers."""
    logger, dialog = logging.getLogger('mailqueue.smtp'), Dialog()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(dialog)
    teller = threading.Thread(target=dialog.tell_silences, name='mq-send-test', daemon=True)
    teller.start()
    try:
        yield dialog
    finally:
        dialog.end()
        teller.join()
        logger.removeHandler(dialog)
        logger.propagate = propagate
        logger.setLevel(level)


def advice(step: str, trouble: ServerTrouble | None, **words: str) -> list[str]:
    """
    Return what to check.

    :param step: the step at which the dialog ended
    :param trouble: why it broke off, if it did
    :param words: ``host``, ``port``, ``starttls`` (an option of openssl), ``sender`` and ``recipient``
    """
    cause = trouble.__cause__ if trouble else None
    if isinstance(cause, ssl.SSLError):
        lines: tuple[str, ...] = _TLS
    elif isinstance(cause, (socket.gaierror, UnicodeError)):
        lines = _DNS
    else:
        lines = _ADVICE.get(step, ())
    if step == _CONNECT and isinstance(cause, TimeoutError):
        # The server may be waiting for the client to begin with TLS.
        lines = (*lines, _TLS[-1])
    return [line.format_map(words) for line in lines]


def is_final(step: str, trouble: ServerTrouble) -> bool:
    """Whether another attempt is useless before the server or the settings have changed."""
    if trouble.code is not None:
        return trouble.code >= 500
    cause = trouble.__cause__
    if isinstance(cause, socket.gaierror):
        return cause.errno != socket.EAI_AGAIN
    if isinstance(cause, ssl.SSLError):
        return not isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
    # Without a cause, and after EHLO: the server does not offer what the settings require.
    return isinstance(cause, UnicodeError) or (cause is None and step == 'EHLO')
