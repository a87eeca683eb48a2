"""One run over a queue."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import closing

import pytest

from pyramid_mailqueue.delivery import crew, runner
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.retry import ExponentialBackoff
from pyramid_mailqueue.delivery.runner import Runner, RunReport, Stop
from pyramid_mailqueue.exceptions import ConfigurationError, QueueError, ServerTrouble
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir.claim import MAX_DEATHS
from pyramid_mailqueue.queues.maildir.queue import STALE_AFTER
from pyramid_mailqueue.queues.rate_file import RateFile
from pyramid_mailqueue.results import Recovery, Reply, SendResult
from pyramid_mailqueue.settings import Rate
from pyramid_mailqueue.testing import EXTENSIONS, Close, ScriptedSMTPServer, Silence, Wait
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


# --- what dead processes left -----------------------------------------------


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


# --- over a real connection -------------------------------------------------


@pytest.fixture
def run_over(queue, make_event):
    """Make one run over a server, with so many connections: ``run_over(server, 4)``."""
    transports = []

    def run_over(server, connections=1, *, fallback=(), stop=None, rate=None, smtp=None, **options):
        smtp = {'hostname': server.host, 'port': server.port, 'local_hostname': 'app.example', **(smtp or {})}
        transports.append(SMTPTransport(**smtp))
        handler = MessageHandler([transports[-1], *fallback], connections=connections, take_from_rate=rate)
        return Runner(queue, handler).run(stop, **options)

    yield run_over
    for transport in transports:
        transport.close()


@pytest.fixture
def wait_all(wait_since):
    """Put so many messages into the queue, for ``m0@x.example`` and so on; return their names, oldest due first."""

    def wait_all(number):
        return [wait_since(number - index, f'm{index}') for index in range(number)]

    return wait_all


def snapshot(queue):
    """Everything that could change of the waiting messages, by name."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in queue.files('new')}


def subset(snapshot, names):
    return {name: snapshot[name] for name in names}


def brought(server):
    """Whom the server has accepted messages for, in this order; nobody twice."""
    recipients = [recipient for message in server.messages for recipient in message.recipients]
    assert len(recipients) == len(set(recipients))
    return recipients


def m(*numbers):
    return [f'm{number}@x.example' for number in numbers]


def when(number, answer):
    """Answer so to the MAIL or RCPT of one message; all have the same sender, so MAIL is counted."""
    return {'RCPT': lambda command: answer if f'<m{number}@' in command else None}


WITH_AND_WITHOUT_PIPELINING = pytest.mark.parametrize('extensions', [EXTENSIONS, ()], ids=['pipelining', 'stepwise'])


def test_over_one_connection_messages_go_out_strictly_oldest_due_first(run_over, wait_all):
    wait_all(30)
    with ScriptedSMTPServer() as server:
        report = run_over(server)

    assert report == RunReport(sent=30)
    assert brought(server) == m(*range(30))
    assert server.sessions[0].round_trips == 30 + len(['EHLO', 'MAIL RCPT DATA', 'QUIT'])


@WITH_AND_WITHOUT_PIPELINING
@pytest.mark.parametrize('how', [Close('421 4.7.0 not this'), Close(), Close('what?')], ids=['421', 'closed', 'noise'])
@pytest.mark.parametrize('step', ['RCPT', 'DATA'])
def test_a_session_that_breaks_off_in_a_message_leaves_that_one_as_it_was_and_goes_on_with_the_next(
    run_over, queue, wait_all, step, how, extensions
):
    names = wait_all(5)
    before = snapshot(queue)[names[2]]
    script = {'RCPT': when(2, how)['RCPT']} if step == 'RCPT' else {'DATA': [None, None, how]}
    with ScriptedSMTPServer(script, extensions=extensions) as server:
        report = run_over(server)

    assert report == RunReport(sent=4)
    assert brought(server) == m(0, 1, 3, 4)
    assert snapshot(queue) == {f'{names[2]},stumbles=1': before}
    assert len(server.sessions) == 2


@WITH_AND_WITHOUT_PIPELINING
@pytest.mark.parametrize('step', ['RCPT', 'DATA', '.'])
def test_if_the_server_lets_nobody_in_after_that_the_next_ones_are_as_they_were_byte_for_byte(
    run_over, queue, wait_all, step, extensions
):
    names = wait_all(5)
    before = snapshot(queue)
    how = Close('421 4.3.2 going down')
    script = {step: when(2, how)['RCPT'] if step == 'RCPT' else [None, None, how], 'connect': [None, Close('421 no')]}
    with ScriptedSMTPServer(script, extensions=extensions) as server:
        report = run_over(server)

    after = snapshot(queue)
    assert (report.sent, report.trouble.code) == (2, 421)
    assert brought(server) == m(0, 1)
    assert subset(after, names[3:]) == subset(before, names[3:])
    assert after[f'{names[2]},stumbles=1'] == before[names[2]]
    assert len(server.sessions) == 2


@WITH_AND_WITHOUT_PIPELINING
@pytest.mark.parametrize('how', [Close(), 'what?'], ids=['closed', 'noise'])
@pytest.mark.parametrize('lets_in_again', [True, False])
def test_a_session_that_breaks_off_behind_the_final_dot_defers_that_one_and_leaves_the_next_as_they_were(
    run_over, queue, wait_all, told, how, lets_in_again, extensions
):
    names = wait_all(5)
    before = snapshot(queue)
    script = {'.': [None, None, how], 'connect': [None] if lets_in_again else [None, Close('421 no')]}
    with ScriptedSMTPServer(script, extensions=extensions) as server:
        report = run_over(server)

    deferred = [header for header in queue.headers('new') if header.attempts]
    assert [(header.recipients, header.attempts) for header in deferred] == [(tuple(m(2)), 1)]
    assert 'it may have been delivered' in deferred[0].last_reply
    assert ('deferred', m(2)[0]) in told('status', 'to')
    assert brought(server) == m(0, 1, 3, 4) if lets_in_again else m(0, 1)
    if not lets_in_again:
        assert subset(snapshot(queue), names[3:]) == subset(before, names[3:])
    assert (report.sent, report.deferred, report.trouble is None) == (4 if lets_in_again else 2, 1, lets_in_again)
    assert len(server.sessions) == 2


def test_what_may_have_been_delivered_waits_and_a_second_transport_has_the_rest(run_over, queue, wait_all, says, told):
    wait_all(5)
    fallback = says(YES)
    script = {'.': [None, None, Close()], 'connect': [None, Close('421 no')]}
    with ScriptedSMTPServer(script) as server:
        report = run_over(server, fallback=[fallback])

    assert (brought(server), fallback.asked) == (m(0, 1), [tuple(m(3)), tuple(m(4))])
    assert (report.sent, report.deferred, report.trouble) == (4, 1, None)
    (header,) = queue.headers('new')
    assert (header.recipients, header.attempts) == (tuple(m(2)), 1)
    assert ('deferred', m(2)[0]) in told('status', 'to')


@pytest.mark.parametrize('times', [1, 2])
def test_noise_between_two_messages_is_no_trouble_unless_a_new_session_says_the_same(run_over, queue, wait_all, times):
    names = wait_all(4)
    before = snapshot(queue)
    with ScriptedSMTPServer({'MAIL': [None, None, *['what?'] * times]}) as server:
        report = run_over(server)

    # The second time it is in the midst of the third message.
    assert report == RunReport(sent=5 - times)
    assert sorted(brought(server)) == sorted(m(0, 1, 2, 3) if times == 1 else m(0, 1, 3))
    assert {name: it[2] for name, it in snapshot(queue).items()} == (
        {} if times == 1 else {f'{names[2]},stumbles=1': before[names[2]][2]}
    )


# --- over several connections -----------------------------------------------


class Hall:
    """
    A server that takes the first message, and everything else when so many sessions have begun, and these have ended.

    :param ended: the numbers of sessions that it waits for to be over
    """

    def __init__(self, sessions, script=None, *, ended=(), **options):
        self.server = ScriptedSMTPServer({'.': self._on_content, **(script or {})}, **options)
        self._number = sessions
        self._ended = ended

    def __enter__(self):
        return self.server.__enter__()

    def __exit__(self, *error):
        self.server.close()

    def _on_content(self, command):
        if self.server.messages:
            self.server.wait_for(self._is_full)

    def _is_full(self):
        sessions = self.server.sessions
        return len(sessions) >= self._number and all(sessions[number].is_over for number in self._ended)


def test_several_connections_share_what_is_due_and_bring_each_message_once(run_over, queue, wait_all):
    wait_all(40)
    with Hall(4) as server:
        report = run_over(server, 4)

    assert report == RunReport(sent=40)
    assert sorted(brought(server)) == sorted(m(*range(40)))
    assert brought(server)[0] == m(0)[0]
    assert (queue.state, len(server.sessions)) == ({}, 4)
    # Each thread is given the oldest that is left.
    for session in server.sessions:
        own = [int(command[10:].partition('@')[0]) for command in session.commands if command.startswith('RCPT')]
        assert own == sorted(own)


def test_no_more_sessions_are_opened_than_there_are_messages(run_over, wait_all):
    wait_all(2)
    with ScriptedSMTPServer() as server:
        assert run_over(server, 4) == RunReport(sent=2)

    assert len(server.sessions) <= 2


def test_no_connection_has_more_than_two_messages_in_hand(run_over, queue, wait_all):
    wait_all(40)
    in_hand = []

    def on_mail(command):
        in_hand.append(len(queue.files('cur')))

    with Hall(4, {'MAIL': on_mail}) as server:
        run_over(server, 4)

    assert 4 <= max(in_hand) <= 8


@pytest.mark.parametrize('step', ['connect', 'EHLO', 'MAIL'])
@pytest.mark.parametrize('how', [Close('421 4.7.0 too many connections'), Close()], ids=['421', 'closed'])
def test_if_there_is_room_for_two_sessions_the_run_goes_on_with_two_and_brings_everything(
    run_over, queue, wait_all, says, caplog, step, how
):
    wait_all(24)
    fallback = says(YES)
    script = {2: {step: how}, 3: {step: how}}
    with Hall(4, by_session=script, ended=(2, 3)) as server:
        report = run_over(server, 4, fallback=[fallback])

    assert report == RunReport(sent=24)
    assert (len(brought(server)), queue.state) == (24, {})
    assert fallback.asked == []
    assert len(server.sessions) == 4
    warnings = [record.message for record in caplog.records if record.levelname == 'WARNING']
    assert len(warnings) == 2
    assert all(line.endswith('The run goes on with fewer connections.') for line in warnings)


def test_who_has_nothing_more_waits_for_what_a_session_in_vain_had_in_hand(run_over, queue, wait_all, until):
    wait_all(4)
    announced = []

    def second_message_is_taken_when_another_was_announced_on_the_second_session(command):
        server.wait_for(lambda: announced or not server.messages)

    def too_many(command):
        with server.recording():
            announced.append(command)
        # By then the first one has nothing more to do, but to wait for this one.
        until(lambda: queue.state == {'in progress': 1})
        return Close('421 4.7.0 too many connections')

    script = {
        0: {'.': second_message_is_taken_when_another_was_announced_on_the_second_session},
        1: {'MAIL': too_many},
    }
    with ScriptedSMTPServer(by_session=script) as server:
        report = run_over(server, 2)

    assert report == RunReport(sent=4)
    assert sorted(brought(server)) == m(*range(4))
    assert (len(server.sessions), len(announced), queue.state) == (2, 1, {})


@WITH_AND_WITHOUT_PIPELINING
@pytest.mark.parametrize('connections', [1, 3])
@pytest.mark.parametrize(
    'enough',
    [
        {'MAIL': [None, None, Close('421 4.7.0 enough')]},
        {'MAIL': [None, None, Close()]},
        {'MAIL': [None, None, '452 4.5.3 enough']},
        {'.': [None, '250 2.0.0 ok\n421 4.7.0 enough']},
        {'.': [None, Close('250 2.0.0 ok')]},
    ],
    ids=['421', 'closed', '452', '421 with the reply', 'closed behind the reply'],
)
def test_a_server_that_takes_two_messages_in_a_session_costs_more_sessions_and_nothing_else(
    run_over, queue, wait_all, caplog, connections, extensions, enough
):
    wait_all(12)
    with ScriptedSMTPServer(by_session=dict.fromkeys(range(20), enough), extensions=extensions) as server:
        report = run_over(server, connections)

    assert report == RunReport(sent=12)
    assert sorted(brought(server)) == sorted(m(*range(12)))
    assert queue.state == {}
    assert len(server.sessions) in range(6, 10 if connections > 1 else 8)
    assert [record for record in caplog.records if record.levelname == 'WARNING'] == []


# --- the server is in trouble, and there could be four connections ----------


def refused(address, timeout):
    raise ConnectionRefusedError(111, 'Connection refused')


def too_late(address, timeout):
    raise TimeoutError('timed out')


def without_address(address, timeout):
    raise socket.gaierror(-2, 'Name or service not known')


TROUBLES = {
    'refused': ({}, {'connect': refused}),
    'too late': ({}, {'connect': too_late}),
    'without an address': ({}, {'connect': without_address}),
    '421 at first': ({'connect': Close('421 4.3.2 closed')}, {}),
    '554 at first': ({'connect': '554 5.7.1 no'}, {}),
    'closed at first': ({'connect': Close()}, {}),
    '421 to EHLO': ({'EHLO': Close('421 4.3.2 closed')}, {}),
    'no STARTTLS': ({}, {'tls': 'starttls'}),
    'no AUTH': ({}, {'username': 'shop', 'password': 'secret'}),
    '535 to AUTH': ({'AUTH': '535 5.7.8 no'}, {'username': 'shop', 'password': 'secret'}),
    '454 to AUTH': ({'AUTH': '454 4.7.0 not now'}, {'username': 'shop', 'password': 'secret'}),
}


@pytest.mark.parametrize('which', TROUBLES)
def test_the_servers_trouble_costs_one_try_and_nothing_is_rewritten(run_over, queue, wait_all, told, which):
    script, smtp = TROUBLES[which]
    wait_all(6)
    before = snapshot(queue)
    calls = []
    connect = smtp.get('connect', socket.create_connection)
    extensions = (*EXTENSIONS, *(['AUTH PLAIN'] if 'AUTH' in script else []))
    with ScriptedSMTPServer(script, extensions=extensions) as server:
        smtp = {**smtp, 'connect': lambda *args: calls.append(args) or connect(*args)}
        report = run_over(server, 4, smtp=smtp)

    assert report == RunReport(trouble=report.trouble)
    assert report.trouble is not None
    assert snapshot(queue) == before
    assert (len(calls), told('status')) == (1, [])


#: A message that one can tell from the others by its sender.
BAD = Envelope('bad@site.example', ('bad@x.example',), b'Subject: bad\r\n\r\n')

#: How a server may be in trouble as late as in the midst of a message, and the code that it gives.
AT_ONE_MESSAGE = {
    '421': (Close('421 4.3.2 closed'), 421),
    '530': ('530 5.7.0 log in first', 530),
    '504': ('504 5.5.2 <app>: Helo command rejected: need fully-qualified hostname', 504),
    'noise': ('what?', None),
    'closed': (Close(), None),
    'silence': (Silence(), None),
}


@pytest.mark.parametrize(
    ('how', 'step'),
    [
        *((how, step) for how in AT_ONE_MESSAGE for step in ('MAIL', 'RCPT', 'DATA')),
        *((how, '.') for how in ('421', '530', '504')),
    ],
)
def test_a_server_that_does_so_at_each_message_ends_the_run_after_three(run_over, queue, wait_all, how, step):
    names = wait_all(6)
    before = snapshot(queue)
    answer, code = AT_ONE_MESSAGE[how]
    with ScriptedSMTPServer({step: lambda command: answer}) as server:
        report = run_over(server, 4, smtp={'timeout': 1})

    after = snapshot(queue)
    assert report == RunReport(trouble=report.trouble)
    assert report.trouble.code == code
    assert {f'{name},stumbles=1': before[name] for name in names[:3]} == {
        name: it for name, it in after.items() if 'stumbles' in name
    }
    assert subset(after, names[3:]) == subset(before, names[3:])
    assert len(server.sessions) == 3


@pytest.mark.parametrize('step', ['MAIL', 'RCPT'])
@pytest.mark.parametrize('connections', [1, 4])
@pytest.mark.parametrize('how', AT_ONE_MESSAGE)
def test_one_sender_that_the_server_cannot_stand_keeps_no_other_from_it(
    run_over, queue, wait_all, caplog, how, connections, step
):
    answer, _ = AT_ONE_MESSAGE[how]
    bad = queue.put(BAD)
    os.utime(queue.place('new', bad), (1, 1))
    wait_all(8)

    def by_sender(command):
        return answer if '<bad@' in command else None

    with ScriptedSMTPServer({step: by_sender}) as server:
        report = run_over(server, connections, smtp={'timeout': 1})
        assert report == RunReport(sent=8)
        assert sorted(brought(server)) == m(*range(8))
        assert [file.name for file in queue.files('new')] == [f'{bad},stumbles=1']
        assert [record.levelname for record in caplog.records if f'The message {bad} waits.' in record.message] == [
            'WARNING'
        ]

        # Behind one that is fine, and alone.
        wait_all(1)
        assert run_over(server, connections, smtp={'timeout': 1}).sent == 1
        assert run_over(server, connections, smtp={'timeout': 1}).sent == 0
    assert [file.name for file in queue.files('new')] == [f'{bad},stumbles=3']
    assert [header.attempts for header in queue.headers('new')] == [0]


@pytest.mark.parametrize('step', ['MAIL', 'RCPT'])
@pytest.mark.parametrize(('innocent', 'bad', 'given_up'), [(0, 1, 1), (0, 2, 2), (1, 3, 3), (0, 3, 0), (0, 6, 0)])
def test_a_message_at_which_the_session_ends_is_given_up_after_its_lifetime_and_none_because_of_an_outage(
    queue, wait_all, innocent, bad, given_up, step
):
    wait_all(innocent)
    for _ in range(bad):
        queue.put(BAD)
    later = time.time() + 6 * 86400

    def of_bad(command):
        return Close('421 4.3.2 closed') if '<bad@' in command else None

    with ScriptedSMTPServer({step: of_bad}) as server:
        transport = SMTPTransport(hostname=server.host, port=server.port, local_hostname='app.example')
        handler = MessageHandler([transport], clock=lambda: later)
        with closing(transport):
            Runner(queue, handler, clock=lambda: later).run()

    assert queue.state == {
        state: number for state, number in (('waiting', bad - given_up), ('dead', given_up)) if number
    }


def test_a_server_that_goes_down_in_the_middle_of_a_run_costs_one_try_for_each_connection(run_over, queue, wait_all):
    names = wait_all(40)
    before = snapshot(queue)

    def is_down():
        return len(server.messages) >= 12

    def going_down(reply):
        return lambda command: Close('421 4.3.2 going down') if is_down() else reply

    with Hall(4, {'MAIL': going_down(None), 'connect': going_down(None)}) as server:
        report = run_over(server, 4)

    after = snapshot(queue)
    assert (report.sent, report.deferred, report.refused) == (len(server.messages), 0, 0)
    assert report.trouble.code == 421
    assert subset(before, after) == after, 'what was not brought is as it was'
    assert len(after) + len(brought(server)) == len(names)
    assert 4 < len(server.sessions) <= 8


def test_a_server_that_is_down_leaves_everything_to_a_second_transport_after_one_try(run_over, queue, wait_all, says):
    wait_all(6)
    fallback = says(YES)
    with ScriptedSMTPServer({'connect': Close('421 4.3.2 closed')}) as server:
        report = run_over(server, 4, fallback=[fallback])

    assert report == RunReport(sent=6)
    assert sorted(fallback.asked) == sorted((name,) for name in m(*range(6)))
    assert (len(server.sessions), queue.state) == (1, {})


def test_two_servers_that_take_long_to_fail_are_tried_once(queue, wait_since, says, trouble):
    for seconds in range(5):
        wait_since(seconds)
    first, second = says(trouble), says(trouble)
    handler = MessageHandler([first, second])
    second_send = second.send

    def send(*args):
        # The rest of the first is over by now.
        handler.routes[0].backoff._until = 0
        return second_send(*args)

    second.send = send
    report = Runner(queue, handler).run()

    assert report == RunReport(trouble=trouble)
    assert (len(first.asked), len(second.asked)) == (1, 1)


def test_trouble_that_ended_a_run_is_reported_however_long_its_end_took(queue, wait_since, says, trouble):
    for seconds in range(3):
        wait_since(seconds)
    handler = MessageHandler([says(YES, trouble)])

    def much_later(report):
        handler.routes[0].backoff._until = 0

    report = Runner(queue, handler).run(on_progress=much_later)

    assert report == RunReport(sent=1, trouble=trouble)


# --- not everything ---------------------------------------------------------


@pytest.mark.parametrize('connections', [1, 4])
def test_a_run_begins_with_no_more_messages_than_it_may(run_over, queue, wait_all, connections):
    names = wait_all(20)
    before = snapshot(queue)
    with ScriptedSMTPServer() as server:
        report = run_over(server, connections, max_messages=5)

    assert report == RunReport(sent=5)
    assert sorted(brought(server)) == m(*range(5))
    assert snapshot(queue) == subset(before, names[5:])


def test_after_its_time_a_run_begins_nothing_more_and_waits_for_what_is_in_hand(
    run_over, queue, wait_all, make_event, monkeypatch
):
    monkeypatch.setattr(crew, 'STOP_SECONDS', 0)
    names = wait_all(4)
    before = snapshot(queue)
    go_on = make_event()

    class Listens(Stop):
        def wait(self, seconds=None):
            if seconds is None:
                # Its time is over, and it waits without an end.
                go_on.set()
            else:
                server.wait_for(lambda: are_held(server, 1))
            super().wait(seconds)

    with ScriptedSMTPServer({'.': Wait(go_on)}) as server:
        report = run_over(server, 4, stop=Listens(), max_seconds=0.1)

    assert report == RunReport(sent=1)
    assert brought(server) == m(0)
    assert snapshot(queue) == subset(before, names[1:])


def test_who_is_told_to_stop_while_the_time_is_over_does_not_wait_for_ever(
    run_over, queue, wait_all, make_event, monkeypatch
):
    monkeypatch.setattr(crew, 'STOP_SECONDS', 0)
    names = wait_all(3)
    told = []

    class StopsThen(Stop):
        def wait(self, seconds=None):
            if seconds is None and not self.requested:
                self.request()
            super().wait(seconds)

    stop = StopsThen(on_ending=lambda: told.append('ending'))
    with ScriptedSMTPServer({'RCPT': Wait(make_event())}) as server:
        report = run_over(server, stop=stop, max_seconds=0.2)

    assert (report, told) == (RunReport(stopped=True), ['ending'])
    assert sorted(snapshot(queue)) == sorted(names)


def test_what_a_rate_does_not_allow_waits_as_it_was(run_over, queue, wait_all, tmp_path):
    names = wait_all(12)
    before = snapshot(queue)
    rate = RateFile(tmp_path / 'rate', Rate(5, 3600))
    with ScriptedSMTPServer() as server:
        report = run_over(server, 4, rate=rate.take)
        again = run_over(server, 4, rate=rate.take)

    assert (report, again) == (RunReport(sent=5, rate_reached=True), RunReport(rate_reached=True))
    assert sorted(brought(server)) == m(*range(5))
    assert snapshot(queue) == subset(before, names[5:])


def test_each_recipient_is_taken_from_the_rate(run_over, queue, wait_since, tmp_path):
    for seconds in (3, 2, 1):
        wait_since(seconds, 'ada', 'bob')
    with ScriptedSMTPServer() as server:
        report = run_over(server, rate=RateFile(tmp_path / 'rate', Rate(5, 3600)).take)

    assert report == RunReport(sent=2, rate_reached=True)
    assert queue.state == {'waiting': 1}


def test_a_rate_that_allows_more_in_a_moment_is_waited_for(run_over, queue, wait_all, tmp_path):
    wait_all(6)
    with ScriptedSMTPServer() as server:
        report = run_over(server, 3, rate=RateFile(tmp_path / 'rate', Rate(2, 0.2)).take)

    assert report == RunReport(sent=6)
    assert sorted(brought(server)) == m(*range(6))


def test_a_rate_that_cannot_be_read_ends_the_run_and_nothing_is_sent(run_over, queue, wait_all, tmp_path):
    wait_all(3)
    before = snapshot(queue)
    with ScriptedSMTPServer() as server, pytest.raises(QueueError, match='rate_limit'):
        run_over(server, 4, rate=RateFile(tmp_path / 'no folder' / 'rate', Rate(5, 3600)).take)

    assert snapshot(queue) == before
    assert server.sessions == []


# --- told to stop, with several connections ---------------------------------


@pytest.fixture
def in_background():
    """Call something in a thread: ``in_background(call)`` returns a function that waits for what it returns."""
    threads = []

    def in_background(call):
        results = []
        threads.append(thread := threading.Thread(target=lambda: results.append(call())))
        thread.start()

        def result():
            thread.join(60)
            return results[0]

        return result

    yield in_background
    for thread in threads:
        thread.join(60)


def are_held(server, number, step=b'Subject'):
    """So many sessions have come to this."""
    return sum(step in session.received for session in server.sessions) >= number


def test_each_connection_finishes_its_message_in_hand_and_the_others_wait_as_they_were(
    run_over, queue, wait_all, make_event, in_background
):
    names = wait_all(20)
    before = snapshot(queue)
    go_on, stop = make_event(), Stop()
    with ScriptedSMTPServer({'.': [None, *[Wait(go_on)] * 4]}) as server:
        report = in_background(lambda: run_over(server, 4, stop=stop))
        # One was accepted, and each of the four has the next one, without a reply.
        server.wait_for(lambda: sum(session.received.count(b'\r\n.\r\n') for session in server.sessions) == 5)
        stop.request()
        go_on.set()
        finished = report()

    assert finished == RunReport(sent=5, stopped=True)
    assert len(brought(server)) == 5
    left = {name: it for name, it in before.items() if name in snapshot(queue)}
    assert snapshot(queue) == left
    assert len(left) == len(names) - 5


@pytest.mark.parametrize('step', ['MAIL', '.'])
def test_who_insists_breaks_off_all_connections_and_no_new_one_is_opened(
    run_over, queue, wait_all, make_event, in_background, step
):
    wait_all(20)
    before = snapshot(queue)
    never, stop = make_event(), Stop()
    # The first message makes the others begin; then each session has one more.
    script = {step: [None, *[Wait(never)] * 4]}
    with ScriptedSMTPServer(script) as server:
        report = in_background(lambda: run_over(server, 4, stop=stop))
        awaited = b'\r\n.\r\n' if step == '.' else b'MAIL'
        server.wait_for(lambda: sum(session.received.count(awaited) for session in server.sessions) == 5)
        server.wait_for(lambda: len(server.messages) == 1)
        stop.request()
        stop.request()
        finished = report()
        assert len(server.sessions) == 4

    unknown = 4 if step == '.' else 0
    after = snapshot(queue)
    assert (finished.deferred, finished.refused, finished.stopped) == (unknown, 0, True)
    assert sum(header.attempts for header in queue.headers('new')) == unknown
    assert len([name for name, it in after.items() if before.get(name) == it]) == 19 - unknown
    assert queue.state == {'waiting': 19}


def test_a_message_that_was_cut_short_between_two_transactions_was_stopped(run_over, queue, wait_since, told):
    wait_since(1, 'm0', 'm1', 'm2')
    stop = Stop()
    with ScriptedSMTPServer({'.': lambda command: stop.request()}) as server:
        report = run_over(server, stop=stop, smtp={'max_recipients': 2})

    assert report == RunReport(stopped=True)
    assert brought(server) == m(0, 1)
    assert [(header.recipients, header.attempts) for header in queue.headers('new')] == [(tuple(m(2)), 0)]
    assert told('status', 'to') == [('sent', name) for name in m(0, 1)]


def test_a_run_whose_waiting_is_interrupted_gives_back_nothing_that_is_still_being_delivered(
    run_over, queue, wait_all, make_event
):
    wait_all(3)

    class Interrupts(Stop):
        def wait(self, seconds=None):
            server.wait_for(lambda: are_held(server, 1))
            if not queue.files('new'):
                raise AssertionError('nothing is left')
            if not self.requested:
                self.requested = True
                raise KeyboardInterrupt
            super().wait(seconds)

    stop = Interrupts()
    with ScriptedSMTPServer({'.': Wait(make_event())}) as server, pytest.raises(KeyboardInterrupt):
        run_over(server, stop=stop)

    # Broken off, and its thread has settled it: the server has all of it.
    assert sorted(header.attempts for header in queue.headers('new')) == [0, 0, 1]
    assert len(server.sessions) == 1


# --- transports and policies of ones own, with several connections ----------


class Plain:
    """Nothing but ``send``, as a user may write it; it remembers whom it was asked for."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    def send(self, sender, recipients, content):
        self.asked.append(recipients)
        return self.answer(recipients)


def run_with(queue, transport, **options):
    return Runner(queue, MessageHandler([transport], connections=4, **options)).run()


def test_a_transport_that_only_sends_is_called_once_for_each_message(queue, wait_all):
    wait_all(30)
    transport = Plain(lambda recipients: True)

    assert run_with(queue, transport) == RunReport(sent=30)
    assert sorted(transport.asked) == sorted((name,) for name in m(*range(30)))


def test_a_transport_that_raises_or_refuses_for_some_disturbs_nobody_else(queue, wait_all, caplog):
    wait_all(12)

    def answer(recipients):
        number = int(recipients[0][1:].partition('@')[0])
        if number % 4 == 1:
            raise ZeroDivisionError('a defect of the transport')
        if number % 4 == 2:
            return False
        return number % 4 == 3 or SendResult({recipients[0]: NEVER})

    assert run_with(queue, Plain(answer)) == RunReport(sent=3, deferred=6, refused=3)
    assert queue.state == {'waiting': 6, 'dead': 3}
    assert {header.attempts for header in queue.headers('new')} == {1}
    assert caplog.text.count('ZeroDivisionError: a defect of the transport') == 3


class DefectFor:
    """A policy with a defect that shows for one recipient."""

    def __init__(self, recipient):
        self.recipient = recipient

    def decide(self, recipients, attempts, queued_at, result, now):
        if self.recipient in recipients:
            raise ZeroDivisionError('a defect of the policy')
        return ExponentialBackoff().decide(recipients, attempts, queued_at, result, now)


def test_a_policy_with_a_defect_ends_the_run_and_nothing_is_lost(queue, wait_all):
    wait_all(30)
    transport = Plain(lambda recipients: True)

    with pytest.raises(ZeroDivisionError, match='a defect of the policy'):
        run_with(queue, transport, retry_policy=DefectFor(m(5)[0]))

    # It stays claimed, so that its deaths are counted; the others were brought, or wait as they were.
    assert [header.recipients for header in queue.headers('cur')] == [tuple(m(5))]
    waiting = {header.recipients for header in queue.headers('new')}
    assert waiting.isdisjoint(transport.asked)
    assert len(waiting) + len(transport.asked) == 30
    assert {header.attempts for header in queue.headers('new')} <= {0}


def test_a_queue_that_cannot_be_read_any_more_ends_the_run_and_what_is_in_hand_is_finished(
    queue, wait_all, monkeypatch
):
    wait_all(6)
    claim_due = queue.claim_due

    def breaks_off(now):
        claims = claim_due(now)
        for _ in range(4):
            yield next(claims)
        raise QueueError('The folder cannot be read: Input/output error')

    monkeypatch.setattr(queue, 'claim_due', breaks_off)

    with pytest.raises(QueueError, match='cannot be read'):
        run_with(queue, Plain(lambda recipients: True))

    assert 'in progress' not in queue.state
    assert 2 <= queue.state['waiting'] <= 5


# --- threads that cannot be -------------------------------------------------


ENOUGH = {'MAIL': [None, None, None, Close('421 4.7.0 that is enough')]}


@pytest.fixture
def few_threads(monkeypatch):
    """Let no more threads be started for a run than so many."""
    start = threading.Thread.start

    def few_threads(number):
        started = []

        def start_if_there_is_room(thread):
            if thread.name in {'mailqueue-run', 'mailqueue-helper'}:
                if len(started) == number:
                    raise RuntimeError("can't start new thread")
                started.append(thread)
            start(thread)

        monkeypatch.setattr(threading.Thread, 'start', start_if_there_is_room)

    return few_threads


def test_if_no_more_threads_can_be_started_the_others_bring_everything(
    run_over, queue, wait_all, few_threads, in_background, make_event, until, caplog
):
    wait_all(12)
    few_threads(2)
    has_told = make_event()
    with ScriptedSMTPServer({'.': [None, Wait(has_told)]}) as server:
        run = in_background(lambda: run_over(server, 4))
        until(lambda: caplog.messages)
        has_told.set()
        report = run()

    assert report == RunReport(sent=12)
    assert (len(brought(server)), queue.state) == (12, {})
    assert len(server.sessions) == 2
    assert [record.message for record in caplog.records if record.levelname == 'WARNING'] == [
        "No more threads can be started (can't start new thread). The run goes on with fewer connections."
    ]


@pytest.mark.parametrize('number', [3, 4, 5, 6, 7])
def test_if_a_thread_cannot_be_had_in_the_midst_of_a_run_the_others_bring_everything(
    run_over, queue, wait_all, few_threads, number
):
    """With a session for each three messages, and somebody who has to wait for each second one, many are asked for."""
    wait_all(40)
    later = {f'RCPT TO:<m{n}@x.example>': '451 4.3.0 later' for n in range(1, 40, 2)}
    few_threads(number)
    with ScriptedSMTPServer(later, by_session=dict.fromkeys(range(99), ENOUGH)) as server:
        report = run_over(server, 3)

    assert sorted(brought(server)) == sorted(m(*range(0, 40, 2)))
    assert (report.trouble, report.stopped, queue.state) == (None, False, {'waiting': 20})
    assert [header.attempts for header in queue.headers('new')] == [1] * 20


def test_if_no_thread_at_all_can_be_started_nothing_has_happened(run_over, queue, wait_all, few_threads):
    wait_all(3)
    before = snapshot(queue)
    few_threads(0)
    with ScriptedSMTPServer() as server, pytest.raises(QueueError, match=r"can't start new thread.*ulimit -u"):
        run_over(server, 4)

    assert snapshot(queue) == before


# --- a server that keeps sessions waiting ------------------------------------


@pytest.mark.parametrize('step', ['connect', 'EHLO'])
def test_whom_the_server_keeps_waiting_keeps_no_message_and_is_not_waited_for(
    run_over, queue, wait_all, in_background, step
):
    wait_all(20)
    with ScriptedSMTPServer(by_session={number: {step: Silence()} for number in (1, 2, 3)}) as server:
        run = in_background(lambda: run_over(server, 4))
        # The others would wait for five minutes.
        report = run()
        server.wait_for(lambda: all(session.is_over for session in server.sessions))

    assert report == RunReport(sent=20)
    assert (len(brought(server)), queue.state) == (20, {})
    assert server.sessions[0].commands[-1] == 'QUIT'


def test_who_is_told_to_stop_while_the_first_session_is_opened_has_nothing_in_hand(
    run_over, queue, wait_all, in_background
):
    wait_all(3)
    before = snapshot(queue)
    stop = Stop(on_ending=lambda: pytest.fail('there is nothing to wait for'))
    with ScriptedSMTPServer({'connect': Silence()}) as server:
        run = in_background(lambda: run_over(server, 4, stop=stop))
        server.wait_for(lambda: server.sessions)
        stop.request()
        report = run()
        server.wait_for(lambda: server.sessions[0].is_over)

    assert report == RunReport(stopped=True)
    assert snapshot(queue) == before


def test_what_is_left_when_the_only_session_is_lost_waits_for_the_one_that_is_being_opened(
    run_over, queue, wait_all, in_background, make_event
):
    wait_all(10)
    greet = make_event()
    script = {0: ENOUGH, 1: {'connect': Wait(greet)}, 2: {'connect': Close('421 4.7.0 too many connections')}}
    with ScriptedSMTPServer(by_session=script) as server:
        run = in_background(lambda: run_over(server, 2))
        server.wait_for(lambda: len(server.sessions) == 3 and server.sessions[2].is_over)
        greet.set()
        report = run()

    assert report == RunReport(sent=10)
    assert sorted(brought(server)) == sorted(m(*range(10)))


def test_who_needs_another_session_does_not_wait_for_that_of_one_who_has_nothing_more_to_do(
    run_over, queue, wait_all, in_background, make_event
):
    wait_all(100)
    greet = make_event()
    enough = {'MAIL': [None, Close('421 4.7.0 that is enough')]}
    with ScriptedSMTPServer(by_session={1: enough, 2: {'connect': Wait(greet)}}) as server:
        run = in_background(lambda: run_over(server, 2))
        # The server has room for two sessions, and the third is greeted when one of them is over.
        server.wait_for(lambda: len(server.sessions) == 3 and server.sessions[0].is_over)
        greet.set()
        report = run()

    assert report == RunReport(sent=100)
    assert sorted(brought(server)) == sorted(m(*range(100)))


@pytest.mark.parametrize('step', ['connect', 'EHLO'])
def test_a_run_whose_time_is_over_before_a_session_was_opened_tells_of_trouble(run_over, queue, wait_all, step):
    wait_all(3)
    before = snapshot(queue)
    with ScriptedSMTPServer({step: Silence()}) as server:
        report = run_over(server, 4, max_seconds=0.2)

    assert str(report.trouble) == 'No session was opened in the 0.2 seconds of this run.'
    assert snapshot(queue) == before


def test_a_run_that_has_reached_its_rate_does_not_wait_for_sessions(run_over, queue, wait_all, in_background, tmp_path):
    wait_all(10)
    rate = RateFile(tmp_path / 'rate', Rate(3, 86400)).take
    with ScriptedSMTPServer(by_session={number: {'connect': Silence()} for number in (1, 2, 3)}) as server:
        report = in_background(lambda: run_over(server, 4, rate=rate))()

    assert report == RunReport(sent=3, rate_reached=True)
    assert queue.state == {'waiting': 7}


def test_nobody_connects_if_the_rate_allows_nothing(run_over, queue, wait_all, tmp_path):
    wait_all(3)
    rate = RateFile(tmp_path / 'rate', Rate(1, 86400)).take
    assert rate(1) == 0
    with ScriptedSMTPServer() as server:
        report = run_over(server, 4, rate=rate)

    assert report == RunReport(rate_reached=True)
    assert (server.sessions, queue.state) == ([], {'waiting': 3})


# --- more than one run ------------------------------------------------------


def test_a_run_ends_though_its_thread_takes_its_time_to_end(run_over, queue, wait_all, in_background):
    class Slow(Stop):
        def wake(self):
            super().wake()
            # The other thread looks now.
            time.sleep(0.2)

    wait_all(2)
    with ScriptedSMTPServer() as server:
        report = in_background(lambda: run_over(server, stop=Slow()))()

    assert report == RunReport(sent=2)


def test_runs_at_the_same_time_bring_each_message_once(queue, queue_dir, wait_all, run_over, in_background):
    wait_all(60)
    with ScriptedSMTPServer() as server:
        reports = [
            in_background(
                lambda: Runner(
                    type(queue)(queue_dir),
                    MessageHandler([SMTPTransport(hostname=server.host, port=server.port)], connections=2),
                ).run()
            )
            for _ in range(3)
        ]
        sent = sum(report().sent for report in reports)

    assert sent == len(brought(server)) == 60
    assert queue.state == {}


def test_a_message_that_waits_and_is_refused_is_one(run, wait_since, says):
    wait_since(2, 'ada', 'bob')
    wait_since(1, 'ada', 'bob')

    report = run(says(SendResult({ADA: LATER, BOB: NEVER})))

    assert (report.deferred, report.refused, report.done) == (2, 2, 2)


# --- dead letters -----------------------------------------------------------


def test_dead_letters_are_removed_a_few_in_each_round_and_not_looked_for_all_the_time(
    queue, envelope, says, monkeypatch
):
    monkeypatch.setattr(runner, 'MOST_EXPIRED', 2)
    for _ in range(5):
        queue.put(envelope('ada'))
    handler = MessageHandler([says(SendResult({ADA: NEVER}))])
    now = time.time()
    assert Runner(queue, handler, clock=lambda: now).run().refused == 5
    now += 1000

    def removed():
        return len(keeping.round().recovery.expired)

    keeping = Runner(queue, handler, keep_dead=500, clock=lambda: now)
    assert [removed(), queue.counts()['dead']] == [2, 3]
    assert [removed(), removed(), queue.counts()['dead']] == [2, 1, 0]

    asked = []
    monkeypatch.setattr(
        'pyramid_mailqueue.queues.maildir.admin.MaildirAdmin.expire', lambda *told: asked.append(told) or []
    )
    keeping.round()
    assert asked == []
    now += runner.EXPIRE_EVERY
    keeping.round()
    assert [(before, most) for _, before, most in asked] == [(now - 500, 2)]


def test_without_a_limit_dead_letters_are_kept(queue, envelope, says):
    queue.put(envelope('ada'))
    handler = MessageHandler([says(SendResult({ADA: NEVER}))])
    Runner(queue, handler).run()

    report = Runner(queue, handler, clock=lambda: time.time() + 10**9).run()

    assert (report.recovery, queue.counts()['dead']) == (Recovery(), 1)


def test_a_queue_that_cannot_remove_dead_letters_is_a_matter_of_configuration(queue, says):
    class Plain:
        """A queue without a word for people."""

    with pytest.raises(ConfigurationError, match=r'^mailqueue\.keep_dead: this queue cannot'):
        Runner(Plain(), MessageHandler([says(YES)]), keep_dead=1)
    Runner(Plain(), MessageHandler([says(YES)]))
