"""What can be done with messages: in which states, by whom, and what comes of it if somebody else was faster."""

from __future__ import annotations

import logging

import pytest

from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.queues.entries import POSSIBLE
from pyramid_mailqueue.queues.memory.admin import MemoryAdmin
from pyramid_mailqueue.results import Burial, Settlement
from tests.dashboard.conftest import set_up
from tests.parts.kinds import in_a_database, in_memory
from tests.parts.states import ENVELOPE, MAKE, make_dead, make_held, make_waiting


def path_of(name):
    return f'/mailqueue/messages/{name}'


def offered_on(page):
    return [button['value'] for button in page.html.select('button[name=action]')]


def choose(page, names):
    """Check the boxes of some messages in a list."""
    for box in page.forms[1].fields['id']:
        box.checked = box._value in names
    return page.forms[1]


# --- one message --------------------------------------------------------------


@pytest.mark.parametrize('state', ['waiting', 'held', 'dead'])
@pytest.mark.parametrize('action', POSSIBLE)
def test_what_is_offered_can_be_done_and_nothing_else_is_offered(operator, dashboard, queue, state, action):
    name = MAKE[state](queue)
    page = operator.get(path_of(name))

    assert (action in offered_on(page)) == (state in POSSIBLE[action])
    if action not in offered_on(page) or action == 'delete':
        return
    after = page.form.submit('action', value=action, status=303).follow()
    assert after.html.find(role='status').get_text().startswith('The message ')
    assert dashboard.counts() == {{'hold': 'held'}.get(action, 'waiting'): 1}


@in_memory
def test_a_message_in_doubt_can_be_released(operator, dashboard, queue):
    page = operator.get(path_of(MAKE['in doubt'](queue)))

    page.form.submit('action', value='release', status=303)

    assert dashboard.counts() == {'waiting': 1}


def test_nothing_is_offered_for_what_is_being_delivered(operator, queue):
    claim = queue.put_claimed(ENVELOPE)

    assert offered_on(operator.get(path_of(claim.id))) == []
    claim.release()


def test_a_dead_letter_that_is_retried_is_shown_under_its_new_id(operator, queue):
    page = operator.get(path_of(make_dead(queue)))

    after = page.form.submit('action', value='retry').follow()

    assert after.html.h1.find(class_='id').get_text() == next(queue.admin.entries(['waiting'])).id
    assert 'The message waits, due now.' in after


def test_who_deletes_is_asked_first(operator, dashboard, queue):
    name = make_held(queue)

    asked = operator.get(path_of(name)).form.submit('action', value='delete', status=200)

    assert 'Delete 1 message for good?' in asked
    assert name in asked.html.main.get_text()
    assert dashboard.counts() == {'held': 1}
    asked.click('Keep it')
    after = asked.form.submit(status=303).follow()
    assert 'The message is deleted.' in after
    assert after.request.GET['state'] == 'held'
    assert dashboard.counts() == {}


def test_flush_makes_everything_due(operator, dashboard, queue):
    claim = queue.put_claimed(ENVELOPE)
    claim.settle(Settlement(ENVELOPE.recipients, due=4_000_000_000))

    after = operator.get('/mailqueue').form.submit(status=303).follow()

    assert '1 message made due now.' in after
    assert queue.admin.find(claim.id).due < 4_000_000_000


# --- several ------------------------------------------------------------------


def test_something_can_be_done_with_several_at_once(operator, queue, dashboard):
    names = [make_waiting(queue) for _ in range(4)]

    result = choose(operator.get('/mailqueue/messages?state=waiting'), names[1:3]).submit('action', value='hold')

    assert 'Done: 2 messages' in result
    assert [link.get_text() for link in result.html.select('.outcomes a')] == names[1:3]
    assert [dashboard.state_of(name) for name in names] == ['waiting', 'held', 'held', 'waiting']
    assert result.click('To the messages').forms[0]['state'].value == 'waiting'


def test_those_with_which_it_cannot_be_done_are_told_and_do_not_stop_the_others(operator, queue, dashboard):
    held, gone, busy, waiting = make_held(queue), make_waiting(queue), make_waiting(queue), make_waiting(queue)
    form = choose(operator.get('/mailqueue/messages'), (held, gone, busy, waiting))
    queue.admin.delete(gone)
    claim = queue.claim(busy)

    result = form.submit('action', value='hold', status=200)

    assert 'Not done: 3 messages' in result
    assert 'Done: 1 message' in result
    problems = [item.get_text() for item in result.html.select('.outcomes')[0].find_all('li')]
    assert [name in problem for name, problem in zip((held, gone, busy), problems, strict=True)] == [True] * 3
    assert dashboard.state_of(waiting) == 'held'
    claim.release()


def test_who_deletes_several_is_asked_first_and_told_what_is_gone_already(operator, queue, dashboard):
    gone, *names = [make_dead(queue) for _ in range(3)]
    form = choose(operator.get('/mailqueue/messages?state=dead'), (gone, names[0]))
    queue.admin.delete(gone)

    asked = form.submit('action', value='delete')

    assert 'Delete 1 message for good?' in asked
    assert gone in asked.html.find(role='alert').get_text()
    assert dashboard.counts() == {'dead': 2}
    result = asked.form.submit()
    assert 'Done: 1 message' in result
    assert [entry.id for entry in queue.admin.entries(['dead'])] == names[1:]


@in_memory
def test_if_all_are_gone_there_is_nothing_to_delete(operator, queue):
    name = make_dead(queue)
    form = choose(operator.get('/mailqueue/messages'), (name,))
    queue.admin.delete(name)

    assert 'Nothing is left to delete' in form.submit('action', value='delete')


@in_memory
def test_who_selects_nothing_is_told_so(operator, queue):
    make_waiting(queue)

    answer = operator.get('/mailqueue/messages').forms[1].submit('action', value='hold', status=400)

    assert 'No message was selected' in answer


@in_memory
@pytest.mark.parametrize('action', ['', 'find', '__class__', 'flush'])
def test_nothing_else_can_be_called(operator, queue, dashboard, action):
    form = operator.get(path_of(make_waiting(queue))).form

    operator.post(path_of('000001'), {'csrf_token': form['csrf_token'].value, 'action': action}, status=400)

    assert dashboard.counts() == {'waiting': 1}


@in_memory
def test_a_queue_that_fails_half_way_is_told_with_what_was_done_before(operator, queue, dashboard, monkeypatch):
    names = [make_waiting(queue) for _ in range(4)]
    form = choose(operator.get('/mailqueue/messages'), names)
    hold = MemoryAdmin.hold

    def fail_at_the_third(self, id):
        if id == names[2]:
            raise QueueError('the disk is <gone>')
        return hold(self, id)

    monkeypatch.setattr(MemoryAdmin, 'hold', fail_at_the_third)

    result = form.submit('action', value='hold', status=503)

    assert 'the disk is &lt;gone&gt;' in result
    assert '2 messages were not tried' in ' '.join(result.html.get_text().split())
    assert 'Done: 2 messages' in result
    assert dashboard.counts() == {'held': 2, 'waiting': 2}


# --- somebody else was faster -------------------------------------------------


@pytest.mark.parametrize('action', ['hold', 'retry', 'delete'])
def test_a_message_that_was_delivered_meanwhile_is_gone(operator, queue, action):
    name = make_waiting(queue)
    form = operator.get(path_of(name)).form
    queue.claim(name).settle(Settlement())

    answer = form.submit('action', value=action, status=404)

    assert 'it was delivered or deleted' in answer
    assert name in answer


@pytest.mark.parametrize('kind', ['maildir', 'memory'], indirect=True)
@pytest.mark.parametrize('action', ['hold', 'retry', 'delete'])
def test_what_is_left_of_a_message_is_not_taken_for_it(operator, queue, dashboard, action):
    name = make_waiting(queue)
    page = operator.get(path_of(name))
    burials = (Burial(ENVELOPE.recipients[:1], '550 no'),)
    queue.claim(name).settle(Settlement(burials=burials))
    (dead,) = queue.admin.entries(['dead'])
    assert dead.id.startswith(name)

    confirmed = {**dict(page.form.submit_fields()), 'action': 'delete', 'confirmed': 'yes'}
    page.form.submit('action', value=action, status=404)
    operator.post(path_of(name), confirmed, status=404)

    assert dashboard.counts() == {'dead': 1}


@pytest.mark.parametrize('action', ['hold', 'retry'])
def test_a_message_that_is_being_delivered_is_left_alone(operator, queue, dashboard, action):
    name = make_waiting(queue)
    form = operator.get(path_of(name)).form
    claim = queue.claim(name)

    answer = form.submit('action', value=action, status=409)

    assert 'That cannot be done now' in answer
    assert dashboard.counts() == {'in progress': 1}
    claim.release()


def test_what_somebody_else_has_done_is_told(operator, queue):
    name = make_waiting(queue)
    form = operator.get(path_of(name)).form
    queue.admin.hold(name)

    answer = form.submit('action', value='hold', status=409)

    assert 'it is held' in answer


# --- who may, and whose form it is ----------------------------------------------

FORMS = ['/flush', '/messages', '/messages/{id}']


@pytest.mark.parametrize('path', FORMS)
@pytest.mark.parametrize('user', ['viewer', 'reader', 'nobody'])
@in_memory
def test_who_may_not_change_anything_does_not(dashboard, queue, path, user):
    name = make_waiting(queue)
    token = dashboard.operator.get(path_of(name)).form['csrf_token'].value
    visitor = dashboard.visitor(user)
    visitor.set_cookie('csrf_token', token)
    fields = {'csrf_token': token, 'action': 'delete', 'confirmed': 'yes', 'id': name}

    visitor.post(f'/mailqueue{path.format(id=name)}', fields, status=403)

    assert dashboard.counts() == {'waiting': 1}


@pytest.mark.parametrize('path', FORMS)
@pytest.mark.parametrize('token', [{}, {'csrf_token': 'wrong'}])
@in_memory
def test_a_form_without_its_token_does_nothing(operator, dashboard, queue, path, token):
    name = make_waiting(queue)
    operator.get(path_of(name))
    fields = {**token, 'action': 'delete', 'confirmed': 'yes', 'id': name}

    answer = operator.post(f'/mailqueue{path.format(id=name)}', fields, status=400)

    assert 'This form is too old' in answer
    assert dashboard.counts() == {'waiting': 1}


@in_memory
def test_a_form_from_elsewhere_does_nothing(operator, dashboard, queue):
    name = make_waiting(queue)
    token = operator.get(path_of(name)).form['csrf_token'].value
    fields = {'csrf_token': token, 'action': 'hold'}
    elsewhere = {'Origin': 'https://evil.example', 'Host': 'site.example'}

    answer = operator.post(
        path_of(name), fields, headers=elsewhere, extra_environ={'wsgi.url_scheme': 'https'}, status=400
    )

    assert 'This form is too old' in answer
    assert dashboard.counts() == {'waiting': 1}


@in_memory
def test_a_link_changes_nothing(operator, dashboard, queue):
    name = make_waiting(queue)

    operator.get(f'/mailqueue/flush?id={name}', status=404)
    operator.get(f'{path_of(name)}?action=delete&confirmed=yes')
    operator.get(f'/mailqueue/messages?action=delete&confirmed=yes&id={name}')

    assert dashboard.counts() == {'waiting': 1}


# --- the log --------------------------------------------------------------------


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, 'mailqueue.queue_log')

    def told():
        lines = [record.mailqueue for record in caplog.records if record.name == 'mailqueue.queue_log']
        return [line for line in lines if line['status'] in ('by_hand', 'held', 'deleted', 'flushed')]

    return told


def test_the_log_says_who_has_done_what(operator, queue, told):
    name = make_waiting(queue)
    operator.get(path_of(name)).form.submit('action', value='hold')

    held, by_hand = told()
    assert (held['status'], held['id']) == ('held', name)
    assert by_hand == {'status': 'by_hand', 'id': name, 'action': 'hold', 'user': 'operator'}


@in_memory
def test_the_log_has_each_of_several_and_only_what_was_done(operator, queue, told):
    names = [make_waiting(queue) for _ in range(2)]
    form = choose(operator.get('/mailqueue/messages'), names)
    queue.admin.hold(names[0])
    form.submit('action', value='hold')
    queue.put(ENVELOPE)
    operator.get('/mailqueue').form.submit()

    by_hand = [line for line in told() if line['status'] == 'by_hand']
    assert by_hand == [
        {'status': 'by_hand', 'id': names[1], 'action': 'hold', 'user': 'operator'},
        {'status': 'by_hand', 'action': 'flush', 'messages': 0, 'user': 'operator'},
    ]


# --- transactions ---------------------------------------------------------------


def veto(request, response):
    return True


@pytest.mark.parametrize('include', [(), ('pyramid_tm',)])
def test_what_is_done_stays_done_whatever_becomes_of_the_transaction(make_dashboard, include):
    dashboard = make_dashboard(set_up, include, **{'tm.commit_veto': f'{__name__}.veto'})
    name = make_waiting(dashboard.queue)

    dashboard.operator.get(path_of(name)).form.submit('action', value='hold', status=303)

    assert dashboard.counts() == {'held': 1}


@in_a_database
def test_the_session_of_the_application_is_not_touched(make_dashboard):
    def configure(config):
        set_up(config)
        config.add_request_method(lambda request: pytest.fail('The session was asked for'), 'dbsession', reify=True)

    dashboard = make_dashboard(configure)
    name = make_waiting(dashboard.queue)

    dashboard.operator.get('/mailqueue')
    dashboard.operator.get('/mailqueue/messages').click(name).form.submit('action', value='hold', status=303)

    assert dashboard.counts() == {'held': 1}
