"""A real SMTP server on a real socket that says what a test wants it to say, when the test wants it."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import final

__all__ = [
    'EXTENSIONS',
    'Answer',
    'Close',
    'Drip',
    'ReceivedMessage',
    'ScriptedSMTPServer',
    'ServerSession',
    'Silence',
    'Wait',
]


@dataclass(frozen=True)
class Close:
    """Say *reply* and close the connection; without one, break it off in the middle of whatever comes in."""

    reply: str = ''


@dataclass(frozen=True)
class Silence:
    """Say nothing more, until the client gives up or the server is closed."""


@dataclass(frozen=True)
class Drip:
    """Say *reply* byte by byte, *pause* seconds apart."""

    reply: str
    pause: float = 0.01


Said = str | Close | Silence | Drip


@dataclass(frozen=True)
class Wait:
    """Wait until the test sets *event*, then go on with *answer*; None is what a server should say."""

    event: threading.Event
    answer: Said | None = None


Choice = Said | Wait | None
#: What a script may say at a step.
Answer = Choice | Sequence[Choice] | Callable[[str], Choice]

EXTENSIONS = ('PIPELINING', 'SIZE 0', '8BITMIME', 'SMTPUTF8', 'ENHANCEDSTATUSCODES')


@dataclass(frozen=True)
class ReceivedMessage:
    """
    A message that a server accepted.

    :param sender: what stood between the angle brackets of MAIL
    :param recipients: those that were accepted
    :param content: without the dots that SMTP adds
    :param parameters: what stood behind the sender, e.g. ``('SIZE=1000',)``
    """

    sender: str
    recipients: tuple[str, ...]
    content: bytes
    parameters: tuple[str, ...] = ()


@dataclass
class ServerSession:
    """
    One connection, as the server saw it.

    :ivar reads: the bytes as they came, decrypted: an item for each time the server looked
    :ivar commands: the lines that were not content
    :ivar round_trips: how often the server had answered everything and heard more after that
    :ivar is_encrypted: TLS is on
    :ivar is_over: the connection is closed
    """

    reads: list[bytes] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    round_trips: int = 0
    is_encrypted: bool = False
    is_over: bool = False

    @property
    def received(self) -> bytes:
        """All bytes that came, decrypted."""
        return b''.join(self.reads)


@final
class ScriptedSMTPServer:
    r"""
    An SMTP server for tests; a context manager that serves while it is entered.

    ::

        with ScriptedSMTPServer({'RCPT TO:<b@x.example>': '550 5.1.1 no such user'}) as server:
            ...  # send mail to server.host and server.port
        assert [message.recipients for message in server.messages] == [('a@x.example',)]

    *script* maps a step to what is answered there.  A step is a whole command (``'RCPT TO:<b@x.example>'``), the verb
    of one (``'EHLO'``, ``'MAIL'``, ``'AUTH'`` ...), or one of ``'connect'`` (the greeting), ``'content'`` (the first
    bytes of the content have come) and ``'.'`` (the content is complete).  A whole command goes before its verb.  An
    answer is

    - a str: said as it is, with CRLF at its end and for each ``\n``; it may hold several replies;
    - :class:`Close`, :class:`Silence`, :class:`Drip` or :class:`Wait`;
    - None: what a server should say, which is also the default for each step;
    - a sequence of these: one for each time, counted over all connections; the default when it has run out;
    - a callable that is given the command and returns one of these.

    :param by_session: scripts for single connections, by their number from 0 on; a step that is in one of them is
        answered by nothing else there
    :param extensions: the lines of the reply to EHLO; STARTTLS is added where it can be done
    :param tls: the context for STARTTLS, or for *implicit_tls*
    :param implicit_tls: TLS begins with the first byte, and there is no STARTTLS
    :param socket_buffer: the size of the socket's buffers in bytes: small ones are soon full
    :ivar sessions: a :class:`ServerSession` for each connection, in their order
    :ivar messages: a :class:`ReceivedMessage` for each message that was accepted
    """

    host = '127.0.0.1'

    def __init__(
        self,
        script: Mapping[str, Answer] | None = None,
        *,
        by_session: Mapping[int, Mapping[str, Answer]] | None = None,
        extensions: Sequence[str] = EXTENSIONS,
        tls: ssl.SSLContext | None = None,
        implicit_tls: bool = False,
        socket_buffer: int | None = None,
    ) -> None:
        self.script: dict[str, Answer] = dict(script or {})
        self.by_session: dict[int, Mapping[str, Answer]] = dict(by_session or {})
        self.sessions: list[ServerSession] = []
        self.messages: list[ReceivedMessage] = []
        self.extensions = tuple(extensions)
        self.tls = tls
        self.implicit_tls = implicit_tls
        self._socket_buffer = socket_buffer
        self._times: Counter[tuple[int | None, str]] = Counter()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._conversations: list[_Conversation] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket()
        #: Chosen by the system when the server is entered.
        self.port = 0

    def __enter__(self) -> ScriptedSMTPServer:
        if self._socket_buffer:
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                self._listener.setsockopt(socket.SOL_SOCKET, option, self._socket_buffer)
        self._listener.bind((self.host, 0))
        self._listener.listen()
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all connections and stop serving; what was recorded stays."""
        if self._closing.is_set():
            return
        self._closing.set()
        # Not every system wakes accept() when its socket is closed; all do for a connection.
        socket.create_connection((self.host, self.port)).close()
        self._threads[0].join()
        self._listener.close()
        for conversation in self._conversations:
            conversation.shut_down()
        for thread in self._threads:
            thread.join()

    def hang_up(self) -> None:
        """Close all connections and go on serving, as if restarted."""
        for conversation in list(self._conversations):
            conversation.shut_down()
        self.wait_for(lambda: all(session.is_over for session in self.sessions))

    def wait_for(self, condition: Callable[[], bool], timeout: float = 10) -> None:
        """Return when *condition* holds, which is checked after each event; fail after *timeout* seconds."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                raise AssertionError(f'not so within {timeout} seconds; the sessions were {self.sessions}')

    # --- for the conversations ---

    def choose(self, session: int, step: str, command: str, default: Said) -> Said:
        """Return what the script says at this step of a session, when it is time to say it."""
        chosen = self._scripted(session, step, command)
        if isinstance(chosen, Wait):
            while not (chosen.event.wait(0.02) or self._closing.is_set()):
                pass
            chosen = chosen.answer
        return default if chosen is None else chosen

    def _scripted(self, session: int, step: str, command: str) -> Choice:
        own = self.by_session.get(session, {})
        number, script = (session, own) if {command, step} & own.keys() else (None, self.script)
        key = command if command in script else step
        answer = script.get(key)
        if callable(answer):
            return answer(command)
        if answer is None or isinstance(answer, (str, Close, Silence, Drip, Wait)):
            return answer
        with self._changed:
            index = self._times[number, key]
            self._times[number, key] += 1
        return answer[index] if index < len(answer) else None

    def pause(self, seconds: float) -> None:
        """Wait, but not beyond the end of the server."""
        self._closing.wait(seconds)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Change what is recorded, and wake the threads in :meth:`wait_for`."""
        with self._changed:
            yield
            self._changed.notify_all()

    # --- connections ---

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            if self._closing.is_set():
                sock.close()
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conversation = _Conversation(self, sock, len(self._conversations))
            self._conversations.append(conversation)
            with self.recording():
                self.sessions.append(conversation.session)
            self._start(conversation.run)


class _Over(Exception):
    """The conversation is over."""


class _Conversation:
    """The server's side of one connection."""

    def __init__(self, server: ScriptedSMTPServer, sock: socket.socket, number: int) -> None:
        self.session = ServerSession()
        self._server = server
        self._number = number
        self._sock = sock
        self._buffer = bytearray()
        self._has_spoken = False
        self._mail: tuple[str, tuple[str, ...]] | None = None
        self._recipients: list[str] = []

    def run(self) -> None:
        # However it ends, what was said before is recorded.
        with suppress(OSError, _Over):
            self._converse()
        self.shut_down()
        self._sock.close()
        with self._server.recording():
            self.session.is_over = True

    def shut_down(self) -> None:
        """End the connection; wakes the thread that waits for the client.  Not the method of SSLSocket: it is lazy."""
        with suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def _converse(self) -> None:
        if self._server.implicit_tls:
            self._encrypt()
        self._utter(self._choose('connect', '', '220 scripted.test ESMTP'))
        while True:
            self._obey(self._read_line())

    def _obey(self, command: str) -> None:
        verb = command.partition(' ')[0].upper()
        said = self._choose(verb, command, self._default(verb))
        code = _code(said)
        self._note(verb, command, code)
        self._utter(said)
        if verb == 'AUTH':
            self._hear_secrets(code)
        elif verb == 'STARTTLS' and code == 220 and self._server.tls:
            self._encrypt()
        elif verb == 'DATA' and code == 354:
            self._read_content()
        elif verb == 'QUIT':
            raise _Over

    def _choose(self, step: str, command: str, default: Said) -> Said:
        return self._server.choose(self._number, step, command, default)

    def _default(self, verb: str) -> str:
        if verb == 'EHLO':
            return self._greeting()
        if verb in ('MAIL', 'RCPT', 'DATA') and (verb == 'MAIL') == (self._mail is not None):
            return '503 5.5.1 bad sequence of commands'
        if verb == 'DATA' and not self._recipients:
            return '554 5.5.1 no valid recipients'
        if verb == 'STARTTLS' and not self._can_encrypt:
            return '502 5.5.1 no TLS here'
        return _DEFAULTS.get(verb, '500 5.5.2 unknown command')

    def _greeting(self) -> str:
        lines = ['scripted.test', *self._server.extensions, *(['STARTTLS'] if self._can_encrypt else [])]
        return '\n'.join(f'250{" " if line is lines[-1] else "-"}{line}' for line in lines)

    @property
    def _can_encrypt(self) -> bool:
        return self._server.tls is not None and not self.session.is_encrypted

    def _note(self, verb: str, command: str, code: int) -> None:
        """Change the state, before the client can know."""
        if verb in ('EHLO', 'HELO', 'RSET'):
            self._mail, self._recipients = None, []
        elif verb == 'MAIL' and code == 250:
            self._mail = _path(command), tuple(command.partition('> ')[2].split())
        elif verb == 'RCPT' and code // 100 == 2:
            self._recipients.append(_path(command))

    def _hear_secrets(self, code: int) -> None:
        while code == 334:
            said = self._choose('AUTH', self._read_line(), _DEFAULTS['AUTH'])
            code = _code(said)
            self._utter(said)

    def _encrypt(self) -> None:
        assert self._server.tls is not None
        self._sock = self._server.tls.wrap_socket(self._sock, server_side=True)
        self._buffer.clear()
        with self._server.recording():
            self.session.is_encrypted = True

    # --- saying ---

    def _utter(self, said: Said) -> None:
        if isinstance(said, Silence):
            self._hear_out()
        elif isinstance(said, Close):
            if not said.reply:
                raise _Over
            self._say(said.reply)
            # With unread bytes a closed connection is reset, and the client may never see the reply.
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
            self._hear_out()
        elif isinstance(said, Drip):
            for byte in f'{said.reply}\n':
                self._say_raw(byte)
                self._server.pause(said.pause)
        else:
            self._say(said)

    def _say(self, reply: str) -> None:
        if reply:
            self._say_raw(f'{reply}\n')

    def _say_raw(self, text: str) -> None:
        self._has_spoken = True
        self._sock.sendall(text.replace('\n', '\r\n').encode('utf-8', 'surrogateescape'))

    def _hear_out(self) -> None:
        while self._sock.recv(65536):
            pass
        raise _Over

    # --- hearing ---

    def _fill(self) -> None:
        data = self._sock.recv(65536)
        if not data:
            raise _Over
        self._buffer += data
        with self._server.recording():
            self.session.reads.append(data)
            self.session.round_trips += self._has_spoken
        self._has_spoken = False

    def _read_line(self) -> str:
        while (end := self._buffer.find(b'\r\n')) < 0:
            self._fill()
        line = self._buffer[:end].decode('utf-8', 'surrogateescape')
        del self._buffer[: end + 2]
        with self._server.recording():
            self.session.commands.append(line)
        return line

    def _read_content(self) -> None:
        if not self._buffer:
            self._fill()
        self._utter(self._choose('content', '', ''))
        content = self._read_to_dot()
        said = self._choose('.', '.', '250 2.0.0 accepted')
        if self._mail and self._recipients and _code(said) // 100 == 2:
            sender, parameters = self._mail
            with self._server.recording():
                self._server.messages.append(ReceivedMessage(sender, tuple(self._recipients), content, parameters))
        self._mail, self._recipients = None, []
        self._utter(said)

    def _read_to_dot(self) -> bytes:
        # As if the line end of DATA stood before it, the first line is like any other.
        self._buffer[:0] = b'\r\n'
        searched = 0
        while (end := self._buffer.find(b'\r\n.\r\n', searched)) < 0:
            searched = max(0, len(self._buffer) - 4)
            self._fill()
        content = bytes(self._buffer[: end + 2])
        del self._buffer[: end + 5]
        return content.replace(b'\r\n.', b'\r\n')[2:]


_DEFAULTS: Mapping[str, str] = {
    'HELO': '250 scripted.test',
    'MAIL': '250 2.1.0 sender ok',
    'RCPT': '250 2.1.5 recipient ok',
    'DATA': '354 go ahead',
    'AUTH': '235 2.7.0 welcome',
    'STARTTLS': '220 2.0.0 go ahead',
    'RSET': '250 2.0.0 ok',
    'NOOP': '250 2.0.0 ok',
    'QUIT': '221 2.0.0 bye',
}


def _path(command: str) -> str:
    """What stands between the outermost angle brackets that are not part of a parameter."""
    match = re.search(r'<((?:"(?:[^"\\]|\\.)*"|[^">])*)>', command)
    return match[1] if match else ''


def _code(said: Said) -> int:
    """The code of what is said; of the first reply if there are several, 0 if there is none."""
    text = said if isinstance(said, str) else getattr(said, 'reply', '')
    first = re.match('[0-9]{3}', text)
    return int(first[0]) if first else 0
