from __future__ import annotations

import pytest

from tests.crash import strace


@pytest.fixture(scope='session')
def _reason_against_strace():
    return strace.why_not()


@pytest.fixture
def needs_strace(_reason_against_strace):
    if _reason_against_strace:
        pytest.skip(_reason_against_strace)
