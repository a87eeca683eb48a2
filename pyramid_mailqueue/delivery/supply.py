"""
The claims of one run, in their order, shared by those who deliver them: each has one session, and a share.

A session is opened before the first message is taken for it: a server that has no room for it may keep it waiting for
minutes, while others deliver.  Until then its share is *opening*, and is of no account: it holds nothing, and nobody
waits for it.

Who gets nothing more may only end when nobody can hand anything over: a session that was opened beside others may turn
out to be one too many when its first message is announced, and its messages are then theirs.  So one waits while there
is another that is *new*, which means that it has a message and has had no success yet.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence

from pyramid_mailqueue.exceptions import MailqueueError
from pyramid_mailqueue.interfaces import IClaim

__all__ = ['Share', 'Supply']

#: A run waits no longer than this for its rate, in seconds; what is left waits in the queue, for the next run.
PATIENCE = 10

#: How soon a waiting thread sees that the run is to end, in seconds.
GLANCE = 0.1


class Supply:
    """
    See the module.

    :param claims: asked for the next one when it is needed, by one at a time
    :param limit: how many of them may be handed out
    :param take_from_rate: called with a number of sends; takes them and returns 0, or returns in how many seconds to
        ask again; of 0 sends it tells whether there could be one
    :param is_stopped: whether somebody has told the run to end; asked by those who deliver, so that none begins with
        one more message before :meth:`end` is called
    """

    def __init__(
        self,
        claims: Iterator[IClaim],
        *,
        limit: int | None = None,
        take_from_rate: Callable[[int], float] | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.error: BaseException | None = None
        self.is_rate_reached = False
        self._claims = claims
        self._left = limit
        self._take_from_rate = take_from_rate
        self._is_stopped = is_stopped
        self._has_ended = False
        # Claims that were taken and could not be used: the next ones to be handed out.
        self._returned: deque[IClaim] = deque()
        self._shares: list[Share] = []
        self._at_work = 0
        self._opening = 0
        self._new = 0
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    @property
    def is_over(self) -> bool:
        """Whether all are to end as soon as they can; what is not under way then is released."""
        return self._has_ended or self._is_stopped()

    def end(self) -> None:
        """Hand out nothing more, and let what is not under way be released."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def share(self) -> Share:
        """Return what one more works with."""
        with self._changed:
            self._at_work += 1
            self._opening += 1
            self._shares.append(share := Share(self, opens_first=self._rate_allows()))
        return share

    def ready(self, number: int) -> int:
        """Return how many sessions more would have something to do now, at most *number*."""
        if not self._rate_allows():
            return 0
        with self._lock:
            ready: list[IClaim] = []
            while len(ready) < number and (claim := self._next()) is not None:
                ready.append(claim)
            self._returned.extendleft(reversed(ready))
            return len(ready)

    @property
    def opening(self) -> int:
        """
        How many have a session that is not open yet, and no message.

        Asked without the lock: who leaves is no longer counted here before it ceases to be at work.
        """
        return self._opening

    def _rate_allows(self) -> bool:
        """Whether a message may be sent now.  If that cannot be told, whoever takes one tells why."""
        try:
            return self._take_from_rate is None or not self._take_from_rate(0)
        except (OSError, MailqueueError):
            return False

    def next_now(self, share: Share) -> IClaim | None:
        """Return the next claim, if there is one and the rate allows it at once."""
        with self._changed:
            self._has_opened(share)
            claim = self._next()
            if claim is not None:
                self._count_as_new(share)
        return claim if claim is None or not self._wait_for_rate(claim) else None

    def next(self, share: Share) -> IClaim | None:
        """Return the next claim; None if there will be no more, and then one has to end."""
        while (claim := self._next_or_wait(share)) is not None:
            seconds = self._wait_for_rate(claim)
            if not seconds:
                return claim
            if seconds > PATIENCE:
                self.is_rate_reached = True
                continue
            until = time.monotonic() + seconds
            while not self.is_over and (rest := until - time.monotonic()) > 0:
                time.sleep(min(rest, GLANCE))
        return None

    def _wait_for_rate(self, claim: IClaim) -> float:
        """Return 0 if *claim* may be sent now; else take it back, and return in how many seconds to ask again."""
        if self._take_from_rate is None:
            return 0
        try:
            recipients = claim.recipients
        except (OSError, MailqueueError):
            # Whoever delivers tells of it.
            return 0
        try:
            seconds = self._take_from_rate(len(recipients))
        except (OSError, MailqueueError) as error:
            self.fail(error)
            seconds = PATIENCE + 1
        if seconds:
            with self._changed:
                self._returned.appendleft(claim)
        return seconds

    def _next_or_wait(self, share: Share) -> IClaim | None:
        with self._changed:
            self._has_opened(share)
            # Who waits cannot become one too many.
            self._count_as_old(share)
            while (claim := self._next()) is None and self._new and not self.is_over:
                self._changed.wait()
            if claim is None:
                self._leave(share)
            else:
                self._count_as_new(share)
            return claim

    def _next(self) -> IClaim | None:
        """Called with the lock held."""
        if self.is_over or self.is_rate_reached:
            return None
        if self._returned:
            return self._returned.popleft()
        try:
            return self._claimed()
        except Exception as error:  # noqa: BLE001 - it is raised again where the run was started
            self.fail(error)
            return None

    def _claimed(self) -> IClaim | None:
        """Claim one more, if that is allowed; called with the lock held.  Raises what the queue raises."""
        claim = next(self._claims, None) if self._left != 0 else None
        if claim is not None and self._left is not None:
            self._left -= 1
        return claim

    def fail(self, error: BaseException) -> None:
        """End because of *error*, which is raised where the run was started."""
        self.error = self.error or error
        self.end()

    def hand_over(self, share: Share, claims: Sequence[IClaim]) -> bool:
        """See `Share.hand_over`."""
        with self._changed:
            if self._at_work < 2 or share.has_left:
                return False
            self._leave(share)
            self._returned.extend(claims)
            return True

    def grow_up(self, share: Share) -> bool:
        """Note that a message of *share* had its outcome; whether it is the first."""
        with self._changed:
            is_first = share.is_untried
            share.is_untried = False
            self._count_as_old(share)
            return is_first

    def lose(self, share: Share) -> None:
        """Note that one has ended by a defect, or could not go on."""
        with self._changed:
            self._leave(share)

    # --- how many are in which state; called with the lock held ---

    def _has_opened(self, share: Share) -> None:
        self._opening -= share.is_opening
        share.is_opening = False

    def _count_as_new(self, share: Share) -> None:
        self._new += share.is_untried and not share.is_new
        share.is_new = share.is_untried

    def _count_as_old(self, share: Share) -> None:
        self._new -= share.is_new
        share.is_new = False
        self._changed.notify_all()

    def _leave(self, share: Share) -> None:
        if share.has_left:
            return
        share.has_left = True
        # In this order: see `opening`.
        self._has_opened(share)
        self._at_work -= 1
        share.is_untried = False
        self._count_as_old(share)

    # --- the end ---

    def needs_sessions(self) -> bool:
        """Whether there is something to do for those who are opening one."""
        return not (self.is_over or self.is_rate_reached) and self.has_more()

    def has_more(self) -> bool:
        """Whether there is something that was not settled."""
        with self._changed:
            if not self._returned and not any(share.has_claims for share in self._shares):
                claim = self._claimed()
                if claim is None:
                    return False
                self._returned.append(claim)
            return True

    def release(self) -> None:
        """Give back what is not settled, for those that do not come back, too."""
        self.end()
        with self._changed:
            returned = [*self._returned]
            self._returned.clear()
            if isinstance(self._claims, Generator):
                # What it has claimed and not handed out it gives back by itself.
                self._claims.close()
        for claim in returned:
            claim.release()
        for share in self._shares:
            share.release()


class Share:
    """
    What one who delivers has of a supply; see `Claims`.

    :param opens_first: open the session before a message is asked for
    :ivar is_opening: no message was asked for
    :ivar is_untried: no message had its outcome
    :ivar is_new: it has a message, and is untried: it counts as new
    :ivar has_left: it takes nothing more
    """

    def __init__(self, supply: Supply, *, opens_first: bool) -> None:
        self.opens_first = opens_first
        self.is_opening = self.is_untried = True
        self.is_new = self.has_left = False
        self._supply = supply
        self._in_hand: dict[str, IClaim] = {}

    @property
    def is_over(self) -> bool:
        """See `Claims`."""
        return self._supply.is_over

    def take(self) -> IClaim | None:
        """See `Claims`."""
        return self._noted(self._supply.next(self))

    def take_now(self) -> IClaim | None:
        """See `Claims`."""
        return self._noted(self._supply.next_now(self))

    def _noted(self, claim: IClaim | None) -> IClaim | None:
        if claim is not None:
            self._in_hand[claim.id] = claim
        return claim

    def hand_over(self, claims: Sequence[IClaim]) -> bool:
        """See `Claims`."""
        if not self._supply.hand_over(self, claims):
            return False
        for claim in claims:
            self.done_with(claim)
        return True

    def done_with(self, claim: IClaim) -> None:
        """Note that a claim is settled, or somebody else's."""
        self._in_hand.pop(claim.id, None)

    def succeeded(self) -> bool:
        """Note that a message of this share had its outcome; whether it is the first."""
        return self.is_untried and self._supply.grow_up(self)

    def lost(self) -> None:
        """Note that this one has ended.  By a defect: what it was over stays claimed, and its deaths are counted."""
        self._in_hand.clear()
        self._supply.lose(self)

    @property
    def has_claims(self) -> bool:
        """Whether there is something that is not settled."""
        return bool(self._in_hand)

    def release(self) -> None:
        """Give back what is not settled."""
        for claim in self._in_hand.values():
            claim.release()
