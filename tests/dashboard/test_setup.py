"""Including the dashboard: what an application has to have, and what it may have otherwise."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
from pyramid.authentication import RemoteUserAuthenticationPolicy
from pyramid.authorization import ACLAuthorizationPolicy, ACLHelper, Allow
from pyramid.config import Configurator
from pyramid.csrf import CookieCSRFStoragePolicy, SessionCSRFStoragePolicy
from pyramid.exceptions import ConfigurationExecutionError
from pyramid.session import SignedCookieSessionFactory

from pyramid_mailqueue.dashboard.permissions import VIEW
from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.interfaces import IMailer
from pyramid_mailqueue.message.envelope import Envelope
from tests.dashboard.conftest import Policy, set_up
from tests.parts.kinds import in_memory
from tests.parts.states import ENVELOPE

pytestmark = in_memory


def policy(config):
    config.set_security_policy(Policy())


def session(config):
    config.set_session_factory(SignedCookieSessionFactory('secret'))


def token_cookie(config):
    config.set_csrf_storage_policy(CookieCSRFStoragePolicy())


def token_in_session(config):
    config.set_csrf_storage_policy(SessionCSRFStoragePolicy())


def include(config):
    config.include('pyramid_mailqueue.dashboard')


def one_after_the_other(*steps):
    return lambda config: [step(config) for step in steps]


def test_without_a_security_policy_there_is_no_dashboard(make_dashboard):
    with pytest.raises(ConfigurationExecutionError, match='set_security_policy') as caught:
        make_dashboard(one_after_the_other(include, session))

    assert 'ConfigurationError' in str(caught.value)


@pytest.mark.parametrize('steps', [(policy,), (policy, token_in_session)])
def test_without_a_place_for_tokens_there_is_no_dashboard(make_dashboard, steps):
    with pytest.raises(ConfigurationExecutionError, match=r'set_session_factory.*set_csrf_storage_policy'):
        make_dashboard(one_after_the_other(include, *steps))


@pytest.mark.parametrize('tokens', [session, token_cookie, one_after_the_other(session, token_in_session)])
@pytest.mark.parametrize('is_first', [True, False])
def test_the_order_of_includes_and_policies_does_not_matter(make_dashboard, tokens, is_first):
    steps = (include, policy, tokens) if is_first else (tokens, policy, include)

    page = make_dashboard(one_after_the_other(*steps)).operator.get('/mailqueue')

    assert page.html.h1.get_text() == 'Overview'


@pytest.mark.parametrize('options', [{'token': None}, {'safe_methods': ('GET', 'POST')}])
def test_an_application_that_turns_tokens_off_cannot_have_it(make_dashboard, options):
    with pytest.raises(ConfigurationExecutionError, match='CSRF tokens in forms'):
        make_dashboard(one_after_the_other(set_up, lambda config: config.set_default_csrf_options(**options)))


def test_a_token_may_have_another_name(make_dashboard):
    dashboard = make_dashboard(
        one_after_the_other(set_up, lambda config: config.set_default_csrf_options(token='proof'))
    )
    name = dashboard.queue.put(ENVELOPE)

    dashboard.operator.get(f'/mailqueue/messages/{name}').form.submit('action', value='hold', status=303)

    assert dashboard.counts() == {'held': 1}


def test_legacy_policies_count_too(make_dashboard):
    def legacy(config):
        config.set_authorization_policy(ACLAuthorizationPolicy())
        config.set_authentication_policy(RemoteUserAuthenticationPolicy())
        config.set_root_factory(Root)

    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        dashboard = make_dashboard(one_after_the_other(include, token_cookie, legacy))

    dashboard.visitor('ada').get('/mailqueue')
    dashboard.visitor('eve').get('/mailqueue', status=403)


class Root:
    def __init__(self, request):
        self.__acl__ = [(Allow, 'ada', VIEW)]


class ACLPolicy(Policy):
    def permits(self, request, context, permission):
        return ACLHelper().permits(context, [self.identity(request)], permission)


def test_what_the_root_factory_says_of_permissions_holds(make_dashboard):
    def configure(config):
        config.set_root_factory(Root)
        config.set_security_policy(ACLPolicy())

    dashboard = make_dashboard(one_after_the_other(include, token_cookie, configure))

    dashboard.visitor('ada').get('/mailqueue')
    dashboard.visitor('ada').get('/mailqueue/messages/000001/raw', status=403)
    dashboard.visitor('eve').get('/mailqueue', status=403)


@pytest.mark.parametrize(('prefix', 'path'), [(None, '/mailqueue'), ('/mail/queue', '/mail/queue'), ('m', '/m')])
def test_it_is_where_the_application_wants_it(make_dashboard, prefix, path):
    def configure(config):
        config.include('pyramid_mailqueue.dashboard', route_prefix=prefix)

    operator = make_dashboard(one_after_the_other(configure, policy, token_cookie)).operator

    page = operator.get(path)
    assert operator.get(f'{path}/').html.h1 == page.html.h1
    assert page.click('Messages').request.path == f'{path}/messages'
    assert operator.get(page.html.find('link', rel='stylesheet')['href']).content_type == 'text/css'
    assert operator.get('/').text == 'home'


def test_the_mailer_comes_along_if_the_application_has_none(kind):
    with Configurator(settings={'pyramid.includes': 'pyramid_mailqueue.testing'}) as config:
        set_up(config)

    assert config.registry.getUtility(IMailer).queue.admin


def test_a_queue_that_tells_nothing_is_found_at_the_start(make_dashboard):
    class Silent:
        def close(self):
            pass

    def configure(config):
        set_up(config)
        config.action(None, lambda: config.registry.registerUtility(Silent(), IMailer), order=1000)

    with pytest.raises(ConfigurationExecutionError, match='nothing to show'):
        make_dashboard(configure)


def test_a_missing_jinja2_is_told_with_its_cure(monkeypatch, make_dashboard):
    monkeypatch.setitem(sys.modules, 'jinja2', None)
    for name in ('change', 'look', 'pages'):
        monkeypatch.delitem(sys.modules, f'pyramid_mailqueue.dashboard.{name}', raising=False)
        monkeypatch.delattr(f'pyramid_mailqueue.dashboard.{name}', raising=False)

    with pytest.raises(ConfigurationError, match=r"pip install 'pyramid_mailqueue\[dashboard\]'"):
        make_dashboard()


def test_who_has_no_dashboard_does_not_load_jinja2(kind):
    code = 'import sys, pyramid_mailqueue, pyramid_mailqueue.wiring; sys.exit("jinja2" in sys.modules)'

    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=False).returncode == 0


def test_what_an_application_does_to_its_templates_changes_nothing(make_dashboard, tmp_path, monkeypatch):
    # Jinja2 looks for templates beside the application, and the folder of the tests is no package.
    (tmp_path / 'shop_with_templates').mkdir()
    (tmp_path / 'shop_with_templates/__init__.py').write_text(
        'def includeme(config):\n    config.include("pyramid_jinja2")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = {'jinja2.autoescape': 'false', 'jinja2.undefined': '', 'jinja2.filters': 'token = builtins.repr'}

    def configure(config):
        config.include('shop_with_templates')
        set_up(config)

    dashboard = make_dashboard(configure, **settings)
    dashboard.queue.put(Envelope('', ('ada@x.example',), b'Subject: <script>\r\n\r\n'))

    page = dashboard.operator.get('/mailqueue/messages')

    assert '<script' not in page
    assert '&lt;script&gt;' in page


def test_it_works_without_pyramid_tm(make_dashboard):
    dashboard = make_dashboard(include=())
    name = dashboard.queue.put(ENVELOPE)

    dashboard.operator.get(f'/mailqueue/messages/{name}').form.submit('action', value='hold', status=303)

    assert dashboard.counts() == {'held': 1}
