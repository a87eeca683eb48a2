"""One mail that arrived."""

from __future__ import annotations

from pyramid.httpexceptions import HTTPNotFound
from pyramid.view import view_config


@view_config(route_name='mail', request_method='GET', renderer='demo:templates/mail.jinja2')
def mail(request):
    """The mail as text, and as it came over the wire."""
    found = request.registry['demo.relay'].inbox.get(request.matchdict['key'])
    if found is None:
        raise HTTPNotFound('There is no mail of this name in the inbox.')
    return {'mail': found}
