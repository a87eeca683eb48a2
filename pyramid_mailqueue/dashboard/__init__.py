"""
The queue as web pages, inside of a Pyramid application: what ``mq-queue`` shows, and what it does.

In the application::

    config.include('pyramid_mailqueue.dashboard', route_prefix='/mailqueue')

The pages read the queue of the application's mailer and never talk to a mail server.  They need no transaction, and no
database session but the queue's own.  They are protected by the application's security policy, with the permissions
:data:`VIEW`, :data:`CONTENT` and :data:`CHANGE`.
"""

from __future__ import annotations

from typing import Any

from pyramid.csrf import LegacySessionCSRFStoragePolicy, SessionCSRFStoragePolicy
from pyramid.interfaces import ICSRFStoragePolicy, IDefaultCSRFOptions, ISecurityPolicy, ISessionFactory

from pyramid_mailqueue.dashboard.permissions import CHANGE, CONTENT, VIEW
from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.including import name_place
from pyramid_mailqueue.interfaces import IMailer
from pyramid_mailqueue.queues.base import has_admin

__all__ = ['CHANGE', 'CONTENT', 'VIEW', 'includeme']

#: The default route prefix of the pages.
PREFIX = 'mailqueue'

# The order of an action that comes after the one that makes the mailer.
_AFTER_THE_LAST = 1001


def _check(registry: Any) -> None:
    """Raise ConfigurationError if the pages would be unprotected, or could not work."""
    if registry.queryUtility(ISecurityPolicy) is None:
        raise ConfigurationError(
            'pyramid_mailqueue.dashboard needs a security policy: without one, Pyramid lets everybody read and delete '
            f'your mail. Call config.set_security_policy() with one that grants {VIEW}, {CONTENT} and {CHANGE} to '
            'those who may; "Dashboard" in the documentation has an example.'
        )
    if not _has_csrf_tokens(registry):
        raise ConfigurationError(
            'pyramid_mailqueue.dashboard needs CSRF tokens, and there is nowhere to keep them: call '
            'config.set_session_factory(), or config.set_csrf_storage_policy(pyramid.csrf.CookieCSRFStoragePolicy()).'
        )
    options = registry.queryUtility(IDefaultCSRFOptions)
    if options is not None and (not options.token or 'POST' in options.safe_methods):
        raise ConfigurationError(
            'pyramid_mailqueue.dashboard needs CSRF tokens in forms: config.set_default_csrf_options() must name a '
            'token, and must not call POST a safe method.'
        )
    mailer = registry.queryUtility(IMailer)
    if not (hasattr(mailer, 'queue') and has_admin(mailer.queue)):
        raise ConfigurationError(
            'pyramid_mailqueue.dashboard has nothing to show: the mailer of this application has no queue, or its '
            'queue has no "admin" (see IQueueAdmin).'
        )


def _has_csrf_tokens(registry: Any) -> bool:
    policy = registry.queryUtility(ICSRFStoragePolicy)
    if isinstance(policy, (LegacySessionCSRFStoragePolicy, SessionCSRFStoragePolicy)):
        return registry.queryUtility(ISessionFactory) is not None
    return policy is not None


def includeme(config: Any) -> None:
    """
    Add the pages to an application, at ``route_prefix``, by default at ``/mailqueue``.

    Registers routes and views, a static view for the stylesheet, and views for a wrong CSRF token on these routes;
    includes ``pyramid_mailqueue``.  Raises :class:`~.exceptions.ConfigurationError` without Jinja2, and, when the
    configuration is committed, if there is no security policy, nowhere to keep CSRF tokens, or no queue with an
    ``admin``.
    """
    try:
        # Jinja2 is an extra, which others can do without who import the permissions.
        from pyramid_mailqueue.dashboard import change, look, pages
    except ImportError as error:
        raise ConfigurationError(
            f"pyramid_mailqueue.dashboard needs Jinja2 ({error}): pip install 'pyramid_mailqueue[dashboard]'"
        ) from error
    config.include('pyramid_mailqueue')
    pages.Pages().register(config.registry)
    with config.route_prefix_context(None if config.route_prefix else PREFIX):
        config.add_static_view('static', 'pyramid_mailqueue.dashboard:static')
        look.add_views(config)
        change.add_views(config)
    name_place(config)
    config.action('pyramid_mailqueue.dashboard', lambda: _check(config.registry), order=_AFTER_THE_LAST)
