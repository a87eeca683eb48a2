"""The parts of the page that update themselves: the server, the queue, the inbox and the list."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from pyramid.httpexceptions import HTTPSeeOther
from pyramid.view import view_config
from sqlalchemy import func, select

from demo.models import SignUp
from demo.relay import RelayError

SHOWN = 12


def live_parts(request):
    """Return what ``live.jinja2`` shows."""
    relay = request.registry['demo.relay']
    newest = select(SignUp).order_by(SignUp.id.desc()).limit(SHOWN)
    return {
        'relay': relay,
        'counts': request.mailer.queue.counts(),
        'mails': relay.inbox.latest(SHOWN),
        'mails_total': len(relay.inbox),
        'signups': request.dbsession.scalars(newest).all(),
        'signups_total': request.dbsession.scalar(select(func.count(SignUp.id))),
        'mq_run': mq_run(request.registry.settings['demo.ini']),
    }


def mq_run(ini):
    """Return the command that delivers what waits, to be pasted into a terminal in any directory."""
    return shlex.join([str(Path(sys.executable).with_name('mq-run')), ini])


@view_config(route_name='live', request_method='GET', renderer='demo:templates/live.jinja2')
def live(request):
    """The parts alone; the script of the page asks for them every other second."""
    return live_parts(request)


@view_config(route_name='relay', request_method='POST')
def switch(request):
    """Turn the SMTP server on or off."""
    relay = request.registry['demo.relay']
    if request.POST.get('switch') != 'on':
        relay.switch_off()
        return HTTPSeeOther(request.route_url('home'))
    try:
        relay.switch_on()
    except RelayError as error:
        request.session.flash(str(error), 'problem')
    return HTTPSeeOther(request.route_url('home'))
