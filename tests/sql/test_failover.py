"""Servers that take no changes: standbys, and those that were the primary before."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import make_url

from pyramid_mailqueue.cli import run as mq_run_command
from pyramid_mailqueue.queues.sql.database import DatabaseAway
from tests.parts.databases import create_queue_tables

DRIVERS = ('psycopg', 'psycopg2')


@pytest.fixture
def servers(own_postgres):
    """A primary with the tables of a queue, and a standby of it that has them too."""
    create_queue_tables(own_postgres.url('psycopg'))
    standby = own_postgres.standby()
    yield own_postgres, standby
    standby.remove()


@pytest.fixture
def name(tmp_path):
    """A name that leads to a server: ``name(server)`` points it there, and returns it."""
    link = tmp_path / 'db'

    def name(server):
        link.unlink(missing_ok=True)
        link.symlink_to(server._home)
        return link

    return name


@pytest.mark.parametrize('driver', DRIVERS)
def test_a_worker_leaves_a_server_that_takes_no_changes_when_its_name_leads_to_another_one(
    servers, name, make_queue, envelope, driver
):
    primary, standby = servers
    message = make_queue(primary.url('psycopg')).put(envelope)
    queue = make_queue(standby.url(driver, host=name(standby)))
    for _ in range(2):
        with pytest.raises(DatabaseAway, match='takes no changes: it is a standby'):
            next(queue.claim_due(time.time()))

    name(primary)

    assert [claim.id for claim in queue.claim_due(time.time())] == [message]


def test_a_worker_goes_on_when_its_standby_becomes_the_primary(servers, make_queue, envelope, sql):
    _, standby = servers
    queue = make_queue(standby.url('psycopg'))
    with pytest.raises(DatabaseAway, match='takes no changes'):
        queue.put(envelope)

    sql(standby.url('psycopg'), 'SELECT pg_promote()')

    assert queue.claim(queue.put(envelope)) is not None


def test_a_worker_leaves_a_primary_that_has_become_read_only(servers, name, make_queue, envelope, sql):
    """As one that is fenced off, and whose sessions go on."""
    primary, standby = servers
    queue = make_queue(primary.url('psycopg', host=name(primary)))
    queue.put(envelope)
    sql(primary.url('psycopg'), 'ALTER SYSTEM SET default_transaction_read_only = on')
    sql(primary.url('psycopg'), 'SELECT pg_reload_conf()')
    sql(standby.url('psycopg'), 'SELECT pg_promote()')
    name(standby)

    assert queue.claim(queue.put(envelope)) is not None


@pytest.mark.parametrize('driver', DRIVERS)
def test_a_standby_where_serializable_is_the_default_is_trouble_that_passes(servers, driver, tmp_path, capfd):
    url = make_url(servers[1].url(driver)).update_query_dict(
        {'options': '-cdefault_transaction_isolation=serializable'}
    )
    quoted = url.render_as_string(hide_password=False).replace('%', '%%')
    ini = tmp_path / 'app.ini'
    ini.write_text(f'[app:main]\nmailqueue.smtp_hostname = x\nmailqueue.queue = sql\nsqlalchemy.url = {quoted}\n')

    with pytest.raises(SystemExit) as info:
        mq_run_command.main([str(ini)])

    assert (info.value.code, 'takes no changes' in capfd.readouterr().err) == (75, True)


def test_a_url_with_several_hosts_finds_the_primary(servers, make_queue, envelope):
    primary, standby = servers
    url = make_url(standby.url('psycopg')).update_query_dict(
        {'host': [str(standby._home), str(primary._home)], 'target_session_attrs': 'read-write'}
    )

    queue = make_queue(url.render_as_string(hide_password=False))

    assert queue.claim(queue.put(envelope)) is not None
