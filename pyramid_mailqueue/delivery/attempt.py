"""
One attempt at a message: what was said of it so far, and what becomes of it in the end.

It is settled first and told of afterwards: whatever a logger or a plugin does then, the message cannot be delivered a
second time because of it.  Only receivers of ``delivery_failed`` are asked before that, as they may end the message;
who has accepted it is written down by then (see :mod:`~.plugins`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Protocol

from pyramid_mailqueue.delivery.report import AttemptRecord, ask_plugins, has_failed, report
from pyramid_mailqueue.delivery.retry import refusals
from pyramid_mailqueue.delivery.route import Route
from pyramid_mailqueue.interfaces import IClaim, IRetryPolicy
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import Burial, Offer, Reply, SendResult, Settlement

if TYPE_CHECKING:
    from pyramid_mailqueue.events import MailEvent

__all__ = ['Attempt', 'ClaimedAttempt', 'Deciding']

#: Behind a content of more octets nothing is announced before it has its outcome.
LARGE = 1024 * 1024


class Deciding(Protocol):
    """What decides about a message, and is told of it; see :class:`~.delivery.routes.Routes`."""

    routes: list[Route]
    retry_policy: IRetryPolicy
    notify: Callable[[MailEvent], None] | None
    clock: Callable[[], float]


class Attempt:
    """
    An attempt at a message that is in no queue.

    :ivar claim: of the message; None here
    :ivar outcome: the result, when it is decided
    :ivar recipients: for whom it was open before
    :ivar still_open: for whom it can be offered: they have neither accepted nor refused it
    :ivar offer: what to offer to the route whose turn it is
    :ivar position: the number of that route
    :ivar answers: what was said
    :ivar number: its place in the order in which the messages came
    :ivar goes_alone: nothing is announced behind it
    :ivar needed: the server broke off in the midst of it, and has not worked yet: if it does so with so many others,
        too, it is to blame; None where it is not
    """

    claim: IClaim | None = None
    goes_alone = False

    def __init__(self, envelope: Envelope, number: int = 0) -> None:
        self.envelope = envelope
        self.number = number
        self.recipients = self.still_open = envelope.recipients
        self.offer = Offer(envelope.sender, envelope.recipients, envelope.content)
        self.position = 0
        self.answers: list[SendResult] = []
        self.needed: int | None = None
        self.outcome: SendResult | None = None
        # The last word of each route.
        self._last: dict[int, SendResult] = {}

    def note(self, result: SendResult) -> None:
        """Note what a route has said: the next one is for those who are still open then."""
        self.answers.append(result)
        self._last[self.position] = result
        self.still_open = result.open_of(self.still_open)
        if not self.still_open:
            return
        untried = tuple(recipient for recipient in self.offer.recipients if recipient not in result.replies)
        if result.trouble is None and untried:
            # The server takes only so many at once.
            self.offer = self.offer._replace(recipients=untried)
        else:
            self.position += 1
            self.offer = self.offer._replace(recipients=self.still_open)

    @property
    def has_outcome(self) -> bool:
        """Whether something was said of at least one recipient: then this must be settled, and told of."""
        return any(answer.replies for answer in self.answers)

    @property
    def result(self) -> SendResult:
        """Everything that was said; the trouble of one route is none if another one could be used."""
        if len(self.answers) == 1:
            return self.answers[0]
        result = reduce(SendResult.merged_with, self.answers, SendResult())
        troubles = [last.trouble for last in self._last.values()]
        if not all(troubles):
            return replace(result, trouble=None)
        # Where one of them broke off in the midst of this message, the next one is worth trying.
        return replace(result, trouble=next((it for it in troubles if it and it.in_message), result.trouble))

    def is_valid(self) -> bool:
        """Whether the message is still ours."""
        return True

    @property
    def has_to_keep(self) -> bool:
        """Whether something has to be written down before the message goes on."""
        return False

    def keep(self) -> None:
        """Write down who has the message before it goes on: nobody is to get it twice if we die meanwhile."""

    def release(self) -> None:
        """End the attempt; the message stays as it was."""

    def decide(self, by: Deciding, is_servers_fault: Callable[[], bool]) -> bool:
        """
        Decide what becomes of the message; return whether :meth:`settle` may take its time.

        :param is_servers_fault: whether the server seems to be to blame for the message's trouble
        """
        return True

    def settle(self, by: Deciding) -> SendResult:
        """Put the decision into effect, tell of it, and return the result."""
        result, now = _completed(self.result, self.envelope.recipients), by.clock()
        record = AttemptRecord('', self.envelope, self.answers, attempts=0, queued_at=now, now=now)
        if len(result.accepted) < len(self.envelope.recipients):
            result = ask_plugins(record, result, before=self.keep)
        self.outcome = result
        report(record, result, Settlement(burials=self._bury(by, result)), by.notify)
        return result

    def _bury(self, by: Deciding, result: SendResult) -> tuple[Burial, ...]:
        """Keep who was refused where a person finds it, if a transport can; return what it has kept."""
        burials = refusals(self.envelope.recipients, result)
        for route in by.routes:
            if burials and route.bury(self.envelope, burials):
                return burials
        return ()


class ClaimedAttempt(Attempt):
    """An attempt at a message of a queue."""

    claim: IClaim

    def __init__(self, claim: IClaim, number: int) -> None:
        super().__init__(claim.envelope, number)
        self.claim = claim
        # A second one in memory would cost more than a round trip; and whoever is announced behind one that kills its
        # workers is orphaned with it.
        self.goes_alone = len(self.envelope.content) > LARGE or claim.deaths > 0
        self.offer = self.offer._replace(is_valid=claim.is_valid)
        self._now = 0.0
        # How many of the accepted recipients are written down.
        self._kept = 0

    def note(self, result: SendResult) -> None:
        """As for any attempt; but who may have the message already waits, before another route sends it again."""
        super().note(result)
        if any(reply.outcome_unknown for reply in result.replies.values()):
            self.still_open = tuple(it for it in self.still_open if not _may_have_it(it, result))
            self.offer = self.offer._replace(recipients=self.still_open)

    def is_valid(self) -> bool:
        """Whether the message is still ours; if not its claim has ended, or is given up here."""
        if self.offer.is_valid():
            return True
        self.claim.release()
        return False

    @property
    def has_to_keep(self) -> bool:
        """Whether something has to be written down before the message goes on."""
        return len(self._accepted) > self._kept

    @property
    def _accepted(self) -> set[str]:
        return {recipient for answer in self.answers for recipient in answer.accepted}

    def keep(self) -> None:
        """Write down who has the message before it goes on: nobody is to get it twice if we die meanwhile."""
        if self.has_to_keep:
            accepted = self._accepted
            self._kept = len(accepted)
            self.claim.keep(tuple(recipient for recipient in self.recipients if recipient not in accepted))

    def release(self) -> None:
        """Release the claim."""
        self.claim.release()

    def decide(self, by: Deciding, is_servers_fault: Callable[[], bool]) -> bool:
        """Decide by the retry policy."""
        claim, result = self.claim, self.result
        self._now = now = by.clock()
        decide = by.retry_policy.decide
        settlement = decide(self.recipients, claim.attempts, claim.queued_at, result, now)
        if settlement.burials and result.trouble is not None and is_servers_fault():
            # An outage is no reason to give up a message, however old it is.
            settlement = decide(self.recipients, claim.attempts, now, result, now)
        queued = result.queued or bool(settlement.waiting)
        self.outcome = SendResult(result.replies, result.transport, queued, result.trouble, settlement)
        # What remains of the message is written and made durable, and receivers are asked.
        return bool(settlement.waiting or settlement.burials)

    def settle(self, by: Deciding) -> SendResult:
        """Settle the claim, tell of it, and return the result."""
        claim, result = self.claim, self.outcome
        assert result is not None
        assert result.settlement is not None
        record = AttemptRecord(claim.id, self.envelope, self.answers, claim.attempts, claim.queued_at, self._now)
        settlement = result.settlement
        if has_failed(settlement):
            result = ask_plugins(record, result, before=self.keep)
            settlement = result.settlement or settlement
        unwritten = claim.settle(settlement)
        if unwritten is not None:
            settlement = settlement.unwritten()
            is_queued = result.queued or bool(settlement.waiting)
            result = replace(result, settlement=settlement, queued=is_queued, unwritten=unwritten)
        report(record, result, settlement, by.notify)
        return result


def _completed(result: SendResult, recipients: Sequence[str]) -> SendResult:
    """Return *result* with a reply for each of *recipients*: one that was not tried is deferred, with the reason."""
    untried = Reply(451, str(result.trouble or 'no transport has tried this recipient'), '4.3.0', from_server=False)
    return replace(result, replies={recipient: result.replies.get(recipient, untried) for recipient in recipients})


def _may_have_it(recipient: str, result: SendResult) -> bool:
    reply = result.replies.get(recipient)
    return reply is not None and reply.outcome_unknown
