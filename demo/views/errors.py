"""Error pages; with all of them the transaction is rolled back."""

from __future__ import annotations

import logging

from pyramid.exceptions import BadCSRFToken
from pyramid.view import exception_view_config, notfound_view_config

from demo.views.home import FailedAfterwardsError
from pyramid_mailqueue.exceptions import QueueError

log = logging.getLogger(__name__)


@exception_view_config(FailedAfterwardsError, renderer='demo:templates/failed.jinja2')
def failed_afterwards(error, request):
    """The second button did what it promised."""
    request.response.status_int = 500
    (form,) = error.args
    return {'form': form}


@exception_view_config(QueueError, renderer='demo:templates/error.jinja2')
def queue_said_no(error, request):
    """The queue could not take the mail (a full disk, a wrong permission), so the commit did not happen."""
    log.error('nothing was committed: %s', error)
    request.response.status_int = 503
    return {
        'title': 'The queue said no',
        'text': 'The mail could not be written to the queue, so the whole transaction was rolled back: nobody was '
        'signed up. The log says what is wrong with the queue; try again when it is repaired.',
    }


@exception_view_config(BadCSRFToken, renderer='demo:templates/error.jinja2')
def page_too_old(error, request):
    """The form came without its token."""
    request.response.status_int = 400
    return {
        'title': 'This form is too old',
        'text': 'The form was not filled in on a page of this app, or your browser keeps no cookies. Nothing was done.',
    }


@notfound_view_config(renderer='demo:templates/error.jinja2', append_slash=True)
def not_found(error, request):
    """No such page."""
    request.response.status_int = 404
    return {'title': 'Nothing here', 'text': error.detail or 'There is no page at this address.'}
