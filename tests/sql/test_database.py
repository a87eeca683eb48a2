"""The connections of a queue to its database."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from sqlalchemy import make_url

from pyramid_mailqueue.queues.sql.engine import CONNECTIONS


class Cut(BaseException):
    """Raised by a signal handler, as servers do with a request that takes too long."""


def raise_cut(*_):
    raise Cut


def levels_of(connection):
    names = ('transaction_isolation', 'default_transaction_isolation')
    return [connection.exec_driver_sql(f'SHOW {name}').scalar_one() for name in names]


def test_a_claim_passes_over_what_others_change_whatever_the_database_prefers(postgres_url, make_queue):
    url = make_url(postgres_url)
    options = f'{url.query.get("options", "")} -cdefault_transaction_isolation=serializable'.strip()
    url = url.update_query_dict({'options': options})

    with make_queue(url.render_as_string(hide_password=False)).database.connection() as connection:
        assert levels_of(connection) == ['read committed', 'read committed']


@pytest.fixture
def database(url, make_queue):
    return make_queue(url).database


def test_those_who_wait_for_a_connection_get_it_in_their_order(database, until):
    order = []

    def use(number):
        with database.connection():
            order.append(number)

    lent = [database.connection() for _ in range(CONNECTIONS)]
    for connection in lent:
        connection.__enter__()
    threads = [threading.Thread(target=use, args=[number]) for number in range(5)]
    for number, thread in enumerate(threads):
        thread.start()
        until(lambda: len(database._turns._waiting) == number + 1)  # noqa: B023 - called at once
    lent[0].__exit__(None, None, None)
    for thread in threads:
        thread.join()
    lent[1].__exit__(None, None, None)

    assert order == [0, 1, 2, 3, 4]


def test_who_is_cut_short_while_waiting_takes_no_connection_along(database, until):
    former = signal.signal(signal.SIGUSR1, raise_cut)
    lent = [database.connection() for _ in range(CONNECTIONS)]
    for connection in lent:
        connection.__enter__()

    def cut():
        until(lambda: database._turns._waiting)
        os.kill(os.getpid(), signal.SIGUSR1)

    helper = threading.Thread(target=cut)
    helper.start()
    with pytest.raises(Cut), database.connection():
        pass
    helper.join()
    signal.signal(signal.SIGUSR1, former)
    for connection in lent:
        connection.__exit__(None, None, None)

    assert ([*database._turns._taken], [*database._turns._waiting]) == ([], [])
