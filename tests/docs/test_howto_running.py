"""The how-to cards about running: each command is parsed, each file is read, and what can be executed is."""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import doctest
import functools
import importlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from pathlib import Path
from types import SimpleNamespace

import docutils.core
import docutils.nodes
import pytest
import transaction
from pyramid.scripts.pshell import PShellCommand

from pyramid_mailqueue import NoActiveTransaction, mailer_from_settings
from pyramid_mailqueue.cli import queue, run, send_test
from pyramid_mailqueue.cli.common import parse_runner_arguments, read_settings
from pyramid_mailqueue.delivery import dispatch
from pyramid_mailqueue.delivery import run as one_run
from pyramid_mailqueue.queues.entries import STATES
from pyramid_mailqueue.settings import known_keys

ROOT = Path(__file__).parents[2]
NAMES = [
    'async',
    'backup',
    'docker',
    'gunicorn-uwsgi-mod_wsgi',
    'heroku-like',
    'kubernetes',
    'logging',
    'monitoring',
    'one-container',
    'pshell-and-scripts',
    'several-hosts',
    'supervisord',
    'upgrading',
    'workers',
]
CARDS = [ROOT / f'docs/howto/{name}.rst' for name in NAMES]

#: What a supervisor has to wait for mq-run, in seconds: what it takes, and some more.
STOP_SECONDS = one_run.STOP_SECONDS + 5


@functools.cache
def parse(path):
    settings = {'report_level': 1, 'halt_level': 1, 'syntax_highlight': 'none'}
    return docutils.core.publish_doctree(path.read_text('utf-8'), str(path), settings_overrides=settings)


def blocks_of(name, language=None):
    """The code blocks of a card, in their order; without a language, those that have none."""
    blocks = parse(ROOT / f'docs/howto/{name}.rst').findall(docutils.nodes.literal_block)
    return [block.astext() for block in blocks if (language in block['classes'] if language else not block['classes'])]


def block_with(name, text, language=None):
    (block,) = [block for block in blocks_of(name, language) if text in block]
    return block


def card(path):
    return path.stem


# --- what holds for all cards -------------------------------------------------


@pytest.mark.parametrize('path', CARDS, ids=card)
def test_a_card_fits_on_a_screen_and_its_links_lead_somewhere(path):
    lines = path.read_text('utf-8').splitlines()
    targets = [node['refuri'] for node in parse(path).findall(docutils.nodes.reference) if 'refuri' in node]

    assert len(lines) <= 80
    assert max(map(len, lines)) <= 120
    assert [target for target in targets if not (path.parent / target).is_file()] == []


@pytest.mark.parametrize('path', CARDS, ids=card)
def test_a_card_names_no_setting_that_does_not_exist(path):
    named = set(re.findall(r'(?<![\w.])mailqueue\.([a-z_]+)', path.read_text('utf-8')))

    assert named <= known_keys().keys() | {'delivery_log', 'queue_log'}


def parse_command(words):
    """Parse a command line of ours as the command itself does."""
    name, *arguments = words
    name = Path(name).name
    if name == 'mq-queue':
        return queue._parser().parse_args(arguments)
    if name == 'mq-run':
        return parse_runner_arguments(run._parser(), run._with_interval(arguments))
    assert name == 'mq-send-test'
    return parse_runner_arguments(send_test._parser(), arguments)


def commands_of(path):
    """What a card says to type: the literals that name more than a command and an option."""
    for node in parse(path).findall():
        is_literal = isinstance(node, docutils.nodes.literal | docutils.nodes.literal_block)
        if not is_literal or 'text' in node['classes']:
            continue
        for found in re.findall(r'\bmq-(?:run|queue|send-test) [^\n&|;>"]+', node.astext()):
            words = shlex.split(found, comments=True)
            if not words[1].startswith('--'):
                yield ['production.ini' if word == '…' else word for word in words]


@pytest.mark.parametrize('path', CARDS, ids=card)
def test_the_commands_of_a_card_are_understood(path):
    for words in commands_of(path):
        assert parse_command(words).ini.endswith('production.ini'), words


def settings_of(name, tmp_path, **overrides):
    """The settings of the ini file of a card, as mq-run reads them."""
    ini = tmp_path / 'production.ini'
    ini.write_text(block_with(name, '[app:main]', 'ini'))
    return read_settings(str(ini), None, None, overrides)


@pytest.mark.parametrize('name', ['docker', 'kubernetes'])
def test_the_settings_for_containers_name_a_folder_of_the_volume(name, tmp_path):
    settings = settings_of(name, tmp_path)

    assert settings.queue == 'maildir'
    assert settings.queue_dir.is_relative_to('/var/spool/shop')


def test_the_settings_for_several_hosts_name_a_database(tmp_path):
    settings = settings_of('several-hosts', tmp_path)

    assert (settings.queue, settings.sql_url) == ('sql', 'postgresql+psycopg://shop@db.site.example/shop')


# --- YAML ---------------------------------------------------------------------


def read_yaml(text):
    """Read block mappings and lists of plain words, and ``[a, b]``; anything else is an error."""
    lines = [(len(line) - len(line.lstrip()), line.strip()) for line in text.splitlines() if line.strip()]
    value, rest = _read_node(lines)
    assert not rest, rest[0]
    return value


def _read_node(lines):
    indent, first = lines[0]
    made = [] if first.startswith('- ') else {}
    while lines and lines[0][0] == indent:
        text = lines[0][1]
        if isinstance(made, list):
            assert text.startswith('- '), text
            # What follows the dash is a node of its own, at the column at which it begins.
            lines = [(indent + 2, text[2:]), *lines[1:]]
            item = re.match(r'[\w.-]+:( |$)', text[2:])
            value, lines = _read_node(lines) if item else (_scalar(text[2:]), lines[1:])
            made.append(value)
            continue
        key, colon, inline = text.partition(':')
        assert colon, text
        assert key not in made, f'{key} is there twice'
        lines = lines[1:]
        if inline.strip():
            made[key] = _scalar(inline.strip())
        elif lines and lines[0][0] > indent:
            made[key], lines = _read_node(lines)
        else:
            made[key] = None
    return made, lines


def _scalar(text):
    if text.startswith('['):
        assert text.endswith(']'), text
        return [word.strip() for word in text[1:-1].split(',')]
    assert text[0] not in '{&*!|>%@`\'"', text
    assert ': ' not in text.replace(': "', ''), text
    assert ' #' not in text, text
    return {'true': True, 'false': False}.get(text, int(text) if text.isdecimal() else text)


def test_the_reader_of_yaml_reads_what_it_should():
    text = 'a:\n  - name: x\n    args: [b, c]\n  - 8080:80\nd:\n  e: true\n  f: 35\ng:\n'

    assert read_yaml(text) == {
        'a': [{'name': 'x', 'args': ['b', 'c']}, '8080:80'],
        'd': {'e': True, 'f': 35},
        'g': None,
    }
    for wrong in ('a: 1\n  b: 2\n', 'a:\n  b\n', 'a: 1\na: 2\n', 'a: {b: c}\n'):
        with pytest.raises(AssertionError):
            read_yaml(wrong)


# --- applications and mail ----------------------------------------------------


def make_message(to='ada@site.example'):
    message = EmailMessage()
    message['From'] = 'shop@site.example'
    message['To'] = to
    message.set_content('Hello.')
    return message


@pytest.fixture
def shop(tmp_path, make_settings, smtp_server, monkeypatch):
    """Make ``production.ini`` of a Pyramid application, with more text behind its settings, in the current folder."""
    (tmp_path / 'card_shop.py').write_text(
        'from pyramid.config import Configurator\n'
        'def main(global_config, **settings):\n'
        '    config = Configurator(settings=settings)\n'
        "    config.include('pyramid_tm')\n"
        "    config.include('pyramid_mailqueue')\n"
        '    return config.make_wsgi_app()\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def shop(more='', **own):
        settings = '\n'.join(f'{key} = {value}' for key, value in make_settings(smtp_server, **own).items())
        Path('production.ini').write_text(f'[app:main]\nuse = call:card_shop:main\n{settings}\n{more}\n')
        return 'production.ini'

    return shop


def recipients_of(server):
    return sorted(recipient for envelope in server.received for recipient in envelope.rcpt_tos)


def status_of(main, *arguments):
    """Run a command of ours in this process."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


# --- workers.rst --------------------------------------------------------------


@pytest.fixture
def worker(shop, tmp_path):
    """The namespace of ``shop/jobs.py``."""
    ini = tmp_path / shop()
    namespace = {}
    exec(block_with('workers', 'get_appsettings', 'python').replace('/srv/shop/production.ini', str(ini)), namespace)
    yield namespace
    namespace['mailer'].close()


def test_a_plain_worker_delivers_the_mail_of_the_jobs_that_succeed(worker, smtp_server, caplog):
    plain = block_with('workers', 'for order_id, email')

    exec(plain, worker | {'logging': logging, 'jobs': [(1, 'ada@site.example'), (2, ''), (3, 'bob@site.example')]})

    assert recipients_of(smtp_server) == ['ada@site.example', 'bob@site.example']
    assert [record.getMessage() for record in caplog.records if record.levelname == 'ERROR'] == ['Order 2']


def test_a_mailer_of_a_worker_works_in_a_pool_of_threads(worker, smtp_server):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(worker['confirm'], range(8), [f'{n}@site.example' for n in range(8)]))

    assert len(recipients_of(smtp_server)) == 8


def test_the_explicit_manager_of_a_worker_refuses_mail_outside_of_a_transaction(worker):
    namespace = worker | {'transaction': transaction}
    exec(block_with('workers', 'explicit=True'), namespace)

    with contextlib.closing(namespace['mailer']), pytest.raises(NoActiveTransaction):
        namespace['mailer'].send(make_message())


def test_the_wrappers_of_the_job_call_it(worker):
    jobs = []
    same = lambda function: function  # noqa: E731
    namespace = worker | {
        'celery': SimpleNamespace(Celery=lambda name, broker: SimpleNamespace(task=same)),
        'dramatiq': SimpleNamespace(actor=same),
        'BlockingScheduler': lambda: SimpleNamespace(
            add_job=lambda function, trigger, hour, args: jobs.append((function, *args))
        ),
    }

    exec(block_with('workers', 'celery.Celery', 'python'), namespace)

    assert namespace['celery_confirm'] is namespace['dramatiq_confirm'] is worker['confirm']
    assert jobs == [(worker['confirm'], 7, 'ada@site.example')]


# --- async.rst ----------------------------------------------------------------


@pytest.fixture
def web(make_settings, smtp_server):
    """The namespace of the async application, over a mailer that delivers inline."""
    mailer = mailer_from_settings(make_settings(smtp_server, delivery='inline'))
    namespace = {'mailer': mailer, 'confirmation': make_message}
    for block in blocks_of('async', 'python'):
        exec(block, namespace)
    yield SimpleNamespace(**namespace)
    namespace['pool'].shutdown()
    mailer.close()


def test_coroutines_send_mail_in_threads(web, smtp_server):
    async def serve():
        await asyncio.gather(
            web.order('ada@site.example'), web.order('bob@site.example'), web.order_in_pool('eve@site.example')
        )

    asyncio.run(serve())

    assert recipients_of(smtp_server) == ['ada@site.example', 'bob@site.example', 'eve@site.example']


def test_a_coroutine_that_is_cancelled_does_not_stop_its_transaction(web, smtp_server, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def slow(email):
        begun.set()
        go_on.wait(30)
        return make_message(email)

    monkeypatch.setitem(web.place_order.__globals__, 'confirmation', slow)

    async def serve():
        task = asyncio.create_task(web.order('ada@site.example'))
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(serve())

    smtp_server.wait_for(1)


def test_transactions_in_coroutines_of_one_thread_drop_mail_and_say_so(web, smtp_server, caplog):
    async def wrong(email):
        with transaction.manager:
            web.mailer.send(make_message(email))
            await asyncio.sleep(0)

    async def serve():
        await asyncio.gather(wrong('ada@site.example'), wrong('bob@site.example'), return_exceptions=True)

    asyncio.run(serve())
    transaction.abort()

    assert 'ada@site.example' not in recipients_of(smtp_server)
    (error,) = [record for record in caplog.records if record.levelname == 'ERROR']
    assert error.name == 'mailqueue.queue_log'
    assert 'ada@site.example' in error.getMessage()


# --- pshell-and-scripts.rst ---------------------------------------------------


def test_what_is_typed_into_pshell_sends_mail_and_prints_its_id(shop, smtp_server):
    session = doctest.DocTestParser().get_doctest(
        re.sub(r"'<\d[^>]*>'", "'<...>'", block_with('pshell-and-scripts', '>>>', 'pycon')), {}, 'card', None, 0
    )
    said = io.StringIO()

    def shell(env, help):
        session.globs = dict(env)
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=said.write)

    PShellCommand(['pshell', shop()], quiet=True).run(shell=shell)

    assert said.getvalue() == ''
    assert recipients_of(smtp_server) == ['ada@site.example']


def test_the_script_has_delivered_when_it_ends(shop, smtp_server):
    shop(block_with('pshell-and-scripts', '[app:script]', 'ini'), delivery='queue')

    exec(block_with('pshell-and-scripts', 'bootstrap', 'python'), {})

    assert recipients_of(smtp_server) == ['ada@site.example', 'bob@site.example']


def test_the_script_goes_on_while_the_server_is_down(shop, smtp_server, queue_dir):
    shop(block_with('pshell-and-scripts', '[app:script]', 'ini'), delivery='queue')
    smtp_server.stop()

    exec(block_with('pshell-and-scripts', 'bootstrap', 'python'), {})

    assert len([*(queue_dir / 'new').iterdir()]) == 2


# --- containers ---------------------------------------------------------------


@pytest.fixture
def commands_in_path(tmp_path, monkeypatch):
    """Folder ``bin`` of the test is the first in PATH; mq-run and mq-queue are there."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    for name, module in (('mq-run', 'start'), ('mq-queue', 'queue')):
        call = f'from pyramid_mailqueue.cli.{module} import main; main()'
        add_command(folder / name, f'exec {shlex.quote(sys.executable)} -c {shlex.quote(call)} "$@"')
    monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    return folder


def add_command(path, line):
    path.write_text(f'#!/bin/sh\n{line}\n')
    path.chmod(0o755)


@contextlib.contextmanager
def running(command):
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def enqueue(queue_dir, make_settings, server=None):
    with contextlib.closing(mailer_from_settings(make_settings(server, smtp_hostname='127.0.0.1'))) as mailer:
        return mailer.enqueue(make_message())


def dockerfile_words(name):
    """The CMD of the Dockerfile of a card."""
    (line,) = [line for block in blocks_of(name, 'docker') for line in block.splitlines() if line.startswith('CMD ')]
    return json.loads(line.removeprefix('CMD '))


def test_the_services_of_docker_share_the_queue_of_the_image(tmp_path):
    services = read_yaml(block_with('docker', 'services:', 'yaml'))['services']
    image = block_with('docker', 'FROM', 'docker')
    seconds = int(services['mail']['stop_grace_period'].removesuffix('s'))
    place = str(settings_of('docker', tmp_path).queue_dir)

    assert services['web']['volumes'] == services['mail']['volumes'] == [f'spool:{place}']
    assert services['web']['image'] == services['mail']['image']
    assert seconds >= STOP_SECONDS
    assert f'install -d -o shop -g shop -m 0700 {place}' in image
    assert f'VOLUME {place}' in image
    assert dockerfile_words('docker')[0] == 'gunicorn'


def test_the_container_for_mail_makes_the_queue_delivers_and_ends_at_sigterm(
    shop, commands_in_path, make_settings, smtp_server, queue_dir, until
):
    shop()
    command = shlex.split(read_yaml(block_with('docker', 'services:', 'yaml'))['services']['mail']['command'])

    with running(command) as process:
        until((queue_dir / 'new').is_dir)
        enqueue(queue_dir, make_settings, smtp_server)
        smtp_server.wait_for(1)
        process.terminate()

        assert process.wait(30) == 0


def test_the_containers_of_the_pod_share_the_volume(tmp_path):
    pod = read_yaml(block_with('kubernetes', 'kind:', 'yaml'))['spec']['template']['spec']
    containers = [*pod['initContainers'], *pod['containers']]
    names = {volume['name'] for volume in pod['volumes']}
    place = settings_of('kubernetes', tmp_path).queue_dir

    assert [parse_command(it['args']).ini for it in containers if 'args' in it] == ['production.ini', 'production.ini']
    for container in containers:
        (mount,) = container['volumeMounts']
        assert mount['name'] in names
        assert place.parent == Path(mount['mountPath'])
    assert pod['terminationGracePeriodSeconds'] >= STOP_SECONDS


# --- one-container.rst --------------------------------------------------------


@pytest.fixture
def start(shop):
    """The command that starts the script of the card, which lies in the current folder."""
    if shutil.which('bash') is None:
        pytest.skip('There is no bash here')
    shop()
    Path('start.sh').write_text(block_with('one-container', '#!/bin/bash', 'bash'))
    return dockerfile_words('one-container')


def test_the_container_for_both_passes_sigterm_on_and_waits(
    start, commands_in_path, make_settings, smtp_server, until, queue_dir
):
    add_command(commands_in_path / 'gunicorn', 'trap "touch ended; exit 0" TERM; touch begun; sleep 60 & wait')
    add_command(commands_in_path / 'mq-queue', 'exit 0')
    enqueue(queue_dir, make_settings, smtp_server)
    with running(start) as process:
        smtp_server.wait_for(1)
        until(Path('begun').exists)
        process.terminate()

        assert process.wait(30) == 128 + signal.SIGTERM
    assert Path('ended').exists()


@pytest.mark.parametrize(('first', 'other'), [('gunicorn', 'mq-run'), ('mq-run', 'gunicorn')])
def test_the_container_for_both_ends_with_either(start, commands_in_path, first, other):
    add_command(commands_in_path / 'mq-queue', 'exit 0')
    add_command(commands_in_path / first, 'until test -e begun; do sleep 0.05; done; sleep 0.2; exit 3')
    add_command(commands_in_path / other, 'trap "touch ended; exit 0" TERM; touch begun; sleep 60 & wait')

    with running(start) as process:
        assert process.wait(30) == 3
    assert Path('ended').exists()


def test_the_container_for_both_does_not_start_without_a_queue(start, commands_in_path):
    add_command(commands_in_path / 'mq-queue', 'exit 78')

    with running(start) as process:
        assert process.wait(30) == 78


# --- heroku-like.rst ----------------------------------------------------------


def test_the_procfile_starts_our_commands_with_the_database_of_the_platform(tmp_path):
    processes = dict(line.split(': ', 1) for line in block_with('heroku-like', 'release:', 'text').splitlines())
    environ = os.environ | {'DATABASE_URL': 'postgres://shop:secret@db.site.example:5432/shop'}
    url = 'postgresql+psycopg://shop:secret@db.site.example:5432/shop'

    def words(line):
        shell = subprocess.run(
            ['sh', '-c', f'printf "%s\\n" {line}'], env=environ, capture_output=True, text=True, check=True
        )
        return shell.stdout.splitlines()

    assert list(processes) == ['release', 'web', 'mail']
    for name in ('release', 'mail'):
        arguments = parse_command(words(processes[name]))
        overrides = dict(text.split('=', 1) for text in arguments.overrides)
        settings = settings_of('heroku-like', tmp_path, smtp_password='secret', **overrides)
        assert (arguments.ini, settings.queue, settings.sql_url) == ('production.ini', 'sql', url)
    assert f'--paste-global=database={url}' in words(processes['web'])


# --- supervisord.rst ----------------------------------------------------------


def test_the_programs_of_supervisord_are_ours_and_get_the_time_to_stop():
    programs = configparser.ConfigParser(interpolation=None)
    programs.read_string(block_with('supervisord', '[program:', 'ini'))
    mail = programs['program:shop-mail']

    arguments = parse_command(shlex.split(mail['command']))

    assert arguments.watch == run.WATCH_INTERVAL
    assert mail['stopsignal'] == 'TERM'
    assert int(mail['stopwaitsecs']) >= STOP_SECONDS
    assert programs['program:shop-web']['user'] == mail['user']


# --- gunicorn-uwsgi-mod_wsgi.rst ----------------------------------------------


@pytest.mark.parametrize(('more', 'threads'), [({}, True), ({'enable-threads': None}, False)])
def test_uwsgi_has_threads_as_the_card_sets_it_up(monkeypatch, more, threads):
    ini = configparser.ConfigParser(interpolation=None)
    ini.read_string(block_with('gunicorn-uwsgi-mod_wsgi', '[uwsgi]', 'ini'))
    options = {name: value.encode() for name, value in ini['uwsgi'].items() if name not in more}
    monkeypatch.setitem(sys.modules, 'uwsgi', SimpleNamespace(opt=options))

    assert dispatch.threads_run_here() is threads


def test_the_web_servers_wait_for_the_mailer_to_close():
    seconds = dispatch.STOP_SECONDS + dispatch.ABORT_SECONDS
    gunicorn = {}
    exec(block_with('gunicorn-uwsgi-mod_wsgi', 'preload_app', 'python'), gunicorn)
    apache = block_with('gunicorn-uwsgi-mod_wsgi', 'WSGIDaemonProcess', 'apache')

    assert gunicorn['graceful_timeout'] >= seconds
    assert int(re.search(r'shutdown-timeout=(\d+)', apache)[1]) > seconds > 5
    assert seconds == 6


# --- logging.rst --------------------------------------------------------------


@pytest.fixture
def formatter_module(tmp_path, monkeypatch):
    """``shop.logs`` of the card can be imported while the test runs."""
    (tmp_path / 'shop').mkdir()
    (tmp_path / 'shop/__init__.py').touch()
    (tmp_path / 'shop/logs.py').write_text(block_with('logging', 'JSONFormatter', 'python'))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ('shop.logs', 'shop'):
        sys.modules.pop(name, None)


def test_mq_run_logs_json(shop, formatter_module, make_settings, smtp_server, queue_dir, capsys):
    ini = shop(block_with('logging', '[loggers]', 'ini'))
    enqueue(queue_dir, make_settings, smtp_server)

    status = status_of(run.main, ini)

    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines() if '"sent"' in line]
    shown = json.loads(block_with('logging', '"time"', 'json'))
    assert status == 0
    assert list(line) == list(shown)
    assert {key: line[key] for key in ('level', 'logger', 'status', 'from', 'to', 'attempts', 'smtp')} == {
        key: shown[key] for key in ('level', 'logger', 'status', 'from', 'to', 'attempts', 'smtp')
    }


def test_a_line_of_another_logger_is_json_too(formatter_module):
    formatter = importlib.import_module('shop.logs').JSONFormatter()

    line = formatter.format(logging.LogRecord('shop', logging.INFO, '', 0, 'Order %d', (7,), None))

    assert json.loads(line)['message'] == 'Order 7'


def test_the_processor_for_structlog_brings_the_fields_and_leaves_other_records_alone():
    chains = []

    class ProcessorFormatter:
        remove_processors_meta = None

        def __init__(self, processors):
            chains.append(processors)

    stdlib = SimpleNamespace(ProcessorFormatter=ProcessorFormatter)
    processors = SimpleNamespace(JSONRenderer=lambda: None)
    namespace = {'structlog': SimpleNamespace(stdlib=stdlib, processors=processors)}
    exec(block_with('logging', 'structlog', 'python'), namespace)
    ((add_mail_fields, *_),) = chains
    record = logging.LogRecord('mailqueue.delivery_log', logging.INFO, '', 0, 'status=sent', (), None)

    assert add_mail_fields(None, 'info', {'_record': record}) == {'_record': record}
    record.mailqueue = {'status': 'sent'}
    assert add_mail_fields(None, 'info', {'_record': record})['status'] == 'sent'


# --- monitoring.rst -----------------------------------------------------------


def test_check_and_metrics_print_what_the_card_shows(shop, make_settings, queue_dir, capsys):
    ini = shop()
    enqueue(queue_dir, make_settings)
    (nagios,) = [words for words in commands_of(ROOT / 'docs/howto/monitoring.rst') if 'check' in words]
    shown = block_with('monitoring', 'MAILQUEUE').removesuffix(' …')

    assert status_of(queue.main, ini, *nagios[2:]) == 0
    check = re.sub(r'oldest( |=)\d+s', r'oldest\g<1>0s', capsys.readouterr().out)
    assert check.startswith(shown)

    assert status_of(queue.main, ini, 'metrics') == 0
    metrics = re.sub(r'\d{10}$', 'NOW', capsys.readouterr().out, flags=re.MULTILINE).splitlines()
    sample = re.sub(r'\d{10}$', 'NOW', block_with('monitoring', 'timestamp_seconds', 'text'), flags=re.MULTILINE)
    assert set(sample.splitlines()) <= set(metrics)


def test_the_alerts_name_metrics_and_states_that_there_are():
    (group,) = read_yaml(block_with('monitoring', 'groups:', 'yaml'))['groups']
    texts = [*(rule['expr'] for rule in group['rules']), block_with('monitoring', 'sum by')]
    metrics = {name for text in texts for name in re.findall(r'\bmailqueue_\w+', text)}
    states = {state for text in texts for names in re.findall(r'state=~?"(.*?)"', text) for state in names.split('|')}

    assert metrics == {'mailqueue_messages', 'mailqueue_oldest_message_timestamp_seconds'}
    assert states == {'waiting', 'dead', 'in doubt', 'corrupt'} < set(STATES)
    assert all('alert' in rule for rule in group['rules'])


# --- upgrading.rst ------------------------------------------------------------


def test_tables_of_another_version_stop_mq_run_as_the_card_says(tmp_path, capsys):
    ini = tmp_path / 'production.ini'
    url = f'sqlite:///{tmp_path}/shop.sqlite'
    ini.write_text(f'[app:main]\nmailqueue.queue = sql\nmailqueue.sql_url = {url}\nmailqueue.smtp_hostname = mail\n')
    shown = block_with('upgrading', 'has tables of version').strip('… ')
    assert status_of(queue.main, str(ini), 'init') == 0
    with contextlib.closing(sqlite3.connect(tmp_path / 'shop.sqlite')) as database:
        assert database.execute(block_with('upgrading', 'SELECT')).fetchall() == [(1,)]
        database.execute('UPDATE mailqueue_schema SET version = 2')
        database.commit()

    assert status_of(run.main, str(ini)) == 78
    assert shown in capsys.readouterr().err


def test_a_setting_that_is_not_known_is_named(shop, capsys):
    assert status_of(run.main, shop(of_the_next_release='1')) == 78
    assert 'mailqueue.of_the_next_release' in capsys.readouterr().err


# --- backup.rst ---------------------------------------------------------------


def test_a_restored_queue_repeats_mail_unless_it_is_held(shop, make_settings, smtp_server, queue_dir, tmp_path):
    ini = shop()
    message_id = enqueue(queue_dir, make_settings, smtp_server)
    shutil.copytree(queue_dir, tmp_path / 'backup')
    hold, _ = block_with('backup', ' hold ').splitlines()

    def restore():
        shutil.rmtree(queue_dir)
        shutil.copytree(tmp_path / 'backup', queue_dir)

    assert status_of(run.main, ini) == 0
    restore()
    assert status_of(run.main, ini) == 0
    assert [message_id in envelope.content.decode() for envelope in smtp_server.wait_for(2)] == [True, True]

    restore()
    assert status_of(queue.main, ini, *hold.split()[2:]) == 0
    assert status_of(run.main, ini) == 0
    smtp_server.wait_for(2)
    (held,) = (queue_dir / 'held').iterdir()

    assert status_of(queue.main, ini, 'unhold', held.name) == 0
    assert status_of(run.main, ini) == 0
    smtp_server.wait_for(3)


def test_what_was_in_progress_is_held_by_its_id_only(shop, make_settings, smtp_server, queue_dir, capsys):
    ini = shop()
    enqueue(queue_dir, make_settings, smtp_server)
    (file,) = (queue_dir / 'new').iterdir()
    file.rename(queue_dir / 'cur' / file.name)

    assert status_of(queue.main, ini, 'hold', '--state', 'waiting', '--yes') == 0
    assert not [*(queue_dir / 'held').iterdir()]
    assert status_of(queue.main, ini, 'hold', '--state', 'in progress', '--yes') == 2
    assert status_of(queue.main, ini, 'hold', file.name) == 0
    assert status_of(run.main, ini) == 0

    assert smtp_server.received == []
    assert [path.name.partition(',')[0] for path in (queue_dir / 'held').iterdir()] == [file.name]


def test_init_completes_tables_whose_rows_were_not_in_the_backup(tmp_path):
    ini = tmp_path / 'production.ini'
    url = f'sqlite:///{tmp_path}/shop.sqlite'
    ini.write_text(f'[app:main]\nmailqueue.queue = sql\nmailqueue.sql_url = {url}\nmailqueue.smtp_hostname = mail\n')
    assert status_of(queue.main, str(ini), 'init') == 0
    with contextlib.closing(sqlite3.connect(tmp_path / 'shop.sqlite')) as database:
        database.execute('DELETE FROM mailqueue_schema')
        database.commit()

    assert status_of(queue.main, str(ini), 'init') == 0

    assert status_of(run.main, str(ini)) == 0
