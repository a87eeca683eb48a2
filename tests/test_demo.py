"""The demo as its visitors see it: the real app, its SMTP server on a real socket, its database, queue and commands."""

from __future__ import annotations

import contextlib
import mailbox
import os
import re
import smtplib
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from pyramid.paster import get_app
from sqlalchemy import select
from webtest import TestApp

from demo.models import SignUp
from demo.relay import Relay, RelayError
from demo.views.home import PEOPLE
from pyramid_mailqueue.interfaces import IMailer
from tests.parts.demo import DEADLINE, ROOT, end, free_ports, running, until, write_ini

BIN = Path(sys.executable).parent


@pytest.fixture
def ports():
    return dict(zip(('http', 'smtp'), free_ports(2), strict=True))


@pytest.fixture
def ini(tmp_path, ports):
    """The demo's own ini file, moved to where %(here)s is a temporary directory, with ports that are free."""
    return write_ini(tmp_path, ports)


@pytest.fixture
def wsgi(ini):
    app = get_app(str(ini))
    yield app
    app.registry.getUtility(IMailer).close()
    app.registry['demo.relay'].switch_off()
    app.registry['dbsession_factory'].kw['bind'].dispose()


@pytest.fixture
def relay(wsgi):
    return wsgi.registry['demo.relay']


@pytest.fixture
def visitor(wsgi):
    return TestApp(wsgi)


@pytest.fixture
def counts(wsgi):
    queue = wsgi.registry.getUtility(IMailer).queue
    return lambda: {state: number for state, number in queue.counts().items() if number}


@pytest.fixture
def people(wsgi):
    """Who is on the list, read past the app."""

    def people():
        with wsgi.registry['dbsession_factory']() as session:
            return list(session.scalars(select(SignUp.email).order_by(SignUp.id)))

    return people


@pytest.fixture
def arrived(tmp_path):
    """Whom mail has arrived for, read past the app."""

    def arrived():
        return sorted(mail['Delivered-To'] for mail in mailbox.Maildir(tmp_path / 'var' / 'inbox', create=False))

    return arrived


def sign_up(visitor, name, email, button=None, **options):
    form = visitor.get('/').forms[0]
    form['name'] = name
    form['email'] = email
    return form.submit(button, **options)


def press_switch(visitor):
    return visitor.get('/').forms[1].submit('switch').follow()


def run(*command, **options):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120, check=False, **options
    )


def mq_run_of(page):
    """The command as a visitor copies it, for a shell."""
    return page.html.find(id='mq-run').get_text()


# --- the sign-up ------------------------------------------------------------


def test_who_signs_up_is_on_the_list_and_gets_a_mail(visitor, people, arrived, counts):
    answer = sign_up(visitor, 'Ada Lovelace', 'ada@example.org', status=303).follow()

    assert 'Ada Lovelace is on the list' in answer.html.find(role='status').get_text()
    assert people() == ['ada@example.org']
    until(lambda: arrived() == ['ada@example.org'], 'the mail')
    until(lambda: counts() == {}, 'an empty queue')


def test_the_inbox_shows_the_mail_as_it_came(visitor, arrived):
    sign_up(visitor, 'Åse & Søn <b>', 'ase@example.org')
    until(arrived, 'the mail')

    mail = visitor.get('/').click('Welcome, Åse', verbose=True)

    assert mail.html.h1.get_text() == 'Welcome, Åse & Søn <b>'
    assert 'Hello Åse & Søn <b>,' in mail.html.find(class_='text').get_text()
    assert 'Delivered-To: ase@example.org' in mail.html.pre.get_text()


def test_if_the_view_fails_after_sending_there_is_neither_row_nor_mail(visitor, people, arrived, counts, tmp_path):
    answer = sign_up(visitor, 'Grace Hopper', 'grace@example.org', 'fail', status=500)

    assert 'No row: Grace Hopper is not on the list.' in answer
    assert people() == []
    assert counts() == {}
    assert [path for path in (tmp_path / 'var' / 'queue').rglob('*') if path.is_file()] == []
    # The next mail would come behind the one that must not come.
    sign_up(visitor, 'Ada Lovelace', 'ada@example.org')
    until(arrived, 'the mail')
    assert arrived() == ['ada@example.org']


def test_who_failed_may_try_again(visitor, people):
    sign_up(visitor, 'Grace Hopper', 'grace@example.org', 'fail', status=500)
    sign_up(visitor, 'Grace Hopper', 'grace@example.org', status=303)
    assert people() == ['grace@example.org']


def test_an_address_can_be_on_the_list_once(visitor, people, arrived, counts):
    sign_up(visitor, 'Ada Lovelace', 'ada@example.org', status=303)
    until(arrived, 'the mail')

    answer = sign_up(visitor, 'Ada again', 'ada@example.org', status=422)

    assert answer.html.find(id='email-problem').get_text() == 'This address is on the list already.'
    assert answer.forms[0]['name'].value == 'Ada again'
    assert people() == arrived() == ['ada@example.org']
    assert counts() == {}


def test_a_form_that_is_sent_twice_at_once_counts_once(wsgi, people, arrived):
    statuses = []

    def send(form, barrier):
        barrier.wait(DEADLINE)
        statuses.append(form.submit(expect_errors=True).status_int)

    barrier = threading.Barrier(2)
    threads = []
    for _ in range(2):
        form = TestApp(wsgi).get('/').forms[0]
        form['name'], form['email'] = 'Ada Lovelace', 'ada@example.org'
        threads.append(threading.Thread(target=send, args=(form, barrier)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)

    assert sorted(statuses) == [303, 422]
    assert people() == ['ada@example.org']
    until(arrived, 'the mail')
    assert arrived() == ['ada@example.org']


@pytest.mark.parametrize(
    'email',
    [
        'ada',
        'ada@',
        '@example.org',
        '"',
        'ada lovelace@example.org',
        'Ada <ada@example.org>',
        'ada@example.org, grace@example.org',
        'ada@example.org\r\nBcc: grace@example.org',
        f'{"a" * 300}@example.org',
        '',
    ],
)
def test_a_bad_address_is_told_at_its_field_and_nothing_happens(visitor, people, arrived, counts, email):
    token = visitor.get('/').forms[0]['csrf_token'].value
    answer = visitor.post('/', {'csrf_token': token, 'name': 'Ada', 'email': email}, status=422)

    problem = answer.html.find(id='email-problem').get_text()
    assert len(problem) > 20
    assert answer.html.find(id='email')['aria-describedby'] == 'email-problem'
    assert answer.forms[0]['name'].value == 'Ada'
    assert people() == arrived() == []
    assert counts() == {}


@pytest.mark.parametrize('name', ['', '   ', 'a' * 81, 'Ada\r\nBcc: grace@example.org', 'Ada\x00'])
def test_a_bad_name_is_told_at_its_field_and_nothing_happens(visitor, people, counts, name):
    token = visitor.get('/').forms[0]['csrf_token'].value
    answer = visitor.post('/', {'csrf_token': token, 'name': name, 'email': 'ada@example.org'}, status=422)

    assert answer.html.find(id='name-problem').get_text()
    assert people() == []
    assert counts() == {}


def test_the_form_proposes_somebody_who_is_not_on_the_list(visitor):
    for name, email in PEOPLE:
        form = visitor.get('/').forms[0]
        assert (form['name'].value, form['email'].value) == (name, email)
        form.submit(status=303)
    form = visitor.get('/').forms[0]
    assert (form['name'].value, form['email'].value) == ('', '')


def test_a_long_list_shows_its_newest_part(visitor, arrived):
    for number in range(13):
        sign_up(visitor, f'Number {number}', f'number{number}@example.org', status=303)
    until(lambda: len(arrived()) == 13, '13 mails')

    page = visitor.get('/')

    for part in ('live-inbox', 'live-people'):
        items = page.html.find(id=part).find_all('li')
        assert len(items) == 12
        assert 'Number 12' in items[0].get_text()
        assert 'The newest 12 of 13.' in page.html.find(id=part).get_text()


def test_a_queue_that_says_no_rolls_everything_back(visitor, people, tmp_path):
    staging = tmp_path / 'var' / 'queue' / 'tmp'
    staging.rmdir()

    answer = sign_up(visitor, 'Ada Lovelace', 'ada@example.org', status=503)

    assert 'The queue said no' in answer
    staging.mkdir()
    assert people() == []
    sign_up(visitor, 'Ada Lovelace', 'ada@example.org', status=303)


# --- the switch, the queue and mq-run ----------------------------------------


def test_while_the_server_is_off_a_sign_up_succeeds_and_mq_run_delivers_it_later(
    wsgi, visitor, people, arrived, counts
):
    page = press_switch(visitor)
    assert 'Off, nobody listens' in page

    sign_up(visitor, 'Ada Lovelace', 'ada@example.org', status=303)
    assert people() == ['ada@example.org']

    def has_one():
        return visitor.get('/').html.find(id='count-waiting').get_text() == '1'

    # It waits, is tried once, and waits again.
    (route,) = wsgi.registry.getUtility(IMailer).handler.routes
    until(lambda: route.backoff.is_in_trouble, 'an attempt')
    until(has_one, 'a waiting message')
    page = visitor.get('/')
    assert 'Turn the server on' in page.html.find(id='live-queue').get_text()

    page = press_switch(visitor)
    assert 'On, listening on 127.0.0.1' in page
    assert 'The server is on' in page.html.find(id='live-queue').get_text()
    assert arrived() == []
    done = run('sh', '-c', mq_run_of(page))

    assert done.returncode == 0, done.stderr
    assert arrived() == ['ada@example.org']
    assert counts() == {}
    assert visitor.get('/').html.find(id='count-waiting').get_text() == '0'


def test_mq_run_has_nothing_to_say_if_there_is_nothing_to_do(visitor):
    done = run('sh', '-c', mq_run_of(visitor.get('/')))
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_mq_run_says_that_it_is_the_server_s_trouble_while_the_demo_is_off(visitor, counts, ports):
    press_switch(visitor)
    sign_up(visitor, 'Ada Lovelace', 'ada@example.org')
    until(lambda: counts() == {'waiting': 1}, 'a waiting message')

    done = run('sh', '-c', mq_run_of(visitor.get('/')))

    assert done.returncode == os.EX_TEMPFAIL
    assert str(ports['smtp']) in done.stdout + done.stderr
    assert counts() == {'waiting': 1}


def test_a_refused_mail_becomes_a_dead_letter(visitor, people, arrived, counts):
    sign_up(visitor, 'Nobody', 'nobody@example.org', status=303)

    until(lambda: counts() == {'dead': 1}, 'a dead letter')
    assert visitor.get('/').html.find(id='count-dead').get_text() == '1'
    assert people() == ['nobody@example.org']
    assert arrived() == []


def test_the_switch_may_be_pressed_twice(visitor, relay):
    on = visitor.get('/').forms[1]
    on.submit('switch')
    on.submit('switch', status=303)
    assert not relay.on
    off = visitor.get('/').forms[1]
    off.submit('switch')
    off.submit('switch', status=303)
    assert relay.on


def test_the_page_says_so_if_the_port_was_taken_in_the_meantime(visitor, relay, ports):
    press_switch(visitor)
    with socket.create_server(('127.0.0.1', ports['smtp'])):
        page = press_switch(visitor)
    assert f'127.0.0.1:{ports["smtp"]}' in page.html.find(role='alert').get_text()
    assert not relay.on
    assert 'On, listening' in press_switch(visitor)


def test_turning_the_server_off_hangs_up(relay, ports):
    # Whoever keeps a session for the next mail must not wait for a server that is gone.
    with socket.create_connection(('127.0.0.1', ports['smtp']), timeout=DEADLINE) as client:
        assert client.recv(1000).startswith(b'220 ')
        relay.switch_off()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1000) == b''
    with pytest.raises(ConnectionRefusedError):
        smtplib.SMTP('127.0.0.1', ports['smtp'])


def test_a_port_that_is_taken_is_an_error_that_says_what_to_do(tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RelayError, match=f'127.0.0.1:{port}.*mailqueue.smtp_port'):
            Relay(tmp_path, port).switch_on()


# --- the page ---------------------------------------------------------------


def test_the_live_parts_are_those_of_the_page(visitor, arrived):
    sign_up(visitor, 'Ada Lovelace', 'ada@example.org')
    until(arrived, 'the mail')
    sign_up(visitor, '<script>alert(1)</script>', 'grace@example.org')
    until(lambda: len(arrived()) == 2, 'the mail')

    page, live = visitor.get('/'), visitor.get('/live')

    assert [part['id'] for part in live.html.find_all(attrs={'data-live': True})] == [
        'live-relay',
        'live-queue',
        'live-inbox',
        'live-people',
    ]
    for part in live.html.find_all(attrs={'data-live': True}):
        assert str(page.html.find(id=part['id'])) == str(part)
    assert '<script>alert' not in live.text
    assert 'no-store' in live.headers['Cache-Control']


@pytest.mark.parametrize('path', ['/', '/relay'])
def test_a_form_without_its_token_does_nothing(visitor, relay, people, path):
    visitor.get('/')
    answer = visitor.post(path, {'name': 'Ada', 'email': 'ada@example.org', 'switch': 'off'}, status=400)
    assert 'This form is too old' in answer
    assert people() == []
    assert relay.on


@pytest.mark.parametrize('path', ['/nowhere', '/inbox/nothing', '/inbox/..%2f..%2fdevelopment.ini'])
def test_what_is_not_there_is_told_kindly(visitor, path):
    assert 'Nothing here' in visitor.get(path, status=404)


def test_nothing_is_loaded_from_elsewhere(visitor):
    page = visitor.get('/')
    loaded = [tag.get('href') or tag.get('src') for tag in page.html.find_all(['link', 'script', 'img'])]
    assert len(loaded) == 4
    for address in loaded:
        body = visitor.get(address, status=200)
        assert 'http' not in body.text.replace('xmlns="http://www.w3.org/2000/svg"', '')
    assert "default-src 'self'" in page.headers['Content-Security-Policy']


def test_every_field_has_a_label(visitor):
    page = visitor.get('/').html
    fields = [field for field in page.find_all('input') if field.get('type') != 'hidden']
    assert {field['id'] for field in fields} == {'name', 'email'} == {tag['for'] for tag in page.find_all('label')}


# --- the commands -----------------------------------------------------------


def page_at(url):
    """Return the page, as soon as the server is there."""

    def get():
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=DEADLINE) as answer:
            return answer.read().decode()

    return until(get, url)


def test_the_demo_starts_with_one_command_and_ends_with_ctrl_c(ini, ports, tmp_path):
    with running(sys.executable, '-m', 'demo', ini) as (process, said):
        said(f'running:  http://127.0.0.1:{ports["http"]}/\n')
        said(re.escape(f'{BIN / "mq-run"} {ini}\n'))
        assert 'Mail that keeps its word.' in page_at(f'http://127.0.0.1:{ports["http"]}/')
        with smtplib.SMTP('127.0.0.1', ports['smtp'], local_hostname='localhost') as client:
            client.sendmail('a@example.org', ['b@example.org'], b'Subject: hello\r\n\r\nhello\r\n')
        assert 'hello' in page_at(f'http://127.0.0.1:{ports["http"]}/live')
        assert end(process) == 0
        said('The demo has ended')
    assert sorted(path.name for path in (tmp_path / 'var').iterdir()) == ['demo.sqlite', 'inbox', 'queue']


def test_the_demo_takes_another_port_if_its_own_is_taken(ini, ports):
    with (
        socket.create_server(('127.0.0.1', ports['http'])),
        running(sys.executable, '-m', 'demo', ini) as (process, said),
    ):
        said(f'Port {ports["http"]} is taken')
        url = said(r'running:  (\S+)').group(1)
        assert 'Mail that keeps its word.' in page_at(url)
        assert end(process) == 0


def test_the_demo_says_what_to_do_if_the_port_of_its_smtp_server_is_taken(ini, ports):
    with socket.create_server(('127.0.0.1', ports['smtp'])):
        done = run(sys.executable, '-m', 'demo', ini, cwd=ROOT)
    assert done.returncode == 1
    assert f'127.0.0.1:{ports["smtp"]}' in done.stderr
    assert 'Traceback' not in done.stderr


def test_pserve_starts_the_demo_too(ini, ports):
    with running(BIN / 'pserve', ini) as (process, _):
        assert 'Mail that keeps its word.' in page_at(f'http://127.0.0.1:{ports["http"]}/')
        assert end(process) == 0
