"""One run over a queue."""

from __future__ import annotations

import os
import time

import pytest

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.results import Recovery, Reply, SendResult
from pyramid_mailqueue.delivery.runner import Runner, RunReport, Stop
from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.queues.maildir import STALE_AFTER
from pyramid_mailqueue.queues.maildir_claim import MAX_DEATHS
from pyramid_mailqueue.testing import Close, ScriptedSMTPServer
from pyramid_mailqueue.transports.smtp import SMTPTransport

# The simplest answers.
YES, NO = True, False

ADA, BOB = 'ada@x.example', 'bob@x.example'
OK, LATER, NEVER = Reply(250, 'ok', '2.1.5'), Reply(451, 'later', '4.3.0'), Reply(550, 'no such user', '5.1.1')


@pytest.fixture
def run(queue):
    """Make one run over some transports."""

    def run(*transports, stop=None):
        return Runner(queue, MessageHandler(transports)).run(stop)

    return run


class StopAfterOne(Stop):
    """Asks the run to end as soon as a transport was asked."""

    def __init__(self, transport):
        super().__init__()
        send = transport.send

        def send_and_stop(*args):
            self.request()
            return send(*args)

        transport.send = send_and_stop


@pytest.fixture
def wait_since(queue, envelope):
    """Put a message into the queue whose due time was so many seconds ago, and return its name."""

    def wait_since(seconds, *names):
        name = queue.put(envelope(*names))
        due = time.time() - seconds
        os.utime(queue.place('new', name), (due, due))
        return name

    return wait_since


def test_what_is_due_is_delivered_oldest_due_time_first(run, wait_since, says):
    for seconds, name in ((10, 'second'), (-60, 'later'), (20, 'first'), (1, 'third')):
        wait_since(seconds, name)
    transport = says(YES)

    report = run(transport)

    assert transport.asked == [('first@x.example',), ('second@x.example',), ('third@x.example',)]
    assert report == RunReport(sent=3)


def test_what_is_not_due_waits(run, queue, wait_since, says):
    wait_since(-60)
    transport = says(YES)

    assert run(transport) == RunReport()
    assert (transport.asked, queue.state) == ([], {'waiting': 1})


def test_with_nothing_to_do_nothing_is_done(run, says):
    transport = says(YES)

    assert run(transport) == RunReport()
    assert (transport.asked, transport.closed) == ([], 1)


@pytest.mark.parametrize(
    ('replies', 'counted'),
    [
        ({ADA: OK, BOB: OK}, RunReport(sent=1)),
        ({ADA: OK, BOB: LATER}, RunReport(deferred=1)),
        ({ADA: OK, BOB: NEVER}, RunReport(refused=1)),
        ({ADA: LATER, BOB: NEVER}, RunReport(deferred=1, refused=1)),
    ],
)
def test_the_report_counts_messages_by_what_became_of_them(run, wait_since, says, replies, counted):
    wait_since(1, 'ada', 'bob')

    assert run(says(SendResult(replies))) == counted


def test_a_message_that_is_given_up_for_its_age_is_refused_and_not_deferred(queue, envelope, says):
    queue.clock = lambda: time.time() - 6 * 86400
    queue.put(envelope())
    queue.clock = time.time

    report = Runner(queue, MessageHandler([says(NO)])).run()

    assert report == RunReport(refused=1)
    assert queue.state == {'dead': 1}


def test_half_done_before_trouble_is_neither_sent_nor_deferred(run, queue, wait_since, says, trouble):
    wait_since(1, 'ada', 'bob')

    report = run(says(SendResult({ADA: OK}, trouble=trouble)))

    assert report == RunReport(trouble=trouble)
    assert [header.recipients for header in queue.headers('new')] == [(BOB,)]


# --- trouble ----------------------------------------------------------------


def test_a_run_ends_at_the_servers_trouble_and_leaves_the_rest_as_it_is(run, queue, wait_since, says, trouble):
    for seconds in range(5):
        wait_since(seconds)
    before = [(file, file.stat().st_ino, file.stat().st_mtime_ns) for file in queue.files('new')]
    transport = says(trouble)

    report = run(transport)

    assert report == RunReport(trouble=trouble)
    assert len(transport.asked) == 1
    assert [(file, file.stat().st_ino, file.stat().st_mtime_ns) for file in queue.files('new')] == before
    assert transport.closed == 1


def test_an_outage_costs_one_connection_for_each_run(queue, wait_since):
    for seconds in range(5):
        wait_since(seconds)
    with ScriptedSMTPServer({'connect': Close('421 4.3.2 come back later')}) as server:
        transport = SMTPTransport(hostname=server.host, port=server.port, local_hostname='app.example')
        reports = [Runner(queue, MessageHandler([transport])).run() for _ in range(2)]

    assert len(server.sessions) == 2
    assert all('421 4.3.2 come back later' in str(report.trouble) for report in reports)
    assert [header.attempts for header in queue.headers('new')] == [0] * 5


def test_a_session_that_is_closed_in_the_middle_of_a_run_ends_it(queue, wait_since):
    for seconds in range(3):
        wait_since(seconds)
    with ScriptedSMTPServer({'MAIL': [None, Close('421 4.3.2 that is enough')], 'connect': [None, Close()]}) as server:
        transport = SMTPTransport(hostname=server.host, port=server.port, local_hostname='app.example')
        report = Runner(queue, MessageHandler([transport])).run()

    assert report.sent == len(server.messages) == 1
    assert report.trouble is not None
    assert [header.attempts for header in queue.headers('new')] == [0, 0]


@pytest.mark.parametrize(
    'script',
    [
        {'RCPT TO:<eve@x.example>': Close()},
        {'RCPT TO:<eve@x.example>': Close('421 4.7.0 not her')},
        {'.': [Close('421 4.7.0 not this')]},
    ],
)
def test_a_message_that_makes_the_server_hang_up_does_not_keep_the_others_from_it(queue, wait_since, script, caplog):
    bad = wait_since(100, 'eve')
    for seconds in range(3):
        wait_since(seconds)
    with ScriptedSMTPServer(script) as server:
        transport = SMTPTransport(hostname=server.host, port=server.port, local_hostname='app.example')
        report = Runner(queue, MessageHandler([transport])).run()

    assert report == RunReport(sent=3)
    assert [file.name for file in queue.files('new')] == [f'{bad},stumbles=1']
    assert [header.attempts for header in queue.headers('new')] == [0]
    assert [record.levelname for record in caplog.records if bad in record.message and 'waits' in record.message] == [
        'WARNING'
    ]


def test_a_server_that_hangs_up_on_everything_ends_the_run(run, queue, wait_since, says):
    for seconds in range(10):
        wait_since(seconds)
    trouble = ServerTrouble('mail.example:25 hung up', in_message=True)
    transport = says(trouble)

    report = run(transport)

    assert report == RunReport(trouble=trouble)
    assert len(transport.asked) == 3
    assert [header.attempts for header in queue.headers('new')] == [0] * 10


def test_a_success_in_between_forgives_a_server_that_hung_up(run, queue, wait_since, says):
    for seconds in range(7):
        wait_since(seconds)
    trouble = ServerTrouble('mail.example:25 hung up', in_message=True)

    report = run(says(trouble, trouble, YES, trouble, trouble, YES, trouble))

    assert report == RunReport(sent=2)
    assert queue.state == {'waiting': 5}


def test_those_that_the_server_stumbled_over_do_not_lead_the_next_run(queue, wait_since):
    for seconds in (100, 99, 98, 97):
        wait_since(seconds, 'eve')
    wait_since(2, 'ada')
    wait_since(1, 'bob')
    before = {file.name: file.read_bytes() for file in queue.files('new')}
    with ScriptedSMTPServer({'RCPT TO:<eve@x.example>': Close()}) as server:
        transport = SMTPTransport(hostname=server.host, port=server.port, local_hostname='app.example')
        reports = [Runner(queue, MessageHandler([transport])).run() for _ in range(2)]

    # The fourth had not been tried: it leads the second run, which the first three end after all others.
    assert [(report.sent, report.trouble is None) for report in reports] == [(0, False), (2, False)]
    assert {file.name.partition(',')[0]: file.read_bytes() for file in queue.files('new')}.items() < before.items()


def test_the_status_of_a_run_does_not_depend_on_who_was_first(run, wait_since, says):
    trouble = ServerTrouble('mail.example:25 hung up', in_message=True)
    reports = []
    for answers in ((trouble, YES), (YES, trouble)):
        wait_since(2)
        wait_since(1)
        reports.append(run(says(*answers)))

    assert reports == [RunReport(sent=1)] * 2


def test_a_run_that_could_do_nothing_says_why(run, wait_since, says):
    wait_since(1)
    trouble = ServerTrouble('mail.example:25 hung up', in_message=True)

    assert run(says(trouble)) == RunReport(trouble=trouble)


def test_a_fallback_in_trouble_does_not_end_a_run(run, queue, wait_since, says, trouble):
    for seconds in (3, 2, 1):
        wait_since(seconds)

    report = run(says(NO, YES), says(trouble))

    assert report == RunReport(sent=2, deferred=1)


# --- what dead processes left ------------------------------------------------


def test_what_a_dead_process_had_claimed_is_delivered_in_the_same_run(run, queue, wait_since, says, told):
    name = wait_since(1)
    queue.move(name, 'cur')

    report = run(says(YES))

    assert report == RunReport(sent=1, recovery=Recovery(orphans=(name,)))
    assert told('status', 'id')[0] == ('recovered', name)
    assert queue.state == {}


def test_what_is_in_doubt_is_reported_by_each_run(run, queue, wait_since, says, told, caplog):
    name = wait_since(1)
    queue.move(name, 'prepared')

    reports = [run(says(YES)) for _ in range(2)]

    assert reports == [RunReport(recovery=Recovery(in_doubt=(name,)))] * 2
    assert told('status', 'id') == [('in_doubt', name)] * 2
    assert [record.levelname for record in caplog.records] == ['INFO', 'CRITICAL', 'CRITICAL']


@pytest.mark.parametrize(('in_doubt', 'status', 'sent'), [('send', 'released', 1), ('discard', 'discarded', 0)])
def test_what_is_in_doubt_can_be_settled_by_a_setting(run, queue, wait_since, says, told, in_doubt, status, sent):
    queue.move(wait_since(1), 'prepared')
    queue.in_doubt = in_doubt

    report = run(says(YES))

    assert report.sent == sent
    assert told('status')[0] == (status,)
    assert queue.state == {}


def test_a_message_that_outlives_too_many_deliverers_is_reported_as_an_error(
    run, queue, wait_since, says, told, caplog
):
    name = wait_since(1)
    for _ in range(MAX_DEATHS - 1):
        queue.move(queue.files('new')[0].name, 'cur')
        queue.recover(time.time())
    queue.move(queue.files('new')[0].name, 'cur')

    report = run(says(YES))

    assert report.recovery.buried == (name,)
    assert told('status', 'id') == [('buried', name)]
    assert [record.levelname for record in caplog.records] == ['INFO', 'ERROR']
    assert queue.state == {'dead': 1}


def test_what_nobody_ever_voted_for_is_swept(run, queue, wait_since, says, told):
    name = wait_since(STALE_AFTER + 60)
    queue.move(name, 'tmp')

    report = run(says(YES))

    assert report.recovery.swept == (name,)
    assert told('status', 'id') == [('swept', name)]


def test_a_damaged_file_does_not_end_a_run(run, queue, wait_since, says):
    damaged = wait_since(3)
    wait_since(2)
    path = queue.place('new', damaged)
    os.truncate(path, 20)
    os.utime(path, (1, 1))

    report = run(says(YES))

    assert report == RunReport(sent=1)
    assert queue.state == {'corrupt': 1}


# --- told to stop -----------------------------------------------------------


def test_a_run_that_is_told_to_stop_finishes_its_message_and_leaves_the_rest(run, queue, wait_since, says):
    for seconds in (3, 2, 1):
        wait_since(seconds)
    transport = says(YES)

    report = run(transport, stop=StopAfterOne(transport))

    assert report == RunReport(sent=1, stopped=True)
    assert queue.state == {'waiting': 2}
    assert (transport.closed, queue.flushes) == (1, 2)


def test_a_run_that_had_nothing_left_to_do_was_not_stopped(run, wait_since, says):
    wait_since(1)
    transport = says(YES)

    assert run(transport, stop=StopAfterOne(transport)) == RunReport(sent=1)


def test_a_message_that_is_interrupted_is_given_back_and_not_held_against_it(run, queue, wait_since, says):
    name = wait_since(2)
    wait_since(1)
    transport = says(KeyboardInterrupt())

    with pytest.raises(KeyboardInterrupt):
        run(transport)

    assert queue.state == {'waiting': 2}
    assert name in [file.name for file in queue.files('new')], 'a death would be counted in its name'
    assert transport.closed == 1


def test_a_message_over_which_a_defect_shows_stays_claimed_so_that_its_deaths_are_counted(queue, wait_since, says):
    class Defect:
        def decide(self, recipients, attempts, queued_at, result, now):
            raise ZeroDivisionError('a defect')

    wait_since(1)

    with pytest.raises(ZeroDivisionError):
        Runner(queue, MessageHandler([says(YES)], retry_policy=Defect())).run()

    assert queue.state == {'in progress': 1}
