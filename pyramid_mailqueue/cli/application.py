"""Loads the application, for ``mq-run --app``."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import plaster
from pyramid.config import global_registries

from pyramid_mailqueue.exceptions import ConfigurationError, QueueError

__all__ = ['load']


def load(uri: str, name: str | None, overrides: Mapping[str, str]) -> Any:
    """Load the application, and return its registry; None if it is not one of Pyramid.  Raises ConfigurationError."""
    try:
        loader = plaster.get_loader(uri, protocols=['wsgi'])
        with _trouble_left_unsaid():
            app = loader.get_wsgi_app(name, dict(overrides))
    except Exception as error:
        # Pyramid wraps what is raised while it executes a deferred action.
        cause = getattr(error, 'evalue', error)
        if not isinstance(cause, ConfigurationError):
            traceback.print_exc()
            cause = ConfigurationError(f'the application cannot be loaded: {error}')
        raise cause from error
    # Middleware around an application has no registry.
    return getattr(app, 'registry', None) or global_registries.last


@contextmanager
def _trouble_left_unsaid() -> Iterator[None]:
    """Suppress records about queue errors: the run comes next, and reports an unavailable database itself."""
    logger = logging.getLogger('mailqueue.delivery')

    def is_said(record: logging.LogRecord) -> bool:
        return not any(isinstance(argument, QueueError) for argument in record.args or ())

    logger.addFilter(is_said)
    try:
        yield
    finally:
        logger.removeFilter(is_said)
