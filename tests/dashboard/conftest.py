"""Applications with a dashboard, over a queue of each kind, and people who may do different things there."""

from __future__ import annotations

import pytest
from pyramid.csrf import CookieCSRFStoragePolicy
from pyramid.security import Allowed, Denied
from webtest import TestApp

from pyramid_mailqueue.dashboard.permissions import CHANGE, CONTENT, VIEW
from pyramid_mailqueue.interfaces import IMailer
from tests.parts.databases import create_queue_tables

KINDS = ('maildir', 'memory', 'sqlite', 'postgresql+psycopg')

MAY = {
    'viewer': (VIEW,),
    'reader': (VIEW, CONTENT),
    'mover': (VIEW, CHANGE),
    'operator': (VIEW, CONTENT, CHANGE),
}


class Policy:
    """The web server knows who somebody is."""

    def identity(self, request):
        return request.environ.get('REMOTE_USER')

    authenticated_userid = identity

    def permits(self, request, context, permission):
        return (Allowed if permission in MAY.get(self.identity(request), ()) else Denied)('as the test has it')


class Dashboard:
    """An application with a dashboard, and its queue."""

    def __init__(self, app):
        self.wsgi = app.app
        self.queue = app.app.registry.getUtility(IMailer).queue
        self.operator = self.visitor('operator')

    def visitor(self, user):
        """Somebody with a browser."""
        return TestApp(self.wsgi, extra_environ={'REMOTE_USER': user})

    def state_of(self, id_):
        return self.queue.admin.find(id_).state

    def counts(self):
        return {state: number for state, number in self.queue.counts().items() if number}


def set_up(config):
    config.include('pyramid_mailqueue.dashboard')
    config.set_security_policy(Policy())
    config.set_csrf_storage_policy(CookieCSRFStoragePolicy())


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def settings(kind, make_settings, request):
    """The settings of an application with a queue of this kind, which tries nothing on its own."""
    own = make_settings(smtp_hostname='127.0.0.1', delivery='queue')
    if kind == 'memory':
        return {**own, 'pyramid.includes': 'pyramid_mailqueue.testing'}
    if kind == 'maildir':
        return own
    url = request.getfixturevalue('make_database')(kind)
    create_queue_tables(url)
    return {**own, 'mailqueue.queue': 'sql', 'mailqueue.sql_url': url}


@pytest.fixture
def make_dashboard(make_app, settings):
    """Make an application; *configure* is called with the configurator."""

    def make_dashboard(configure=set_up, include=('pyramid_tm',), **own):
        return Dashboard(make_app(lambda _: 'home', settings | own, include=include, configure=configure))

    return make_dashboard


@pytest.fixture
def dashboard(make_dashboard):
    return make_dashboard()


@pytest.fixture
def operator(dashboard):
    return dashboard.operator


@pytest.fixture
def queue(dashboard):
    return dashboard.queue
