"""The version of the package, which is in setup.cfg: imported on request, because looking it up takes a while."""

from __future__ import annotations

from importlib.metadata import version

__all__ = ['__version__']

__version__ = version('pyramid_mailqueue')
