"""Plugins as they are installed: distributions with entry points, found on the path."""

from __future__ import annotations

import sys
import threading

import pytest

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.plugins import GROUP, MQSignal, PluginRegistry, registry

YES = True

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


@pytest.mark.parametrize(('code', 'text'), [(BAD_AT_IMPORT, 'at its import'), (BAD_AT_START, 'at its start')])
def test_one_that_is_broken_stops_no_other(install, plugins, caplog, code, text):
    install('a_bad_one', code)
    install('good', GOOD)

    plugins.load(['*'])

    assert caplog.messages == ['The plugin a_bad_one cannot be loaded']
    assert f'a defect {text}' in caplog.text
    assert plugin('good').steps == ['initialized']


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
