"""The line at which an application includes this package: else Pyramid's errors say "Line 0 of file None"."""

from __future__ import annotations

import traceback
from typing import Any

__all__ = ['name_place']


def name_place(config: Any) -> None:
    """
    Let errors of the actions of *config* name the line of the application that has led here.

    :param config: the Configurator that an ``includeme`` was called with
    """
    from pyramid.config.actions import ActionInfo

    for frame, line in traceback.walk_stack(None):
        if frame.f_globals.get('__name__', '').partition('.')[0] not in ('pyramid', 'pyramid_mailqueue'):
            (place,) = traceback.StackSummary.extract([(frame, line)])
            config.info = ActionInfo(place.filename, place.lineno, place.name, place.line or '')
            return
