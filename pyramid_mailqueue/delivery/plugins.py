"""
Whoever wants to hear of deliveries: receivers of blinker signals, and plugins that bring them along.

A plugin is an entry point of the group ``mailqueue.plugins``, written for the Puzzle Plugin System: a module with
``initialize(context, registry)`` and ``terminate(context)``, or a class or function that returns an object with both.
In ``initialize`` it connects its receivers::

    def initialize(context, registry):
        registry.connect(MQSignal.delivery_failed, on_failure)

    def on_failure(sender, msg, send_result): ...

Receivers are called after the message has been settled, in the thread that delivered it.  What they raise is logged,
and changes nothing: a defect of theirs cannot deliver a message twice.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from schwarz.puzzle_plugins import SignalRegistry

from pyramid_mailqueue.delivery.results import SendResult
from pyramid_mailqueue.forks import call_in_children
from pyramid_mailqueue.interfaces import IClaim

__all__ = ['MQSignal', 'PluginRegistry', 'notify', 'registry']

log = logging.getLogger('mailqueue.plugins')

#: The group of entry points.
GROUP = 'mailqueue.plugins'


class MQSignal:
    """
    The names of the signals; each is sent with ``msg`` (the claim) and ``send_result``.

    ``send_result.settlement`` tells whether a failed message waits for another attempt or is given up.
    """

    delivery_successful = 'mq:delivery_successful'
    delivery_failed = 'mq:delivery_failed'


class PluginRegistry(SignalRegistry):  # type: ignore[misc]  # it publishes no types
    """Where receivers are connected, and the plugins that were asked to connect theirs."""

    def __init__(self) -> None:
        super().__init__()
        self._asked: set[str] = set()
        self._loaded: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._make_lock()
        call_in_children(self._make_lock)

    def _make_lock(self) -> None:
        # A plugin that sends mail while it is initialised comes back here.
        self._lock = threading.RLock()

    def load(self, names: Iterable[str]) -> None:
        """
        Initialise the plugins of these *names*, ``'*'`` for every one that is installed, unless that is done already.

        Returns when all of them can hear.  One that is broken or missing is logged by its name and stops no other.
        """
        with self._lock:
            new = set(names) - self._asked
            if not new:
                return
            self._asked |= new
            installed = {entry_point.name: entry_point for entry_point in entry_points(group=GROUP)}
            for missing in sorted(new - installed.keys() - {'*'}):
                log.error('The plugin %s is not installed: there is no such entry point in %s', missing, GROUP)
            for name in sorted(installed.keys() if '*' in new else installed.keys() & new):
                if name not in self._loaded:
                    self._load(installed[name])

    def _load(self, entry_point: EntryPoint) -> None:
        # Not by PluginLoader: on Python 3.10 and 3.11 that asks importlib in a deprecated way.
        context: dict[str, Any] = {}
        try:
            found = entry_point.load()
            plugin = found() if callable(found) else found
            plugin.initialize(context, self)
        except Exception:
            log.exception('The plugin %s cannot be loaded', entry_point.name)
        else:
            self._loaded[entry_point.name] = plugin, context

    def terminate(self) -> None:
        """Let the plugins write down what they have collected; who delivers after that loads them again."""
        with self._lock:
            loaded, self._loaded, self._asked = self._loaded, {}, set()
        for name, (plugin, context) in loaded.items():
            try:
                plugin.terminate(context)
            except Exception:
                log.exception('The plugin %s failed at its end', name)


#: One for the process, as plugins are.
registry = PluginRegistry()


def notify(signal: str, msg: IClaim, send_result: SendResult) -> None:
    """Call every receiver of *signal*.  Never raises."""
    for receiver in registry.signal(signal).receivers_for(None):
        try:
            receiver(None, msg=msg, send_result=send_result)
        except (Exception, SystemExit):
            log.exception('A receiver of %s failed: %r', signal, receiver)
