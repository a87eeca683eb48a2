"""The entry point of ``mq-run``: catches signals before it imports the rest, which is slow."""

from __future__ import annotations

from typing import NoReturn

from pyramid_mailqueue.cli.signals import EarlySignals

__all__ = ['main']


def main() -> NoReturn:
    """Run ``mq-run`` with the arguments of the process, and exit."""
    signals = EarlySignals()
    # From here on signals are heard.
    from pyramid_mailqueue.cli import run

    run.main(signals=signals)
