"""What commands print: words, JSON and tables."""

from __future__ import annotations

import json

import pytest

from pyramid_mailqueue.cli import output
from pyramid_mailqueue.cli.columns import Column
from pyramid_mailqueue.cli.output import as_json, print_json, print_json_list, print_table
from pyramid_mailqueue.display import few, numbered, printable, size_in_words, span_in_words, timestamp
from pyramid_mailqueue.queues.entries import QueueEntry


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('', ''),
        ('Grüße, 世界 😀', 'Grüße, 世界 😀'),
        ('\x1b]0;title\x07', '\\x1b]0;title\\x07'),
        ('a\r\nb\tc\x7f', 'a\\r\\nb\\tc\\x7f'),
        ('\x9b31m', '\\x9b31m'),
        ('right\u202eto left', 'right\\u202eto left'),
        ('zero\u200bwidth', 'zero\\u200bwidth'),
        ('\udcff', '\\udcff'),
    ],
)
def test_whatever_somebody_has_written_is_one_line_of_text(text, expected):
    assert printable(text) == expected
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    ('seconds', 'expected'),
    [(-5, '0s'), (0.5, '0s'), (59.9, '59s'), (60, '1m'), (3599, '59m'), (3600, '1h'), (47 * 3600, '47h'), (2e5, '2d')],
)
def test_a_time_span_is_told_in_its_largest_unit(seconds, expected):
    assert span_in_words(seconds) == expected


@pytest.mark.parametrize(
    ('octets', 'expected'),
    [(0, '0'), (999, '999'), (1000, '1.0K'), (1536, '1.5K'), (10 * 1024**2, '10.0M'), (3 * 1024**4, '3.0T')],
)
def test_a_size_has_few_digits(octets, expected):
    assert size_in_words(octets) == expected


def test_one_message_is_no_messages():
    assert [numbered(number, 'message') for number in range(3)] == ['0 messages', '1 message', '2 messages']


def test_many_recipients_are_a_few_and_a_number():
    assert few(['a@x', 'b@x', 'c@x']) == 'a@x,b@x,c@x'
    assert few(['a@x', 'b@x', 'c@x', 'd@x', 'e@x']) == 'a@x,b@x,c@x,... (2 more)'
    assert few([]) == ''


def test_times_are_iso_8601_in_utc():
    assert timestamp(1764000000.9) == '2025-11-24T16:00:00Z'
    assert timestamp(None) is None


def test_a_message_has_one_form_in_json():
    entry = QueueEntry('id', 'waiting', '', ('a@x.example',), 2, 0.0, 60.0, 30.0, '451 later', 'Grüße', '<1@x>', size=5)

    assert list(as_json(entry).items()) == [
        ('id', 'id'),
        ('state', 'waiting'),
        ('sender', ''),
        ('recipients', ('a@x.example',)),
        ('retries', 2),
        ('queued_at', '1970-01-01T00:00:00Z'),
        ('due', '1970-01-01T00:01:00Z'),
        ('last_attempt', '1970-01-01T00:00:30Z'),
        ('last_reply', '451 later'),
        ('subject', 'Grüße'),
        ('message_id', '<1@x>'),
        ('size', 5),
    ]


@pytest.mark.parametrize('values', [[], [1], [{'a': 'é\x1b\udcff'}, 2, [3]]])
def test_json_is_printed_in_ascii_value_by_value(capsys, values):
    print_json_list(iter(values))
    listed = capsys.readouterr().out
    print_json(values)

    assert json.loads(listed) == json.loads(capsys.readouterr().out) == values
    assert listed.isascii()
    assert listed.count('\n') == max(len(values), 1)


COLUMNS = (Column('NAME'), Column('N', is_number=True), Column('WHAT'))


def test_a_table_in_a_pipe_is_plain_text(capsys):
    print_table(COLUMNS, iter([('a', '1', 'x'), ('longer', '100', '\x1b[2J')]))

    assert capsys.readouterr().out == 'NAME      N  WHAT\na         1  x\nlonger  100  \\x1b[2J\n'


def test_a_table_without_rows_has_its_titles(capsys):
    print_table(COLUMNS, [])

    assert capsys.readouterr().out == 'NAME  N  WHAT\n'


def test_a_long_table_begins_before_its_end_is_known(capsys, monkeypatch):
    monkeypatch.setattr(output, 'ROWS_AT_ONCE', 2)

    def rows():
        yield from [('a', '1', 'x')] * 2
        printed.append(capsys.readouterr().out)
        yield ('the last', '2', 'y')

    printed = []
    print_table(COLUMNS, rows())

    assert printed == ['NAME  N  WHAT\na     1  x\na     1  x\n']
    assert capsys.readouterr().out == 'the last  2  y\n'
