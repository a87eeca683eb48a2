"""What is shown of a message, whatever it holds: text, and never an exception."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given

from demo.inbox import Inbox
from pyramid_mailqueue.cli.queue_look import list_messages, show_message
from pyramid_mailqueue.delivery.plugins import PluginMessage
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.contents import MOST_TEXT, body_of, read_contents
from pyramid_mailqueue.queues.entries import header_lines, tell_from_header
from pyramid_mailqueue.queues.memory import MemoryQueue
from tests.parts.strategies import odd_contents

WORDS = 'Größe'


LATIN = WORDS.encode('latin-1')


def part(fields, body=LATIN):
    return f'Content-Type: text/plain{fields}\r\n\r\n'.encode() + body


def mixed(*parts):
    middle = b''.join(b'--b\r\n%s\r\n' % part for part in parts)
    return b'Content-Type: multipart/mixed; boundary=b\r\n\r\n%s--b--\r\n' % middle


@pytest.mark.parametrize(
    ('content', 'text'),
    [
        (part('; charset=iso-8859-1'), WORDS),
        (part('; charset=utf-8', WORDS.encode()), WORDS),
        (part('', WORDS.encode()), WORDS),
        # Nobody knows these: what is not UTF-8 is Latin-1.
        (part('; charset=no-such', WORDS.encode()), WORDS),
        (part('; charset=no-such'), WORDS),
        (part('; charset=hex'), WORDS),
        (part('; charset="x\0y"'), WORDS),
        (part('; charset'), WORDS),
        (part('; charset=""'), WORDS),
        (part('; charset*1=a; charset*=b'), WORDS),
        (part(''), WORDS),
        (part('; charset=utf-8'), 'Gr\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}e'),
        # Not a character: nothing could write it.
        (part('; charset=utf-7', b'+2AA-'), '\\ud800'),
        (part('\r\nContent-Transfer-Encoding: base64', b'SGVsbG8'), 'Hello'),
        (part('\r\nContent-Transfer-Encoding: base64', b'SGVs=!bG8='), 'Hello'),
        (part('\r\nContent-Transfer-Encoding: base64', b'SGVsb'), 'SGVsb'),
        (part('\r\nContent-Transfer-Encoding: pigeon', b'Hello'), 'Hello'),
        (part('\r\nContent-Transfer-Encoding: =?utf-8?q?\xc3?=', b'Hello'), 'Hello'),
        (part('\r\nContent-Transfer-Encoding: quoted-printable', b'Hello=X'), 'Hello=X'),
        (part('\r\nContent-Transfer-Encoding: x-uuencode', b'Hello'), 'Hello'),
        (part('\r\nContent-Disposition: attachment'), ''),
        (b'Content-Type: text/html\r\n\r\n<p>', ''),
        (b'Content-Type: no type\r\n\r\nHello', 'Hello'),
        (b'no header at all', 'no header at all'),
        (b'', ''),
        (b'\r\nHello', 'Hello'),
        (mixed(), ''),
        (mixed(b''), ''),
        (mixed(b'Content-Type: message/rfc822\r\n\r\n'), ''),
        (mixed(b'Content-Type: message/rfc822\r\n\r\nSubject: inner\r\n\r\ninner'), ''),
        (mixed(b'Content-Type: message/delivery-status\r\n\r\n', part('', b'Hello')), 'Hello'),
        (b'Content-Type: multipart/mixed\r\n\r\nHello', ''),
        (b"Content-Type: multipart/mixed; boundary*=\0''b\r\n\r\n--b\r\n\r\nHello", ''),
    ],
    ids=lambda value: ascii(value[-60:]) if isinstance(value, bytes) else '',
)
def test_the_text_is_the_best_that_can_be_made_of_it(content, text):
    assert body_of(content, 'plain') == text


def test_a_long_text_without_a_character_set_is_cut_between_characters():
    contents = read_contents(part('', '日'.encode() * (MOST_TEXT * 2)))

    assert contents.text == ('日' * MOST_TEXT,)
    assert contents.is_cut


def test_a_name_of_a_file_that_cannot_be_read_hides_nothing_else():
    contents = read_contents(mixed(part('; name*1=a; name*=b', b'Hello'), part("; name*=no''%ff", b'1')))

    # Since Python 3.14 the first one can be read: it is a file then.
    assert contents.text == ('Hello',) or contents.parts[0].name == 'ba'
    assert contents.parts[-1].size == 1


def test_the_html_is_found_in_the_same_way():
    html = b'Content-Type: text/html; charset=no-such\r\n\r\n<p>' + WORDS.encode('latin-1')

    assert body_of(mixed(part('', b'Hello'), html), 'html') == f'<p>{WORDS}'


def all_text_of(content):
    yield from tell_from_header(content)
    yield from header_lines(content)
    yield from (body_of(content, kind) for kind in ('plain', 'html'))
    contents = read_contents(content)
    yield from contents.text or ()
    for name, value in contents.header:
        yield from (name, value)
    for other in contents.parts:
        yield other.kind
    msg = PluginMessage('1', Envelope('', ('ada@x.example',), content), 1, 0)
    yield msg.msg_id or ''


@given(odd_contents())
def test_whatever_a_message_holds_what_is_shown_of_it_is_text(content):
    for text in all_text_of(content):
        assert text.encode() is not None


@given(odd_contents())
def test_whatever_a_message_holds_its_queue_can_be_listed_and_it_can_be_shown(content):
    queue = MemoryQueue()
    name = queue.put(Envelope('', ('ada@x.example',), content))
    chosen = {
        'sender': None,
        'recipient': None,
        'older_than': None,
        'newer_than': None,
        'states': None,
        'message_id': None,
    }

    for options in ({'raw': False, 'json': False}, {'raw': False, 'json': True}):
        arguments = argparse.Namespace(prog='mq-queue', ids=[name], **chosen, **options)
        assert list_messages(queue, arguments) == 0
        assert show_message(queue, arguments) == 0


@pytest.fixture(scope='module')
def inbox(tmp_path_factory):
    return Inbox(tmp_path_factory.mktemp('demo') / 'inbox')


@given(content=odd_contents())
def test_whatever_a_message_holds_the_inbox_of_the_demo_shows_it(inbox, content):
    inbox.store('shop@site.example', ['ada@x.example'], content)

    (mail,) = inbox.latest(1)

    assert mail.recipient == 'ada@x.example'
    for text in (mail.sender, mail.subject, mail.text, mail.source):
        assert text.encode() is not None


def test_a_message_with_very_many_parts_is_not_taken_apart():
    part = b'--x\r\n\r\n\r\n'
    contents = read_contents(b'Content-Type: multipart/mixed; boundary=x\r\n\r\n' + part * 100_000 + b'--x--\r\n')

    assert contents.problem == 'This message is too large to be parsed here.'
    assert contents.header == (('Content-Type', 'multipart/mixed; boundary=x'),)
