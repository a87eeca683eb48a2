"""
Helpers for the tests of this package and of an application.

In the tests of an application::

    config.include('pyramid_mailqueue.testing')     # before, after or instead of 'pyramid_mailqueue'
    ...
    (mail,) = captured_mail(app)                    # what was committed

is the real mailer over a queue in memory, so that it refuses what it refuses in production; see
:mod:`~.testing.outbox`.  :class:`ScriptedSMTPServer` is a real SMTP server on a real socket that says what a test wants
it to say, when the test wants it.  For pytest there is a fixture in :mod:`~.testing.fixtures`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pyramid_mailqueue.events import notify
from pyramid_mailqueue.interfaces import IMailer
from pyramid_mailqueue.testing.outbox import (
    CAPTURING,
    CapturedMail,
    CapturingMailer,
    Outbox,
    captured_mail,
    mail_discarded,
    make_mailer,
)
from pyramid_mailqueue.testing.smtp_server import (
    EXTENSIONS,
    Answer,
    Close,
    Drip,
    ReceivedMessage,
    ScriptedSMTPServer,
    ServerSession,
    Silence,
    Wait,
)

__all__ = [
    'EXTENSIONS',
    'Answer',
    'CapturedMail',
    'CapturingMailer',
    'Close',
    'Drip',
    'Outbox',
    'ReceivedMessage',
    'ScriptedSMTPServer',
    'ServerSession',
    'Silence',
    'Wait',
    'captured_mail',
    'includeme',
    'mail_discarded',
    'make_mailer',
]

# Before pyramid_mailqueue makes its mailer, which it does only if there is none.
_BEFORE_THE_LAST = 999


def includeme(config: Any) -> None:
    """
    Set up a mailer that keeps its mail in memory, in the place of that of :func:`pyramid_mailqueue.includeme`.

    It needs no settings; those present have to be valid.  Nothing is written, and nothing talks to a server.
    """
    # Programs without Pyramid call make_mailer() only.
    from pyramid_mailqueue import including, requests

    def register() -> None:
        registry = config.registry
        mailer = make_mailer(registry.settings, requests.ThreadTransaction(), partial(notify, registry))
        registry.registerUtility(mailer, IMailer)
        registry.registerUtility(mailer, IMailer, CAPTURING)

    including.name_place(config)
    config.action('pyramid_mailqueue.testing', register, order=_BEFORE_THE_LAST)
    config.include('pyramid_mailqueue')
