"""
The receivers of blinker signals about deliveries, and the plugins that connect them.

A plugin is an entry point of the group ``mailqueue.plugins``, written for the Puzzle Plugin System: a module with
``initialize(context, registry)`` and ``terminate(context)``, or a class or function that returns an object with both.
In ``initialize`` it connects its receivers::

    def initialize(context, registry):
        registry.connect(MQSignal.delivery_failed, on_failure)

    def on_failure(sender, msg, send_result): ...

A receiver of ``delivery_failed`` may end a message by returning ``MQAction.DISCARD``.  So these are called *before* the
claim is settled: the message cannot be claimed meanwhile, and the answer always takes effect.  Which recipients have
the message after this attempt is recorded before that.  If the process dies in a receiver the message is an orphan, and
is tried again for the deferred recipients: it can neither be lost nor reach a recipient twice.  Receivers of
``delivery_successful`` have nothing to decide, and are called when the claim has been settled.

All are called in the thread that delivers.  What a receiver raises is logged with its name, and changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.logs import Log, name_of
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import SendResult

if TYPE_CHECKING:
    from blinker import Signal

    class SignalRegistry:
        """What is used of that of puzzle_plugins, which publishes no types."""

        def signal(self, signal_name: str) -> Signal: ...
        def connect(self, signal_name: str, handler: Callable[..., object]) -> None: ...
        def disconnect(self, signal_name: str, handler: Callable[..., object]) -> None: ...
        def has_receivers(self, signal_name: str) -> bool: ...

else:
    from schwarz.puzzle_plugins import SignalRegistry

__all__ = ['MQAction', 'MQSignal', 'PluginMessage', 'PluginRegistry', 'call_receivers', 'registry']

log = Log('mailqueue.plugins')

#: The group of entry points.
GROUP = 'mailqueue.plugins'

#: How long the mail waits for one plugin to load, in seconds.  One that hangs must not stop it.
PATIENCE = 10


class _Word(str, Enum):
    """Text with a type of its own; it is shown as the text."""

    __str__ = str.__str__


class MQSignal(_Word):
    """
    The names of the signals; each is sent with ``msg`` (a :class:`PluginMessage`) and ``send_result``.

    Of ``delivery_failed`` the result is false; ``send_result.settlement`` tells whether the message waits for another
    attempt or is given up.  Of ``delivery_successful`` it is true; ``send_result.queued`` tells whether a queue has
    taken the message, and no server yet.
    """

    delivery_successful = 'mq:delivery_successful'
    delivery_failed = 'mq:delivery_failed'


class MQAction(_Word):
    """
    What a receiver of ``delivery_failed`` may return.

    ``DISCARD`` gives up the recipients who would wait for another attempt: they become a dead letter, with the reason
    "discarded by a plugin".
    """

    DISCARD = 'discard'


@dataclass(frozen=True)
class PluginMessage:
    """
    A message, as receivers get it.

    :param id: its name in the queue; ``''`` if it is in none
    :param envelope: the recipients that the signal is about, and the content
    :param retries: how many attempts have failed, with this one
    :param queued_at: when it came into the queue, in seconds since the epoch
    """

    id: str
    envelope: Envelope
    retries: int
    queued_at: float

    @property
    def from_addr(self) -> str:
        """The envelope sender; ``''`` is the null sender."""
        return self.envelope.sender

    @property
    def to_addrs(self) -> tuple[str, ...]:
        """The recipients that the signal is about."""
        return self.envelope.recipients

    @property
    def msg_bytes(self) -> bytes:
        """The message as it goes out."""
        return self.envelope.content

    @property
    def msg_id(self) -> str | None:
        """The Message-ID without its angle brackets."""
        return self.envelope.message_id.strip('<>') or None

    @property
    def queue_date(self) -> datetime:
        """When it came into the queue."""
        return datetime.fromtimestamp(self.queued_at, timezone.utc)

    @property
    def is_in_queue(self) -> bool:
        """Whether the attempt was made at a message of a queue."""
        return bool(self.id)


class PluginRegistry(SignalRegistry):
    """
    The connected receivers, and the plugins that connect them.

    :param patience: how long to wait for one plugin, in seconds
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        super().__init__()
        self._patience = patience
        self._asked: set[str] = set()
        # Those of them that need not be waited for any more: looked at with each message, without the lock.
        self._ready: frozenset[str] = frozenset()
        self._plugins: dict[str, _Plugin] = {}
        self._make_lock()
        call_in_children(self._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def load(self, names: Collection[str]) -> None:
        """
        Initialise the plugins of these *names*, ``'*'`` for every one that is installed, unless that is done already.

        Returns when all of them have connected their receivers.  One that is broken or missing, or that takes too long,
        is logged with its name and stops no other.
        """
        if self._ready.issuperset(names):
            return
        if isinstance(threading.current_thread(), _LoadingThread):
            # A plugin sends mail while it is initialised; the first load() is waiting for it.
            return
        with self._lock:
            new = set(names) - self._asked
            if not new:
                return
            self._asked |= new
            installed = {entry_point.name: entry_point for entry_point in entry_points(group=GROUP)}
            for missing in sorted(new - installed.keys() - {'*'}):
                log.error('The plugin %s is not installed: there is no such entry point in %s', missing, GROUP)
            for name in sorted(installed.keys() if '*' in new else installed.keys() & new):
                if name not in self._plugins:
                    self._load(installed[name])
            self._ready = frozenset(self._asked)

    def _load(self, entry_point: EntryPoint) -> None:
        plugin = self._plugins[entry_point.name] = _Plugin(entry_point, self)
        plugin.load(self._patience)

    def terminate(self) -> None:
        """Let the plugins save what they have collected; the next delivery loads them again."""
        with self._lock:
            # Those that hang are still loading, and would hang again.
            hanging = {name: plugin for name, plugin in self._plugins.items() if plugin.is_loading}
            ready = [plugin for plugin in self._plugins.values() if plugin not in hanging.values()]
            self._plugins, self._asked, self._ready = hanging, set(hanging), frozenset(hanging)
        for plugin in ready:
            plugin.terminate()


class _LoadingThread(threading.Thread):
    """
    A thread that loads a plugin.

    It has no attribute of its own: any name may be one of :class:`threading.Thread` in the next Python.
    """


class _Plugin:
    """
    One plugin, which is loaded in a thread.

    Not by Puzzle's PluginLoader: that asks importlib in a way that is deprecated on Python 3.10 and 3.11, and waits for
    ever.
    """

    def __init__(self, entry_point: EntryPoint, registry: PluginRegistry) -> None:
        self._name = entry_point.name
        self._entry_point = entry_point
        self._registry = registry
        self._context: dict[str, Any] = {}
        self._plugin: Any = None
        self._thread = _LoadingThread(target=self._initialize, name=f'mailqueue-plugin-{self._name}', daemon=True)

    def load(self, patience: float) -> None:
        """Begin to load it, and wait at most *patience* seconds for that."""
        try:
            self._thread.start()
        except RuntimeError:
            # Too many threads, or the interpreter is about to end.
            log.exception('The plugin %s cannot be loaded', self._name)
            return
        self._thread.join(patience)
        if self.is_loading:
            log.error(
                'The plugin %s is not ready after %g seconds; mail goes on without it until it is', self._name, patience
            )

    @property
    def is_loading(self) -> bool:
        return self._thread.is_alive()

    def _initialize(self) -> None:
        try:
            found = self._entry_point.load()
            plugin = found() if callable(found) else found
            plugin.initialize(self._context, self._registry)
        except BaseException:
            # Whatever it is, it ends this thread only, and is only logged.
            log.exception('The plugin %s cannot be loaded', self._name)
        else:
            self._plugin = plugin

    def terminate(self) -> None:
        if self._plugin is None:
            return
        try:
            self._plugin.terminate(self._context)
        except (Exception, SystemExit):
            log.exception('The plugin %s failed at its end', self._name)


#: One for the process, as plugins are.
registry = PluginRegistry()


def call_receivers(signal: str, msg: PluginMessage, send_result: SendResult) -> bool:
    """Call every receiver of *signal*; return whether one of them wants the message to be discarded.  Never raises."""
    answers = [_call(receiver, signal, msg, send_result) for receiver in registry.signal(signal).receivers_for(None)]
    return any(isinstance(answer, str) and answer == MQAction.DISCARD for answer in answers)


def _call(receiver: Any, signal: str, msg: PluginMessage, send_result: SendResult) -> Any:
    try:
        return receiver(None, msg=msg, send_result=send_result)
    except (Exception, SystemExit):
        log.exception('A receiver of %s failed: %s', signal, name_of(receiver))
        return None
