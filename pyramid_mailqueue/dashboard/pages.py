"""
Makes responses of what the views return: templates, headers, and error pages.

The templates have an environment of their own, because an application may have changed that of pyramid_jinja2: here
everything is escaped, whatever the application does with its templates.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pyramid.csrf import get_csrf_token
from pyramid.interfaces import IDefaultCSRFOptions
from pyramid.response import Response

from pyramid_mailqueue.dashboard.names import token_of
from pyramid_mailqueue.dashboard.permissions import CHANGE, CONTENT
from pyramid_mailqueue.display import few, numbered, printable, size_in_words, span_in_words, timestamp
from pyramid_mailqueue.exceptions import MailqueueError, NoSuchMessage, WrongState
from pyramid_mailqueue.interfaces import IMailer, IQueueAdmin
from pyramid_mailqueue.queues.entries import QueueEntry

__all__ = ['Page', 'Pages', 'Unusable', 'address', 'admin_of', 'answering', 'wrong_token']

#: The headers of all responses of the dashboard: the browser keeps nothing, runs nothing, loads the stylesheet only.
HEADERS = {
    'Cache-Control': 'no-store',
    'Content-Security-Policy': "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; "
    "base-uri 'none'",
    'Referrer-Policy': 'same-origin',
    'X-Content-Type-Options': 'nosniff',
}

_KEY = 'pyramid_mailqueue.dashboard.pages'

# Where an address may be broken: before a sign that joins two words, and after a comma; inside a word only if that is
# longer than a column of a table should be.
_PIECE = re.compile(r'[@.+_-]?[^@.,+_-]{1,20},?|[@.,+_-]')


@dataclass(frozen=True)
class Page:
    """
    A page to be rendered.

    :param template: the name of its template
    :param values: what the template shows
    :param status: the status of the response
    """

    template: str
    values: dict[str, Any] = field(default_factory=dict)
    status: int = 200


class Unusable(Exception):
    """The request of a browser cannot be understood; the page shows the text."""


class Pages:
    """Renders pages; one instance for each application."""

    def __init__(self) -> None:
        self._templates = Environment(
            loader=PackageLoader('pyramid_mailqueue.dashboard'),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=_shown,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(
            pieces=_PIECE.findall,
            few=few,
            numbered=numbered,
            size=size_in_words,
            span=span_in_words,
            timestamp=timestamp,
            token=token_of,
        )

    def register(self, registry: Any) -> None:
        """Let the views of an application find it."""
        registry[_KEY] = self

    @staticmethod
    def of(request: Any) -> Pages:
        """Return the pages of an application."""
        pages: Pages = request.registry[_KEY]
        return pages

    def response(self, request: Any, page: Page) -> Response:
        """Return the response for *page*."""
        options = request.registry.queryUtility(IDefaultCSRFOptions)
        text = self._templates.get_template(page.template).render(
            page.values,
            now=time.time(),
            address=lambda name, **parts: address(request, name, **parts),
            stylesheet=request.static_path('pyramid_mailqueue.dashboard:static/dashboard.css'),
            csrf_name='csrf_token' if options is None else options.token,
            csrf_token=lambda: get_csrf_token(request),
            may_change=lambda: bool(request.has_permission(CHANGE)),
            may_read=lambda: bool(request.has_permission(CONTENT)),
            reply_of=lambda entry: _reply_of(request, entry),
        )
        return with_headers(Response(text, status=page.status, content_type='text/html', charset='utf-8'))


def _reply_of(request: Any, entry: QueueEntry) -> str:
    """Return the last reply of a server; of a corrupt file, what is wrong with it, which may quote its content."""
    if entry.state == 'corrupt' and not request.has_permission(CONTENT):
        return 'It cannot be read. The reason is shown only with the permission to read contents.'
    return entry.last_reply


def _shown(value: object) -> object:
    """Return *value* as it may be shown: no control characters, nothing that turns the direction of the text around."""
    return printable(value) if isinstance(value, str) and not hasattr(value, '__html__') else value


def with_headers(response: Response) -> Response:
    """Return *response* with the headers of all responses here."""
    response.headers.update(HEADERS)
    return response


def address(request: Any, name: str, **parts: Any) -> str:
    """Return the path to a page of the dashboard; ``_query`` is the search; what an address cannot hold is replaced."""
    if '_query' in parts:
        query = parts['_query'].items()
        parts['_query'] = [(key, str(value).encode('utf-8', 'replace').decode()) for key, value in query]
    path: str = request.route_path(f'mailqueue.{name}', **parts)
    return path


def admin_of(request: Any) -> IQueueAdmin:
    """Return the `IQueueAdmin` of the application's queue."""
    admin: IQueueAdmin = request.registry.getUtility(IMailer).queue.admin
    return admin


# --- errors -------------------------------------------------------------------

_ERRORS: tuple[tuple[type[Exception], int, str], ...] = (
    (NoSuchMessage, 404, 'There is no such message'),
    (WrongState, 409, 'That cannot be done now'),
    (Unusable, 400, 'That cannot be understood'),
    (MailqueueError, 503, 'The queue cannot be used now'),
)


def answering(view: Callable[[Any], Page | Response]) -> Callable[[Any], Response]:
    """Return a view for Pyramid that makes a response of what *view* returns, or of its error."""

    def answer(request: Any) -> Response:
        pages = Pages.of(request)
        try:
            found = view(request)
            return with_headers(found) if isinstance(found, Response) else pages.response(request, found)
        except UnicodeDecodeError:
            # From WebOb, which decodes the query string when it is accessed.
            return pages.response(request, _error(Unusable('The address of this page is not in UTF-8.')))
        except (MailqueueError, Unusable) as error:
            return pages.response(request, _error(error))

    return answer


def _error(error: Exception) -> Page:
    status, title = next((status, title) for kind, status, title in _ERRORS if isinstance(error, kind))
    return Page('error.jinja2', {'title': title, 'reason': str(error)}, status)


def wrong_token(request: Any) -> Response:
    """Answer a form whose CSRF token is missing or wrong, or that came from elsewhere."""
    reason = (
        'The form was not filled in on a page of this site, or your browser keeps no cookies. Nothing was done. Load '
        'the page once more, and try again.'
    )
    return Pages.of(request).response(
        request, Page('error.jinja2', {'title': 'This form is too old', 'reason': reason}, 400)
    )
