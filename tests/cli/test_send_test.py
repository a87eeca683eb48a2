"""The command ``mq-send-test`` as a person starts it: a process of its own, an ini file, a queue and a server."""

from __future__ import annotations

import base64
import getpass
import os
import signal
import ssl
import subprocess
import sys
from email import message_from_bytes
from email.policy import default

import pytest
import trustme

from pyramid_mailqueue.cli import send_test
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.testing import EXTENSIONS, Close, ScriptedSMTPServer, Silence, Wait
from tests.parts.console import CONSOLE

PASSWORD = 'correct-horse'
TO = '--to=ada@x.example'


@pytest.fixture
def server():
    with ScriptedSMTPServer() as server:
        yield server


@pytest.fixture
def app_ini(tmp_path, queue_dir):
    """An ini file of an app, which has created its queue: ``app_ini(server, key=value)``."""

    def app_ini(server=None, more='', **own):
        MaildirQueue(queue_dir)
        own = {'queue_dir': '%(here)s/queue', 'smtp_hostname': '127.0.0.1', **own}
        if server is not None:
            own['smtp_port'] = server.port
        keys = '\n'.join(f'mailqueue.{key} = {value}' for key, value in own.items())
        path = tmp_path / 'app.ini'
        path.write_text(f'[app:main]\nuse = egg:not_installed\n{keys}\n{more}')
        return path

    return app_ini


@pytest.fixture
def start(tmp_path):
    """Start a command, ``mq-send-test`` unless it is told otherwise."""
    processes = []

    def start(*arguments, module='pyramid_mailqueue.cli.send_test', **options):
        # What the tests have installed lies in the same folder.
        env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])}
        options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'env': env, **options}
        processes.append(subprocess.Popen([sys.executable, '-m', module, *map(str, arguments)], **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def mq_send_test(start):
    """Run ``mq-send-test`` to its end; return the exit status and what was printed to stdout and stderr."""

    def mq_send_test(*arguments, **options):
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return mq_send_test


@pytest.fixture
def state(queue_dir):
    """How many messages there are in each folder that has any."""

    def state():
        folders = [path for path in queue_dir.iterdir() if path.is_dir()]
        return {path.name: count for path in folders if (count := len(list(path.iterdir())))}

    return state


# --- it gets through --------------------------------------------------------


def test_the_message_goes_the_way_of_the_application_and_nothing_stays_behind(mq_send_test, app_ini, server, state):
    ini = app_ini(server, default_sender='shop@site.example', smtp_local_hostname='web1.site.example')

    status, out, err = mq_send_test(ini, TO)

    assert (status, err, state()) == (0, '', {})
    (received,) = server.messages
    assert (received.sender, received.recipients) == ('shop@site.example', ('ada@x.example',))
    message = message_from_bytes(received.content, policy=default)
    assert (message['From'], message['To'], message['Subject']) == (
        'shop@site.example',
        'ada@x.example',
        'Test from web1.site.example',
    )
    assert message['Auto-Submitted'] == 'auto-generated'
    first, *_, last = out.splitlines()
    assert first == (
        f'mq-send-test: from <shop@site.example> to <ada@x.example>, by smtp (127.0.0.1, port {server.port})'
    )
    assert last == (
        f'mq-send-test: sent. smtp:127.0.0.1:{server.port} has accepted {message["Message-ID"]} '
        'and said: 250 2.0.0 accepted'
    )


def test_the_dialog_is_shown_and_the_content_is_not(mq_send_test, app_ini, server):
    _, out, _ = mq_send_test(app_ini(server), TO, '--from=Shop <shop@site.example>')

    size = len(server.messages[0].content)
    assert [line for line in out.splitlines() if not line.startswith('mq-send-test')] == [
        '  S: 220 scripted.test ESMTP',
        f'  C: {server.sessions[0].commands[0]}',
        '  S: 250 scripted.test',
        *(f'  S: 250 {extension}' for extension in EXTENSIONS),
        f'  C: MAIL FROM:<shop@site.example> SIZE={size}',
        '  C: RCPT TO:<ada@x.example>',
        '  C: DATA',
        '  S: 250 2.1.0 sender ok',
        '  S: 250 2.1.5 recipient ok',
        '  S: 354 go ahead',
        f'  C: <{size} bytes of data>',
        '  S: 250 2.0.0 accepted',
    ]


LOGGING = """
[loggers]
keys = root
[handlers]
keys = file
[formatters]
keys =
[logger_root]
level = DEBUG
handlers = file
[handler_file]
class = FileHandler
args = ('%(here)s/app.log',)
"""


def test_the_dialog_is_shown_here_and_in_no_log(mq_send_test, app_ini, server, tmp_path):
    _, out, _ = mq_send_test(app_ini(server, LOGGING), TO)

    assert 'C: DATA' in out
    assert 'DATA' not in (tmp_path / 'app.log').read_text()


def test_the_outcome_is_in_the_delivery_log(mq_send_test, app_ini, server, tmp_path):
    mq_send_test(app_ini(server, delivery_log='%(here)s/delivery.log'), TO)

    (line,) = (tmp_path / 'delivery.log').read_text().splitlines()
    assert 'status=sent' in line
    assert 'to=ada@x.example' in line


def test_plugins_do_not_hear_of_it(mq_send_test, app_ini, server, tmp_path):
    (tmp_path / 'noisy.py').write_text(
        "def initialize(context, registry):\n    raise SystemExit('a plugin is loaded')\n"
    )
    info = tmp_path / 'noisy-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: noisy\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text('[mailqueue.plugins]\nnoisy = noisy\n')

    status, _, err = mq_send_test(app_ini(server), TO)

    assert (status, err) == (0, '')


def test_who_sends_it_if_nobody_is_named_is_this_user(mq_send_test, app_ini, server):
    mq_send_test(app_ini(server, smtp_local_hostname='web1.site.example'), TO)

    assert server.messages[0].sender == f'{getpass.getuser()}@web1.site.example'


NOBODY = """
import getpass
from pyramid_mailqueue.cli import send_test

def getuser():
    raise KeyError('getpwuid(): uid not found: 12345')

getpass.getuser = getuser
send_test.main()
"""


def test_a_user_without_a_name_can_send_it_too(mq_send_test, app_ini, server, tmp_path):
    (tmp_path / 'nobody.py').write_text(NOBODY)

    mq_send_test(app_ini(server, smtp_local_hostname='web1.site.example'), TO, module='nobody')

    assert server.messages[0].sender == 'postmaster@web1.site.example'


def test_a_sender_may_be_named_before_that_of_the_settings(mq_send_test, app_ini, server):
    mq_send_test(app_ini(server, default_sender='shop@site.example'), '--to', 'ada@x.example', '--from', 'me@x.example')

    assert server.messages[0].sender == 'me@x.example'


# --- as mailqueue-runner takes it ---------------------------------------------


@pytest.fixture
def runner_ini(tmp_path, server):
    """The configuration of mailqueue-runner: ``runner_ini('key = value')``."""

    def runner_ini(more=''):
        ini = tmp_path / 'config.ini'
        ini.write_text(
            f'[mqrunner]\nsmtp_hostname = 127.0.0.1\nsmtp_port = {server.port}\nfrom = runner@site.example\n{more}\n'
        )
        return ini

    return runner_ini


@pytest.mark.parametrize(
    'queue',
    [['{queue}'], ['--queue-dir', '{queue}'], ['--queue-dir={queue}']],
    ids=['behind the file', 'an option', 'an option with ='],
)
def test_a_mqrunner_section_and_a_queue_are_used(mq_send_test, runner_ini, queue_dir, server, queue):
    MaildirQueue(queue_dir)

    status, _, _ = mq_send_test(
        runner_ini(), *(word.format(queue=queue_dir) for word in queue), '--to', 'ada@x.example'
    )

    assert status == 0
    assert server.messages[0].sender == 'runner@site.example'
    assert [path for path in queue_dir.rglob('*') if path.is_file()] == []


@pytest.mark.parametrize('has_queue', [False, True])
@pytest.mark.parametrize(
    'arguments',
    [
        ['{ini}', '--to=ada@x.example'],
        ['--to=ada@x.example', '{ini}'],
        ['--quiet', '{ini}', '-v', '--to', 'ada@x.example', '--from=me@site.example'],
        ['-C', '{ini}', '--to=ada@x.example'],
        ['--verbose', '--config={ini}', '--to=ada@x.example'],
    ],
    ids=str,
)
def test_every_release_of_mailqueue_runner_takes_it_so(
    mq_send_test, runner_ini, tmp_path, queue_dir, server, arguments, has_queue
):
    """0.9 and 0.10 have the file in its place, later ones behind an option; none of them looks at the queue."""
    ini = runner_ini('queue_dir = %(here)s/queue' if has_queue else '')
    if has_queue:
        MaildirQueue(queue_dir)
    before = sorted(tmp_path.rglob('*'))

    status, out, err = mq_send_test(*(word.format(ini=ini) for word in arguments))

    assert (status, err) == (0, '')
    assert (out == '') == ('--quiet' in arguments)
    (message,) = server.messages
    sender = 'me@site.example' if '--from=me@site.example' in arguments else 'runner@site.example'
    assert (message.sender, message.recipients) == (sender, ('ada@x.example',))
    assert sorted(tmp_path.rglob('*')) == before


def test_the_file_in_the_home_is_used_if_none_is_named(mq_send_test, runner_ini, tmp_path, server):
    runner_ini().rename(tmp_path / '.mailqueue-runner.conf')

    assert mq_send_test(TO, env={**os.environ, 'HOME': str(tmp_path)})[0] == 0
    assert len(server.messages) == 1


def test_what_fails_is_told_if_quiet_too(mq_send_test, runner_ini, server):
    server.script['RCPT'] = '550 no such user'

    status, out, err = mq_send_test(runner_ini(), '--quiet', TO)

    assert (status, out) == (69, '')
    assert '550 no such user' in err


def test_two_queue_directories_are_a_mistake_on_the_command_line(mq_send_test, runner_ini, queue_dir):
    status, _, err = mq_send_test(runner_ini(), queue_dir, '--queue-dir=other', TO)

    assert status == 2
    assert err.endswith(f'error: name one queue directory, not several: {queue_dir}, other\n')


@pytest.mark.parametrize('make', [lambda path: None, lambda path: path.mkdir()], ids=['nothing', 'empty'])
def test_no_queue_is_made_where_there_is_none(mq_send_test, runner_ini, queue_dir, server, make):
    make(queue_dir)

    status, out, err = mq_send_test(runner_ini(), '--queue-dir', queue_dir, TO)

    assert (status, out) == (78, '')
    assert f'mailqueue.queue_dir = {queue_dir}: the' in err
    assert err.endswith('mq-queue app.ini init\n')
    assert not queue_dir.exists() or not list(queue_dir.iterdir())
    assert server.sessions == []


# --- whatever is tried --------------------------------------------------------


def test_a_setting_may_be_tried_on_the_command_line(mq_send_test, app_ini, server):
    status, _, _ = mq_send_test(app_ini(smtp_port=1), TO, '--set', f'mailqueue.smtp_port={server.port}')

    assert (status, len(server.messages)) == (0, 1)


def test_an_inbox_takes_it_without_a_dialog(mq_send_test, app_ini, queue_dir):
    status, out, _ = mq_send_test(app_ini(transports='inbox'), TO)

    (path,) = (queue_dir / 'inbox').iterdir()
    first, last = out.splitlines()
    assert (status, first.rpartition(', by ')[2]) == (0, 'inbox')
    assert last.endswith(f'kept in {path}')


def test_it_is_sent_even_if_nobody_hears_of_it(start, app_ini, server, state):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(app_ini(server), TO, stdout=writer)
    os.close(writer)

    _, err = process.communicate(timeout=60)

    assert (process.returncode, err, len(server.messages), state()) == (0, '', 1, {})


# --- it does not ------------------------------------------------------------

FAILURES = {
    'the recipient is refused': ({'RCPT': '550 5.7.1 relay denied'}, 69, '550 5.7.1 relay denied', 'does not pass on'),
    'the recipient is deferred': ({'RCPT': '450 4.2.0 later'}, 75, '450 4.2.0 later', 'Does <ada@x.example> exist?'),
    'the sender is refused': ({'MAIL': '553 5.1.8 not you'}, 69, '553 5.1.8 not you', 'Try another one with --from'),
    'the content is refused': ({'.': '554 5.7.1 spam'}, 69, '554 5.7.1 spam', 'spam filter'),
    'data is deferred': ({'DATA': '451 4.3.0 full'}, 75, '451 4.3.0 full', 'full disk'),
    'the greeting is a no': ({'connect': Close('554 5.7.1 go away')}, 69, '554 5.7.1 go away', 'block list'),
    'the greeting is a later': ({'connect': Close('421 4.3.2 busy')}, 75, '421 4.3.2 busy', 'block list'),
    'the server ends the session': ({'EHLO': Close('421 4.3.2 closing')}, 75, '421 4.3.2 closing', 'local_hostname'),
    'the server breaks off': ({'.': Close()}, 75, 'it may have been delivered', 'full disk'),
}


@pytest.mark.parametrize(('script', 'expected', 'said', 'hint'), FAILURES.values(), ids=FAILURES)
def test_a_person_is_told_why_and_what_to_look_at(mq_send_test, app_ini, server, state, script, expected, said, hint):
    server.script |= script

    status, _, err = mq_send_test(app_ini(server), TO)

    first, *rest = err.splitlines()
    assert (status, state()) == (expected, {})
    assert first.startswith('mq-send-test: failed, and ' + ('may work later' if expected == 75 else 'it is no use'))
    assert said in first
    assert any(hint in line for line in rest), err
    assert server.messages == []


def test_without_pipelining_the_hints_are_the_same(mq_send_test, app_ini, server):
    server.extensions = ()
    server.script['MAIL'] = '553 5.1.8 not you'

    status, _, err = mq_send_test(app_ini(server), TO)

    assert (status, '--from' in err) == (69, True)


def test_a_server_that_is_not_there_may_be_later(mq_send_test, app_ini, state):
    with ScriptedSMTPServer() as stopped:
        ini = app_ini(stopped)

    status, _, err = mq_send_test(ini, TO)

    assert (status, state()) == (75, {})
    assert f'Cannot reach 127.0.0.1:{stopped.port}' in err
    assert f'nc -vz 127.0.0.1 {stopped.port}' in err


@pytest.mark.parametrize('logs', ['', CONSOLE.format(stream='stderr')])
def test_a_server_that_is_not_there_is_told_once(mq_send_test, app_ini, logs):
    with ScriptedSMTPServer() as stopped:
        ini = app_ini(stopped, more=logs)

    _, out, err = mq_send_test(ini, TO)

    assert (out + err).count('Cannot reach') == 1


@pytest.mark.parametrize(
    ('step', 'awaited'),
    [
        ('connect', 'a connection, and the greeting of the server'),
        ('EHLO', 'the reply to EHLO'),
        ('RCPT', 'the reply to RCPT'),
        ('.', 'the reply to the message'),
    ],
)
def test_of_a_server_that_says_nothing_it_is_told_what_is_awaited(mq_send_test, app_ini, server, step, awaited):
    server.script[step] = Silence()
    # Of the application; longer ones are cut short.
    ini = app_ini(server, smtp_timeout='3s', smtp_data_timeout='3s')

    status, out, err = mq_send_test(ini, TO)

    assert f'  ... waiting for {awaited} (at most 30 seconds for each step)\n' in out
    assert (status, '3 seconds' in err) == (75, True)
    assert ('465 goes with implicit' in err) == (step == 'connect')


def test_no_step_takes_longer_than_half_a_minute_and_no_longer_than_the_application_says():
    settings = Settings(smtp_connect_timeout=10, smtp_timeout=300, smtp_data_timeout=600)

    impatient = send_test._impatient(settings)

    assert (impatient.smtp_connect_timeout, impatient.smtp_timeout, impatient.smtp_data_timeout) == (10, 30, 30)


@pytest.mark.parametrize('mechanism', ['PLAIN', 'LOGIN'])
def test_a_password_that_is_wrong_is_told_and_never_shown(mq_send_test, app_ini, server, state, mechanism):
    server.extensions = (*EXTENSIONS, f'AUTH {mechanism}')
    refusal = f'535 5.7.8 {PASSWORD} is wrong'
    server.script['AUTH'] = [refusal] if mechanism == 'PLAIN' else ['334 VXNlcm5hbWU6', '334 UGFzc3dvcmQ6', refusal]

    status, out, err = mq_send_test(app_ini(server, smtp_username='shop', smtp_password=PASSWORD), TO)

    assert (status, state()) == (69, {})
    assert "rejected the login of 'shop'" in err
    assert 'smtp_password right?' in err
    assert f'  C: AUTH {mechanism}' in out
    for secret in (PASSWORD, base64.b64encode(PASSWORD.encode()).decode()):
        assert secret not in out + err


def test_a_login_that_the_server_does_not_offer_is_no_use_to_try_again(mq_send_test, app_ini, server):
    status, _, err = mq_send_test(app_ini(server, smtp_username='shop', smtp_password=PASSWORD), TO)

    assert (status, 'AUTH' in err) == (69, True)


def test_a_certificate_that_does_not_hold_is_no_use_to_try_again(mq_send_test, app_ini):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert('127.0.0.1').configure_cert(context)
    with ScriptedSMTPServer(tls=context) as server:
        status, out, err = mq_send_test(app_ini(server, smtp_tls='starttls'), TO)

    assert status == 69
    assert 'C: STARTTLS' in out
    assert 'certificate' in err
    assert f'openssl s_client -connect 127.0.0.1:{server.port} -starttls smtp' in err


def test_tls_that_is_not_offered_is_no_use_to_try_again(mq_send_test, app_ini, server):
    status, _, err = mq_send_test(app_ini(server, smtp_tls='starttls'), TO)

    assert (status, 'does not offer STARTTLS' in err, 'wrong port' in err) == (69, True, True)


def test_tls_on_a_port_that_has_none_is_no_use_to_try_again(mq_send_test, app_ini, server):
    status, _, err = mq_send_test(app_ini(server, smtp_tls='implicit'), TO)

    assert status == 69
    assert f'openssl s_client -connect 127.0.0.1:{server.port} -verify_return_error' in err


# --- what else is in the queue ----------------------------------------------


@pytest.fixture
def waiting(queue_dir):
    """A message that is due."""
    envelope = Envelope('shop@site.example', ('bob@x.example',), b'Message-ID: <1@site.example>\r\n\r\nHello\r\n')
    name = MaildirQueue(queue_dir).put(envelope)
    path = queue_dir / 'new' / name
    os.utime(path, (1, 1))
    return path


def test_nothing_else_in_the_queue_is_touched(mq_send_test, app_ini, server, waiting, queue_dir, state):
    orphan = queue_dir / 'cur' / 'orphan'
    orphan.write_bytes(waiting.read_bytes())
    before = [(path.read_bytes(), path.stat()) for path in (waiting, orphan)]

    status, _, _ = mq_send_test(app_ini(server), TO)

    assert status == 0
    assert [message.recipients for message in server.messages] == [('ada@x.example',)]
    assert [(path.read_bytes(), path.stat()) for path in (waiting, orphan)] == before
    assert state() == {'new': 1, 'cur': 1}


def test_mq_run_and_it_go_on_side_by_side(start, app_ini, server, waiting, make_event, state):
    answer = make_event()
    server.script['RCPT TO:<ada@x.example>'] = Wait(answer)
    ini = app_ini(server)
    process = start(ini, TO)
    server.wait_for(lambda: any('RCPT TO:<ada@x.example>' in session.commands for session in server.sessions))

    run = start(ini, module='pyramid_mailqueue.cli.run')
    assert run.communicate(timeout=60) == ('mq-run: 1 sent; 0 waiting\n', '')
    before = state()
    answer.set()
    process.communicate(timeout=60)

    assert before == {'cur': 1}
    assert (process.returncode, run.returncode, state()) == (0, 0, {})
    assert [message.recipients for message in server.messages] == [('bob@x.example',), ('ada@x.example',)]


def test_the_rate_limit_holds_for_it_too(mq_send_test, app_ini, server, state):
    ini = app_ini(server, rate_limit='1/hour')

    first, second = (mq_send_test(ini, TO) for _ in range(2))

    assert (first[0], second[0], len(server.messages), state()) == (0, 75, 1, {})
    assert 'mailqueue.rate_limit = 1/3600s allows no more now. Try again in 3' in second[2]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whoever_interrupts_it_leaves_nothing_behind(start, app_ini, server, make_event, state, number):
    server.script['RCPT'] = Wait(make_event())
    process = start(app_ini(server), TO)
    server.wait_for(lambda: any('RCPT' in session.commands[-1] for session in server.sessions if session.commands))
    before = state()

    process.send_signal(number)
    _, err = process.communicate(timeout=60)

    assert (before, state()) == ({'cur': 1}, {})
    assert (process.returncode, err) == (130, '')


def test_what_it_was_started_to_ignore_it_ignores(start, app_ini, server, make_event, state):
    answer = make_event()
    server.script['RCPT'] = Wait(answer)
    process = start(app_ini(server), TO, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    server.wait_for(lambda: any('RCPT' in session.commands[-1] for session in server.sessions if session.commands))

    process.send_signal(signal.SIGHUP)
    answer.set()
    process.communicate(timeout=60)

    assert (process.returncode, len(server.messages), state()) == (0, 1, {})


def test_a_queue_that_cannot_take_it_is_told(mq_send_test, app_ini, server, queue_dir):
    ini = app_ini(server)
    (queue_dir / 'cur').rmdir()
    (queue_dir / 'cur').symlink_to(queue_dir / 'nowhere')

    status, _, err = mq_send_test(ini, TO)

    assert status in (75, 78)
    assert str(queue_dir) in err
    assert server.sessions == []


# --- mistakes ---------------------------------------------------------------


@pytest.mark.parametrize('address', ['ada', 'ada@x.example, bob@x.example', 'a@x.example\r\nDATA', ''])
@pytest.mark.parametrize('option', ['--to', '--from'])
def test_an_address_that_is_none_is_a_mistake_on_the_command_line(capsys, option, address):
    with pytest.raises(SystemExit) as caught:
        send_test.main(['app.ini', TO, option, address])

    assert caught.value.code == 2
    assert f'argument {option}: ' in capsys.readouterr().err


def test_somebody_has_to_be_named(capsys):
    with pytest.raises(SystemExit) as caught:
        send_test.main(['app.ini'])

    assert caught.value.code == 2
    assert '--to' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('own', 'key'),
    [
        ({'smtp_port': 'many'}, 'mailqueue.smtp_port'),
        ({'transports': 'pigeon'}, 'mailqueue.transports = pigeon: only the application knows'),
        ({'queue_dir': ''}, 'mailqueue.queue_dir is missing'),
        ({'max_message_size': '10'}, 'mailqueue.max_message_size'),
    ],
)
def test_a_setting_that_cannot_be_used_is_status_78(mq_send_test, app_ini, own, key):
    ini = app_ini(**own)

    status, out, err = mq_send_test(ini, TO)

    assert (status, out) == (78, '')
    assert key in err
    assert str(ini) in err


def test_a_stranger_can_read_the_help(capsys):
    with pytest.raises(SystemExit) as caught:
        send_test.main(['--help'])

    out = capsys.readouterr().out
    assert caught.value.code == 0
    for word in ('INI', 'QUEUE', '--to', '--from', '--set', 'exit status', '  69  ', '  75  ', '  78  '):
        assert word in out
    assert max(map(len, out.splitlines())) <= 120
