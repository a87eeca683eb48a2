"""The examples of the pages about mailqueue-runner and about plugins, which are those of mailqueue-runner, as tests."""

from __future__ import annotations

import os
import subprocess
import sys
from email.message import EmailMessage
from pathlib import Path

import docutils.core
import docutils.nodes
import pytest

from pyramid_mailqueue import (
    MaildirBackend,
    MQAction,
    MQSignal,
    ServerTrouble,
    enqueue_message,
    init_smtp_mailer,
    registry,
)
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir.queue_file import read_header
from pyramid_mailqueue.testing import ScriptedSMTPServer
from pyramid_mailqueue.transports.smtp import SMTPTransport

DOCS = Path(__file__).parent.parent / 'docs'
FOO, BAR = 'foo@site.example', 'bar@site.example'


def examples(name, language='python'):
    """The code blocks of a document, in their order."""
    blocks = docutils.core.publish_doctree((DOCS / name).read_text('utf-8')).findall(docutils.nodes.literal_block)
    return [block.astext() for block in blocks if language in block['classes']]


SENDING, OWN_TRANSPORT, CONSERVATIVE, WRAPPER = examples('from-mailqueue-runner.rst')
PLUGIN, SUBSCRIBER = examples('plugins.rst')
(ENTRY_POINT,) = examples('plugins.rst', 'toml')


@pytest.fixture
def server():
    with ScriptedSMTPServer() as server:
        yield server


@pytest.fixture
def msg():
    made = EmailMessage()
    made['From'] = FOO
    made['To'] = BAR
    made.set_content('Hello.\n')
    return made.as_bytes()


@pytest.fixture
def run(server, queue_dir, msg):
    """Run an example, with the server and the queue of this test; return its variables."""

    def run(code, **given):
        local = code.replace('/path/to/queue', str(queue_dir)).replace(
            "'smtp_hostname': 'mail.site.example'", f"'smtp_hostname': '{server.host}', 'smtp_port': {server.port}"
        )
        variables = {'msg': msg, 'settings': {'smtp_hostname': server.host, 'smtp_port': server.port}, **given}
        exec(compile(local, 'example', 'exec'), variables)
        return variables

    return run


@pytest.fixture
def state(queue_dir):
    """How many messages there are in each state that has any."""
    return lambda: {state: number for state, number in MaildirQueue(queue_dir).counts().items() if number}


# --- sending ----------------------------------------------------------------


def test_sending(run, server, state):
    variables = run(SENDING)

    assert variables['was_sent']
    assert variables['was_queued'] is False
    assert [(message.sender, message.recipients) for message in server.messages] == [(FOO, (BAR,))]
    assert state() == {}


def test_what_could_not_be_sent_is_queued(run, server, state):
    server.script['connect'] = '554 no service'

    variables = run(SENDING)

    assert variables['was_sent']
    assert variables['was_queued'] is True
    assert state() == {'waiting': 1}


@pytest.mark.parametrize(
    ('left_out', 'sent', 'waiting'), [('init_smtp_mailer(settings),', 0, 1), ('MaildirBackend(', 1, 0)]
)
def test_always_and_never_enqueue(run, server, state, left_out, sent, waiting):
    lines = SENDING.splitlines()
    code = '\n'.join(line for line in lines if not line.strip().startswith(left_out))
    assert len(code.splitlines()) == len(lines) - 1

    variables = run(code)

    assert variables['was_sent']
    assert variables['was_queued'] is bool(waiting)
    assert (len(server.messages), state()) == (sent, {'waiting': waiting} if waiting else {})


def test_a_transport_of_ones_own(run):
    assert run(OWN_TRANSPORT)['was_sent']
    assert not run(OWN_TRANSPORT.replace('return SendResult(replies)', 'return False'))['was_sent']
    assert run(OWN_TRANSPORT.replace('return SendResult(replies)', 'return True'))['was_sent']


# --- on disk before it is sent ----------------------------------------------


def test_conservative_sending(run, server, state):
    variables = run(CONSERVATIVE)

    assert variables['was_sent']
    assert len(server.messages) == 1
    assert state() == {}


@pytest.mark.parametrize('answer', ['451 4.3.0 later', '421 4.3.2 closing down'])
def test_conservative_sending_that_fails(run, server, state, answer):
    server.script['RCPT'] = answer

    variables = run(CONSERVATIVE)

    assert variables['was_sent']
    assert (variables['was_sent'].queued, variables['was_sent'].failed) == (True, ())
    assert state() == {'waiting': 1}


def test_conservative_sending_that_is_refused(run, server, state):
    server.script['RCPT'] = '550 5.1.1 no such user'

    variables = run(CONSERVATIVE)

    assert not variables['was_sent']
    assert (variables['was_sent'].queued, variables['was_sent'].failed) == (False, (BAR,))
    assert state() == {'dead': 1}


# --- a wrapper of one's own -------------------------------------------------


def test_the_wrapper(run, queue_dir, msg, server, capsys, caplog):
    enqueue_message(msg, queue_dir, FOO, [BAR])
    main = run(WRAPPER)['main']

    main()
    main()

    assert len(server.messages) == 1
    assert capsys.readouterr().out == 'mq-run: 1 sent; 0 waiting\nmq-run: nothing to do; 0 waiting\n'
    assert 'The plugin myplugin is not installed' in caplog.text


# --- plugins ----------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The plugin of the docs, installed as the distribution of an application would; returns its module's name."""
    module = 'example_app_mqplugin'
    # So that one can see what it has heard.
    note = f"with open({str(tmp_path / 'heard')!r}, 'a') as file: file.write(f'{{msg.msg_id}}\\n')"
    code = PLUGIN.replace('# called when a message was delivered', note).replace('msg.retries > 10', 'msg.retries > 1')
    assert note in code
    (tmp_path / f'{module}.py').write_text(code)
    info = tmp_path / 'example_app-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: example_app\nVersion: 1.0\n')
    entry = ENTRY_POINT.replace('project.entry-points."', '').replace('"', '').replace('example.app.mqplugin', module)
    (info / 'entry_points.txt').write_text(f'{entry}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    yield module
    registry.terminate()
    sys.modules.pop(module, None)


@pytest.fixture
def heard(tmp_path):
    path = tmp_path / 'heard'
    return lambda: path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def mq_run(tmp_path, queue_dir, server):
    """Run ``mq-run`` with a configuration of mailqueue-runner; return what it has printed."""
    ini = tmp_path / 'config.ini'
    ini.write_text(f'[mqrunner]\nsmtp_hostname = 127.0.0.1\nsmtp_port = {server.port}\nplugins = myplugin\n')

    def mq_run():
        command = [sys.executable, '-m', 'pyramid_mailqueue.cli.run', ini, queue_dir]
        env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])}
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=60).stdout

    return mq_run


def age(queue_dir):
    """Make every waiting message due, as if its time had come."""
    for path in (queue_dir / 'new').iterdir():
        os.utime(path, (1, 1))


@pytest.mark.usefixtures('installed')
def test_the_plugin_in_mq_run(mq_run, queue_dir, msg, server, state, heard):
    enqueue_message(msg, queue_dir, FOO, [BAR])
    mq_run()
    assert len(heard()) == 1

    server.script['RCPT'] = '451 4.3.0 later'
    enqueue_message(msg, queue_dir, FOO, [BAR])
    mq_run()
    assert state() == {'waiting': 1}
    age(queue_dir)
    mq_run()

    assert state() == {'dead': 1}
    (path,) = (queue_dir / 'dead').iterdir()
    with path.open('rb') as file:
        header = read_header(file)
    assert (header.last_reply, header.attempts) == ('discarded by a plugin', 2)
    assert len(heard()) == 1


@pytest.mark.usefixtures('installed')
@pytest.mark.parametrize('delivery', ['background', 'inline'])
def test_the_plugin_in_the_web_process(make_app, make_settings, message, server, heard, until, delivery):
    settings = make_settings(server, plugins='myplugin', delivery=delivery)
    app = make_app(lambda request: request.mailer.send(message('hello')), settings)

    response = app.get('/')

    until(heard)
    assert [f'<{line}>' for line in heard()] == [response.text]


def test_the_plugin_in_the_wrapper(installed, run, queue_dir, msg, heard):
    enqueue_message(msg, queue_dir, FOO, [BAR])

    run(WRAPPER)['main']()

    assert len(heard()) == 1
    # It was terminated at the end of the run, and hears no more.
    assert not registry.has_receivers(MQSignal.delivery_successful)
    assert installed in sys.modules


def test_the_subscriber(run, make_app, make_settings, message, server, capsys):
    server.script['RCPT'] = '550 5.1.1 no such user'
    subscriber = run(SUBSCRIBER)['tell_support']
    seen = []

    def configure(config):
        from pyramid_mailqueue import MailBuried

        config.add_subscriber(subscriber, MailBuried)
        config.add_subscriber(seen.append, MailBuried)

    app = make_app(
        lambda request: request.mailer.send(message('hello')),
        make_settings(server, delivery='inline'),
        configure=configure,
    )
    response = app.get('/')

    assert len(seen) == 1
    assert capsys.readouterr().out == f"{response.text} ('ada@elsewhere.example',) 550 5.1.1 no such user\n"


# --- what is importable from where ------------------------------------------


def test_the_names_are_where_they_were():
    assert (MQSignal.delivery_successful, MQSignal.delivery_failed) == ('mq:delivery_successful', 'mq:delivery_failed')
    assert MQAction.DISCARD == 'discard'
    assert {'connect', 'disconnect', 'signal', 'has_receivers', 'call_plugins'} <= set(dir(registry))


def test_a_name_that_is_not_there_is_an_error():
    import pyramid_mailqueue

    with pytest.raises(AttributeError, match="module 'pyramid_mailqueue' has no attribute 'PluginLoader'"):
        pyramid_mailqueue.PluginLoader  # noqa: B018 - asking for it is the test


def test_importing_the_package_imports_little():
    # Old ways to install a package import it whenever Python starts.
    code = (
        'import sys; before = {*sys.modules}; import pyramid_mailqueue; '
        "print(sorted({'blinker', 'schwarz', 'ssl', 'pyramid', 'transaction'} & {*sys.modules} - before))"
    )

    assert subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout == '[]\n'


@pytest.mark.parametrize('prefix', ['', 'mailqueue.'])
def test_a_mailer_is_made_of_settings_with_the_prefix_or_without(prefix, server, queue_dir):
    settings = {
        f'{prefix}smtp_hostname': server.host,
        f'{prefix}smtp_port': str(server.port),
        f'{prefix}smtp_username': 'someuser@site.example',
        f'{prefix}smtp_password': 'secret',
        'debug': True,
        'sqlalchemy.url': 'sqlite://',
    }
    mailer = init_smtp_mailer(settings)

    assert isinstance(mailer, SMTPTransport)
    # The server offers no login: the user name was used.
    with pytest.raises(ServerTrouble, match=r'rejected the login of .someuser@site\.example.'):
        mailer.send(FOO, (BAR,), b'Subject: hello\r\n\r\n')
    assert MaildirBackend(queue_dir).send(FOO, (BAR,), b'Subject: hello\r\n\r\n').queued
