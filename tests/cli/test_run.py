"""The command ``mq-run`` as cron starts it: a process of its own, an ini file, a queue and a server."""

from __future__ import annotations

import base64
import io
import os
import pwd
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme

from pyramid_mailqueue.cli import run
from pyramid_mailqueue.cli.signals import EarlySignals
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.results import Burial, Settlement
from pyramid_mailqueue.testing import EXTENSIONS, Close, ScriptedSMTPServer, Silence, Wait
from tests.parts.console import CONSOLE

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
def app_ini(ini, queue_dir):
    """An ini file of an app, which has created its queue ``queue_dir``: ``app_ini(server, key=value)``."""

    def app_ini(server=None, more='', has_started=True, **own):
        if has_started:
            MaildirQueue(queue_dir)
        own = {'queue_dir': '%(here)s/queue', 'smtp_hostname': '127.0.0.1', **own}
        if server is not None:
            own['smtp_port'] = server.port
        keys = '\n'.join(f'mailqueue.{key} = {value}' for key, value in own.items())
        return ini(f'[app:main]\nuse = egg:not_installed\n{keys}\n{more}')

    return app_ini


@pytest.fixture
def start(tmp_path):
    """
    Start ``mq-run``: ``start(ini)``, or another main program: ``start(ini, code=...)``.

    *environ* is added to the environment.
    """
    processes = []

    def start(*arguments, code=None, environ=None, **options):
        command = ['-c', code] if code else ['-m', 'pyramid_mailqueue.cli.run']
        # What the tests of an application have installed for it lies in the same folder.
        env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])}
        env |= environ or {}
        options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'env': env, **options}
        processes.append(subprocess.Popen([sys.executable, *command, *map(str, arguments)], **options))
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


# --- what is told ------------------------------------------------------------


@pytest.mark.parametrize('logs', ['', CONSOLE.format(stream='stderr'), CONSOLE.format(stream='stdout'), 'none'])
@pytest.mark.parametrize('options', [[], ['--watch=0.1', '--max-time=1']])
def test_a_server_that_is_not_there_is_told_once(start, app_ini, queue_dir, options, logs):
    MaildirQueue(queue_dir).put(Envelope('shop@site.example', ('ada@x.example',), CONTENT))
    with ScriptedSMTPServer() as stopped:
        nobody = CONSOLE.replace('handlers = console', 'handlers =').format(stream='stderr')
        ini = app_ini(stopped, more=nobody if logs == 'none' else logs)

    out, err = start(ini, *options).communicate(timeout=60)

    assert (out + err).count('Cannot reach 127.0.0.1') == 1
    assert err.startswith(f'mq-run: Cannot reach 127.0.0.1:{stopped.port}')


def bury_long_ago(queue_dir):
    """Leave a dead letter that is so for a hundred days."""
    queue = MaildirQueue(queue_dir, clock=lambda: time.time() - 100 * 86400)
    envelope = Envelope('shop@site.example', ('ada@x.example',), CONTENT)
    queue.put_claimed(envelope).settle(Settlement(burials=(Burial(envelope.recipients, '550 no such user'),)))
    for path in (queue_dir / 'dead').iterdir():
        os.utime(path, (1, 1))


@pytest.mark.parametrize('option', ['app', 'mqrunner'])
def test_dead_letters_are_removed_when_their_time_is_over_and_that_is_told(start, ini, queue_dir, tmp_path, option):
    bury_long_ago(queue_dir)
    keys = 'queue_dir = %(here)s/queue', 'smtp_hostname = 127.0.0.1', 'queue_log = %(here)s/queue.log'
    of_app = '[app:main]\nuse = egg:not_installed\n', 'mailqueue.'
    head, prefix = of_app if option == 'app' else ('[mqrunner]\n', '')

    def run(keep_dead):
        lines = ''.join(f'{prefix}{line}\n' for line in (*keys, f'keep_dead = {keep_dead}'))
        return start(ini(head + lines)).communicate(timeout=60)

    assert run('none') == run('101d') == ('', '')
    assert run('90d') == ('mq-run: 1 expired; 0 waiting\n', '')
    assert run('90d') == ('', '')
    (line,) = (tmp_path / 'queue.log').read_text().splitlines()
    assert 'status=discarded' in line
    assert 'msgid=<1@site.example>' in line
    assert 'error="550 no such user" reason="a dead letter for longer than mailqueue.keep_dead"' in line


def test_the_help_says_that_watch_may_go_without_a_time(capsys):
    with pytest.raises(SystemExit):
        run.main(['--help'])

    assert '[--watch [SECONDS]]' in capsys.readouterr().out


# --- a run ------------------------------------------------------------------


def test_nothing_is_printed_when_there_is_nothing_to_do(mq_run, app_ini):
    path = app_ini()

    assert [mq_run(path) for _ in range(2)] == [QUIET] * 2


def test_who_has_nothing_to_do_imports_little(app_ini):
    code = (
        'import sys; from pyramid_mailqueue.cli.run import main\n'
        'try: main([sys.argv[1]])\n'
        'except SystemExit as end: print(end.code)\n'
        "dear = {'plaster', 'importlib.metadata', 'ssl', 'email.utils', 'blinker', 'json', 'rich'}\n"
        'print(sorted(dear & set(sys.modules)))'
    )
    command = [sys.executable, '-S', '-c', code, app_ini()]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}

    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)

    assert done.stdout == '0\n[]\n'


def test_nothing_is_printed_of_messages_that_are_not_due(mq_run, app_ini, put, state):
    put(since=-60)

    assert mq_run(app_ini()) == QUIET
    assert state() == {'new': 1}


def test_a_summary_can_be_asked_for(mq_run, app_ini, put):
    put(since=-60)

    assert mq_run(app_ini(), '--verbose') == (0, 'mq-run: nothing to do; 1 waiting\n', '')


def test_a_summary_does_not_count_all_of_a_long_backlog(queue_dir, app_ini, put, monkeypatch, capsys):
    for _ in range(3):
        put(since=-60)
    monkeypatch.setattr(run, 'MOST_WAITING', 2)

    with pytest.raises(SystemExit):
        run.main([str(app_ini()), '--verbose'])

    assert capsys.readouterr().out == 'mq-run: nothing to do; more than 2 waiting\n'


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
    path = app_ini(has_started=False)

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
    path = app_ini(has_started=False)
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

    path = app_ini(has_started=False)
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


@pytest.mark.parametrize(
    'arguments',
    [['{ini}', '--queue-dir', '{queue}'], ['--queue-dir={queue}', '{ini}'], ['-C', '{ini}', '{queue}'],
     ['--config={ini}', '-v', '--queue-dir={queue}'], ['{ini}', '-v', '{queue}']],
    ids=str,
)  # fmt: skip
def test_the_queue_directory_has_one_name_for_all_commands_and_the_place_of_mailqueue_runner(
    mq_run, ini, put, queue_dir, server, arguments
):
    put()
    path = ini(MQRUNNER.format(port=server.port))

    status, out, err = mq_run(*(word.format(ini=path, queue=queue_dir) for word in arguments))

    assert (status, out, err) == (0, 'mq-run: 1 sent; 0 waiting\n', '')


@pytest.mark.parametrize(
    ('arguments', 'told'),
    [
        (['{ini}', 'one', '--queue-dir=two'], 'name one queue directory, not several: one, two'),
        (['-C', '{ini}', 'one', 'two'], 'name one queue directory, not several: one, two'),
        (['{ini}', 'one', 'two'], 'unrecognized arguments: two'),
        (['{ini}', '--app', '--queue-dir=one'], 'with --app the queue is that of the application'),
        ([], 'the following arguments are required: INI'),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_a_mistake_on_the_command_line(mq_run, ini, tmp_path, arguments, told):
    words = [word.format(ini=ini('')) for word in arguments]

    status, out, err = mq_run(*words, environ={'HOME': str(tmp_path)})

    assert (status, out) == (2, '')
    assert told in err.splitlines()[-1]


@pytest.mark.parametrize('more', ['', 'queue_dir =\n', 'queue = maildir\n'])
def test_a_file_of_mailqueue_runner_without_a_queue_directory_is_told_where_to_name_it(mq_run, ini, more):
    path = ini(MQRUNNER.format(port=25) + more)

    assert complaint_of(mq_run(path)) == (
        f'mq-run: {path}: [mqrunner] queue_dir is missing. Set it there, or name the queue directory with '
        '--queue-dir.\n'
    )


def test_a_file_of_mailqueue_runner_beside_apps_of_other_names_is_told_of_those(mq_run, ini):
    path = ini(MQRUNNER.format(port=25) + '\n[app:shop]\nuse = egg:not_installed\n')

    assert 'there is no section [app:main]; there is [app:shop]' in complaint_of(mq_run(path))


def test_next_to_an_app_the_section_of_mailqueue_runner_is_for_a_queue_of_its_own(mq_run, app_ini, put, server):
    put()
    path = app_ini(server, more='[mqrunner]\nsmtp_hostname = nowhere.invalid\n')

    assert mq_run(path) == (0, 'mq-run: 1 sent; 0 waiting\n', '')


# --- with the application ---------------------------------------------------

SHOP = """
from pathlib import Path
from pyramid.config import Configurator
from pyramid_mailqueue.interfaces import IMailer, ITransport

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

class OwnMailer:
    pass

def with_its_own_mailer(global_config, **settings):
    with Configurator() as config:
        config.registry.registerUtility(OwnMailer(), IMailer)
        config.include('pyramid_mailqueue')
        return config.make_wsgi_app()
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


def test_with_the_application_old_dead_letters_are_removed_too(mq_run, shop_ini, queue_dir):
    bury_long_ago(queue_dir)

    assert mq_run(shop_ini(), '--app') == QUIET
    assert mq_run(shop_ini(keep_dead='90d'), '--app') == (0, 'mq-run: 1 expired; 0 waiting\n', '')


@pytest.mark.parametrize('main', ['without_mail', 'without_pyramid'])
def test_an_application_without_a_mailer_is_told_what_is_missing(mq_run, shop_ini, main):
    path = shop_ini(main)

    status, _, err = mq_run(path, '--app')

    assert status == 78
    assert err.endswith(
        f'mq-run: {path}: the application has no mailer. Does it call config.include("pyramid_mailqueue")?\n'
    )


def test_a_mailer_of_the_applications_own_that_has_no_queue_is_named(mq_run, shop_ini):
    path = shop_ini('with_its_own_mailer')

    status, _, err = mq_run(path, '--app')

    assert status == 78
    assert err.endswith(
        f'mq-run: {path}: the application has a mailer of its own, OwnMailer, and mq-run --app needs the queue and the '
        "handler of one: 'OwnMailer' object has no attribute 'queue'.\n"
    )


def test_a_mistake_in_the_settings_of_an_application_is_no_traceback(mq_run, shop_ini):
    path = shop_ini(smtp_prt=1)

    status, _, err = mq_run(path, '--app')

    assert status == 78
    assert f"mq-run: {path}: mailqueue.smtp_prt = '1': there is no such key" in err
    assert 'Traceback' not in err


def test_a_database_that_is_away_is_told_of_once(mq_run, shop_ini):
    url = 'postgresql+psycopg://nobody@127.0.0.1:1/app'
    path = shop_ini(queue='sql', sql_url=url, transports='smtp', smtp_hostname='127.0.0.1')

    for option in ([], ['--app']):
        status, out, err = mq_run(path, *option)

        assert (status, out, err.count('cannot be used')) == (75, '', 1), err


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


STOPPING = 'mq-run: stopping: finishing messages in progress (at most 30 s)\n'
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
        'from pyramid_mailqueue.delivery import run; run.STOP_SECONDS = 1; '
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

    with run._heard_signals(EarlySignals(), reopens_logs=True) as signals:
        during = [signal.getsignal(number) for number in numbers]
        assert not signals.stop.requested

    assert [signal.getsignal(number) for number in numbers] == before
    assert not set(during) & set(before)


# --- several connections ----------------------------------------------------


def snapshot(folder):
    """Everything that could change of the messages in a folder, by name."""
    files = sorted(folder.iterdir())
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in files}


@pytest.fixture
def put_many(put):
    """Put so many messages into the queue, for ``m0@x.example`` and so on; return their names, oldest due first."""

    def put_many(number):
        return [put(f'm{index}@x.example', since=number - index) for index in range(number)]

    return put_many


def brought(server):
    """Whom the server has accepted messages for; nobody twice."""
    recipients = [recipient for message in server.messages for recipient in message.recipients]
    assert len(recipients) == len(set(recipients))
    return recipients


@pytest.mark.parametrize('step', ['connect', 'EHLO', 'MAIL'])
def test_a_server_with_room_for_two_sessions_gets_everything(mq_run, app_ini, put_many, state, server, step):
    put_many(24)
    too_many = Close('421 4.7.0 too many connections')
    server.by_session |= {2: {step: too_many}, 3: {step: too_many}}

    def on_content(command):
        if server.messages:
            server.wait_for(lambda: len(server.sessions) == 4 and all(it.is_over for it in server.sessions[2:4]))

    server.script['.'] = on_content

    status, out, err = mq_run(app_ini(server))

    assert (status, out) == (0, 'mq-run: 24 sent; 0 waiting\n')
    assert [line.rpartition('. ')[2] for line in err.splitlines()] == ['The run goes on with fewer connections.'] * 2
    assert (len(brought(server)), len(server.sessions), state()) == (24, 4, {})


def test_a_server_that_goes_down_with_four_sessions_is_status_75_and_changes_nothing(
    mq_run, app_ini, put_many, queue_dir, server
):
    put_many(40)
    before = snapshot(queue_dir / 'new')

    def on_content(command):
        if server.messages:
            server.wait_for(lambda: len(server.sessions) >= 4)

    def is_down(command):
        return Close('421 4.3.2 going down') if len(server.messages) >= 12 else None

    server.script |= {'.': on_content, 'MAIL': is_down, 'connect': is_down}

    status, out, err = mq_run(app_ini(server))

    left = snapshot(queue_dir / 'new')
    assert (status, out) == (75, f'mq-run: {len(server.messages)} sent; {len(left)} waiting\n')
    assert err.splitlines()[-1].startswith('mq-run: ')
    assert '421 4.3.2 going down' in err.splitlines()[-1]
    assert {name: before[name] for name in left} == left
    assert len(brought(server)) + len(left) == 40
    assert len(server.sessions) <= 8


def test_each_message_is_one_round_trip_and_one_write(mq_run, app_ini, put_many, server):
    put_many(10)

    assert mq_run(app_ini(server, smtp_connections=1)) == (0, 'mq-run: 10 sent; 0 waiting\n', '')
    (session,) = server.sessions
    assert brought(server) == [f'm{index}@x.example' for index in range(10)]
    assert session.round_trips == len(session.reads) == 10 + len(['EHLO', 'MAIL RCPT DATA', 'QUIT'])


def test_two_runs_at_once_keep_one_rate_together(start, app_ini, put_many, queue_dir, server):
    names = put_many(20)
    before = snapshot(queue_dir / 'new')
    path = app_ini(server, rate_limit='5/hour', smtp_connections=3)

    runs = [start(path) for _ in range(2)]
    ended = [(run.communicate(timeout=60)[1], run.returncode) for run in runs]

    assert ended == [('', 0)] * 2
    assert len(brought(server)) == 5
    left = snapshot(queue_dir / 'new')
    assert len(left) == len(names) - 5
    assert {name: before[name] for name in left} == left


def test_a_defect_of_a_policy_is_status_70_and_the_next_run_brings_what_is_left(
    mq_run, app_ini, put_many, queue_dir, state, server
):
    names = put_many(12)
    path = app_ini(server)
    code = textwrap.dedent("""
        from pyramid_mailqueue.cli import run
        from pyramid_mailqueue.delivery.retry import ExponentialBackoff
        decide = ExponentialBackoff.decide
        def decide_badly(self, recipients, *args):
            return 1 / 0 if 'm3@x.example' in recipients else decide(self, recipients, *args)
        ExponentialBackoff.decide = decide_badly
        run.main()
    """)

    status, _, err = mq_run(path, code=code)

    assert status == 70
    assert err.startswith('mq-run: this is a defect of pyramid_mailqueue')
    assert 'ZeroDivisionError' in err
    assert names_in(queue_dir / 'cur') == [names[3]]
    assert {f'm{names.index(name)}@x.example' for name in names_in(queue_dir / 'new')}.isdisjoint(brought(server))

    left = 12 - len(server.messages) + 1
    assert mq_run(path) == (0, f'mq-run: 1 recovered, {left} sent; 0 waiting\n', '')
    assert state() == {}
    assert {recipient for message in server.messages for recipient in message.recipients} == {
        f'm{index}@x.example' for index in range(12)
    }


def test_a_plugin_that_raises_changes_nothing(mq_run, app_ini, put_many, state, server, tmp_path):
    put_many(6)
    info = tmp_path / 'noisy-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: noisy\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text('[mailqueue.plugins]\nnoisy = noisy\n')
    (tmp_path / 'noisy.py').write_text(
        'def fail(sender, msg, send_result): raise LookupError("no such customer")\n'
        'def initialize(context, registry): registry.connect("mq:delivery_successful", fail)\n'
        'def terminate(context): raise LookupError("no such context")\n'
    )

    status, out, err = mq_run(app_ini(server))

    assert (status, out, state()) == (0, 'mq-run: 6 sent; 0 waiting\n', {})
    assert (err.count('LookupError: no such customer'), err.count('LookupError: no such context')) == (6, 1)
    assert len(brought(server)) == 6


# --- not everything ---------------------------------------------------------


def test_a_run_may_be_for_so_many_messages(mq_run, app_ini, put_many, queue_dir, server):
    names = put_many(10)
    before = snapshot(queue_dir / 'new')

    assert mq_run(app_ini(server), '--max-messages', 3) == (0, 'mq-run: 3 sent; 7 waiting\n', '')
    assert sorted(brought(server)) == [f'm{index}@x.example' for index in range(3)]
    assert snapshot(queue_dir / 'new') == {name: before[name] for name in names[3:]}


def test_after_its_time_a_run_waits_for_what_is_in_hand(start, app_ini, put_many, queue_dir, server, make_event):
    names = put_many(5)
    before = snapshot(queue_dir / 'new')
    go_on = make_event()
    server.script['.'] = Wait(go_on)
    code = textwrap.dedent("""
        import sys
        from pyramid_mailqueue.cli import run
        from pyramid_mailqueue.delivery import run as one_run
        one_run.STOP_SECONDS = 0
        wait = one_run.Stop.wait
        def tell_and_wait(self, seconds=None):
            if seconds is None:
                print('its time is over', flush=True)
            else:
                # Until the message is in hand.
                sys.stdin.readline()
            wait(self, seconds)
        one_run.Stop.wait = tell_and_wait
        run.main()
    """)
    process = start(app_ini(server), '--max-time', '0.1', code=code, stdin=subprocess.PIPE)
    server.wait_for(lambda: any(b'Subject' in session.received for session in server.sessions), 30)
    process.stdin.write('\n' * 9)
    process.stdin.flush()
    assert process.stdout.readline() == 'its time is over\n'
    go_on.set()
    out, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (0, '')
    assert out.endswith('mq-run: 1 sent; 4 waiting\n')
    assert brought(server) == ['m0@x.example']
    assert snapshot(queue_dir / 'new') == {name: before[name] for name in names[1:]}


@pytest.mark.parametrize(
    'arguments',
    [
        ['--max-messages', '0'],
        ['--max-messages', 'many'],
        ['--max-messages', '-1'],
        ['--max-time', 'soon'],
        ['--watch=soon'],
    ],
)
def test_a_limit_that_is_none_is_wrong_usage(mq_run, app_ini, arguments):
    status, out, err = mq_run(app_ini(), *arguments)

    assert (status, out) == (2, '')
    assert arguments[0].partition('=')[0] in err


# --- all the time -----------------------------------------------------------


@pytest.fixture
def systemd(tmp_path):
    """
    Listen as systemd does: ``systemd.wait_for('READY=1')``; ``systemd.environ`` is what it gives to a service.

    ``systemd.forget()`` is for who waits for what is said from now on.
    """
    # The path of a socket has to be short.
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f'{folder}/notify')
        sock.settimeout(30)

        def wait_for(word):
            heard = []
            while word not in (heard := [*heard, *sock.recv(4096).decode().splitlines()]):
                pass
            return heard

        def forget():
            sock.settimeout(0)
            with suppress(BlockingIOError):
                while True:
                    sock.recv(4096)
            sock.settimeout(30)

        yield SimpleNamespace(wait_for=wait_for, forget=forget, environ={'NOTIFY_SOCKET': f'{folder}/notify'})


@pytest.fixture
def watch(start, systemd):
    """Start ``mq-run --watch`` with arguments, and return it when it is ready."""

    def watch(*arguments, **options):
        process = start(*arguments, environ=systemd.environ, **options)
        systemd.wait_for('READY=1')
        return process

    return watch


#: Looks again at once, and a relay that is away rests shortly.
OFTEN = ('--watch', '0.05')
SHORT_PAUSES = textwrap.dedent("""
    from pyramid_mailqueue.cli import run
    from pyramid_mailqueue.delivery import route
    BackOff = route.BackOff
    route.BackOff = lambda: BackOff(first=0.05, longest=0.1)
    run.main()
""")


def ended(process):
    """What became of it, when it is told to stop; whether it is in the middle of a round is left to chance."""
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err.replace(STOPPING, '')


def test_who_watches_looks_again_until_told_to_stop(watch, app_ini, put, server, until, state, systemd):
    process = watch(app_ini(server), *OFTEN)
    for number in range(1, 3):
        systemd.wait_for('STATUS=waiting for mail')
        put()
        until(lambda number=number: len(server.messages) == number and state() == {})
        # It may still be about to count what waits.
        systemd.forget()

    systemd.wait_for('STATUS=waiting for mail')
    assert ended(process) == (0, 'mq-run: 1 sent; 0 waiting\n' * 2, '')
    assert 'STOPPING=1' in systemd.wait_for('STOPPING=1')


def test_the_session_is_used_again_by_the_next_round(watch, app_ini, put, server, until, state):
    process = watch(app_ini(server), *OFTEN)
    for number in range(1, 4):
        put()
        until(lambda number=number: len(server.messages) == number and state() == {})

    assert ended(process)[0] == 0
    assert len(server.sessions) == 1


def test_without_mail_who_watches_says_nothing(watch, app_ini, server, systemd):
    process = watch(app_ini(server), *OFTEN)
    for _ in range(5):
        systemd.wait_for('STATUS=waiting for mail')

    assert ended(process) == QUIET
    assert server.sessions == []


def test_a_relay_that_is_away_is_told_of_once_and_nothing_is_changed(watch, app_ini, put_many, server, queue_dir):
    put_many(3)
    before = snapshot(queue_dir / 'new')
    server.script['connect'] = Close('421 4.3.2 away')
    process = watch(app_ini(server), *OFTEN, code=SHORT_PAUSES)
    server.wait_for(lambda: len(server.sessions) >= 3, 30)

    status, _, err = ended(process)
    assert status == 0
    assert err == f'mq-run: {server.host}:{server.port} takes no mail from us: 421 4.3.2 away.\n'
    assert snapshot(queue_dir / 'new') == before


def test_when_the_relay_is_back_mail_goes_out_and_the_next_outage_is_news(
    watch, app_ini, put, server, systemd, until, state
):
    away = f'{server.host}:{server.port} takes no mail from us: 421 4.3.2 away.'
    server.script['connect'] = Close('421 4.3.2 away')
    put()
    process = watch(app_ini(server), *OFTEN, code=SHORT_PAUSES)
    systemd.wait_for(f'STATUS={away}')

    del server.script['connect']
    until(lambda: state() == {})
    systemd.wait_for('STATUS=waiting for mail')

    server.script['connect'] = Close('421 4.3.2 away')
    server.hang_up()
    put()
    systemd.wait_for(f'STATUS={away}')
    assert ended(process) == (0, 'mq-run: 1 sent; 0 waiting\n', f'mq-run: {away}\n' * 2)


def test_while_the_relay_is_away_who_watches_waits_longer(app_ini, put, server):
    class Sleeps(run._Signals):
        def __init__(self):
            super().__init__()
            self.slept = []

        def sleep(self, seconds, *, at_least=0):
            self.slept.append(seconds)
            if len(self.slept) == 3:
                self.stop.request()

    put()
    server.script['connect'] = Close('421 4.3.2 away')
    arguments = run._parser().parse_args([str(app_ini(server)), '--watch', '1'])
    signals = Sleeps()
    with closing(run._build_runner(arguments)) as runner:
        assert run._watch(runner, signals, arguments) == 0

    # It is not really waited here: the relay rests for five seconds, and is not called meanwhile.
    assert all(1 < seconds <= 5 for seconds in signals.slept)
    assert len(server.sessions) == 1


SICK_QUEUE = """
from pyramid_mailqueue import QueueError
from pyramid_mailqueue.results import Recovery

class Queue:
    def __init__(self, settings):
        self.rounds = 0
    def recover(self, now):
        self.rounds += 1
        if self.rounds in (1, 2, 3, 5, 6):
            raise QueueError('The folder /srv/queue/cur cannot be read: Input/output error')
        return Recovery()
    def claim_due(self, now):
        return iter(())
    def flush(self):
        pass
"""


def test_a_queue_that_cannot_be_read_is_told_of_once_and_tried_again(watch, app_ini, tmp_path, systemd):
    (tmp_path / 'sick_queue.py').write_text(SICK_QUEUE)
    error = 'The folder /srv/queue/cur cannot be read: Input/output error'
    process = watch(app_ini(queue='sick_queue.Queue'), *OFTEN)
    heard = [*systemd.wait_for('STATUS=waiting for mail'), *systemd.wait_for('STATUS=waiting for mail')]

    assert [word for word in heard if word != f'STATUS={error}'] == ['STATUS=waiting for mail'] * 2
    assert heard.count(f'STATUS={error}') == 5
    # When it was well in between it is news.
    assert ended(process) == (0, '', f'mq-run: {error}\n' * 2)


QUEUE_THAT_BREAKS = """
from itertools import islice
from pyramid_mailqueue import QueueError
from pyramid_mailqueue.queues.maildir import MaildirQueue

class Queue(MaildirQueue):
    def __init__(self, settings):
        super().__init__(settings.queue_dir)
    def claim_due(self, now):
        yield from islice(super().claim_due(now), 2)
        raise QueueError('The queue has broken')
"""


@pytest.mark.parametrize('watches', [False, True])
def test_what_was_done_before_a_queue_broke_is_told_too(start, watch, app_ini, put_many, server, tmp_path, watches):
    put_many(3)
    (tmp_path / 'broken_queue.py').write_text(QUEUE_THAT_BREAKS)
    ini = app_ini(server, queue='broken_queue.Queue')
    process = watch(ini, *OFTEN, '--max-messages', '3') if watches else start(ini)
    out, err = process.communicate(timeout=30)

    assert (process.returncode, err) == (0 if watches else 75, 'mq-run: The queue has broken\n')
    assert out == 'mq-run: 2 sent; 1 waiting\n' + 'mq-run: 1 sent; 0 waiting\n' * watches


QUEUE_THAT_IS_AWAY_ONCE = """
from pyramid_mailqueue import QueueError
from pyramid_mailqueue.queues.maildir import MaildirQueue

class Queue(MaildirQueue):
    def __init__(self, settings):
        super().__init__(settings.queue_dir)
        self.is_away = True
    def count_waiting(self, most):
        if self.is_away:
            self.is_away = False
            raise QueueError('The queue is away')
        return super().count_waiting(most)
"""


def test_a_queue_that_cannot_be_counted_when_mail_was_sent_ends_nobody_who_watches(
    watch, app_ini, put, server, tmp_path
):
    (tmp_path / 'away_once.py').write_text(QUEUE_THAT_IS_AWAY_ONCE)
    put()
    process = watch(app_ini(server, queue='away_once.Queue'), *OFTEN)

    assert process.stdout.readline() == 'mq-run: 1 sent\n'
    put()
    assert process.stdout.readline() == 'mq-run: 1 sent; 0 waiting\n'
    assert ended(process)[0] == 0


def test_who_watches_and_is_told_to_stop_finishes_the_message_in_hand(
    watch, app_ini, put_many, server, make_event, state
):
    put_many(3)
    go_on = make_event()
    server.script['.'] = [Wait(go_on)]
    process = watch(app_ini(server), *OFTEN)
    server.wait_for(lambda: any(b'\r\n.\r\n' in session.received for session in server.sessions), 30)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == STOPPING
    go_on.set()
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out, err) == (0, 'mq-run: 1 sent; 2 waiting\n', '')
    assert (brought(server), state()) == (['m0@x.example'], {'new': 2})


def test_a_rotation_in_the_middle_of_a_message_is_heard(watch, app_ini, put, server, make_event, systemd, until, state):
    put()
    go_on = make_event()
    server.script['.'] = [Wait(go_on)]
    path = app_ini(server, more=LOGGING)
    log = path.with_name('app.log')
    process = watch(path, *OFTEN)
    server.wait_for(lambda: any(b'\r\n.\r\n' in session.received for session in server.sessions), 30)
    former = log.rename(log.with_suffix('.1'))
    process.send_signal(signal.SIGHUP)
    systemd.wait_for('RELOADING=1')
    systemd.wait_for('READY=1')
    go_on.set()
    until(lambda: state() == {} and 'status=sent' in log.read_text())

    assert ended(process)[0] == 0
    assert 'status=sent' not in former.read_text()


@pytest.mark.parametrize('hears_of_it', [True, False], ids=['SIGHUP', 'unsaid'])
def test_who_watches_goes_on_with_a_new_certificate_and_tells_at_sighup_that_passwords_are_the_same(
    watch, app_ini, put, systemd, until, state, tmp_path, hears_of_it
):
    ca_file = tmp_path / 'ca.pem'

    def certificate():
        ca, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert('127.0.0.1').configure_cert(context)
        # Of the same length and time: nobody sees that it has changed who is not told.
        ca_file.write_bytes(ca.cert_pem.bytes().ljust(4096, b'\n'))
        if hears_of_it:
            os.utime(ca_file, (1, 1))
        return context

    with ScriptedSMTPServer({'.': lambda _: Close('250 2.0.0 ok')}, tls=certificate()) as server:
        path = app_ini(server, more=LOGGING, smtp_tls='starttls', smtp_tls_ca_file=ca_file)
        put()
        process = watch(path, *OFTEN)
        until(lambda: state() == {})

        server.tls = certificate()
        if hears_of_it:
            process.send_signal(signal.SIGHUP)
            systemd.wait_for('RELOADING=1')
            systemd.wait_for('READY=1')
        put()
        until(lambda: state() == {})

    assert ended(process)[0] == 0
    told = path.with_name('app.log').read_text()
    assert told.count('passwords are those of the start') == hears_of_it


# --- nothing that is only told ends or slows what is done --------------------


def take_its_place(log, kind):
    """Let *log* be moved away, and be something that cannot be opened."""
    if kind == 'no folder':
        log.parent.rename(log.parent.with_suffix('.former'))
        return log.parent.with_suffix('.former') / log.name
    former = log.rename(log.with_suffix('.former'))
    if kind == 'a folder':
        log.mkdir()
    elif kind == 'a pipe':
        os.mkfifo(log)
    elif kind == 'a dangling link':
        log.symlink_to(log.parent / 'nowhere' / 'log')
    return former


def give_it_back(log, kind):
    if kind == 'no folder':
        log.parent.mkdir()
    elif kind == 'a folder':
        log.rmdir()
    else:
        log.unlink()


WATCHED_LOG = LOGGING.replace('class = FileHandler', 'class = handlers.WatchedFileHandler').replace(
    'app.log', 'log/log'
)


@pytest.mark.parametrize('kind', ['no folder', 'a folder', 'a dangling link', 'a pipe'])
@pytest.mark.parametrize(
    'keys', [{'delivery_log': '%(here)s/log/log'}, {'more': WATCHED_LOG}], ids=['delivery_log', 'WatchedFileHandler']
)
def test_who_watches_goes_on_in_the_former_log_until_there_can_be_a_new_one(
    watch, app_ini, put, server, tmp_path, until, kind, keys
):
    log = tmp_path / 'log' / 'log'
    log.parent.mkdir()
    process = watch(app_ini(server, **keys), *OFTEN)
    former = take_its_place(log, kind)
    put('ada@x.example')
    put('bob@x.example')
    until(lambda: former.read_text().count('status=sent') == 2)
    give_it_back(log, kind)
    put('eve@x.example')
    until(lambda: log.is_file() and 'to=eve@x.example' in log.read_text())

    status, out, err = ended(process)

    assert status == 0
    assert sum(int(count) for count in re.findall('([0-9]) sent', out)) == 3
    reason = {'a folder': 'Is a directory', 'a pipe': 'it is a pipe'}.get(kind, 'No such file or directory')
    assert err == (
        f'mq-run: {log} cannot be reopened ({reason}); logging continues in the old file\nmq-run: {log} is open again\n'
    )


@pytest.mark.parametrize('kind', ['no folder', 'a folder', 'a dangling link', 'a pipe'])
def test_a_reload_whose_log_cannot_be_opened_ends_nothing(watch, app_ini, put, server, tmp_path, systemd, until, kind):
    log = tmp_path / 'log' / 'app.log'
    log.parent.mkdir()
    process = watch(app_ini(server, LOGGING.replace('%(here)s', '%(here)s/log')), *OFTEN)
    former = take_its_place(log, kind)
    process.send_signal(signal.SIGHUP)
    systemd.wait_for('RELOADING=1')
    systemd.wait_for('READY=1')
    put()
    until(lambda: 'status=sent' in former.read_text())

    status, _, err = ended(process)

    assert (status, err.count('\n')) == (0, 1)
    assert err.endswith('; logging continues in the old file\n')


def test_a_disk_without_room_for_a_log_is_told_in_one_line_and_in_another_when_there_is(
    watch, app_ini, put_many, server, tmp_path, until
):
    log = tmp_path / 'delivery.log'
    log.symlink_to('/dev/full')
    process = watch(app_ini(server, delivery_log=log), *OFTEN)
    put_many(31)
    until(lambda: len(server.messages) == 31)
    log.unlink()
    put_many(1)
    until(lambda: len(server.messages) == 32 and log.is_file() and 'status=sent' in log.read_text())

    status, out, err = ended(process)

    assert status == 0
    assert sum(int(count) for count in re.findall('([0-9]+) sent', out)) == 32
    assert err == (
        f'mq-run: {log} cannot be written (No space left on device); mail is delivered all the same\n'
        f'mq-run: {log} is written again\n'
    )


def test_a_handler_with_a_defect_is_told_in_one_line(watch, app_ini, put_many, server, until, tmp_path):
    (tmp_path / 'broken.py').write_text(
        'import logging\nclass Broken(logging.Handler):\n    def emit(self, record): raise LookupError(record.name)\n'
    )
    path = app_ini(server, LOGGING.replace('FileHandler', 'broken.Broken').replace("('%(here)s/app.log',)", '()'))
    process = watch(path, *OFTEN)
    put_many(3)
    until(lambda: len(server.messages) == 3)

    status, _, err = ended(process)

    assert status == 0
    assert 'Traceback' not in err
    assert 'mq-run: <Broken (NOTSET)> cannot be written (mailqueue.delivery_log); mail is delivered' in err


class Hearer:
    """Who reads what is told, for as long as it does: a pipe, or a socket as the journal's."""

    def __init__(self, kind):
        if kind == 'pipe':
            reader, writer = os.pipe()
            self.writer, self._reader = os.fdopen(writer, 'w'), os.fdopen(reader)
        elif kind == 'full disk':
            # Nobody can go away from there.
            self.writer, self._reader = os.fdopen(os.open('/dev/full', os.O_WRONLY), 'w'), io.StringIO()
        else:
            self._reader, self.writer = socket.socketpair()

    def go_away(self):
        self._reader.close()


@pytest.fixture(params=['pipe', 'socket', 'full disk'])
def hearer(request):
    hearer = Hearer(request.param)
    with closing(hearer.writer):
        yield hearer
        hearer.go_away()


# Everything to stderr, and to stdout too.
LOUD = LOGGING.replace('FileHandler', 'StreamHandler').replace("('%(here)s/app.log',)", '(sys.stderr,)')


@pytest.mark.parametrize(
    ('more', 'goes'), [('', True), (LOUD, True), (LOUD, False)], ids=['gone', 'gone from a dialog', 'deaf']
)
def test_nobody_who_hears_it_ends_or_slows_who_watches(watch, app_ini, put_many, server, until, hearer, more, goes):
    streams = {'stdout': hearer.writer, 'stderr': hearer.writer}
    process = watch(app_ini(server, more, delivery_log='/dev/stdout'), *OFTEN, code=SHORT_PAUSES, **streams)
    put_many(1)
    until(lambda: len(server.messages) == 1)
    if goes:
        hearer.go_away()
    # More than a pipe or a socket keeps for a reader who does not come.
    number = 3 if goes else 200
    put_many(number)
    until(lambda: len(server.messages) == 1 + number)
    # What it complains of ends it no more than what it reports.
    sessions = len(server.sessions)
    server.script['connect'] = Close('421 4.3.2 away')
    server.hang_up()
    put_many(1)
    until(lambda: len(server.sessions) > sessions + 2)
    del server.script['connect']
    until(lambda: len(server.messages) == 2 + number)

    process.send_signal(signal.SIGTERM)

    assert process.wait(10) == 0


def test_an_stderr_that_takes_nothing_changes_no_exit_status(start, app_ini, put):
    put()
    with closing(socket.create_server(('127.0.0.1', 0))) as closed:
        port = closed.getsockname()[1]
    with Path('/dev/full').open('w') as full:
        process = start(app_ini(smtp_port=port), stdout=full, stderr=full)

        assert process.wait(30) == 75


@pytest.mark.parametrize(('mistake', 'status'), [({}, 0), ({'smtp_port': 'x'}, 78)])
def test_a_reader_of_stderr_that_is_gone_changes_no_exit_status(start, app_ini, hearer, mistake, status):
    hearer.go_away()
    process = start(app_ini(**mistake), '-v', stdout=hearer.writer, stderr=hearer.writer)

    assert process.wait(30) == status


@pytest.mark.parametrize('closed', ['1', '2', '12', '012'])
def test_streams_that_are_closed_from_the_start_are_no_queue_files(start, app_ini, put, server, state, closed):
    put()

    process = start(app_ini(server), '-v', preexec_fn=lambda: [os.close(int(fd)) for fd in closed])

    assert process.wait(30) == 0
    assert (len(server.messages), state()) == (1, {})


@pytest.mark.parametrize('name', ['/dev/stdout', '/dev/fd/1', '/proc/self/fd/1', 'link'])
@pytest.mark.parametrize('kind', ['pipe', 'socket'])
def test_a_log_may_go_to_stdout_whatever_that_is(start, app_ini, put, server, tmp_path, name, kind):
    put()
    if name == 'link':
        name = tmp_path / 'link.log'
        name.symlink_to('/dev/stdout')
    ours, theirs = socket.socketpair() if kind == 'socket' else map(os.fdopen, os.pipe(), 'rw')
    with closing(ours), closing(theirs):
        process = start(app_ini(server, delivery_log=name), stdout=theirs)
        status, err = process.wait(30), process.stderr.read()
        told = ours.recv(65536).decode() if kind == 'socket' else os.read(ours.fileno(), 65536).decode()

    assert (status, err) == (0, '')
    assert ' INFO status=sent ' in told
    assert told.endswith('mq-run: 1 sent; 0 waiting\n')


# --- told to stop while it starts -------------------------------------------

# Process 1 of a container, for which a signal without a handler does not exist.
AS_PROCESS_1 = ('unshare', '--fork', '--pid', '--kill-child')


def uncovered():
    """The environment, without what measures coverage: that would hear SIGTERM first, and give it away."""
    return {key: value for key, value in os.environ.items() if not key.startswith('COVERAGE_PROCESS')}


@pytest.fixture(scope='module')
def process_1():
    if subprocess.run([*AS_PROCESS_1, 'true'], check=False, capture_output=True).returncode:
        pytest.skip('no namespace of processes can be made here')


def child_of(process):
    """The process that is number 1 of its own namespace, when it can be told to stop."""
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    while not (pids := children.read_text().split()) or not hears_sigterm(int(pids[0])):
        assert process.poll() is None
        time.sleep(0.001)  # there is nothing that would wake us
    return int(pids[0])


def hears_sigterm(pid):
    caught = re.search('^SigCgt:\t(.*)', Path(f'/proc/{pid}/status').read_text(), re.MULTILINE)[1]
    return int(caught, 16) >> signal.SIGTERM - 1 & 1


def test_signals_are_heard_before_anything_is_imported_that_takes_its_time():
    code = 'import sys; from pyramid_mailqueue.cli import start; print({"argparse", "logging", "ssl"} & {*sys.modules})'

    assert subprocess.check_output([sys.executable, '-c', code], text=True) == 'set()\n'


@pytest.mark.usefixtures('process_1')
@pytest.mark.parametrize('delay', [0, 0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize(('arguments', 'status'), [((), 75), (OFTEN, 0)], ids=['run', 'watch'])
def test_process_1_of_a_container_hears_sigterm_while_it_starts(app_ini, put_many, server, delay, arguments, status):
    put_many(1)
    server.script['connect'] = Silence()
    command = [*AS_PROCESS_1, sys.executable, '-m', 'pyramid_mailqueue.cli.run', str(app_ini(server)), *arguments]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=uncovered()) as process:
        try:
            pid = child_of(process)
            time.sleep(delay)  # the moment at which the signal comes is the subject
            os.kill(pid, signal.SIGTERM)

            assert process.wait(20) == status
        finally:
            process.kill()


@pytest.mark.usefixtures('process_1')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ('arguments', 'status', 'told'),
    [
        ((), 75, 'mq-run: stopped; what was not delivered waits for the next run\n'),
        (('--watch', '5'), 0, ''),
    ],
    ids=['run', 'watch'],
)
def test_an_application_that_takes_long_to_load_is_not_waited_for(
    shop_ini, tmp_path, until, number, arguments, status, told
):
    (tmp_path / 'slow.py').write_text(
        f'import pathlib, time\npathlib.Path({str(tmp_path / "begun")!r}).touch()\ntime.sleep(60)\n'
    )
    path = shop_ini()
    path.write_text(path.read_text().replace('shop:main', 'slow:main'))
    command = [*AS_PROCESS_1, sys.executable, '-m', 'pyramid_mailqueue.cli.run', str(path), '--app', *arguments]
    env = {**uncovered(), 'PYTHONPATH': str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        pid = child_of(process)
        until((tmp_path / 'begun').exists)
        os.kill(pid, number)

        _, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (status, told)


def test_who_watches_for_so_many_messages_ends_with_the_last_of_them(watch, app_ini, put_many, server):
    put_many(4)
    process = watch(app_ini(server), '--watch', '1h', '--max-messages', 2)

    assert process.communicate(timeout=60) == ('mq-run: 2 sent; 2 waiting\n', '')
    assert (process.returncode, len(brought(server))) == (0, 2)


def test_who_watches_for_so_long_ends_then_and_not_with_the_next_look(watch, app_ini, server):
    process = watch(app_ini(server), '--watch', '1h', '--max-time', '0.2')

    assert process.communicate(timeout=60) == ('', '')
    assert process.returncode == 0


def test_who_watches_may_be_told_how_often_or_not(app_ini):
    path = str(app_ini())
    told = [[path, '--watch'], ['--watch', path], ['--watch', '30', path], ['--watch=2m', path], [path]]

    parsed = [run._parser().parse_args(run._with_interval(arguments)) for arguments in told]

    assert [arguments.watch for arguments in parsed] == [run.WATCH_INTERVAL, run.WATCH_INTERVAL, 30, 120, None]
    assert {arguments.ini for arguments in parsed} == {path}


# --- what it costs ----------------------------------------------------------

# Each of them takes a good part of the time that a run without mail has.
NOT_FOR_NOTHING = {'asyncio', 'blinker', 'difflib', 'pyramid', 'schwarz', 'sqlalchemy', 'transaction', 'webob'}


def test_a_run_without_mail_imports_only_what_it_needs(app_ini):
    command = [sys.executable, '-X', 'importtime', '-m', 'pyramid_mailqueue.cli.run', app_ini()]
    imported = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    packages = {line.rpartition('|')[2].strip().partition('.')[0] for line in imported.splitlines()}
    assert 'pyramid_mailqueue' in packages
    assert packages & NOT_FOR_NOTHING == set()
