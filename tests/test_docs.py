"""The docs are kept true: they parse, their links lead somewhere, and they name what there is and nothing else."""

from __future__ import annotations

import ast
import configparser
import importlib
import re
import runpy
import subprocess
import sys
from email.message import EmailMessage
from pathlib import Path

import docutils.nodes
import pytest
from webtest import TestApp

from pyramid_mailqueue.dashboard.permissions import CHANGE, CONTENT, VIEW
from pyramid_mailqueue.queues.maildir.inspection import FOLDERS, MOVING
from pyramid_mailqueue.settings import known_keys
from tests.parts.pages import DOCS, ROOT, name_of, parse

# Loggers have names like settings.
LOGGERS = {'run', 'smtp'}

# As tests are named: a file, or one test in it.
NAMED_TEST = re.compile(r'\b(tests/[\w/]+\.py)(?:::(\w+))?')

# And so have the permissions of the dashboard.
PERMISSIONS = {name.removeprefix('mailqueue.') for name in (VIEW, CONTENT, CHANGE)}


def literals_of(node):
    return [literal.astext() for literal in node.findall(docutils.nodes.literal)]


@pytest.mark.parametrize('path', DOCS, ids=name_of)
def test_every_document_is_plain_restructured_text(path):
    assert parse(path).astext()


@pytest.mark.parametrize('path', DOCS, ids=name_of)
def test_every_link_to_another_document_leads_there(path):
    targets = [node['refuri'] for node in parse(path).findall(docutils.nodes.reference) if 'refuri' in node]

    missing = [target for target in targets if '://' not in target and not leads_somewhere(path, target)]

    assert not missing


@pytest.mark.parametrize('path', DOCS, ids=name_of)
def test_every_test_that_a_document_names_is_there(path):
    named = NAMED_TEST.findall(path.read_text('utf-8'))

    missing = ['::'.join(pair) for pair in named if not is_there(*pair)]

    assert not missing


def is_there(file, test):
    path = ROOT / file
    return path.is_file() and (not test or re.search(rf'^def {test}\(', path.read_text('utf-8'), re.MULTILINE))


def test_each_line_of_the_threat_model_names_a_test():
    for table in parse(ROOT / 'docs/threats.rst').findall(docutils.nodes.tbody):
        for row in table.findall(docutils.nodes.row):
            attack, _, tests = row.findall(docutils.nodes.entry)
            found = [NAMED_TEST.fullmatch(literal.astext()) for literal in tests.findall(docutils.nodes.literal)]

            assert found, attack.astext()
            assert all(match and match[2] for match in found), attack.astext()


def leads_somewhere(path, target):
    name, _, anchor = target.partition('#')
    there = path.parent / name
    return there.is_file() and (not anchor or anchor in parse(there.resolve()).ids)


def test_the_index_leads_to_every_document():
    index = ROOT / 'docs/index.rst'

    targets = {node['refuri'] for node in parse(index).findall(docutils.nodes.reference)}

    others = {f'../{path.name}' for path in ROOT.glob('*.rst')}
    pages = {path.relative_to(index.parent).as_posix() for path in DOCS if path.is_relative_to(index.parent)}
    assert targets == pages - {index.name} | others


def test_every_setting_is_documented_with_its_default():
    documented = {}
    for item in parse(ROOT / 'docs/settings.rst').findall(docutils.nodes.definition_list_item):
        (term,) = item.findall(docutils.nodes.term)
        name, *default = literals_of(term)
        assert name not in documented, f'{name} is there twice'
        documented[name] = default[0] if default else None

    assert documented == {name: key.default for name, key in known_keys().items()}


@pytest.mark.parametrize('path', DOCS, ids=name_of)
def test_no_document_names_a_setting_that_does_not_exist(path):
    named = set(re.findall(r'(?<![\w.])mailqueue\.([a-z_]+)', path.read_text('utf-8')))

    assert named <= known_keys().keys() | LOGGERS | PERMISSIONS


def test_every_command_is_documented_and_no_other():
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg', 'utf-8')
    commands = {line.split('=')[0].strip() for line in setup['options.entry_points']['console_scripts'].split('\n')} - {
        ''
    }

    for path in (ROOT / 'README.rst', ROOT / 'docs/deployment.rst'):
        named = {literal.split()[0] for literal in literals_of(parse(path)) if literal.startswith('mq-')}
        assert named == commands


def test_the_architecture_names_every_room_and_no_other():
    """A module on the ground floor by its file, a folder with a slash, and a module in a folder by its name."""
    package = ROOT / 'pyramid_mailqueue'
    rooms = {path.name for path in package.glob('*.py')}
    rooms |= {f'{path.parent.name}/' for path in package.rglob('__init__.py')} - {'pyramid_mailqueue/'}
    literals = {*literals_of(parse(ROOT / 'docs/architecture.rst'))}
    folders = {f'{name}/' for name in (*FOLDERS, MOVING)}

    assert {text for text in literals if re.fullmatch(r'\w+\.py|[a-z]+/', text)} - folders == rooms
    rooms = (package / name for name in ('delivery', 'message', 'queues', 'transports'))
    modules = {path.stem for room in rooms for path in room.rglob('*.py')}
    assert modules - {'__init__', *literals} == set()


def blocks_of(name, language='python'):
    """Return the code blocks of a document, in their order."""
    blocks = parse(ROOT / name).findall(docutils.nodes.literal_block)
    return [block.astext() for block in blocks if language in block['classes']]


@pytest.fixture
def waiting(tmp_path):
    """Return the contents of the queue that the README's examples use here."""
    return lambda: [path.read_text() for folder in ('new', 'cur') for path in (tmp_path / 'queue' / folder).iterdir()]


def example(number, language, tmp_path):
    """Return an example of the README, with a queue of this test in it."""
    return blocks_of('README.rst', language)[number].replace('/var/spool/shop', str(tmp_path / 'queue'))


def test_the_application_in_the_readme_works(tmp_path, waiting, monkeypatch):
    (tmp_path / 'readme_application.py').write_text(example(0, 'python', tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    ini = configparser.ConfigParser()
    ini.read_string(example(0, 'ini', tmp_path))
    main = importlib.import_module('readme_application').main
    app = TestApp(main({}, **ini['app:main'], **{'mailqueue.delivery': 'queue'}))

    answer = app.post('/order', {'email': 'reader@site.example'})

    (mail,) = waiting()
    assert 'Envelope-to: reader@site.example\n' in mail
    assert f'Message-ID: {answer.json["message_id"]}\n' in mail
    for several in ('ada@x.example, eve@x.example', 'x: ada@x.example, eve@x.example;', 'Ada <ada@x.example>', ''):
        assert '400 Bad Request' in app.post('/order', {'email': several}, status=400)
    app.post('/order', status=400)
    assert waiting() == [mail]


def strings_of(path):
    """Return the texts in a module; what is put into one when it is run is left out."""
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
        if isinstance(node, ast.JoinedStr):
            yield ''.join(part.value for part in node.values if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_package_names_pages_by_their_titles():
    """The wheel has no docs/, and the site has no page of that name."""
    titles = {parse(path).get('title') for path in DOCS}
    texts = [text for path in (ROOT / 'pyramid_mailqueue').rglob('*.py') for text in strings_of(path)]

    named = {title for text in texts for title in re.findall(r'"([^"]+)" in the documentation', ' '.join(text.split()))}
    assert named
    assert named <= titles
    assert [text for text in texts if re.search(r'docs/\S*\.rst', text)] == []


CONFTEST, *TESTS = sorted(blocks_of('docs/testing.rst'), key=lambda block: not block.startswith('# conftest.py'))


@pytest.mark.parametrize('tests', TESTS, ids=lambda tests: re.search('def (test_[a-z_]+)', tests)[1])
def test_the_tests_in_the_docs_pass_for_the_application_in_the_readme(tmp_path, tests):
    files = {'shop.py': example(0, 'python', tmp_path), 'conftest.py': CONFTEST, 'test_shop.py': tests}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--rootdir={tmp_path}', tmp_path]

    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    assert f'{tests.count("def test_")} passed' in run.stdout, run.stdout


def test_the_application_in_the_docs_of_the_dashboard_lets_in_whom_it_says(tmp_path, make_settings):
    blocks = parse(ROOT / 'docs/dashboard.rst').findall(docutils.nodes.literal_block)
    (text,) = [block.astext() for block in blocks if 'def main(' in block.astext()]
    namespace = {}
    exec(text, namespace)
    app = namespace['main']({}, **make_settings(smtp_hostname='localhost', delivery='queue'))

    def visitor(user):
        return TestApp(app, extra_environ={'REMOTE_USER': user})

    visitor('ada').get('/mailqueue/messages/nobody/raw', status=404)
    visitor('bob').get('/mailqueue')
    visitor('bob').get('/mailqueue/messages/nobody/raw', status=403)
    visitor('bob').post('/mailqueue/flush', status=403)
    visitor('eve').get('/mailqueue', status=403)


@pytest.fixture
def run_script(tmp_path, smtp_server, monkeypatch):
    """Run a script of the docs, with a queue and a mail server of this test in it; return for whom it has sent mail."""

    def run_script(text):
        message = EmailMessage()
        message['From'] = 'shop@site.example'
        message['To'] = 'reader@site.example'
        message.set_content('Hello.')
        monkeypatch.chdir(tmp_path)
        Path('script.py').write_text(
            text.replace('/var/spool/shop', str(tmp_path / 'queue')).replace(
                "'mail.site.example',", f"'127.0.0.1', 'mailqueue.smtp_port': {smtp_server.port},"
            )
        )
        runpy.run_path('script.py', {'message': message})
        return [recipient for envelope in smtp_server.received for recipient in envelope.rcpt_tos]

    return run_script


def scripts_of(path):
    """Return the examples of a document that are no part of an application."""
    blocks = parse(path).findall(docutils.nodes.literal_block)
    texts = [block.astext() for block in blocks if 'python' in block['classes']]
    return [text for text in texts if 'import' in text and 'def ' not in text]


@pytest.mark.parametrize('path', [ROOT / 'README.rst', ROOT / 'docs/transactions.rst'], ids=name_of)
def test_a_script_without_pyramid_has_delivered_when_it_ends(path, run_script):
    (text,) = [text for text in scripts_of(path) if 'mailer_from_settings' in text]

    assert run_script(text) == ['reader@site.example']


def test_a_script_with_pyramid_has_delivered_when_it_ends(
    run_script, tmp_path, make_settings, smtp_server, monkeypatch
):
    (text,) = [text for text in scripts_of(ROOT / 'docs/transactions.rst') if 'bootstrap' in text]
    (tmp_path / 'docs_application.py').write_text(example(0, 'python', tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    settings = '\n'.join(f'{key} = {value}' for key, value in make_settings(smtp_server).items())
    (tmp_path / 'production.ini').write_text(f'[app:main]\nuse = call:docs_application:main\n{settings}\n')

    assert run_script(text) == ['reader@site.example']
