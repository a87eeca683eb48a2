"""
A fixture for pytest: the mail that a test has made the application send.

In the ``conftest.py`` of the application::

    from pyramid_mailqueue.testing.fixtures import captured_mail

It is not installed as a plugin, so that it costs nothing in projects that do not use it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.testing import outbox

__all__ = ['captured_mail']


@pytest.fixture
def captured_mail() -> Callable[..., outbox.Outbox]:
    """
    Call it for the mail of the application: see :func:`~.testing.outbox.captured_mail`.

    It is empty when the test begins.  The application may be made before, or by the test.
    """
    with suppress(ConfigurationError):
        outbox.captured_mail().clear()
    return outbox.captured_mail
