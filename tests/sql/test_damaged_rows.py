"""Rows of which no message can be made: they are put aside with a reason, and their neighbours go their way."""

from __future__ import annotations

import time

import pytest

from pyramid_mailqueue.cli import queue as mq_queue_command
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.message.envelope import Envelope
from tests.parts.databases import create_queue_tables

ON_POSTGRESQL = [
    "due = '-Infinity', recipients = 'null'",
    "queued_at = 'NaN'",
    "queued_at = 'Infinity'",
]
ON_SQLITE = [
    "recipients = 'not JSON'",
    "recipients = ''",
    "recipients = CAST(x'ff' AS TEXT)",
    "queued_at = 'yesterday'",
    'queued_at = 9e999',
    "attempts = 'several'",
    "sender = x'ff'",
]
ON_BOTH = [
    "recipients = 'null'",
    "recipients = '5'",
    "recipients = '{}'",
    "recipients = '[]'",
    "recipients = '[1]'",
    """recipients = '"ada@x.example"'""",
    "recipients = '" + 2000 * '[' + 2000 * ']' + "'",
    "sender = 'no address'",
]
DAMAGES = [
    *(('sqlite', damage) for damage in ON_BOTH + ON_SQLITE),
    *(('postgresql+psycopg', damage) for damage in ON_BOTH + ON_POSTGRESQL),
    ('postgresql+psycopg2', ON_BOTH[0]),
    ('postgresql+psycopg2', ON_BOTH[4]),
]

# What is not known of these does not keep anybody from delivering them.
HARMLESS = [
    ('sqlite', "content = 'Subject: 1' || char(13, 10, 13, 10) || 'Hello.'"),
    ('sqlite', "subject = x'ff'"),
    ('sqlite', "last_reply = CAST(x'ff' AS TEXT)"),
    ('sqlite', "last_attempt = 'never'"),
    ('sqlite', "id = '!'"),
    ('postgresql+psycopg', "last_attempt = 'Infinity'"),
    ('postgresql+psycopg', "id = '!'"),
]

# A time that never comes.
NEVER_DUE = [
    ('sqlite', "due = 'soon'"),
    ('sqlite', 'due = 9e999'),
    ('postgresql+psycopg', "due = 'NaN'"),
    ('postgresql+psycopg', "due = 'Infinity'"),
]


# What no message is in.
NO_STATE = [
    ('sqlite', "state = 'Waiting'"),
    ('sqlite', "state = x'ff'"),
    ('postgresql+psycopg', "state = 'Waiting'"),
    ('postgresql+psycopg', "state = ''"),
]

# A lease that never ends; the process of that claim may be any.
NO_LEASE = [
    *(('sqlite', f'lease = {lease}') for lease in ('9e999', "'soon'", 'NULL')),
    *(('postgresql+psycopg', f'lease = {lease}') for lease in ("'NaN'", "'Infinity'", 'NULL')),
]


@pytest.fixture
def url(make_database, kind):
    """A database with the tables of the queue; its kind is a parameter of each test."""
    url = make_database(kind)
    create_queue_tables(url)
    return url


@pytest.fixture
def queue(url, make_queue):
    return make_queue(url)


@pytest.fixture
def names(queue, url, sql, damage):
    """Three messages, of which the second is damaged then."""

    def message(number):
        return Envelope('', ('ada@x.example',), b'Subject: %d\r\n\r\nHello.\r\n' % number)

    names = [queue.put(message(number)) for number in range(3)]
    sql(url, f'UPDATE mailqueue_message SET {damage}'.replace(':', r'\:') + ' WHERE id = :id', id=names[1])
    return names


class Outbox:
    """A transport that takes everything."""

    def __init__(self):
        self.sent = []

    def send(self, sender, recipients, content):
        self.sent.append(content.partition(b'\r\n')[0][-1:].decode())
        return True

    def close(self):
        pass


@pytest.fixture
def run(queue):
    """Deliver what is due; return what was sent."""

    def run():
        outbox = Outbox()
        Runner(queue, MessageHandler([outbox])).run()
        return sorted(outbox.sent)

    return run


@pytest.fixture
def look(url, tmp_path, capfd):
    """Call each command that looks; return what they printed."""

    def look(*commands):
        ini = tmp_path / 'app.ini'
        quoted = url.replace('%', '%%')
        ini.write_text(
            f'[app:main]\nmailqueue.smtp_hostname = localhost\nmailqueue.queue = sql\nsqlalchemy.url = {quoted}\n'
        )
        printed = []
        for command in commands:
            with pytest.raises(SystemExit) as info:
                mq_queue_command.main([str(ini), *command])
            out, err = capfd.readouterr()
            assert (info.value.code in (0, 1), err) == (True, ''), err
            printed.append(out)
        return printed

    return look


LOOKS = (['list'], ['list', '--json'], ['stats'], ['check'], ['metrics'])


@pytest.mark.parametrize(('kind', 'damage'), DAMAGES)
def test_a_damaged_row_is_put_aside_and_its_neighbours_are_delivered_by_the_same_run(queue, names, run, look, caplog):
    for shown in look(*LOOKS, ['show', names[1]]):
        assert 'Traceback' not in shown

    assert run() == ['0', '2']

    assert {state: count for state, count in queue.counts().items() if count} == {'corrupt': 1}
    (entry,) = queue.admin.entries(['corrupt'])
    assert entry.id == names[1]
    assert entry.last_reply != ''
    assert f'status=corrupt id={names[1]}' in caplog.text
    look(*LOOKS, ['show', names[1]], ['show', names[1], '--raw'], ['delete', '--yes', names[1]])
    assert not any(queue.counts().values())


@pytest.mark.parametrize(('kind', 'damage'), HARMLESS)
def test_what_nobody_needs_may_be_damaged(queue, names, run, look):
    look(*LOOKS)

    assert run() == ['0', '1', '2']
    assert not any(queue.counts().values())


@pytest.mark.parametrize(('kind', 'damage'), NEVER_DUE)
def test_a_due_time_that_never_comes_is_not_shown_and_retry_or_the_next_run_makes_it_now(queue, names, run, look):
    look(*LOOKS)
    assert queue.admin.find(names[1]).due is None
    assert queue.count_misdated() == 1

    look(['retry', names[1]])

    assert queue.admin.find(names[1]).due <= time.time()


@pytest.mark.parametrize(('kind', 'damage'), NEVER_DUE)
def test_a_due_time_that_never_comes_is_one_that_no_retry_can_have_given(queue, names, run):
    assert run() == ['0', '1', '2']


@pytest.mark.parametrize(('kind', 'damage'), NO_STATE)
def test_a_state_that_there_is_not_is_corrupt(queue, names, run, look, url, sql):
    for shown in look(*LOOKS, ['list', '--state', 'corrupt'], ['show', names[1]]):
        assert 'corrupt' in shown
    assert [state for state, number in queue.counts().items() if number] == ['waiting', 'corrupt']
    stats = queue.admin.stats(['corrupt'])
    assert [stats.by_state[state].messages for state in ('waiting', 'corrupt')] == [2, 1]
    assert [entry.id for entry in queue.admin.entries(['corrupt'])] == [names[1]]
    assert queue.admin.oldest(['corrupt']).last_reply.startswith('its state is ')
    assert run() == ['0', '2']

    sql(url, "UPDATE mailqueue_message SET state = 'waiting'")
    assert run() == ['1']


@pytest.mark.parametrize(('kind', 'damage'), [NO_STATE[0], NO_STATE[2]])
def test_a_row_in_no_state_can_be_deleted(queue, names, look):
    look(['delete', '--yes', names[1]])

    assert {state: count for state, count in queue.counts().items() if count} == {'waiting': 2}


@pytest.mark.parametrize(('kind', 'damage'), [('sqlite', "id = ''"), ('postgresql+psycopg', "id = ''")])
def test_a_message_without_a_name_is_seen_and_put_aside(queue, names, run, look):
    assert [entry.id for entry in queue.admin.entries(['waiting'])] == [names[0], '', names[2]]
    look(*LOOKS, ['show', ''])

    assert run() == ['0', '2']
    (entry,) = queue.admin.entries(['corrupt'])
    assert (entry.id, entry.last_reply) == ('', 'its id is empty')
    look(['delete', '--yes', ''])
    assert not any(queue.counts().values())


@pytest.mark.parametrize(('kind', 'damage'), [(kind, f"state = 'in progress', {lease}") for kind, lease in NO_LEASE])
def test_a_lease_that_never_ends_is_over(queue, names, run):
    assert run() == ['0', '1', '2']


@pytest.mark.parametrize(('kind', 'damage'), [(kind, f"state = 'in doubt', {lease}") for kind, lease in NO_LEASE])
def test_a_move_that_never_ends_is_seen(queue, names, run):
    assert run() == ['0', '2']
    assert (queue.counts()['in doubt'], queue.recover(time.time()).half_way) == (1, (names[1],))


@pytest.mark.parametrize(('kind', 'damage'), NEVER_DUE)
def test_flush_makes_what_never_comes_due_now(queue, names, run):
    queue.admin.flush()

    assert run() == ['0', '1', '2']
