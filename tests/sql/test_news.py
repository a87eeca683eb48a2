"""Word of new mail between processes, over LISTEN and NOTIFY."""

from __future__ import annotations

import logging
import threading

import pytest

from tests.parts.databases import create_queue_tables

DRIVERS = ('postgresql+psycopg', 'postgresql+psycopg2')


class News:
    """Counts what is told."""

    def __init__(self):
        self.count = 0
        self._told = threading.Condition()

    def __call__(self):
        with self._told:
            self.count += 1
            self._told.notify_all()

    def wait_for(self, count):
        with self._told:
            assert self._told.wait_for(lambda: self.count >= count, 30)


@pytest.fixture(params=DRIVERS)
def url(request, make_database):
    url = make_database(request.param)
    create_queue_tables(url)
    return url


def test_who_listens_hears_of_mail_that_nobody_has_claimed(url, make_queue, envelope):
    queue, other = make_queue(url, notify=True), make_queue(url, notify=True)
    news = News()

    with queue.listening(news):
        news.wait_for(1)
        other.put(envelope)
        news.wait_for(2)
        other.put(envelope)
        news.wait_for(3)


def test_who_listens_has_one_of_the_two_connections(url, make_queue, envelope):
    queue = make_queue(url, notify=True)
    news = News()

    with queue.listening(news):
        news.wait_for(1)
        queue.put(envelope)
        (claim,) = queue.claim_due(2e9)
        assert claim.envelope == envelope
        claim.release()
    assert queue.counts()['waiting'] == 1


def test_after_the_connection_is_lost_it_is_made_again(url, make_queue, envelope, sql, monkeypatch, caplog):
    monkeypatch.setattr('pyramid_mailqueue.queues.sql.notify.PATIENCE', 0.01)
    queue, other = make_queue(url, notify=True), make_queue(url, notify=True)
    news = News()

    with queue.listening(news):
        for time in (1, 2):
            news.wait_for(time)
            sql(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'LISTEN mailqueue'")
        news.wait_for(3)
        heard = news.count
        other.put(envelope)
        news.wait_for(heard + 1)

    # Each time, and each in one line.
    told = [record.getMessage() for record in caplog.records]
    assert ['it is found by polling' in line for line in told] == [True, True]
    assert not any('\n' in line for line in told)


def test_without_the_setting_nobody_tells_or_listens(url, make_queue, envelope):
    news = News()

    with make_queue(url).listening(news):
        make_queue(url).put(envelope)

    assert news.count == 0


def test_sqlite_has_no_such_thing(make_database, make_queue, envelope):
    url = make_database('sqlite')
    create_queue_tables(url)
    queue, news = make_queue(url, notify=True), News()

    with queue.listening(news):
        queue.put(envelope)

    assert (news.count, queue.counts()['waiting']) == (0, 1)


def test_mail_that_cannot_be_told_of_is_in_the_queue_all_the_same(url, make_queue, envelope, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    queue = make_queue(url, notify=True)
    monkeypatch.setattr('pyramid_mailqueue.queues.sql.notify.CHANNEL', 'no channel')

    queue.put(envelope)

    assert 'There is no notification of new mail' in caplog.text
    assert queue.counts()['waiting'] == 1
