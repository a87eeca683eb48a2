"""The command ``mq-run`` as cron starts it: a process of its own, an ini file, a queue and a server."""

from __future__ import annotations

import base64
import os
import pwd
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pyramid_mailqueue.cli import run
from pyramid_mailqueue.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.testing import EXTENSIONS, Close, ScriptedSMTPServer, Silence, Wait

PASSWORD = 'correct-horse'
CONTENT = b'Message-ID: <1@site.example>\r\nSubject: the sum is 4711\r\n\r\nIt is.\r\n'

LOGGING = """
[loggers]
keys = root
[handlers]
keys = file
[formatters]
keys = plain
[logger_root]
level = DEBUG
handlers = file
[handler_file]
class = FileHandler
args = ('%(here)s/app.log',)
formatter = plain
[formatter_plain]
format = %(levelname)s %(name)s %(message)s
"""


@pytest.fixture
def server():
    with ScriptedSMTPServer() as server:
        yield server


@pytest.fixture
def ini(tmp_path):
    """Write an ini file, and return its path: ``ini(text, name='other.ini')``."""

    def ini(text, name='app.ini'):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return ini


@pytest.fixture
def app_ini(ini):
    """An ini file of an app whose queue is ``queue_dir``: ``app_ini(server, key=value)``."""

    def app_ini(server=None, more='', **own):
        own = {'queue_dir': '%(here)s/queue', 'smtp_hostname': '127.0.0.1', **own}
        if server is not None:
            own['smtp_port'] = server.port
        keys = '\n'.join(f'mailqueue.{key} = {value}' for key, value in own.items())
        return ini(f'[app:main]\nuse = egg:not_installed\n{keys}\n{more}')

    return app_ini


@pytest.fixture
def start(tmp_path):
    """Start ``mq-run``: ``start(ini)``, or the code of another main program before that: ``start(ini, code=...)``."""
    processes = []

    def start(*arguments, code=None, **options):
        command = ['-c', code] if code else ['-m', 'pyramid_mailqueue.cli.run']
        # What the tests of an application have installed for it lies in the same folder.
        env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])}
        processes.append(
            subprocess.Popen(
                [sys.executable, *command, *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
                **options,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def mq_run(start):
    """Run ``mq-run`` to its end: ``mq_run(ini)`` returns the exit status and what was printed to stdout and stderr."""

    def mq_run(*arguments, **options):
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return mq_run


@pytest.fixture
def put(queue_dir):
    """Put a message into the queue, due since so many seconds; return its name."""

    def put(*recipients, since=1):
        queue = MaildirQueue(queue_dir)
        name = queue.put(Envelope('shop@site.example', recipients or ('ada@x.example',), CONTENT))
        due = time.time() - since
        os.utime(queue.place('new', name), (due, due))
        return name

    return put


@pytest.fixture
def state(queue_dir):
    """How many messages there are in each folder that has any."""

    def state():
        return {path.name: count for path in queue_dir.iterdir() if (count := len(list(path.iterdir())))}

    return state


QUIET = (0, '', '')


# --- a run ------------------------------------------------------------------


def test_nothing_is_printed_when_there_is_nothing_to_do(mq_run, app_ini, queue_dir):
    path = app_ini()

    assert [mq_run(path) for _ in range(2)] == [QUIET] * 2
    assert (queue_dir / 'new').is_dir()


def test_nothing_is_printed_of_messages_that_are_not_due(mq_run, app_ini, put, state):
    put(since=-60)

    assert mq_run(app_ini()) == QUIET
    assert state() == {'new': 1}


def test_a_summary_can_be_asked_for(mq_run, app_ini, put):
    put(since=-60)

    assert mq_run(app_ini(), '--verbose') == (0, 'mq-run: nothing to do; 1 waiting\n', '')


def test_what_is_due_is_sent_oldest_first_over_one_connection(mq_run, app_ini, put, state, server):
    for since, recipient in ((1, 'second@x.example'), (2, 'first@x.example')):
        put(recipient, since=since)

    assert mq_run(app_ini(server)) == (0, 'mq-run: 2 sent; 0 waiting\n', '')
    assert state() == {}
    assert [message.recipients for message in server.messages] == [('first@x.example',), ('second@x.example',)]
    assert server.messages[0].content == CONTENT
    assert len(server.sessions) == 1


def test_the_summary_counts_what_became_of_the_messages(mq_run, app_ini, put, state, server):
    server.script |= {'RCPT TO:<bob@x.example>': '451 4.3.0 later', 'RCPT TO:<eve@x.example>': '550 5.1.1 no such user'}
    for recipients in (('ada@x.example',), ('ada@x.example', 'bob@x.example'), ('eve@x.example',)):
        put(*recipients)

    status, out, err = mq_run(app_ini(server))

    assert (status, out) == (0, 'mq-run: 1 sent, 1 deferred, 1 refused; 1 waiting\n')
    # A dead letter is worth a mail from cron, a deferral is not.
    (line,) = err.splitlines()
    assert line.startswith('ERROR mailqueue.queue_log: status=buried')
    assert line.endswith('error="550 5.1.1 no such user"')
    assert state() == {'new': 1, 'dead': 1}


def test_what_dead_processes_left_is_delivered(mq_run, app_ini, put, queue_dir, state, server):
    name = put()
    (queue_dir / 'new' / name).rename(queue_dir / 'cur' / name)

    assert mq_run(app_ini(server)) == (0, 'mq-run: 1 recovered, 1 sent; 0 waiting\n', '')
    assert state() == {}


def test_a_message_in_doubt_is_reported_by_each_run(mq_run, app_ini, put, queue_dir, state):
    name = put()
    (queue_dir / 'new' / name).rename(queue_dir / 'prepared' / name)
    path = app_ini()

    results = [mq_run(path) for _ in range(2)]

    assert [(status, out) for status, out, _ in results] == [(0, 'mq-run: 1 in doubt; 0 waiting\n')] * 2
    assert all(f'CRITICAL mailqueue.queue_log: status=in_doubt id={name} ' in err for _, _, err in results)
    assert state() == {'prepared': 1}


def test_a_damaged_file_is_put_aside_and_reported(mq_run, app_ini, put, queue_dir, state, server):
    put()
    damaged = queue_dir / 'new' / 'damaged'
    damaged.write_bytes(b'not a queue file')
    os.utime(damaged, (1, 1))

    status, out, err = mq_run(app_ini(server))

    assert (status, out) == (0, 'mq-run: 1 sent; 0 waiting\n')
    assert 'damaged' in err
    assert state() == {'corrupt': 1}


# --- the server is in trouble -----------------------------------------------


def test_a_server_that_cannot_be_reached_is_status_75_and_changes_nothing(mq_run, app_ini, put, queue_dir):
    with ScriptedSMTPServer() as stopped:
        path = app_ini(stopped)
    for _ in range(3):
        put()
    before = [(file, file.read_bytes(), file.stat().st_mtime_ns) for file in sorted((queue_dir / 'new').iterdir())]

    status, out, err = mq_run(path)

    assert (status, out) == (75, 'mq-run: 0 sent; 3 waiting\n')
    (line,) = err.splitlines()
    assert line.startswith(f'mq-run: Cannot reach 127.0.0.1:{path.read_text().split()[-1]}: ')
    assert [(file, file.read_bytes(), file.stat().st_mtime_ns) for file, *_ in before] == before


def test_one_connection_is_tried_in_an_outage(mq_run, app_ini, put, server):
    server.script['connect'] = Close('421 4.3.2 out of order')
    for _ in range(5):
        put()

    status, _, err = mq_run(app_ini(server))

    assert status == 75
    assert '421 4.3.2 out of order' in err
    assert len(server.sessions) == 1


# --- the configuration cannot be used ---------------------------------------


def complaint_of(result):
    """What was said, by a run that must have ended for its configuration."""
    status, out, err = result
    assert (status, out) == (78, '')
    assert 'Traceback' not in err
    assert all(line.startswith('mq-run: ') for line in err.splitlines())
    return err


def test_a_missing_ini_file_is_named(mq_run, tmp_path):
    path = tmp_path / 'nowhere.ini'

    assert complaint_of(mq_run(path)) == f'mq-run: {path}: cannot be read (No such file or directory).\n'


def test_a_broken_ini_file_is_named_with_the_line(mq_run, ini):
    path = ini('[app:main]\nmailqueue.smtp_password = correct-horse\nmailqueue.smtp_password = correct-horse\n')

    complaint = complaint_of(mq_run(path))

    assert f'{path}, line 3' in complaint
    assert PASSWORD not in complaint


def test_every_key_that_cannot_be_used_is_named_with_the_file(mq_run, app_ini):
    path = app_ini(smtp_prt=25, smtp_timeout='soon', smtp_password=PASSWORD)

    lines = complaint_of(mq_run(path)).splitlines()

    assert len(lines) == 3
    assert all(line.startswith(f'mq-run: {path}: mailqueue.') for line in lines)
    assert 'Did you mean mailqueue.smtp_port?' in lines[0]
    assert 'mailqueue.smtp_timeout' in lines[1]
    assert 'mailqueue.smtp_username is missing' in lines[2]
    assert PASSWORD not in ''.join(lines)


def test_a_file_that_is_called_by_another_one_is_named_itself(mq_run, ini):
    ini('[app:main]\nuse = egg:not_installed\nmailqueue.queue_dir = %(nowhere)s\n', 'base.ini')
    path = ini('[app:main]\nuse = config:base.ini\n')

    complaint = complaint_of(mq_run(path))

    assert str(path.with_name('base.ini')) in complaint
    assert 'mailqueue.queue_dir refers to %(nowhere)s' in complaint


def test_a_queue_directory_that_cannot_be_used_is_named_with_its_key(mq_run, app_ini, queue_dir):
    queue_dir.write_text('a file in its place')
    path = app_ini()

    complaint = complaint_of(mq_run(path))

    assert complaint.startswith(f'mq-run: {path}: mailqueue.queue_dir = {queue_dir}: ')


def test_a_transport_that_only_the_app_knows_is_explained(mq_run, app_ini):
    path = app_ini(transports='smtp pigeon')

    assert complaint_of(mq_run(path)) == (
        f'mq-run: {path}: mailqueue.transports = pigeon: only the application knows the transport of this name. '
        'Use --app.\n'
    )


def test_an_override_needs_a_key_and_a_value(mq_run, app_ini):
    assert complaint_of(mq_run(app_ini(), '--set', 'smtp')).startswith('mq-run: --set smtp: ')


NOBODY = 65534


@pytest.fixture
def as_root(monkeypatch):
    """We are root, and a folder belongs to somebody else: ``as_root(path)`` returns the name of its owner."""

    def as_root(path):
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)
        monkeypatch.setattr(os, 'geteuid', lambda: 0)
        return pwd.getpwuid(path.stat().st_uid).pw_name

    return as_root


@pytest.mark.parametrize('made', ['nothing', 'queue', 'queue/new'])
@pytest.mark.parametrize('option', [[], ['--app']])
def test_root_does_not_work_in_the_queue_of_another_user(app_ini, queue_dir, as_root, capsys, made, option):
    path = app_ini()
    innermost = queue_dir.parent if made == 'nothing' else queue_dir.parent / made
    innermost.mkdir(parents=True, exist_ok=True)
    owner = as_root(innermost)

    with pytest.raises(SystemExit) as exit_:
        run.main([str(path), *option])

    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (78, '')
    assert f'mailqueue.queue_dir = {queue_dir} belongs to the user {owner}' in err
    assert f'sudo -u {owner} mq-run' in err
    assert list(innermost.iterdir()) == ([path] if made == 'nothing' else [])


def test_an_owner_without_a_name_is_told_by_number(app_ini, queue_dir, as_root, capsys, monkeypatch):
    def getpwuid(uid):
        raise KeyError(uid)

    path = app_ini()
    queue_dir.mkdir()
    as_root(queue_dir)
    monkeypatch.setattr(pwd, 'getpwuid', getpwuid)

    with pytest.raises(SystemExit):
        run.main([str(path)])

    assert f'belongs to the user #{queue_dir.stat().st_uid},' in capsys.readouterr().err


def test_a_defect_is_status_70_and_shows_where_it_is(mq_run, app_ini, tmp_path):
    (tmp_path / 'broken_queue.py').write_text(
        'class Queue:\n'
        '    def __init__(self, settings): pass\n'
        '    def recover(self, now): raise ZeroDivisionError("a defect")\n'
        '    def flush(self): pass\n'
    )

    status, out, err = mq_run(app_ini(queue='broken_queue.Queue'))

    assert (status, out) == (70, '')
    assert err.startswith(
        'mq-run: this is a defect of pyramid_mailqueue; please report it with these lines:\nTraceback'
    )
    assert 'ZeroDivisionError: a defect' in err


def test_a_queue_that_cannot_be_read_is_status_75_and_is_named(mq_run, app_ini, tmp_path):
    (tmp_path / 'sick_queue.py').write_text(
        'from pyramid_mailqueue import QueueError\n'
        'class Queue:\n'
        '    def __init__(self, settings): pass\n'
        '    def recover(self, now): raise QueueError("The folder /srv/queue/cur cannot be read: Input/output error")\n'
        '    def flush(self): pass\n'
    )

    status, out, err = mq_run(app_ini(queue='sick_queue.Queue'))

    assert (status, out) == (75, '')
    assert err == 'mq-run: The folder /srv/queue/cur cannot be read: Input/output error\n'


def test_a_summary_that_cannot_be_written_changes_nothing(app_ini, put, state, server):
    put()

    with Path('/dev/full').open('w') as full:
        command = [sys.executable, '-m', 'pyramid_mailqueue.cli.run', str(app_ini(server))]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, '')
    assert (len(server.messages), state()) == (1, {})


@pytest.mark.parametrize('arguments', [[], ['app.ini', 'queue', 'more'], ['app.ini', '--nonsense']])
def test_wrong_usage_is_status_2(mq_run, arguments):
    status, out, err = mq_run(*arguments)

    assert (status, out) == (2, '')
    assert err.startswith('usage: mq-run ')


def test_the_help_tells_the_exit_statuses(mq_run):
    status, out, err = mq_run('--help')

    assert (status, err) == (0, '')
    assert all(f'\n  {number}  ' in out for number in ('0 ', '70', '75', '78'))


# --- where the settings are -------------------------------------------------


def test_another_app_of_the_file_can_be_named(mq_run, ini, put, state, server):
    put()
    path = ini(f"""
        [app:main]
        use = egg:not_installed
        [app:shop]
        use = egg:not_installed
        mailqueue.queue_dir = %(here)s/queue
        mailqueue.smtp_hostname = 127.0.0.1
        mailqueue.smtp_port = {server.port}
        """)

    assert mq_run(path, '--name', 'shop')[1] == 'mq-run: 1 sent; 0 waiting\n'
    put()
    assert mq_run(f'{path}#shop')[1] == 'mq-run: 1 sent; 0 waiting\n'


def test_values_can_be_set_from_outside(mq_run, app_ini, put, server):
    put()
    path = app_ini(smtp_port='%(relay_port)s')

    status, out, _ = mq_run(path, '--set', f'relay_port={server.port}', '--set', 'mailqueue.max_recipients=5')

    assert (status, out) == (0, 'mq-run: 1 sent; 0 waiting\n')


def test_settings_may_come_from_another_file(mq_run, app_ini, ini, put, server):
    put()
    base = app_ini(server)
    base.rename(base.with_name('base.ini'))
    path = ini('[app:main]\nuse = config:base.ini\nmailqueue.max_recipients = 5\n', 'local.ini')

    assert mq_run(path) == (0, 'mq-run: 1 sent; 0 waiting\n', '')


def test_the_file_may_be_named_from_where_one_is(mq_run, app_ini, put, server, tmp_path):
    put()
    app_ini(server)

    assert mq_run('app.ini', cwd=tmp_path) == (0, 'mq-run: 1 sent; 0 waiting\n', '')


def test_a_queue_directory_on_the_command_line_goes_before_the_files(mq_run, app_ini, put, server, tmp_path):
    put()

    assert mq_run(app_ini(server, queue_dir='/nowhere'), 'queue', cwd=tmp_path)[1] == 'mq-run: 1 sent; 0 waiting\n'


MQRUNNER = """
    [mqrunner]
    smtp_hostname = 127.0.0.1
    smtp_port = {port}
    """


def test_a_file_of_mailqueue_runner_works_with_a_queue_directory(mq_run, ini, put, queue_dir, server):
    put()

    assert mq_run(ini(MQRUNNER.format(port=server.port)), queue_dir) == (0, 'mq-run: 1 sent; 0 waiting\n', '')


def test_a_file_of_mailqueue_runner_may_hold_the_queue_directory(mq_run, ini, put, server):
    put()
    path = ini(f'{MQRUNNER.format(port=server.port)}queue_dir = %(here)s/queue\n')

    assert mq_run(path) == (0, 'mq-run: 1 sent; 0 waiting\n', '')


def test_next_to_an_app_the_section_of_mailqueue_runner_is_for_a_queue_of_its_own(mq_run, app_ini, put, server):
    put()
    path = app_ini(server, more='[mqrunner]\nsmtp_hostname = nowhere.invalid\n')

    assert mq_run(path) == (0, 'mq-run: 1 sent; 0 waiting\n', '')


# --- with the application ---------------------------------------------------

SHOP = """
from pathlib import Path
from pyramid.config import Configurator
from pyramid_mailqueue.interfaces import ITransport

class Pigeon:
    def __init__(self, path):
        self.path = path

    def send(self, sender, recipients, content):
        with self.path.open('a') as file:
            file.write(f'{sender} {recipients}\\n')
        return True

def main(global_config, **settings):
    pigeon = Pigeon(Path(global_config['here'], 'pigeons'))
    with Configurator(settings=settings) as config:
        config.include('pyramid_mailqueue')
        config.registry.registerUtility(pigeon, ITransport, 'pigeon')
        return config.make_wsgi_app()

def wrapped(global_config, **settings):
    app = main(global_config, **settings)
    return lambda environ, start_response: app(environ, start_response)

def without_mail(global_config, **settings):
    with Configurator() as config:
        return config.make_wsgi_app()

def without_pyramid(global_config, **settings):
    return print
"""


@pytest.fixture
def shop_ini(ini, tmp_path):
    """An ini file of an application that is there: ``shop_ini(key=value)``."""
    (tmp_path / 'shop.py').write_text(SHOP)

    def shop_ini(main='main', **own):
        own = {'queue_dir': '%(here)s/queue', 'transports': 'pigeon', **own}
        keys = '\n'.join(f'mailqueue.{key} = {value}' for key, value in own.items())
        return ini(f'[app:main]\nuse = call:shop:{main}\n{keys}\n')

    return shop_ini


@pytest.mark.parametrize('main', ['main', 'wrapped'])
def test_with_the_application_its_own_transports_are_used(mq_run, shop_ini, put, state, tmp_path, main):
    put()

    assert mq_run(shop_ini(main), '--app') == (0, 'mq-run: 1 sent; 0 waiting\n', '')
    assert mq_run(shop_ini(main), '--app') == QUIET
    assert (tmp_path / 'pigeons').read_text() == "shop@site.example ('ada@x.example',)\n"
    assert state() == {}


@pytest.mark.parametrize('main', ['without_mail', 'without_pyramid'])
def test_an_application_without_a_mailer_is_told_what_is_missing(mq_run, shop_ini, main):
    path = shop_ini(main)

    status, _, err = mq_run(path, '--app')

    assert status == 78
    assert err.endswith(
        f'mq-run: {path}: the application has no mailer. Does it call config.include("pyramid_mailqueue")?\n'
    )


def test_a_mistake_in_the_settings_of_an_application_is_no_traceback(mq_run, shop_ini):
    path = shop_ini(smtp_prt=1)

    status, _, err = mq_run(path, '--app')

    assert status == 78
    assert f"mq-run: {path}: mailqueue.smtp_prt = '1': there is no such key" in err
    assert 'Traceback' not in err


def test_an_application_that_cannot_be_loaded_shows_why(mq_run, shop_ini):
    path = shop_ini('not_there')

    status, out, err = mq_run(path, '--app')

    assert (status, out) == (78, '')
    assert 'Traceback' in err
    assert f'mq-run: {path}: the application cannot be loaded: ' in err


def test_a_password_with_a_per_cent_sign_is_not_shown(mq_run, shop_ini):
    status, _, err = mq_run(shop_ini(smtp_username='shop', smtp_password=f'50%{PASSWORD}'), '--app')

    assert status == 78
    assert 'mailqueue.smtp_password holds a single %' in err
    assert PASSWORD not in err


def test_the_queue_of_an_application_is_its_own(mq_run, shop_ini, queue_dir):
    status, _, err = mq_run(shop_ini(), queue_dir, '--app')

    assert status == 2
    assert '--app' in err


# --- what is logged ---------------------------------------------------------


@pytest.mark.parametrize('option', [[], ['--app']])
def test_the_logging_of_the_ini_file_is_respected(mq_run, shop_ini, put, server, tmp_path, option):
    put('eve@x.example')
    server.script['RCPT'] = '550 5.1.1 no such user'
    path = shop_ini(transports='smtp', smtp_hostname='127.0.0.1', smtp_port=server.port)
    path.write_text(path.read_text() + LOGGING)

    assert mq_run(path, *option) == (0, 'mq-run: 1 refused; 0 waiting\n', '')
    log = (tmp_path / 'app.log').read_text()
    assert 'INFO mailqueue.delivery_log status=buried' in log
    assert 'ERROR mailqueue.queue_log status=buried' in log
    assert 'C: RCPT TO:<eve@x.example>' in log
    assert '4711' not in log


@pytest.mark.parametrize('option', [[], ['--app']])
def test_the_two_logs_can_have_files_of_their_own(mq_run, shop_ini, put, server, tmp_path, option):
    put()
    server.script['RCPT'] = '451 4.3.0 later'
    logs = {f'{name}_log': f'%(here)s/{name}.log' for name in ('delivery', 'queue')}
    path = shop_ini(transports='smtp', smtp_hostname='127.0.0.1', smtp_port=server.port, **logs)

    assert mq_run(path, *option) == (0, 'mq-run: 1 deferred; 1 waiting\n', '')
    assert [
        (tmp_path / f'{name}.log').read_text().count(' INFO status=deferred ') for name in ('delivery', 'queue')
    ] == [
        1,
        1,
    ]


@pytest.mark.parametrize('reply', ['235 2.7.0 welcome', '535 5.7.8 no', '454 4.7.0 not now'])
@pytest.mark.parametrize('mechanism', ['PLAIN', 'LOGIN', 'CRAM-MD5'])
def test_no_password_is_printed_or_logged(mq_run, app_ini, put, server, tmp_path, mechanism, reply):
    server.extensions = (*EXTENSIONS, f'AUTH {mechanism}')
    server.script['AUTH'] = reply
    put()

    status, out, err = mq_run(app_ini(server, more=LOGGING, smtp_username='shop', smtp_password=PASSWORD), '--verbose')

    told = out + err + (tmp_path / 'app.log').read_text()
    secrets = [f'\0shop\0{PASSWORD}', f'shop\0shop\0{PASSWORD}', PASSWORD]
    assert status == (0 if reply.startswith('2') else 75)
    assert 'AUTH' in told
    assert [secret for secret in secrets if secret in told] == []
    assert [secret for secret in secrets if base64.b64encode(secret.encode()).decode() in told] == []


# --- told to stop -----------------------------------------------------------


@pytest.fixture
def busy(server, start, app_ini, put, make_event):
    """A run that has two messages, whose server has the first and says nothing of it until ``busy.go_on.set()``."""
    put('first@x.example', since=2)
    put('second@x.example', since=1)

    def busy(until=b'\r\n.\r\n', **options):
        busy.go_on = make_event()
        server.script['.'] = [Wait(busy.go_on)]
        process = start(app_ini(server), **options)
        server.wait_for(lambda: any(until in session.received for session in server.sessions), 30)
        return process

    return busy


def names_in(folder):
    return [path.name for path in Path(folder).iterdir()]


STOPPING = 'mq-run: stopping; what is in hand is finished first, for at most 30 seconds\n'
STOPPED = 'mq-run: stopped; what was not delivered waits for the next run\n'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_finishes_the_message_in_hand(busy, server, queue_dir, number):
    process = busy()
    process.send_signal(number)
    assert process.stderr.readline() == STOPPING
    busy.go_on.set()
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out, err) == (75, 'mq-run: 1 sent; 1 waiting\n', STOPPED)
    assert [message.recipients for message in server.messages] == [('first@x.example',)]
    assert len(names_in(queue_dir / 'new')) == 1


def test_whoever_insists_gets_the_message_in_hand_back(busy, queue_dir, state):
    names = set(names_in(queue_dir / 'new'))
    process = busy()
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == STOPPING
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    # The server has the whole message: nobody knows what becomes of it.
    assert (process.returncode, out) == (75, 'mq-run: 1 deferred; 2 waiting\n')
    assert 'closed the connection before it answered the end of the data' in err
    assert err.endswith(STOPPED)
    assert state() == {'new': 2}
    assert set(names_in(queue_dir / 'new')) == names, 'a death would be counted in a name'


def test_if_the_server_hangs_the_message_in_hand_is_given_back(busy, queue_dir, server):
    server.script['DATA'] = Silence()
    names = set(names_in(queue_dir / 'new'))
    code = (
        'from pyramid_mailqueue.delivery import runner; runner.PATIENCE = 1; '
        'from pyramid_mailqueue.cli import run; run.main()'
    )
    process = busy(code=code, until=b'DATA')
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (75, '')
    assert err == STOPPING.replace('30', '1') + STOPPED
    assert set(names_in(queue_dir / 'new')) == names


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(busy, server):
    process = busy(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    process.send_signal(signal.SIGINT)
    busy.go_on.set()
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out, err) == (0, 'mq-run: 2 sent; 0 waiting\n', '')
    assert len(server.messages) == 2


def test_a_run_leaves_the_handlers_of_signals_as_they_were(app_ini):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]

    with run._heard_signals(reopens_logs=True) as signals:
        during = [signal.getsignal(number) for number in numbers]
        assert not signals.stop.requested

    assert [signal.getsignal(number) for number in numbers] == before
    assert not set(during) & set(before)


# --- what it costs ----------------------------------------------------------

# Each of them takes a good part of the time that a run without mail has.
NOT_FOR_NOTHING = {'asyncio', 'blinker', 'difflib', 'pyramid', 'schwarz', 'sqlalchemy', 'transaction', 'webob'}


def test_a_run_without_mail_imports_only_what_it_needs(app_ini):
    command = [sys.executable, '-X', 'importtime', '-m', 'pyramid_mailqueue.cli.run', app_ini()]
    imported = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    packages = {line.rpartition('|')[2].strip().partition('.')[0] for line in imported.splitlines()}
    assert 'pyramid_mailqueue' in packages
    assert packages & NOT_FOR_NOTHING == set()
