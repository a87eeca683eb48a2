"""
The SMTP handshake: from the greeting to where mail can be sent, without a socket and without a clock.

Everything that is said before the first mail is decided here.  The owner of the connection does three things in a loop:
send what :meth:`Handshake.data_to_send` holds and say so with :meth:`Handshake.sent`; give what arrives to
:meth:`Handshake.receive_data`; and in :attr:`State.TLS` encrypt the connection, and say so with
:meth:`Handshake.tls_started`.  If the connection breaks it says that, with :meth:`Handshake.connection_lost` or
:meth:`Handshake.timed_out`.

Theory of operation
-------------------

One command is under way at a time, and its reply decides what comes next (:data:`TRANSITIONS`)::

    GREETING --220--> EHLO --250--> STARTTLS --220--> TLS --encrypted--> EHLO_OVER_TLS --250--> AUTH --235--> READY
                       |                                                                         ^
                       +--refused--> HELO --250--------------------------------------------------+

STARTTLS and AUTH are passed over where they are not needed.  Within AUTH the challenges of a mechanism (334) are
answered, and 504 leads to the next mechanism.

Where TLS has to come next, nothing but EHLO and STARTTLS is said in clear text.  What an attacker on the way adds to
a reply is more than was asked for, and ends the handshake; so nothing said in clear text can pass for a reply over TLS.
And what was offered in clear text is forgotten (RFC 3207 section 4.2).

Errors say whose fault it was.  :class:`~.exceptions.ServerTrouble` is the server's or the network's, and ends the
handshake.  RuntimeError is the owner's.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from enum import Enum
from typing import ClassVar, NamedTuple

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.transports.smtp.transaction import ReplyReader, printable

__all__ = ['MECHANISMS', 'TRANSITIONS', 'Handshake', 'LoginRefused', 'StartTLS', 'State', 'Transition', 'unreachable']

REDACTED = '[redacted]'

# RFC 5321 section 4.1.1.1; "AUTH=" is how it was written before RFC 2554, and some servers still do.
_EHLO_LINE = re.compile(r'(?:(AUTH)=|([0-9A-Z][0-9A-Z-]*))(.*)', re.IGNORECASE | re.ASCII)


class StartTLS(Enum):
    """Whether TLS begins in the midst of the connection (RFC 3207)."""

    NEVER = 'never'
    IF_OFFERED = 'if offered'
    REQUIRED = 'required'


class State(Enum):
    """What is awaited."""

    GREETING = 'the greeting'
    EHLO = 'the reply to EHLO'
    HELO = 'the reply to HELO'
    STARTTLS = 'the reply to STARTTLS'
    TLS = 'TLS, from the owner of the connection'
    EHLO_OVER_TLS = 'the reply to EHLO over TLS'
    AUTH = 'the reply to AUTH, or to the response to a challenge'
    READY = 'mail'


class Transition(NamedTuple):
    """
    How a state is left.

    :param code: the reply that leads on; None in :attr:`State.TLS`, where the owner does
    :param to: where it leads: to the first of these that is needed
    :param detour: where some other replies lead
    """

    code: int | None
    to: tuple[State, ...]
    detour: State | None = None


TRANSITIONS: Mapping[State, Transition] = {
    State.GREETING: Transition(220, (State.EHLO,)),
    State.EHLO: Transition(250, (State.STARTTLS, State.AUTH, State.READY), detour=State.HELO),
    State.HELO: Transition(250, (State.AUTH, State.READY)),
    State.STARTTLS: Transition(220, (State.TLS,)),
    State.TLS: Transition(None, (State.EHLO_OVER_TLS,)),
    State.EHLO_OVER_TLS: Transition(250, (State.AUTH, State.READY)),
    State.AUTH: Transition(235, (State.READY,), detour=State.AUTH),
}


class LoginRefused(ServerTrouble):
    """The password is wrong: no other address is tried, as too many attempts lock the account."""


# --- mechanisms ---

#: What is said of a mechanism (RFC 4422 section 3): the initial response, or None if the server speaks first; and then
#: the response to each challenge, which is sent in as the server wrote it.  Raises ValueError for an unfit challenge.
Exchange = Generator[bytes | None, bytes, None]


def _auth_plain(username: bytes, password: bytes) -> Exchange:
    """RFC 4616."""
    yield b'\0%s\0%s' % (username, password)


def _auth_login(username: bytes, password: bytes) -> Exchange:
    """draft-murchison-sasl-login; the challenges are prompts for people."""
    yield None
    yield username
    yield password


def _auth_cram_md5(username: bytes, password: bytes) -> Exchange:
    """RFC 2195."""
    challenge = base64.b64decode((yield None))
    yield b'%s %s' % (username, hmac.new(password, challenge, 'md5').hexdigest().encode())


#: The mechanisms of AUTH (RFC 4954), the one that is tried first at the top.
MECHANISMS: Mapping[str, Callable[[bytes, bytes], Exchange]] = {
    'PLAIN': _auth_plain,
    'LOGIN': _auth_login,
    'CRAM-MD5': _auth_cram_md5,
}


class _Login:
    """One login, with one mechanism after the other."""

    def __init__(self, username: str, password: str) -> None:
        self.username = username
        self._credentials = username.encode(), password.encode()
        self._secrets = {self._credentials[1]} - {b''}
        self._tried: set[str] = set()
        self._exchange: Exchange

    def begin(self, offered: Collection[str]) -> tuple[str, bytes | None] | None:
        """Return the next mechanism and its initial response, None if there is no further mechanism."""
        mechanism = next((name for name in MECHANISMS if name in offered and name not in self._tried), None)
        if mechanism is None:
            return None
        self._tried.add(mechanism)
        self._exchange = MECHANISMS[mechanism](*self._credentials)
        return mechanism, self._noted(next(self._exchange))

    def respond(self, challenge: bytes) -> bytes | None:
        """Return the response to a challenge, None if the mechanism has none.  Raises ValueError."""
        try:
            return self._noted(self._exchange.send(challenge))
        except StopIteration:
            return None

    def _noted(self, response: bytes | None) -> bytes | None:
        if response and response != self._credentials[0]:
            self._secrets.add(response)
        return response

    def redacted(self, said: bytes) -> str:
        """Return what a server said without secrets: some servers repeat what they do not understand."""
        # The longest first: a short password may stand in the base64 of a response by chance.
        for secret in sorted(self._secrets, key=len, reverse=True):
            for form in (base64.b64encode(secret), secret):
                said = said.replace(form, REDACTED.encode())
        return _one_line(said)


# --- the handshake ---


class Handshake:
    """
    See the module.

    :param server: the name of the server in errors, e.g. ``mail.example.org:587``
    :param local_hostname: the argument of EHLO; may be set until the greeting has come
    :param starttls: whether TLS has to begin on this connection
    :param credentials: username and password, to log in with
    :param trace: called with each line said (``C: ...``) and heard (``S: ...``), secrets excepted
    :ivar state: what is awaited; :attr:`State.READY` is the end
    :ivar esmtp_features: what the server offers: keyword, in lower case, to parameters
    """

    def __init__(
        self,
        server: str,
        local_hostname: str,
        *,
        starttls: StartTLS = StartTLS.NEVER,
        credentials: tuple[str, str] | None = None,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.state = State.GREETING
        self.esmtp_features: Mapping[str, str] = {}
        self._server = server
        self.local_hostname = local_hostname
        self._starttls = starttls
        self._has_credentials = credentials is not None
        self._login = _Login(*credentials or ('', ''))
        self._trace = trace
        self._reader = ReplyReader(server)
        self._unsent = b''
        # The reply that is awaited answers a secret, and may repeat it.
        self._answers_secret = False

    # --- for the owner of the connection ---

    @property
    def is_starting_tls(self) -> bool:
        """STARTTLS was said, and EHLO not accepted since."""
        return self.state in (State.STARTTLS, State.TLS, State.EHLO_OVER_TLS)

    def data_to_send(self) -> bytes:
        """Return the bytes that may go now, the same until they are :meth:`sent`; none if it is the server's turn."""
        return self._unsent

    def sent(self, count: int) -> None:
        """Note that the first *count* bytes of :meth:`data_to_send` are with the network now."""
        self._unsent = self._unsent[count:]

    def receive_data(self, data: bytes) -> bool:
        """
        Take what has arrived, ``b''`` for the end of the stream; return whether the reply is complete now.

        Raises :class:`~.exceptions.ServerTrouble` if no mail can be sent on this connection.
        """
        if not data:
            raise self.connection_lost(EOFError('it closed the connection'))
        if self._unsent or self.state in (State.TLS, State.READY):
            raise self._unasked()
        self._reader.feed(data)
        reply = self._next_reply()
        if reply is None:
            return False
        if not self._reader.is_empty:
            raise self._unasked()
        self._take(*reply)
        return True

    def tls_started(self) -> None:
        """Note that the connection is encrypted."""
        if self.state is not State.TLS:
            raise RuntimeError(f'TLS began, and this handshake waits for {self.state.value}')
        self.esmtp_features = {}
        self._go_on()

    def connection_lost(self, error: Exception) -> ServerTrouble:
        """Note that the connection broke, and return the trouble that it caused."""
        trouble = self._login_failed(str(error)) if self.state is State.AUTH else unreachable(self._server, error)
        trouble.__cause__ = error
        return trouble

    def timed_out(self, seconds: float) -> ServerTrouble:
        """Note that the owner has waited *seconds* in vain for a whole reply; return the trouble."""
        return self.connection_lost(TimeoutError(f'no reply within {round(seconds, 1):g} seconds'))

    # --- what was heard ---

    def _next_reply(self) -> tuple[int, list[bytes]] | None:
        try:
            return self._reader.next_reply()
        except ServerTrouble:
            if self.state is not State.AUTH:
                raise
            # That error shows what was heard, which may be the password.
            raise self._login_failed('it sent what is not an SMTP reply') from None

    def _take(self, code: int, lines: list[bytes]) -> None:
        self._trace_reply(code, lines)
        transition = TRANSITIONS[self.state]
        if code == transition.code:
            if self.state in (State.EHLO, State.EHLO_OVER_TLS):
                self.esmtp_features = _features(lines)
            self._go_on()
        elif self.state is State.AUTH and code == 334:
            self._respond(lines)
        elif transition.detour and self._may_take_detour(code):
            self._enter(transition.detour)
        else:
            raise self._refused(code, lines)

    def _trace_reply(self, code: int, lines: Iterable[bytes]) -> None:
        if self._trace:
            for line in lines:
                self._trace(f'S: {code} {REDACTED if self._answers_secret else self._shown([line])}')

    def _go_on(self) -> None:
        self._enter(next(filter(self._is_needed, TRANSITIONS[self.state].to)))

    def _is_needed(self, state: State) -> bool:
        if state is State.STARTTLS:
            is_offered = 'starttls' in self.esmtp_features
            return self._starttls is StartTLS.REQUIRED or (self._starttls is StartTLS.IF_OFFERED and is_offered)
        return state is not State.AUTH or self._has_credentials

    def _may_take_detour(self, code: int) -> bool:
        if self.state is State.EHLO:
            # Where TLS must come next nothing but EHLO is said in clear text.
            return code != 421 and self._starttls is not StartTLS.REQUIRED
        # RFC 4954 section 4: 504 is "mechanism unknown", in spite of the offer.
        return code == 504

    # --- what is said ---

    def _enter(self, state: State) -> None:
        self.state = state
        if say := self._ENTRIES.get(state):
            say(self)

    def _say(self, line: str, shown: str | None = None) -> None:
        """Compose a line; *shown* is what others may see of one with a secret."""
        self._answers_secret = shown is not None
        if self._trace:
            self._trace(f'C: {line if shown is None else shown}')
        self._unsent = f'{line}\r\n'.encode()

    def _say_ehlo(self) -> None:
        self._say(f'EHLO {self.local_hostname}')

    def _say_helo(self) -> None:
        self._say(f'HELO {self.local_hostname}')

    def _say_starttls(self) -> None:
        if 'starttls' not in self.esmtp_features:
            raise ServerTrouble(
                f'{self._server} does not offer STARTTLS, and mailqueue.smtp_tls = starttls requires it. If it should, '
                'the offer may have been removed on the way; nothing was sent.'
            )
        self._say('STARTTLS')

    def _say_auth(self) -> None:
        offered = self.esmtp_features.get('auth', '').upper().split()
        begun = self._login.begin(offered)
        if begun is None:
            *others, last = MECHANISMS
            raise self._login_failed(
                f'it offers {" ".join(offered) or "no AUTH"}, and we know {", ".join(others)} and {last}'
            )
        mechanism, initial = begun
        if initial is None:
            self._say(f'AUTH {mechanism}')
        else:
            # RFC 4954 section 4: "=" is an initial response of no bytes.
            self._say(f'AUTH {mechanism} {_base64(initial) or "="}', f'AUTH {mechanism} {REDACTED}')

    def _respond(self, lines: list[bytes]) -> None:
        try:
            response = self._login.respond(b'\n'.join(lines))
        except ValueError as error:
            raise self._login_failed(str(error)) from error
        if response is None:
            raise self._refused(334, lines)
        self._say(_base64(response), REDACTED)

    _ENTRIES: ClassVar[Mapping[State, Callable[[Handshake], None]]] = {
        State.EHLO: _say_ehlo,
        State.HELO: _say_helo,
        State.STARTTLS: _say_starttls,
        State.EHLO_OVER_TLS: _say_ehlo,
        State.AUTH: _say_auth,
    }

    # --- trouble ---

    def _refused(self, code: int, lines: Iterable[bytes]) -> ServerTrouble:
        said = f'{code} {self._shown(lines)}'
        if self.state is State.AUTH:
            return self._login_failed(said, code)
        what = 'offers STARTTLS and refuses it' if self.state is State.STARTTLS else 'takes no mail from us'
        return ServerTrouble(f'{self._server} {what}: {said}.', code=code)

    def _login_failed(self, why: str, code: int | None = None) -> ServerTrouble:
        kind = LoginRefused if code is not None and code >= 500 else ServerTrouble
        return kind(
            f'{self._server} rejected the login of {self._login.username!r}: {why}. '
            'Check mailqueue.smtp_username, smtp_password and smtp_tls.',
            code=code,
        )

    def _unasked(self) -> ServerTrouble:
        return ServerTrouble(f'{self._server} said more than it was asked for; that may have been added on the way.')

    def _shown(self, lines: Iterable[bytes]) -> str:
        said = b'\n'.join(lines)
        return self._login.redacted(said) if self.state is State.AUTH else _one_line(said)


def unreachable(server: str, why: object) -> ServerTrouble:
    """Return the trouble with a server that cannot be reached."""
    return ServerTrouble(
        f'Cannot reach {server}: {why}. Check mailqueue.smtp_hostname, smtp_port and smtp_tls, and that a mail server '
        'runs there.'
    )


def _features(lines: Iterable[bytes]) -> dict[str, str]:
    """Return what a reply to EHLO offers.  The first line is the name of the server; AUTH may stand in several."""
    features: dict[str, str] = {}
    for line in list(lines)[1:]:
        if match := _EHLO_LINE.match(printable(line)):
            keyword, parameters = (match[1] or match[2]).lower(), match[3].strip()
            before = features.get(keyword, '') if keyword == 'auth' else ''
            features[keyword] = f'{before} {parameters}'.strip()
    return features


def _base64(response: bytes) -> str:
    return base64.b64encode(response).decode()


def _one_line(said: bytes) -> str:
    """What a server said, in one line."""
    return ' '.join(printable(said).split())
