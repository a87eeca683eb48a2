"""
Settings that are not in a file which is named plainly: what plaster makes of their address.

Imported for such an address only: plaster takes long to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plaster
import plaster_pastedeploy

from pyramid_mailqueue.exceptions import ConfigurationError

__all__ = ['locate']

# The schemes that plaster gives to plain paths with these suffixes: known without searching the installed packages.
_INI_SCHEMES = ('file+ini', 'file+conf', 'file+cfg')


def locate(uri: str) -> tuple[str, str | None, Mapping[str, str], Any]:
    """
    Return the path and the name of an app, further variables, and what loads it if it is not in an ini file, or None.

    Raises :class:`~.exceptions.ConfigurationError`.
    """
    try:
        url = plaster.parse_uri(uri)
    except plaster.InvalidURI:
        # A file without a suffix.
        path, _, name = uri.partition('#')
        return path, name or None, {}, None
    loader = None if url.scheme in _INI_SCHEMES else _loader_of(uri, url)
    return url.path, url.fragment or None, url.options, loader


def _loader_of(uri: str, url: Any) -> Any:
    """Return None for an ini file."""
    try:
        loader = plaster.get_loader(url, ['wsgi'])
    except plaster.LoaderNotFound as exc:
        if url.scheme.startswith('file+'):
            return None
        raise ConfigurationError(f'{uri}: nothing is installed that reads such a source. Name an ini file.') from exc
    except plaster.MultipleLoadersFound as exc:
        raise ConfigurationError(f'{uri}: {exc}') from exc
    # ``pastedeploy://app.ini`` is an ini file too; ``egg://name`` is not.
    is_ini_file = isinstance(loader, plaster_pastedeploy.Loader) and loader.filepath is not None
    return None if is_ini_file else loader
