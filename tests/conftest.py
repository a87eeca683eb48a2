"""
What holds for all tests: nothing is left out in silence.

A test that cannot run here (no ``strace``, no database server) is skipped, and the end of the run says so in plain
words.  With ``MAILQUEUE_TESTS_COMPLETE=1``, as in CI, leaving out a test is a failure.
"""

from __future__ import annotations

import os

import hypothesis
import pytest

# A slow machine is no defect; nothing is remembered from one run to the next, and CI tries the same examples each time.
hypothesis.settings.register_profile('mailqueue', deadline=None, database=None, derandomize='CI' in os.environ)
hypothesis.settings.load_profile('mailqueue')

COMPLETE = bool(os.environ.get('MAILQUEUE_TESTS_COMPLETE'))


def _fail_if_left_out(report):
    if COMPLETE and report.skipped and not hasattr(report, 'wasxfail'):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = 'failed'
        report.longrepr = f'MAILQUEUE_TESTS_COMPLETE is set, but this was left out.  {reason}'


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport():
    report = yield
    _fail_if_left_out(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report():
    report = yield
    _fail_if_left_out(report)
    return report


def pytest_terminal_summary(terminalreporter):
    left_out = terminalreporter.stats.get('skipped', [])
    if left_out:
        terminalreporter.section('LEFT OUT', red=True, bold=True)
        terminalreporter.write_line(
            f'{len(left_out)} skipped, for the reasons listed at the end: this run says nothing about what they hold.'
        )
