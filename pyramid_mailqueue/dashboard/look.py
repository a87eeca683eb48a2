"""The pages that show the queue, and change nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyramid.response import Response

from pyramid_mailqueue.dashboard.names import find, id_of
from pyramid_mailqueue.dashboard.pages import Page, admin_of, answering
from pyramid_mailqueue.dashboard.permissions import CONTENT, VIEW
from pyramid_mailqueue.interfaces import IMailer
from pyramid_mailqueue.queues.contents import MOST_OCTETS, pieces_of, read_contents
from pyramid_mailqueue.queues.entries import POSSIBLE, STATES, UNDELIVERED, Choice, ExactId, QueueEntry
from pyramid_mailqueue.settings import parse_duration

__all__ = ['add_views']

#: The number of messages on one page of a list.
PAGE = 100

#: At most so many messages are read to fill one page.
LOOKED_AT = 5_000

#: Up to so many messages are counted by domain by default: each of them has to be read.
COUNTED = 2_000

#: The number of domains shown.
DOMAINS = 20

_WHOLE = re.compile(r'[0-9]{1,9}', re.ASCII)
_NOT_IN_A_NAME = re.compile(r'[^A-Za-z0-9._-]+')


# --- the overview -------------------------------------------------------------


def overview(request: Any) -> Page:
    """Show the number of messages: first what is wrong."""
    counts, stats = _counts(request), None
    admin = admin_of(request)
    if sum(counts.values()) <= COUNTED or request.GET.get('domains') == 'all':
        stats = admin.stats(UNDELIVERED)
        counts = {state: tally.messages for state, tally in stats.by_state.items()}
    oldest = {state: admin.oldest((state,)) for state in STATES if counts[state] and state != 'corrupt'}
    values = {
        'counts': counts,
        'oldest': {state: entry.queued_at for state, entry in oldest.items() if entry is not None},
        'domains': None,
        'more_domains': 0,
        'done': request.GET.get('done', ''),
        'number': _number(request.GET.get('number')),
    }
    if stats is not None:
        values['domains'] = list(stats.by_domain.items())[:DOMAINS]
        values['more_domains'] = max(0, len(stats.by_domain) - DOMAINS)
    return Page('overview.jinja2', values)


def _counts(request: Any) -> Mapping[str, int]:
    counts: Mapping[str, int] = request.registry.getUtility(IMailer).queue.counts()
    return counts


def _number(text: str | None) -> int:
    return int(text) if text and _WHOLE.fullmatch(text) else 0


# --- the list -----------------------------------------------------------------


def list_messages(request: Any) -> Page:
    """Show a page of messages, oldest first."""
    search = {name: request.GET.get(name, '').strip() for name in ('state', *_TEXTS, *_AGES)}
    ages, problems = _ages(search)
    if search['state'] not in ('', *STATES):
        problems['state'] = f'There is no state {search["state"]!a}.'
    now, start = time.time(), _number(request.GET.get('from'))
    values = {
        'search': search,
        'problems': problems,
        'is_filtered': any(search[name] for name in search if name != 'state'),
        'states': STATES,
        'start': start,
        'page_size': PAGE,
        'done': request.GET.get('done', ''),
    }
    if problems:
        return Page('list.jinja2', {**values, 'slice': Slice(()), 'actions': (), 'total': 0}, 400)
    texts = {name: search[name] or None for name in _TEXTS}
    choice = Choice(**texts, older_than=ages.get('older_than'), newer_than=ages.get('newer_than'))
    states = (search['state'],) if search['state'] else STATES
    part = _read(admin_of(request).entries(states), choice, now, start)
    here = {entry.state for entry in part.entries}
    actions = tuple(action for action, possible in POSSIBLE.items() if here.intersection(possible))
    total = start + part.looked_at
    if part.next is not None:
        counts = _counts(request)
        total = max(total + 1, sum(counts[state] for state in states))
    return Page('list.jinja2', {**values, 'slice': part, 'actions': actions, 'total': total})


@dataclass(frozen=True)
class Slice:
    """
    What one page shows of a list.

    :param entries: the messages in it
    :param next: the position in the queue at which the next page begins; None if there is none
    :param looked_at: how many messages were looked at to find them
    """

    entries: tuple[QueueEntry, ...]
    next: int | None = None
    looked_at: int = 0


_TEXTS = ('sender', 'recipient', 'message_id')
_AGES = ('older_than', 'newer_than')


def _ages(search: dict[str, str]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the ages in the search form, and what is wrong with them."""
    ages, problems = {}, {}
    for name in _AGES:
        if search[name]:
            try:
                ages[name] = parse_duration(search[name])
            except ValueError as error:
                problems[name] = f'This {error}.'
    return ages, problems


def _read(entries: Iterable[QueueEntry], choice: Choice, now: float, start: int) -> Slice:
    """Read no more of the queue than the page needs, and at most :data:`LOOKED_AT` messages."""
    found: list[QueueEntry] = []
    position = 0
    for position, entry in enumerate(entries, 1):
        if position <= start:
            continue
        if len(found) == PAGE or position > start + LOOKED_AT:
            return Slice(tuple(found), position - 1, position - 1 - start)
        if choice.takes(entry, now):
            found.append(entry)
    return Slice(tuple(found), None, max(0, position - start))


# --- one message --------------------------------------------------------------


def show_message(request: Any) -> Page:
    """Show all that is known about a message; its content only with the permission :data:`CONTENT`."""
    admin = admin_of(request)
    entry = find(admin, id_of(request.matchdict['id']))
    contents = None
    if entry.state != 'corrupt' and request.has_permission(CONTENT):
        contents = read_contents(admin.content(ExactId(entry.id), most=MOST_OCTETS + 1))
    actions = tuple(action for action, possible in POSSIBLE.items() if entry.state in possible)
    done = request.GET.get('done', '')
    return Page('message.jinja2', {'entry': entry, 'contents': contents, 'actions': actions, 'done': done})


def download(request: Any) -> Response:
    """Return a message, byte for byte."""
    admin = admin_of(request)
    entry = find(admin, id_of(request.matchdict['id']))
    kind = 'application/octet-stream' if entry.state == 'corrupt' else 'message/rfc822'
    response = Response(app_iter=pieces_of(admin, ExactId(entry.id)), content_type=kind, content_length=entry.size)
    # An id may hold anything, but a file's name in a header must not.
    name = _NOT_IN_A_NAME.sub('_', entry.id).strip('._')[:150] or 'message'
    response.headers['Content-Disposition'] = f'attachment; filename="{name}.eml"'
    return response


def add_views(config: Any) -> None:
    """Register the routes of the dashboard, and the views that only show."""
    config.add_route('mailqueue.overview', '', inherit_slash=True)
    config.add_route('mailqueue.overview.slash', '/')
    config.add_route('mailqueue.flush', '/flush')
    config.add_route('mailqueue.list', '/messages')
    config.add_route('mailqueue.message', '/messages/{id}')
    config.add_route('mailqueue.raw', '/messages/{id}/raw')
    for route, view, permission in (
        ('overview', overview, VIEW),
        ('overview.slash', overview, VIEW),
        ('list', list_messages, VIEW),
        ('message', show_message, VIEW),
        ('raw', download, CONTENT),
    ):
        config.add_view(answering(view), route_name=f'mailqueue.{route}', request_method='GET', permission=permission)
