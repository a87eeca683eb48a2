"""
Should it try again?  And when?

The policy of this package waits five minutes after the first attempt and twice as long after each further one, up to
4000 seconds, and gives up after five days::

    attempt     1      2      3      4      5      6     ...
    then wait   5m    10m    20m    40m  4000s  4000s    ...      each of them 10 % more or less
    in all      5m    15m    35m    75m   2.4h   3.5h    ...

4000 seconds is what Postfix waits at most (``maximal_backoff_time``), and five days is how long it keeps a message
(``maximal_queue_lifetime``); RFC 5321 section 4.5.4.1 asks for at least 30 minutes between attempts on the long run
and for four to five days in all.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from zope.interface import implementer

from pyramid_mailqueue.interfaces import IRetryPolicy
from pyramid_mailqueue.results import Burial, SendResult, Settlement

__all__ = ['ExponentialBackoff', 'refusals']


@implementer(IRetryPolicy)
@dataclass(frozen=True)
class ExponentialBackoff:
    """
    See `IRetryPolicy`.  All times are in seconds.

    :param first: how long to wait after the first attempt
    :param longest: no wait is longer than this
    :param lifetime: a message that is older, counted from when it came into the queue, is given up at its next failure
    :param jitter: by which fraction a wait may be longer or shorter, so that messages that failed together are not
        retried together
    """

    first: float = 300
    longest: float = 4000
    lifetime: float = 5 * 86400
    jitter: float = 0.1

    def decide(
        self, recipients: Sequence[str], attempts: int, queued_at: float, result: SendResult, now: float
    ) -> Settlement:
        """See `IRetryPolicy`."""
        burials = refusals(recipients, result)
        still_open = result.open_of(recipients)
        if not still_open:
            return Settlement(burials=burials) if burials else _DELIVERED
        replies = [str(reply) for recipient in still_open if (reply := result.replies.get(recipient))]
        is_over = now - queued_at >= self.lifetime
        stumbled = result.trouble is not None and result.trouble.in_message
        if not replies and not (is_over and stumbled):
            # The server's trouble ended the attempt before there was a reply for these.
            return Settlement(waiting=still_open, counted=False, stumbled=stumbled, burials=burials)
        if is_over:
            last = f'reply was: {replies[-1]}' if replies else f'trouble was: {result.trouble}'
            reason = f'given up after {_in_words(self.lifetime)}; the last {last}'
            return Settlement(burials=(*burials, Burial(still_open, reason)))
        due = now + self.wait_after(attempts + 1, seed=f'{queued_at}:{attempts}:{still_open[0]}')
        return Settlement(waiting=still_open, due=due, last_reply=replies[-1], burials=burials)

    def wait_after(self, attempts: int, seed: str) -> float:
        """
        Return how many seconds to wait after so many *attempts*.

        The jitter is drawn from *seed*, not from a generator: the same message always gets the same schedule.
        """
        # Beyond 60 doublings every wait has long been cut.
        wait = min(self.first * 2.0 ** min(attempts - 1, 60), self.longest)
        share = zlib.crc32(seed.encode()) / 0xFFFFFFFF
        return wait * (1 + self.jitter * (2 * share - 1))


#: All recipients have the message.
_DELIVERED = Settlement()


def refusals(recipients: Sequence[str], result: SendResult) -> tuple[Burial, ...]:
    """Return a burial for each different refusal, with all of its recipients."""
    by_reason: dict[str, list[str]] = {}
    for recipient in recipients:
        reply = result.replies.get(recipient)
        if reply is not None and reply.refused:
            by_reason.setdefault(str(reply), []).append(recipient)
    return tuple(Burial(tuple(refused), reason) for reason, refused in by_reason.items())


def _in_words(seconds: float) -> str:
    for unit, length in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * length:
            return f'{seconds / length:g} {unit}'
    return f'{seconds:g} seconds'
