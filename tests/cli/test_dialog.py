"""What is made of a dialog: how far it came, and what a person can look at."""

from __future__ import annotations

import logging
import socket
import ssl

import pytest

from pyramid_mailqueue.cli.dialog import advice, is_final, shown_dialog
from pyramid_mailqueue.exceptions import ServerTrouble

WORDS = {'host': 'mail.x', 'port': '25', 'starttls': ' -starttls smtp', 'sender': 's@x', 'recipient': 'r@x'}
log = logging.getLogger('mailqueue.smtp')


def step_of(*lines):
    with shown_dialog() as dialog:
        for line in lines:
            log.debug('mail.x:25 %s', line)
    return dialog.step


def trouble_because_of(cause):
    trouble = ServerTrouble('something is wrong')
    trouble.__cause__ = cause
    return trouble


GREETED = ('S: 220 hello',)
INTRODUCED = (*GREETED, 'C: EHLO web1', 'S: 250 mail.x', 'S: 250 PIPELINING')
GROUP = ('C: MAIL FROM:<s@x>', 'C: RCPT TO:<r@x>', 'C: DATA')


@pytest.mark.parametrize(
    ('lines', 'step'),
    [
        ((), 'connect'),
        (GREETED, 'greeting'),
        ((*GREETED, 'C: EHLO web1'), 'EHLO'),
        (INTRODUCED, 'EHLO'),
        ((*GREETED, 'C: EHLO web1', 'S: 502 what?', 'C: HELO web1', 'S: 421 bye'), 'EHLO'),
        ((*INTRODUCED, 'C: STARTTLS', 'S: 220 go ahead'), 'STARTTLS'),
        ((*INTRODUCED, 'C: AUTH PLAIN [redacted]', 'S: 535 no'), 'AUTH'),
        ((*INTRODUCED, 'C: AUTH LOGIN ', 'S: 334 [redacted]', 'C: [redacted]', 'S: 535 [redacted]'), 'AUTH'),
        ((*INTRODUCED, *GROUP), 'MAIL'),
        ((*INTRODUCED, *GROUP, 'S: 250 ok'), 'RCPT'),
        ((*INTRODUCED, *GROUP, 'S: 553 not you', 'S: 503 what?', 'S: 503 what?'), 'MAIL'),
        ((*INTRODUCED, *GROUP, 'S: 250 ok', 'S: 550 nobody', 'S: 554 nobody'), 'RCPT'),
        ((*INTRODUCED, *GROUP, 'S: 250 ok', 'S: 250 ok', 'S: 451 full'), 'content'),
        ((*INTRODUCED, *GROUP, 'S: 250 ok', 'S: 250 ok', 'S: 354 go', 'C: <5 bytes of data>'), 'content'),
    ],
)
def test_how_far_a_dialog_came(lines, step):
    assert step_of(*lines) == step


def test_lines_are_shown_without_the_name_of_the_server_and_what_is_none_as_it_is(capsys):
    with shown_dialog():
        log.debug('[::1]:25 C: EHLO web1')
        log.debug('mail.x:25 S: 250 \x1b[2Jclear')
        log.info('mail.x:25: TLS failed, going on without: EOF')

    assert capsys.readouterr().out == (
        '  C: EHLO web1\n  S: 250 \\x1b[2Jclear\n  mail.x:25: TLS failed, going on without: EOF\n'
    )


def test_the_logger_is_afterwards_as_it_was():
    before = log.level, log.propagate, list(log.handlers)
    with shown_dialog():
        assert (log.level, log.propagate) == (logging.DEBUG, False)

    assert (log.level, log.propagate, log.handlers) == before


@pytest.mark.parametrize(
    ('step', 'cause', 'hint'),
    [
        ('connect', ConnectionRefusedError(), 'nc -vz mail.x 25'),
        ('connect', socket.gaierror(socket.EAI_NONAME, 'unknown'), 'getent hosts mail.x'),
        ('connect', UnicodeError(), 'getent hosts mail.x'),
        ('connect', ssl.SSLError(1, 'wrong version'), 'openssl s_client -connect mail.x:25 -starttls smtp'),
        ('STARTTLS', None, 'openssl'),
        ('AUTH', None, 'smtp_password'),
        ('MAIL', None, '<s@x>'),
        ('RCPT', None, '<r@x>'),
    ],
)
def test_the_hints_are_for_what_has_failed(step, cause, hint):
    assert any(hint in line for line in advice(step, trouble_because_of(cause), **WORDS))


def test_where_nothing_is_known_nothing_is_said():
    assert advice('NOOP', None, **WORDS) == []


@pytest.mark.parametrize(
    ('step', 'trouble', 'expected'),
    [
        ('AUTH', ServerTrouble('no', code=535), True),
        ('AUTH', ServerTrouble('not now', code=454), False),
        ('EHLO', ServerTrouble('no STARTTLS'), True),
        ('MAIL', ServerTrouble('it closed the connection'), False),
        ('connect', trouble_because_of(ConnectionRefusedError()), False),
        ('connect', trouble_because_of(TimeoutError()), False),
        ('connect', trouble_because_of(socket.gaierror(socket.EAI_NONAME, 'unknown')), True),
        ('connect', trouble_because_of(socket.gaierror(socket.EAI_AGAIN, 'later')), False),
        ('connect', trouble_because_of(UnicodeError('label too long')), True),
        ('STARTTLS', trouble_because_of(ssl.SSLCertVerificationError(1, 'expired')), True),
        ('STARTTLS', trouble_because_of(ssl.SSLEOFError(8, 'EOF')), False),
    ],
)
def test_what_the_server_or_the_settings_would_have_to_change_for_is_final(step, trouble, expected):
    assert is_final(step, trouble) is expected
