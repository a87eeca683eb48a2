"""Plugins as they are installed: distributions with entry points, found on the path."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.plugins import GROUP, MQAction, MQSignal, PluginRegistry, registry
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import Burial, Reply, SendResult, Settlement
from tests.parts.connections import Given, deliver_all

YES, NO = True, False
ADA, BOB, EVE = 'ada@x.example', 'bob@x.example', 'eve@x.example'
OK, LATER, NEVER = Reply(250, 'ok', '2.1.5'), Reply(451, 'later', '4.3.0'), Reply(550, 'no such user', '5.1.1')
FIVE_MINUTES = 300

GOOD = """
from pyramid_mailqueue.delivery.plugins import MQSignal

heard, steps = [], []

def initialize(context, registry):
    steps.append('initialized')
    context['registry'] = registry
    registry.connect(MQSignal.delivery_successful, hear)

def terminate(context):
    steps.append('terminated')
    context['registry'].disconnect(MQSignal.delivery_successful, hear)

def hear(sender, msg, send_result):
    heard.append(msg.id)
"""
BAD_AT_IMPORT = 'raise RuntimeError("a defect at its import")'
BAD_AT_START = """
def initialize(context, registry):
    raise RuntimeError("a defect at its start")
"""
BAD_BY_EXIT = 'raise SystemExit("a defect that ends the process")'
BAD_BY_CANCELLATION = 'import asyncio\nraise asyncio.CancelledError("a defect that is no Exception")'
HANGS = """
import threading
from contextlib import closing
from types import SimpleNamespace
go_on, steps = threading.Event(), []
if AT_IMPORT:
    go_on.wait(30)

def initialize(context, registry):
    go_on.wait(30)
    steps.append('initialized')

def terminate(context):
    steps.append('terminated')
"""
BAD_AT_END = """
def initialize(context, registry):
    pass

def terminate(context):
    raise RuntimeError("a defect at its end")
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution with one plugin: ``install(name, code)``; the plugin's module is ``plugin_`` + name."""
    modules = []

    def install(name, code, attribute=''):
        (tmp_path / f'plugin_{name}.py').write_text(code)
        info = tmp_path / f'plugin_{name}-1.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: plugin_{name}\nVersion: 1.0\n')
        (info / 'entry_points.txt').write_text(f'[{GROUP}]\n{name} = plugin_{name}{attribute and f":{attribute}"}\n')
        modules.append(f'plugin_{name}')

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    registry.terminate()
    for module in modules:
        sys.modules.pop(module, None)


def plugin(name):
    return sys.modules[f'plugin_{name}']


@pytest.fixture
def plugins(install):
    """A registry of its own."""
    return PluginRegistry()


def test_a_plugin_is_loaded_with_the_first_message_and_hears_of_each(install, queue, envelope, says):
    install('good', GOOD)
    handler = MessageHandler([says(YES)], plugins=['good'])
    before = 'plugin_good' in sys.modules
    claims = [queue.claimed(envelope()) for _ in range(2)]

    for claim in claims:
        handler.deliver(claim)

    assert not before
    assert plugin('good').heard == [claim.id for claim in claims]
    assert plugin('good').steps == ['initialized']


def test_a_plugin_is_terminated_when_the_handler_is_closed_and_comes_back_with_the_next_message(
    install, queue, envelope, says
):
    install('good', GOOD)
    handler = MessageHandler([says(YES)], plugins=['good'])

    for _ in range(2):
        handler.deliver(queue.claimed(envelope()))
        handler.close()
        handler.close()

    assert plugin('good').steps == ['initialized', 'terminated'] * 2
    assert len(plugin('good').heard) == 2


def test_plugins_come_back_in_the_midst_of_the_work_of_one_handler_when_another_one_is_closed(
    install, queue, envelope, says
):
    install('good', GOOD)
    handler, other = (MessageHandler([says(YES)], plugins=['good']) for _ in range(2))
    given = Given(*[queue.claimed(envelope()) for _ in range(3)])

    def after_the_first(claim, result):
        given.on_ended = lambda claim, result: None
        other.deliver(queue.claimed(envelope()))
        other.close()

    given.on_ended = after_the_first
    assert len(deliver_all(handler, given)) == 3
    handler.close()

    assert plugin('good').steps == ['initialized', 'terminated'] * 2
    assert len(plugin('good').heard) == 4


def test_two_handlers_share_their_plugins(install, queue, envelope, says):
    install('good', GOOD)

    for names in (['good'], ['*'], ['good', '*']):
        MessageHandler([says(YES)], plugins=names).deliver(queue.claimed(envelope()))

    assert plugin('good').steps == ['initialized']
    assert len(plugin('good').heard) == 3


def test_without_plugins_none_is_looked_for(install, queue, envelope, says):
    install('bad', BAD_AT_IMPORT)
    handler = MessageHandler([says(YES)])

    handler.deliver(queue.claimed(envelope()))
    handler.close()

    assert 'plugin_bad' not in sys.modules


def test_a_handler_that_never_had_a_message_ends_nobodys_plugins(install, queue, envelope, says):
    install('good', GOOD)
    MessageHandler([says(YES)], plugins=['good']).deliver(queue.claimed(envelope()))

    MessageHandler([says(YES)], plugins=['good']).close()

    assert plugin('good').steps == ['initialized']


def test_the_star_loads_everything_that_is_installed(install, plugins):
    for name in ('one', 'two'):
        install(name, GOOD)

    plugins.load(['*'])

    assert [plugin(name).steps for name in ('one', 'two')] == [['initialized']] * 2


def test_only_those_named_are_loaded(install, plugins):
    for name in ('one', 'two'):
        install(name, GOOD)

    plugins.load(['two'])

    assert 'plugin_one' not in sys.modules
    assert plugin('two').steps == ['initialized']


def test_one_that_is_missing_is_reported_by_its_name(install, plugins, caplog):
    install('one', GOOD)

    plugins.load(['other', 'one'])

    assert caplog.messages == ['The plugin other is not installed: there is no such entry point in mailqueue.plugins']
    assert plugin('one').steps == ['initialized']


@pytest.mark.parametrize(
    ('code', 'text'),
    [
        (BAD_AT_IMPORT, 'at its import'),
        (BAD_AT_START, 'at its start'),
        (BAD_BY_EXIT, 'that ends the process'),
        (BAD_BY_CANCELLATION, 'that is no Exception'),
    ],
)
def test_one_that_is_broken_stops_no_other(install, plugins, caplog, capfd, code, text):
    install('a_bad_one', code)
    install('good', GOOD)

    plugins.load(['*'])

    assert [(record.levelname, record.message) for record in caplog.records] == [
        ('ERROR', 'The plugin a_bad_one cannot be loaded')
    ]
    assert f'a defect {text}' in caplog.text
    assert capfd.readouterr().err == ''
    assert plugin('good').steps == ['initialized']


def test_plugins_for_which_there_can_be_no_more_threads_are_reported_and_mail_goes_on(
    install, queue, envelope, says, caplog, capfd, monkeypatch
):
    def cannot_start(thread):
        raise RuntimeError("can't start new thread")

    install('good', GOOD)
    handler = MessageHandler([says(YES)], plugins=['good'])
    monkeypatch.setattr(threading.Thread, 'start', cannot_start)

    assert handler.deliver(queue.claimed(envelope()))

    assert [(record.levelname, record.message) for record in caplog.records if record.name == 'mailqueue.plugins'] == [
        ('ERROR', 'The plugin good cannot be loaded')
    ]
    assert "can't start new thread" in caplog.text
    assert capfd.readouterr().err == ''


def test_one_that_is_missing_or_broken_is_reported_once_and_not_with_each_message(
    install, queue, envelope, says, caplog
):
    install('bad', BAD_AT_START)
    handler = MessageHandler([says(YES)], plugins=['bad', 'missing'])

    for _ in range(3):
        handler.deliver(queue.claimed(envelope()))

    assert caplog.messages == [
        'The plugin missing is not installed: there is no such entry point in mailqueue.plugins',
        'The plugin bad cannot be loaded',
    ]


def test_one_that_fails_at_its_end_stops_no_other(install, plugins, caplog):
    install('a_bad_one', BAD_AT_END)
    install('good', GOOD)
    plugins.load(['*'])

    plugins.terminate()

    assert caplog.messages == ['The plugin a_bad_one failed at its end']
    assert plugin('good').steps == ['initialized', 'terminated']


def test_one_that_sends_mail_at_its_start_comes_to_an_end(install, plugins):
    install('loop', 'def initialize(context, registry):\n    registry.load(["loop"])\n    registry.load(["*"])\n')

    plugins.load(['loop'])

    assert 'plugin_loop' in sys.modules


def test_who_comes_while_plugins_are_loaded_waits_until_they_can_hear(install, plugins, until):
    install(
        'slow',
        'import threading\n'
        'begun, go_on, done = threading.Event(), threading.Event(), []\n'
        'def initialize(context, registry):\n'
        '    begun.set()\n'
        '    go_on.wait(30)\n'
        '    done.append(True)\n',
    )
    seen = []

    def load():
        plugins.load(['slow'])
        seen.append(list(plugin('slow').done))

    threads = [threading.Thread(target=load) for _ in range(2)]
    threads[0].start()
    until(lambda: hasattr(sys.modules.get('plugin_slow'), 'done'))
    assert plugin('slow').begun.wait(30)
    threads[1].start()
    plugin('slow').go_on.set()
    for thread in threads:
        thread.join(30)

    assert seen == [[True], [True]]


def test_a_plugin_may_be_a_class(install, plugins):
    install(
        'of_a_class',
        'class Plugin:\n    steps = []\n    def initialize(self, context, registry):\n'
        '        self.steps.append(context)\n    def terminate(self, context):\n        self.steps.append("end")\n',
        attribute='Plugin',
    )

    plugins.load(['of_a_class'])
    plugins.terminate()

    assert plugin('of_a_class').Plugin.steps == [{}, 'end']


def test_the_signals_have_the_names_that_plugins_know():
    assert (MQSignal.delivery_successful, MQSignal.delivery_failed) == (
        'mq:delivery_successful',
        'mq:delivery_failed',
    )


# --- one that hangs ---------------------------------------------------------


@pytest.fixture
def let_go():
    """Names of plugins that hang; they are let go in the end."""
    names = []
    yield names
    for name in names:
        plugin(name).go_on.set()
        for thread in threading.enumerate():
            if thread.name == f'mailqueue-plugin-{name}':
                thread.join(30)


@pytest.mark.parametrize('at_import', [True, False])
def test_one_that_hangs_is_reported_by_its_name_and_mail_goes_on(install, let_go, caplog, at_import):
    install('hangs', HANGS.replace('AT_IMPORT', str(at_import)))
    install('later', GOOD)
    let_go.append('hangs')
    plugins = PluginRegistry(patience=0.05)

    plugins.load(['*'])

    assert caplog.messages == ['The plugin hangs is not ready after 0.05 seconds; mail goes on without it until it is']
    assert plugin('later').steps == ['initialized']


def test_one_that_hangs_is_waited_for_once(install, let_go, until, caplog):
    install('hangs', HANGS.replace('AT_IMPORT', 'False'))
    install('good', GOOD)
    let_go.append('hangs')
    plugins = PluginRegistry(patience=0.05)

    plugins.load(['*'])
    plugins.terminate()
    plugins.load(['*'])

    assert len(caplog.messages) == 1
    assert plugin('good').steps == ['initialized', 'terminated', 'initialized']
    plugin('hangs').go_on.set()
    until(lambda: plugin('hangs').steps)
    until(lambda: not any(thread.name == 'mailqueue-plugin-hangs' for thread in threading.enumerate()))
    plugins.terminate()
    assert plugin('hangs').steps == ['initialized', 'terminated']


# --- what a receiver is told ------------------------------------------------


def test_a_receiver_is_told_of_the_message_in_the_words_of_mailqueue_runner(queue, envelope, says, listen):
    heard = []

    def receive(sender, msg, send_result):
        heard.append(msg)

    listen(MQSignal.delivery_failed, receive)
    sent = envelope('ada', 'bob')
    claim = queue.claimed(sent)
    before = claim.queued_at

    MessageHandler([says(NO)]).deliver(claim)

    (msg,) = heard
    assert (msg.id, msg.from_addr, msg.to_addrs) == (claim.id, 'shop@site.example', (ADA, BOB))
    assert (msg.msg_bytes, f'<{msg.msg_id}>') == (sent.content, sent.message_id)
    assert msg.queue_date.timestamp() == before
    assert msg.is_in_queue


@pytest.mark.parametrize(
    ('content', 'msg_id'),
    [(b'Message-ID: <1@site.example>\r\n\r\n', '1@site.example'), (b'Subject: hello\r\n\r\n', None)],
)
def test_a_message_may_have_no_message_id(queue, says, listen, content, msg_id):
    heard = []

    def receive(sender, msg, send_result):
        heard.append(msg.msg_id)

    listen(MQSignal.delivery_successful, receive)
    MessageHandler([says(YES)]).deliver(queue.claimed(Envelope('shop@site.example', (ADA,), content)))

    assert heard == [msg_id]


def test_retries_count_the_attempts_that_have_failed_with_this_one(queue, envelope, says, listen):
    heard = []

    def receive(sender, msg, send_result):
        heard.append(msg.retries)

    for signal in (MQSignal.delivery_failed, MQSignal.delivery_successful):
        listen(signal, receive)
    handler = MessageHandler([says(NO, NO, YES)])
    handler.deliver(queue.claimed(envelope()))
    for _ in range(2):
        (claim,) = queue.claim_due(queue.clock() + 5 * FIVE_MINUTES)
        handler.deliver(claim)

    assert heard == [1, 2, 2]


# --- what a receiver may decide ---------------------------------------------


def discard(sender, msg, send_result):
    return MQAction.DISCARD


def test_a_message_that_is_discarded_is_kept_as_a_dead_letter(queue, envelope, says, listen, told, caplog):
    listen(MQSignal.delivery_failed, discard)
    sent = envelope('ada', 'bob')

    result = MessageHandler([says(NO)]).deliver(queue.claimed(sent))

    (header,) = queue.headers('dead')
    assert (header.recipients, header.attempts, header.last_reply) == ((ADA, BOB), 1, 'discarded by a plugin')
    assert queue.files('dead')[0].read_bytes().endswith(sent.content)
    assert queue.state == {'dead': 1}
    assert not result
    assert (result.queued, result.discarded, result.failed) == (False, True, (ADA, BOB))
    assert result.settlement == Settlement(burials=(Burial((ADA, BOB), 'discarded by a plugin'),))
    assert told('status', 'to') == [('discarded', ADA), ('discarded', BOB), ('discarded', f'{ADA},{BOB}')]
    assert (caplog.records[-1].name, caplog.records[-1].levelname) == ('mailqueue.queue_log', 'ERROR')


def test_a_plugin_may_give_up_earlier_than_the_retry_policy(queue, envelope, says, listen):
    def receive(sender, msg, send_result):
        return MQAction.DISCARD if msg.retries > 2 else None

    listen(MQSignal.delivery_failed, receive)
    handler = MessageHandler([says(NO)])
    handler.deliver(queue.claimed(envelope()))
    for _ in range(2):
        (claim,) = queue.claim_due(queue.clock() + 5 * FIVE_MINUTES)
        handler.deliver(claim)

    assert [header.attempts for header in queue.headers('dead')] == [3]
    assert queue.state == {'dead': 1}


def test_who_has_accepted_is_not_in_the_dead_letter_and_who_was_refused_is_in_one_of_their_own(
    queue, envelope, says, listen
):
    listen(MQSignal.delivery_failed, discard)
    claim = queue.claimed(envelope('ada', 'bob', 'eve'))

    result = MessageHandler([says(SendResult({ADA: OK, BOB: LATER, EVE: NEVER}))]).deliver(claim)

    assert {header.recipients: header.last_reply for header in queue.headers('dead')} == {
        (BOB,): 'discarded by a plugin',
        (EVE,): '550 5.1.1 no such user',
    }
    assert queue.state == {'dead': 2}
    assert result.accepted == (ADA,)


@pytest.mark.parametrize('signal', [MQSignal.delivery_failed, MQSignal.delivery_successful])
def test_where_nobody_waits_there_is_nothing_to_discard(queue, envelope, says, listen, signal):
    listen(signal, discard)
    handler = MessageHandler([says(YES, SendResult({ADA: NEVER}))])

    for _ in range(2):
        handler.deliver(queue.claimed(envelope()))

    assert [header.last_reply for header in queue.headers('dead')] == ['550 5.1.1 no such user']
    assert queue.state == {'dead': 1}


class Odd:
    """What no receiver should return: it cannot be compared."""

    def __eq__(self, other):
        raise RuntimeError('not comparable')

    __hash__ = None


@pytest.mark.parametrize('answer', [None, True, 'nonsense', b'discard', Odd()])
def test_any_other_answer_discards_nothing(queue, envelope, says, listen, answer):
    def receive(sender, msg, send_result):
        return answer

    listen(MQSignal.delivery_failed, receive)
    result = MessageHandler([says(NO)]).deliver(queue.claimed(envelope()))

    assert (bool(result), result.queued, result.discarded) == (True, True, False)
    assert queue.state == {'waiting': 1}


def test_one_receiver_is_enough_to_discard_even_if_another_one_raises(queue, envelope, says, listen, caplog):
    def bad(sender, msg, send_result):
        raise SystemExit('no licence')

    for receiver in (bad, discard):
        listen(MQSignal.delivery_failed, receiver)
    MessageHandler([says(NO)]).deliver(queue.claimed(envelope()))

    assert queue.state == {'dead': 1}
    name = f'{__name__}.test_one_receiver_is_enough_to_discard_even_if_another_one_raises.<locals>.bad'
    assert f'A receiver of mq:delivery_failed failed: {name}' in caplog.messages


def test_a_discarded_message_can_be_tried_again_by_a_person(queue, envelope, says, listen):
    listen(MQSignal.delivery_failed, discard)
    MessageHandler([says(NO)]).deliver(queue.claimed(envelope()))

    queue.admin.retry(queue.files('dead')[0].name)

    assert [header.attempts for header in queue.headers('new')] == [0]


# --- the moment in which it decides -----------------------------------------


def test_while_receivers_decide_nobody_else_can_take_the_message(queue, envelope, says, listen):
    seen = []

    def receive(sender, msg, send_result):
        other = type(queue)(queue.path)
        seen.append((queue.state, queue.claim(msg.id), list(other.claim_due(2e9)), other.recover(2e9).orphans))

    listen(MQSignal.delivery_failed, receive)
    MessageHandler([says(NO)]).deliver(queue.claimed(envelope()))

    assert seen == [({'in progress': 1}, None, [], ())]
    assert queue.state == {'waiting': 1}


def test_who_has_accepted_is_written_down_before_receivers_decide(queue, envelope, says, listen):
    seen = []

    def receive(sender, msg, send_result):
        seen.extend(header.recipients for header in queue.headers('cur'))

    listen(MQSignal.delivery_failed, receive)
    MessageHandler([says(SendResult({ADA: OK, BOB: LATER}))]).deliver(queue.claimed(envelope('ada', 'bob')))

    assert seen == [(BOB,)]


def test_without_receivers_nothing_is_written_twice(queue, envelope, says, monkeypatch):
    kept = []
    claim = queue.claimed(envelope('ada', 'bob'))
    monkeypatch.setattr(claim, 'keep', kept.append)

    MessageHandler([says(SendResult({ADA: OK, BOB: LATER}))]).deliver(claim)

    assert kept == []
    assert [header.recipients for header in queue.headers('new')] == [(BOB,)]


DIES = """
import os, sys
from pyramid_mailqueue import MessageHandler, MQSignal, registry
from pyramid_mailqueue.results import Reply, SendResult
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue

class Server:
    def send(self, sender, recipients, content):
        return SendResult({'ada@x.example': Reply(250), 'bob@x.example': Reply(451)})

def die(sender, msg, send_result):
    os._exit(7)

registry.connect(MQSignal.delivery_failed, die)
queue = MaildirQueue(sys.argv[1])
claim = queue.put_claimed(Envelope('shop@site.example', ('ada@x.example', 'bob@x.example'), b'Hello.'))
MessageHandler([Server()]).deliver(claim)
"""


def test_a_process_that_dies_in_a_receiver_loses_nobody_and_repeats_nobody(queue, says):
    assert subprocess.run([sys.executable, '-c', DIES, queue.path], check=False).returncode == 7

    assert len(queue.recover(queue.clock()).orphans) == 1
    transport = says(SendResult({BOB: OK}))
    MessageHandler([transport]).deliver(next(queue.claim_due(queue.clock() + 1)))

    assert transport.asked == [(BOB,)]
    assert queue.state == {}


def test_an_interrupted_receiver_leaves_a_message_that_waits(queue, envelope, says, listen):
    def receive(sender, msg, send_result):
        raise KeyboardInterrupt

    listen(MQSignal.delivery_failed, receive)
    claim = queue.claimed(envelope())
    with pytest.raises(KeyboardInterrupt):
        MessageHandler([says(NO)]).send_message(claim)

    assert queue.state == {'waiting': 1}
