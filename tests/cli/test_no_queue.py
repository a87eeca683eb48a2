"""What commands do where there is no queue: they say so, and make none.  Only ``mq-queue init`` does."""

from __future__ import annotations

import json
import os
import pwd
import tempfile
from pathlib import Path

import pytest

from pyramid_mailqueue import enqueue_message, mailer_from_settings, one_shot_queue_run
from pyramid_mailqueue.cli import queue, queue_init, run, send_test
from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.folders import FOLDERS
from pyramid_mailqueue.testing import ScriptedSMTPServer
from tests.parts.children import run_in_child
from tests.parts.states import ENVELOPE

ZOPE = b'X-Zope-From: a@x.example\nX-Zope-To: b@x.example\nSubject: x\n\nHello.\n'

#: Every command, with its main function and its arguments; none of them is to create a queue.
COMMANDS = {
    'mq-run': (run.main, []),
    'mq-run --watch': (run.main, ['--watch', '--max-time', '1']),
    'mq-send-test': (send_test.main, ['--to=a@x.example']),
    **{
        f'mq-queue {name}': (queue.main, [name, *arguments])
        for name, *arguments in (
            ['list'],
            ['show', '1'],
            ['stats'],
            ['retry', '1'],
            ['retry', '--all'],
            ['hold', '1'],
            ['unhold', '1'],
            ['release', '1'],
            ['delete', '--yes', '1'],
            ['flush'],
            ['metrics'],
        )
    },
}


def nothing(path):
    pass


def empty(path):
    path.mkdir()


def file(path):
    path.write_text('not a directory')


def link(path):
    path.symlink_to('nowhere')


def other(path):
    path.mkdir()
    (path / 'production.ini').touch()


def zope(path):
    for name in ('tmp', 'new', 'cur'):
        (path / name).mkdir(parents=True)
    (path / 'new' / '1795448044.1.web1.2').write_bytes(ZOPE)


#: What there is instead of a queue, and what is told of it.
PLACES = {
    nothing: 'there is no such directory. The application creates its queue there when it starts, and so does: mq-q',
    empty: 'the directory is empty. The application creates its queue there when it starts, and so does: mq-queue',
    file: 'File exists, and is no directory. A queue needs a directory of its own',
    link: 'It is a link to nowhere, which is not there',
    other: 'is no queue: there is production.ini in it. A queue needs a directory of its own: name another one',
    zope: 'is the queue of zope.sendmail: new/1795448044.1.web1.2 is one of its messages. Nothing was changed. ',
}


@pytest.fixture(params=PLACES, ids=lambda make: make.__name__)
def place(request, queue_dir):
    """A directory that is no queue, and what is told of it."""
    request.param(queue_dir)
    return queue_dir, PLACES[request.param]


@pytest.fixture
def ini(tmp_path):
    """The ini file of an app that keeps its log beside its mail: ``ini('key = value')``."""

    def ini(*keys):
        path = tmp_path / 'app.ini'
        lines = ['queue_dir = %(here)s/queue', 'smtp_hostname = 127.0.0.1', *keys]
        path.write_text('[app:main]\nuse = egg:not_installed\n' + ''.join(f'mailqueue.{line}\n' for line in lines))
        return path

    return ini


@pytest.fixture
def call(capsys):
    """Call the main function of a command; return the exit status and what was printed."""

    def call(main, *arguments):
        with pytest.raises(SystemExit) as exit_:
            main(list(map(str, arguments)))
        return exit_.value.code, *capsys.readouterr()

    return call


def seen(path):
    return {str(found): found.is_file() and found.read_bytes() for found in sorted(path.rglob('*'))}


# --- nothing is created -----------------------------------------------------


@pytest.mark.parametrize('name', COMMANDS)
def test_a_command_creates_nothing_and_says_what_there_is(call, ini, tmp_path, place, name):
    main, arguments = COMMANDS[name]
    path = ini('queue_log = %(here)s/queue/log/queue.log')
    before = seen(tmp_path)

    status, out, err = call(main, path, *arguments)

    assert (status, out) == (78, '')
    assert err.startswith(f'{name.partition(" ")[0]}: {path}: mailqueue.queue_dir = {place[0]}: ')
    assert place[1] in err
    assert len(err.splitlines()) == 1
    assert seen(tmp_path) == before


@pytest.mark.parametrize('name', COMMANDS)
def test_so_it_is_with_a_directory_on_the_command_line(call, ini, tmp_path, queue_dir, name):
    main, arguments = COMMANDS[name]
    MaildirQueue(queue_dir)
    path = ini()
    before = seen(tmp_path)

    status, out, err = call(main, path, '--queue-dir', tmp_path / 'typo', *arguments)

    assert (status, out) == (78, '')
    assert f'mailqueue.queue_dir = {tmp_path}/typo: there is no such directory.' in err
    assert seen(tmp_path) == before


@pytest.mark.parametrize('main', [run.main, send_test.main])
def test_so_it_is_with_a_directory_behind_the_file(call, ini, tmp_path, main):
    options = ['--to=a@x.example'] if main is send_test.main else []

    assert call(main, ini(), tmp_path / 'typo', *options)[0] == 78
    assert not (tmp_path / 'typo').exists()


def test_a_check_is_unknown(call, ini, tmp_path, place):
    path = ini()
    before = seen(tmp_path)

    status, out, err = call(queue.main, path, 'check')
    assert (status, err) == (3, '')
    assert out.startswith(f'MAILQUEUE UNKNOWN - {path}: mailqueue.queue_dir = {place[0]}: ')
    assert place[1] in out

    status, out, err = call(queue.main, path, 'check', '--json')
    assert (status, json.loads(out)['status']) == (3, 'UNKNOWN')
    assert seen(tmp_path) == before


def test_a_run_of_a_program_creates_nothing(tmp_path, place):
    before = seen(tmp_path)
    log = tmp_path / 'queue' / 'queue.log'

    with pytest.raises(ConfigurationError) as info:
        one_shot_queue_run(place[0], settings={'smtp_hostname': '127.0.0.1', 'queue_log': log})

    assert place[1] in str(info.value)
    assert seen(tmp_path) == before


def test_commands_that_only_look_leave_a_queue_of_mailqueue_runner_as_it_is(call, ini, queue_dir):
    for name in ('tmp', 'new', 'cur'):
        (queue_dir / name).mkdir(parents=True)
    path = ini()
    before = seen(queue_dir)

    for command in ('list', 'stats', 'check', 'metrics'):
        assert call(queue.main, path, command)[0] == 0
    assert call(queue.main, path, 'show', 'x')[0] == 1
    assert seen(queue_dir) == before


def test_a_run_drains_a_queue_of_mailqueue_runner(call, ini, queue_dir):
    name = MaildirQueue(queue_dir).put(ENVELOPE)
    for folder in {*FOLDERS} - {'tmp', 'new', 'cur'}:
        (queue_dir / folder).rmdir()
    with ScriptedSMTPServer() as server:
        assert call(run.main, ini(f'smtp_port = {server.port}')) == (0, 'mq-run: 1 sent; 0 waiting\n', '')

    assert len(server.messages) == 1, name


# --- who creates ------------------------------------------------------------


def test_init_creates_the_directory(call, ini, queue_dir):
    status, out, err = call(queue.main, ini(), 'init')

    hint = f'mq-queue: it belongs to root; for an application that runs as another user: chown -R USER: {queue_dir}\n'
    assert (status, out, err) == (0, f'{queue_dir} is ready\n', hint if os.geteuid() == 0 else '')
    assert sorted(path.name for path in queue_dir.iterdir()) == sorted(FOLDERS)
    assert call(queue.main, ini(), 'list')[0] == 0


def test_init_creates_another_directory_too(call, ini, tmp_path):
    assert call(queue.main, ini(), '--queue-dir', tmp_path / 'other', 'init')[0] == 0
    assert call(queue.main, ini(), '--queue-dir', tmp_path / 'other', 'check')[0] == 0


@pytest.mark.parametrize('make', [other, zope, file, link], ids=lambda make: make.__name__)
def test_init_makes_no_queue_of_what_is_somebody_elses(call, ini, queue_dir, make):
    make(queue_dir)
    before = seen(queue_dir.parent)

    path = ini()
    status, out, err = call(queue.main, path, 'init')

    assert (status, out) == (78, '')
    assert PLACES[make] in err
    assert seen(queue_dir.parent) == {**before, str(path): path.read_bytes()}


def test_whoever_is_not_root_is_not_told_of_owners(call, ini, queue_dir, monkeypatch):
    monkeypatch.setattr(queue_init.os, 'geteuid', lambda: 1000)

    assert call(queue.main, ini(), 'init') == (0, f'{queue_dir} is ready\n', '')


def test_the_application_creates_it_and_makes_none_of_what_is_somebody_elses(place):
    path, told = place
    settings = {'mailqueue.queue_dir': str(path), 'mailqueue.smtp_hostname': 'localhost'}
    before = seen(path)

    if 'application creates' in told:
        mailer_from_settings(settings)
        assert sorted(found.name for found in path.iterdir()) == sorted(FOLDERS)
    else:
        with pytest.raises(ConfigurationError) as info:
            mailer_from_settings(settings)
        assert str(path) in str(info.value)
        assert told in str(info.value)
        assert seen(path) == before


def test_a_program_that_queues_a_message_creates_it(queue_dir):
    path = enqueue_message(b'Subject: x\r\n\r\n', queue_dir, 'a@x.example', ['b@x.example'])

    assert path.startswith(f'{queue_dir}/new/')


# --- who may not ------------------------------------------------------------

NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason='needs another user')
@pytest.mark.parametrize('name', ['mq-run', 'mq-send-test', 'mq-queue list', 'mq-queue check'])
def test_whoever_may_not_use_a_queue_is_told_whose_it_is(call, ini, name):
    main, arguments = {**COMMANDS, 'mq-queue check': (queue.main, ['check'])}[name]
    path = ini()
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        place = MaildirQueue(f'{parent}/queue').path
        text = path.read_text()
        path.write_text(text.replace('%(here)s/queue', '/nowhere'))
        # It loads what another user cannot load from the home of root.
        call(main, path, *arguments)
        Path(parent, 'app.ini').write_text(text)

        def use():
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            return call(main, f'{parent}/app.ini', *arguments)

        status, out, err = run_in_child(use)

    me, owner = (pwd.getpwuid(uid).pw_name for uid in (NOBODY, 0))
    assert f'the user {me} may not read {place}, which belongs to {owner}' in out + err
    assert status == (3 if name == 'mq-queue check' else 78)
