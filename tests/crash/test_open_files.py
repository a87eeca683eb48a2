"""How many files a process keeps open for mail that waits, and who stands for the messages whose files are closed."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
import time
from contextlib import closing

import pytest

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.exceptions import WrongState
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.results import Settlement
from tests.parts.children import Child, run_in_child
from tests.parts.maildir import HOUR, OTHER, Told, at, forget, message_of, names, stage, where

#: Web processes that open the application's database beside their mail, and then tell how many files are open.
APPLICATION = """
import json, os, sqlite3, sys
from email.message import EmailMessage
import transaction
from pyramid_mailqueue.settings import Settings
from pyramid_mailqueue.application import build_mailer

directory, delivery, port, mailers, commits, messages = *sys.argv[1:3], *map(int, sys.argv[3:])
settings = {'smtp_hostname': '127.0.0.1', 'smtp_port': port, 'delivery': delivery, 'plugins': 'none'}
mailers = [
    build_mailer(Settings.from_mapping(
        {f'mailqueue.{key}': value for key, value in {**settings, 'queue_dir': f'{directory}/{number}'}.items()}
    ))
    for number in range(mailers)
]
message = EmailMessage()
message['From'], message['To'], message['Subject'] = 'sender@site.example', 'user@x.example', 'hello'
message.set_content('hello')

failed, most = [], 0
for number in range(commits):
    try:
        with transaction.manager:
            for _ in range(messages):
                mailers[number % len(mailers)].send(message)
        database = sqlite3.connect(f'{directory}/database')
        database.execute('CREATE TABLE IF NOT EXISTS orders (id)')
        database.execute('INSERT INTO orders VALUES (1)')
        database.commit()
        database.close()
    except Exception as error:
        failed.append(repr(error))
    most = max(most, len(os.listdir('/proc/self/fd')))
print(json.dumps([failed, most]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def silent_port():
    """A server that accepts every connection, and never says anything."""
    with closing(socket.create_server(('127.0.0.1', 0), backlog=128)) as server:
        yield server.getsockname()[1]


def application(directory, delivery, port, *numbers, limit):
    python = ['sh', '-c', f'ulimit -n {limit} && exec "$@"', 'sh', sys.executable, '-c', APPLICATION]
    arguments = [*python, str(directory), delivery, *map(str, (port, *numbers))]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wheres(directory, mailers):
    """The number of files in each folder, over all queues."""
    found = [where(MaildirQueue(directory / str(number))) for number in range(mailers)]
    return {folder: sum(one.get(folder, 0) for one in found) for folder in {*found[0]}.union(*found)}


@pytest.mark.parametrize(('mailers', 'commits', 'limit'), [(1, 300, 256), (5, 600, 512), (5, 100, 100)])
def test_a_server_that_never_greets_takes_no_files_from_the_application(
    tmp_path, silent_port, recorder, mailers, commits, limit
):
    with application(tmp_path, 'background', silent_port, mailers, commits, 1, limit=limit) as process:
        failed, most = json.loads(process.stdout.readline())
        process.kill()

    assert failed == []
    # The interpreter has some open, and each mailer its connection.
    assert most <= limit // 8 + 2 * mailers + 10
    assert sum(wheres(tmp_path, mailers).values()) == commits
    for number in range(mailers):
        queue = MaildirQueue(tmp_path / str(number))
        assert len(Runner(queue, MessageHandler([recorder])).run().recovery.orphans) <= 2
    assert len(recorder.subjects) == commits


@pytest.mark.parametrize('delivery', ['background', 'queue'])
def test_a_transaction_may_have_more_messages_than_its_process_may_open_files(tmp_path, silent_port, delivery):
    with application(tmp_path, delivery, silent_port, 1, 1, 2000, limit=200) as process:
        failed, most = json.loads(process.stdout.readline())
        process.kill()

    assert failed == []
    assert most <= 200 // 8 + 12
    assert sum(wheres(tmp_path, 1).values()) == 2000


# --- the messages of a transaction whose files are closed ---------------------


@pytest.fixture
def queue(tmp_path):
    return MaildirQueue(tmp_path)


FIVE = [(message_of(f'{letter}@x.example'), True) for letter in 'abcde']


@pytest.mark.usefixtures('few_files')
def test_nobody_takes_what_is_prepared_and_closed_while_its_transaction_lives(queue, tmp_path):
    staging = stage(queue, *FIVE)

    for in_doubt in ('send', 'discard', 'hold'):
        other = MaildirQueue(tmp_path, in_doubt=in_doubt)
        assert other.recover(time.time()).in_doubt == ()
        assert other.counts()['in doubt'] == 0
        assert [*other.admin.entries(['in doubt'])] == []

    assert where(queue) == {'prepared': 5}
    staging.publish()
    assert where(queue) == {'new': 5}


@pytest.mark.usefixtures('few_files')
def test_a_person_is_told_that_a_closed_message_is_being_committed(queue):
    staging = stage(queue, *FIVE)

    with pytest.raises(WrongState, match='its transaction is being committed right now'):
        queue.admin.delete(names(queue, 'prepared')[-1])

    staging.discard()


@pytest.mark.usefixtures('few_files')
def test_an_abort_removes_all_messages_the_first_one_last(queue):
    staging = stage(queue, *FIVE)
    removed = []
    real, queue.drop = queue.drop, lambda file: removed.append(file.name) or real(file)

    assert len(staging.discard()) == 5

    assert where(queue) == {}
    assert removed[-1] == min(removed)
    assert [name.rpartition('+')[0] for name in removed[:-1]] == [removed[-1]] * 4


@pytest.mark.forks
@pytest.mark.usefixtures('few_files')
@pytest.mark.parametrize('in_doubt', ['hold', 'send', 'discard'])
def test_a_process_that_is_killed_after_its_vote_leaves_all_messages_in_doubt(tmp_path, in_doubt):
    queue = MaildirQueue(tmp_path, in_doubt=in_doubt)

    def vote(connection):
        staging = stage(queue, *FIVE)
        connection.send(names(queue, 'prepared'))
        connection.recv()
        staging.publish()

    with Child(vote) as child:
        prepared = child.hear()
        assert queue.recover(time.time()).in_doubt == ()
        child.kill()
        recovery = queue.recover(time.time())

    found = {'hold': recovery.in_doubt, 'send': recovery.sent, 'discard': recovery.discarded}
    assert sorted(found[in_doubt]) == prepared
    assert where(queue) == {'hold': {'prepared': 5}, 'send': {'new': 5}, 'discard': {}}[in_doubt]


@pytest.mark.usefixtures('few_files')
def test_a_person_decides_about_each_message_in_doubt_by_itself(queue):
    forget(stage(queue, *FIVE))
    first, second, third, *others = names(queue, 'prepared')

    assert queue.admin.release(first).id == first
    assert queue.admin.release(second).id == second
    assert queue.admin.delete(third).id == third

    assert names(queue, 'new') == [first, second]
    assert names(queue, 'prepared') == others
    assert queue.counts()['in doubt'] == 2


@pytest.mark.forks
@pytest.mark.usefixtures('few_files')
def test_a_forked_child_leaves_the_closed_messages_to_its_parent(queue):
    staging = stage(queue, *FIVE)

    def end_it():
        if staging.publish() != [None] * 5:
            return 'published'
        staging.discard()
        return where(queue)

    assert run_in_child(end_it) == {'prepared': 5}
    assert len([claim for claim in staging.publish() if claim is not None]) == 5
    assert where(queue) == {'new': 5}


@pytest.mark.forks
@pytest.mark.usefixtures('few_files')
def test_runs_that_discard_what_is_in_doubt_take_nothing_of_a_commit(tmp_path):
    queue = MaildirQueue(tmp_path, in_doubt='discard')

    def recover(connection):
        found = 0
        while not connection.poll():
            recovery = queue.recover(time.time())
            found += len(recovery.in_doubt + recovery.discarded + recovery.sent)
            queue.counts()
        connection.send(found)

    with Child(recover) as one, Child(recover) as other:
        for _ in range(60):
            stage(queue, *FIVE).publish()
        for child in (one, other):
            child.tell()
            assert child.hear() == 0

    assert where(queue) == {'new': 300}


# --- messages that are taken when their turn comes ------------------------------


@pytest.fixture
def later(queue, few_files):
    """A claim that holds nothing yet, and the name of its message."""
    (claim,) = stage(queue, (OTHER, True)).publish()
    return claim


def test_a_closed_message_is_anybodys_until_its_turn_comes(queue, later):
    (taken,) = queue.claim_due(time.time())

    assert not later.begin()

    taken.release()
    assert not later.begin()
    assert where(queue) == {'new': 1}


def test_a_closed_message_is_taken_when_its_turn_comes(queue, later):
    assert where(queue) == {'new': 1}

    assert later.begin()

    assert where(queue) == {'cur': 1}
    assert later.envelope == OTHER
    assert [*queue.claim_due(time.time())] == []
    later.release()
    assert where(queue) == {'new': 1}


def test_a_closed_message_that_somebody_else_has_put_off_is_not_due(queue, later):
    (taken,) = queue.claim_due(time.time())
    taken.settle(Settlement(OTHER.recipients, due=time.time() + HOUR))

    assert not later.begin()

    assert where(queue) == {'new': 1}
    assert queue.claim(later.id) is None


def test_a_closed_message_that_was_given_back_is_not_taken_later(queue, later):
    later.release()

    assert not later.begin()
    assert where(queue) == {'new': 1}


def test_a_closed_message_waits_if_no_file_can_be_opened(queue, later, caplog):
    told = Told(caplog)

    def begin():
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        return later.begin(), told(problem='cannot be claimed, and has to wait')[0]['error']

    has_begun, error = run_in_child(begin)

    assert not has_begun
    assert 'Too many open files' in error
    assert at(queue, 'new', later.id).exists()
