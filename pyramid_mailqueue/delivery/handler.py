"""
Attempts at messages: offer each to the transports, settle its claim, and only then tell of it.

Settled first: whatever a logger or a plugin does afterwards, the message cannot be delivered a second time because
of it.  Only receivers of ``delivery_failed`` are asked before that, as they may end the message; who has accepted it is
written down by then (see :mod:`~.plugins`).

A :class:`_Shift` is the work of one who delivers.  It offers its messages in a stream, so that a transport can speak of
the next one while the one before is under way::

    claims --take--> next --offer--> under way --outcome--> settled
             take_now  ^                 |
                       +-----------------+   untouched: the stream has ended before it was tried
                                             unfinished: the rest of its recipients, or the next transport

``take`` may wait and is called only when nothing is in hand; ``take_now`` never waits, because somebody does.  What has
to be waited for is yielded on the way (see :mod:`~.waiting`).
"""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import reduce
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

from pyramid_mailqueue.delivery.pause import Pause
from pyramid_mailqueue.delivery.report import Account, has_failed, heed_plugins, tell
from pyramid_mailqueue.delivery.report import plugins as load_plugins_module
from pyramid_mailqueue.delivery.retry import ExponentialBackoff, refusals
from pyramid_mailqueue.delivery.route import MAX_STUMBLES, Route, Stumbles
from pyramid_mailqueue.delivery.waiting import ABOUT_TO_BLOCK, Wait, without_waits
from pyramid_mailqueue.exceptions import MailqueueError, MessageError, QueueError, ServerTrouble, WrongState
from pyramid_mailqueue.interfaces import IClaim, IRetryPolicy, ISender
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import Burial, Offer, Reply, SendResult, Settlement

if TYPE_CHECKING:
    from pyramid_mailqueue.events import MailEvent

__all__ = ['Claims', 'MessageHandler']

log = Log('mailqueue.delivery')


#: Behind a content of more octets nothing is announced before it has its outcome.
LARGE = 1024 * 1024

#: How many seconds a process sends nothing when it cannot find out whether the rate allows it.
RATE_TROUBLE_REST = 60


class Claims(Protocol):
    """Where one who delivers gets the messages from.  No method raises."""

    @property
    def opens_first(self) -> bool:
        """Whether to open a session before the first message is taken."""

    @property
    def is_over(self) -> bool:
        """Whether to end now: what is not under way is released."""

    @property
    def is_untried(self) -> bool:
        """Whether there are others, and no message of this one had its outcome: its session may be one too many."""

    def take(self) -> IClaim | None:
        """Return the next claim, if need be after a while; None if there is nothing more to do."""

    def take_now(self) -> IClaim | None:
        """Return the next claim if there is one at once."""

    def hand_over(self, claims: Sequence[IClaim]) -> bool:
        """
        Let others deliver these, and return True; False if there is nobody else.

        The server has no room for one more session, but the others' go on.
        """


class MessageHandler:
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

    def __init__(
        self,
        transports: Sequence[ISender],
        *,
        retry_policy: IRetryPolicy | None = None,
        plugins: Sequence[str] = (),
        connections: int = 1,
        take_from_rate: Callable[[int], float] | None = None,
        notify: Callable[[MailEvent], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.retry_policy = retry_policy or ExponentialBackoff()
        self.clock = clock
        self.routes = [Route(transport, Pause()) for transport in transports]
        self.connections = connections
        self.take_from_rate = take_from_rate
        self.notify = notify
        self._own = _OfThread()
        self._rate_allows_at = 0.0
        self._unwritten = Pause()
        self.plugins = tuple(plugins)
        self._has_loaded_plugins = False

    @property
    def is_paused(self) -> bool:
        """Whether every transport is resting after its server's trouble: trying a message now would be in vain."""
        return bool(self.routes) and all(route.pause.trouble for route in self.routes)

    @property
    def rests_for(self) -> float:
        """In how many seconds a message can be tried again; 0 if one can be tried now."""
        pause = min((route.pause.remaining for route in self.routes), default=0.0)
        return max(pause, self._unwritten.remaining, self._rate_allows_at - time.monotonic(), 0.0)

    def may_send(self, message: IClaim | _Attempt) -> bool:
        """Whether the rate allows to send this message now; then it is taken from it.  Never raises."""
        if self.take_from_rate is None:
            return True
        try:
            seconds = self.take_from_rate(len(message.recipients))
        except (OSError, MailqueueError) as error:
            log.error('%s Mail waits in the queue.', error)
            seconds = RATE_TROUBLE_REST
        self._rate_allows_at = time.monotonic() + seconds
        return not seconds

    def deliver(self, claim: IClaim) -> SendResult:
        """
        Try the message of *claim* now, and settle the claim.

        ``result.trouble`` is set if no transport could be used: the next message would fare no better, and this one
        waits as it was.  What cannot be read is released and logged, and has no settlement.
        """
        with closing(self.deliver_all(_One(claim))) as results:
            for _, result in results:
                return result
        return SendResult()

    def deliver_all(self, claims: Claims) -> Generator[tuple[IClaim, SendResult]]:
        """
        Deliver what *claims* gives; yield each claim when it is settled, with its result as of :meth:`deliver`.

        What is in hand when this generator is closed is released.
        """
        return without_waits(self.work_on(claims, self._own.stumbles))

    def work_on(self, claims: Claims, stumbles: Stumbles) -> Generator[tuple[IClaim, SendResult] | Wait]:
        """
        As :meth:`deliver_all`, but yield a wait where one has to wait.

        :param stumbles: is written on
        """
        shift = _Shift(self, claims, stumbles)
        try:
            yield from shift.work()
        except GeneratorExit:
            shift.leave_to_others()
            raise
        finally:
            shift.release()

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
        twin.routes = [route for route in self.routes if not route.leads_to(queue)]
        return twin

    def _send_at_once(self, envelope: Envelope) -> SendResult:
        self.load_plugins()
        attempt = _Attempt(envelope)
        if not self.may_send(attempt):
            attempt.note(SendResult(trouble=ServerTrouble('mailqueue.rate_limit allows no more mail now.')))
        while (route := self.next_route(attempt)) is not None:
            for result in without_waits(route.stream(attempt.offer, _do_nothing)):
                if result.trouble is None:
                    route.worked(self._own.stumbles)
                elif not route.forgives(result.trouble, self._own.stumbles):
                    self.rest(route, result.trouble)
                attempt.note(result)
        result, now = _completed(attempt.result, envelope.recipients), self.clock()
        account = Account('', envelope, attempt.answers, attempts=0, queued_at=now, now=now)
        if len(result.accepted) < len(envelope.recipients):
            result = heed_plugins(account, result, before=_do_nothing)
        tell(account, result, Settlement(burials=self._bury(envelope, result)), self.notify)
        return result

    def _bury(self, envelope: Envelope, result: SendResult) -> tuple[Burial, ...]:
        """Keep who was refused where a person finds it, if a transport can; return what it has kept."""
        burials = refusals(envelope.recipients, result)
        for route in self.routes:
            if burials and route.bury(envelope, burials):
                return burials
        return ()

    def rest(self, route: Route, trouble: ServerTrouble) -> None:
        """Let a transport rest because of its server's trouble."""
        route.pause.begin(trouble)
        if len(self.routes) > 1:
            # If this is the only one, whoever called us tells of its trouble.
            log.warning('The transport %s rests: %s', route.name, trouble)

    def note_unwritten(self, reason: QueueError | None) -> None:
        """Rest if the outcome of a message cannot be written: the next one would be sent again and again, too."""
        if reason is None:
            self._unwritten.end()
        else:
            self._unwritten.begin(ServerTrouble(str(reason)))

    def next_route(self, attempt: _Attempt) -> Route | None:
        """Return the transport to offer a message to; None if it is to be settled with what was said."""
        while attempt.still_open and attempt.position < len(self.routes):
            route = self.routes[attempt.position]
            resting = route.pause.trouble
            if resting is None:
                return route
            attempt.note(route.still_resting(resting))
        return None

    def load_plugins(self) -> None:
        """Called before the first attempt."""
        if self.plugins:
            self._has_loaded_plugins = True
            load_plugins_module().registry.load(self.plugins)

    def close(self) -> None:
        """Let go of the transports' connections, and let the plugins finish.  The handler may be used again."""
        for route in self.routes:
            route.close()
        if self._has_loaded_plugins:
            load_plugins_module().registry.terminate()

    def reload(self) -> None:
        """Have the transports read again what may have changed outside."""
        for route in self.routes:
            route.reload()

    def make_room(self) -> None:
        """Called by one who delivers beside others, and has nothing more to do."""
        for route in self.routes:
            route.make_room()

    def abort_opening(self) -> None:
        """Break off the opening of sessions: there is nothing to do for them."""
        for route in self.routes:
            route.abort_opening()

    def abort(self) -> None:
        """Break off what is under way: somebody will not wait any longer."""
        for route in self.routes:
            route.abort()


class _OfThread(threading.local):
    """What is of the thread that delivers, where there is no run."""

    def __init__(self) -> None:
        self.stumbles: Stumbles = {}


class _Attempt:
    """
    One attempt at a message, and how far it has come.

    :ivar recipients: whom it was open for before
    :ivar still_open: those whom it can be offered for: who are neither accepted nor refused
    :ivar offer: what to offer to the transport whose turn it is
    :ivar position: the number of that transport
    :ivar answers: what was said
    """

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope
        self.recipients = self.still_open = envelope.recipients
        self.offer = Offer(envelope.sender, envelope.recipients, envelope.content)
        self.position = 0
        self.answers: list[SendResult] = []
        # The last word of each transport.
        self._last: dict[int, SendResult] = {}

    def note(self, result: SendResult) -> None:
        """Note what a transport has said: the next one is for those who are still open then."""
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
        """Everything that was said; the trouble of one transport is none if another one could be used."""
        if len(self.answers) == 1:
            return self.answers[0]
        result = reduce(SendResult.merged_with, self.answers, SendResult())
        troubles = [last.trouble for last in self._last.values()]
        if not all(troubles):
            return replace(result, trouble=None)
        # Where one of them broke off in the midst of this message, the next one is worth trying.
        return replace(result, trouble=next((it for it in troubles if it and it.in_message), result.trouble))


class _Claimed(_Attempt):
    """
    An attempt at a message of a queue.

    :ivar number: its place in the order in which the claims were given
    :ivar missing: the server broke off in the midst of it, and has not worked yet: if it does so with so many others,
        too, it is to blame; None where it is not
    """

    def __init__(self, claim: IClaim, number: int) -> None:
        super().__init__(claim.envelope)
        self.claim = claim
        self.number = number
        self.missing: int | None = None
        # A second one in memory would cost more than a round trip; and whoever is announced behind one that kills its
        # deliverers is orphaned with it.
        self.goes_alone = len(self.envelope.content) > LARGE or claim.deaths > 0
        self.offer = self.offer._replace(is_valid=claim.is_valid)

    def note(self, result: SendResult) -> None:
        """As for any attempt; but who may have the message already waits, before another transport sends it again."""
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

    def keep(self) -> None:
        """Write down who has the message before it goes on: nobody is to get it twice if we die meanwhile."""
        if self.answers[-1].accepted:
            accepted = {recipient for answer in self.answers for recipient in answer.accepted}
            self.claim.keep(tuple(recipient for recipient in self.recipients if recipient not in accepted))


class _Shift:
    """The work of one who delivers; see the module."""

    def __init__(self, handler: MessageHandler, claims: Claims, stumbles: Stumbles) -> None:
        self._handler = handler
        self._claims = claims
        self._stumbles = stumbles
        self._numbers = itertools.count()
        self._next: deque[_Claimed] = deque()
        self._under_way: deque[_Claimed] = deque()
        self._is_over = False
        # The routes whose server took or refused a message as servers do.
        self._worked: set[Route] = set()
        # The session that could not be opened, for as long as it is not known whether there is a message for it.
        self._vain: tuple[Route, ServerTrouble] | None = None

    def work(self) -> Iterator[tuple[IClaim, SendResult] | Wait]:
        """Yield each claim that is settled, until there is nothing more to do, and whatever has to be waited for."""
        if self._claims.opens_first:
            yield from self._open()
        while True:
            yield ABOUT_TO_BLOCK
            attempt = self._first()
            if attempt is None:
                break
            if self._vain is not None:
                self._handler.rest(*self._vain)
                self._vain = None
            route = self._handler.next_route(attempt)
            if route is None:
                yield from self._conclude(attempt)
            else:
                yield from self._stream(route, attempt)
        # We were told to end: perhaps between two transactions of a message, or before the next transport was asked.
        self._put_back(*self._under_way)
        self._under_way.clear()
        while self._next:
            attempt = self._next.popleft()
            if attempt.has_outcome:
                yield from self._conclude(attempt)
            else:
                attempt.claim.release()

    def _first(self) -> _Claimed | None:
        if self._is_over or self._claims.is_over:
            return None
        return self._next_one(self._claims.take)

    def _next_one(self, take: Callable[[], IClaim | None]) -> _Claimed | None:
        """Return what was put back, or else what *take* gives; nothing that has been lost meanwhile."""
        while self._next:
            attempt = self._next.popleft()
            if attempt.is_valid():
                return attempt
        return self._taken(take)

    def _taken(self, take: Callable[[], IClaim | None]) -> _Claimed | None:
        while (claim := take()) is not None:
            self._handler.load_plugins()
            try:
                attempt = _Claimed(claim, next(self._numbers))
            except (OSError, MailqueueError) as error:
                if not claim.is_over:
                    # Else its queue has told what became of it.
                    log.error('%s cannot be read, and is left alone: %s', claim.id, error)
                claim.release()
                continue
            except MemoryError:
                log.error('There is not enough memory for the message %s; that counts as a death', claim.id)
                claim.abandon()
                continue
            except Exception:
                # What one message makes us fail with is not to keep the others from being delivered.
                log.critical('A defect of pyramid_mailqueue: %s could not be delivered', claim.id, exc_info=True)
                claim.abandon()
                continue
            if attempt.is_valid():
                return attempt
        return None

    def _open(self) -> Iterator[tuple[IClaim, SendResult] | Wait]:
        """Open a session with the server whose turn it is, and go on there with what it is to have first."""
        route = next((route for route in self._handler.routes if route.pause.trouble is None), None)
        if route is not None and route.can_open:
            yield from self._stream(route, None)

    def _stream(self, route: Route, first: _Claimed | None) -> Iterator[tuple[IClaim, SendResult] | Wait]:
        if first is not None:
            self._under_way.append(first)
        offer = None if first is None else first.offer
        with closing(route.stream(offer, lambda: self._more(route))) as results:
            for result in results:
                if isinstance(result, Wait):
                    yield result
                    continue
                if not self._under_way:
                    self._could_not_open(route, result.trouble)
                    return
                attempt = self._under_way.popleft()
                if result.trouble is not None and not attempt.is_valid():
                    # Somebody else has it: we have broken it off ourselves, or it would be in vain to write its end.
                    continue
                if result.trouble is not None and not result.replies and self._claims.is_over:
                    # We have broken it off ourselves: it is nobody's fault.
                    self._put_back(attempt)
                    return
                if self._is_left_to_others(route, attempt, result):
                    return
                attempt.note(result)
                if self._handler.next_route(attempt) is None:
                    yield from self._conclude(attempt)
                else:
                    try:
                        yield ABOUT_TO_BLOCK
                    finally:
                        attempt.keep()
                        self._put_back(attempt)
                if self._claims.is_over:
                    # The next one has said what it wants, and nothing of its content: it is as it was.
                    return
        # The stream has broken off before these were tried.
        self._put_back(*self._under_way)
        self._under_way.clear()

    def _could_not_open(self, route: Route, trouble: ServerTrouble | None) -> None:
        """Leave everything to the others, if there are any; else to what comes next."""
        if trouble is None or self._claims.is_over:
            return
        if not route.pause.is_in_trouble and self._claims.hand_over(()):
            log.warning('%s The run goes on with fewer connections.', trouble)
            self._is_over = True
        else:
            self._vain = route, trouble

    def _put_back(self, *attempts: _Claimed) -> None:
        self._next = deque(sorted((*self._next, *attempts), key=attrgetter('number')))

    def _is_left_to_others(self, route: Route, attempt: _Claimed, result: SendResult) -> bool:
        """Learn from *result* how the server is; whether this shift is over, and others have what is in hand."""
        if result.trouble is None:
            route.worked(self._stumbles)
            self._worked.add(route)
            return False
        if self._claims.is_over:
            return False
        if result.trouble.in_message and route not in self._worked:
            attempt.missing = MAX_STUMBLES - self._stumbles.get(route, 0)
        # A server that has no room for one more session may say so as late as at MAIL.
        is_one_too_many = result.trouble.at_mail and self._claims.is_untried
        if not is_one_too_many and route.forgives(result.trouble, self._stumbles):
            return False
        untouched = [it for it in (*self._under_way, *self._next) if not it.has_outcome]
        if not (result.replies or attempt.has_outcome):
            untouched.insert(0, attempt)
        # If it has not worked since its last trouble it is not our session that is one too many.
        if route.pause.is_in_trouble or not self._claims.hand_over([it.claim for it in untouched]):
            if not (is_one_too_many and route.forgives(result.trouble, self._stumbles)):
                self._handler.rest(route, result.trouble)
            return False
        log.warning('%s The run goes on with fewer connections.', result.trouble)
        if result.replies:
            attempt.note(replace(result, trouble=None))
        self._next = deque(it for it in (attempt, *self._under_way, *self._next) if it.has_outcome)
        self._under_way.clear()
        self._is_over = True
        return True

    def _may_be_the_server(self, attempt: _Claimed) -> bool:
        """Whether there are enough other messages to find out what it is that the server cannot stand."""
        if attempt.missing is None:
            return False
        while len(self._under_way) + len(self._next) < attempt.missing:
            other = self._taken(self._claims.take_now)
            if other is None:
                return False
            self._put_back(other)
        return True

    def _more(self, route: Route) -> Offer | None:
        """Return what can follow in the stream of *route*, if there is something at once."""
        if self._under_way and self._under_way[-1].goes_alone:
            return None
        attempt = self._next_one(self._claims.take_now)
        if attempt is None:
            return None
        if self._handler.next_route(attempt) is not route:
            # First the stream has to end.
            self._put_back(attempt)
            return None
        self._under_way.append(attempt)
        return attempt.offer

    def _conclude(self, attempt: _Claimed) -> Iterator[tuple[IClaim, SendResult] | Wait]:
        """Settle the claim of an attempt that is over, and tell of it."""
        claim, result, now = attempt.claim, attempt.result, self._handler.clock()
        decide = self._handler.retry_policy.decide
        settlement = decide(attempt.recipients, claim.attempts, claim.queued_at, result, now)
        if settlement.burials and result.trouble is not None and self._may_be_the_server(attempt):
            # An outage is no reason to give up a message, however old it is.
            settlement = decide(attempt.recipients, claim.attempts, now, result, now)
        queued = result.queued or bool(settlement.waiting)
        result = SendResult(result.replies, result.transport, queued, result.trouble, settlement)
        account = Account(claim.id, attempt.envelope, attempt.answers, claim.attempts, claim.queued_at, now)
        try:
            if settlement.waiting or settlement.burials:
                # What remains of the message is written and made durable, and receivers are asked.
                yield ABOUT_TO_BLOCK
        finally:
            if has_failed(settlement):
                result = heed_plugins(account, result, before=attempt.keep)
                settlement = result.settlement or settlement
            unwritten = claim.settle(settlement)
            self._handler.note_unwritten(unwritten)
            if unwritten is not None:
                settlement = settlement.unwritten()
                is_queued = result.queued or bool(settlement.waiting)
                result = replace(result, settlement=settlement, queued=is_queued, unwritten=unwritten)
            tell(account, result, settlement, self._handler.notify)
        yield claim, result

    def leave_to_others(self) -> None:
        """Nobody goes on with this shift: let others deliver what is in hand, if there are any."""
        in_hand = (*self._under_way, *self._next)
        if self._claims.hand_over([it.claim for it in in_hand if not it.has_outcome]):
            self._next.clear()
            self._under_way.clear()
        for attempt in in_hand:
            if attempt.has_outcome:
                deque(self._conclude(attempt), maxlen=0)

    def release(self) -> None:
        """Give back what is in hand."""
        for attempt in (*self._under_way, *self._next):
            attempt.claim.release()


class _One:
    """A single claim, for one who has nothing else to do."""

    def __init__(self, claim: IClaim) -> None:
        self._claim: IClaim | None = claim
        self.opens_first = self.is_over = self.is_untried = False

    def take(self) -> IClaim | None:
        claim, self._claim = self._claim, None
        return claim

    def take_now(self) -> IClaim | None:
        return None

    def hand_over(self, claims: Sequence[IClaim]) -> bool:
        return False


def _is_for_others(own: Envelope, sender: str | None, recipients: Iterable[str] | str | None) -> bool:
    asked = Envelope.from_message(
        b'', own.sender if sender is None else sender, own.recipients if recipients is None else recipients
    )
    return asked.sender != own.sender or {*asked.recipients} != {*own.recipients}


def _completed(result: SendResult, recipients: Sequence[str]) -> SendResult:
    """Return *result* with a reply for each of *recipients*: one that was not tried is deferred, with the reason."""
    untried = Reply(451, str(result.trouble or 'no transport has tried this recipient'), '4.3.0', from_server=False)
    return replace(result, replies={recipient: result.replies.get(recipient, untried) for recipient in recipients})


def _may_have_it(recipient: str, result: SendResult) -> bool:
    reply = result.replies.get(recipient)
    return reply is not None and reply.outcome_unknown


def _do_nothing() -> None:
    return None
