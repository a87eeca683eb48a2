"""The queue that is a directory: on a real file system, between real processes and threads."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import logging
import os
import pwd
import re
import resource
import socket
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest
from zope.interface.verify import verifyObject

from pyramid_mailqueue.exceptions import QueueError, QueueFileError
from pyramid_mailqueue.interfaces import IClaim, IMailQueue, IStaging
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue, locked_file
from pyramid_mailqueue.queues.maildir import folders as maildir_folders
from pyramid_mailqueue.queues.maildir import queue as maildir
from pyramid_mailqueue.queues.maildir import trouble as maildir_trouble
from pyramid_mailqueue.queues.maildir.folders import FOLDERS
from pyramid_mailqueue.results import Burial, Settlement
from tests.parts.children import Child, no_open_files_are_left, run_in_child
from tests.parts.faults import Fault, Log, intercepted
from tests.parts.maildir import (
    CONTENT,
    ENVELOPE,
    HOUR,
    LATER,
    OTHER,
    Told,
    at,
    claim,
    forget,
    names,
    names_in,
    put,
    stage,
    where,
)


@pytest.fixture
def queue(tmp_path):
    return MaildirQueue(tmp_path / 'queue')


@pytest.fixture
def told(caplog):
    return Told(caplog)


# --- the directory ----------------------------------------------------------


def test_the_contracts_are_kept(queue):
    verifyObject(IMailQueue, queue)
    verifyObject(IStaging, queue.staging())
    verifyObject(IClaim, queue.put_claimed(ENVELOPE))


@pytest.mark.parametrize('umask', [0, 0o022, 0o077, 0o777])
def test_folders_and_files_are_private_whatever_the_umask(tmp_path, umask):
    queue_dir = tmp_path / 'queue'

    def work():
        os.umask(umask)
        queue = MaildirQueue(queue_dir)
        queue.put_claimed(ENVELOPE).settle(
            Settlement(('a@x.example',), due=1, burials=(Burial(('b@x.example',), 'no'),))
        )
        forget(stage(queue, (ENVELOPE, True)))

    run_in_child(work)

    modes = {'folder': {mode_of(queue_dir)}, 'file': set()}
    for path in queue_dir.rglob('*'):
        modes['folder' if path.is_dir() else 'file'].add(mode_of(path))
    assert modes == {'folder': {0o700}, 'file': {0o600}}


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_directory_and_its_parents_are_created(tmp_path):
    queue = MaildirQueue(tmp_path / 'not' / 'yet' / 'there')

    assert sorted(names_in(queue.path)) == sorted(FOLDERS)
    assert repr(queue) == f'<MaildirQueue {tmp_path}/not/yet/there>'


def test_a_new_directory_outlives_a_power_cut(tmp_path):
    with intercepted(Log()) as log:
        MaildirQueue(tmp_path / 'queue')

    steps = [(call.name, call.args[0]) for call in log.calls if call.name in {'makedirs', 'open'}]
    assert steps[:2] == [('makedirs', f'{tmp_path}/queue'), ('open', str(tmp_path))]
    assert steps[2:] == [
        *(('makedirs', f'{tmp_path}/queue/{folder}') for folder in FOLDERS),
        ('open', f'{tmp_path}/queue'),
    ]
    assert log.names.count('fsync') == 2


def test_many_processes_may_create_the_directory_at_once(tmp_path):
    def create(connection):
        connection.recv()
        MaildirQueue(tmp_path / 'queue')
        connection.send('created')

    for _ in range(5):
        children = [Child(create) for _ in range(4)]
        for child in children:
            child.tell()
        assert [child.hear() for child in children] == ['created'] * 4
        assert [child.wait() for child in children] == [0] * 4


def test_a_directory_that_another_process_creates_meanwhile_is_used(tmp_path):
    def somebody_is_faster(call):
        if call.name == 'makedirs':
            Path(call.args[0]).mkdir()
        return call()

    with intercepted(somebody_is_faster):
        queue = MaildirQueue(tmp_path / 'queue')

    assert queue.put(ENVELOPE)


def test_a_queue_that_is_there_is_opened_without_writing(queue):
    with intercepted(Log()) as log:
        MaildirQueue(queue.path)

    assert set(log.names) <= {'access', 'stat'}


def test_a_path_in_which_there_is_no_room_for_a_queue_is_refused(tmp_path):
    (tmp_path / 'file').write_text('not a directory')

    with pytest.raises(
        QueueError, match=f'The queue directory {tmp_path}/file/queue cannot be created or used: Not a dir'
    ):
        MaildirQueue(tmp_path / 'file' / 'queue')
    with pytest.raises(
        QueueError, match=f'The queue directory {tmp_path}/file cannot be .*: File exists, and is no dir'
    ):
        MaildirQueue(tmp_path / 'file')


def test_the_directory_of_another_user_is_refused():
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        queue = MaildirQueue(f'{parent}/queue')
        Path(queue.path).chmod(0o755)
        at(queue, 'new').chmod(0o500 if os.getuid() else 0o700)

        def open_it():
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                MaildirQueue(queue.path)
            except QueueError as error:
                return str(error), os.getuid()
            return None

        text, user = run_in_child(open_it)

        names = (re.escape(pwd.getpwuid(uid).pw_name) for uid in (user, os.getuid()))
        me, owner = names
        assert re.search(
            rf': the user {me} may not read( and write)? {queue.path}(/\w+)?, which belongs to {owner}$', text
        )
        at(queue, 'new').chmod(0o700)


# --- into the queue ---------------------------------------------------------


def test_a_message_that_is_put_waits(queue):
    name = queue.put(ENVELOPE)

    assert where(queue) == {'new': 1}
    assert names(queue, 'new') == [name]
    assert claim(queue).envelope == ENVELOPE


def test_a_message_that_is_put_claimed_is_in_progress(queue):
    taken = queue.put_claimed(ENVELOPE)

    assert where(queue) == {'cur': 1}
    assert taken.envelope == ENVELOPE
    assert taken.attempts == 0
    assert time.time() - 60 < taken.queued_at <= time.time()
    assert repr(taken) == f'<MaildirClaim {taken.id}>'
    assert list(MaildirQueue(queue.path).claim_due(LATER)) == []


def test_the_names_of_messages_are_unique_and_in_the_order_of_time(tmp_path):
    hours = itertools.count(1_000_000_000, HOUR)
    queue = MaildirQueue(tmp_path, clock=lambda: next(hours))

    found = [queue.put(ENVELOPE) for _ in range(20)]

    assert len(set(found)) == 20
    assert found == sorted(found)
    assert not any(re.search(r'[\s/:,]', name) for name in found)


def test_children_that_are_forked_give_other_names(tmp_path):
    queue = MaildirQueue(tmp_path, clock=lambda: 1_000_000_000)

    found = [run_in_child(lambda: queue.put(ENVELOPE)) for _ in range(3)]

    assert len(set(found)) == 3


def test_a_host_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, 'gethostname', lambda: 'a/b:c,deaths=4')

    queue = MaildirQueue(tmp_path)
    queue.put(ENVELOPE)
    taken = claim(queue)

    assert taken.deaths == 0
    assert taken.id.endswith(r'.a\057b\072c\054deaths=4')


def test_the_file_is_what_less_shows(tmp_path):
    queue = MaildirQueue(tmp_path, clock=lambda: 1795505291.25)

    name = queue.put(Envelope('sender@site.example', ('"a,b"@x.example', 'jürgen@x.example'), CONTENT))

    assert at(queue, 'new', name).read_bytes() == (
        b'Return-path: <sender@site.example>\r\n'
        b'Envelope-to: "a,b"@x.example,j\xc3\xbcrgen@x.example\r\n'
        b'X-Queue-Date: Tue, 24 Nov 2026 07:28:11 +0000\r\n'
        b'X-Queue-Meta-End: end\r\n' + CONTENT
    )


def test_a_deferred_message_says_when_it_was_tried_and_what_the_server_said(tmp_path):
    now = [1795505291]
    queue = MaildirQueue(tmp_path, clock=lambda: now[0])
    taken = queue.put_claimed(Envelope('', ('a@x.example', 'b@x.example'), CONTENT))
    now[0] += 301

    taken.settle(Settlement(('b@x.example',), due=1795505900, last_reply='451 4.3.0 try (again)\r\nlater'))

    (name,) = names(queue, 'new')
    assert at(queue, 'new', name).stat().st_mtime == 1795505900
    assert at(queue, 'new', name).read_bytes() == (
        b'Return-path: <>\r\n'
        b'Envelope-to: b@x.example\r\n'
        b'X-Queue-Date: Tue, 24 Nov 2026 07:28:11 +0000\r\n'
        b'X-Last-Attempt: Tue, 24 Nov 2026 07:33:12 +0000 (451 4.3.0 try [again] later)\r\n'
        b'X-Retries: 1\r\n'
        b'X-Queue-Meta-End: end\r\n' + CONTENT
    )


def test_a_message_of_mailqueue_runner_is_taken(queue):
    at(queue, 'new', '1795505291.M1P2Q3.host').write_bytes(
        b'Return-path: <foo@site.example>\nEnvelope-to: bar@site.example\n'
        b'X-Queue-Date: Tue, 24 Nov 2026 07:28:11 -0100\nX-Retries: 2\n'
        b'X-Queue-Meta-End: end\nSubject: x\n\nbody',
    )

    taken = claim(queue)

    assert taken.envelope == Envelope('foo@site.example', ('bar@site.example',), b'Subject: x\n\nbody')
    assert (taken.id, taken.attempts, taken.queued_at) == ('1795505291.M1P2Q3.host', 2, 1795505291 + HOUR)


# --- two phases -------------------------------------------------------------


def test_nothing_touches_the_disk_before_the_vote(queue):
    with intercepted(Log()) as log:
        staging = queue.staging()
        staging.add(ENVELOPE, claimed=True)
        mark = staging.mark()
        staging.add(OTHER, claimed=True)
        assert staging.rollback(mark) == [OTHER]
        assert staging.discard() == [ENVELOPE]

    assert log.calls == []
    assert where(queue) == {}


def test_a_prepared_message_is_on_disk_and_nobody_can_have_it(queue):
    staging = stage(queue, (ENVELOPE, True), (OTHER, False))

    assert where(queue) == {'prepared': 2}
    other = MaildirQueue(queue.path)
    assert list(other.claim_due(LATER)) == []
    assert other.recover(LATER).in_doubt == ()
    assert other.counts()['in doubt'] == 0
    assert staging.discard() == [ENVELOPE, OTHER]


def test_published_messages_are_claimed_or_wait_as_they_were_added(queue):
    staging = stage(queue, (ENVELOPE, True), (OTHER, False), (ENVELOPE, True))

    first, second, third = staging.publish()

    assert where(queue) == {'new': 3}
    assert (first.envelope, second, third.envelope) == (ENVELOPE, None, ENVELOPE)
    assert list(MaildirQueue(queue.path).recover(LATER).orphans) == []
    assert claim(queue).envelope == OTHER


def test_a_process_that_dies_leaves_what_it_has_not_begun_as_it_was_and_what_it_has_begun_as_an_orphan(queue):
    claims = stage(queue, *[(ENVELOPE, True)] * 3).publish()
    begun, waiting, given_back = [it.id for it in claims]
    before = {name: at(queue, 'new', name).stat().st_mtime_ns for name in (waiting, given_back)}

    assert [claims[0].begin(), claims[0].begin(), claims[2].begin()] == [True] * 3
    claims[2].release()
    forget(*claims)

    assert MaildirQueue(queue.path).recover(LATER).orphans == (begun,)
    assert {name: at(queue, 'new', name).stat().st_mtime_ns for name in before} == before
    assert [taken.deaths for taken in queue.claim_due(LATER)] == [0, 0, 1]


def test_what_cannot_be_begun_waits(queue, told):
    (taken,) = stage(queue, (ENVELOPE, True)).publish()
    at(queue, 'cur').rmdir()

    assert not taken.begin()

    at(queue, 'cur').mkdir()
    assert told(level='ERROR', status='trouble', problem='cannot be claimed, and has to wait')
    assert claim(queue).envelope == ENVELOPE


def test_discard_leaves_nothing_and_may_be_repeated(queue):
    with no_open_files_are_left():
        staging = stage(queue, (ENVELOPE, True), (OTHER, False))

        assert staging.discard() == [ENVELOPE, OTHER]
        assert staging.discard() == []

    assert where(queue) == {}


def test_what_is_discarded_does_not_come_back_after_a_power_cut(queue):
    staging = stage(queue, (ENVELOPE, True), (OTHER, False))

    with intercepted(Log()) as log:
        staging.discard()

    steps = [(call.name, Path(call.args[0]).parent) for call in log.calls if call.name in {'unlink', 'open'}]
    assert steps == [('unlink', at(queue, 'prepared'))] * 2 + [('open', Path(queue.path))]
    assert log.names.count('fsync') == 1


def test_discard_is_blind_to_what_is_published(queue):
    staging = stage(queue, (ENVELOPE, True), (OTHER, False))
    taken, _ = staging.publish()

    assert staging.discard() == []

    assert where(queue) == {'new': 2}
    assert taken.envelope == ENVELOPE


def test_what_was_added_and_rolled_back_is_not_prepared(queue):
    staging = queue.staging()
    staging.add(ENVELOPE, claimed=False)
    mark = staging.mark()
    staging.add(OTHER, claimed=False)
    staging.rollback(mark)

    staging.prepare()
    assert staging.publish() == [None]

    assert claim(queue).envelope == ENVELOPE


def test_an_empty_staging_does_nothing(queue):
    with intercepted(Log()) as log:
        staging = queue.staging()
        staging.prepare()
        assert staging.publish() == []
        assert staging.discard() == []

    assert log.calls == []


def test_a_vote_that_is_interrupted_leaves_nothing(queue):
    calls = itertools.count()

    def interrupt(call):
        if call.name == 'rename' and next(calls) == 1:
            raise KeyboardInterrupt
        return call()

    staging = queue.staging()
    staging.add(ENVELOPE, claimed=True)
    staging.add(OTHER, claimed=True)
    with no_open_files_are_left(), intercepted(interrupt), pytest.raises(KeyboardInterrupt):
        staging.prepare()

    assert where(queue) == {}


def test_an_interrupt_while_messages_are_published_discards_none_of_them(queue):
    staging = stage(queue, (ENVELOPE, True), (OTHER, False))
    calls = itertools.count()

    def interrupt(call):
        if call.name == 'rename' and next(calls) == 1:
            raise KeyboardInterrupt
        return call()

    with intercepted(interrupt), pytest.raises(KeyboardInterrupt):
        staging.publish()
    staging.discard()

    assert where(queue) == {'new': 2}


def test_files_are_locked_whenever_they_get_a_new_name(queue):
    """Whoever looks at a folder at the moment after a rename finds nothing to take."""
    other = MaildirQueue(queue.path)
    seen = []

    def look(call):
        result = call()
        if call.name == 'rename':
            folder, name = call.args[1].split('/')[-2:]
            seen.append((folder, other.take(folder, name)))
        return result

    with intercepted(look):
        first, _ = stage(queue, (ENVELOPE, True), (OTHER, False)).publish()
        second = queue.put_claimed(ENVELOPE)
        queue.put(OTHER)
        third, fourth = queue.claim_due(LATER)
        first.settle(Settlement(('a@x.example',), due=1, burials=(Burial(('b@x.example',), 'no'),)))
        second.release()
        forget(third, fourth)
        queue.recover(LATER)

    assert {folder for folder, _ in seen} == {'prepared', 'cur', 'new', 'dead'}
    assert [file for _, file in seen if file is not None] == []


def test_a_process_that_looks_all_the_time_never_gets_a_fresh_message(queue):
    def look(connection):
        other = MaildirQueue(queue.path)
        rounds, seen, taken = 0, set(), []
        connection.send('looking')
        while not connection.poll():
            rounds += 1
            for folder in ('prepared', 'cur'):
                for name in names(other, folder):
                    seen.add(name)
                    taken += [file.path for file in [other.take(folder, name)] if file]
        connection.send((rounds, len(seen), taken))

    with Child(look) as child:
        child.hear()
        claims = []
        for _ in range(60):
            claims += stage(queue, (ENVELOPE, True), (OTHER, True)).publish()
        child.tell('enough')
        rounds, seen, taken = child.hear()

    assert rounds > 1
    assert seen > 1
    assert taken == []


# --- out of the queue -------------------------------------------------------


def test_the_message_that_is_due_for_longest_comes_first(queue):
    now = time.time()
    due = {put(queue, due=now - age): age for age in (30, 10, 40, 20)}

    found = [due[taken.id] for taken in queue.claim_due(now)]

    assert found == [40, 30, 20, 10]


def test_a_message_is_not_claimed_before_it_is_asked_for(queue):
    put(queue)
    put(queue)

    claims = queue.claim_due(LATER)
    assert where(queue) == {'new': 2}
    first = next(claims)
    assert where(queue) == {'new': 1, 'cur': 1}
    claims.close()
    first.release()

    assert where(queue) == {'new': 2}


def test_a_message_that_is_not_due_waits(queue):
    now = time.time()
    put(queue, due=now + 10)

    assert list(queue.claim_due(now + 9)) == []
    assert claim(queue, now=now + 10)


def test_a_message_that_is_not_due_is_not_even_opened(queue):
    now = time.time()
    for seconds in (100, 200, 300):
        put(queue, due=now + seconds)
    put(queue, due=now - 1)

    with intercepted(Log()) as log:
        claim(queue, now=now)

    assert log.names.count('open') == 1
    assert log.names.count('stat') == 1, 'of the file that was opened'


def test_a_due_time_beyond_the_horizon_comes_from_a_clock_that_jumped(tmp_path):
    queue = MaildirQueue(tmp_path, horizon=1000)
    now = time.time()
    put(queue, due=now + 999)

    assert list(queue.claim_due(now)) == []
    assert claim(queue, now=now - 2)


def test_many_more_messages_than_names_kept_in_memory_come_in_their_order(queue, monkeypatch):
    monkeypatch.setattr(maildir, 'SUPPLY', 3)
    now = time.time()
    due = [put(queue, due=now - age // 2) for age in range(20, 0, -1)]
    by_due = sorted(due, key=lambda name: (at(queue, 'new', name).stat().st_mtime, name))

    assert [taken.id for taken in queue.claim_due(now)] == by_due


def test_each_message_comes_once_in_a_run_even_if_it_is_given_back(queue, monkeypatch):
    monkeypatch.setattr(maildir, 'SUPPLY', 2)
    put_names = sorted(put(queue, due=1000 + number) for number in range(5))

    found = []
    for taken in queue.claim_due(LATER):
        found.append(taken.id)
        taken.release()

    assert sorted(found) == put_names


def test_messages_that_cannot_be_opened_do_not_hide_those_behind_them(queue, monkeypatch):
    monkeypatch.setattr(maildir, 'SUPPLY', 2)
    blocked = {put(queue, due=number) for number in range(1, 6)}
    wanted = put(queue)

    def refuse(call):
        if call.name == 'open' and Path(call.args[0]).name in blocked:
            raise PermissionError(errno.EACCES, 'Permission denied')
        return call()

    with intercepted(refuse):
        assert [taken.id for taken in queue.claim_due(time.time())] == [wanted]


def test_a_message_belongs_to_one_claim_only(queue):
    put(queue)
    other = MaildirQueue(queue.path)

    mine, yours = queue.claim_due(LATER), other.claim_due(LATER)
    first = next(mine)

    assert next(yours, None) is None
    first.release()
    assert claim(other, now=LATER)


def test_one_message_can_be_claimed_by_its_id(queue):
    put(queue)
    wanted = put(queue)

    found = queue.claim(wanted)

    assert found.id == wanted
    assert (names(queue, 'cur'), where(queue)) == ([wanted], {'new': 1, 'cur': 1})


def test_what_is_gone_held_or_not_due_cannot_be_claimed_by_its_id(queue):
    gone, held, later = put(queue), put(queue), put(queue, due=time.time() + HOUR)
    queue.claim(gone).settle(Settlement())
    holder = queue.claim(held)

    assert [queue.claim(name) for name in (gone, held, later)] == [None] * 3
    holder.release()
    assert where(queue) == {'new': 2}


def test_it_is_told_when_a_message_is_in_the_queue(queue, caplog):
    caplog.set_level(logging.INFO, 'mailqueue.queue_log')
    name = put(queue)
    claimed = queue.put_claimed(ENVELOPE)
    (published,) = stage(queue, (ENVELOPE, True)).publish()

    queued = {
        'status': 'queued',
        'msgid': '<1@site.example>',
        'from': '<sender@site.example>',
        'to': 'a@x.example,b@x.example',
    }
    assert [record.mailqueue for record in caplog.records] == [
        {**queued, 'id': id_} for id_ in (name, claimed.id, published.id)
    ]


def test_somebodys_log_handler_that_raises_tells_a_commit_nothing(queue):
    class Broken(logging.Handler):
        def emit(self, record):
            raise RuntimeError('a defect of somebody else')

    logger, broken = logging.getLogger('mailqueue.queue_log'), Broken()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(broken)
    try:
        put(queue)
        claims = stage(queue, (ENVELOPE, True), (OTHER, False)).publish()
    finally:
        logger.removeHandler(broken)
        logger.setLevel(level)

    assert where(queue) == {'new': 3}
    claims[0].release()


def test_threads_never_share_a_message(queue):
    put_names = sorted(put(queue) for _ in range(60))
    ready = threading.Barrier(4)
    found = []

    def work():
        ready.wait()
        found.extend([taken.id for taken in MaildirQueue(queue.path).claim_due(LATER)])

    # The claims are forgotten at once: each is an orphan in cur/ afterwards, and never waits again.
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(found) == put_names


def test_processes_never_share_a_message(queue):
    put_names = sorted(put(queue) for _ in range(60))

    def work(connection):
        connection.recv()
        connection.send([(taken.id, taken.settle(Settlement())) for taken in queue.claim_due(LATER)])

    children = [Child(work) for _ in range(3)]
    for child in children:
        child.tell()
    found = [name for child in children for name, _ in child.hear()]
    for child in children:
        child.kill()

    assert sorted(found) == put_names
    assert where(queue) == {}


def test_what_somebody_else_has_tried_meanwhile_is_not_tried_again_before_it_is_due(queue):
    now = time.time()
    put(queue, due=now - 20)
    put(queue, due=now - 10)
    mine, yours = queue.claim_due(now), MaildirQueue(queue.path).claim_due(now)
    first, second = next(mine), next(yours)

    second.settle(Settlement(second.envelope.recipients, due=now + 300))

    assert first.id != second.id
    assert list(mine) == []
    assert where(queue) == {'new': 1, 'cur': 1}


def test_what_is_gone_when_its_turn_comes_is_passed_over(queue, told):
    _, second, third = sorted(put(queue, due=number) for number in (1, 2, 3))
    claims = queue.claim_due(LATER)
    next(claims).settle(Settlement())

    at(queue, 'new', second).unlink()

    assert [taken.id for taken in claims] == [third]
    assert told() == []


def test_a_message_that_is_removed_while_the_folder_is_read_is_passed_over(queue, told):
    put(queue)
    put(queue)

    def remove_all(call):
        entries = call()
        if call.name != 'scandir':
            return entries
        listed = list(entries)
        for entry in listed:
            Path(entry.path).unlink()
        entries.close()
        return contextlib.nullcontext(listed)

    with intercepted(remove_all):
        assert list(queue.claim_due(LATER)) == []
    assert told() == []


def test_a_message_that_cannot_be_looked_at_is_told_of_and_does_not_hide_the_others(queue, told):
    wanted, unseen = put(queue, due=2), put(queue, due=1)

    class Unseen:
        name, path = unseen, queue.place('new', unseen)

        def is_file(self, *, follow_symlinks):
            return True

        def stat(self, *, follow_symlinks):
            raise OSError(errno.EIO, 'Input/output error')

    def hide(call):
        entries = call()
        if call.name != 'scandir':
            return entries
        with entries:
            return contextlib.nullcontext([entry if entry.name == wanted else Unseen() for entry in entries])

    with intercepted(hide):
        assert [taken.id for taken in queue.claim_due(LATER)] == [wanted]
    assert told(level='ERROR', status='trouble', problem='cannot be looked at', file=Unseen.path)


@pytest.mark.parametrize(
    ('call', 'error'),
    [
        *(('open', name) for name in ('EMFILE', 'ENFILE', 'ENOMEM', 'EROFS')),
        ('flock', 'ENOLCK'),
        *(('rename', name) for name in ('EACCES', 'EDQUOT', 'ENOSPC', 'EROFS', 'EXDEV')),
    ],
)
def test_what_no_message_is_to_blame_for_ends_the_claiming_and_not_what_was_claimed(queue, told, call, error):
    first, *others = (put(queue, due=number) for number in range(1, 10))
    claims = queue.claim_due(LATER)
    taken = next(claims)

    with (
        no_open_files_are_left(),
        intercepted(Fault(error, 1, lasts=True, can_fail=lambda it: it.name == call)),
        pytest.raises(QueueError, match=f'^The folder {queue.path}.* cannot be used: {os.strerror(errno_of(error))}'),
    ):
        next(claims)

    assert told() == []
    assert list(claims) == []
    taken.settle(Settlement(taken.envelope.recipients, due=20))
    assert [again.id for again in queue.claim_due(LATER)] == [*others, first]


def errno_of(name):
    return getattr(errno, name)


def test_a_folder_that_may_not_be_searched_is_told_of_once(queue, told):
    class Hidden:
        name, path = 'x', queue.place('new', 'x')

        def is_file(self, *, follow_symlinks):
            return True

        def stat(self, *, follow_symlinks):
            raise PermissionError(errno.EACCES, 'Permission denied')

    def hide(call):
        return contextlib.nullcontext([Hidden()] * 9) if call.name == 'scandir' else call()

    reason = f'^The folder {queue.place("new")} cannot be used: Permission denied$'
    with intercepted(hide), pytest.raises(QueueError, match=reason):
        list(queue.claim_due(LATER))
    assert told() == []


@pytest.mark.parametrize(('call', 'error'), [('open', 'EACCES'), ('open', 'EIO'), ('rename', 'EPERM')])
def test_what_may_be_the_trouble_of_one_file_is_told_of_and_passed_over(queue, told, call, error):
    _, *others = (put(queue, due=number) for number in range(1, 4))

    with intercepted(Fault(error, 1, can_fail=lambda it: it.name == call)):
        assert [taken.id for taken in queue.claim_due(LATER)] == others
    assert told(level='ERROR', status='trouble', error=os.strerror(errno_of(error)))


def test_a_message_that_is_asked_for_while_none_can_be_claimed_waits(queue, told):
    name = put(queue)

    with intercepted(Fault('EMFILE', 1)), pytest.raises(QueueError, match='Too many open files'):
        queue.claim(name)

    assert (where(queue), told()) == ({'new': 1}, [])
    assert queue.claim(name)


def test_what_was_buried_is_reported_although_no_more_files_can_be_opened(queue, told):
    for name in 'ab':
        at(queue, 'cur', f'{name},deaths=4').write_bytes(HEADER)

    def opens_second(call):
        return call.name == 'open' and call.args[0] == opened[1]

    with os.scandir(queue.place('cur')) as entries:
        opened = [entry.path for entry in entries]
    with intercepted(Fault('EMFILE', 1, can_fail=opens_second)):
        recovery = queue.recover(time.time())

    assert recovery.buried == (Path(opened[0]).name.partition(',')[0],)
    assert told(level='ERROR', status='trouble', file=queue.place('cur'), problem='cannot be read to its end')
    assert len(queue.recover(time.time()).buried) == 1


def test_a_message_is_read_with_few_system_calls(queue):
    put(queue)

    with intercepted(Log()) as log:
        taken = claim(queue, now=LATER)
        assert taken.envelope == ENVELOPE
        taken.settle(Settlement())

    assert log.names == [
        'scandir', 'open', 'flock', 'fstat', 'stat', 'rename', 'pread', 'unlink',
    ]  # fmt: skip


# --- what can't be used -----------------------------------------------------

HEADER = (
    b'Return-path: <sender@site.example>\r\nEnvelope-to: a@x.example\r\n'
    b'X-Queue-Date: Tue, 24 Nov 2026 07:28:11 +0000\r\nX-Queue-Meta-End: end\r\n'
)

DAMAGED = {
    'empty': b'',
    'garbage': bytes(range(256)) * 100,
    'no end': HEADER.replace(b'X-Queue-Meta-End: end\r\n', b''),
    'cut off': HEADER[:50],
    'control characters': HEADER.replace(b'a@x', b'a\x01@x'),
    'line break in an address': HEADER.replace(b'a@x', b'a\r@x'),
    'two addresses': HEADER.replace(b'<sender@', b'<x@y.example> <sender@'),
    'nobody': HEADER.replace(b'a@x.example', b''),
    'a huge header': b'X' * (2 << 20),
    'a huge line': HEADER.replace(b'a@x.example', b','.join([b'a@x.example'] * 200_000)),
    'a header of something else': b'Subject: hello\r\n' + HEADER,
    'no date': HEADER.replace(b'Tue, 24 Nov 2026 07:28:11 +0000', b'yesterday'),
}


@pytest.mark.parametrize('damaged', DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_message_is_put_aside_untouched_and_the_run_goes_on(queue, told, damaged):
    at(queue, 'new', 'damaged').write_bytes(damaged)
    os.utime(queue.place('new', 'damaged'), (1, 1))
    good = put(queue)

    with no_open_files_are_left():
        found = [(taken.id, taken.release()) for taken in queue.claim_due(LATER)]

    assert found == [(good, None)]
    assert where(queue) == {'new': 1, 'corrupt': 1}
    assert at(queue, 'corrupt', 'damaged').read_bytes() == damaged
    (event,) = told(level='ERROR', status='corrupt', id='damaged')
    assert event['file'] == queue.place('corrupt', 'damaged')
    assert event['error']


def test_a_damaged_orphan_is_put_aside_by_the_same_run(queue):
    at(queue, 'cur', 'damaged').write_bytes(b'garbage')

    queue.recover(time.time())
    assert list(queue.claim_due(time.time())) == []

    assert where(queue) == {'corrupt': 1}
    assert at(queue, 'corrupt', 'damaged,deaths=1').read_bytes() == b'garbage'


def test_a_damaged_orphan_that_is_to_be_buried_is_put_aside(queue):
    at(queue, 'cur', 'damaged,deaths=4').write_bytes(b'garbage')

    assert queue.recover(time.time()).buried == ()

    assert where(queue) == {'corrupt': 1}


def test_a_damaged_message_in_doubt_is_held_or_put_aside_when_it_is_sent(queue):
    at(queue, 'prepared', 'damaged').write_bytes(b'garbage')

    assert queue.recover(time.time()).in_doubt == ('damaged',)

    sending = MaildirQueue(queue.path, in_doubt='send')
    assert sending.recover(time.time()).sent == ('damaged',)
    assert list(sending.claim_due(time.time())) == []
    assert where(queue) == {'corrupt': 1}


def test_what_was_put_aside_before_is_not_overwritten(queue):
    for data in (b'first', b'second', b'third'):
        at(queue, 'new', 'damaged').write_bytes(data)
        assert list(queue.claim_due(LATER)) == []

    assert [at(queue, 'corrupt', name).read_bytes() for name in names(queue, 'corrupt')] == [
        b'first',
        b'second',
        b'third',
    ]


def test_a_damaged_message_that_cannot_be_put_aside_is_tried_again_later(queue, told):
    at(queue, 'new', 'damaged').write_bytes(b'garbage')
    at(queue, 'corrupt').rename(at(queue, 'away'))

    assert list(queue.claim_due(LATER)) == []

    assert where_is('damaged', queue) == ['cur']
    (event,) = told(level='ERROR', status='trouble')
    assert event['problem'].startswith('is damaged (The line "X-Queue-Meta-End: end" is missing')


def where_is(name, queue):
    return [folder for folder in names_in(queue.path) if name in names_in(queue.place(folder))]


@pytest.mark.parametrize('folder', FOLDERS)
def test_what_is_no_message_is_left_alone_in_every_folder(queue, told, folder):
    for name in ('.hidden', '.gitignore'):
        at(queue, folder, name).write_bytes(b'not a message')
    at(queue, folder, 'folder').mkdir()
    at(queue, folder, 'folder/inside').write_bytes(HEADER)
    at(queue, folder, 'link').symlink_to('/etc/passwd')
    at(queue, folder, 'dangling').symlink_to('/nowhere')
    os.mkfifo(queue.place(folder, 'fifo'))
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(queue.place(folder))
        server.bind('socket')
    for name in names_in(queue.place(folder)):
        os.utime(queue.place(folder, name), (1, 1), follow_symlinks=False)
    before = names_in(queue.place(folder))

    sending = MaildirQueue(queue.path, in_doubt='send')
    recovery = sending.recover(time.time())

    assert list(sending.claim_due(time.time())) == []
    assert recovery == type(recovery)()
    assert set(sending.counts().values()) == {0}
    assert sorted(names_in(queue.place(folder))) == sorted(before)
    assert told() == []


def test_a_message_that_may_not_be_opened_is_reported_and_left_alone(told):
    with tempfile.TemporaryDirectory() as parent:
        queue = MaildirQueue(f'{parent}/queue')
        unreadable, good = put(queue, due=1), put(queue)
        at(queue, 'new', unreadable).chmod(0)

        def claim_as_owner_without_rights(connection):
            if os.getuid() == 0:
                for path in (parent, queue.path, *map(queue.place, FOLDERS), queue.place('new', good)):
                    os.chown(path, 65534, 65534)
                os.setuid(65534)
            found = [taken.id for taken in queue.claim_due(LATER)]
            connection.send((found, told()))

        with Child(claim_as_owner_without_rights) as child:
            found, events = child.hear()

        assert found == [good]
        (event,) = events
        assert event['file'] == queue.place('new', unreadable)
        assert (event['status'], event['error']) == ('trouble', 'Permission denied')
        assert where_is(unreadable, queue) == ['new']


def test_a_name_that_is_no_text_can_be_claimed_and_told_of(queue, told):
    name = os.fsdecode(b'odd-\xff-name')
    at(queue, 'new', name).write_bytes(HEADER)
    taken = claim(queue)
    assert taken.id == name
    taken.release()
    at(queue, 'new', name).write_bytes(b'garbage')

    assert list(queue.claim_due(LATER)) == []

    assert where(queue) == {'corrupt': 1}
    assert told(status='corrupt', id=name)


def test_a_folder_that_is_missing_is_an_error_and_not_an_empty_queue(queue):
    at(queue, 'new').rmdir()

    with pytest.raises(QueueError, match=f'The folder {queue.place("new")} cannot be read: No such file or directory'):
        list(queue.claim_due(LATER))
    with pytest.raises(QueueError, match='cannot be read'):
        queue.counts()


def test_a_message_that_cannot_be_moved_to_cur_is_an_error_and_waits(queue, told):
    name = put(queue)
    at(queue, 'cur').rmdir()

    with no_open_files_are_left():
        assert list(queue.claim_due(LATER)) == []

    assert names(queue, 'new') == [name]
    assert told(level='ERROR', status='trouble', problem='cannot be claimed', file=queue.place('new', name))


def test_a_claim_that_was_damaged_since_says_so_and_settling_it_does_not_raise(queue, told):
    taken = queue.put_claimed(ENVELOPE)
    at(queue, 'cur', taken.id).write_bytes(b'garbage')

    with pytest.raises(QueueFileError):
        _ = taken.envelope
    taken.settle(Settlement(ENVELOPE.recipients, due=5))

    assert where(queue) == {'new': 1}
    assert told(level='CRITICAL', status='unsettled', id=taken.id)


# --- settle -----------------------------------------------------------------


def test_a_message_that_is_done_leaves_the_queue(queue):
    with no_open_files_are_left():
        queue.put_claimed(ENVELOPE).settle(Settlement())
        queue.flush()

    assert where(queue) == {}


def test_a_deferred_message_waits_until_it_is_due_and_keeps_its_id(queue):
    now = time.time()
    taken = queue.put_claimed(ENVELOPE)

    with no_open_files_are_left(closes=taken._file.fd):
        taken.settle(Settlement(ENVELOPE.recipients, due=now + 300.25, last_reply='451 later'))

    assert names(queue, 'new') == [taken.id]
    assert at(queue, 'new', taken.id).stat().st_mtime == pytest.approx(now + 300.25, abs=1e-5)
    assert list(queue.claim_due(now + 299)) == []
    again = claim(queue, now=now + 301)
    assert (again.id, again.attempts, again.queued_at) == (taken.id, 1, taken.queued_at)
    assert again.envelope == ENVELOPE


def test_a_new_version_is_written_durably_and_then_renamed_over_the_old_one(queue):
    taken = queue.put_claimed(ENVELOPE)
    assert taken.envelope == ENVELOPE
    current = queue.place('cur', taken.id)

    with intercepted(Log()) as log:
        taken.settle(Settlement(('b@x.example',), due=5))

    written = [call for call in log.calls if call.name in {'open', 'fsync', 'rename', 'unlink'}]
    tmp = written[0].args[0]
    assert Path(tmp).parent == at(queue, 'tmp')
    assert [(call.name, *call.args[:2]) for call in written[2:]] == [
        ('rename', tmp, current),
        ('rename', current, queue.place('new', taken.id)),
    ]
    assert written[1].name == 'fsync'


def test_a_message_that_was_partly_accepted_keeps_its_open_recipients(queue):
    taken = queue.put_claimed(ENVELOPE)

    taken.settle(Settlement(('b@x.example',), due=1))

    assert claim(queue).envelope == dataclasses.replace(ENVELOPE, recipients=('b@x.example',))


def test_every_attempt_is_counted(queue):
    put(queue)
    for attempts in range(3):
        taken = claim(queue, now=LATER)
        assert taken.attempts == attempts
        taken.settle(Settlement(ENVELOPE.recipients, due=1))


@pytest.mark.parametrize('settlement', [Settlement(ENVELOPE.recipients, counted=False), None])
def test_a_message_that_is_given_back_stays_exactly_as_it_was(queue, settlement):
    put(queue, due=12345)
    path = at(queue, 'new', names(queue, 'new')[0])
    before = (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime)
    taken = claim(queue)

    with intercepted(Log()) as log:
        taken.settle(settlement) if settlement else taken.release()

    assert (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime) == before
    assert [call.name for call in log.calls] == ['rename', 'flock', 'close']


def test_a_due_time_is_kept_unless_another_one_is_given(queue):
    put(queue, due=12345)

    claim(queue).settle(Settlement(ENVELOPE.recipients))
    assert claim(queue).attempts == 1
    queue.recover(time.time())
    claim(queue).settle(Settlement(('b@x.example',)))
    assert at(queue, 'new', *names(queue, 'new')).stat().st_mtime == 12345

    taken = claim(queue)
    taken.settle(Settlement(('b@x.example',), due=23456, counted=False))
    assert at(queue, 'new', taken.id).stat().st_mtime == 23456
    assert claim(queue).attempts == 2


def test_a_server_trouble_half_way_keeps_the_open_recipients_and_counts_no_attempt(queue):
    put(queue)
    taken = claim(queue)

    taken.settle(Settlement(('b@x.example',), counted=False))

    again = claim(queue)
    assert again.envelope.recipients == ('b@x.example',)
    assert again.attempts == 0


def test_the_last_reply_is_kept_until_there_is_another_one(queue):
    put(queue)
    claim(queue).settle(Settlement(ENVELOPE.recipients, due=1, last_reply='451 greylisted'))

    claim(queue).settle(Settlement(('b@x.example',), counted=False))

    assert b' (451 greylisted)\r\n' in at(queue, 'new', *names(queue, 'new')).read_bytes()


def test_recipients_who_are_given_up_become_a_dead_letter(queue):
    taken = queue.put_claimed(ENVELOPE)

    taken.settle(Settlement(burials=(Burial(('a@x.example', 'b@x.example'), '550 5.1.1 no such user'),)))

    assert where(queue) == {'dead': 1}
    (name,) = names(queue, 'dead')
    assert name.startswith(f'{taken.id}.')
    letter = at(queue, 'dead', name).read_bytes()
    assert b'Envelope-to: a@x.example,b@x.example\r\n' in letter
    assert re.search(rb'X-Last-Attempt: [^()\r]* \(550 5.1.1 no such user\)\r\nX-Retries: 1\r\n', letter)
    assert letter.endswith(b'end\r\n' + CONTENT)


def test_what_was_accepted_deferred_and_refused_parts_ways(queue):
    recipients = tuple(f'{letter}@x.example' for letter in 'abcde')
    taken = queue.put_claimed(Envelope('s@x.example', recipients, CONTENT))
    a, b, c, d, e = recipients

    with no_open_files_are_left(closes=taken._file.fd):
        taken.settle(Settlement((b,), due=1, burials=(Burial((c, e), '550 no user'), Burial((d,), '554 spam'))))

    assert where(queue) == {'new': 1, 'dead': 2}
    assert claim(queue).envelope.recipients == (b,)
    letters = [at(queue, 'dead', name).read_bytes() for name in names(queue, 'dead')]
    assert {re.search(rb'Envelope-to: (.*)\r\n', letter).group(1) for letter in letters} == {
        b'c@x.example,e@x.example',
        d.encode(),
    }
    assert not any(a.encode() in letter for letter in letters)


def test_a_burial_that_is_repeated_after_a_crash_is_the_same_dead_letter(queue):
    settlement = Settlement(burials=(Burial(('a@x.example',), '550 no'), Burial(('b@x.example',), '551 no')))
    taken = queue.put_claimed(ENVELOPE)

    def crash(call):
        if call.name == 'unlink':
            raise KeyboardInterrupt
        return call()

    with intercepted(crash), pytest.raises(KeyboardInterrupt):
        taken.settle(settlement)
    dead = names(queue, 'dead')
    queue.recover(time.time())
    claim(queue).settle(settlement)

    assert len(dead) == 2
    assert where(queue) == {'dead': 2}
    assert names(queue, 'dead') == dead


def test_dead_letters_are_durable_before_the_message_changes(queue):
    taken = queue.put_claimed(ENVELOPE)
    assert taken.envelope == ENVELOPE

    with intercepted(Log()) as log:
        taken.settle(Settlement(burials=(Burial(('a@x.example',), '550 no'), Burial(('b@x.example',), '551 no'))))

    steps = [call.name for call in log.calls if call.name in {'rename', 'fsync', 'unlink'}]
    assert steps == ['fsync', 'rename', 'fsync', 'rename', 'fsync', 'unlink']


def test_a_claim_ends_once(queue):
    taken = queue.put_claimed(ENVELOPE)
    taken.settle(Settlement(ENVELOPE.recipients, due=5))

    taken.settle(Settlement())
    taken.release()

    assert where(queue) == {'new': 1}


def test_a_message_that_somebody_removed_by_hand_is_done(queue, told):
    taken = queue.put_claimed(ENVELOPE)
    at(queue, 'cur', taken.id).unlink()

    taken.settle(Settlement())

    assert where(queue) == {}
    assert told() == []


def test_a_message_that_cannot_be_given_back_stays_in_progress_until_the_next_run(queue, told):
    taken = queue.put_claimed(ENVELOPE)
    at(queue, 'new').rename(at(queue, 'away'))

    with no_open_files_are_left(closes=taken._file.fd):
        taken.release()

    assert where_is(taken.id, queue) == ['cur']
    assert told(level='ERROR', status='trouble', problem='stays in progress until the next run')
    at(queue, 'away').rename(at(queue, 'new'))
    assert queue.recover(time.time()).orphans == (taken.id,)


def test_a_full_disk_while_a_message_is_deferred_leaves_the_old_one_whole_and_waiting(queue, told):
    put(queue)
    path = at(queue, 'new', *names(queue, 'new'))
    before = (path.read_bytes(), path.stat().st_ino)
    taken = claim(queue)

    with intercepted(Fault('ENOSPC', 1, lasts=True)) as fault, no_open_files_are_left(closes=taken._file.fd):
        fault._can_fail = lambda call: call.name == 'writev'
        taken.settle(Settlement(('b@x.example',), due=12345))

    assert where(queue) == {'new': 1}
    assert (path.read_bytes(), path.stat().st_ino) == before
    assert path.stat().st_mtime == 12345
    assert told(level='CRITICAL', status='unsettled', id=taken.id, error='No space left on device')


def test_a_full_disk_while_a_message_is_buried_lets_it_rest_for_a_while(tmp_path, told):
    queue = MaildirQueue(tmp_path, clock=lambda: 1_000_000)
    put(queue)
    taken = claim(queue)

    with intercepted(Fault('ENOSPC', 1, lasts=True)) as fault:
        fault._can_fail = lambda call: call.name == 'writev'
        taken.settle(Settlement(burials=(Burial(ENVELOPE.recipients, '550 no'),)))

    assert where(queue) == {'new': 1}
    assert at(queue, 'new', taken.id).stat().st_mtime == 1_000_300
    assert told(level='CRITICAL', status='unsettled', id=taken.id)


# --- what dead processes leave ----------------------------------------------


def test_the_message_of_a_dead_process_is_taken_up_at_once(queue):
    name = put(queue)

    def claim_and_wait(connection):
        taken = claim(queue)
        connection.send(taken.id)
        connection.recv()

    with Child(claim_and_wait) as child:
        assert child.hear() == name
        assert queue.recover(time.time()).orphans == (), 'while its deliverer lives'
        child.kill()

        assert queue.recover(time.time()).orphans == (name,)

    assert names(queue, 'new') == [f'{name},deaths=1']
    again = claim(queue)
    assert again.id == name
    assert again.envelope == ENVELOPE


def test_an_orphan_keeps_its_due_time(queue):
    put(queue, due=12345)
    forget(claim(queue))

    queue.recover(time.time())

    assert at(queue, 'new', *names(queue, 'new')).stat().st_mtime == 12345


def test_a_message_that_has_killed_five_deliverers_is_buried(queue):
    name = put(queue)

    for deaths in range(1, 5):
        forget(claim(queue))
        recovery = queue.recover(time.time())
        assert (recovery.orphans, recovery.buried) == ((name,), ())
        assert names(queue, 'new') == [f'{name},deaths={deaths}']
    forget(claim(queue))
    recovery = queue.recover(time.time())

    assert (recovery.orphans, recovery.buried) == ((), (name,))
    assert where(queue) == {'dead': 1}
    (dead,) = names(queue, 'dead')
    assert dead.startswith(f'{name}.')
    assert b'(given up: the process that delivered it died, 5 times)' in at(queue, 'dead', dead).read_bytes()


def test_a_deliverer_that_lives_takes_back_the_deaths_before(queue):
    name = put(queue)
    forget(claim(queue))
    queue.recover(time.time())

    claim(queue).settle(Settlement(ENVELOPE.recipients, due=1))

    assert names(queue, 'new') == [name]


def test_giving_a_message_back_says_nothing_about_the_deaths_before(queue):
    name = put(queue)
    forget(claim(queue))
    queue.recover(time.time())

    claim(queue).release()

    assert names(queue, 'new') == [f'{name},deaths=1']


@pytest.mark.parametrize('name', ['x,deaths=', 'x,deaths=many', 'x,deaths=-1', 'x,deaths=²', 'x,y'])
def test_what_is_no_count_belongs_to_the_name(queue, name):
    at(queue, 'cur', name).write_bytes(HEADER)

    assert queue.recover(time.time()).orphans == (name,)
    assert names(queue, 'new') == [f'{name},deaths=1']


def test_both_counts_stand_in_the_name(queue):
    at(queue, 'cur', 'x,stumbles=2,deaths=1').write_bytes(HEADER)

    assert queue.recover(time.time()).orphans == ('x',)
    assert names(queue, 'new') == ['x,stumbles=2,deaths=2']
    taken = claim(queue, now=LATER)
    taken.settle(Settlement(taken.envelope.recipients, counted=False, stumbled=True))
    assert names(queue, 'new') == ['x,stumbles=3,deaths=2']
    taken = claim(queue, now=LATER)
    taken.settle(Settlement(taken.envelope.recipients, due=1))
    assert names(queue, 'new') == ['x']


def test_what_a_server_stumbled_over_is_claimed_after_all_others(queue):
    first, second, third = (put(queue, due=due) for due in (1, 2, 3))

    def run(*stumbling):
        order = []
        for found in queue.claim_due(LATER):
            order.append(found.id)
            found.settle(Settlement(found.envelope.recipients, counted=False, stumbled=found.id in stumbling))
        return order

    assert run(first, second) == [first, second, third]
    assert run(first) == [third, first, second]
    assert run() == [third, second, first]


def test_what_has_outlived_a_deliverer_is_claimed_after_all_others(queue):
    first, second, third = (put(queue, due=due) for due in (1, 2, 3))

    def die_over(number):
        """Take so many messages, and die; the next run takes care of it."""
        claims = queue.claim_due(LATER)
        taken = [next(claims) for _ in range(number)]
        forget(*taken)
        queue.recover(time.time())
        return [(claim.id, claim.deaths) for claim in taken]

    assert die_over(2) == [(first, 0), (second, 0)]
    assert die_over(2) == [(third, 0), (first, 1)]
    assert die_over(3) == [(second, 1), (third, 1), (first, 2)]


def test_whatever_went_wrong_with_a_message_the_one_with_which_less_went_wrong_comes_first(queue):
    setbacks = ['c,stumbles=1,deaths=2', 'a,stumbles=2', 'd,deaths=1', 'b', 'e,stumbles=9', 'f,deaths=3']
    for name in setbacks:
        at(queue, 'new', name).write_bytes(HEADER)
        os.utime(at(queue, 'new', name), (1, 1))

    assert [taken.id for taken in queue.claim_due(LATER)] == ['b', 'd', 'a', 'c', 'f', 'e']


def test_deaths_are_counted_anew_when_some_of_the_recipients_have_the_message(queue):
    at(queue, 'new', 'x,stumbles=2,deaths=4').write_bytes(HEADER.replace(b'a@x', b'a@x.example,b@x'))
    taken = claim(queue)
    assert taken.deaths == 4

    taken.keep(('b@x.example',))

    assert (taken.id, taken.deaths) == ('x', 0)
    assert names(queue, 'cur') == ['x,stumbles=2']
    assert MaildirQueue(queue.path).recover(time.time()).orphans == (), 'it is held all the time'
    forget(taken)
    assert queue.recover(time.time()).orphans == ('x',)
    again = claim(queue)
    assert (again.deaths, again.envelope.recipients) == (1, ('b@x.example',))


@pytest.mark.parametrize('name', ['writev', 'rename'])
def test_a_keep_that_cannot_be_written_says_nothing_about_the_deaths_before(queue, told, name):
    at(queue, 'new', 'x,deaths=4').write_bytes(HEADER.replace(b'a@x', b'a@x.example,b@x'))
    taken = claim(queue)

    with intercepted(Fault('ENOSPC', 1, can_fail=lambda call: call.name == name)):
        taken.keep(('b@x.example',))

    assert told(level='CRITICAL', status='unsettled')
    assert (taken.deaths, names(queue, 'cur'), names(queue, 'tmp')) == (4, ['x,deaths=4'], [])


def test_deaths_that_cannot_be_forgotten_are_told_of_and_what_was_kept_is_kept(queue, told):
    at(queue, 'new', 'x,deaths=3').write_bytes(HEADER.replace(b'a@x', b'a@x.example,b@x'))
    taken = claim(queue)

    with intercepted(Fault('EIO', 2, can_fail=lambda call: call.name == 'rename')):
        taken.keep(('b@x.example',))

    assert told(level='ERROR', status='trouble', problem='keeps its old count of deaths')
    assert taken.deaths == 3
    taken.release()
    assert names(queue, 'new') == ['x,deaths=3']
    assert claim(queue).envelope.recipients == ('b@x.example',)


def test_a_burial_whose_reason_cannot_be_written_keeps_the_file_as_it_is(queue, told):
    at(queue, 'cur', 'x,deaths=4').write_bytes(HEADER)

    with intercepted(Fault('ENOSPC', 1, lasts=True)) as fault:
        fault._can_fail = lambda call: call.name == 'writev'
        assert queue.recover(time.time()).buried == ('x',)

    (dead,) = names(queue, 'dead')
    assert at(queue, 'dead', dead).read_bytes() == HEADER
    assert [entry.id for entry in queue.admin.entries(['dead'])] == [dead]
    assert told(level='ERROR', status='trouble', problem='is given up, and the reason cannot be written into it')


def test_a_burial_that_fails_is_not_reported_as_one(queue, told):
    at(queue, 'cur', 'x,deaths=4').write_bytes(HEADER)

    with intercepted(Fault('EACCES', 1, lasts=True, can_fail=lambda call: call.name == 'rename')):
        assert queue.recover(time.time()).buried == ()

    assert names(queue, 'cur') == ['x,deaths=4']
    assert told(level='ERROR', status='trouble', problem='stays in progress until the next run')


def in_doubt(queue):
    """Two messages whose process died after its vote; their names."""
    forget(stage(queue, (ENVELOPE, True), (OTHER, False)))
    return tuple(names(queue, 'prepared'))


def test_messages_in_doubt_are_held_and_reported_at_each_run(queue):
    found = in_doubt(queue)

    for _ in range(2):
        assert sorted(queue.recover(time.time()).in_doubt) == list(found)

    assert where(queue) == {'prepared': 2}
    assert queue.counts()['in doubt'] == 2


def test_messages_in_doubt_can_be_sent(queue):
    found = in_doubt(queue)

    recovery = MaildirQueue(queue.path, in_doubt='send').recover(time.time())

    assert sorted(recovery.sent) == list(found)
    assert (recovery.in_doubt, recovery.discarded) == ((), ())
    assert sorted(taken.id for taken in queue.claim_due(time.time())) == list(found)


def test_messages_in_doubt_can_be_discarded(queue):
    found = in_doubt(queue)

    with intercepted(Log()) as log:
        recovery = MaildirQueue(queue.path, in_doubt='discard').recover(time.time())

    assert sorted(recovery.discarded) == list(found)
    assert where(queue) == {}
    assert log.names.count('fsync') == 1, 'a power cut must not bring them back'


@pytest.mark.parametrize('way', ['send', 'discard'])
def test_messages_in_doubt_that_cannot_be_moved_or_removed_are_held(queue, told, way):
    found = in_doubt(queue)

    with intercepted(Fault('EROFS', 1, lasts=True)) as fault, no_open_files_are_left():
        fault._can_fail = lambda call: call.name in {'rename', 'unlink'}
        recovery = MaildirQueue(queue.path, in_doubt=way).recover(time.time())

    assert sorted(recovery.in_doubt) == list(found)
    assert (recovery.sent, recovery.discarded) == ((), ())
    assert len(told(status='trouble', error='Read-only file system')) == 2


@pytest.mark.parametrize('way', ['hold', 'send', 'discard'])
def test_messages_whose_process_is_about_to_publish_are_not_in_doubt(queue, way):
    staging = stage(queue, (ENVELOPE, True))

    recovery = MaildirQueue(queue.path, in_doubt=way).recover(time.time())

    assert recovery == type(recovery)()
    assert staging.publish()[0].envelope == ENVELOPE


def test_what_nobody_has_voted_for_is_removed_after_36_hours(queue, told):
    now = time.time()
    for name, age in (('old', 36 * HOUR + 1), ('young', 36 * HOUR - 60)):
        at(queue, 'tmp', name).write_bytes(b'half a mess')
        os.utime(queue.place('tmp', name), (now - age, now - age))
    held = queue._holder.create(queue.place('tmp', 'held'), [b'x'], modified=now - 99 * HOUR)

    assert queue.recover(now).swept == ('old',)

    assert names(queue, 'tmp') == ['held', 'young']
    assert not held.closed


# --- forked children --------------------------------------------------------


def test_a_child_that_ends_leaves_its_parents_claims_alone(queue):
    put(queue)
    taken = claim(queue)
    staging = stage(queue, (OTHER, True))

    def end(connection):
        taken.settle(Settlement())
        taken.release()
        staging.publish()
        staging.discard()
        connection.send('done')

    with Child(end) as child:
        assert child.hear() == 'done'
        assert child.wait() == 0

    recovery = MaildirQueue(queue.path).recover(time.time())
    assert recovery == type(recovery)()
    assert where(queue) == {'prepared': 1, 'cur': 1}
    taken.settle(Settlement())
    assert staging.publish()[0].envelope == OTHER


def test_a_child_that_aborts_leaves_its_parents_transaction_alone(queue):
    staging = stage(queue, (OTHER, True))

    assert run_in_child(staging.discard) == [OTHER]

    assert where(queue) == {'prepared': 1}
    assert staging.publish()[0].envelope == OTHER


def test_a_child_cannot_read_what_its_parent_has_claimed(queue):
    taken = queue.put_claimed(ENVELOPE)

    def read():
        try:
            return taken.envelope
        except OSError as error:
            return error.errno

    assert run_in_child(read) == errno.EBADF


def test_what_a_parent_settles_is_free_although_its_child_lives(queue):
    put(queue)
    taken = claim(queue)

    with Child(lambda connection: connection.recv()):
        taken.release()

        assert claim(MaildirQueue(queue.path))


def test_what_a_dead_parent_had_claimed_is_an_orphan_although_its_child_lives(queue):
    put(queue)

    def be_parent(connection):
        claim_to_inherit = claim(queue)

        def be_child(inner):
            inner.send('born')
            inner.recv()

        child = Child(be_child)
        child.hear()
        connection.send((claim_to_inherit.id, child.pid))
        connection.recv()

    with Child(be_parent) as parent:
        name, grandchild = parent.hear()
        parent.kill()

        os.kill(grandchild, 0)
        assert queue.recover(time.time()).orphans == (name,)


def test_a_child_does_not_make_its_parents_changes_durable(queue):
    queue.put_claimed(ENVELOPE).settle(Settlement())

    def flush():
        with intercepted(Log()) as log:
            queue.flush()
        return log.names

    assert run_in_child(flush) == []
    with intercepted(Log()) as log:
        queue.flush()
    assert log.names == ['open', 'fsync', 'close', 'closerange']


def test_a_child_claims_and_settles_for_itself(queue):
    put(queue)

    run_in_child(lambda: claim(queue).settle(Settlement()))

    assert where(queue) == {}


def test_a_forgotten_claim_is_an_orphan_and_not_locked_for_ever(queue):
    name = put(queue)
    taken = claim(queue)
    assert queue.recover(time.time()).orphans == ()

    del taken

    assert queue.recover(time.time()).orphans == (name,)


# --- what reaches the disk --------------------------------------------------


def test_a_commit_makes_three_syncs_and_two_more_for_each_further_message(queue):
    for messages, syncs in ((1, 3), (2, 4), (5, 7)):
        with intercepted(Log()) as log:
            claims = stage(queue, *[(ENVELOPE, True)] * messages).publish()
        assert len(claims) == messages
        assert log.names.count('fsync') == syncs


def end_of_sync(queue):
    """Wait until the batch that is being made durable is."""
    queue._changes._wait()


def test_settled_messages_are_made_durable_a_hundred_at_a_time(queue, monkeypatch):
    monkeypatch.setattr(maildir_folders, 'SYNC_SECONDS', 1000)
    claims = [queue.put_claimed(ENVELOPE) for _ in range(maildir_folders.SYNC_EVERY * 2 + 1)]

    syncs = []
    for taken in claims:
        with intercepted(Log()) as log:
            taken.settle(Settlement())
            end_of_sync(queue)
        syncs.append(log.names.count('fsync'))

    assert [number for number, count in enumerate(syncs, 1) if count] == [100, 200]
    with intercepted(Log()) as log:
        queue.flush()
        queue.flush()
    assert log.names.count('fsync') == 1


def test_settled_messages_are_made_durable_twice_a_second(queue, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(maildir_folders.time, 'monotonic', lambda: now[0])
    claims = [queue.put_claimed(ENVELOPE) for _ in range(5)]

    syncs = []
    for seconds, taken in zip((0, 0.3, 0.49, 0.51, 0.6), claims, strict=True):
        now[0] = 1000 + seconds
        with intercepted(Log()) as log:
            taken.settle(Settlement())
            end_of_sync(queue)
        syncs.append(log.names.count('fsync'))

    assert syncs == [0, 0, 0, 1, 0]


def test_removed_files_are_closed_together_and_a_large_one_at_once(queue):
    small = [queue.put_claimed(ENVELOPE) for _ in range(5)]
    large = queue.put_claimed(dataclasses.replace(ENVELOPE, content=b'x' * maildir_folders.LARGE))

    with intercepted(Log()) as log:
        for taken in (*small, large):
            taken.settle(Settlement())
    assert log.names.count('close') == 1

    with intercepted(Log()) as log:
        queue.flush()
    # One call, where nobody else's descriptor is in between.
    assert log.names[:3] == ['open', 'fsync', 'close']
    assert set(log.names[3:]) == {'closerange'}


def test_a_process_that_may_open_few_files_keeps_few_of_them_open(tmp_path, monkeypatch):
    queue = MaildirQueue(tmp_path)
    claims = [queue.put_claimed(ENVELOPE) for _ in range(20)]
    few = {taken._file.fd for taken in claims[:5]}
    monkeypatch.setattr(maildir_folders, 'may_stay_open', lambda fd: fd in few)

    with intercepted(Log()) as log:
        for taken in claims:
            taken.settle(Settlement())

    assert log.names.count('close') == 15


@pytest.mark.parametrize(('limit', 'most'), [(256, 32), (1024, 128), (65536, 128), (resource.RLIM_INFINITY, 128)])
def test_what_waits_may_have_an_eighth_of_the_files_and_of_1024_at_most(monkeypatch, limit, most):
    monkeypatch.setattr(maildir_trouble.resource, 'getrlimit', lambda _: (limit, limit))

    assert [fd for fd in range(2000) if maildir_trouble.may_stay_open(fd)] == [*range(most)]


def test_a_new_version_that_is_interrupted_when_it_is_in_its_place_is_not_removed(queue, monkeypatch):
    taken = queue.put_claimed(ENVELOPE)
    rename = os.rename

    def interrupted_behind(*paths):
        rename(*paths)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(locked_file.os, 'rename', interrupted_behind)
        with pytest.raises(KeyboardInterrupt):
            taken.keep(ENVELOPE.recipients[1:])
    taken.release()

    assert claim(queue).envelope.recipients == ENVELOPE.recipients[1:]


def test_where_there_can_be_no_thread_a_batch_is_made_durable_at_once(queue, monkeypatch):
    def no_more(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, 'start', no_more)
    monkeypatch.setattr(maildir_folders, 'SYNC_EVERY', 3)
    claims = [queue.put_claimed(ENVELOPE) for _ in range(3)]

    with intercepted(Log()) as log:
        for taken in claims:
            taken.settle(Settlement())

    synced = log.names.index('fsync')
    assert log.names[synced - 1 : synced + 2] == ['open', 'fsync', 'close']
    assert set(log.names[synced + 2 :]) == {'closerange'}
    assert not queue._changes._syncing.locked()


def test_each_folder_that_changed_is_synced_once_for_a_batch(queue):
    first, second, third = (queue.put_claimed(ENVELOPE) for _ in range(3))
    first.settle(Settlement())
    second.settle(Settlement())
    third.release()

    with intercepted(Log()) as log:
        queue.flush()

    assert sorted(call.args[0] for call in log.calls if call.name == 'open') == [queue.place('cur'), queue.place('new')]


def test_a_batch_that_cannot_be_synced_is_told_and_not_raised(queue, told):
    queue.put_claimed(ENVELOPE).settle(Settlement())

    with intercepted(Fault('EIO', 2)):
        queue.flush()

    assert told(level='ERROR', status='trouble', file=queue.place('cur'), error='Input/output error')


# --- for people -------------------------------------------------------------


def test_counts_tell_how_many_messages_are_in_which_state(queue):
    in_doubt(queue)
    put(queue)
    put(queue, due=LATER)
    taken = queue.put_claimed(ENVELOPE)
    queue.put_claimed(ENVELOPE).settle(Settlement(burials=(Burial(ENVELOPE.recipients, '550 no'),)))
    at(queue, 'corrupt', 'damaged').write_bytes(b'garbage')
    queue.admin.hold(put(queue))
    staging = stage(queue, (ENVELOPE, True))

    assert MaildirQueue(queue.path).counts() == {
        'waiting': 2,
        'in progress': 1,
        'held': 1,
        'dead': 1,
        'in doubt': 2,
        'corrupt': 1,
    }
    assert taken.envelope == staging.publish()[0].envelope
