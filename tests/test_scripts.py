"""Scripts: who sends mail in them, with Pyramid and without; and what is told of mail that a script leaves behind."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import transaction

from pyramid_mailqueue import mailer_from_settings

EXPLICIT = {'tm.manager_hook': 'pyramid_tm.explicit_manager'}

APPLICATION = """
from pyramid.config import Configurator

def main(global_config, **settings):
    with Configurator(settings=settings) as config:
        config.include('pyramid_tm')
        config.include('pyramid_mailqueue')
        return config.make_wsgi_app()
"""

MESSAGE = """
from email.message import EmailMessage

def message(to):
    made = EmailMessage()
    made['From'], made['To'] = 'shop@site.example', f'{to}@x.example'
    made.set_content('Hello')
    return made
"""

WITH_PYRAMID = """
import transaction
from pyramid.paster import bootstrap
from pyramid_mailqueue import IMailer
env = bootstrap('app.ini')
request, mailer = env['request'], env['registry'].getUtility(IMailer)
"""

WITHOUT_PYRAMID = """
import os, sys, threading, transaction
from pyramid_mailqueue import mailer_from_settings
mailer = mailer_from_settings(settings)
"""


@pytest.fixture
def settings(make_settings):
    return make_settings(smtp_hostname='localhost', delivery='queue')


@pytest.fixture
def run(tmp_path, settings):
    """Run a program over a real ini file, in a process of its own; return what it has said on stderr."""

    def run(arguments, *, given=None, status=0, **own):
        lines = '\n'.join(f'{key} = {value}' for key, value in (settings | own).items())
        (tmp_path / 'shop_application.py').write_text(APPLICATION)
        (tmp_path / 'app.ini').write_text(f'[app:main]\nuse = call:shop_application:main\n{lines}\n')
        process = subprocess.run(
            arguments, check=False, input=given, capture_output=True, text=True, cwd=tmp_path, timeout=60,
            # Some versions of Pyramid have warnings of their own.
            env=os.environ | {'PYTHONWARNINGS': 'ignore', 'PYTHONPATH': str(tmp_path)},
        )  # fmt: skip
        assert process.returncode == status, process.stderr
        return process.stderr

    return run


@pytest.fixture
def run_script(run, settings):
    def run_script(code, status=0, **own):
        program = f'settings = {settings | own}\n{MESSAGE}{code}'
        return run([sys.executable, '-c', program], status=status, **own)

    return run_script


@pytest.fixture
def waiting(queue_dir):
    """Return for whom messages wait in the queue."""

    def waiting():
        headers = [path.read_text() for path in (queue_dir / 'new').iterdir()]
        return sorted(name for header in headers for name in re.findall(r'^Envelope-to: (\w+)@', header, re.MULTILINE))

    return waiting


LOST = re.compile(
    r'status=discarded msgid=<\S+> to=(\w+)@x.example reason="its transaction was never committed: '
    r".*'with transaction\.manager:'.*'with request.tm:'.*commit\(\).*send_immediately\(\).*enqueue\(\)\"$",
    re.MULTILINE,
)


# --- with Pyramid -----------------------------------------------------------


@pytest.mark.parametrize('manager', [{}, EXPLICIT], ids=['thread', 'explicit'])
def test_a_script_with_an_ini_file_sends_in_the_transaction_that_it_begins(run_script, waiting, manager):
    told = run_script(
        WITH_PYRAMID
        + """
with request.tm:
    request.mailer.send(message('block'))
request.tm.begin()
mailer.send(message('begin'))
request.tm.commit()
for attempt in request.tm.attempts():
    with attempt:
        request.mailer.send(message('attempt'))
request.tm.begin()
mailer.send(message('aborted'))
request.tm.abort()
env['closer']()
""",
        **manager,
    )

    assert (told, waiting()) == ('', ['attempt', 'begin', 'block'])


def test_a_script_with_an_ini_file_may_only_commit(run_script, waiting):
    told = run_script(WITH_PYRAMID + "request.mailer.send(message('ada'))\ntransaction.commit()\n")

    assert (told, waiting()) == ('', ['ada'])


def test_a_script_with_an_ini_file_that_never_commits_is_told_in_the_end(run_script, waiting):
    told = run_script(WITH_PYRAMID + "request.mailer.send(message('ada'))\nmailer.send(message('bob'))\n")

    assert (sorted(LOST.findall(told)), len(told.splitlines()), waiting()) == (['ada', 'bob'], 2, [])


def test_pshell_is_a_script(run, waiting):
    told = run(
        [Path(sys.executable).with_name('pshell'), '-p', 'python', 'app.ini'],
        given=f"""
exec({MESSAGE!r})
with request.tm: request.mailer.send(message('block'))

request.mailer.send(message('commit'))
request.tm.commit()
request.mailer.send(message('lost'))
""",
    )

    assert waiting() == ['block', 'commit']
    assert LOST.findall(told) == ['lost']


# --- without ----------------------------------------------------------------


def test_a_script_that_commits_has_nothing_to_be_told(run_script, waiting):
    told = run_script(
        WITHOUT_PYRAMID
        + """
mailer.send(message('ada'))
transaction.commit()
with transaction.manager:
    mailer.send(message('bob'))
mailer.send(message('eve'))
transaction.abort()
"""
    )

    assert (told, waiting()) == ('', ['ada', 'bob'])


def test_a_script_that_fails_in_its_transaction_is_told_of_its_failure_only(run_script, waiting):
    told = run_script(
        WITHOUT_PYRAMID + "with transaction.manager:\n    mailer.send(message('ada'))\n    1 / 0\n", status=1
    )

    assert (LOST.findall(told), waiting()) == ([], [])
    assert told.endswith('ZeroDivisionError: division by zero\n')


NEVER_COMMITTED = {
    'to the end': "mailer.send(message('ada'))",
    'until another transaction begins': "mailer.send(message('ada'))\nwith transaction.manager: pass",
    'in a thread that ends': (
        "job = threading.Thread(target=lambda: mailer.send(message('ada')))\njob.start()\njob.join()"
    ),
    'by a program that exits': "mailer.send(message('ada'))\nsys.exit()",
    'although it was begun': "transaction.begin()\nmailer.send(message('ada'))",
    'by a manager of its own': (
        'manager = transaction.TransactionManager(explicit=True)\n'
        'mailer = mailer_from_settings(settings, manager)\n'
        "manager.begin()\nmailer.send(message('ada'))"
    ),
    'but for a part that was rolled back on purpose': (
        "mailer.send(message('ada'))\n"
        "savepoint = transaction.savepoint()\nmailer.send(message('bob'))\nsavepoint.rollback()"
    ),
}


@pytest.mark.parametrize('code', NEVER_COMMITTED.values(), ids=NEVER_COMMITTED)
def test_mail_that_is_never_committed_is_told_once_with_what_helps(run_script, waiting, code):
    told = run_script(f'{WITHOUT_PYRAMID}{code}\n')

    assert (LOST.findall(told), len(told.splitlines()), waiting()) == (['ada'], 1, [])


FORKS = """
mailer.send(message('parent'))
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
else:
    mailer.send(message('child'))
    {}
"""


@pytest.mark.parametrize(('ends', 'lost'), [('', ['child', 'parent']), ('transaction.begin()', ['child', 'parent'])])
def test_a_forked_child_is_told_of_its_own_mail_only(run_script, waiting, ends, lost):
    told = run_script(WITHOUT_PYRAMID + FORKS.format(ends))

    assert (LOST.findall(told), waiting()) == (lost, [])


def test_what_the_background_leaves_is_told_when_the_script_ends(run_script, waiting, smtp_server):
    names = [f'n{number}' for number in range(300)]
    code = f'for name in {names}:\n    with transaction.manager: mailer.send(message(name))\n'
    told = run_script(
        WITHOUT_PYRAMID + code,
        **{
            'mailqueue.delivery': 'background',
            'mailqueue.smtp_hostname': '127.0.0.1',
            'mailqueue.smtp_port': smtp_server.port,
        },
    )

    left = waiting()
    assert len(left) + len(smtp_server.received) == 300
    (line,) = told.splitlines()
    assert f'left in the queue for mq-run, because this process stops delivering: {len(left)}. ' in line
    assert 'mailqueue.delivery = inline' in line


def test_a_script_that_delivers_inline_leaves_nothing(run_script, waiting, smtp_server):
    code = "for name in 'abcde':\n    with transaction.manager: mailer.send(message(name))\n"
    told = run_script(
        WITHOUT_PYRAMID + code,
        **{
            'mailqueue.delivery': 'inline',
            'mailqueue.smtp_hostname': '127.0.0.1',
            'mailqueue.smtp_port': smtp_server.port,
        },
    )

    assert (told, waiting(), len(smtp_server.received)) == ('', [], 5)


# --- in a process that goes on ----------------------------------------------


@pytest.fixture
def levels(caplog):
    """The level and the Message-ID of each message that was discarded, as the log has it."""
    caplog.set_level(logging.INFO, 'mailqueue.queue_log')

    def levels():
        return [
            (record.levelname, record.mailqueue['msgid'])
            for record in caplog.records
            if getattr(record, 'mailqueue', {}).get('status') == 'discarded'
        ]

    return levels


@pytest.fixture
def manager():
    return transaction.TransactionManager()


@pytest.fixture
def mailer(settings, manager):
    mailer = mailer_from_settings(settings, manager)
    yield mailer
    manager.abort()
    mailer.close()


def test_an_abort_on_purpose_is_no_error(mailer, manager, message, levels):
    first = mailer.send(message('one'))
    manager.abort()
    manager.begin()
    second = mailer.send(message('two'))
    manager.get().abort()

    assert levels() == [('INFO', first), ('INFO', second)]


def test_mail_of_a_transaction_that_another_one_takes_the_place_of_is_an_error(mailer, manager, message, levels):
    lost = mailer.send(message('lost'))
    manager.begin()
    dropped = mailer.send(message('dropped'))
    manager.abort()

    assert levels() == [('ERROR', lost), ('INFO', dropped)]


def test_a_commit_that_failed_is_no_error_of_who_begins_the_next_transaction(
    mailer, manager, message, levels, queue_dir
):
    dropped = mailer.send(message('dropped'))
    (queue_dir / 'tmp').rmdir()
    with pytest.raises(Exception, match=str(queue_dir)):
        manager.commit()
    manager.begin()

    assert levels() == [('INFO', dropped)]


def test_mail_of_a_manager_that_is_forgotten_is_an_error(settings, message, levels):
    manager = transaction.TransactionManager(explicit=True)
    mailer = mailer_from_settings(settings, manager)
    manager.begin()
    lost = mailer.send(message('lost'))
    del mailer, manager
    gc.collect()

    assert levels() == [('ERROR', lost)]


def test_mail_of_a_thread_that_ends_is_an_error(settings, message, levels):
    mailer, lost = mailer_from_settings(settings), []
    thread = threading.Thread(target=lambda: lost.append(mailer.send(message('lost'))))
    thread.start()
    thread.join()
    gc.collect()

    assert levels() == [('ERROR', lost[0])]


def test_what_has_ended_is_kept_by_nobody(mailer, manager, message):
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        mailer.send(message('dropped'))
        manager.abort()

    gc.collect()
    assert len(gc.get_objects()) - before < 50
