"""The log files of a command, as its configuration or its settings name them.  Imported if they name any."""

from __future__ import annotations

import configparser
import logging
from logging.config import fileConfig
from logging.handlers import WatchedFileHandler
from pathlib import Path

from pyramid_mailqueue.cli.service import stream_at
from pyramid_mailqueue.exceptions import ConfigurationError

__all__ = ['configure', 'log_to']


def configure(parser: configparser.ConfigParser) -> None:
    """Set up logging as a file says in its ``[loggers]``.  Raises whatever is wrong with that."""
    fileConfig(parser, disable_existing_loggers=False)


def log_to(name: str, path: Path) -> None:
    """Log to *path*, and only there; after a rotation the file is reopened.  Raises ConfigurationError."""
    try:
        handler: logging.Handler
        if stream := stream_at(path):
            handler = logging.StreamHandler(stream)
        else:
            if not path.parent.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
            handler = WatchedFileHandler(path, encoding='utf-8')
    except OSError as exc:
        raise ConfigurationError(f'{name} = {path}: cannot be written ({exc.strerror}).') from exc
    handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s', '%Y-%m-%d %H:%M:%S%z'))
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
