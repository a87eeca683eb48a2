"""The pages that change messages.  The queue makes each change: durable before the response, and in the queue log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyramid.exceptions import BadCSRFOrigin, BadCSRFToken
from pyramid.httpexceptions import HTTPSeeOther

from pyramid_mailqueue.dashboard.names import find, id_of, token_of
from pyramid_mailqueue.dashboard.pages import Page, Unusable, address, admin_of, answering, wrong_token
from pyramid_mailqueue.dashboard.permissions import CHANGE
from pyramid_mailqueue.exceptions import MailqueueError, NoSuchMessage, WrongState
from pyramid_mailqueue.logs import log_event, queue_log
from pyramid_mailqueue.queues.entries import POSSIBLE, ExactId, QueueEntry

if TYPE_CHECKING:
    from pyramid.response import Response

__all__ = ['add_views']


# --- one message --------------------------------------------------------------


def change_message(request: Any) -> Page | Response:
    """Apply the action to one message, and redirect to its page, or to the list after a deletion."""
    action, do = _action(request)
    id_ = id_of(request.matchdict['id'])
    entry = find(admin_of(request), id_)
    if action == 'delete' and not _is_confirmed(request):
        return Page('confirm.jinja2', {'entries': [entry], 'problems': [], 'back': _address_of(request, id_)})
    changed = do(id_)
    query = {'done': action}
    if action == 'delete':
        return HTTPSeeOther(address(request, 'list', _query={'state': entry.state, **query}))
    return HTTPSeeOther(_address_of(request, changed.id, _query=query))


def _address_of(request: Any, id_: str, **parts: Any) -> str:
    return address(request, 'message', id=token_of(id_), **parts)


def _action(request: Any) -> tuple[str, Callable[[ExactId], QueueEntry]]:
    """Return the requested action, and the function that applies it to the id of a message."""
    action = request.POST.get('action')
    if action not in POSSIBLE:
        raise Unusable('The form does not say what is to be done. Nothing was done.')
    admin, user = admin_of(request), request.authenticated_userid
    method = getattr(admin, action)

    def do(id_: ExactId) -> QueueEntry:
        find(admin, id_)
        entry: QueueEntry = method(id_)
        log_event(queue_log, logging.INFO, status='by_hand', id=id_, action=action, user=user)
        return entry

    return action, do


def _is_confirmed(request: Any) -> bool:
    return bool(request.POST.get('confirmed') == 'yes')


# --- several ------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """
    The outcome for one message.

    :param id: as it was on the page
    :param entry: the message as it is now; None if nothing was done
    :param problem: why nothing was done
    """

    id: str
    entry: QueueEntry | None = None
    problem: str = ''


def change_messages(request: Any) -> Page:
    """Apply the action to each of several messages, and show the outcomes."""
    action, do = _action(request)
    tokens = dict.fromkeys(token for token in request.POST.getall('id') if isinstance(token, str))
    if not tokens:
        raise Unusable('No message was selected. Go back, and check the boxes of those that you mean.')
    if action == 'delete' and not _is_confirmed(request):
        return _confirmation(request, list(tokens))
    # Before anything is done: the address may be unreadable.
    back = _back(request)
    outcomes, trouble = _do_each(list(tokens), do)
    values = {
        'action': action,
        'outcomes': outcomes,
        'trouble': trouble,
        'left': len(tokens) - len(outcomes),
        'back': back,
    }
    return Page('result.jinja2', values, 503 if trouble else 200)


def _back(request: Any) -> str:
    """Return the address of the list on which the messages were selected."""
    return address(request, 'list', _query=request.GET)


def _do_each(tokens: list[str], do: Callable[[ExactId], QueueEntry]) -> tuple[list[Outcome], str]:
    """Apply the action to each; a message for which it is impossible does not stop the others, a broken queue does."""
    outcomes: list[Outcome] = []
    for token in tokens:
        try:
            id_ = id_of(token)
            outcomes.append(Outcome(id_, do(id_)))
        except (NoSuchMessage, WrongState) as error:
            outcomes.append(Outcome(token, problem=str(error)))
        except MailqueueError as error:
            return outcomes, str(error)
    return outcomes, ''


def _confirmation(request: Any, tokens: list[str]) -> Page:
    entries, problems = [], []
    for token in tokens:
        try:
            entries.append(find(admin_of(request), id_of(token)))
        except NoSuchMessage as error:
            problems.append(str(error))
    return Page('confirm.jinja2', {'entries': entries, 'problems': problems, 'back': _back(request)})


# --- all ----------------------------------------------------------------------


def flush(request: Any) -> Response:
    """Make all waiting messages due now."""
    user = request.authenticated_userid
    number = admin_of(request).flush()
    log_event(queue_log, logging.INFO, status='by_hand', action='flush', messages=number, user=user)
    return HTTPSeeOther(address(request, 'overview', _query={'done': 'flush', 'number': number}))


def add_views(config: Any) -> None:
    """Register the views that change something; the routes exist already."""
    for route, view in (('message', change_message), ('list', change_messages), ('flush', flush)):
        name = f'mailqueue.{route}'
        config.add_view(answering(view), route_name=name, request_method='POST', permission=CHANGE, require_csrf=True)
        for error in (BadCSRFToken, BadCSRFOrigin):
            config.add_exception_view(wrong_token, context=error, route_name=name)
