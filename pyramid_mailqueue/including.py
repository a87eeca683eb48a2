"""The package in a Pyramid application: :func:`includeme`, and ``request.mailer``."""

from __future__ import annotations

import traceback
from functools import partial
from typing import Any

from pyramid.config.actions import ActionInfo
from pyramid.events import NewRequest

from pyramid_mailqueue.application import build_mailer
from pyramid_mailqueue.events import notify
from pyramid_mailqueue.interfaces import IBindableMailer, IMailer, ITransport
from pyramid_mailqueue.requests import RequestTransaction, ThreadTransaction, watch_request
from pyramid_mailqueue.settings import Settings

__all__ = ['get_mailer', 'includeme', 'name_place']

# The order of an action that comes after those of the application, which may register transports and change settings.
_LAST = 1000


def get_mailer(request: Any) -> IMailer:
    """
    Return the mailer of *request*, bound to its transaction; the same as ``request.mailer``.

    A mailer that the application has registered itself is returned as it is, unless it is an `IBindableMailer`.

    It works wherever there is a request, but ``send()`` raises :class:`NoActiveTransaction` where nothing will commit:
    if neither pyramid_tm nor repoze.tm is active for the request, in an exception view, or after the commit; unless you
    have begun a transaction yourself (``with request.tm:``).  In a script it is up to you to commit.
    """
    mailer: IMailer = request.registry.getUtility(IMailer)
    return mailer.bound_to(RequestTransaction(request)) if IBindableMailer.providedBy(mailer) else mailer


def name_place(config: Any) -> None:
    """
    Let errors of the actions of *config* name the line of the application that has led here.

    :param config: the Configurator that an ``includeme`` was called with
    """
    for frame, line in traceback.walk_stack(None):
        if frame.f_globals.get('__name__', '').partition('.')[0] not in ('pyramid', 'pyramid_mailqueue'):
            (place,) = traceback.StackSummary.extract([(frame, line)])
            config.info = ActionInfo(place.filename, place.lineno, place.name, place.line or '')
            return


def includeme(config: Any) -> None:
    """
    Set up mail for a Pyramid application, from its ``mailqueue.*`` settings.

    Registers a utility for :class:`~.interfaces.IMailer`, unless there is one, and adds ``request.mailer``.  The
    settings are read when the configuration is committed, after all other actions, so the application may still change
    them after this call; a setting that cannot be used raises :class:`ConfigurationError` then.  A transport that
    ``mailqueue.transports`` names may be registered as a utility for :class:`~.interfaces.ITransport` of that name.
    """

    def register() -> None:
        registry = config.registry
        if registry.queryUtility(IMailer) is not None:
            # Such as that of an application's tests.
            return
        mailer = build_mailer(
            Settings.from_mapping(registry.settings),
            transactions=ThreadTransaction(),
            lookup=partial(registry.queryUtility, ITransport),
            notify=partial(notify, registry),
        )
        registry.registerUtility(mailer, IMailer)

    name_place(config)
    config.action('pyramid_mailqueue', register, order=_LAST)
    config.add_request_method(get_mailer, 'mailer', reify=True)
    config.add_subscriber(watch_request, NewRequest)


# Pyramid takes an include by the function for the same as one by the name of the package.
includeme.__module__ = __package__
