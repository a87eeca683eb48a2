"""For tests in which it does not matter what kind of queue there is, or in which it has to be a certain one."""

from __future__ import annotations

import pytest

in_memory = pytest.mark.parametrize('kind', ['memory'], indirect=True)
in_a_maildir = pytest.mark.parametrize('kind', ['maildir'], indirect=True)
in_a_database = pytest.mark.parametrize('kind', ['sqlite', 'postgresql+psycopg'], indirect=True)
