"""``mq-queue app.ini move``, as somebody types it and as a script calls it."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import make_url

from pyramid_mailqueue.cli import queue as command
from pyramid_mailqueue.cli import queue_move
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues import moving
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir import moving as moving_maildir
from pyramid_mailqueue.queues.sql import moving as moving_sql
from tests.parts.move import Place

DEADLINE = 30

OTHER = {'sql': 'maildir', 'maildir': 'sql'}


def content(number):
    return f'Message-ID: <{number}@site.example>\r\nSubject: order {number}\r\n\r\nHello\r\n'.encode()


@pytest.fixture
def place(tmp_path, url):
    return Place(tmp_path / 'queue', url)


@pytest.fixture
def ini(tmp_path):
    """Write an ini file, and return its path."""

    def ini(**own):
        keys = [f'{key} = {value}'.replace('%', '%%') for key, value in own.items()]
        path = tmp_path / 'app.ini'
        path.write_text('\n'.join(['[app:main]', 'mailqueue.smtp_hostname = localhost', *keys, '']))
        return str(path)

    return ini


@pytest.fixture
def mq_queue_with(ini, tmp_path, capfd):
    """Call ``mq-queue`` for an app with a directory and this database; return its exit status, and what it printed."""

    def mq_queue_with(url, *arguments, **own):
        own = own or {'mailqueue.queue_dir': tmp_path / 'queue', 'sqlalchemy.url': url}
        with pytest.raises(SystemExit) as info:
            command.main([ini(**own), *arguments])
        return info.value.code, *capfd.readouterr()

    return mq_queue_with


@pytest.fixture
def mq_queue(mq_queue_with, url):
    """The same, with a database of each kind."""
    return partial(mq_queue_with, url)


@pytest.mark.parametrize('in_use', ['maildir', 'sql'])
def test_everything_moves_there_and_back_whichever_queue_is_in_use(mq_queue, place, tmp_path, url, in_use):
    for n in range(3):
        place.put(content(n), state='dead' if n == 2 else 'waiting')
    settings = {'mailqueue.queue_dir': tmp_path / 'queue', 'mailqueue.sql_url': url, 'mailqueue.queue': in_use}
    with place.sql() as queue:
        name = queue.database.name

    assert mq_queue('move', '--to-sql', **settings) == (0, f'3 messages moved to {name}: 2 waiting, 1 dead\n', '')
    assert mq_queue('move', '--to-sql', **settings) == (0, f'0 messages moved to {name}\n', '')
    status, out, _ = mq_queue('move', '--to-maildir', **settings)
    assert (status, out) == (0, f'3 messages moved to {tmp_path}/queue: 2 waiting, 1 dead\n')
    assert place.counts('maildir') == {'waiting': 2, 'dead': 1}


def test_what_is_left_behind_is_counted_and_is_status_1(mq_queue, place):
    claim = place.maildir.put_claimed(Envelope('a@x.example', ('b@x.example',), content(1)))
    for n in range(queue_move.SOME + 2):
        Path(place.maildir.place('new', f'damaged{n:02}')).write_bytes(b'no queue file')

    status, out, err = mq_queue('move', '--to-sql')

    assert status == 1
    assert out.splitlines()[-1] == f'left in {place.maildir.path}: 1 in progress, 22 corrupt'
    assert err.splitlines()[0].startswith('mq-queue: damaged00 cannot be moved: its file is damaged: ')
    assert err.splitlines()[-1] == 'mq-queue: 2 more cannot be moved'
    claim.release()


def test_a_program_is_told_in_json(mq_queue, place):
    place.put(content(1), state='held')
    Path(place.maildir.place('new', 'damaged')).write_bytes(b'no queue file')

    status, out, _ = mq_queue('move', '--to-sql', '--json')

    told = json.loads(out)
    assert status == 1
    assert told['refused'][0].pop('reason').startswith('its file is damaged')
    assert told == {
        'moved': {'waiting': 0, 'held': 1, 'dead': 0},
        'settled': 0,
        'half_way': 0,
        'refused': [{'id': 'damaged'}],
        'left': {'corrupt': 1},
    }


@pytest.mark.parametrize(
    ('arguments', 'problem'),
    [
        (['move'], 'one of the arguments --to-sql --to-maildir is required'),
        (['move', '--to-sql', '--to-maildir'], 'not allowed with argument'),
    ],
)
def test_one_direction_has_to_be_named(mq_queue, arguments, problem):
    status, _, err = mq_queue(*arguments)

    assert status == 2
    assert problem in err


def test_a_setting_that_is_missing_is_named(mq_queue, tmp_path, url):
    MaildirQueue(tmp_path / 'queue')
    without_url = mq_queue('move', '--to-sql', **{'mailqueue.queue_dir': tmp_path / 'queue'})
    without_directory = mq_queue('move', '--to-maildir', **{'mailqueue.queue': 'sql', 'sqlalchemy.url': url})

    assert without_url[0] == without_directory[0] == 78
    assert 'mailqueue.sql_url is missing' in without_url[2]
    assert 'mailqueue.queue_dir is missing' in without_directory[2]


@pytest.mark.parametrize('direction', ['--to-sql', '--to-maildir'])
def test_a_directory_that_is_not_there_is_not_made_by_a_move(mq_queue, tmp_path, url, direction):
    missing = tmp_path / 'mistyped'
    settings = {'mailqueue.queue': 'sql', 'mailqueue.queue_dir': missing, 'sqlalchemy.url': url}

    status, _, err = mq_queue('move', direction, **settings)

    assert status == 78
    assert f'mailqueue.queue_dir = {missing}: there is no such directory' in err
    assert err.endswith('mq-queue app.ini --set mailqueue.queue=maildir init\n')
    assert not missing.exists()
    assert mq_queue('--set', 'mailqueue.queue=maildir', 'init', **settings)[0] == 0
    assert mq_queue('move', direction, **settings)[0] == 0


def test_tables_that_are_missing_are_a_matter_of_init(mq_queue, tmp_path):
    settings = {'mailqueue.queue_dir': tmp_path / 'queue', 'sqlalchemy.url': f'sqlite:///{tmp_path}/empty.sqlite'}
    Place(tmp_path / 'queue', settings['sqlalchemy.url'])

    status, _, err = mq_queue('move', '--to-sql', **settings)

    assert status == 78
    assert '--set mailqueue.queue=sql' in err
    assert mq_queue('--set', 'mailqueue.queue=sql', 'init', **settings)[0] == 0
    assert mq_queue('move', '--to-sql', **settings)[0] == 0


def test_a_database_that_is_away_is_status_75_and_leaves_everything_where_it_is(mq_queue, place, tmp_path):
    place.put(content(1))
    url = 'postgresql+psycopg://nobody:secret@127.0.0.1:1/app'

    status, out, err = mq_queue(
        'move', '--to-sql', **{'mailqueue.queue_dir': tmp_path / 'queue', 'mailqueue.sql_url': url}
    )

    assert (status, out) == (75, '')
    assert 'secret' not in err
    assert place.counts('maildir') == {'waiting': 1}


# --- what the user of the database may not do -------------------------------


@pytest.fixture
def role(postgres_url, sql):
    """A user who may do nothing with the messages."""
    role = f'mq_role_{os.getpid()}'
    ((schema,),) = sql(postgres_url, 'SELECT current_schema()')
    sql(postgres_url, f'CREATE ROLE {role}')
    sql(postgres_url, f'GRANT USAGE ON SCHEMA {schema} TO {role}')
    sql(postgres_url, f'GRANT SELECT ON mailqueue_schema TO {role}')
    sql(postgres_url, f'GRANT SELECT, INSERT ON mailqueue_content TO {role}')
    yield role
    sql(postgres_url, f'DROP OWNED BY {role}')
    sql(postgres_url, f'DROP ROLE {role}')


@pytest.fixture
def grant(postgres_url, sql, role):
    """Let that user do this with the messages, and nothing else."""

    def grant(rights):
        sql(postgres_url, f'REVOKE ALL ON mailqueue_message FROM {role}')
        sql(postgres_url, f'GRANT {rights} ON mailqueue_message TO {role}')

    return grant


@pytest.fixture
def pg_place(tmp_path, postgres_url):
    return Place(tmp_path / 'queue', postgres_url)


@pytest.fixture
def move_as(mq_queue_with, postgres_url):
    """Call ``mq-queue move`` with a setting of the session."""

    def move_as(setting, *arguments):
        url = make_url(postgres_url)
        url = url.update_query_dict({'options': f'{url.query["options"]} -c{setting}'})
        return mq_queue_with(url.render_as_string(hide_password=False), 'move', *arguments)

    return move_as


@pytest.mark.parametrize(
    ('to', 'rights'),
    [
        ('sql', 'SELECT'),
        ('sql', 'SELECT, INSERT'),
        ('sql', 'SELECT, INSERT, UPDATE'),
        ('maildir', 'SELECT'),
        ('maildir', 'SELECT, UPDATE'),
        ('maildir', 'SELECT, UPDATE, INSERT'),
    ],
)
def test_a_user_who_may_not_do_all_of_it_moves_nothing(pg_place, move_as, role, grant, to, rights):
    pg_place.put(content(1))
    if to == 'maildir':
        pg_place.move('sql')
    grant(rights)

    status, out, err = move_as(f'role={role}', f'--to-{to}')

    assert (status, out) == (78, '')
    assert 'permission denied for table mailqueue_message' in err
    assert 'SELECT, INSERT, UPDATE and DELETE' in err
    assert (pg_place.counts(OTHER[to]), pg_place.in_moving()) == ({'waiting': 1}, [])


def test_a_user_who_may_not_even_see_the_version_of_the_tables_is_told_so(
    pg_place, move_as, role, grant, postgres_url, sql
):
    pg_place.put(content(1))
    grant('ALL')
    sql(postgres_url, f'REVOKE ALL ON mailqueue_schema FROM {role}')

    status, _, err = move_as(f'role={role}', '--to-sql')

    assert status == 78
    assert 'permission denied for table mailqueue_schema' in err
    assert 'init' not in err
    assert pg_place.counts('maildir') == {'waiting': 1}


def test_a_database_that_only_reads_now_is_status_75_and_leaves_everything_where_it_is(pg_place, move_as):
    pg_place.put(content(1))

    status, out, err = move_as('default_transaction_read_only=on', '--to-sql')

    assert (status, out) == (75, '')
    assert 'read-only transaction' in err
    assert (pg_place.counts('maildir'), pg_place.in_moving()) == ({'waiting': 1}, [])


def test_a_database_that_takes_nothing_any_more_does_not_keep_messages_from_going_back(
    pg_place, move_as, role, grant, monkeypatch
):
    for n in range(2):
        pg_place.put(content(n))
    grant('ALL')
    stage = moving_sql.SQLSide.stage

    def revoke_and_stage(*args):
        grant('SELECT')
        return stage(*args)

    monkeypatch.setattr(moving_sql.SQLSide, 'stage', revoke_and_stage)
    status, _, err = move_as(f'role={role}', '--to-sql')

    assert status == 78
    assert 'permission denied for table mailqueue_message' in err
    assert 'half-way' not in err
    assert (pg_place.counts('maildir'), pg_place.counts('sql')) == ({'waiting': 2}, {})
    assert pg_place.in_moving() == []


@pytest.mark.parametrize('to', OTHER)
def test_what_is_left_half_way_is_told_of_and_settled_by_the_next_move(pg_place, move_as, role, grant, monkeypatch, to):
    for n in range(2):
        pg_place.put(content(n))
    if to == 'maildir':
        pg_place.move('sql')
    grant('ALL')
    decide = moving_maildir.DirectoryRecord.decide

    def decide_and_revoke(*args):
        decide(*args)
        grant('SELECT')

    monkeypatch.setattr(moving_maildir.DirectoryRecord, 'decide', decide_and_revoke)
    status, out, err = move_as(f'role={role}', f'--to-{to}', '--json')

    assert status == 78
    assert 'permission denied for table mailqueue_message' in err
    assert json.loads(out)['half_way'] == 1
    assert pg_place.in_moving() != []
    monkeypatch.undo()
    grant('ALL')
    status, out, _ = move_as(f'role={role}', f'--to-{to}', '--json')
    told = json.loads(out)
    assert (status, told['half_way'], told['settled']) == (0, 0, 1)
    assert (pg_place.counts(to), pg_place.counts(OTHER[to]), pg_place.in_moving()) == ({'waiting': 2}, {}, [])


# --- what fails meanwhile ---------------------------------------------------


def test_a_disk_that_fails_is_status_75_and_what_was_done_is_told(mq_queue, place, monkeypatch):
    monkeypatch.setattr(moving, 'MOST_MESSAGES', 1)
    for n in range(2):
        place.put(content(n))
    decide, calls = moving_maildir.DirectoryRecord.decide, []

    def fail_second(self, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise OSError(28, os.strerror(28), '/the/queue')
        decide(self, batch)

    monkeypatch.setattr(moving_maildir.DirectoryRecord, 'decide', fail_second)
    status, out, err = mq_queue('move', '--to-sql')

    assert status == 75
    assert out.startswith('1 message moved to ')
    assert 'half-way, in doubt' in err
    assert '/the/queue: No space left on device' in err
    monkeypatch.undo()
    _, out, _ = mq_queue('move', '--to-sql')
    assert out.startswith(
        'Messages that an interrupted move had left half-way are in one of the queues again.\n1 message '
    )
    assert len(place.kept('sql')) == 2


START = 'from pyramid_mailqueue.cli.queue import main; from pyramid_mailqueue.queues import moving; '


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_between_two_batches(place, ini, url, tmp_path, number):
    for n in range(3):
        place.put(content(n))
    path = ini(**{'mailqueue.queue_dir': tmp_path / 'queue', 'sqlalchemy.url': url})
    code = (
        f'{START} moving.MOST_MESSAGES = 1; import os; end = moving.Move._end\n'
        'def _end(*args, **options): os.kill(os.getpid(), NUMBER); end(*args, **options)\n'
        f'moving.Move._end = _end; main([{path!r}, "move", "--to-sql"])'
    ).replace('NUMBER', str(int(number)))

    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False, timeout=DEADLINE)

    assert done.returncode == 128 + number
    assert done.stdout.startswith('1 message moved to ')
    assert 'not complete; do it again' in done.stderr
    assert (place.counts('sql'), place.counts('maildir')) == ({'waiting': 1}, {'waiting': 2})
    assert place.in_moving() == []


def test_somebody_at_a_terminal_sees_how_far_it_is(place, ini, url, tmp_path):
    for n in range(3):
        place.put(content(n))
    path = ini(**{'mailqueue.queue_dir': tmp_path / 'queue', 'sqlalchemy.url': url})
    code = (
        f'{START} moving.MOST_MESSAGES = 2; '
        'from pyramid_mailqueue.cli import queue_move; queue_move.BETWEEN_LINES = 0; '
        f'main([{path!r}, "move", "--to-sql"])'
    )
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=theirs, check=False, timeout=DEADLINE
        )
        assert select.select([ours], [], [], DEADLINE)[0]
        shown = os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(theirs)

    assert done.returncode == 0
    assert [line.split(',')[0] for line in shown.splitlines()] == ['mq-queue: 2 moved', 'mq-queue: 3 moved']
