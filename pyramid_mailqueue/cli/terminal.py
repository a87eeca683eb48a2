"""What can be painted on a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from pyramid_mailqueue.cli.service import is_terminal

if TYPE_CHECKING:
    from pyramid_mailqueue.cli.painter import Painter

__all__ = ['painter_on']


def painter_on(stream: TextIO) -> Painter | None:
    """Return what paints on *stream*; None if that is no terminal, or if there is no rich (the extra ``cli``)."""
    if not is_terminal(stream):
        return None
    try:
        # An extra, and slow.
        from pyramid_mailqueue.cli.painter import Painter
    except ImportError:
        return None
    return Painter(stream)
