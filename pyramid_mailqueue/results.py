"""
What became of a message, recipient by recipient.

A :class:`Reply` is what a server said for one recipient.  A :class:`SendResult` collects the replies of one attempt.
A recipient without a reply was not tried and is still open: silence never counts as success.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal, NamedTuple

from pyramid_mailqueue.exceptions import QueueError, ServerTrouble

__all__ = ['DROPPED', 'Burial', 'Dropped', 'Offer', 'Recovery', 'Reply', 'SendResult', 'Settlement']

_ENHANCED_CODE = re.compile(r'([245])\.(\d{1,3})\.(\d{1,3})(?:[ \t]+|$)')


def _always() -> bool:
    return True


class Offer(NamedTuple):
    """
    What a transport is asked to send.

    :param sender: the reverse-path without angle brackets; ``''`` is the null sender
    :param recipients: addresses, at least one
    :param content: RFC 5322 bytes with CRLF line ends, not dot-stuffed
    :param is_valid: asked right before the end of the content goes out: whether the message is still to be sent by us.
        If not, the content must not be completed
    """

    sender: str
    recipients: tuple[str, ...]
    content: bytes
    is_valid: Callable[[], bool] = _always


@dataclass(frozen=True, slots=True)
class Reply:
    """
    An SMTP reply (RFC 5321 section 4.2), as it concerns one recipient.

    :param code: the three digits, 200 to 599
    :param text: what follows the code, lines joined by one space, without the enhanced code
    :param enhanced: the enhanced status code (RFC 3463) such as ``'5.1.1'``, if the server gave one that fits
    :param from_server: False if the reply is our own, e.g. for a connection that broke off
    :param outcome_unknown: deferred, and perhaps delivered: a message of a queue is not offered to another transport at
        once because of it
    """

    code: int
    text: str = ''
    enhanced: str | None = None
    from_server: bool = True
    outcome_unknown: bool = False

    @classmethod
    def from_lines(cls, code: int, lines: Iterable[str]) -> Reply:
        """Read the lines of a reply (without the code and its separator) as a server sent them."""
        texts: list[str] = []
        enhanced: str | None = None
        for line in lines:
            match = _ENHANCED_CODE.match(line)
            if match and match.group(1) == str(code)[0]:
                enhanced = enhanced or match.group().strip()
                line = line[match.end() :]
            texts.append(line.strip())
        return cls(code, ' '.join(text for text in texts if text), enhanced)

    @property
    def accepted(self) -> bool:
        """2xx: the server is responsible for this recipient now."""
        return 200 <= self.code < 300

    @property
    def deferred(self) -> bool:
        """4xx: try again later.  So is any code that is no outcome: an unclear reply drops no recipient."""
        return not (self.accepted or self.refused)

    @property
    def refused(self) -> bool:
        """5xx: never try this again."""
        return 500 <= self.code < 600

    def __str__(self) -> str:
        return ' '.join(part for part in (str(self.code), self.enhanced, self.text) if part)


@dataclass(frozen=True)
class SendResult:
    """
    The outcome of one attempt.  True if every recipient was sent to, or is in a queue; see :attr:`failed`.

    :param replies: recipient to reply; a missing recipient was not tried
    :param transport: the name of the transport that answered
    :param queued: the message waits in a queue, at least for some recipients
    :param trouble: why the attempt broke off, if the server's trouble ended it
    :param settlement: how the claim was settled because of it; None where there was no claim
    :param unwritten: why the settlement cannot be written, if so: in its queue the message is as it was before
    :param discarded: whether a receiver of ``delivery_failed`` has given up the message; None if none was asked
    """

    replies: Mapping[str, Reply] = field(default_factory=dict)
    transport: str = ''
    queued: bool = False
    trouble: ServerTrouble | None = None
    settlement: Settlement | None = None
    discarded: bool | None = None
    unwritten: QueueError | None = None

    def __bool__(self) -> bool:
        return (self.queued or bool(self.replies)) and not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The recipients that were neither sent to nor are in a queue: refused, given up, or taken by no transport."""
        settlement = self.settlement or Settlement()
        open_or_refused = (recipient for recipient, reply in self.replies.items() if not reply.accepted)
        given_up = (recipient for burial in settlement.burials for recipient in burial.recipients)
        failed = dict.fromkeys((*open_or_refused, *settlement.waiting, *given_up))
        kept = frozenset(settlement.waiting if self.queued else ())
        return tuple(recipient for recipient in failed if recipient not in kept)

    @property
    def accepted(self) -> tuple[str, ...]:
        """The recipients for whom the server took the message."""
        return tuple([recipient for recipient, reply in self.replies.items() if reply.accepted])

    @property
    def deferred(self) -> tuple[str, ...]:
        """The recipients to be tried again later."""
        return tuple(recipient for recipient, reply in self.replies.items() if reply.deferred)

    @property
    def refused(self) -> tuple[str, ...]:
        """The recipients that were refused for good."""
        return tuple(recipient for recipient, reply in self.replies.items() if reply.refused)

    def open_of(self, recipients: Iterable[str]) -> tuple[str, ...]:
        """Those of *recipients* who are neither accepted nor refused yet, in their order."""
        replies = self.replies
        return tuple([r for r in recipients if not (reply := replies.get(r)) or reply.deferred])

    def merged_with(self, later: SendResult) -> SendResult:
        """The outcome of two attempts at one message; for each recipient the *later* reply holds."""
        return SendResult(
            replies={**self.replies, **later.replies},
            transport=later.transport or self.transport,
            queued=self.queued or later.queued,
            trouble=later.trouble,
        )


@dataclass(frozen=True, slots=True)
class Burial:
    """Recipients who are given up, and why; they become one dead letter."""

    recipients: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Settlement:
    """
    How a claim ends.  Without any argument: the message is done and leaves the queue.

    :param waiting: the recipients that are still open
    :param due: when they may be tried again, in seconds since the epoch; None keeps the present due time
    :param counted: whether this was an attempt; a server's trouble is not
    :param stumbled: the server's trouble came during this message, which then waits behind those without trouble
    :param last_reply: what the server said, for the queue file and for people
    :param burials: the recipients that are given up
    """

    waiting: tuple[str, ...] = ()
    due: float | None = None
    counted: bool = True
    stumbled: bool = False
    last_reply: str = ''
    burials: tuple[Burial, ...] = ()

    def unwritten(self) -> Settlement:
        """Return what is true if this could not be written: the recipients without the message wait as before."""
        waiting = (*self.waiting, *(recipient for burial in self.burials for recipient in burial.recipients))
        return Settlement(waiting, counted=not waiting, last_reply=self.last_reply)


class Dropped(Enum):
    """In place of a claim: the message was added to a transaction, and is no longer part of it."""

    DROPPED = 'dropped'


DROPPED: Final[Literal[Dropped.DROPPED]] = Dropped.DROPPED


@dataclass(frozen=True, slots=True)
class Recovery:
    """
    What :meth:`~.interfaces.IMailQueue.recover` found; each field holds the names of messages.

    :param orphans: claimed by a process that died; they wait again
    :param buried: orphans given up because too many workers had died with them
    :param in_doubt: prepared, and left as they are
    :param sent: in doubt before, published now because ``mailqueue.in_doubt = send``
    :param discarded: in doubt before, removed because ``mailqueue.in_doubt = discard``
    :param swept: never voted for, and older than 36 hours
    :param half_way: left by an interrupted move to another queue
    :param expired: dead letters that were removed, because ``mailqueue.keep_dead`` was over
    """

    orphans: tuple[str, ...] = ()
    buried: tuple[str, ...] = ()
    in_doubt: tuple[str, ...] = ()
    sent: tuple[str, ...] = ()
    discarded: tuple[str, ...] = ()
    swept: tuple[str, ...] = ()
    half_way: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()
