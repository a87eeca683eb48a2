"""What all loops of a process share: the transports in their order, the retry policy, the plugins and the rate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pyramid_mailqueue.delivery.attempt import Attempt
from pyramid_mailqueue.delivery.backoff import BackOff
from pyramid_mailqueue.delivery.plugins import registry
from pyramid_mailqueue.delivery.retry import ExponentialBackoff
from pyramid_mailqueue.delivery.route import Route
from pyramid_mailqueue.exceptions import MailqueueError, QueueError, ServerTrouble
from pyramid_mailqueue.interfaces import IClaim, IRetryPolicy, ISender
from pyramid_mailqueue.logs import Log

if TYPE_CHECKING:
    from pyramid_mailqueue.events import MailEvent

__all__ = ['Routes']

log = Log('mailqueue.delivery')

#: How many seconds a process sends nothing when it cannot find out whether the rate allows it.
RATE_TROUBLE_SECONDS = 60


class _OfThread(threading.local):
    """What is of one thread."""

    def __init__(self) -> None:
        self.disconnects: dict[Route, int] = {}


class Routes:
    """Transports in their order: who is still open after the first is offered to the next; see `MessageHandler`."""

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
        self.routes = [Route(transport) for transport in transports]
        self.connections = connections
        self.take_from_rate = take_from_rate
        self.notify = notify
        self._rate_allows_at = 0.0
        self._unwritten = BackOff()
        self.plugins = tuple(plugins)
        self._has_loaded_plugins = False
        self._of_thread = _OfThread()

    @property
    def disconnects(self) -> dict[Route, int]:
        """The disconnects that this thread has met in a row, for its engines that do not live long."""
        return self._of_thread.disconnects

    @property
    def is_backing_off(self) -> bool:
        """Whether every transport backs off after its server's trouble: trying a message now would be in vain."""
        return bool(self.routes) and all(route.backoff.trouble for route in self.routes)

    @property
    def backoff_seconds(self) -> float:
        """In how many seconds a message can be tried again; 0 if one can be tried now."""
        backoff = min((route.backoff.seconds for route in self.routes), default=0.0)
        return max(backoff, self._unwritten.seconds, self._rate_allows_at - time.monotonic(), 0.0)

    def may_send(self, message: IClaim | Attempt) -> bool:
        """Whether the rate allows to send this message now; then it is taken from it.  Never raises."""
        if self.take_from_rate is None:
            return True
        try:
            seconds = self.take_from_rate(len(message.recipients))
        except (OSError, MailqueueError) as error:
            log.error('%s Mail waits in the queue.', error)
            seconds = RATE_TROUBLE_SECONDS
        self._rate_allows_at = time.monotonic() + seconds
        return not seconds

    def back_off(self, route: Route, trouble: ServerTrouble) -> None:
        """Let a transport back off because of its server's trouble."""
        route.backoff.begin(trouble)
        if len(self.routes) > 1:
            # If this is the only one, the caller tells of its trouble.
            log.warning('The transport %s backs off: %s', route.name, trouble)

    def note_unwritten(self, reason: QueueError | None) -> None:
        """Back off if the outcome of a message cannot be written: the next one would be sent again and again, too."""
        if reason is None:
            self._unwritten.end()
        else:
            self._unwritten.begin(ServerTrouble(str(reason)))

    def next_route(self, attempt: Attempt) -> Route | None:
        """Return the transport to offer a message to; None if it is to be settled with what was said."""
        while attempt.still_open and attempt.position < len(self.routes):
            route = self.routes[attempt.position]
            trouble = route.backoff.trouble
            if trouble is None:
                return route
            attempt.note(route.still_in_trouble(trouble))
        return None

    def load_plugins(self) -> None:
        """Called before the first attempt."""
        if self.plugins:
            self._has_loaded_plugins = True
            registry.load(self.plugins)

    def close(self) -> None:
        """Close the transports' connections, and let the plugins finish.  The handler may be used again."""
        for route in self.routes:
            route.transport.close()
        if self._has_loaded_plugins:
            registry.terminate()

    def reload(self) -> None:
        """Have the transports read again what may have changed outside."""
        for route in self.routes:
            route.transport.reload()

    def abort(self) -> None:
        """Break off what is under way: the caller will not wait any longer."""
        for route in self.routes:
            route.transport.abort()
