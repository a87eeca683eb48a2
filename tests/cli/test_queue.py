"""The command ``mq-queue``, as somebody types it, as a script calls it, and as monitoring does."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path

import pytest

from pyramid_mailqueue.cli import queue as command
from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.entries import STATES
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.admin import MaildirAdmin
from pyramid_mailqueue.queues.sql import SQLQueue
from pyramid_mailqueue.results import Burial, Settlement
from pyramid_mailqueue.testing import ScriptedSMTPServer

HOUR = 3600
AGE = 100 * 60
SCHEMA = [
    'id', 'state', 'sender', 'recipients', 'retries', 'queued_at', 'due', 'last_attempt', 'last_reply', 'subject',
    'message_id', 'size',
]  # fmt: skip
ISO = re.compile(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ')

HOSTILE = '=?utf-8?q?=1B]0;owned=07=0D=0A?= [bold red]not markup[/] \N{RIGHT-TO-LEFT OVERRIDE}'


def content(subject='Your order'):
    header = f'Message-ID: <1@site.example>\r\nTo: ada@x.example,\r\n\tbob@x.example\r\nSubject: {subject}\r\n'
    return f'{header}\r\nHello\r\n'.encode()


@pytest.fixture
def clock():
    """When messages come into the queue: more than an hour ago, one after the other."""
    times = iter(range(int(time.time()) - AGE, int(time.time())))
    return lambda: next(times)


@pytest.fixture
def queue(queue_dir, clock):
    return MaildirQueue(queue_dir, clock=clock)


@pytest.fixture
def put(queue):
    """Put a message into the queue, in a state; return its id."""

    def put(state='waiting', *recipients, sender='shop@site.example', subject='Your order', due=None):
        envelope = Envelope(sender, recipients or ('ada@x.example',), content(subject))
        if state == 'corrupt':
            Path(queue.place('corrupt', 'damaged')).write_bytes(b'not a queue file')
            return 'damaged'
        if state == 'in doubt':
            staging = queue.staging()
            staging.add(envelope, claimed=False)
            staging.prepare()
            (file,) = staging._files
            file.close()
            return file.name
        if state == 'dead':
            burial = Burial(envelope.recipients, '550 5.1.1 no such user')
            claim = queue.put_claimed(envelope)
            claim.settle(Settlement(burials=(burial,)))
            return next(Path(queue.place('dead')).glob(f'{claim.id}.*')).name
        if state == 'in progress':
            put.claims.append(queue.put_claimed(envelope))
            return put.claims[-1].id
        name = queue.put(envelope)
        if due is not None:
            os.utime(queue.place('new', name), (due, due))
        if state == 'held':
            queue.admin.hold(name)
        return name

    put.claims = []
    yield put
    for claim in put.claims:
        claim.release()


@pytest.fixture
def ini(tmp_path, queue_dir):
    """Write an ini file of an app, which has created its queue, and return its path: ``ini(key=value)``."""

    def ini(has_started=True, **own):
        if has_started:
            MaildirQueue(queue_dir)
        own = {'queue_dir': '%(here)s/queue', 'smtp_hostname': '127.0.0.1', **own}
        keys = '\n'.join(f'mailqueue.{key} = {value}' for key, value in own.items())
        path = tmp_path / 'app.ini'
        path.write_text(f'[app:main]\nuse = egg:not_installed\n{keys}\n')
        return path

    return ini


@pytest.fixture
def mq_queue(ini, capfdbinary):
    """Run the command in this process: ``mq_queue('list')`` returns the exit status, and what was printed."""

    def mq_queue(*arguments, path=None):
        with pytest.raises(SystemExit) as exit_:
            command.main([str(path or ini()), *arguments])
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return exit_.value.code, out.decode(), err.decode()

    return mq_queue


@pytest.fixture
def as_json(mq_queue):
    """The same with ``--json``: returns what was printed, of a command that has succeeded."""

    def as_json(*arguments):
        status, out, err = mq_queue(*arguments, '--json')
        assert (status, err) == (0, '')
        return json.loads(out)

    return as_json


@pytest.fixture
def start(ini):
    """Start the command in a process of its own."""
    processes = []

    def start(*arguments, path=None, **options):
        processes.append(
            subprocess.Popen(
                [sys.executable, '-m', 'pyramid_mailqueue.cli.queue', str(path or ini()), *map(str, arguments)],
                **{'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'stdin': subprocess.DEVNULL, **options},
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


# --- list -------------------------------------------------------------------


def test_every_message_is_listed_oldest_first(mq_queue, put):
    ids = [put(state) for state in STATES]
    # What has no time in its name is as old as its file.
    ids.sort(key=lambda name: (name == 'damaged', name))

    status, out, err = mq_queue('list')

    assert (status, err) == (0, '')
    titles, *lines = out.splitlines()
    assert re.split('  +', titles) == [
        *('ID', 'STATE', 'AGE', 'DUE', 'TRIES', 'SIZE', 'SENDER', 'RECIPIENTS', 'SUBJECT', 'LAST REPLY')
    ]
    rows = [re.split('  +', line) for line in lines]
    assert [row[0] for row in rows] == ids
    assert {row[1] for row in rows} == set(STATES)
    size = str(len(content()))
    assert rows[0][1:] == ['waiting', '1h', 'now', '0', size, 'shop@site.example', 'ada@x.example', 'Your order', '-']
    dead = next(row for row in rows if row[1] == 'dead')
    assert dead[3] == '-'
    assert dead[-1] == '550 5.1.1 no such user'


def test_an_empty_queue_has_an_empty_list(mq_queue, as_json):
    status, out, err = mq_queue('list')

    assert (status, err) == (0, '')
    assert out.splitlines()[1:] == []
    assert as_json('list') == []


def test_in_json_every_message_has_the_one_schema(as_json, put):
    ids = {state: put(state) for state in STATES}

    found = {message['state']: message for message in as_json('list')}

    assert {state: message['id'] for state, message in found.items()} == ids
    assert all(list(message) == SCHEMA for message in found.values())
    waiting = found['waiting']
    assert ISO.fullmatch(waiting.pop('queued_at'))
    assert ISO.fullmatch(waiting.pop('due'))
    assert waiting == {
        'id': ids['waiting'],
        'state': 'waiting',
        'sender': 'shop@site.example',
        'recipients': ['ada@x.example'],
        'retries': 0,
        'last_attempt': None,
        'last_reply': '',
        'subject': 'Your order',
        'message_id': '<1@site.example>',
        'size': len(content()),
    }
    assert found['corrupt']['sender'] is None
    assert found['corrupt']['queued_at'] is None


@pytest.mark.parametrize('written', ['in progress', 'in-progress', 'in_progress'])
def test_messages_can_be_listed_by_state(as_json, put, written):
    for state in STATES:
        put(state)

    assert [message['state'] for message in as_json('list', '--state', written)] == ['in progress']
    assert [message['state'] for message in as_json('list', '--state', 'held', '--state', 'dead')] == ['held', 'dead']


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (['--recipient', 'ada'], [0, 2]),
        (['--recipient', 'ADA@x.example'], [0]),
        (['--recipient', '@y.example'], [1, 2]),
        (['--recipient', '<bob@y.example>'], [1]),
        (['--recipient', 'nobody'], []),
        (['--sender', 'shop@'], [0, 1]),
        (['--sender', '<>'], [2]),
        (['--sender', 'shop', '--recipient', 'bob'], [1]),
        (['--older-than', '1h'], [0, 1, 2]),
        (['--older-than', '3h'], []),
        (['--newer-than', '3h', '--recipient', 'bob'], [1]),
        (['--newer-than', '1h'], []),
    ],
)
def test_messages_can_be_listed_by_recipient_sender_and_age(as_json, put, options, expected):
    put('corrupt')
    ids = [put(), put('waiting', 'bob@y.example'), put('waiting', 'a@x', 'ada@y.example', sender='')]

    found = [message['id'] for message in as_json('list', *options)]

    assert found == [ids[number] for number in expected]


def test_many_recipients_are_listed_as_a_few(mq_queue, put):
    put('waiting', *(f'{number}@x.example' for number in range(20)))

    assert '0@x.example,1@x.example,2@x.example,... (17 more)' in mq_queue('list')[1]


# --- show -------------------------------------------------------------------


def test_show_tells_all_there_is_to_know_of_a_message(mq_queue, put, queue):
    name = put('waiting', 'ada@x.example', 'bob@x.example')
    claim = next(queue.claim_due(time.time()))
    due = time.time() + 2 * HOUR + 30
    claim.settle(Settlement(('ada@x.example', 'bob@x.example'), due=due, last_reply='451 4.3.0 later'))

    status, out, err = mq_queue('show', name[:20])

    assert (status, err) == (0, '')
    facts, _, header = out.partition('\n\n')
    lines = facts.splitlines()
    assert [line[:13].strip() for line in lines] == [
        *('ID', 'State', 'Sender', 'Recipients', '', 'Queued', 'Attempts', 'Last attempt', 'Last reply', 'Due', 'Size')
    ]
    told = [line[13:] for line in lines]
    assert told[:5] == [name, 'waiting', '<shop@site.example>', '<ada@x.example>', '<bob@x.example>']
    assert re.fullmatch(rf'{ISO.pattern} \(1h ago\)', told[5])
    assert told[6] == '1'
    assert re.fullmatch(rf'{ISO.pattern} \(1h ago\)', told[7])
    assert told[8] == '451 4.3.0 later'
    assert re.fullmatch(rf'{ISO.pattern} \(in 2h\)', told[9])
    assert told[10] == f'{len(content())} octets'
    assert header.splitlines() == [
        'Message-ID: <1@site.example>',
        'To: ada@x.example, bob@x.example',
        'Subject: Your order',
        '',
        'Hello',
    ]


def test_show_decodes_what_people_read_and_nothing_for_programs(mq_queue, as_json, queue):
    message = EmailMessage()
    message['Subject'] = 'Grüße aus Köln'
    message['From'] = 'Zoë Müller <zoe@site.example>'
    message.set_content('Schöne Grüße\n\x1b]0;owned\x07\n', cte='quoted-printable', charset='iso-8859-1')
    message.add_attachment(b'%PDF', maintype='application', subtype='pdf', filename='Übersicht.pdf')
    name = queue.put(Envelope('', ('ada@x.example',), message.as_bytes(policy=SMTP)))

    status, out, err = mq_queue('show', name)

    assert (status, err) == (0, '')
    assert '\nSubject: Grüße aus Köln\nFrom: Zoë Müller <zoe@site.example>\n' in out
    assert out.endswith('\n\nSchöne Grüße\n\\x1b]0;owned\\x07\n\n[application/pdf, Übersicht.pdf, 4 octets]\n')
    headers = dict(as_json('show', name)['headers'])
    assert headers['Subject'].startswith('=?utf-8?')
    assert b'Sch=F6ne Gr=FC=DFe' in mq_queue('show', name, '--raw')[1].encode()


@pytest.mark.parametrize(
    ('encoding', 'charset', 'body', 'shown'),
    [
        ('base64', 'utf-8', base64.b64encode('Žluťoučký'.encode()), 'Žluťoučký'),
        ('8bit', 'koi8-r', 'Привет'.encode('koi8-r'), 'Привет'),
        ('8bit', 'x-nobody-knows', b'plain', 'plain'),
        ('8bit', 'utf-8', b'caf\xe9', 'caf\N{REPLACEMENT CHARACTER}'),
    ],
)
def test_show_decodes_the_text_with_its_own_charset(mq_queue, queue, encoding, charset, body, shown):
    header = f'Content-Type: text/plain; charset={charset}\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n'
    name = queue.put(Envelope('', ('ada@x.example',), header.encode() + body + b'\r\n'))

    assert mq_queue('show', name)[1].endswith(f'\n\n{shown}\n')


def test_a_message_of_html_only_is_shown_with_the_kind_of_its_part(mq_queue, queue):
    name = queue.put(Envelope('', ('ada@x.example',), b'Content-Type: text/html\r\n\r\n<b>hi</b>\r\n'))

    assert mq_queue('show', name)[1].endswith('\n\n[text/html, 11 octets]\n')


def test_show_in_json_is_one_object_with_the_header(as_json, put):
    name = put('dead')

    shown = as_json('show', name)

    assert list(shown) == [*SCHEMA, 'headers']
    assert shown['last_reply'] == '550 5.1.1 no such user'
    assert shown['headers'] == [
        ['Message-ID', '<1@site.example>'],
        ['To', 'ada@x.example, bob@x.example'],
        ['Subject', 'Your order'],
    ]


def test_a_message_without_a_header_can_be_shown(as_json, mq_queue, queue):
    name = queue.put(Envelope('', ('ada@x.example',), b'\r\nJust a body.\r\n'))
    odd = queue.put(Envelope('', ('ada@x.example',), b' begins\r\nwith: no field\r\nlast line'))

    assert as_json('show', name)['headers'] == []
    assert as_json('show', odd)['headers'] == [['begins', ''], ['with', 'no field'], ['last line', '']]
    only = queue.put(Envelope('', ('ada@x.example',), b'Subject: only\r\n'))
    assert as_json('show', only)['headers'] == [['Subject', 'only']]
    assert mq_queue('show', name)[1].endswith('Size         16 octets\n\nJust a body.\n')


def test_a_damaged_file_is_shown_with_what_is_wrong(mq_queue, put):
    status, out, _ = mq_queue('show', put('corrupt'))

    assert status == 0
    assert out.splitlines() == [
        'ID           damaged',
        'State        corrupt',
        'Problem      The line "X-Queue-Meta-End: end" is missing: the file is cut off; this is not a queue file.',
        'Size         16 octets',
    ]
    assert mq_queue('show', 'damaged', '--raw') == (0, 'not a queue file', '')


def test_raw_is_the_message_byte_for_byte(start, queue):
    body = content() + b'\x00\xff\x1b[2J\r\n'
    name = queue.put(Envelope('', ('ada@x.example',), body))

    out, err = start('show', '--raw', name).communicate(timeout=60)

    assert (out, err) == (body, b'')


# --- stats ------------------------------------------------------------------


def test_stats_count_by_state_domain_and_age(mq_queue, put):
    for state in STATES:
        put(state)
    put('waiting', 'a@y.example', 'b@y.example', 'c@z.example')

    status, out, err = mq_queue('stats')

    assert (status, err) == (0, '')
    rows = [re.split('  +', line) for line in out.splitlines()]
    titles = ['T', '5', '10', '20', '40', '80', '160', '320', '640', '1280', '1280+', 'OLDEST', 'SIZE']
    assert rows[0] == ['STATE', *titles]
    assert [row[:2] for row in rows[1:3]] == [['TOTAL', '7'], ['waiting', '2']]
    assert [row[:2] for row in rows[3:8]] == [[state, '1'] for state in STATES[1:]]
    assert rows[2] == ['waiting', '2', *'00000', '2', *'0000', '1h', str(2 * len(content()))]
    assert rows[9] == ['By domain of the recipients, what is waiting, in progress or held:']
    assert rows[11] == ['DOMAIN', *titles]
    assert [row[:2] for row in rows[12:]] == [
        ['TOTAL', '4'],
        ['x.example', '3'],
        ['y.example', '1'],
        ['z.example', '1'],
    ]


def test_stats_show_the_largest_domains_of_the_states_one_asks_for(mq_queue, put):
    put()
    for domain in ('b.example', 'a.example', 'a.example'):
        put('dead', f'x@{domain}')

    out = mq_queue('stats', '--state', 'dead', '--state', 'dead', '--top', '1')[1]

    assert 'what is dead:\n' in out
    assert [line.split()[:2] for line in out.splitlines()[-3:]] == [['TOTAL', '3'], ['a.example', '2'], ['...', 'and']]
    assert out.endswith('... and 1 domain more\n')


def test_stats_in_json_have_every_number(as_json, put):
    put()
    put('dead')

    stats = as_json('stats', '--top', '0')

    assert stats['age_limits_minutes'] == [5, 10, 20, 40, 80, 160, 320, 640, 1280]
    assert [state['state'] for state in stats['states']] == list(STATES)
    (domain,) = stats['domains']
    assert ISO.fullmatch(domain.pop('oldest'))
    assert domain == {
        'domain': 'x.example',
        'messages': 1,
        'size': len(content()),
        'by_age': [0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
    }


# --- doing something --------------------------------------------------------


@pytest.fixture
def states(queue):
    """The state of every message, by its id."""
    return lambda: {entry.id: entry.state for entry in queue.admin.entries(STATES)}


def test_messages_can_be_held_and_let_go(mq_queue, put, states):
    ids = [put(), put()]

    assert mq_queue('hold', *ids) == (0, f'{ids[0]}: held\n{ids[1]}: held\n', '')
    assert set(states().values()) == {'held'}
    assert mq_queue('unhold', ids[1]) == (0, f'{ids[1]}: waits again\n', '')
    assert states() == {ids[0]: 'held', ids[1]: 'waiting'}


def test_a_message_in_doubt_can_be_released(mq_queue, put, states):
    name = put('in doubt')

    assert mq_queue('release', name) == (0, f'{name}: waits, due now\n', '')
    assert states() == {name: 'waiting'}


def test_a_dead_letter_can_be_retried_and_is_delivered_by_the_next_run(mq_queue, put, states, ini):
    name = put('dead')

    assert mq_queue('retry', name) == (0, f'{name}: waits, due now\n', '')
    assert states() == {name: 'waiting'}
    with ScriptedSMTPServer() as server:
        path = ini(smtp_port=server.port, plugins='none')
        run = [sys.executable, '-m', 'pyramid_mailqueue.cli.run', str(path)]
        done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0
        assert [message.content for message in server.messages] == [content()]
    assert states() == {}


@pytest.mark.parametrize('command', ['list', 'stats', 'check'])
def test_without_stdout_the_commands_end_as_always(put, ini, command):
    put('waiting')
    run = f'exec {sys.executable} -m pyramid_mailqueue.cli.queue {ini()} {command} >&-'

    done = subprocess.run(['sh', '-c', run], stderr=subprocess.PIPE, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, '')


def test_a_new_id_is_told(mq_queue, put, queue, states):
    name = put('dead')
    long = f'{name}{"x" * 150}'
    Path(queue.place('dead', name)).rename(queue.place('dead', long))

    status, out, _ = mq_queue('retry', long)

    (now,) = states()
    assert (status, out) == (0, f'{long} is now {now}: waits, due now\n')


def test_all_dead_letters_can_be_retried_at_once(mq_queue, as_json, put, states):
    dead = [put('dead') for _ in range(3)]
    later = put(due=time.time() + HOUR)
    held = put('held')

    assert mq_queue('retry', '--dead') == (0, '3 messages due now\n', '')
    assert states() == {**dict.fromkeys([*dead, later], 'waiting'), held: 'held'}
    assert as_json('retry', '--dead') == []
    assert sum(message['due'] > message['queued_at'] for message in as_json('list', '--state', 'waiting')) >= 1


def test_everything_can_be_retried_at_once(as_json, mq_queue, put, states):
    ids = [put('dead'), put(due=time.time() + HOUR)]
    others = {put(state): state for state in ('held', 'in doubt', 'in progress', 'corrupt')}

    retried = as_json('retry', '--all')

    assert [message['id'] for message in retried] == ids
    assert all(message['due'] <= time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()) for message in retried)
    assert states() == {**dict.fromkeys(ids, 'waiting'), **others}
    assert mq_queue('retry', '--all') == (0, '2 messages due now\n', '')


def test_of_all_dead_letters_what_cannot_be_retried_is_told(mq_queue, put, queue, monkeypatch):
    gone, busy, fine = (put('dead') for _ in range(3))
    real = MaildirAdmin.retry

    def retry(admin, name):
        if name == gone:
            Path(queue.place('dead', gone)).unlink()
        return real(admin, name)

    monkeypatch.setattr(MaildirAdmin, 'retry', retry)
    with contextlib.closing(queue.take('dead', busy)):
        status, out, err = mq_queue('retry', '--dead')

    assert (status, out) == (1, '1 message due now\n')
    assert err == f'mq-queue: {busy} cannot be retried: it is in use right now. Try again in a moment.\n'
    assert queue.admin.find(fine).state == 'waiting'


@pytest.mark.parametrize(
    'arguments',
    [
        ['retry'],
        ['delete'],
        ['delete', '--yes'],
        ['retry', 'x', '--all'],
        ['delete', 'x', '--dead'],
        ['hold', 'x', '--recipient', 'a@x.example'],
        ['retry', '--all', '--dead'],
        ['retry', '--state', 'held'],
        ['release', '--state', 'dead'],
        ['delete', '--recipient', 'example.org'],
        ['delete', '--recipient', ''],
        ['delete', '--recipient', '@'],
        ['delete', '--message-id', ' '],
    ],
)
def test_what_is_meant_must_be_said_and_only_once(mq_queue, put, states, arguments):
    put('dead')
    before = states()

    status, out, err = mq_queue(*arguments)

    assert (status, out) == (2, '')
    assert err.startswith('usage: mq-queue ')
    assert states() == before


# --- many at once -----------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'meant'),
    [
        (['--dead'], [0, 1, 2]),
        (['--state', 'dead', '--state', 'held'], [0, 1, 2, 5]),
        (['--recipient', 'ada@x.example'], [0, 3, 4]),
        (['--recipient', 'ADA@X.example', '--dead'], [0]),
        (['--recipient', '<ada@x.example>', '--dead'], [0]),
        (['--recipient', '@x.example', '--dead'], [0, 1]),
        (['--sender', '<>'], [3]),
        (['--sender', '@site.example', '--dead'], [0, 1, 2]),
        (['--dead', '--older-than', '1h'], [0, 1, 2]),
        (['--dead', '--older-than', '30d'], []),
        (['--dead', '--newer-than', '1d', '--recipient', '@x.example.org'], [2]),
    ],
)
def test_many_messages_can_be_deleted_by_what_they_are(mq_queue, as_json, put, states, options, meant):
    ids = [
        put('dead', 'ada@x.example'),
        put('dead', 'bob@x.example', 'mada@x.example'),
        put('dead', 'ada@x.example.org'),
        put('waiting', 'ada@x.example', sender=''),
        put('waiting', 'ada@x.example'),
        put('held', 'bob@y.example'),
    ]
    before = states()
    expected = [ids[number] for number in meant]

    assert [message['id'] for message in as_json('delete', *options, '--dry-run')] == expected
    assert states() == before
    count = f'{len(meant)} message{"" if len(meant) == 1 else "s"}'
    assert mq_queue('delete', *options, '--yes') == (0, f'{count} deleted\n', '')
    assert list(states()) == [name for name in ids if name not in expected]


def test_many_messages_in_a_database_can_be_changed_by_what_they_are(mq_queue, ini, tmp_path):
    url = f'sqlite:///{tmp_path}/app.sqlite'
    path = ini(queue='sql', sql_url=url)
    queue = SQLQueue(url)
    queue.create_tables()
    with contextlib.closing(queue):
        for recipient in ('ada@x.example', 'bob@x.example', 'eve@y.example'):
            claim = queue.put_claimed(Envelope('', (recipient,), content()))
            claim.settle(Settlement(burials=(Burial((recipient,), '550 no'),)))
        queue.put(Envelope('', ('ada@x.example',), content()))

    def run(*arguments):
        return mq_queue(*arguments, path=path)

    assert run('retry', '--dead', '--recipient', '@y.example') == (0, '1 message due now\n', '')
    assert run('delete', '--dead', '--recipient', 'ada@x.example', '--yes') == (0, '1 message deleted\n', '')
    left = json.loads(run('list', '--json')[1])
    assert [(message['recipients'], message['state']) for message in left] == [
        (['bob@x.example'], 'dead'),
        (['ada@x.example'], 'waiting'),
        (['eve@y.example'], 'waiting'),
    ]


def test_a_message_is_found_by_its_message_id(as_json, mq_queue, put, states):
    name = put()

    for written in ('1@site.example', '<1@site.example>'):
        assert [message['id'] for message in as_json('list', '--message-id', written)] == [name]
    assert as_json('list', '--message-id', '<1@site.exam>') == []
    assert mq_queue('hold', '--message-id', '1@site.example') == (0, '1 message held\n', '')
    assert mq_queue('unhold', '--sender', 'shop@site.example') == (0, '1 message waiting again\n', '')
    assert states() == {name: 'waiting'}


def test_where_nobody_can_be_asked_many_are_deleted_only_if_that_was_said(mq_queue, put, states):
    name = put('dead')

    assert mq_queue('delete', '--dead') == (1, '', 'mq-queue: nothing is deleted: say --yes to delete 1 message\n')
    assert states() == {name: 'dead'}
    assert mq_queue('retry', '--dead')[0] == 0


def test_a_dry_run_shows_what_is_meant_and_changes_nothing(mq_queue, put, states):
    name, other = put('dead'), put()

    status, out, _ = mq_queue('retry', '--dead', '--dry-run')
    assert (status, name in out, other in out) == (0, True, False)
    status, out, _ = mq_queue('delete', other, '--dry-run')
    assert (status, name in out, other in out) == (0, False, True)
    assert states() == {name: 'dead', other: 'waiting'}


def test_one_message_that_fails_does_not_end_the_rest(mq_queue, put, states, monkeypatch):
    bad, *_ = (put('dead') for _ in range(3))
    real = MaildirAdmin.delete

    def delete(admin, name):
        if name == bad:
            raise QueueError(f'{name} cannot be deleted: Input/output error')
        return real(admin, name)

    monkeypatch.setattr(MaildirAdmin, 'delete', delete)
    result = mq_queue('delete', '--dead', '--yes')

    assert result == (1, '2 messages deleted\n', f'mq-queue: {bad} cannot be deleted: Input/output error\n')
    assert states() == {bad: 'dead'}


def test_a_queue_that_fails_for_every_message_ends_it(mq_queue, put, states, monkeypatch):
    names = [put('dead') for _ in range(5)]

    def fail(admin, name):
        raise QueueError(f'{name}: the disk is gone')

    monkeypatch.setattr(MaildirAdmin, 'retry', fail)
    status, out, err = mq_queue('retry', '--dead', '--json')

    assert (status, json.loads(out)) == (75, [])
    assert err.splitlines() == [f'mq-queue: {name}: the disk is gone' for name in names[:3]]


def test_what_was_changed_since_it_was_chosen_is_left_alone(mq_queue, put, states, monkeypatch):
    names = [put('dead') for _ in range(2)]
    real = MaildirAdmin.delete

    def delete(admin, name):
        # Meanwhile somebody retries the next one.
        if name == names[0]:
            admin.retry(names[1])
        return real(admin, name)

    monkeypatch.setattr(MaildirAdmin, 'delete', delete)

    assert mq_queue('delete', '--dead', '--yes') == (0, '1 message deleted\n', '')
    assert states() == {names[1]: 'waiting'}


def test_what_waits_can_be_made_due(mq_queue, as_json, put, queue):
    ids = [put(due=time.time() + HOUR) for _ in range(2)]

    assert mq_queue('flush') == (0, '2 messages made due now\n', '')
    assert sorted(claim.id for claim in list(queue.claim_due(time.time()))) == sorted(ids)
    assert as_json('flush') == {'flushed': 0}


def test_what_was_done_is_told_in_json(as_json, put):
    name = put()

    (held,) = as_json('hold', name)

    assert list(held) == SCHEMA
    assert (held['id'], held['state']) == (name, 'held')
    assert [message['state'] for message in as_json('unhold', name)] == ['waiting']
    assert [message['id'] for message in as_json('delete', name)] == [name]
    assert as_json('list') == []


def test_one_message_with_which_it_cannot_be_done_does_not_stop_the_others(mq_queue, put, states):
    first, held, last = put(), put('held'), put()

    status, out, err = mq_queue('hold', first, 'nobody', held, last)

    assert (status, out) == (1, f'{first}: held\n{last}: held\n')
    assert err.splitlines() == [
        "mq-queue: There is no message in the queue whose id begins with 'nobody'.",
        f'mq-queue: {held} cannot be held: it is held; unhold it first.',
    ]
    assert set(states().values()) == {'held'}


@pytest.mark.parametrize('arguments', [['hold'], ['retry'], ['delete', '--yes']])
def test_what_is_being_delivered_is_left_alone(mq_queue, put, arguments, states):
    name = put('in progress')

    status, out, err = mq_queue(*arguments, name)

    assert (status, out) == (1, '')
    assert 'it is being delivered right now. Try again in a moment.' in err
    assert states() == {name: 'in progress'}


@pytest.mark.parametrize('method', ['show', 'hold', 'unhold', 'retry', 'release', 'delete'])
@pytest.mark.parametrize('named', ['nobody', '', '../app.ini', '/etc/passwd', '.'])
def test_what_is_no_message_is_not_found(mq_queue, put, states, method, named, tmp_path):
    put()

    status, out, err = mq_queue(method, named)

    assert (status, out) == (1, '')
    assert err == f'mq-queue: There is no message in the queue whose id begins with {named!a}.\n'
    assert set(states().values()) == {'waiting'}
    assert (tmp_path / 'app.ini').exists()


def test_an_ambiguous_id_names_those_that_it_may_mean(mq_queue, put):
    ids = [put(), put()]
    common = ids[0][:6]

    status, _, err = mq_queue('delete', common)

    assert status == 1
    assert err == f'mq-queue: {common} is the beginning of 2 ids; give more of it: {ids[0]}, {ids[1]}\n'


def test_what_was_done_before_the_queue_failed_is_told(mq_queue, put, monkeypatch):
    first, second = put(), put()
    real = MaildirAdmin.hold

    def hold(admin, name):
        if name == second:
            raise QueueError(f'{second} cannot be held: No space left on device')
        return real(admin, name)

    monkeypatch.setattr(MaildirAdmin, 'hold', hold)

    status, out, err = mq_queue('hold', first, second, '--json')

    assert (status, err) == (75, f'mq-queue: {second} cannot be held: No space left on device\n')
    assert [message['id'] for message in json.loads(out)] == [first]


def test_changes_are_in_the_log_of_the_queue(mq_queue, put, ini, tmp_path):
    name = put()
    path = ini(queue_log='%(here)s/queue.log')

    mq_queue('list', path=path)
    assert not (tmp_path / 'queue.log').exists()
    mq_queue('hold', name, path=path)
    mq_queue('delete', name, path=path)
    logger = logging.getLogger('mailqueue.queue_log')
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True

    told = [line.partition(' INFO ')[2] for line in (tmp_path / 'queue.log').read_text().splitlines()]
    assert told[0] == f'status=held id={name} state=held msgid=<1@site.example>'
    assert told[-1] == f'status=deleted id={name} state=held msgid=<1@site.example>'


# --- delete -----------------------------------------------------------------


def test_without_a_terminal_nobody_can_be_asked(start, put, states):
    name, other = put(), put()

    out, err = start('delete', name).communicate(timeout=60)

    assert (out, err) == (f'{name}: deleted\n'.encode(), b'')
    assert states() == {other: 'waiting'}


def test_a_closed_stdin_is_no_terminal(start, put, states):
    process = start('delete', put(), stdin=None, preexec_fn=lambda: os.close(0))
    _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (0, b'')
    assert states() == {}


class Terminal:
    """A terminal that somebody sits at, and the command that was typed there."""

    def __init__(self, start, *arguments, columns=200, **options):
        self.fd, theirs = pty.openpty()
        env = {**os.environ, 'COLUMNS': str(columns), 'LINES': '50', 'TERM': 'xterm-256color'}
        for name in ('NO_COLOR', 'FORCE_COLOR'):
            env.pop(name, None)
        streams = {'stdin': theirs, 'stdout': theirs, 'stderr': theirs, **options}
        self.process = start(*arguments, env=env, start_new_session=True, **streams)
        os.close(theirs)
        self.seen = ''

    def read_until(self, text):
        """Return what was shown, as soon as *text* is in it; *text* None is the end."""
        end = time.monotonic() + 60
        while text is None or text not in self.seen:
            assert time.monotonic() < end, self.seen
            if not select.select([self.fd], [], [], 1)[0]:
                continue
            try:
                data = os.read(self.fd, 4096)
            except OSError:
                # Linux says so when nobody has the other end open.
                data = b''
            if not data:
                assert text is None, self.seen
                break
            self.seen += data.decode()
        return self.seen

    def type(self, text):
        os.write(self.fd, text.encode())

    def end(self):
        """Return the exit status and all that was shown."""
        seen = self.read_until(None)
        os.close(self.fd)
        return self.process.wait(60), seen


@pytest.mark.parametrize('answer', ['y\n', 'YES\n'])
def test_on_a_terminal_one_is_asked_before_anything_is_deleted(start, put, states, answer):
    name, other = put(subject=HOSTILE), put()
    terminal = Terminal(start, 'delete', name, 'nobody', name)

    asked = terminal.read_until('[y/N] ')
    assert states() == {name: 'waiting', other: 'waiting'}
    terminal.type(answer)
    status, seen = terminal.end()

    assert 'Delete 1 message for good?' in asked
    assert f'{name}  waiting  to ada@x.example  \\x1b]0;owned\\x07\\r\\n [bold red]not markup[/] \\u202e' in asked
    assert "whose id begins with 'nobody'" in asked
    assert status == 1
    assert seen.endswith(f'{name}: deleted\r\n')
    assert states() == {other: 'waiting'}


@pytest.mark.parametrize('answer', ['y\n', 'n\n'])
def test_on_a_terminal_one_is_told_how_many_are_meant(start, put, states, answer):
    for _ in range(12):
        put('dead')
    put()
    terminal = Terminal(start, 'delete', '--dead')

    asked = terminal.read_until('[y/N] ')
    terminal.type(answer)
    status, seen = terminal.end()

    assert asked.count('to ada@x.example') == 10
    assert '... and 2 messages more\r\nDelete 12 messages for good? [y/N] ' in asked
    assert (status, len(states())) == ((0, 1) if answer == 'y\n' else (1, 13))
    assert seen.endswith('12 messages deleted\r\n' if status == 0 else 'mq-queue: nothing is deleted\r\n')


@pytest.mark.parametrize('answer', ['n\n', '\n', 'yesterday\n', '\x04'])
def test_any_other_answer_deletes_nothing(start, put, states, answer):
    name = put()
    terminal = Terminal(start, 'delete', name)

    terminal.read_until('[y/N] ')
    terminal.type(answer)
    status, seen = terminal.end()

    assert status == 1
    assert 'mq-queue: nothing is deleted\r\n' in seen
    assert states() == {name: 'waiting'}


def test_the_question_does_not_get_into_the_output(start, put, states):
    name = put()
    terminal = Terminal(start, 'delete', '--json', name, stdout=subprocess.PIPE)

    terminal.read_until('[y/N] ')
    terminal.type('n\n')
    out, _ = terminal.process.communicate(timeout=60)
    status, _ = terminal.end()

    assert (status, json.loads(out)) == (1, [])


def test_nothing_is_asked_if_there_is_nothing_to_delete(start):
    status, seen = Terminal(start, 'delete', 'nobody').end()

    assert status == 1
    assert '[y/N]' not in seen


def test_nobody_is_asked_who_has_said_yes(start, put, states):
    name = put()

    assert Terminal(start, 'delete', '--yes', name).end() == (0, f'{name}: deleted\r\n')
    assert states() == {}


def test_an_interrupted_question_deletes_nothing(start, put, states):
    name = put()
    terminal = Terminal(start, 'delete', name)

    terminal.read_until('[y/N] ')
    terminal.process.send_signal(signal.SIGINT)
    status, seen = terminal.end()

    assert status == 130
    assert 'Traceback' not in seen
    assert states() == {name: 'waiting'}


# --- on a terminal ----------------------------------------------------------

CONTROL = re.compile(r'\x1b\[[0-9;]*m')


def test_a_table_on_a_terminal_has_colours_and_whole_ids(start, put):
    ids = [put(state) for state in STATES]

    status, seen = Terminal(start, 'list').end()

    assert status == 0
    assert '\x1b[31mdead' in seen
    assert '\x1b[33mheld' in seen
    assert '\x1b[1mLAST REPLY' in seen
    assert all(name in seen for name in ids)


@pytest.mark.parametrize(
    ('columns', 'titles'),
    [
        (80, ['ID', 'STATE', 'AGE', 'DUE', 'RECIPIENTS']),
        (130, ['ID', 'STATE', 'AGE', 'DUE', 'RECIPIENTS', 'LAST', 'REPLY']),
    ],
)
def test_a_narrow_terminal_shows_what_matters(start, put, columns, titles):
    name = put()

    lines = CONTROL.sub('', Terminal(start, 'list', columns=columns).end()[1]).splitlines()

    assert lines[0].split() == titles
    assert max(map(len, lines)) <= columns
    left_out = [name for name in ('TRIES', 'SIZE', 'SENDER', 'SUBJECT', 'LAST REPLY') if name not in ' '.join(titles)]
    assert f'not shown in {columns} columns: {", ".join(left_out)}' in lines
    assert lines[1].startswith(name)


def test_a_list_on_a_terminal_ends_with_how_many_there_are(start, put):
    for number in range(3):
        put('waiting', f'user{number}@x.example')

    def last_line(*options):
        return Terminal(start, 'list', *options).end()[1].splitlines()[-1]

    assert last_line() == '3 messages'
    assert last_line('--recipient', 'user1') == '1 of 3 messages'
    assert last_line('--recipient', 'nobody') == '0 of 3 messages'


@pytest.mark.parametrize('arguments', [['list'], ['show', ''], ['show', '--raw', ''], ['stats'], ['hold', '']])
def test_nothing_that_a_sender_writes_can_control_a_terminal(start, put, queue, arguments):
    name = put(subject=HOSTILE)
    path = Path(queue.place('new', name))
    path.write_bytes(path.read_bytes() + b'\x1b]0;owned\x07\x9b31m\xc2\x9b')
    arguments = [argument or name for argument in arguments]

    status, seen = Terminal(start, *arguments).end()

    assert status == 0
    text = CONTROL.sub('', seen).replace('\r\n', '\n')
    assert [c for c in text if not c.isprintable() and c != '\n'] == []
    if arguments[0] == 'list':
        assert '[bold red]not markup[/]' in ' '.join(text.split())


def test_json_on_a_terminal_is_json(start, put):
    put(subject=HOSTILE)

    status, seen = Terminal(start, 'list', '--json').end()

    assert status == 0
    assert seen.isascii()
    assert '\x1b' not in seen
    assert json.loads(seen)[0]['subject'].startswith('\x1b]0;owned\x07')


def test_without_rich_a_terminal_shows_plain_text(start, put, tmp_path):
    put()
    # An import that fails: what is there is not looked for any further.
    (tmp_path / 'without').mkdir()
    (tmp_path / 'without' / 'sitecustomize.py').write_text('import sys\nsys.modules["rich"] = None\n')
    os.environ['PYTHONPATH'] = str(tmp_path / 'without')
    try:
        status, seen = Terminal(start, 'list').end()
    finally:
        del os.environ['PYTHONPATH']

    assert status == 0
    assert '\x1b' not in seen
    assert seen.startswith('ID ')


# --- monitoring -------------------------------------------------------------


def test_a_queue_that_is_as_it_should_be_is_ok(mq_queue, put):
    put()

    status, out, err = mq_queue('check', '--max-age', '3h', '--max-waiting', '1')

    assert (status, err) == (0, '')
    assert out.startswith('MAILQUEUE OK - 1 waiting, oldest 1h | oldest=60')
    assert 's;;10800;0 waiting=1;;1;0 ' in out


@pytest.mark.parametrize('state', ['dead', 'in doubt', 'corrupt'])
def test_what_somebody_has_to_look_at_is_a_warning(mq_queue, put, state):
    put(state)

    status, out, _ = mq_queue('check', '--max-age', '1h', '--max-waiting', '0')

    assert status == 1
    assert out.startswith('MAILQUEUE WARNING - 1 ')


@pytest.mark.parametrize('option', [['--max-age', '1h'], ['--max-waiting', '1']])
def test_an_exceeded_limit_is_critical(mq_queue, put, option):
    put('dead')
    put()
    put()

    status, out, _ = mq_queue('check', *option)

    assert status == 2
    assert out.startswith('MAILQUEUE CRITICAL - ')
    assert '; 1 dead letter | ' in out


def test_what_is_held_makes_no_alarm(mq_queue, put):
    put('held')

    assert mq_queue('check', '--max-age', '1m', '--max-waiting', '0')[0] == 0


def test_an_old_message_that_is_stuck_in_delivery_makes_an_alarm(mq_queue, put):
    put('in progress')

    assert mq_queue('check', '--max-age', '1h')[0] == 2


def test_a_damaged_file_that_nobody_has_tried_to_deliver_is_counted_as_it_is_listed(mq_queue, as_json, put, queue):
    put()
    Path(queue.place('new', 'damaged')).write_bytes(b'not a queue file')

    assert mq_queue('check')[0] == 1
    assert mq_queue('check')[1].startswith('MAILQUEUE WARNING - 1 corrupt file | ')
    assert 'mailqueue_messages{state="corrupt"} 1\n' in mq_queue('metrics')[1]
    assert [message['id'] for message in as_json('list', '--state', 'corrupt')] == ['damaged']


def test_the_check_in_json_has_the_oldest_message(mq_queue, put):
    name = put()
    put('dead')

    status, out, _ = mq_queue('check', '--max-age', '1h', '--json')

    told = json.loads(out)
    assert (status, told['status']) == (2, 'CRITICAL')
    assert told['problems'] == ['the oldest is 1h old (limit: 1h)', '1 dead letter']
    assert told['counts'] == {**dict.fromkeys(STATES, 0), 'waiting': 1, 'dead': 1}
    assert (told['oldest']['id'], list(told['oldest'])) == (name, SCHEMA)


def test_an_empty_queue_has_no_oldest_message(as_json):
    assert as_json('check')['oldest'] is None


@pytest.mark.parametrize('option', [[], ['--json']])
def test_a_queue_that_cannot_be_looked_at_is_unknown(mq_queue, ini, option):
    status, out, err = mq_queue('check', *option, path=ini(smtp_prt=1, smtp_timeout='soon'))

    assert (status, err) == (3, '')
    problem = json.loads(out)['problems'][0] if option else out.removeprefix('MAILQUEUE UNKNOWN - ').rstrip()
    assert 'app.ini: mailqueue.smtp_prt' in problem
    assert 'mailqueue.smtp_timeout' in problem
    assert '\n' not in problem


def test_a_defect_is_unknown_too_and_shows_where_it_is(mq_queue, monkeypatch):
    monkeypatch.setattr(MaildirQueue, 'counts', lambda queue: 1 / 0)

    status, out, err = mq_queue('check')

    assert (status, out) == (3, 'MAILQUEUE UNKNOWN - a defect of pyramid_mailqueue: ZeroDivisionError\n')
    assert err.startswith('Traceback')


def test_an_interrupted_check_is_unknown(mq_queue, monkeypatch):
    def counts(queue):
        raise KeyboardInterrupt

    monkeypatch.setattr(MaildirQueue, 'counts', counts)

    assert mq_queue('check') == (3, 'MAILQUEUE UNKNOWN - interrupted\n', '')


def test_the_metrics_tell_how_many_messages_there_are_and_how_old_they_are(mq_queue, put):
    for state in STATES:
        put(state)
    put()

    status, out, err = mq_queue('metrics')

    assert (status, err) == (0, '')
    samples = dict(line.rsplit(' ', 1) for line in out.splitlines() if not line.startswith('#'))
    assert samples['mailqueue_messages{state="waiting"}'] == '2'
    assert samples['mailqueue_messages{state="in progress"}'] == '1'
    oldest = {name for name in samples if name.startswith('mailqueue_oldest_message_timestamp_seconds')}
    assert len(oldest) == len(STATES) - 1
    assert all(time.time() - 3 * HOUR < float(samples[name]) < time.time() - HOUR for name in oldest)


# --- what goes wrong --------------------------------------------------------


def complaint_of(result, status=78):
    """What was said, by a command that must have ended so."""
    assert result[:2] == (status, '')
    assert 'Traceback' not in result[2]
    assert all(line.startswith('mq-queue: ') for line in result[2].splitlines())
    return result[2]


@pytest.mark.parametrize('arguments', [['list'], ['flush'], ['metrics']])
def test_every_key_that_cannot_be_used_is_named_with_the_file(mq_queue, ini, arguments):
    path = ini(smtp_prt=25, smtp_timeout='soon')

    lines = complaint_of(mq_queue(*arguments, path=path)).splitlines()

    assert len(lines) == 2
    assert all(line.startswith(f'mq-queue: {path}: mailqueue.') for line in lines)


def test_a_missing_ini_file_is_named(mq_queue, tmp_path):
    path = tmp_path / 'nowhere.ini'

    assert complaint_of(mq_queue('list', path=path)) == (
        f'mq-queue: {path}: cannot be read (No such file or directory).\n'
    )


def test_a_queue_directory_that_cannot_be_used_is_named_with_its_key(mq_queue, ini, queue_dir):
    queue_dir.write_text('a file in its place')
    path = ini(has_started=False)

    assert complaint_of(mq_queue('list', path=path)).startswith(
        f'mq-queue: {path}: mailqueue.queue_dir = {queue_dir}: '
    )


def test_an_override_needs_a_key_and_a_value(mq_queue):
    assert complaint_of(mq_queue('--set', 'smtp', 'list')).startswith('mq-queue: --set smtp: ')


def test_a_log_that_cannot_be_written_is_named(mq_queue, ini, put, states):
    name = put()
    path = ini(queue_log='/proc/nowhere/queue.log')

    assert 'queue_log' in complaint_of(mq_queue('hold', name, path=path))
    assert states() == {name: 'waiting'}
    assert mq_queue('list', path=path)[0] == 0


def test_a_queue_that_has_no_admin_is_a_matter_of_configuration(mq_queue, ini, tmp_path, monkeypatch):
    (tmp_path / 'mute_queue.py').write_text('class Queue:\n    def __init__(self, settings): pass\n')
    monkeypatch.syspath_prepend(tmp_path)
    path = ini(queue='mute_queue.Queue')

    assert complaint_of(mq_queue('list', path=path)) == (
        f'mq-queue: {path}: mailqueue.queue = mute_queue.Queue: this queue has nothing for mq-queue to show.\n'
    )


def test_a_folder_that_cannot_be_read_is_status_75(mq_queue, queue, monkeypatch):
    def entries(admin, states):
        raise QueueError(f'The folder {queue.place("new")} cannot be read: Input/output error')

    monkeypatch.setattr(MaildirAdmin, 'entries', entries)

    assert complaint_of(mq_queue('list'), 75) == (
        f'mq-queue: The folder {queue.place("new")} cannot be read: Input/output error\n'
    )


def test_a_defect_is_status_70_and_shows_where_it_is(mq_queue, monkeypatch):
    monkeypatch.setattr(MaildirAdmin, 'entries', lambda admin, states: 1 / 0)

    status, out, err = mq_queue('list')

    assert (status, out) == (70, '')
    assert err.startswith('mq-queue: this is a defect of pyramid_mailqueue; please report it with these lines:\nTrace')


NOBODY = 65534


def test_root_does_not_work_in_the_queue_of_another_user(mq_queue, queue, queue_dir, monkeypatch):
    if os.geteuid() == 0:
        os.chown(queue_dir / 'new', NOBODY, NOBODY)
    monkeypatch.setattr(os, 'geteuid', lambda: 0)

    complaint = complaint_of(mq_queue('list'))

    assert f'mailqueue.queue_dir = {queue_dir} belongs to the user ' in complaint
    assert re.search(r'Run mq-queue as (\S+), for instance with: sudo -u \1 mq-queue \.\.\.\n$', complaint)


@pytest.mark.parametrize(
    'arguments',
    [
        [],
        ['list', '--state', 'lost'],
        ['list', '--older-than', 'soon'],
        ['hold'],
        ['show'],
        ['stats', '--top', 'x'],
        ['nonsense'],
        ['metrics', '--json'],
    ],
)
def test_wrong_usage_is_status_2(mq_queue, arguments):
    status, out, err = mq_queue(*arguments)

    assert (status, out) == (2, '')
    assert err.startswith('usage: mq-queue ')
    assert 'Traceback' not in err


@pytest.mark.parametrize(
    ('arguments', 'problem'),
    [
        (['check', '--max-waiting', '-1'], "argument --max-waiting: '-1' is not a whole number"),
        (['check', '--nonsense'], 'unrecognized arguments: --nonsense'),
        (['check', 'more'], 'unrecognized arguments: more'),
        (['--set', 'nonsense', 'check'], 'nonsense'),
        (['--nonsense', 'check'], 'unrecognized arguments: --nonsense'),
    ],
)
def test_wrong_usage_of_the_check_is_unknown_to_nagios_and_not_critical(mq_queue, arguments, problem):
    status, out, _ = mq_queue(*arguments)

    assert (status, out.count('\n')) == (3, 1)
    assert out.startswith('MAILQUEUE UNKNOWN - ')
    assert problem in out
    status, out, _ = mq_queue(*arguments, '--json')
    assert (status, json.loads(out)['status']) == (3, 'UNKNOWN')


def test_wrong_usage_of_the_check_is_told_whatever_the_terminal_can_show(start):
    process = start('check', '--max-age', 'für immer', env={**os.environ, 'PYTHONIOENCODING': 'ascii'})

    out, err = process.communicate(timeout=60)

    assert (process.returncode, b'Traceback' in err) == (3, False)
    assert out.startswith(b'MAILQUEUE UNKNOWN - argument --max-age: ')


def test_a_check_without_an_ini_file_is_unknown_too(capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(['check'])

    assert exit_.value.code == 3
    assert capsys.readouterr().out.startswith('MAILQUEUE UNKNOWN - ')


def test_a_state_that_there_is_not_is_told_with_those_that_there_are(mq_queue):
    assert (
        "'lost' is no state; the states are waiting, in progress, held, dead" in mq_queue('list', '--state', 'lost')[2]
    )


COMMANDS = ('list', 'show', 'stats', 'retry', 'hold', 'unhold', 'release', 'delete', 'flush', 'check', 'metrics')


def test_the_help_names_every_command_state_and_exit_status(mq_queue):
    status, out, err = mq_queue('--help')

    assert (status, err) == (0, '')
    assert all(f'\n    {name} ' in out for name in COMMANDS)
    assert all(f'\n  {state} ' in out for state in STATES)
    assert all(f'\n  {number} ' in out for number in (0, 1, 2, 70, 74, 75, 78))


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_explains_itself(mq_queue, name):
    status, out, err = mq_queue(name, '--help')

    assert (status, err) == (0, '')
    assert f'usage: mq-queue INI {name} ' in out
    description = out.split('\n\n')[1]
    assert description[0].isupper()
    assert description.endswith('.')


# --- where the queue is -----------------------------------------------------


def test_a_queue_directory_on_the_command_line_goes_before_the_file(mq_queue, put, ini, queue_dir):
    name = put()
    path = ini(queue_dir='/nowhere')

    assert mq_queue('--queue-dir', str(queue_dir), 'hold', name, path=path) == (0, f'{name}: held\n', '')


def test_a_file_of_mailqueue_runner_works_with_a_queue_directory(mq_queue, put, queue_dir, tmp_path):
    name = put()
    path = tmp_path / 'runner.ini'
    path.write_text('[mqrunner]\nsmtp_hostname = 127.0.0.1\n')

    assert mq_queue('--queue-dir', str(queue_dir), 'hold', name, path=path)[0] == 0
    path.write_text('[mqrunner]\nsmtp_hostname = 127.0.0.1\nqueue_dir = %(here)s/queue\n')
    assert mq_queue('unhold', name, path=path)[0] == 0


def test_another_app_of_the_file_can_be_named(mq_queue, put, tmp_path):
    name = put()
    path = tmp_path / 'two.ini'
    path.write_text(
        textwrap.dedent("""
            [app:main]
            use = egg:not_installed
            [app:shop]
            use = egg:not_installed
            mailqueue.queue_dir = %(directory)s
            mailqueue.smtp_hostname = 127.0.0.1
            """)
    )
    options = ['--name', 'shop', '--set', f'directory={tmp_path}/queue']

    assert mq_queue(*options, 'hold', name, path=path)[0] == 0
    assert mq_queue(*options[2:], 'unhold', name, path=f'{path}#shop')[0] == 0


# --- who reads what is printed ----------------------------------------------


def test_a_reader_that_has_seen_enough_is_no_error(start, put):
    for _ in range(50):
        put(subject='x' * 900)
    reading, writing = os.pipe()
    process = start('list', stdout=writing)
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)

    assert process.communicate(timeout=60)[1] == b''
    assert process.returncode == 0


def test_a_full_disk_behind_the_output_is_told(start, put, states):
    name = put()
    with Path('/dev/full').open('w') as full:
        process = start('hold', name, stdout=full)
        _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (74, b'mq-queue: the output cannot be written: No space left on device\n')
    assert states() == {name: 'held'}


def test_whatever_the_terminal_can_show_everything_can_be_printed(start, put):
    put(subject='Grüße')
    env = {**os.environ, 'PYTHONIOENCODING': 'ascii'}

    out, err = start('list', env=env).communicate(timeout=60)

    assert err == b''
    assert b'Gr\\xfc\\xdfe' in out


def test_a_stream_that_is_no_text_file_is_left_as_it_is(ini, put, monkeypatch):
    class Stream(io.StringIO):
        pass

    put()
    monkeypatch.setattr(sys, 'stdout', Stream())

    with pytest.raises(SystemExit):
        command.main([str(ini()), 'list'])

    assert 'Your order' in sys.stdout.getvalue()


# --- what it costs ----------------------------------------------------------


def test_a_pipe_does_not_import_what_only_a_terminal_needs(ini):
    imported = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'pyramid_mailqueue.cli.queue', ini(), 'list'],
        check=True,
        capture_output=True,
        text=True,
    ).stderr

    packages = {line.rpartition('|')[2].strip().partition('.')[0] for line in imported.splitlines()}
    assert 'pyramid_mailqueue' in packages
    assert packages & {'rich', 'pyramid', 'sqlalchemy', 'transaction'} == set()


# --- the docs ---------------------------------------------------------------

OPERATIONS = Path(__file__).parents[2] / 'docs' / 'operations.rst'


def test_every_command_state_and_key_is_documented():
    text = OPERATIONS.read_text('utf-8')

    missing = [word for word in (*STATES, *SCHEMA, 'headers') if f'``{word}``' not in text]
    missing += [name for name in COMMANDS if not re.search(rf'``{name}( ID|``)', text)]

    assert missing == []
