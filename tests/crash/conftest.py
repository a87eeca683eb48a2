from __future__ import annotations

import pytest

from pyramid_mailqueue.queues.maildir import queue as maildir
from tests.parts import strace

# What it finds wrong is shown as in a test.
pytest.register_assert_rewrite('tests.parts.drain')

from tests.parts.drain import Office  # noqa: E402 - after the line above, which is of no use later


@pytest.fixture(scope='session')
def _reason_against_strace():
    return strace.why_not()


@pytest.fixture
def needs_strace(_reason_against_strace):
    if _reason_against_strace:
        pytest.skip(_reason_against_strace)


@pytest.fixture
def office():
    """The mail server of the runs that drain a queue."""
    office = Office()
    with office.server:
        yield office


@pytest.fixture
def few_files(monkeypatch):
    """This process may keep no file open that only waits."""
    monkeypatch.setattr(maildir, 'may_stay_open', lambda _: False)


@pytest.fixture(params=['many files', 'few files'])
def files(request):
    """Whether the process keeps open the file of each message that waits, or only of the first one of a transaction."""
    if request.param == 'few files':
        request.getfixturevalue('few_files')
