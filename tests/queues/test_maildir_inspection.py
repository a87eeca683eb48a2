"""Which directories are queues, which may become one, and which are somebody else's and left alone."""

from __future__ import annotations

import os
import pwd
import re
import tempfile
from pathlib import Path

import pytest

from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.folders import FOLDERS
from pyramid_mailqueue.queues.maildir.inspection import SOME_FILES, NoQueue
from pyramid_mailqueue.queues.maildir.queue_file import QueueHeader, serialize_header
from pyramid_mailqueue.transports.maildir import MaildirBackend
from tests.parts.children import run_in_child
from tests.parts.faults import Log, intercepted
from tests.parts.maildir import ENVELOPE, where

CONTENT = b'Subject: x\r\n\r\nHello.\r\n'
OURS = serialize_header(QueueHeader('a@x.example', ('b@x.example',), 1_795_448_044)) + CONTENT
ZOPE = b'X-Zope-From: a@x.example\nX-Zope-To: b@x.example\nSubject: x\n\nHello.\n'
REPOZE = (
    b'Subject: x\nMessage-Id: \n <1@site.example>\nX-Actually-From: =?utf-8?q?a=40x=2Eexample?=\n'
    b'X-Actually-To: =?utf-8?q?b=40x=2Eexample?=\n\nHello.\n'
)
# As Exim delivers it: its first lines have the same names.
EXIM = (
    b'Return-path: <a@x.example>\nEnvelope-to: b@x.example\nDelivery-date: Tue, 24 Nov 2026 07:28:11 +0000\n\nHello.\n'
)
MAILDIR = ('tmp', 'new', 'cur')


@pytest.fixture
def make(tmp_path):
    """
    Make a directory: ``make('tmp/', 'new/1', {'cur/2': b'...'})``.

    A name that ends with a slash is a folder, another one is a file.
    """

    def make(*names, **contents):
        path = tmp_path / 'place'
        path.mkdir()
        for name in names:
            if isinstance(name, str):
                name = {name: b''}
            for file, content in name.items():
                (path / file).parent.mkdir(parents=True, exist_ok=True)
                if file.endswith('/'):
                    (path / file).mkdir(exist_ok=True)
                else:
                    (path / file).write_bytes(content)
        return path

    return make


def seen(path):
    return {str(found.relative_to(path)): found.is_file() and found.read_bytes() for found in path.rglob('*')}


def folders(*names):
    return [f'{name}/' for name in names]


# --- what is a queue --------------------------------------------------------


@pytest.mark.parametrize('access', ['create', 'use', 'look'])
@pytest.mark.parametrize(
    'names',
    [
        folders(*FOLDERS),
        folders(*MAILDIR),
        [*folders(*MAILDIR), {'new/1': OURS}],
        [*folders(*MAILDIR), {'cur/1': OURS}],
        [*folders(*MAILDIR), {'tmp/1': OURS[:50]}],
        [*folders(*MAILDIR), 'new/empty'],
        # Folders that a backup without empty ones has lost.
        [{'new/1': OURS}],
        [{'dead/1': OURS}],
        folders(*(name for name in FOLDERS if name != 'held')),
        folders(*(name for name in FOLDERS if name != 'tmp')),
        # What is damaged in a queue is the business of its runs.
        [*folders(*MAILDIR), {'new/1': OURS, 'new/2': EXIM}],
        [*folders(*FOLDERS), {'new/2': EXIM, 'cur/3': ZOPE}],
        # Whatever else lies beside.
        [*folders(*FOLDERS), 'README', 'logs/queue.log'],
        [*folders(*MAILDIR), {'new/1': OURS}, 'README'],
        [*folders(*MAILDIR, 'lost+found', 'inbox', 'moving'), 'rate', 'rate.new', '.gitkeep'],
    ],
    ids=str,
)
def test_what_looks_like_a_queue_is_one(make, names, access):
    path = make(*names)
    before = seen(path)

    queue = MaildirQueue(path, access=access)
    queue.counts()

    if access == 'look':
        assert seen(path) == before
    else:
        assert seen(path) == before | dict.fromkeys(FOLDERS, False)
        assert queue.put(ENVELOPE)


@pytest.mark.parametrize(
    ('names', 'lack'),
    [
        ([], 'the directory is empty'),
        (['lost+found/', '.gitkeep', '.snapshot/x'], 'the directory is empty'),
        (['rate', 'inbox/1.eml'], 'the directory is empty'),
        (folders('tmp'), 'there is only a part of a queue'),
        (folders('tmp', 'prepared'), 'there is only a part of a queue'),
        (folders('tmp', 'prepared', 'new'), 'there is only a part of a queue'),
    ],
    ids=str,
)
def test_what_may_become_a_queue_is_made_one_by_who_creates_and_by_nobody_else(make, names, lack):
    path = make(*names)
    before = seen(path)

    for access in ('use', 'look'):
        with pytest.raises(NoQueue, match=f'^There is no queue in {path}: {lack}.$'):
            MaildirQueue(path, access=access)
    assert seen(path) == before

    assert MaildirQueue(path).put(ENVELOPE)


def test_nothing_is_created_where_there_is_nothing_by_who_does_not_create(tmp_path):
    for access in ('use', 'look'):
        with pytest.raises(NoQueue, match='there is no such directory'):
            MaildirQueue(tmp_path / 'typo' / 'queue', access=access)
    assert seen(tmp_path) == {}


def test_whoever_looks_sees_what_waits_in_a_queue_of_mailqueue_runner(make):
    path = make(*folders(*MAILDIR), {'new/1': OURS})

    queue = MaildirQueue(path, access='look')

    assert {state: number for state, number in queue.counts().items() if number} == {'waiting': 1}
    assert [entry.id for entry in queue.admin.entries(['waiting'])] == ['1']
    assert queue.admin.find('1').recipients == ('b@x.example',)


def test_a_folder_that_goes_away_later_is_missed(make):
    queue = MaildirQueue(make(*folders(*FOLDERS)), access='look')
    Path(queue.path, 'dead').rmdir()

    with pytest.raises(QueueError, match='dead cannot be read: No such file'):
        queue.counts()


def test_to_look_needs_no_right_to_write():
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        queue = MaildirQueue(f'{parent}/queue')
        queue.put(ENVELOPE)
        for path in (Path(queue.path), *Path(queue.path).iterdir()):
            path.chmod(0o555)

        def look():
            if os.getuid() == 0:
                os.setuid(65534)
            return MaildirQueue(queue.path, access='look').counts()['waiting']

        assert run_in_child(look) == 1
        for path in (Path(queue.path), *Path(queue.path).iterdir()):
            path.chmod(0o755)


# --- what is somebody else's ------------------------------------------------


@pytest.mark.parametrize('access', ['create', 'use', 'look'])
@pytest.mark.parametrize(
    ('names', 'told'),
    [
        ([{'new/1': ZOPE}], 'is the queue of zope.sendmail: new/1 is one of its messages'),
        ([{'cur/1': ZOPE}], 'is the queue of zope.sendmail: cur/1 is one'),
        ([{'tmp/1': ZOPE}], 'is the queue of zope.sendmail: tmp/1 is one'),
        ([{'new/1': ZOPE, 'cur/2': OURS}], 'is the queue of zope.sendmail: new/1 is one'),
        ([{'new/1': REPOZE}], r'is the queue of repoze.sendmail \(pyramid_mailer\): new/1 is one'),
        ([{'new/1': REPOZE.replace(b'\n', b'\r\n')}], r'is the queue of repoze.sendmail \(pyramid_mailer\)'),
        ([{'new/1': EXIM}], 'is no queue: new/1 is no message of one'),
        ([{'cur/1:2,S': b'From: a@x.example\n\nHello.\n'}], 'is no queue: cur/1:2,S is no message of one'),
        ([{'new/\x1b[31m': b'x\n'}], r'is no queue: new/\\x1b\[31m is no message of one'),
        ([{'tmp/session': b'a program keeps\nwhat it likes\n'}], 'is no queue: tmp/session is no message of one'),
        (['dovecot-uidlist'], 'is no queue: there is dovecot-uidlist in it'),
    ],
    ids=str,
)
def test_the_maildir_of_another_program_is_left_alone(make, names, told, access):
    path = make(*folders(*MAILDIR), *names)
    before = seen(path)

    with pytest.raises(QueueError, match=f'^{path} {told}.*name another (one|directory)') as info:
        MaildirQueue(path, access=access)

    assert not isinstance(info.value, NoQueue)
    assert seen(path) == before


@pytest.mark.parametrize('access', ['create', 'use', 'look'])
@pytest.mark.parametrize(
    ('names', 'told'),
    [
        (['production.ini'], 'there is production.ini in it'),
        (['src/', 'setup.py', 'tmp/', 'new/'], 'there is setup.py, src in it'),
        (['a', 'b', 'c', 'd', 'e'], r'there is ., ., ., \.\.\. in it'),
        (['prepared/', 'new/', 'done/', 'tmp/'], 'there is done in it'),
        # Files where a queue has folders.
        (['new'], 'there is new in it'),
    ],
    ids=str,
)
def test_a_directory_with_something_else_in_it_is_left_alone(make, names, told, access):
    path = make(*names)
    before = seen(path)

    with pytest.raises(QueueError, match=f'^{path} is no queue: {told}. A queue needs a directory of its own: name an'):
        MaildirQueue(path, access=access)

    assert seen(path) == before


def test_so_it_is_by_a_transport(make):
    path = make({'new/1': ZOPE})

    with pytest.raises(QueueError, match=r'is the queue of zope\.sendmail'):
        MaildirBackend(path)


def test_what_is_in_a_message_does_not_make_it_one_of_another_program(make):
    path = make(*folders(*MAILDIR), {'new/1': OURS + b'\r\n' + REPOZE + ZOPE})

    assert MaildirQueue(path).counts()['waiting'] == 1


def test_few_of_many_files_are_looked_at(make):
    path = make(*folders(*MAILDIR))
    for number in range(10 * SOME_FILES):
        (path / 'new' / str(number)).write_bytes(OURS)

    with intercepted(Log()) as log:
        MaildirQueue(path, access='look')

    opened = [call for call in log.calls if call.name == 'open']
    assert len(opened) <= SOME_FILES


@pytest.mark.parametrize('access', ['create', 'use', 'look'])
def test_a_link_to_nowhere_is_told(tmp_path, access):
    (tmp_path / 'place').symlink_to('nowhere')

    with pytest.raises(QueueError, match='place cannot be created or used: It is a link to nowhere, which is not ther'):
        MaildirQueue(tmp_path / 'place', access=access)


def test_a_link_to_a_queue_is_one(tmp_path):
    MaildirQueue(tmp_path / 'queue')
    (tmp_path / 'place').symlink_to('queue')

    assert MaildirQueue(tmp_path / 'place', access='use').put(ENVELOPE)


@pytest.mark.parametrize('mode', [0o700, 0o744, 0o711])
@pytest.mark.parametrize('access', ['create', 'use', 'look'])
def test_whoever_may_not_use_a_queue_is_told_whose_it_is(access, mode):
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        queue = MaildirQueue(f'{parent}/queue')
        Path(queue.path).chmod(mode if os.getuid() == 0 else 0o000)

        def use():
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                MaildirQueue(queue.path, access=access)
            except QueueError as error:
                return str(error), os.getuid()
            return None

        text, user = run_in_child(use)
        Path(queue.path).chmod(0o700)

        me, owner = (re.escape(pwd.getpwuid(uid).pw_name) for uid in (user, os.getuid()))
        assert re.search(f': the user {me} may not read .*{parent}.*, which belongs to {owner}$', text)


# --- those of other programs that come later --------------------------------


@pytest.mark.parametrize(('content', 'writer'), [(ZOPE, 'zope.sendmail'), (REPOZE, 'repoze.sendmail (pyramid_mailer)')])
def test_a_message_of_another_program_among_ours_is_put_aside_and_told_with_its_name(tmp_path, caplog, content, writer):
    queue = MaildirQueue(tmp_path / 'queue')
    name = queue.put(ENVELOPE)
    Path(queue.place('new', '1.2.theirs')).write_bytes(content)

    claims = list(queue.claim_due(4e9))

    assert [claim.id for claim in claims] == [name]
    assert where(queue) == {'cur': 1, 'corrupt': 1}
    assert Path(queue.place('corrupt', '1.2.theirs')).read_bytes() == content
    (record,) = [record for record in caplog.records if record.levelname == 'ERROR']
    assert record.mailqueue['status'] == 'corrupt'
    assert f'a message that {writer} has queued. Move it into a directory of that program' in str(
        record.mailqueue['error']
    )
    assert writer in queue.admin.find('1.2.theirs').last_reply
