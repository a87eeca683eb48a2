"""
The SMTP dialogue of one session: a stream of mail transactions, without a socket and without a clock.

Everything that affects the state of the dialogue lives here.  The owner of the connection does three things in a loop:
send what :meth:`Dialogue.data_to_send` holds and say so with :meth:`Dialogue.sent`; give what arrives to
:meth:`Dialogue.receive_data`; and if the connection breaks say that, with :meth:`Dialogue.connection_lost` or
:meth:`Dialogue.timed_out`.

Theory of operation
-------------------

A :class:`MailTransaction` is MAIL, one RCPT for each recipient, DATA, and the content up to the final dot (RFC 5321
section 3.3).  Transactions are submitted at any time and take their turn::

    submit --> waiting --> MAIL, RCPT ..., DATA --354--> content, final dot --reply--> done
                                 |                                       ^
                                 +-- refused: done; if the server took   from here on the next
                                     MAIL, RSET goes before the next     transaction may speak

Two things are remembered.  *Whose turn it is to speak*: a transaction that has said DATA holds the floor until its
final dot is said, or until it is over.  And *what was asked*: a queue with an entry for every command whose reply is
still to come, in the order of the commands, because that is the order of the replies.  A reply is matched to the head
of the queue and to nothing else, so that a refusal disturbs neither the transaction before nor the one after.

With PIPELINING (RFC 2920) a transaction says MAIL, all RCPT and DATA at once, and the next one begins in the same
write as the end of the content before it: one round trip for each message.  Without, a command is said only when no
reply is awaited.

Each entry also knows where in the stream of bytes its command ends.  A reply to a command that has not left yet is
unsolicited.  And when the connection breaks, that position tells whether the server can have the final dot: if so, the
outcome of the message is unknown, else nothing has happened to it.

Errors say whose fault it was.  :class:`~.exceptions.ServerTrouble` is the server's or the network's, and ends the
session.  :class:`~.exceptions.AddressError` and :class:`~.exceptions.NoRecipients` are the caller's; the session is as
it was.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import ClassVar, NamedTuple

from pyramid_mailqueue.exceptions import NoRecipients, ServerTrouble
from pyramid_mailqueue.message.addresses import check_address, needs_smtputf8
from pyramid_mailqueue.message.line_ends import normalize_line_ends
from pyramid_mailqueue.results import Reply
from pyramid_mailqueue.transports.smtp.replies import is_about_login, is_about_us

__all__ = ['Capabilities', 'Dialogue', 'MailTransaction', 'ReplyReader', 'printable']

# What is kept of a reply.  RFC 5321 section 4.5.3.1.5 gives a line 512 octets; servers that explain themselves at
# length take more.
MAX_REPLY_LINE = 4096
MAX_REPLY_LINES = 100

#: How many bytes are handed out at once, at least, if there are as many.
CHUNK = 64 * 1024

OUTCOME_UNKNOWN = Reply(
    451,
    'connection lost after the end of the data and before the reply: it may have been delivered',
    '4.4.2',
    from_server=False,
    outcome_unknown=True,
)

_REPLY_LINE = re.compile(rb'([2-5][0-9][0-9])(?:([ -])(.*?))?\r?', re.DOTALL)


class Capabilities(NamedTuple):
    """
    What a server offers in its reply to EHLO, as far as it concerns mail transactions.

    :param pipelining: RFC 2920
    :param size: the largest message in octets, 0 for no limit, None if SIZE is not offered (RFC 1870)
    :param eight_bit_mime: RFC 6152
    :param smtputf8: RFC 6531
    :param enhanced_status_codes: RFC 2034
    """

    pipelining: bool = False
    size: int | None = None
    eight_bit_mime: bool = False
    smtputf8: bool = False
    enhanced_status_codes: bool = False

    @classmethod
    def from_ehlo(cls, features: Mapping[str, str]) -> Capabilities:
        """Read :attr:`~.smtp.handshake.Handshake.esmtp_features`."""
        limit = re.match('[0-9]*', features.get('size', ''))
        return cls(
            pipelining='pipelining' in features,
            size=int((limit and limit[0]) or 0) if 'size' in features else None,
            eight_bit_mime='8bitmime' in features,
            smtputf8='smtputf8' in features,
            enhanced_status_codes='enhancedstatuscodes' in features,
        )


class ReplyReader:
    """
    Cuts what a server sends into replies (RFC 5321 section 4.2), and lets no server fill the memory.

    Overlong lines and replies are cut; the code, which each line begins with, holds all the same.  The owner of the
    connection gives up a reply without an end, at its deadline.

    :param server: the name of the server in errors
    """

    def __init__(self, server: str = 'the server') -> None:
        self._server = server
        # What has arrived: whole lines, and the beginning of the next one.
        self._arrived: deque[bytes] = deque()
        self._rest = b''
        # The reply whose lines are not all there yet.
        self._code = 0
        self._lines: list[bytes] = []

    @property
    def is_empty(self) -> bool:
        """Nothing has arrived beyond the replies that were handed out."""
        return not (self._arrived or self._rest or self._lines)

    def feed(self, data: bytes) -> None:
        """Add what has arrived."""
        *lines, rest = (self._rest + data).split(b'\n')
        self._arrived.extend([line[:MAX_REPLY_LINE] for line in lines])
        self._rest = rest[:MAX_REPLY_LINE]

    def next_reply(self) -> tuple[int, list[bytes]] | None:
        """
        Return the code and the texts of the next reply, None if it is not complete yet.

        Raises :class:`~.exceptions.ServerTrouble` for what is no reply.
        """
        while self._arrived:
            self._code, text, is_last = self._read(self._arrived.popleft())
            if len(self._lines) < MAX_REPLY_LINES:
                self._lines.append(text)
            if is_last:
                lines, self._lines = self._lines, []
                return self._code, lines
        if len(self._rest) == MAX_REPLY_LINE:
            # Whether this is going to be a reply does not depend on what is still to come.
            self._read(self._rest)
        return None

    def _read(self, line: bytes) -> tuple[int, bytes, bool]:
        parsed = _parsed_line(line)
        if parsed is None or (self._lines and parsed[0] != self._code):
            shown = printable(line.removesuffix(b'\r')[:100])
            raise ServerTrouble(
                f'{self._server} sent what is not an SMTP reply: {shown!r}. '
                'Check that mailqueue.smtp_hostname, smtp_port and smtp_tls fit a mail server.'
            )
        return parsed


# Servers say the same again and again.
@lru_cache(maxsize=64)
def _parsed_line(line: bytes) -> tuple[int, bytes, bool] | None:
    """Return the code and the text of a line of a reply, and whether it is the last one; None if it is none."""
    match = _REPLY_LINE.fullmatch(line)
    return match and (int(match[1]), match[3] or b'', match[2] != b'-')


def printable(text: bytes) -> str:
    """Return what a server said without controls: it ends up in logs, on terminals and in queue files."""
    decoded = text.decode('utf-8', 'replace')
    return decoded if decoded.isprintable() else ''.join(c if c.isprintable() else ' ' for c in decoded)


class MailTransaction:
    """
    One message on its way to some recipients, and what became of it.

    :ivar is_valid: asked right before the end of the content is composed; if it says no the session ends there
    :ivar is_ascii: no extension is needed for it
    :ivar replies: recipient to reply; a missing recipient has no outcome
    :ivar done: all replies have come; if the session ends before, *replies* holds what is known
    :ivar announced: MAIL is composed
    :ivar answered: the server has replied to at least one command of this transaction
    :ivar begun: the server has accepted the sender
    :ivar delivered: the server has accepted the content
    :ivar objection: a reply that ended it for all recipients, and may be about the session as well as about the message
    """

    def __init__(
        self, sender: str, recipients: Iterable[str], content: bytes, is_valid: Callable[[], bool] = lambda: True
    ) -> None:
        self.sender = sender
        self.recipients = tuple(dict.fromkeys(recipients))
        self.content = content
        self.is_valid = is_valid
        self.is_ascii = content.isascii() and sender.isascii() and all(map(str.isascii, self.recipients))
        self.replies: dict[str, Reply] = {}
        self.done = False
        self.announced = False
        self.answered = False
        self.begun = False
        self.delivered = False
        self.objection: Reply | None = None
        self._taken: list[str] = []
        self._too_many: dict[str, Reply] = {}
        self._about_us: dict[str, Reply] = {}

    @property
    def untried(self) -> tuple[str, ...]:
        """The recipients without an outcome: to be offered in a further transaction."""
        replies = self.replies
        return tuple([r for r in self.recipients if r not in replies]) if replies else self.recipients

    @property
    def has_recipients(self) -> bool:
        """The server took at least one recipient, so that the content can be sent."""
        return bool(self._taken)

    @property
    def refusal_of_us(self) -> Reply | None:
        """A reply to RCPT that is not about the recipient, if the server took none."""
        return None if self._taken else next(iter(self._about_us.values()), None)

    # What follows is called by the dialogue.

    def refuse(self, reply: Reply, recipients: Iterable[str] | None = None) -> None:
        """*reply* is the outcome for *recipients*, by default for all of those without one."""
        self.replies.update(dict.fromkeys(self.untried if recipients is None else recipients, reply))

    def answer_rcpt(self, recipient: str, reply: Reply) -> None:
        """Note the reply to one RCPT."""
        if reply.accepted:
            self._taken.append(recipient)
        elif is_about_us(reply):
            self._about_us[recipient] = reply
        elif _is_too_many_recipients(reply):
            self._too_many[recipient] = reply
        else:
            self.replies[recipient] = reply

    def answer_data(self, reply: Reply) -> None:
        """Note the reply to DATA or to the content: the outcome for the recipients that the server had taken."""
        self.refuse(reply, self._taken)

    def finish(self) -> None:
        """Note that no more replies will come."""
        # "Too many" without an accepted recipient is no reason to try again at once.
        if not self._taken:
            self.replies.update(self._too_many)
        for recipient, reply in self._about_us.items():
            # Others are taken, so this is no reason to end the session, and no reason to give the recipient up.
            self.replies[recipient] = Reply(
                451, f'refused for a reason on our side: {reply}', '4.7.0', from_server=False
            )
        if not self.delivered and self.objection is None:
            deferred = (reply for reply in self.replies.values() if reply.deferred and reply.from_server)
            self.objection = next(deferred, None)
        self.done = True


@lru_cache(maxsize=64)
def _reply(code: int, lines: tuple[bytes, ...]) -> Reply:
    return Reply.from_lines(code, map(printable, lines))


def _is_too_many_recipients(reply: Reply) -> bool:
    """
    RFC 5321 section 4.5.3.1.10: 452, or 552 from servers that follow RFC 821; X.5.3 where there is an enhanced code.

    Without an enhanced code the same numbers also say that a disk or a mailbox is full.  Trying again finds that out,
    because the reply counts if no recipient was accepted before it.
    """
    if reply.enhanced:
        return reply.enhanced in ('4.5.3', '5.5.3')
    return reply.code in (452, 552)


class _Step(Enum):
    """What was asked, and which replies answer it."""

    RSET = 'RSET', (2, 4, 5)
    MAIL = 'MAIL FROM', (2, 4, 5)
    RCPT = 'RCPT TO', (2, 4, 5)
    DATA = 'DATA', (3, 4, 5)
    DOT = 'the end of the data', (2, 4, 5)
    LONE_DOT = 'the end of no data', (2, 4, 5)

    # Each is one of a kind; the hash of an Enum is that of its name, and is computed in Python.
    __hash__ = object.__hash__

    def __init__(self, text: str, classes: tuple[int, ...]) -> None:
        self.text = text
        self.answers = frozenset(
            code for digit in classes for code in ((354,) if digit == 3 else range(100 * digit, 100 * digit + 100))
        )


@dataclass(slots=True)
class _Awaited:
    """An entry of the queue: a reply that is to come.  *end* is where its command ends in the stream of bytes."""

    step: _Step
    transaction: MailTransaction
    recipient: str = ''
    end: float = math.inf


class Dialogue:
    """
    See the module.

    :param capabilities: what the server offers
    :param server: the name of the server in errors, e.g. ``mail.example.org:587``
    :param trace: called with each line said (``C: ...``) and heard (``S: ...``), content excepted
    """

    def __init__(
        self, capabilities: Capabilities, server: str = 'the server', trace: Callable[[str], None] | None = None
    ) -> None:
        self.capabilities = capabilities
        self.trouble: ServerTrouble | None = None
        self.trace = trace
        self._server = server
        self._reader = ReplyReader(server)
        self._waiting: deque[MailTransaction] = deque()
        self._awaited: deque[_Awaited] = deque()
        # The transaction that holds the floor, what it still has to say, and its content once the server asks for it.
        self._speaker: MailTransaction | None = None
        self._commands: deque[tuple[_Step, str]] = deque()
        self._content: Iterator[bytes] | None = None
        # The server took a MAIL, and no final dot will end that: RSET has to go before the next one.
        self._needs_reset = False
        # The stream of bytes: how many were ever composed, how many of them have left, and those in between.
        self._composed = 0
        self._sent = 0
        self._chunk = memoryview(b'')

    # --- for the owner of the connection ---

    @property
    def is_idle(self) -> bool:
        """Between two transactions: nothing to say, nothing awaited, and the session can go on."""
        return not (self._awaited or self._speaker or self._waiting or self._chunk or self.trouble)

    @property
    def awaits_reply(self) -> bool:
        """Something was asked, and the server has not answered."""
        return bool(self._awaited)

    @property
    def awaits_end_of_data(self) -> bool:
        """The final dot has left and its reply has not come: the longest wait (RFC 5321 section 4.5.3.2.6)."""
        return bool(self._awaited) and self._awaited[0].step is _Step.DOT and self._awaited[0].end <= self._sent

    def submit(
        self, sender: str, recipients: Iterable[str], content: bytes, is_valid: Callable[[], bool] = lambda: True
    ) -> MailTransaction:
        """
        Let one message take its turn.

        :param sender: the reverse-path without angle brackets; ``''`` is the null sender
        :param recipients: addresses, at least one
        :param content: RFC 5322 bytes; line ends that are not CRLF become so
        :param is_valid: whether the message is still to be sent, asked right before the end of its content
        :raises AddressError: an address could break out of its command
        :raises NoRecipients: there is no recipient

        What the server cannot take, according to its offers, is refused here and never said.
        """
        if self.trouble:
            raise RuntimeError(f'This session has ended: {self.trouble}')
        # Envelopes are so already, and then this only counts.  But a bare CR or LF on the wire is a line end to some
        # servers and not to others, and between the two a second message can be smuggled.
        transaction = MailTransaction(sender, recipients, normalize_line_ends(content), is_valid)
        for address in (sender, *transaction.recipients) if sender else transaction.recipients:
            check_address(address)
        if not transaction.recipients:
            raise NoRecipients('This message has no recipients.')
        self._refuse_what_cannot_go(transaction)
        if transaction.untried:
            self._waiting.append(transaction)
        else:
            transaction.finish()
        return transaction

    def data_to_send(self) -> memoryview:
        """Return the bytes that may go now, the same until they are :meth:`sent`; none if it is the server's turn."""
        if not self._chunk:
            pieces, enough = [], self._composed + CHUNK
            while self._composed < enough and (piece := self._next_piece()):
                pieces.append(piece)
                self._composed += len(piece)
            self._chunk = memoryview(b''.join(pieces))
        return self._chunk

    def sent(self, count: int) -> None:
        """Note that the first *count* bytes of :meth:`data_to_send` are with the network now."""
        self._sent += count
        self._chunk = self._chunk[count:]

    def receive_data(self, data: bytes) -> int:
        """
        Take what has arrived, ``b''`` for the end of the stream; return the number of replies that are complete now.

        Raises :class:`~.exceptions.ServerTrouble` if the session is over.
        """
        if not data:
            raise self.connection_lost('closed the connection')
        count = 0
        try:
            self._reader.feed(data)
            while reply := self._reader.next_reply():
                self._take(*reply)
                count += 1
        except ServerTrouble as trouble:
            self._end(trouble, _may_be_delivered(trouble, '4.5.0'))
            raise
        return count

    def connection_lost(self, what: str) -> ServerTrouble:
        """Note that the connection broke, and return the trouble; *what* says how, behind the name of the server."""
        return self._end(ServerTrouble(f'{self._server} {what} {self._while()}.'))

    def timed_out(self, seconds: float) -> ServerTrouble:
        """Note that the owner has waited *seconds* in vain and gives the session up; return the trouble."""
        what = 'did nothing for' if self._reader.is_empty else 'did not complete its reply within'
        trouble = ServerTrouble(f'{self._server} {what} {seconds:g} seconds {self._while()}.')
        return self._end(trouble, _may_be_delivered(trouble, '4.4.2'))

    # --- what may be said now ---

    def _next_piece(self) -> bytes:
        if self._content is not None:
            return next(self._content)
        if self._awaited and not self.capabilities.pipelining:
            return b''
        if self._speaker is None and self._waiting:
            self._give_floor(self._waiting.popleft())
        if self._speaker is None or not self._commands:
            return b''
        return self._say(self._speaker, *self._commands.popleft())

    def _give_floor(self, transaction: MailTransaction) -> None:
        self._speaker = transaction
        if self._needs_reset:
            self._commands.append((_Step.RSET, ''))
            self._needs_reset = False
        self._commands.append((_Step.MAIL, ''))
        self._commands.extend((_Step.RCPT, recipient) for recipient in transaction.untried)
        self._commands.append((_Step.DATA, ''))

    def _say(self, transaction: MailTransaction, step: _Step, recipient: str) -> bytes:
        if step is _Step.MAIL:
            transaction.announced = True
            sender = transaction.sender and check_address(transaction.sender)
            line = f'MAIL FROM:<{sender}>{self._mail_parameters(transaction)}'
        elif step is _Step.RCPT:
            line = f'RCPT TO:<{check_address(recipient)}>'
        else:
            line = step.text
        if self.trace:
            self.trace(f'C: {line}')
        piece = f'{line}\r\n'.encode()
        self._awaited.append(_Awaited(step, transaction, recipient, self._composed + len(piece)))
        return piece

    def _mail_parameters(self, transaction: MailTransaction) -> str:
        offered, content = self.capabilities, transaction.content
        parameters = ''
        if offered.size is not None:
            parameters += f' SIZE={_size(content)}'
        if transaction.is_ascii:
            return parameters
        if offered.eight_bit_mime and not content.isascii():
            parameters += ' BODY=8BITMIME'
        if offered.smtputf8 and (
            _needs_smtputf8(transaction.sender, content) or any(map(needs_smtputf8, transaction.recipients))
        ):
            parameters += ' SMTPUTF8'
        return parameters

    def _content_of(self, awaited: _Awaited, content: bytes) -> Iterator[bytes]:
        if self.trace:
            self.trace(f'C: <{len(content)} bytes of data>')
        for start in range(0, len(content) - CHUNK, CHUNK):
            yield _dot_stuffed(content, start)
        if awaited.step is _Step.DOT and not awaited.transaction.is_valid():
            # A server drops what has no final dot, and nothing but the end of the session can take back a DATA.
            raise self._end(self._trouble('was left during a message that this process may no longer send.'))
        last = len(content) and (len(content) - 1) // CHUNK * CHUNK
        piece = _dot_stuffed(content, last) + (b'.\r\n' if _ends_well(content) else b'\r\n.\r\n')
        # From here on the next transaction may speak: RFC 2920 section 3.1 lets the end of the data begin a group.
        awaited.end = self._composed + len(piece)
        self._speaker = self._content = None
        yield piece

    def _refuse_what_cannot_go(self, transaction: MailTransaction) -> None:
        limit, size = self.capabilities.size, _size(transaction.content)
        if limit and size > limit:
            transaction.refuse(_own(552, '5.3.4', f'message of {size} bytes, and {self._server} takes {limit}'))
        if self.capabilities.smtputf8 or transaction.is_ascii:
            return
        why = f'needs SMTPUTF8, which {self._server} does not offer'
        if _needs_smtputf8(transaction.sender, b''):
            transaction.refuse(_own(553, '5.6.7', f'sender {why}'))
        if _needs_smtputf8('', transaction.content):
            transaction.refuse(_own(550, '5.6.7', f'header {why}'))
        transaction.refuse(_own(553, '5.6.7', f'recipient {why}'), filter(needs_smtputf8, transaction.untried))

    # --- what was heard ---

    def _take(self, code: int, lines: list[bytes]) -> None:
        reply = _reply(code, tuple(lines))
        if self.trace:
            self.trace(f'S: {reply}')
        awaited = self._awaited[0] if self._awaited else None
        if code == 421:
            # If it answers the final dot, that is an answer: this message was not accepted.
            self._awaited.clear()
            raise self._trouble(f'closed the session: {reply}.', code)
        if awaited is None or awaited.end > self._sent:
            raise self._unasked(awaited, reply)
        if code not in awaited.step.answers:
            raise self._trouble(f'sent an unexpected reply to {awaited.step.text}: {reply}.', code)
        self._awaited.popleft()
        awaited.transaction.answered |= awaited.step is not _Step.RSET
        self._ANSWERS[awaited.step](self, awaited, reply)

    def _unasked(self, awaited: _Awaited | None, reply: Reply) -> ServerTrouble:
        # A server that sees enough of a message to refuse it may not wait for the end.  Its "no" counts, or the
        # message would come back for ever; the rest of the session cannot be trusted.
        if awaited and awaited.step is _Step.DOT and (reply.deferred or reply.refused):
            awaited.transaction.answered = True
            self._raise_if_about_us(awaited.transaction, reply)
            awaited.transaction.answer_data(reply)
            return self._trouble(f'replied before the end of the data: {reply}.', reply.code)
        return self._trouble(f'sent an unsolicited reply: {reply}.', reply.code)

    def _on_reset(self, awaited: _Awaited, reply: Reply) -> None:
        if not reply.accepted:
            # RFC 5321 section 4.1.1.5 lets no server do so.  The last transaction stays open: there can be no other.
            raise self._trouble(f'refused RSET: {reply}.', reply.code)

    def _on_mail(self, awaited: _Awaited, reply: Reply) -> None:
        self._raise_if_about_us(awaited.transaction, reply)
        if reply.accepted:
            self._needs_reset = True
            awaited.transaction.begun = True
        else:
            # What was said already, RCPT and DATA, will be answered too: with "MAIL first".
            awaited.transaction.objection = reply
            awaited.transaction.refuse(reply)
            self._commands.clear()
        self._finish_if_hopeless(awaited.transaction)

    def _on_rcpt(self, awaited: _Awaited, reply: Reply) -> None:
        # After a refusal of MAIL that is the outcome of every recipient.
        if awaited.recipient not in awaited.transaction.replies:
            awaited.transaction.answer_rcpt(awaited.recipient, reply)
        self._finish_if_hopeless(awaited.transaction)

    def _on_data(self, awaited: _Awaited, reply: Reply) -> None:
        transaction = awaited.transaction
        if reply.code != 354:
            if transaction.has_recipients:
                # Else it is no more than "no recipients".
                self._raise_if_about_us(transaction, reply)
            transaction.answer_data(reply)
            self._finish_without_data(transaction)
            return
        self._needs_reset = False
        if transaction.has_recipients:
            self._begin_data(_Awaited(_Step.DOT, transaction), transaction.content)
        else:
            self._raise_if_about_us(transaction, transaction.refusal_of_us)
            # RFC 2920 section 3.1: no recipient was accepted, and the server wants a message all the same.
            self._begin_data(_Awaited(_Step.LONE_DOT, transaction), b'')

    def _on_dot(self, awaited: _Awaited, reply: Reply) -> None:
        self._raise_if_about_us(awaited.transaction, reply)
        awaited.transaction.delivered = reply.accepted
        awaited.transaction.answer_data(reply)
        awaited.transaction.finish()

    def _on_lone_dot(self, awaited: _Awaited, reply: Reply) -> None:
        awaited.transaction.finish()

    def _begin_data(self, awaited: _Awaited, content: bytes) -> None:
        self._awaited.append(awaited)
        self._content = self._content_of(awaited, content)

    def _finish_if_hopeless(self, transaction: MailTransaction) -> None:
        """Leave out DATA, if it is not said yet and can only fail."""
        nothing_but_data = not self._commands or self._commands[0][0] is _Step.DATA
        if not self._awaited and nothing_but_data and not transaction.has_recipients:
            self._finish_without_data(transaction)

    def _finish_without_data(self, transaction: MailTransaction) -> None:
        self._raise_if_about_us(transaction, transaction.refusal_of_us)
        self._speaker = None
        self._commands.clear()
        transaction.finish()

    def _raise_if_about_us(self, transaction: MailTransaction, reply: Reply | None) -> None:
        if reply is None or not is_about_us(reply):
            return
        transaction.objection = reply
        if is_about_login(reply):
            what = 'takes no mail without a login or without TLS', 'smtp_username, smtp_password and smtp_tls'
        else:
            what = 'takes no mail from us', 'smtp_local_hostname and smtp_username'
        raise self._trouble(f'{what[0]}: {reply}. Check mailqueue.{what[1]}.', reply.code)

    _ANSWERS: ClassVar[Mapping[_Step, Callable[[Dialogue, _Awaited, Reply], None]]] = {
        _Step.RSET: _on_reset,
        _Step.MAIL: _on_mail,
        _Step.RCPT: _on_rcpt,
        _Step.DATA: _on_data,
        _Step.DOT: _on_dot,
        _Step.LONE_DOT: _on_lone_dot,
    }

    # --- the end ---

    def _trouble(self, what: str, code: int | None = None) -> ServerTrouble:
        return ServerTrouble(f'{self._server} {what}', code=code)

    def _end(self, trouble: ServerTrouble, unknown: Reply = OUTCOME_UNKNOWN) -> ServerTrouble:
        if self.awaits_end_of_data:
            self._awaited[0].transaction.answer_data(unknown)
        self.trouble = trouble
        return trouble

    def _while(self) -> str:
        if not self._awaited:
            return 'between two messages'
        awaited = self._awaited[0]
        if awaited.end > self._sent:
            return f'while it was sent {"data" if awaited.step is _Step.DOT else awaited.step.text}'
        return f'before it answered {awaited.step.text}'


# --- content ---


def _size(content: bytes) -> int:
    """RFC 1870 section 5: with every CRLF, without the dots that SMTP adds."""
    return len(content) + (0 if _ends_well(content) else 2)


def _ends_well(content: bytes) -> bool:
    return not content or content.endswith(b'\r\n')


def _dot_stuffed(content: bytes, start: int) -> bytes:
    """Return a piece of *content* (with CRLF line ends) as it goes over the wire (RFC 5321 section 4.5.2)."""
    piece = content[start : start + CHUNK].replace(b'\n.', b'\n..')
    # The line may begin with the piece, where there is no line feed before it to be seen.
    return b'.' + piece if piece.startswith(b'.') and content[start - 1 : start] in (b'', b'\n') else piece


def _needs_smtputf8(sender: str, content: bytes) -> bool:
    """
    RFC 6531: needed for a local part that is not ASCII, or for a header in UTF-8 that is not ASCII.

    A header with other 8-bit bytes is in no encoding that SMTPUTF8 could announce.
    """
    if needs_smtputf8(sender):
        return True
    if content.isascii():
        return False
    end_of_header = content.find(b'\r\n\r\n')
    header = content[: end_of_header if end_of_header >= 0 else len(content)]
    try:
        return not header.decode().isascii()
    except UnicodeDecodeError:
        return False


def _may_be_delivered(trouble: ServerTrouble, enhanced: str) -> Reply:
    """The outcome where a server was heard, or waited for, after the final dot, and has not said what became of it."""
    return Reply(451, f'it may have been delivered: {trouble}', enhanced, from_server=False, outcome_unknown=True)


def _own(code: int, enhanced: str, text: str) -> Reply:
    return Reply(code, text, enhanced, from_server=False)
