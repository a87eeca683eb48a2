"""
The samples in the README of mailqueue-runner 1.0, with its package and with ours: what the results and signals tell.

Each report has ``bool(was_sent)``, ``.queued`` and ``.discarded``, and of each signal that was sent its name, the
recipients of the message, and ``bool`` and ``.queued`` of the result.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack

import pytest

from pyramid_mailqueue.testing import ScriptedSMTPServer

ADA, BOB = 'ada@x.example', 'bob@x.example'
BOTH = [ADA, BOB]
REFUSED, LATER = '550 5.1.1 no such user', '451 4.3.0 later'
SERVERS = {
    'all accepted': {},
    'one refused': {f'RCPT TO:<{BOB}>': REFUSED},
    'all refused': {'RCPT': REFUSED},
    'one deferred': {f'RCPT TO:<{BOB}>': LATER},
    'all deferred': {'RCPT': LATER},
    'server down': {'connect': '554 no service'},
}
SAMPLES = ('never enqueue', 'enqueue what fails', 'enqueue before')
# What a receiver of delivery_failed returns, if there are receivers.
ANSWERS = {'no receivers': None, 'no decision': None, 'discard': 'discard'}
README = "import importlib.metadata; print(importlib.metadata.metadata('mailqueue-runner')['Description'])"

RUN = r"""
import importlib, json, re, sys

name, readme, ports, folder, answers = json.loads(sys.argv[1])
package = importlib.import_module(name)
sending, _, _, conservative = re.findall(r'```python\n(.*?)```', readme, re.DOTALL)
# Theirs asks no plugins without it; ours always does.
registry = ', plugins=package.registry' if name == 'schwarz.mailqueue' else ''

def replaced(code):
    for old, new in {
        'from schwarz.mailqueue': f'from {name}',
        "'/path/to/queue-dir'": 'queue_dir',
        'path_maildir': 'queue_dir',
        'settings = {}': '',
        "msg = b'…'": '',
        'getattr(send_result': 'getattr(was_sent',
        "recipient='bar@site.example'": "recipients=('ada@x.example', 'bob@x.example')",
        "= '...'": "= 'foo@site.example'",
        "('...',)": "('ada@x.example', 'bob@x.example')",
        'MessageHandler(transports)': f'MessageHandler(transports{registry})',
        'transports=...': f'transports=[package.init_smtp_mailer(settings)]{registry}',
    }.items():
        code = code.replace(old, new)
    return code

samples = {
    'never enqueue': replaced(sending).replace('MaildirBackend(queue_dir),', ''),
    'enqueue what fails': replaced(sending),
    'enqueue before': replaced(conservative),
}

def report(code, port, queue_dir, answer, listens):
    heard = []
    def receiver_of(signal):
        def receive(_, msg, send_result):
            heard.append([signal, list(msg.to_addrs), bool(send_result), send_result.queued])
            return answer if signal == 'failed' else None
        return receive
    signals = {'successful': package.MQSignal.delivery_successful, 'failed': package.MQSignal.delivery_failed}
    receivers = {number: receiver_of(signal) for signal, number in signals.items() if listens}
    for number, receiver in receivers.items():
        package.registry.connect(number, receiver)
    variables = {
        'package': package, 'queue_dir': queue_dir, 'settings': {'smtp_hostname': '127.0.0.1', 'smtp_port': port},
        'msg': b'From: foo@site.example\r\nMessage-ID: <1@site.example>\r\n\r\nHello.\r\n',
    }
    exec(code, variables)
    for number, receiver in receivers.items():
        package.registry.disconnect(number, receiver)
    was_sent = variables['was_sent']
    return [bool(was_sent), was_sent.queued, was_sent.discarded, heard]

print(json.dumps({
    f'{sample}, {server}, {who}': report(code, port, f'{folder}/{sample} {server} {who}', answer, who != 'no receivers')
    for sample, code in samples.items() for server, port in ports.items() for who, answer in answers.items()
}))
"""


@pytest.fixture(scope='module')
def reports(their_bin, tmp_path_factory):
    """Their report and ours: ``reports(sample, server, answer)``."""
    readme = subprocess.run([their_bin / 'python', '-c', README], check=True, capture_output=True, text=True).stdout
    with ExitStack() as stack:
        ports = {name: stack.enter_context(ScriptedSMTPServer(script)).port for name, script in SERVERS.items()}

        def run(python, package):
            given = json.dumps([package, readme, ports, str(tmp_path_factory.mktemp('queues')), ANSWERS])
            command = [python, '-c', RUN, given]
            return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)

        theirs = run(their_bin / 'python', 'schwarz.mailqueue')
        ours = run(sys.executable, 'pyramid_mailqueue')
    return lambda *case: (theirs[', '.join(case)], ours[', '.join(case)])


def in_short(report):
    """The same without the recipients of each signal."""
    return [*report[:3], [[name, is_true, queued] for name, _, is_true, queued in report[3]]]


@pytest.mark.parametrize('answer', ANSWERS)
@pytest.mark.parametrize('server', ['all accepted', 'all refused', 'all deferred', 'server down'])
def test_without_a_queue_both_say_the_same(reports, server, answer):
    theirs, ours = reports('never enqueue', server, answer)

    assert ours == theirs
    assert ours[0] is (server == 'all accepted')


@pytest.mark.parametrize('answer', ANSWERS)
@pytest.mark.parametrize('server', ['one refused', 'one deferred'])
def test_who_accepts_is_sent_to_though_another_one_does_not_and_is_told_of_on_their_own(reports, server, answer):
    theirs, ours = reports('never enqueue', server, answer)

    assert ours[:3] == theirs[:3] == [False, False, theirs[2]]
    if answer != 'no receivers':
        assert theirs[3] == [['failed', BOTH, False, False]]
        assert ours[3] == [['failed', [BOB], False, False], ['successful', [ADA], True, False]]


@pytest.mark.parametrize('answer', ANSWERS)
@pytest.mark.parametrize('server', ['all accepted', 'one deferred', 'all deferred', 'server down'])
def test_what_is_queued_both_call_successful_and_queued(reports, server, answer):
    theirs, ours = reports('enqueue what fails', server, answer)

    assert ours == theirs
    assert ours[:3] == [True, server != 'all accepted', None]


@pytest.mark.parametrize('answer', ANSWERS)
@pytest.mark.parametrize(('server', 'rest'), [('one refused', [['successful', True, False]]), ('all refused', [])])
def test_who_is_refused_is_queued_there_and_has_failed_here(reports, server, rest, answer):
    theirs, ours = reports('enqueue what fails', server, answer)

    assert theirs[:3] == [True, True, None]
    without = reports('never enqueue', server, answer)[1]
    assert ours == without
    assert ours[:2] == [False, False]
    if answer != 'no receivers':
        assert in_short(ours)[3] == [['failed', False, False], *rest]


@pytest.mark.parametrize('answer', ANSWERS)
@pytest.mark.parametrize('server', ['all accepted', 'all refused'])
def test_of_a_queued_message_that_does_not_wait_both_say_the_same(reports, server, answer):
    theirs, ours = reports('enqueue before', server, answer)

    assert ours == theirs


@pytest.mark.parametrize('answer', ['no receivers', 'no decision'])
@pytest.mark.parametrize('server', ['one deferred', 'all deferred', 'server down'])
def test_a_queued_message_that_waits_is_false_there_and_queued_here(reports, server, answer):
    theirs, ours = reports('enqueue before', server, answer)

    assert theirs[:2] == [False, False]
    assert ours[:2] == [True, True]
    if answer == 'no decision' and server != 'server down':
        assert theirs[2] is ours[2] is False
        assert in_short(theirs)[3][0] == in_short(ours)[3][0] == ['failed', False, False]


@pytest.mark.parametrize('server', ['one refused', 'one deferred', 'all deferred'])
def test_a_queued_message_that_is_discarded_is_discarded_for_both(reports, server):
    theirs, ours = reports('enqueue before', server, 'discard')

    assert ours[:3] == theirs[:3] == [False, False, True]
    assert in_short(ours)[3][0] == in_short(theirs)[3][0]


def test_an_outage_discards_nothing_that_is_queued_here(reports):
    theirs, ours = reports('enqueue before', 'server down', 'discard')

    assert theirs == [False, False, True, [['failed', BOTH, False, False]]]
    assert ours == [True, True, None, []]
