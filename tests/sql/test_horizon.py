"""Due times that no retry can have given, because the clock of a host was wrong when they were written."""

from __future__ import annotations

import logging
import time

import pytest

from pyramid_mailqueue.cli import queue as mq_queue_command
from tests.parts.maildir import Told

DAY = 86400


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO)
    return Told(caplog)


@pytest.fixture
def send_ahead(url, make_queue, envelope):
    """Put a message into the queue on a host whose clock is so many days ahead; return its id."""
    return lambda days: make_queue(url, clock=lambda: time.time() + days * DAY).put(envelope)


def test_mail_that_was_sent_while_a_clock_was_days_ahead_is_due_when_that_is_corrected(
    url, make_queue, send_ahead, told
):
    name = send_ahead(10)
    queue = make_queue(url)

    assert (queue.count_due(time.time()), queue.count_misdated()) == (1, 1)
    assert [claim.id for claim in queue.claim_due(time.time())] == [name]

    (event,) = told(level='WARNING', status='trouble')
    assert (event['id'], 'a clock was wrong' in event['reason']) == (name, True)


def test_such_mail_is_due_for_who_asks_for_it_by_its_id(url, make_queue, send_ahead):
    assert make_queue(url).claim(send_ahead(10)) is not None


def test_what_a_retry_can_have_given_is_waited_for(url, make_queue, send_ahead):
    send_ahead(0.9)
    queue = make_queue(url)

    assert [*queue.claim_due(time.time())] == []
    assert (queue.count_due(time.time()), queue.count_misdated()) == (0, 0)


def test_longer_pauses_between_retries_move_the_horizon(url, make_queue, send_ahead):
    send_ahead(10)

    assert [*make_queue(url, horizon=20 * DAY).claim_due(time.time())] == []


def test_it_is_the_clock_of_the_database_that_tells(url, make_queue, envelope):
    """A worker whose own clock is behind takes nothing for misdated that is not."""
    make_queue(url).put(envelope)
    late = make_queue(url, clock=lambda: time.time() - 10 * DAY)

    assert [*late.claim_due(late._clock())] == []
    assert late.count_misdated() == 0


def test_check_warns_of_such_mail(url, send_ahead, make_queue, tmp_path, capsys):
    ini = tmp_path / 'app.ini'
    quoted = url.replace('%', '%%')
    ini.write_text(f'[app:main]\nmailqueue.smtp_hostname = x\nmailqueue.queue = sql\nsqlalchemy.url = {quoted}\n')
    send_ahead(10)

    with pytest.raises(SystemExit) as info:
        mq_queue_command.main([str(ini), 'check', '--max-age', '1h'])

    assert info.value.code == 1
    assert '1 message with a due time that no retry can have given: a clock is wrong' in capsys.readouterr().out
