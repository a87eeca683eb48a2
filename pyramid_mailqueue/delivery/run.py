"""One run: what is due for it, how it is told to stop, and what it did."""

from __future__ import annotations

import math
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from pyramid_mailqueue.exceptions import MailqueueError, ServerTrouble
from pyramid_mailqueue.interfaces import IClaim
from pyramid_mailqueue.results import Recovery, SendResult, Settlement

__all__ = ['STOP_SECONDS', 'Due', 'RunReport', 'Stop']

#: A run waits no longer than this for its rate; what is left waits in the queue, for the next run.
RATE_WAIT_SECONDS = 10

#: How long a run that was told to end waits for the messages in hand.
STOP_SECONDS = 30


@dataclass
class RunReport:
    """
    What a run did, in messages.

    :param sent: every recipient that was open has it
    :param deferred: at least one recipient waits because of this attempt
    :param refused: at least one recipient is given up, and in a dead letter
    :param trouble: why the run ended early, or did nothing, if the server could not be used
    :param stopped: the run ended early because it was told to
    :param rate_reached: the run ended early because ``mailqueue.rate_limit`` allows no more for a while
    :param recovery: what dead processes had left
    :param done: how many had an outcome; one message may be both deferred and refused
    """

    sent: int = 0
    deferred: int = 0
    refused: int = 0
    trouble: ServerTrouble | None = None
    stopped: bool = False
    rate_reached: bool = False
    recovery: Recovery = field(default_factory=Recovery)
    done: int = field(default=0, compare=False)

    def count(self, settlement: Settlement) -> None:
        """Count one message."""
        is_deferred = bool(settlement.waiting and settlement.counted)
        is_refused = bool(settlement.burials)
        is_sent = not (settlement.waiting or settlement.burials)
        self.sent += is_sent
        self.deferred += is_deferred
        self.refused += is_refused
        self.done += is_sent or is_deferred or is_refused


class Stop:
    """
    Tells a run to end, and wakes whoever waits here.

    :meth:`request` and :meth:`wake` may be called by a signal handler: they take no lock.

    :param on_news: called by the thread that waits, for each news
    :param on_ending: called when a run has begun to end because of it
    """

    def __init__(
        self, on_news: Callable[[], None] = lambda: None, on_ending: Callable[[], None] = lambda: None
    ) -> None:
        self._on_news = on_news
        self.on_ending = on_ending
        self.requested = False
        self.urgent = False
        # Unlike an Event it may be told something by a signal handler that interrupts its own waiting.
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()

    def request(self) -> None:
        """End when the messages in hand are done; at a second call at once."""
        self.urgent = self.requested
        self.requested = True
        self.wake()

    def wake(self) -> None:
        """Let :meth:`wait` return."""
        self._news.put(None)

    def wait(self, seconds: float | None = None) -> None:
        """Return when there is news, or after so many seconds."""
        with suppress(queue.Empty):
            self._news.get(timeout=seconds)
            self._on_news()


class Due:
    """
    What is due, for one run; see `Source`.

    :param claims: asked for the next one when it is needed
    :param limit: how many messages may be begun
    :param is_stopped: whether somebody has told the run to end
    :ivar take_from_rate: see `MessageHandler`
    :ivar on_ended: called with each claim that was settled, and its result
    :ivar error: what ended the run
    :ivar is_rate_reached: the rate allows no more for a while
    """

    def __init__(
        self,
        claims: Iterator[IClaim],
        *,
        limit: int | None,
        is_stopped: Callable[[], bool],
    ) -> None:
        self.error: BaseException | None = None
        self.is_rate_reached = False
        self._claims = claims
        self._left = limit
        self._is_stopped = is_stopped
        self.take_from_rate: Callable[[int], float] | None = None
        self.on_ended: Callable[[IClaim, SendResult], None] = lambda *_: None
        self._has_ended = False
        # Claimed, and not given to anybody yet.
        self._held: deque[IClaim] = deque()
        self._in_hand: dict[str, IClaim] = {}
        # Something was given back when the run was over.
        self._has_left = False
        # Not to ask the rate again before that (``time.monotonic()``).
        self._rate_asked_from = -math.inf

    def end(self) -> None:
        """Begin nothing more.  May be called from any thread."""
        self._has_ended = True

    def fail(self, error: BaseException) -> None:
        """End because of *error*, which is raised where the run was started."""
        self.error = self.error or error
        self.end()

    def lost(self) -> None:
        """
        End because of a defect.

        What it is about stays claimed, so that its deaths are counted; everything else was released.
        """
        self._in_hand.clear()
        self.end()

    def has_more(self) -> bool:
        """Whether there is something that was not begun, or not settled."""
        return self._has_left or bool(self._in_hand) or self._hold(1) > 0

    def release(self) -> None:
        """Give back what is not settled, for threads that do not come back, too."""
        self.end()
        if isinstance(self._claims, Generator):
            # What it has claimed and not given it gives back by itself.
            with suppress(ValueError):
                # A thread that does not come back is in the midst of it.
                self._claims.close()
        for claim in (*self._held, *self._in_hand.values()):
            claim.release()

    # --- see `Source` ---

    @property
    def is_over(self) -> bool:
        """See `Source`."""
        return self._has_ended or self._is_stopped()

    @property
    def rate_seconds(self) -> float:
        """See `Source`."""
        return max(0.0, self._rate_asked_from - time.monotonic())

    def look(self, number: int) -> int:
        """See `Source`."""
        if self.is_over or not self._hold(number) or not self._rate_allows(0):
            return 0
        return min(number, len(self._held))

    def next(self) -> IClaim | None:
        """See `Source`."""
        if self.is_over or not self._hold(1):
            return None
        claim = self._held[0]
        if not self._rate_allows(_number_of_recipients(claim)):
            return None
        self._held.popleft()
        self._in_hand[claim.id] = claim
        return claim

    def pause(self) -> float | None:
        """See `Source`."""
        if self.is_over or not self._hold(1):
            return None
        seconds = self.rate_seconds
        self.is_rate_reached = seconds > RATE_WAIT_SECONDS
        return None if self.is_rate_reached else seconds

    def ended(self, claim: IClaim, result: SendResult | None) -> None:
        """See `Source`."""
        self._in_hand.pop(claim.id, None)
        if result is not None:
            self.on_ended(claim, result)
        else:
            self._has_left |= self.is_over

    def _hold(self, number: int) -> int:
        """Claim what is due until so many are held; return how many are."""
        while len(self._held) < number and self._left != 0:
            try:
                claim = next(self._claims, None)
            except Exception as error:  # noqa: BLE001 - it is raised again where the run was started
                self.fail(error)
                claim = None
            if claim is None:
                self._left = 0
                break
            if self._left is not None:
                self._left -= 1
            self._held.append(claim)
        return len(self._held)

    def _rate_allows(self, sends: int) -> bool:
        """Whether so many may be sent now; then they are taken from the rate.  Of 0 whether there could be one."""
        if self.take_from_rate is None:
            return True
        if time.monotonic() < self._rate_asked_from:
            return False
        try:
            seconds = self.take_from_rate(sends)
        except (OSError, MailqueueError) as error:
            self.fail(error)
            return False
        self._rate_asked_from = time.monotonic() + seconds
        return not seconds


def _number_of_recipients(claim: IClaim) -> int:
    try:
        return len(claim.recipients)
    except (OSError, MailqueueError):
        # Told of when the message is read.
        return 0
