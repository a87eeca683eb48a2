"""What monitoring is told of a queue."""

from __future__ import annotations

import re

import pytest

from pyramid_mailqueue.cli.monitor import CRITICAL, OK, WARNING, judge, prometheus_text
from pyramid_mailqueue.queues.entries import STATES

HOUR = 3600
NOTHING = dict.fromkeys(STATES, 0)

# label=value[unit][;warn][;crit][;min], https://www.monitoring-plugins.org/doc/guidelines.html
PERFORMANCE_DATA = re.compile(r'[a-z_]+=[0-9]+s?(;[0-9]*){0,4}')


@pytest.mark.parametrize(
    ('counts', 'age', 'limits', 'status', 'told'),
    [
        ({}, None, (None, None), OK, 'OK - 0 waiting'),
        ({}, None, (HOUR, 0), OK, 'OK - 0 waiting'),
        ({'waiting': 9}, 3 * HOUR, (None, None), OK, 'OK - 9 waiting, oldest 3h'),
        ({'waiting': 9}, HOUR, (HOUR, 9), OK, 'OK - 9 waiting, oldest 1h'),
        ({'waiting': 9}, HOUR + 1, (HOUR, 9), CRITICAL, 'CRITICAL - the oldest is 1h old (limit: 1h)'),
        ({'waiting': 10}, 60, (HOUR, 9), CRITICAL, 'CRITICAL - 10 waiting (limit: 9)'),
        ({'held': 5}, None, (HOUR, 0), OK, 'OK - 0 waiting'),
        ({'dead': 1}, None, (None, None), WARNING, 'WARNING - 1 dead letter'),
        ({'dead': 2}, None, (None, None), WARNING, 'WARNING - 2 dead letters'),
        ({'in doubt': 1}, None, (None, None), WARNING, 'WARNING - 1 message in doubt'),
        ({'in doubt': 2}, None, (None, None), WARNING, 'WARNING - 2 messages in doubt'),
        ({'corrupt': 2}, None, (None, None), WARNING, 'WARNING - 2 corrupt files'),
        (
            {'waiting': 2, 'dead': 1, 'corrupt': 1},
            2 * HOUR,
            (HOUR, 1),
            CRITICAL,
            'CRITICAL - the oldest is 2h old (limit: 1h); 2 waiting (limit: 1); 1 dead letter; 1 corrupt file',
        ),
    ],
)
def test_a_queue_is_judged_by_its_limits_and_by_what_somebody_has_to_look_at(counts, age, limits, status, told):
    verdict = judge({**NOTHING, **counts}, age, *limits)

    text, _, data = verdict.text.partition(' | ')
    assert (verdict.status, text) == (status, f'MAILQUEUE {told}')
    assert verdict.word == told.split()[0]
    assert all(PERFORMANCE_DATA.fullmatch(value) for value in data.split())


def test_a_message_that_ends_processes_again_and_again_is_a_warning_with_its_id():
    verdict = judge({'waiting': 1}, None, None, None, crashing=['x|y'])

    assert verdict.status == WARNING
    assert verdict.text.startswith('MAILQUEUE WARNING - delivery of x?y crashes repeatedly | oldest=')


def test_the_performance_data_have_every_number_with_its_limit():
    counts = {state: number for number, state in enumerate(STATES)}

    data = judge(counts, 90.5, HOUR, 7).text.partition(' | ')[2]

    assert data == (
        'oldest=90s;;3600;0 waiting=0;;7;0 in_progress=1;;;0 held=2;;;0 dead=3;0;;0 in_doubt=4;0;;0 corrupt=5;0;;0'
    )
    assert judge(NOTHING, None, None, None).text.partition(' | ')[2].startswith('oldest=0s;;;0 waiting=0;;;0 ')


def test_the_metrics_are_in_the_format_of_prometheus():
    text = prometheus_text({**NOTHING, 'waiting': 3}, {'waiting': 1764000000.5})

    assert text.endswith('\n')
    samples = [line for line in text.splitlines() if not line.startswith('#')]
    assert samples == [
        'mailqueue_messages{state="waiting"} 3',
        *(f'mailqueue_messages{{state="{state}"}} 0' for state in STATES[1:]),
        'mailqueue_oldest_message_timestamp_seconds{state="waiting"} 1764000000',
    ]
    for name in {sample.partition('{')[0] for sample in samples}:
        assert f'# TYPE {name} gauge\n' in text
        assert f'# HELP {name} ' in text
