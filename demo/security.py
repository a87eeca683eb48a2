"""
Permissions, sessions, CSRF protection and the headers of every response.

Nothing here needs a secret on the disk: the CSRF token is compared with a cookie, and the session, which carries only
the note for the next page, is signed with a key that lives as long as the process.
"""

from __future__ import annotations

import secrets

from pyramid.csrf import CookieCSRFStoragePolicy
from pyramid.events import NewResponse
from pyramid.security import Allowed
from pyramid.session import SignedCookieSessionFactory

HEADERS = {
    'Cache-Control': 'no-store',
    'Content-Security-Policy': "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    'Referrer-Policy': 'same-origin',
    'X-Content-Type-Options': 'nosniff',
}


class EverybodyHere:
    """
    Every visitor of the demo may do everything, in the dashboard too.

    The demo listens on 127.0.0.1 only, its mail goes nowhere else, and a login would be in the way of what it shows.
    Your own app has to authenticate its users: see docs/dashboard.rst.
    """

    def identity(self, request):
        """Return the one user that every visitor is."""
        return self.authenticated_userid(request)

    def authenticated_userid(self, request):
        """Return the name that appears in the log."""
        return 'somebody-here'

    def permits(self, request, context, permission):
        """Allow everything."""
        return Allowed('Everybody who looks at the demo may do that.')

    def remember(self, request, userid, **kw):
        """There is no login."""
        return []

    def forget(self, request, **kw):
        """There is no logout."""
        return []


def add_headers(event):
    """Tell the browser to keep nothing, to load nothing from elsewhere, and not to let the pages be framed."""
    for name, value in HEADERS.items():
        # The dashboard has its own, which are stricter.
        event.response.headers.setdefault(name, value)


def includeme(config):
    """Register the security policy, the session factory, the CSRF policy for all views, and the headers."""
    config.set_security_policy(EverybodyHere())
    config.set_session_factory(SignedCookieSessionFactory(secrets.token_hex(), httponly=True, samesite='Lax'))
    config.set_csrf_storage_policy(CookieCSRFStoragePolicy(httponly=True, samesite='Lax'))
    config.set_default_csrf_options(require_csrf=True)
    config.add_subscriber(add_headers, NewResponse)
