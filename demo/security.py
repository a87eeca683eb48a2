"""
Sessions, CSRF protection and the headers of every answer.

Nothing here needs a secret on the disk: the CSRF token is compared with a cookie, and the session, which carries only
the note for the next page, is signed with a key that lives as long as the process.
"""

from __future__ import annotations

import secrets

from pyramid.csrf import CookieCSRFStoragePolicy
from pyramid.events import NewResponse
from pyramid.session import SignedCookieSessionFactory

HEADERS = {
    'Cache-Control': 'no-store',
    'Content-Security-Policy': "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    'Referrer-Policy': 'same-origin',
    'X-Content-Type-Options': 'nosniff',
}


def add_headers(event):
    """Tell the browser to keep nothing, to load nothing from elsewhere, and that nobody may frame the pages."""
    event.response.headers.update(HEADERS)


def includeme(config):
    """Register the session factory, the CSRF policy for all views, and the headers."""
    config.set_session_factory(SignedCookieSessionFactory(secrets.token_hex(), httponly=True, samesite='Lax'))
    config.set_csrf_storage_policy(CookieCSRFStoragePolicy(httponly=True, samesite='Lax'))
    config.set_default_csrf_options(require_csrf=True)
    config.add_subscriber(add_headers, NewResponse)
