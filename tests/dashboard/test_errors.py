"""What is wrong is told to people, on a page of the dashboard: never a traceback."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, text

from pyramid_mailqueue.exceptions import ConfigurationError
from tests.parts.kinds import in_a_database, in_a_maildir
from tests.parts.states import make_waiting

PATHS = ('', '/messages', '/messages/{id}', '/messages/{id}/raw')


@pytest.mark.parametrize('path', ['/messages/nobody', '/messages/nobody/raw', '/messages/%20', '/messages/..%5cx'])
def test_an_id_that_nobody_has_is_not_found(operator, path):
    answer = operator.get(f'/mailqueue{path}', status=404)

    assert answer.html.h1.get_text() == 'There is no such message'
    assert answer.click('To the overview').status_int == 200


def test_a_mistake_in_the_configuration_that_comes_to_light_is_told_as_a_page(operator, queue, monkeypatch):
    """As when the tables of a database have gone, or its user may no longer change them."""
    name = make_waiting(queue)
    forms = [operator.get(f'/mailqueue/messages/{name}').form, operator.get('/mailqueue/messages').forms[1]]
    forms[1]['id'] = [name]

    def refuse(*_):
        raise ConfigurationError('There are no tables: run init')

    for method in ('hold', 'find', 'entries', 'flush'):
        monkeypatch.setattr(type(queue.admin), method, refuse)

    answers = [operator.get('/mailqueue/messages', status=503)]
    answers += [form.submit('action', value='hold', status=503) for form in forms]
    for answer in answers:
        assert 'There are no tables: run init' in answer


def test_an_address_that_cannot_be_read_changes_nothing(operator, queue):
    name = make_waiting(queue)
    form = operator.get('/mailqueue/messages').forms[1]
    form.action = '/mailqueue/messages?x=%ff'
    form['id'] = [name]
    form.submit('action', value='hold', status=400)

    assert queue.admin.find(name).state == 'waiting'


def test_the_beginning_of_an_id_is_not_enough(operator, queue):
    name = make_waiting(queue)

    operator.get(f'/mailqueue/messages/{name[:-1]}', status=404)


@pytest.fixture
def away(kind, settings, queue_dir):
    """Take the place away in which the messages are."""

    def away():
        if kind == 'maildir':
            queue_dir.rename(queue_dir.with_name('elsewhere'))
            return
        engine = create_engine(settings['mailqueue.sql_url'])
        with engine.begin() as connection:
            connection.execute(text('ALTER TABLE mailqueue_message RENAME TO elsewhere'))
        engine.dispose()

    return away


@pytest.mark.parametrize('kind', ['maildir', 'sqlite', 'postgresql+psycopg'], indirect=True)
def test_a_queue_that_is_away_is_told_with_the_reason(operator, queue, away):
    name = make_waiting(queue)
    page = operator.get(f'/mailqueue/messages/{name}')
    token = page.form['csrf_token'].value
    away()

    answers = [operator.get(f'/mailqueue{path.format(id=name)}', expect_errors=True) for path in PATHS[:2]]
    answers.append(operator.post('/mailqueue/flush', {'csrf_token': token}, expect_errors=True))

    for answer in answers:
        assert answer.status_int == 503
        assert 'The queue cannot be used now' in answer
        assert len(answer.html.find(role='alert').get_text()) > 10
        assert 'Traceback' not in answer


@in_a_maildir
def test_a_file_that_cannot_be_read_is_told_with_the_reason(operator, queue, monkeypatch):
    name = make_waiting(queue)

    def fail(*_):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('pyramid_mailqueue.queues.maildir.admin.read_header', fail)
    for path in PATHS[3:]:
        answer = operator.get(f'/mailqueue{path.format(id=name)}', status=503)
        assert 'Permission denied' in answer


@in_a_database
def test_a_server_that_is_back_is_used_again(operator, queue, away, settings):
    name = make_waiting(queue)
    away()
    operator.get('/mailqueue', status=503)
    engine = create_engine(settings['mailqueue.sql_url'])
    with engine.begin() as connection:
        connection.execute(text('ALTER TABLE elsewhere RENAME TO mailqueue_message'))
    engine.dispose()

    assert name in operator.get('/mailqueue/messages')
