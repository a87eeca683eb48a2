"""What a program calls to deliver a message of its own, or a single one of a queue."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pyramid_mailqueue.delivery.attempt import Attempt
from pyramid_mailqueue.delivery.crew import Crew
from pyramid_mailqueue.delivery.engine import Engine, Nothing
from pyramid_mailqueue.delivery.routes import Routes
from pyramid_mailqueue.delivery.run import Due, RunReport, Stop
from pyramid_mailqueue.exceptions import MessageError, ServerTrouble, WrongState
from pyramid_mailqueue.interfaces import IClaim
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import SendResult

__all__ = ['MessageHandler']


class MessageHandler(Routes):
    """
    Deliver messages over transports, in their order: who is still open after the first is offered to the next.

    :param transports: what to offer messages to; see `ITransport`; any `ISender` will do
    :param retry_policy: see `IRetryPolicy`
    :param plugins: the names of plugins to load before the first delivery; ``'*'`` is every one that is installed
    :param connections: how many connections a run may use at once
    :param take_from_rate: called with a number of recipients before a message for them is sent: takes so much from a
        common rate and returns 0, or takes nothing and returns in how many seconds to ask again; of 0 recipients it
        tells whether there could be one
    :param notify: called with each event (see :mod:`~.events`); must not raise
    :param clock: seconds since the epoch
    """

    def deliver(self, claim: IClaim) -> SendResult:
        """
        Try the message of *claim* now, and settle the claim.

        ``result.trouble`` is set if no transport could be used: the next message would fare no better, and this one
        waits as it was.  What cannot be read is released and logged, and has no settlement.
        """
        one = _One(claim)
        self.engine().run(one)
        return one.result

    def engine(self) -> Engine:
        """Return an engine for this thread: it has one connection, and waits for it here."""
        return Engine(self, disconnects=self.disconnects)

    def crew(
        self,
        due: Due,
        stop: Stop,
        report: RunReport,
        on_progress: Callable[[RunReport], None] | None,
        hurry: Callable[[float], None],
    ) -> Crew:
        """Return what delivers in one run; see :mod:`~.delivery.crew`."""
        return Crew(self, due, stop, report, on_progress, hurry)

    # --- for programs that bring their own messages ---

    def send_message(
        self,
        msg: Any,
        sender: str | None = None,
        recipient: str | None = None,
        recipients: Iterable[str] | str | None = None,
    ) -> SendResult:
        """
        Send a message now; return a result that is true if every recipient was sent to, or is in a queue.

        A message that waits in no queue is offered to the transports in their order, and nothing is kept of what none
        of them has taken; ``result.failed`` has whom that concerns.  A queued message is settled as any other: where it
        was deferred it waits in its queue, and the result is true and ``queued``.

        :param msg: bytes, an :class:`email.message.Message` or whatever else
            :meth:`~.envelope.Envelope.from_message` takes, or a queued message: a claim
        :param sender: by default taken from the header, as the recipients are; a queued message has its own
        :param recipient: one address; or else *recipients*: one or several
        :raises MessageError: the message cannot be sent as it is, or a queued message is for others
        :raises WrongState: the queued message was sent before, or was given back to its queue
        """
        if recipient is not None and recipients is not None:
            raise MessageError('Give either recipient= or recipients=, not both.')
        addresses = recipients if recipient is None else recipient
        if hasattr(msg, 'settle'):
            return self._send_queued(msg, sender, addresses)
        return self._send_at_once(Envelope.from_message(msg, sender, addresses))

    def _send_queued(self, claim: IClaim, sender: str | None, recipients: Iterable[str] | str | None) -> SendResult:
        if claim.is_over:
            raise WrongState(f'The message {claim.id} was sent before, or was given back to its queue.')
        if (sender is not None or recipients is not None) and _is_for_others(claim.envelope, sender, recipients):
            raise MessageError(f'The message {claim.id} has another sender or other recipients in its queue.')
        self.load_plugins()
        try:
            if not self.may_send(claim):
                return SendResult(queued=True)
            return self.for_queue(claim.queue).deliver(claim)
        finally:
            # If the attempt was interrupted, as by Ctrl-C, the message waits; else its claim has ended already.
            claim.release()

    def for_queue(self, queue: Any, plugins: Sequence[str] = ()) -> MessageHandler:
        """
        Return the same handler, without transports that put into *queue* what has come from there.

        :param plugins: the names of more plugins to load
        """
        twin = copy.copy(self)
        twin.plugins = (*self.plugins, *plugins)
        twin.routes = [route for route in self.routes if not route.transport.leads_to(queue)]
        return twin

    def _send_at_once(self, envelope: Envelope) -> SendResult:
        self.load_plugins()
        attempt = Attempt(envelope)
        if not self.may_send(attempt):
            attempt.note(SendResult(trouble=ServerTrouble('mailqueue.rate_limit allows no more mail now.')))
        return self.engine().deliver(attempt)


class _One(Nothing):
    """See `Source`.  A single claim."""

    def __init__(self, claim: IClaim) -> None:
        self._claim: IClaim | None = claim
        self.result = SendResult()

    def look(self, number: int) -> int:
        return 0 if self._claim is None else 1

    def next(self) -> IClaim | None:
        claim, self._claim = self._claim, None
        return claim

    def ended(self, claim: IClaim, result: SendResult | None) -> None:
        if result is not None:
            self.result = result


def _is_for_others(own: Envelope, sender: str | None, recipients: Iterable[str] | str | None) -> bool:
    asked = Envelope.from_message(
        b'', own.sender if sender is None else sender, own.recipients if recipients is None else recipients
    )
    return asked.sender != own.sender or {*asked.recipients} != {*own.recipients}
