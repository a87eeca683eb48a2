"""After the commit: in the request's thread, or in one of our own, over forks, outages and the end of the process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from types import ModuleType

import pytest
import transaction
from zope.interface.verify import verifyObject

from pyramid_mailqueue import mailer_from_settings
from pyramid_mailqueue.delivery import dispatch
from pyramid_mailqueue.delivery.backoff import BackOff
from pyramid_mailqueue.delivery.dispatch import BackgroundDispatcher, InlineDispatcher, threads_run_here
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.retry import ExponentialBackoff
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.interfaces import IDispatcher
from pyramid_mailqueue.queues.rate_file import RateFile
from pyramid_mailqueue.results import Settlement
from pyramid_mailqueue.settings import Rate
from pyramid_mailqueue.testing import Close, ScriptedSMTPServer, Wait
from pyramid_mailqueue.transports.smtp import SMTPTransport

# The simplest answers.
YES, NO = True, False


@pytest.fixture
def server():
    with ScriptedSMTPServer() as server:
        yield server


@pytest.fixture
def held(server, make_event):
    """A server that has the first message and does not say so until ``held.set()``."""
    event = make_event()
    server.script['.'] = [Wait(event)]
    return event


@pytest.fixture
def handler(server):
    handler = MessageHandler([SMTPTransport(hostname=server.host, port=server.port, local_hostname='app.example')])
    yield handler
    handler.close()


@pytest.fixture
def make_background(queue):
    dispatchers = []

    def make_background(handler, **options):
        dispatchers.append(BackgroundDispatcher(handler, queue, **options))
        return dispatchers[-1]

    yield make_background
    for dispatcher in dispatchers:
        dispatcher.close()


@pytest.fixture
def background(make_background, handler):
    return make_background(handler)


@pytest.fixture
def claims(queue, envelope):
    """Put some messages into the queue, claimed: ``claims(3)``."""

    def claims(count):
        return [queue.claimed(envelope()) for _ in range(count)]

    return claims


def told_left(count):
    """What the log says of *count* messages that are left to mq-run."""
    return (
        f'Messages left in the queue for mq-run, because this process stops delivering: {count}. In a script set '
        'mailqueue.delivery = inline, which delivers them before the commit returns.'
    )


def threads():
    return [thread for thread in threading.enumerate() if thread.name == 'mailqueue-delivery']


def has_begun(server):
    """The first message is with the server, which has not replied to it."""
    return any('DATA' in session.commands for session in server.sessions)


def is_free(queue, name):
    """Whether nobody holds a waiting message."""
    file = queue.take('new', name)
    if file is not None:
        file.close()
    return file is not None


# --- background -------------------------------------------------------------


def test_the_dispatchers_are_what_they_say(background, handler, queue):
    assert verifyObject(IDispatcher, background)
    assert verifyObject(IDispatcher, InlineDispatcher(handler, queue))


def test_the_request_does_not_wait_for_the_server(background, claims, queue, server, held, until):
    background.dispatch(claims(1))
    in_time = queue.state
    held.set()
    until(lambda: not queue.state)

    assert in_time == {'in progress': 1}
    assert len(server.messages) == 1


def test_one_thread_and_one_session_serve_all_the_mail(background, claims, queue, server, until):
    before = threads()
    for _ in range(20):
        background.dispatch(claims(2))
        assert len(threads()) == 1
    until(lambda: not queue.state)

    assert before == []
    assert threads()[0].daemon
    assert (len(server.messages), len(server.sessions)) == (40, 1)


def test_mail_that_comes_fast_is_a_stream(background, claims, queue, server, held, until):
    background.dispatch(claims(1))
    server.wait_for(lambda: has_begun(server))
    background.dispatch(claims(20))
    held.set()
    until(lambda: not queue.state)

    # One for each message, and for the first of the stream one more.
    assert server.sessions[0].round_trips == len(['EHLO', 'MAIL RCPT DATA', 'DATA', 'MAIL RCPT DATA']) + 20


def test_the_session_stays_warm_from_mail_to_mail(background, claims, queue, server, until):
    for _ in range(5):
        background.dispatch(claims(1))
        until(lambda: not queue.state)

    assert (len(server.messages), len(server.sessions)) == (5, 1)


def test_nothing_to_dispatch_starts_no_thread(background):
    background.dispatch([])

    assert threads() == []


def test_what_was_delivered_is_made_durable_when_there_is_no_more(background, claims, queue, until):
    background.dispatch(claims(3))

    until(lambda: queue.flushes)

    assert queue.state == {}


def test_beyond_256_messages_wait_for_mq_run(background, claims, queue, server, held, until):
    background.dispatch(claims(1))
    server.wait_for(lambda: has_begun(server))
    background.dispatch(claims(260))
    kept = queue.state
    held.set()
    until(lambda: queue.state == {'waiting': 4})

    # One in hand, 256 behind it.
    assert kept == {'in progress': 257, 'waiting': 4}
    assert [header.attempts for header in queue.headers('new')] == [0] * 4


def test_when_the_server_is_in_trouble_everything_is_released_at_once(
    make_background, claims, queue, says, trouble, until, caplog
):
    transport = says(trouble)
    background = make_background(MessageHandler([transport]))

    background.dispatch(claims(5))
    until(lambda: queue.state == {'waiting': 5})
    background.dispatch(claims(2))

    # No time limit: the last two never waited for the thread.
    assert queue.state == {'waiting': 7}
    assert len(transport.asked) == 1
    assert [header.attempts for header in queue.headers('new')] == [0] * 7
    assert caplog.messages == ['mail.example:25 is down Mail waits in the queue.']


@pytest.fixture
def make_backing_off(make_background):
    """A dispatcher over one transport that backs off as *backoff* says."""

    def make_backing_off(transport, backoff, **options):
        handler = MessageHandler([transport])
        (route,) = handler.routes
        route.backoff = backoff
        return make_background(handler, **options)

    return make_backing_off


def test_what_waits_since_a_trouble_is_tried_again_after_the_back_off(
    make_backing_off, claims, queue, says, trouble, until
):
    transport = says(trouble, trouble, YES)

    make_backing_off(transport, BackOff(first=0.01, longest=0.02)).dispatch(claims(3))

    # Twice in vain, with a back-off after each, and then one after the other.
    until(lambda: len(transport.asked) == 5)
    until(lambda: queue.state == {})


def test_what_is_sent_during_a_back_off_is_tried_after_it(make_backing_off, claims, queue, says, trouble, until):
    backoff = BackOff(first=0.2)
    background = make_backing_off(says(YES), backoff, idle=60)
    background.dispatch(claims(1))
    until(lambda: queue.state == {})

    # Not the thread has seen the trouble, so it waits for new mail.
    backoff.begin(trouble)
    background.dispatch(claims(2))
    # It waits for longer than until() does: it is the back-off that has ended, not the waiting.
    until(lambda: queue.state == {})


def test_a_queue_that_is_away_when_a_back_off_ends_is_told_of_once_and_asked_again(
    make_backing_off, queue, claims, says, trouble, until, caplog, monkeypatch
):
    def claim(id):
        asked.append(id)
        if len(asked) < 4:
            raise QueueError('The database is away.')
        return queue_claim(id)

    queue_claim, asked, backoff = queue.claim, [], BackOff()
    monkeypatch.setattr(queue, 'claim', claim)
    background = make_backing_off(says(YES), backoff)
    background._queue_backoff = BackOff(first=0.01)
    backoff.begin(trouble)
    background.dispatch(claims(2))
    backoff.end()
    background.dispatch(claims(1))
    until(lambda: queue.state == {})

    assert caplog.messages == ['The database is away. Postponed mail waits in it, until it is back.']
    assert len({*asked[:4]}) == 1


def test_what_somebody_else_took_during_a_back_off_is_left_to_them(
    make_backing_off, claims, queue, says, trouble, until
):
    transport, backoff = says(YES), BackOff()
    background = make_backing_off(transport, backoff)
    backoff.begin(trouble)
    background.dispatch(claims(3))
    taken, gone, left = queue.claim_due(time.time())
    gone.settle(Settlement())
    taken.settle(Settlement(taken.envelope.recipients, due=time.time() + 1000))
    left.release()

    backoff.end()
    background.dispatch(claims(1))
    until(lambda: queue.state == {'waiting': 1})

    assert len(transport.asked) == 2


@pytest.mark.parametrize('step', ['MAIL', 'RCPT'])
def test_one_message_that_makes_the_server_hang_up_holds_nobody_back(
    make_backing_off, claims, queue, until, caplog, step
):
    with ScriptedSMTPServer({step: [Close()]}) as server:
        transport = SMTPTransport(hostname=server.host, port=server.port, local_hostname='app.example')
        make_backing_off(transport, BackOff(first=300)).dispatch(claims(3))
        until(lambda: len(server.messages) == 2 and queue.state == {'waiting': 1})

        # It is not tried again and again, but left to mq-run.
        assert len(server.sessions) == 2
        transport.close()

    (bad,) = [file.name.partition(',')[0] for file in queue.files('new')]
    assert any(record.getMessage().endswith(f'The message {bad} waits.') for record in caplog.records)


def test_over_a_back_off_the_first_messages_are_remembered(make_backing_off, claims, queue, says, trouble, until):
    backoff = BackOff()
    background = make_backing_off(says(YES), backoff, max_claims=2)
    backoff.begin(trouble)
    waiting = claims(4)
    background.dispatch(waiting)

    backoff.end()
    background.dispatch(claims(1))
    until(lambda: queue.state == {'waiting': 2})

    assert {file.name for file in queue.files('new')} == {claim.id for claim in waiting[2:]}


class Sick(BaseException):
    pass


class Once(ExponentialBackoff):
    """A policy whose first decision is an error."""

    def __init__(self, error):
        super().__init__()
        self.errors = [error]

    def decide(self, *attempt):
        if self.errors:
            raise self.errors.pop()
        return super().decide(*attempt)


@pytest.mark.parametrize('error', [Sick, SystemExit, KeyboardInterrupt])
def test_whatever_happens_to_the_thread_is_told_and_it_goes_on_with_what_waits(
    make_background, claims, queue, says, until, caplog, error
):
    transport = says(YES)
    make_background(MessageHandler([transport], retry_policy=Once(error))).dispatch(claims(3))
    until(lambda: len(transport.asked) == 3 and queue.state == {})

    (record,) = [record for record in caplog.records if record.levelname == 'CRITICAL']
    assert record.message == 'The delivery thread was about to end, and goes on'
    assert record.exc_info[0] is error
    assert len(threads()) == 1


@pytest.mark.parametrize('error', [Sick, SystemExit, KeyboardInterrupt])
def test_inline_lets_go_whoever_wants_to_end_and_begins_with_nothing_more(claims, queue, says, caplog, error):
    transport = says(YES)
    inline = InlineDispatcher(MessageHandler([transport], retry_policy=Once(error)), queue)

    with pytest.raises(error):
        inline.dispatch(claims(3))

    assert (len(transport.asked), queue.state) == (1, {'waiting': 2}), 'what was sent is not sent again'
    assert caplog.messages == []


# --- idle mailers -----------------------------------------------------------


def test_a_process_with_one_mailer_for_each_message_has_no_thread_for_each(make_settings, smtp_server, message, until):
    sessions = []
    for number in range(30):
        manager = transaction.TransactionManager(explicit=True)
        mailer = mailer_from_settings(make_settings(smtp_server), manager=manager)
        with manager:
            mailer.send(message(f'number {number}'))
        sessions.append(weakref.ref(mailer))
        del mailer, manager
    smtp_server.wait_for(30)

    # Not after IDLE seconds, and not thanks to the garbage collector.
    began = time.monotonic()
    until(lambda: not threads())
    assert time.monotonic() - began < dispatch.IDLE / 2
    assert [reference() for reference in sessions] == [None] * 30


def test_what_only_waits_for_the_thread_is_no_orphan_when_the_process_is_killed(queue, server, held, envelope):
    child = run_python(KILLED, queue.path, server.port, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        server.wait_for(lambda: has_begun(server), 30)
        assert child.stdout.readline() == 'committed\n'
    finally:
        child.kill()
        child.communicate()

    recovery = queue.recover(time.time())

    # The one that is with the server, and the one that is spoken of meanwhile.
    assert len(recovery.orphans) <= 2
    assert queue.state == {'waiting': 100}
    assert sorted(claim.deaths for claim in queue.claim_due(time.time()))[:-2] == [0] * 98


def test_a_receiver_that_wants_to_exit_ends_nothing(background, claims, queue, server, until, listen):
    def receiver(sender, msg, send_result):
        raise SystemExit

    listen('mq:delivery_successful', receiver)
    background.dispatch(claims(3))
    until(lambda: queue.state == {})

    assert len(server.messages) == 3


def test_who_closes_during_a_back_off_does_not_wait_for_its_end(make_backing_off, claims, queue, says, trouble, until):
    background = make_backing_off(says(trouble), BackOff(first=300))
    background.dispatch(claims(1))
    until(lambda: queue.state == {'waiting': 1})

    background.close()

    assert threads() == []
    assert queue.state == {'waiting': 1}


class Defect:
    """A policy for retries that has one."""

    def decide(self, recipients, attempts, queued_at, result, now):
        raise ZeroDivisionError('a defect')


def test_a_defect_releases_the_message_and_the_thread_goes_on(make_background, claims, queue, says, until, caplog):
    background = make_background(MessageHandler([says(YES)], retry_policy=Defect()))

    background.dispatch(claims(2))
    until(lambda: queue.state == {'waiting': 2})

    assert len(threads()) == 1
    assert [record.levelname for record in caplog.records] == ['CRITICAL'] * 2
    assert 'ZeroDivisionError: a defect' in caplog.text


def test_where_no_thread_can_be_started_mail_waits(background, claims, queue, monkeypatch, caplog):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, 'start', start)
        background.dispatch(claims(1))

    assert queue.state == {'waiting': 1}
    assert caplog.messages == [
        "No delivery thread can be started (can't start new thread); mail waits in the queue, for mq-run"
    ]


# --- the end of the thread --------------------------------------------------


def test_the_thread_ends_when_it_is_idle_and_the_next_mail_starts_another(
    make_background, handler, claims, queue, server, until
):
    background = make_background(handler, idle=0.01)
    for _ in range(3):
        background.dispatch(claims(1))
        until(lambda: not queue.state and not threads())

    assert len(server.messages) == 3


def test_no_mail_is_left_behind_by_a_thread_that_ends(make_background, claims, queue, says, until):
    transport = says(YES)
    background = make_background(MessageHandler([transport]), idle=0)
    for _ in range(200):
        background.dispatch(claims(1))
    until(lambda: not queue.state)

    assert len(transport.asked) == 200


def test_a_dispatcher_that_nobody_needs_any_more_goes_away(queue, claims, says, until):
    background = BackgroundDispatcher(MessageHandler([says(YES)]), queue, idle=0)
    background.dispatch(claims(1))
    reference = weakref.ref(background)
    del background

    until(lambda: not threads() and (gc.collect(), reference() is None)[1])


def test_close_ends_the_thread_and_the_session(background, claims, queue, server, until):
    background.dispatch(claims(1))
    until(lambda: not queue.state)
    background.close()
    background.close()

    assert threads() == []
    server.wait_for(lambda: server.sessions[0].is_over)
    assert server.sessions[0].commands[-1] == 'QUIT'


def test_close_waits_for_the_message_in_hand_and_releases_the_others(background, claims, queue, server, held, until):
    background.dispatch(claims(1))
    server.wait_for(lambda: has_begun(server))
    background.dispatch(claims(3))
    closing = threading.Thread(target=background.close)
    closing.start()
    until(lambda: queue.state == {'in progress': 1, 'waiting': 3})
    held.set()
    closing.join()

    assert queue.state == {'waiting': 3}
    assert len(server.messages) == 1
    assert threads() == []


def test_close_does_not_wait_for_ever_and_what_has_said_what_it_wants_is_as_it_was(
    make_background, handler, claims, queue, server, held
):
    background = make_background(handler, patience=0.01)
    first, *others = claims(4)
    background.dispatch([first])
    server.wait_for(lambda: has_begun(server))
    background.dispatch(others)
    background.close()
    held.set()

    assert threads() == []
    assert queue.state == {'waiting': 4}
    headers = {file.name: header for file, header in zip(queue.files('new'), queue.headers('new'), strict=True)}
    assert 'may have been delivered' in headers[first.id].last_reply
    assert [headers[claim.id].attempts for claim in (first, *others)] == [1, 0, 0, 0]


def test_close_leaves_a_transport_that_cannot_be_broken_off_to_the_end_of_the_process(
    make_background, claims, queue, make_event, until, monkeypatch
):
    class Hanging:
        asked = 0

        def send(self, sender, recipients, content):
            Hanging.asked += 1
            event.wait()
            return YES

    event = make_event()
    monkeypatch.setattr(dispatch, 'ABORT_SECONDS', 0.01)
    background = make_background(MessageHandler([Hanging()]), patience=0.01)
    background.dispatch(claims(2))
    until(lambda: Hanging.asked)
    background.close()
    during = queue.state
    event.set()
    until(lambda: not threads())

    assert during == {'in progress': 1, 'waiting': 1}
    assert queue.state == {'waiting': 1}


@pytest.fixture
def close(caplog):
    """Close a dispatcher, twice, and return what that has logged."""

    def close(background):
        caplog.clear()
        background.close()
        background.close()
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    return close


def test_what_is_left_counts_what_found_no_place_in_the_thread(
    make_background, handler, claims, queue, server, held, close
):
    background = make_background(handler, max_claims=2, patience=0.01)
    background.dispatch(claims(1))
    server.wait_for(lambda: has_begun(server))
    background.dispatch(claims(5))

    assert close(background) == [('WARNING', told_left(6))]
    assert queue.state == {'waiting': 6}


def test_what_is_left_counts_what_waits_since_a_trouble(make_backing_off, claims, queue, says, trouble, until, close):
    background = make_backing_off(says(trouble), BackOff(first=300), max_claims=2)
    background.dispatch(claims(1))
    until(lambda: queue.state == {'waiting': 1})
    background.dispatch(claims(3))

    assert close(background) == [('WARNING', told_left(4))]


def test_what_is_left_counts_what_a_transport_does_not_let_go_of(
    make_background, claims, says, make_event, until, close
):
    event = make_event()
    transport = says(YES)
    answer = transport.send
    transport.send = lambda *envelope: (answer(*envelope), event.wait())[0]
    background = make_background(MessageHandler([transport]), patience=0.01)
    background.dispatch(claims(3))
    until(lambda: transport.asked)

    assert close(background) == [('WARNING', told_left(3))]


def test_what_is_left_counts_what_a_defect_has_given_back(make_background, claims, queue, says, until, close):
    background = make_background(MessageHandler([says(YES)], retry_policy=Defect()))
    background.dispatch(claims(2))
    until(lambda: queue.state == {'waiting': 2})

    assert close(background) == [('WARNING', told_left(2))]


def test_nothing_is_said_where_nothing_is_left(background, claims, queue, until, close):
    background.dispatch(claims(3))
    until(lambda: not queue.state)

    assert close(background) == []


def test_what_was_left_before_the_thread_was_idle_is_no_news(
    make_background, handler, claims, queue, server, held, until, close
):
    background = make_background(handler, max_claims=1, idle=0.01)
    background.dispatch(claims(1))
    server.wait_for(lambda: has_begun(server))
    background.dispatch(claims(3))
    held.set()
    until(lambda: queue.state == {'waiting': 2} and not threads())

    assert close(background) == []


def test_after_close_mail_waits(background, claims, queue):
    background.close()
    background.dispatch(claims(2))

    assert queue.state == {'waiting': 2}
    assert threads() == []


# --- forks ------------------------------------------------------------------


@pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning')
def test_a_forked_child_delivers_its_own_mail_and_leaves_its_parents_alone(
    background, queue, envelope, claims, server, held, until, caplog
):
    background.dispatch(claims(1))
    server.wait_for(lambda: has_begun(server))
    background.dispatch(claims(2))

    child = os.fork()
    if not child:
        status = 1
        try:
            assert threads() == []
            background.dispatch([queue.claimed(envelope('child'))])
            until(lambda: queue.state == {'in progress': 3})
            caplog.clear()
            background.close()
            # What the parent has in hand is not left by the child.
            assert caplog.messages == []
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    after_the_child = queue.state, [message.recipients for message in server.messages]
    held.set()
    until(lambda: not queue.state)

    assert status == 0
    # The child's is delivered, over a connection of its own; the three of the parent are still in its hands.
    assert after_the_child == ({'in progress': 3}, [('child@x.example',)])
    assert [len(server.messages), len(server.sessions)] == [4, 2]
    assert len(threads()) == 1


def run_python(code, *arguments, **options):
    return subprocess.Popen([sys.executable, '-c', code, *map(str, arguments)], text=True, **options)


def test_a_child_that_python_was_not_told_of_has_a_thread_of_its_own_too(
    make_background, claims, queue, says, make_event, until
):
    """uWSGI forks without a word to Python: the parent's thread seems to live, and only the process id has changed."""
    transport = says(YES)
    background = make_background(MessageHandler([transport]))
    background._thread = threading.Thread(target=make_event().wait)
    background._thread.start()
    background._claims.put(*claims(1))
    background._pid = os.getppid()

    background.dispatch(claims(1))
    until(lambda: transport.asked and not background._claims.qsize())
    background.close()

    assert len(transport.asked) == 1
    assert queue.state == {'in progress': 1}


# --- the end of the process -------------------------------------------------

KILLED = """
import sys, transaction
from pyramid_mailqueue import mailer_from_settings
mailer = mailer_from_settings({
    'mailqueue.queue_dir': sys.argv[1], 'mailqueue.smtp_hostname': '127.0.0.1', 'mailqueue.smtp_port': sys.argv[2],
})
with transaction.manager:
    for _ in range(100):
        mailer.send(b'\\r\\n', 'shop@site.example', ['ada@x.example'])
print('committed', flush=True)
input()
"""

LEAVE = """
import atexit, sys
from pyramid_mailqueue.delivery.dispatch import BackgroundDispatcher
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.transports.smtp import SMTPTransport

queue = MaildirQueue(sys.argv[1])
handler = MessageHandler([SMTPTransport(hostname='127.0.0.1', port=int(sys.argv[2]), local_hostname='app.example')])
dispatcher = BackgroundDispatcher(handler, queue, **eval(sys.argv[3]))
# Called before the dispatcher is, which was registered earlier.
atexit.register(print, 'leaving', flush=True)
envelope = Envelope('', ('ada@x.example',), b'')
dispatcher.dispatch([queue.put_claimed(envelope) for _ in range(4)])
input()
"""


@pytest.fixture
def leaving(queue, server):
    """Start a process that dispatches four messages, and has it leave while the server holds the first of them."""
    processes = []

    def leaving(**options):
        process = run_python(
            LEAVE, queue.path, server.port, options, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        processes.append(process)
        server.wait_for(lambda: has_begun(server), 30)
        process.stdin.write('\n')
        process.stdin.flush()
        assert process.stdout.readline() == 'leaving\n'
        return process

    yield leaving
    for process in processes:
        process.kill()
        process.communicate()


def test_a_process_that_ends_finishes_the_message_in_hand(leaving, queue, server, held, until):
    process = leaving()
    # The next one has said what it wants, and not begun with its content.
    until(lambda: queue.state == {'in progress': 2, 'waiting': 2})
    held.set()
    _, errors = process.communicate(timeout=30)

    assert (process.returncode, errors) == (0, told_left(3) + '\n')
    assert queue.state == {'waiting': 3}
    assert len(server.messages) == 1


def test_a_process_ends_though_the_server_hangs(leaving, queue, server, held):
    process = leaving(patience=0.1)
    _, errors = process.communicate(timeout=30)

    assert (process.returncode, errors) == (0, told_left(4) + '\n')
    assert queue.state == {'waiting': 4}
    assert queue.recover(time.time()).orphans == ()
    assert sorted(header.attempts for header in queue.headers('new')) == [0, 0, 0, 1]


def test_the_end_of_a_process_waits_five_seconds_at_most(background):
    assert background._patience == dispatch.STOP_SECONDS == 5


WAITRESS = """
import signal, sys, transaction
from waitress import serve
from pyramid_mailqueue import mailer_from_settings

mailer = mailer_from_settings({
    'mailqueue.queue_dir': sys.argv[1], 'mailqueue.smtp_hostname': '127.0.0.1', 'mailqueue.smtp_port': sys.argv[2],
})
# As docs/deployment.rst says.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with transaction.manager:
    for _ in range(5):
        mailer.send(b'\\r\\n', 'shop@site.example', ['ada@x.example'])
serve(lambda *_: [], listen='127.0.0.1:0')
"""


def test_waitress_gives_back_what_waits_at_sigterm_where_it_is_told_to(queue, server, held, until):
    process = run_python(WAITRESS, queue.path, server.port, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        server.wait_for(lambda: has_begun(server), 30)
        process.send_signal(signal.SIGTERM)
        until(lambda: any(is_free(queue, path.name) for path in queue.files('new')))
        held.set()
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()

    assert process.returncode == 0, errors
    assert queue.recover(time.time()).orphans == ()
    assert queue.state == {'waiting': 5 - len(server.messages)}


# --- inline -----------------------------------------------------------------


def test_inline_delivers_before_it_returns(handler, claims, queue, server):
    inline = InlineDispatcher(handler, queue)

    inline.dispatch(claims(3))

    assert queue.state == {}
    assert (len(server.messages), len(server.sessions)) == (3, 1)
    assert queue.flushes == 1
    assert threads() == []


def test_inline_tries_once_while_the_server_is_in_trouble(claims, queue, says, trouble):
    transport = says(trouble)

    InlineDispatcher(MessageHandler([transport]), queue).dispatch(claims(3))

    assert len(transport.asked) == 1
    assert queue.state == {'waiting': 3}


class CutShort(BaseException):
    """As a server's time limit for a request is."""


def test_a_request_that_is_cut_short_keeps_no_claim(claims, queue, says):
    inline = InlineDispatcher(MessageHandler([says(YES, CutShort(), YES)]), queue)

    with pytest.raises(CutShort):
        inline.dispatch(claims(3))

    assert queue.state == {'waiting': 2}


def test_inline_closes_the_transports(says, queue):
    transport = says(YES)

    InlineDispatcher(MessageHandler([transport]), queue).close()

    assert transport.closed == 1


# --- a rate -----------------------------------------------------------------


@pytest.fixture
def rated(tmp_path):
    """A handler over one transport that sends no more than *rate* allows: ``rated(transport, rate)``."""

    def rated(transport, rate):
        return MessageHandler([transport], take_from_rate=RateFile(tmp_path / 'rate', rate).take)

    return rated


def waiting(queue):
    """Everything that could change of the waiting messages, by name."""
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in queue.files('new')}


def test_what_the_rate_does_not_allow_waits_in_the_queue_as_it_was(
    make_background, rated, claims, queue, says, until, told
):
    transport = says(YES)
    burst = claims(5)
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in queue.files('cur')}
    background = make_background(rated(transport, Rate(2, 3600)))
    background.dispatch(burst)
    until(lambda: queue.state == {'waiting': 3})

    # Nor does what comes later overtake it, or wait for the thread.
    background.dispatch(claims(1))
    assert queue.state == {'waiting': 4}
    assert len(transport.asked) == 2
    assert {claim.id: before[claim.id] for claim in burst[2:]}.items() < waiting(queue).items()
    assert told('status') == [('sent',)] * 2


def test_the_thread_comes_back_to_what_the_rate_did_not_allow(make_background, rated, queue, envelope, says, until):
    transport = says(YES)
    # It waits for longer than until() does: it comes back for them.
    background = make_background(rated(transport, Rate(2, 0.1)), idle=60)
    background.dispatch([queue.claimed(envelope(f'r{number}')) for number in range(7)])
    until(lambda: queue.state == {})

    assert sorted(transport.asked) == [(f'r{number}@x.example',) for number in range(7)]
    assert len(threads()) == 1


def test_two_processes_and_a_run_keep_one_rate_together(make_background, rated, claims, queue, says, until):
    transports = [says(YES) for _ in range(3)]
    rate = Rate(5, 3600)
    for transport in transports[:2]:
        make_background(rated(transport, rate)).dispatch(claims(4))
    until(lambda: queue.state == {'waiting': 3})

    report = Runner(queue, rated(transports[2], rate)).run()

    assert (report.sent, report.rate_reached) == (0, True)
    assert [len(transport.asked) for transport in transports] in ([4, 1, 0], [3, 2, 0], [2, 3, 0], [1, 4, 0])
    assert queue.state == {'waiting': 3}


def test_the_rate_of_a_message_is_that_of_all_its_recipients(make_background, rated, queue, envelope, says, until):
    transport = says(YES)
    background = make_background(rated(transport, Rate(3, 3600)))
    background.dispatch([queue.claimed(envelope('ada', 'bob')) for _ in range(2)])
    until(lambda: queue.state == {'waiting': 1})

    assert len(transport.asked) == 1


def test_inline_leaves_what_the_rate_does_not_allow_to_mq_run(rated, claims, queue, says):
    transport = says(YES)

    InlineDispatcher(rated(transport, Rate(2, 3600)), queue).dispatch(claims(5))

    assert len(transport.asked) == 2
    assert queue.state == {'waiting': 3}


def test_while_the_rate_cannot_be_read_nothing_is_sent_and_that_is_told_once(claims, queue, says, tmp_path, caplog):
    transport = says(YES)
    handler = MessageHandler([transport], take_from_rate=RateFile(tmp_path / 'nowhere' / 'rate', Rate(2, 1)).take)

    InlineDispatcher(handler, queue).dispatch(claims(5))

    assert transport.asked == []
    assert queue.state == {'waiting': 5}
    (error,) = [record.message for record in caplog.records if record.levelname == 'ERROR']
    assert 'mailqueue.rate_limit' in error
    assert error.endswith('Mail waits in the queue.')


# --- uWSGI ------------------------------------------------------------------


@pytest.mark.parametrize(
    ('attributes', 'expected'),
    [
        (None, True),
        # Somebody else's module of that name.
        ({}, True),
        ({'opt': {}}, False),
        ({'opt': {'http': b':8080', 'master': True}}, False),
        ({'opt': {'enable-threads': True}}, True),
        ({'opt': {b'enable-threads': b'true'}}, True),
        ({'opt': {b'threads': b'4'}}, True),
        # What uWSGI itself says of it goes before its options: since 2.0.28 threads are enabled by default.
        ({'opt': {}, 'has_threads': 1}, True),
        ({'opt': {'enable-threads': b'false'}, 'has_threads': 0}, False),
    ],
)
def test_under_uwsgi_threads_run_only_if_it_says_so(monkeypatch, attributes, expected):
    monkeypatch.delitem(sys.modules, 'uwsgi', raising=False)
    if attributes is not None:
        uwsgi = ModuleType('uwsgi')
        vars(uwsgi).update(attributes)
        monkeypatch.setitem(sys.modules, 'uwsgi', uwsgi)

    assert threads_run_here() == expected
