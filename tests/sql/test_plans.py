"""How the databases find what they are asked for: by an index, whatever the size of the backlog."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest
from sqlalchemy import event

ROWS = 3000

FILLING = {
    'postgresql': 'INSERT INTO mailqueue_message '
    '(id, state, due, attempts, deaths, queued_at, last_reply, sender, recipients, message_id, subject, content) '
    "SELECT lpad(to_hex(CAST(1000000 AS bigint) * n), 13, '0'), 'waiting', n, 1, 0, n, '', '', '[]', '', '', "
    "CAST(repeat('x', 1000) AS bytea) "
    f'FROM generate_series(1, {ROWS}) AS n',
    'sqlite': f'WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {ROWS}) '
    'INSERT INTO mailqueue_message '
    '(id, state, due, attempts, deaths, queued_at, last_reply, sender, recipients, message_id, subject, content) '
    "SELECT printf('%013x', 1000000 * n), 'waiting', n, 1, 0, n, '', '', '[]', '', '', zeroblob(1000) FROM numbers",
}


@pytest.fixture
def backlog(url, make_queue, sql):
    """A queue in which many messages wait."""
    queue = make_queue(url)
    sql(url, FILLING[queue.database.dialect])
    if queue.database.dialect == 'postgresql':
        sql(url, 'VACUUM ANALYZE mailqueue_message')
    queue.check()
    return queue


@contextmanager
def plans_of(queue):
    """Collect the plans of all statements about messages that are executed in the block."""
    explain = 'EXPLAIN' if queue.database.dialect == 'postgresql' else 'EXPLAIN QUERY PLAN'
    executed, plans = [], []

    def note(_connection, _cursor, statement, values, _context, _many):
        if 'mailqueue_message' in statement:
            executed.append((statement, values))

    event.listen(queue.database.engine, 'before_cursor_execute', note)
    yield plans
    event.remove(queue.database.engine, 'before_cursor_execute', note)
    with queue.database.connection() as connection:
        for statement, values in executed:
            rows = connection.exec_driver_sql(f'{explain} {statement}', values).all()
            plans.append('\n'.join(str(row[-1]) for row in rows))
    assert plans


def reads_table(plan):
    """Whether it goes through all of the table, and not through an index."""
    return re.search(r'Seq Scan on mailqueue_message|SCAN mailqueue_message(?! USING)', plan)


@pytest.mark.parametrize(
    'work',
    [
        lambda queue: queue.counts(),
        lambda queue: queue.count_waiting(100),
        lambda queue: queue.count_due(ROWS / 2),
        lambda queue: queue.recover(ROWS),
        lambda queue: next(queue.claim_due(ROWS)),
        lambda queue: [queue.admin.oldest([state]) for state in ('waiting', 'in progress', 'held', 'dead', 'in doubt')],
        lambda queue: next(queue.admin.entries(['waiting', 'held'])),
        lambda queue: next(queue.admin.entries(['dead']), None),
    ],
    ids=['counts', 'count_waiting', 'count_due', 'recover', 'claim_due', 'oldest', 'list', 'list dead'],
)
def test_no_table_is_gone_through(backlog, work):
    with plans_of(backlog) as plans:
        work(backlog)

    assert not any(map(reads_table, plans)), '\n\n'.join(plans)


def test_what_waits_is_counted_without_its_rows(backlog):
    index = {
        'postgresql': 'Index Only Scan using mailqueue_message_due',
        # That it covers what is asked for is known to newer versions only.
        'sqlite': 'SCAN mailqueue_message USING (COVERING )?INDEX mailqueue_message_due',
    }
    with plans_of(backlog) as plans:
        assert backlog.counts()['waiting'] == ROWS
        assert backlog.count_waiting(100) == 101

    for plan in plans:
        assert re.search(index[backlog.database.dialect], plan)


def test_the_oldest_is_found_where_the_order_of_ids_does_not_tell(backlog, url, sql):
    assert backlog.admin.oldest(['waiting', 'dead']).queued_at == 1

    # As after a retry.
    sql(url, f'UPDATE mailqueue_message SET queued_at = {2 * ROWS} WHERE due < 1000')

    assert backlog.admin.oldest(['waiting', 'dead']).queued_at == 1000
