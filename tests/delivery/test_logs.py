"""One event, one line: whatever servers and senders have said."""

from __future__ import annotations

import errno
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.logs import Log, delivery_log, log_event, queue_log


class Lines(logging.Handler):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)


@pytest.fixture(scope='module')
def lines():
    handler = Lines()
    logger = logging.getLogger('test.lines')
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def line_of(lines, **fields):
    log_event(logging.getLogger('test.lines'), logging.INFO, **fields)
    return lines.records[-1].getMessage()


def parse(line):
    """Read a line of key=value pairs back, by the rules of this package and with no other code."""
    pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^ "]*)(?: |$)', line)
    return {key: unquote(value) for key, value in pairs}


def unquote(value):
    if not value.startswith('"'):
        return value
    return re.sub(
        r'\\(x..|u....|U........|.)',
        lambda match: (
            {'n': '\n', 'r': '\r', 't': '\t'}.get(match[1])
            or (chr(int(match[1][1:], 16)) if len(match[1]) > 1 else match[1])
        ),
        value[1:-1],
    )


@pytest.mark.parametrize(
    ('value', 'shown'),
    [
        ('sent', 'sent'),
        ('<shop@site.example>', '<shop@site.example>'),
        ('bücher@site.example', 'bücher@site.example'),
        (3, '3'),
        ('250 2.0.0 ok', '"250 2.0.0 ok"'),
        ('a=b', '"a=b"'),
        ('he said "no"', r'"he said \"no\""'),
        ('C:\\ not', r'"C:\\ not"'),
        ('one\r\nstatus=sent', r'"one\r\nstatus=sent"'),
        # What a terminal would obey, what would turn the line around, and what no file could hold.
        ('\x1b[2J', r'"\x1b[2J"'),
        ('\x9b2J', r'"\x9b2J"'),
        ('\u202egnirts', r'"\u202egnirts"'),
        ('\u2028', r'"\u2028"'),
        ('\udcff', r'"\udcff"'),
    ],
)
def test_a_value_is_quoted_if_it_could_be_misread(lines, value, shown):
    assert line_of(lines, key=value) == f'key={shown}'


def test_the_fields_are_told_in_their_order_and_empty_ones_left_out(lines):
    assert line_of(lines, status='sent', via='', smtp=None, attempts=0) == 'status=sent attempts=0'


def test_a_program_finds_the_same_as_a_dict(lines):
    line_of(lines, status='sent', to='a b@x.example', via='')

    assert lines.records[-1].mailqueue == {'status': 'sent', 'to': 'a b@x.example'}


def test_a_per_cent_sign_is_only_that(lines):
    assert line_of(lines, msgid='<%s%d@x.example>') == 'msgid=<%s%d@x.example>'


@given(st.dictionaries(st.sampled_from(['status', 'to', 'smtp', 'error']), st.text(min_size=1), min_size=1))
def test_nobody_can_write_a_line_or_a_field_of_their_own(lines, fields):
    line = line_of(lines, **fields)

    assert line.isprintable()
    assert parse(line) == fields


def test_the_record_names_the_code_that_tells(lines):
    line_of(lines, status='sent')

    assert lines.records[-1].funcName == 'line_of'


def test_what_a_server_says_is_text_in_one_line_in_every_log(lines):
    log = Log('test.lines')

    log.warning('%s The message %s waits.', ServerTrouble('mail:25 says \x1b]0;owned\x07\nstatus=sent'), 'ID')
    log.error('%d of %s', 3, 'm\u202eail')

    said = [record.getMessage() for record in lines.records[-2:]]
    assert said == [r'mail:25 says \x1b]0;owned\x07\nstatus=sent The message ID waits.', r'3 of m\u202eail']


class Broken(logging.Handler):
    def emit(self, record):
        raise OSError(errno.EIO, 'Input/output error')


@pytest.mark.parametrize('place', ['emit', 'filter'])
def test_a_log_handler_that_raises_changes_nothing(place):
    broken = Broken() if place == 'emit' else logging.NullHandler()
    if place == 'filter':
        broken.addFilter(lambda record: 1 / 0)
    logger = logging.getLogger('mailqueue')
    logger.addHandler(broken)
    try:
        log_event(queue_log, logging.CRITICAL, status='trouble')
        Log('mailqueue.delivery').warning('%s Mail waits.', 'Away.')
        Log('mailqueue.plugins').exception('failed')
    finally:
        logger.removeHandler(broken)


def test_what_nobody_hears_is_not_put_together(lines):
    class Precious:
        def __str__(self):
            raise AssertionError('nobody asked')

    log_event(logging.getLogger('test.lines'), logging.DEBUG, key=Precious())
    Log('test.lines').debug('%s', Precious())


def test_the_loggers_are_called_as_documented():
    assert (delivery_log.name, queue_log.name) == ('mailqueue.delivery_log', 'mailqueue.queue_log')
