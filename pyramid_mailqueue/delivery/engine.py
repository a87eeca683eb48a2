"""
Delivery as one loop: one thread claims messages, gives them to connections, and settles them.

::

    source --next--> attempt --submit--> in hand --result--> decided --> settled, and told of
               ^        |                  |         |
               |        +---- untouched ---+         +-- the rest of its recipients, or the next transport --+
               +------------------------- ready <------------------------------------------------------------+

The thread owns every connection, what each has in hand (one message under way, and one announced behind it), and what
is ready to be given to one.  Nothing that may take long is done in it, where there are helper threads: opening a
connection, a plain ``send``, a settlement that writes.  Each posts what became of it into a pipe, and that is all that
passes between them.

A *lane* is the place of one connection on a route (a transport with its back-off).  Each route has its own lanes, so
none waits for another.  It begins with one.  When the first message has its outcome the server is known to work, and as
many more connections are opened as there are messages for them.  A connection holds no message before it is open: a
server that has no room for one more may keep it waiting for minutes, while others deliver.  If it cannot be opened
beside others, or turns out to be one too many when its first message is announced, the route goes on with fewer.

A server that breaks off in the midst of a message is given a few others first: one message that it cannot stand must
not keep all others from it.
"""

from __future__ import annotations

import itertools
import math
import select
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from pyramid_mailqueue.delivery.attempt import Attempt, ClaimedAttempt
from pyramid_mailqueue.delivery.helpers import Helpers
from pyramid_mailqueue.exceptions import MailqueueError, ServerTrouble
from pyramid_mailqueue.interfaces import IClaim, IConnection
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.results import SendResult

if TYPE_CHECKING:
    from pyramid_mailqueue.delivery.route import Route
    from pyramid_mailqueue.delivery.routes import Routes

__all__ = ['MAX_DISCONNECTS', 'Disconnects', 'Engine', 'Nothing', 'Source']

T = TypeVar('T')

log = Log('mailqueue.delivery')

#: So often in a row a server may break off in the midst of a message before its route backs off.
MAX_DISCONNECTS = 2

#: How long the end of the loop waits for connections that it has given up while they were opened, in seconds.
GIVE_UP_SECONDS = 2.0

#: So many messages may wait for another route before another one is begun.
MAX_PENDING = 16

#: How many times in a row the server of each route has broken off in the midst of a message of one lane.
Disconnects = dict['Route', int]


class Source(Protocol):
    """
    Where an engine gets its messages from.  Called by the thread of the engine; no method raises.

    Each claim that was given comes back once, to :meth:`ended`, unless a defect has ended the loop.
    """

    @property
    def is_over(self) -> bool:
        """Whether to end: what is under way is finished, and nothing else is begun."""

    @property
    def rate_seconds(self) -> float:
        """In how many seconds the rate allows more; 0 if it is not the rate that one has to wait for."""

    def look(self, number: int) -> int:
        """Return how many messages could be begun now, at most *number*: connections are opened for them."""

    def next(self) -> IClaim | None:
        """Return the next claim; None if there is none at once."""

    def pause(self) -> float | None:
        """
        Return in how many seconds to ask again; None if there will be nothing more.

        Called when nothing is in hand, and nothing can be begun.
        """

    def ended(self, claim: IClaim, result: SendResult | None) -> None:
        """Take the result of a claim that was settled; None if it was released, or abandoned."""


class _Lane:
    """
    The place of one connection on a route.

    :param disconnects: is written on
    :ivar connection: is there while something is in hand
    :ivar is_plain: the transport has no connections
    :ivar is_defective: the connection has raised something
    :ivar hand: what was submitted and has no result yet, the oldest first
    :ivar has_worked: a message of this lane was taken, or refused as servers do
    :ivar spent: the connection that the next one replaces
    :ivar writes: a message that is being settled, or kept: nothing goes out before that is written
    :ivar events: what the connection waits for; 0 if it does not
    :ivar until: when to look at it in any case (``time.monotonic()``)
    """

    def __init__(self, route: Route, disconnects: Disconnects) -> None:
        self.route = route
        self.connection: IConnection | None = None
        self.is_opening = self.is_plain = self.is_defective = self.has_worked = False
        self.hand: deque[Attempt] = deque()
        self.spent: IConnection | None = None
        self.writes: Attempt | None = None
        self.fd = -1
        self.events = 0
        self.until = 0.0
        self._disconnects = disconnects

    @property
    def has_room(self) -> bool:
        """Whether something can be submitted now."""
        if self.writes is not None or (self.hand and self.hand[-1].goes_alone):
            return False
        if self.connection is None:
            return self.is_plain and not self.hand
        return self.connection.has_room and not self.is_defective

    @property
    def is_idle(self) -> bool:
        """Whether a connection can be opened."""
        return self.connection is None and not (self.is_opening or self.is_plain or self.writes)

    @property
    def is_at_work(self) -> bool:
        """Whether it sends, or is about to."""
        return bool(self.hand or self.writes) or self.is_opening

    @property
    def disconnects(self) -> int:
        """How many times in a row the server has broken off in the midst of a message."""
        return self._disconnects.get(self.route, 0)

    def forgives(self, trouble: ServerTrouble) -> bool:
        """Whether the next message may be tried at once: the server broke off in the midst of one, and that is rare."""
        count = self._disconnects.pop(self.route, 0)
        if not trouble.in_message or count >= MAX_DISCONNECTS:
            return False
        self._disconnects[self.route] = count + 1
        return True

    def worked(self) -> None:
        """Note that the server took or refused a message as servers do."""
        self.has_worked = True
        self._disconnects.pop(self.route, None)
        self.route.backoff.end()

    def results(self, events: int) -> Generator[SendResult]:
        """Advance the connection, and yield the results of what is in hand.  Raises no Exception of the transport."""
        assert self.connection is not None
        try:
            # A connection need not be a generator: the call may raise, too.
            for answer in self.connection.advance(events):
                if not self.hand:
                    return
                yield self.route.read(answer, self.hand[0].offer.recipients, may_go_on=True)
        except ServerTrouble as trouble:
            if self.hand:
                answer = SendResult(trouble=trouble)
                yield self.route.read(answer, self.hand[0].offer.recipients, may_go_on=True)
        except Exception as error:  # noqa: BLE001 - it is logged
            self.is_defective = True
            if self.hand:
                yield self.route.failed(error, self.hand[0].offer.recipients)


class Engine:
    """
    See the module.

    :param routes: what all engines share
    :param connections: how many connections a route may have at once
    :param has_helpers: whether threads do what may take long; if not, or if there can be none, the loop does it
    :param disconnects: those of the thread, if its engines do not live long; by default each lane counts its own
    """

    def __init__(
        self,
        routes: Routes,
        *,
        connections: int = 1,
        has_helpers: bool = False,
        disconnects: Disconnects | None = None,
    ) -> None:
        self._routes = routes
        self._connections = connections
        self._disconnects = disconnects
        self._numbers = itertools.count()
        self._source: Source = Nothing()
        self._lanes: list[_Lane] = []
        self._of_fd: dict[int, _Lane] = {}
        # The routes whose server works, and those that take fewer connections.
        self._proven: set[Route] = set()
        self._limits: dict[Route, int] = {}
        # What was read, and is in no hand; in its order.
        self._ready: list[Attempt] = []
        # What only one lane may have.
        self._kept_for: dict[Attempt, _Lane] = {}
        # What is being decided; it is in no hand any more.
        self._current: Attempt | None = None
        # What is being settled, or kept.
        self._writing: set[Attempt] = set()
        # How much is with helpers, besides the opening of connections.
        self._helped = 0
        # What met trouble, and is not settled.  Its end decides whether it is worth while to look if a server is back.
        self._troubled: set[Attempt] = set()
        self._defect: Exception | None = None
        # The lane whose results are taken: after a defect it is in the middle of that.
        self._advancing: _Lane | None = None
        # Something can be given out that could not before.
        self._has_news = False
        self._poll = select.poll()
        self._helpers: Helpers | None = None
        self._has_helpers = has_helpers

    def wake(self) -> None:
        """Look again whether the source is over.  May be called from any thread."""
        helpers = self._helpers
        if helpers is not None:
            helpers.wake()

    @property
    def is_sending(self) -> bool:
        """Whether more is done than to open connections.  May be asked from any thread."""
        return bool(self._helped) or any(lane.hand for lane in self._lanes)

    # --- the loop ---

    def run(self, source: Source) -> None:
        """Return when there is nothing more to do.  Raises what is a defect, and what interrupts it."""
        self._source = source
        if self._has_helpers:
            # Too many open files: then there is one thing at a time.
            with suppress(OSError):
                self._helpers = Helpers()
                self._poll.register(self._helpers, select.POLLIN)
        try:
            self._loop()
        except BaseException as error:
            if not isinstance(error, Exception):
                self._conclude_now()
            raise
        finally:
            self._end()

    def _loop(self) -> None:
        while True:
            try:
                while self._turn():
                    pass
            except Exception as error:
                if self._defect is not None:
                    raise
                self._finish_because_of(error)
            else:
                break
        if self._defect is not None:
            raise self._defect

    def _finish_because_of(self, error: Exception) -> None:
        """
        After a defect: begin nothing more, and finish what the other lanes have under way.

        What it is about stays claimed: if the message is to blame its deaths are counted.
        """
        self._defect = error
        for lane in self._lanes:
            # What was submitted, and was not looked at since, would not be looked at any more.
            goes_on = bool(lane.events) if lane.writes is None else lane.writes in self._writing
            if goes_on and lane is not self._advancing:
                continue
            lane.writes = None
            if lane.connection is not None:
                self._let_go(lane)
        self._advancing = None
        # More may have been posted than was looked at.
        self.wake()

    @property
    def _is_over(self) -> bool:
        return self._defect is not None or self._source.is_over

    def deliver(self, attempt: Attempt) -> SendResult:
        """Make an attempt at a message that is in no queue."""
        self._ready.append(attempt)
        self.run(Nothing())
        assert attempt.outcome is not None
        return attempt.outcome

    def _turn(self) -> bool:
        """Give out what there is, and wait for the next event; False if there will be none."""
        self._has_news = False
        if self._is_over:
            self._conclude_ready()
            seconds = math.inf if self.is_sending else None
        else:
            self._feed()
            seconds = self._seconds_to_more()
        if self._has_news:
            return True
        if seconds is None:
            return False
        self._wait(seconds)
        return True

    def _seconds_to_more(self) -> float | None:
        """Return how long to wait for something to do; None if there will be nothing."""
        is_opening = any(lane.is_opening for lane in self._lanes)
        if self.is_sending or (is_opening and (self._ready or self._source.look(1))):
            # Other connections need not wait for these.
            return self._source.rate_seconds or math.inf
        if self._ready:
            # Without a connection another thread has found trouble since this one looked.
            return 0.0
        return self._source.pause()

    def _wait(self, seconds: float) -> None:
        waiting = [lane for lane in self._lanes if lane.events]
        now = time.monotonic()
        until = min([lane.until for lane in waiting], default=math.inf)
        until = min(until, now + seconds)
        ready = self._poll.poll(None if until == math.inf else max(0.0, until - now) * 1000)
        for fd, events in ready:
            lane = self._of_fd.get(fd)
            if lane is None:
                assert self._helpers is not None
                self._collect(self._helpers)
            elif lane.events:
                # Else it has ceased to wait since.
                self._advance(lane, events)
        if until <= (now := time.monotonic()):
            for lane in waiting:
                if lane.events and lane.until <= now:
                    self._advance(lane)

    # --- giving out ---

    def _feed(self) -> None:
        for lane in [*self._lanes]:
            if lane.has_room:
                self._fill(lane)
                if lane.connection is not None:
                    self._advance(lane)
        entry = self._entry
        if entry is None or self._ready:
            self._conclude_unroutable(entry)
        self._open_lanes(entry)

    @property
    def _entry(self) -> Route | None:
        """The route for new messages; None if there is none now."""
        for route in self._routes.routes:
            if route.backoff.trouble is None and not (self._troubled and route.backoff.is_in_trouble):
                return route
        return None

    def _fill(self, lane: _Lane) -> None:
        while lane.has_room and not self._is_over and (attempt := self._next_for(lane)) is not None:
            self._submit(lane, attempt)

    def _next_for(self, lane: _Lane) -> Attempt | None:
        route = lane.route
        # First what is kept for the lane: it is to be the first of its connection.
        for attempt in sorted(self._ready, key=lambda it: it not in self._kept_for):
            if self._routes.next_route(attempt) is route and self._kept_for.get(attempt, lane) is lane:
                self._kept_for.pop(attempt, None)
                self._ready.remove(attempt)
                if attempt.is_valid():
                    return attempt
                self._given_up(attempt)
        if self._has_too_many or self._entry is not route:
            return None
        fresh = self._read_next()
        if fresh is None or self._routes.next_route(fresh) is route:
            return fresh
        # Another thread has just found the server in trouble.
        self._put_back(fresh)
        return None

    @property
    def _has_too_many(self) -> bool:
        return len(self._ready) >= MAX_PENDING

    def _read_next(self) -> Attempt | None:
        """Return an attempt at the next message of the source that can be read, and is still ours."""
        while (claim := self._source.next()) is not None:
            self._routes.load_plugins()
            read = self._read(claim)
            if read is not None and read.is_valid():
                return read
            self._source.ended(claim, None)
        return None

    def _read(self, claim: IClaim) -> ClaimedAttempt | None:
        try:
            return ClaimedAttempt(claim, next(self._numbers))
        except (OSError, MailqueueError) as error:
            if not claim.is_over:
                # Else its queue has told what became of it.
                log.error('%s cannot be read, and is left alone: %s', claim.id, error)
            claim.release()
        except MemoryError:
            log.error('There is not enough memory for the message %s; that counts as a death', claim.id)
            claim.abandon()
        except Exception:
            # What one message makes us fail with is not to keep the others from being delivered.
            log.critical('A defect of pyramid_mailqueue: %s could not be delivered', claim.id, exc_info=True)
            claim.abandon()
        return None

    def _submit(self, lane: _Lane, attempt: Attempt) -> None:
        lane.hand.append(attempt)
        if lane.connection is None:
            self._help(lambda: lane.route.send(attempt.offer), lambda result, error: self._sent(lane, result, error))
            return
        try:
            lane.connection.submit(attempt.offer)
        except Exception as error:  # noqa: BLE001 - it is logged
            lane.hand.pop()
            self._note(attempt, lane.route.failed(error, attempt.offer.recipients))

    def _conclude_unroutable(self, entry: Route | None) -> None:
        """Settle what no route can be tried for now."""
        for attempt in [*self._ready]:
            if self._routes.next_route(attempt) is None:
                self._ready.remove(attempt)
                self._conclude(attempt)
        if entry is None and not any(route.backoff.trouble is None for route in self._routes.routes):
            # What is with the helpers may end the run.
            while not (self._helped or self._is_over) and (fresh := self._read_next()) is not None:
                self._go_on(fresh)

    # --- connections ---

    def _open_lanes(self, entry: Route | None) -> None:
        """Open connections for what no open lane has room for."""
        for route in self._routes.routes:
            lanes = [lane for lane in self._lanes if lane.route is route]
            idle = [lane for lane in lanes if lane.is_idle]
            open_ = len(lanes) - len(idle)
            if open_ >= self._most(route):
                continue
            wanted = sum(self._routes.next_route(attempt) is route for attempt in self._ready)
            if route is entry and not self._has_too_many:
                wanted += self._source.look(self._most(route))
            wanted += len(lanes) - len(idle) - sum(lane.is_opening for lane in lanes)
            while open_ < min(wanted, self._most(route)):
                self._open(idle.pop() if idle else self._new_lane(route))
                open_ += 1

    def _most(self, route: Route) -> int:
        return self._limits.get(route, self._connections) if route in self._proven else 1

    def _new_lane(self, route: Route) -> _Lane:
        lane = _Lane(route, {} if self._disconnects is None else self._disconnects)
        self._lanes.append(lane)
        return lane

    def _open(self, lane: _Lane) -> None:
        lane.is_opening = True
        spent, lane.spent = lane.spent, None

        def connect() -> IConnection | None:
            return lane.route.transport.connect(spent)

        def opened(connection: IConnection | None, error: BaseException | None) -> None:
            lane.is_opening = False
            self._opened(lane, connection, error)

        if self._helpers is not None:
            try:
                self._helpers.give(connect, opened, _release)
            except RuntimeError as error:
                # There can be no more threads.
                if self._leaves(lane):
                    log.warning('No more threads can be started (%s). The run goes on with fewer connections.', error)
                    return
            else:
                return
        opened(*_outcome(connect))

    def _opened(self, lane: _Lane, connection: IConnection | None, error: BaseException | None) -> None:
        self._has_news = True
        if error is not None:
            self._keep_nothing_for(lane)
        if isinstance(error, ServerTrouble):
            self._could_not_open(lane, error)
        elif error is not None:
            self._failed_to_open(lane, error)
        elif connection is None:
            lane.is_plain = True
        else:
            lane.connection = connection
            lane.fd = connection.fileno()
            self._of_fd[lane.fd] = lane

    def _could_not_open(self, lane: _Lane, trouble: ServerTrouble) -> None:
        route = lane.route
        if self._is_over:
            return
        if not route.backoff.is_in_trouble and self._leaves(lane):
            log.warning('%s The run goes on with fewer connections.', trouble)
        elif (attempt := self._next_for(lane)) is not None:
            self._routes.back_off(route, trouble)
            self._note(attempt, SendResult(transport=route.name, trouble=trouble))

    def _failed_to_open(self, lane: _Lane, error: BaseException) -> None:
        """A defect of the transport counts as an attempt at the next message."""
        if not isinstance(error, Exception):
            raise error
        attempt = self._next_for(lane)
        if attempt is not None:
            self._note(attempt, lane.route.failed(error, attempt.offer.recipients))

    def _leaves(self, lane: _Lane) -> bool:
        """Remove *lane* if others of its route go on; return whether it was."""
        others = [it for it in self._lanes if it.route is lane.route and it is not lane]
        # Of two that have worked, one that has nothing to do is as good as none.
        if not any(it.is_at_work or not lane.has_worked for it in others):
            return False
        self._lanes.remove(lane)
        self._keep_nothing_for(lane)
        lane.is_opening = False
        self._limits[lane.route] = len(others)
        return True

    def _keep_nothing_for(self, lane: _Lane) -> None:
        self._kept_for = {attempt: it for attempt, it in self._kept_for.items() if it is not lane}

    def _let_go(self, lane: _Lane) -> None:
        """Release the connection of *lane*, and put back what was submitted to it."""
        connection, lane.connection = lane.connection, None
        assert connection is not None
        lane.is_defective = False
        self._listen_no_more(lane)
        del self._of_fd[lane.fd]
        self._put_back(*lane.hand)
        lane.hand.clear()
        try:
            connection.release()
        except Exception as error:  # noqa: BLE001 - it is logged
            lane.route.failed(error, ())

    # --- results ---

    def _advance(self, lane: _Lane, events: int = 0) -> None:
        before, self._advancing = self._advancing, lane
        self._take_results(lane, events)
        self._advancing = before

    def _take_results(self, lane: _Lane, events: int) -> None:
        connection = lane.connection
        assert connection is not None
        results = lane.results(events)
        for result in results:
            goes_on = self._answered(lane, result) and not self._is_over
            if goes_on and lane.writes is not None:
                results.close()
                self._listen_no_more(lane)
                return
            if not goes_on:
                results.close()
                break
            self._fill(lane)
        else:
            if lane.hand and not (connection.is_spent or lane.is_defective):
                self._wait_for(lane, connection)
                return
        if lane.connection is None:
            return
        if not connection.is_spent or self._is_over:
            self._let_go(lane)
            return
        if connection.needs_new and lane.hand:
            self._kept_for[lane.hand[0]] = lane
        self._let_go(lane)
        lane.spent = connection
        self._open(lane)

    def _wait_for(self, lane: _Lane, connection: IConnection) -> None:
        events, seconds = connection.wait()
        lane.until = time.monotonic() + seconds
        if events != lane.events:
            self._poll.register(lane.fd, events)
            lane.events = events

    def _listen_no_more(self, lane: _Lane) -> None:
        if lane.events:
            self._poll.unregister(lane.fd)
            lane.events = 0

    def _sent(self, lane: _Lane, result: SendResult, error: BaseException | None) -> None:
        """Take the result of a plain transport."""
        if error is not None:
            raise error
        self._has_news = True
        self._answered(lane, result)

    def _answered(self, lane: _Lane, result: SendResult) -> bool:
        """Take the result of the oldest message in hand; return whether the lane can go on as it is."""
        self._current = attempt = lane.hand.popleft()
        if result.trouble is None:
            lane.worked()
            self._proven.add(lane.route)
            self._note(attempt, result)
            self._wait_until_written(lane, attempt)
            return True
        if not attempt.is_valid():
            # Somebody else has it: we have broken it off ourselves, or it would be in vain to write its end.
            self._given_up(attempt)
        elif self._is_over and not result.replies:
            # We have broken it off ourselves: it is nobody's fault.
            self._put_back(attempt)
        elif self._is_over or not self._is_left_to_others(lane, attempt, result):
            self._note(attempt, result)
            self._wait_until_written(lane, attempt)
        return False

    def _wait_until_written(self, lane: _Lane, attempt: Attempt) -> None:
        """
        Let nothing more go out over *lane* until it is written what became of its message.

        So the death of this process repeats one message for each connection, at most.
        """
        if attempt in self._writing:
            lane.writes = attempt

    def _is_written(self, attempt: Attempt) -> None:
        self._writing.discard(attempt)
        for lane in [*self._lanes]:
            if lane.writes is attempt:
                lane.writes = None
                self._has_news = True
                self._resume(lane)

    def _resume(self, lane: _Lane) -> None:
        if lane.connection is None:
            return
        if self._is_over:
            self._let_go(lane)
        else:
            self._fill(lane)
            self._advance(lane)

    def _is_left_to_others(self, lane: _Lane, attempt: Attempt, result: SendResult) -> bool:
        """Learn from its trouble how the server is; whether the other lanes of the route go on with the message."""
        route, trouble = lane.route, result.trouble
        assert trouble is not None
        if trouble.in_message and not lane.has_worked:
            attempt.needed = MAX_DISCONNECTS - lane.disconnects
        # A server that has no room for one more session may say so as late as at MAIL.
        is_one_too_many = trouble.at_mail and not lane.has_worked
        if not is_one_too_many and lane.forgives(trouble):
            return False
        # If it has not worked since its last trouble it is not our session that is one too many.
        if not route.backoff.is_in_trouble and self._leaves(lane):
            log.warning('%s The run goes on with fewer connections.', trouble)
            if lane.connection is not None:
                self._let_go(lane)
            if result.replies:
                self._note(attempt, replace(result, trouble=None))
            else:
                self._put_back(attempt)
            return True
        if is_one_too_many and route in self._proven:
            # The lanes that have worked are gone: it is the server, and not this message.
            trouble.in_message = False
        if not (is_one_too_many and lane.forgives(trouble)):
            self._routes.back_off(route, trouble)
        return False

    def _note(self, attempt: Attempt, result: SendResult) -> None:
        attempt.note(result)
        if result.trouble is not None:
            self._troubled.add(attempt)
        self._go_on(attempt)

    def _go_on(self, attempt: Attempt) -> None:
        """Let the next route have the message, or settle it."""
        if self._routes.next_route(attempt) is None:
            self._conclude(attempt)
        elif attempt.has_to_keep:
            self._writing.add(attempt)
            self._help(attempt.keep, lambda _, error: self._kept(attempt, error))
        else:
            self._put_back(attempt)

    def _kept(self, attempt: Attempt, error: BaseException | None) -> None:
        if error is not None:
            self._writing.discard(attempt)
            raise error
        self._put_back(attempt)
        self._is_written(attempt)

    def _put_back(self, *attempts: Attempt) -> None:
        if attempts:
            self._ready = sorted((*self._ready, *attempts), key=attrgetter('number'))
            self._has_news = True
        if self._current in attempts:
            self._current = None

    # --- the end of a message ---

    def _conclude(self, attempt: Attempt) -> None:
        """Decide what becomes of the message, settle it, and tell of it."""
        self._current = attempt
        if attempt.decide(self._routes, lambda: self._may_be_the_server(attempt)):
            self._writing.add(attempt)
            self._help(
                lambda: attempt.settle(self._routes), lambda result, error: self._settled(attempt, result, error)
            )
        else:
            self._settled(attempt, attempt.settle(self._routes))

    def _settled(self, attempt: Attempt, result: SendResult, error: BaseException | None = None) -> None:
        if error is not None:
            self._writing.discard(attempt)
            raise error
        self._current = None
        self._has_news = True
        self._troubled.discard(attempt)
        self._routes.note_unwritten(result.unwritten)
        if attempt.claim is not None:
            self._source.ended(attempt.claim, result)
        self._is_written(attempt)

    def _given_up(self, attempt: Attempt) -> None:
        self._current = None
        self._troubled.discard(attempt)
        if attempt.claim is not None:
            self._source.ended(attempt.claim, None)

    def _may_be_the_server(self, attempt: Attempt) -> bool:
        """Whether there are enough other messages to find out what it is that the server cannot stand."""
        if attempt.needed is None:
            return False
        while len(self._ready) + sum(len(lane.hand) for lane in self._lanes) < attempt.needed:
            other = self._read_next()
            if other is None:
                return False
            self._put_back(other)
        return True

    def _conclude_ready(self) -> None:
        """Settle what is cut short, perhaps between two of its transactions; release what is as it was."""
        while self._ready:
            attempt = self._ready.pop(0)
            if attempt.has_outcome:
                self._conclude(attempt)
            else:
                attempt.release()
                self._given_up(attempt)

    # --- what may take long ---

    def _help(self, work: Callable[[], T], done: Callable[[T, BaseException | None], None]) -> None:
        """Have *work* done, and call *done* in the loop, with what it returned or raised."""

        def collected(found: T, error: BaseException | None) -> None:
            self._helped -= 1
            done(found, error)

        self._helped += 1
        if self._helpers is not None:
            # If there can be no more threads the loop does it.
            with suppress(RuntimeError):
                self._helpers.give(work, collected)
                return
        collected(*_outcome(work))

    def _collect(self, helpers: Helpers) -> None:
        for posted in helpers.collect():
            posted.done(posted.found, posted.error)

    # --- the end ---

    def _conclude_now(self) -> None:
        """After an interruption: settle what was answered, in this thread."""
        helpers, self._helpers = self._helpers, None
        for lane in self._lanes:
            self._put_back(*lane.hand)
            lane.hand.clear()
        if self._current is not None and self._current.has_outcome:
            self._put_back(self._current)
        # If it is interrupted once more the rest is released.
        with suppress(BaseException):
            self._conclude_ready()
        self._helpers = helpers

    def _end(self) -> None:
        """Release what is in hand, and every connection; give up those that are being opened."""
        for lane in self._lanes:
            if lane.connection is not None:
                self._let_go(lane)
            else:
                self._ready += lane.hand
        for attempt in self._ready:
            attempt.release()
            self._given_up(attempt)
        self._ready.clear()
        if self._helpers is not None:
            self._give_up_openings(self._helpers)
            self._helpers.close()

    def _give_up_openings(self, helpers: Helpers) -> None:
        opening = {lane.route for lane in self._lanes if lane.is_opening}
        for route in opening:
            route.transport.abort()
        until = time.monotonic() + GIVE_UP_SECONDS
        while opening and helpers.are_busy and (seconds := until - time.monotonic()) > 0:
            self._poll.poll(seconds * 1000)
            for posted in helpers.collect():
                posted.drop()


class Nothing:
    """See `Source`.  It is empty."""

    is_over = False
    rate_seconds = 0.0

    def look(self, number: int) -> int:
        """See `Source`."""
        return 0

    def next(self) -> IClaim | None:
        """See `Source`."""
        return None

    def pause(self) -> float | None:
        """See `Source`."""
        return None

    def ended(self, claim: IClaim, result: SendResult | None) -> None:
        """See `Source`."""


def _release(connection: IConnection | None) -> None:
    if connection is not None:
        connection.release()


def _outcome(work: Callable[[], T]) -> tuple[T, Exception | None]:
    """Do *work*, and return what it returned, or what it raised."""
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001 - it is given on
        return cast('T', None), error
