"""
Whoever wants to hear of deliveries: receivers of blinker signals, and plugins that bring them along.

A plugin is an entry point of the group ``mailqueue.plugins``, written for the Puzzle Plugin System: a module or an
object with ``initialize(context, registry)`` and ``terminate(context)``.  In ``initialize`` it connects its receivers::

    def initialize(context, registry):
        registry.connect(MQSignal.delivery_failed, on_failure)

    def on_failure(sender, msg, send_result): ...

Receivers are called after the message has been settled, in the thread that delivered it.  What they raise is logged,
and changes nothing: a defect of theirs cannot deliver a message twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.metadata import entry_points

from schwarz.puzzle_plugins import PluginLoader, SignalRegistry

from pyramid_mailqueue.delivery.results import SendResult
from pyramid_mailqueue.interfaces import IClaim

__all__ = ['MQSignal', 'load_plugins', 'notify', 'registry']

log = logging.getLogger('mailqueue.plugins')

#: The group of entry points.
GROUP = 'mailqueue.plugins'

#: Where receivers are connected; one for the process, as plugins are.
registry = SignalRegistry()


class MQSignal:
    """The names of the signals; each is sent with ``msg`` (the claim) and ``send_result``."""

    delivery_successful = 'mq:delivery_successful'
    delivery_failed = 'mq:delivery_failed'


def notify(signal: str, msg: IClaim, send_result: SendResult) -> None:
    """Call every receiver of *signal*.  Never raises."""
    for receiver in registry.signal(signal).receivers_for(None):
        try:
            receiver(None, msg=msg, send_result=send_result)
        except Exception:
            log.exception('A receiver of %s failed: %r', signal, receiver)


def load_plugins(names: Iterable[str]) -> list[str]:
    """
    Initialise the plugins of these *names*, ``'*'`` for every one that is installed; return the names of those loaded.

    Each gets a loader of its own, so that one that is broken or missing is reported by its name and stops no other.
    """
    installed = {entry_point.name for entry_point in entry_points(group=GROUP)}
    wanted = set(names)
    for missing in sorted(wanted - installed - {'*'}):
        log.error('The plugin %s is not installed: there is no entry point of this name in %s', missing, GROUP)
    return [name for name in sorted(installed if '*' in wanted else installed & wanted) if _load(name)]


def _load(name: str) -> bool:
    try:
        PluginLoader(GROUP, (name,), log).initialize_plugins(registry)
    except Exception:
        log.exception('The plugin %s cannot be loaded', name)
        return False
    return True
