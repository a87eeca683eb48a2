"""Whatever stands in a message, in its name or in what a server said: it is shown as text, and breaks no page."""

from __future__ import annotations

import os
from dataclasses import replace
from email.message import EmailMessage
from pathlib import Path

import pytest

from pyramid_mailqueue.dashboard.names import id_of, token_of
from pyramid_mailqueue.exceptions import NoSuchMessage
from pyramid_mailqueue.message.encoded_words import decoded
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.contents import MOST_OCTETS, MOST_TEXT, read_contents
from tests.parts.kinds import in_a_maildir, in_memory
from tests.parts.states import make_dead

EVIL = '<img src=x onerror=alert(1)>"\'</pre></table><script>alert(1)</script>{{ 7*7 }}'
ODD = 'a\x1b]0;owned\x07\u202eb\ud800'


def pages_of(operator, name):
    paths = ('', '/messages', f'/messages/{token_of(name)}')
    return [operator.get(f'/mailqueue{path}') for path in paths]


def test_everything_that_others_have_written_is_escaped(operator, queue):
    message = EmailMessage()
    message['From'] = 'shop@site.example'
    message['Subject'] = EVIL
    message['X-Evil'] = EVIL
    message.set_content(f'{EVIL}\n')
    message.add_attachment(b'x', maintype='text', subtype='html', filename=EVIL)
    addresses = ('"<script>alert(1)</script>"@x.example', '"<b>"@x.example')
    name = make_dead(queue, Envelope(addresses[0], addresses, bytes(message)), f'550 {EVIL}')

    for page in (*pages_of(operator, name), operator.get(f'/mailqueue/messages?sender={EVIL}')):
        assert page.html.find_all(['script', 'img', 'b']) == []
    page = operator.get(f'/mailqueue/messages/{name}')
    assert page.html.main.get_text().count('<script>alert(1)</script>') >= 6
    assert '{{ 7*7 }}' in page.html.h1.get_text()
    confirm = page.form.submit('action', value='delete')
    assert confirm.html.find_all(['script', 'img', 'b']) == []


def test_control_characters_are_shown_as_such(operator, queue):
    content = 'Subject: =?utf-8?q?=1B]0;owned=07?= \u202eb\r\n\r\nred \x1b[31m\x00\r\n'.encode()
    name = make_dead(queue, Envelope('', ('ada@x.example',), content))

    for page in pages_of(operator, name):
        assert not set(page.text) & {'\x1b', '\x07', '\u202e', '\x00'}
    assert '\\x1b]0;owned\\x07' in operator.get(f'/mailqueue/messages/{name}')


NAMES = (
    EVIL.replace('/', '|'),
    'a b\r\nX-Evil: 1',
    '100% "sure"?#',
    '~tilde',
    'ö\u202e',
    os.fsdecode(b'\xff\xfe'),
    '-1',
)


@in_memory
def test_what_is_no_character_is_shown_as_such(operator, queue):
    content = b'Subject: =?utf-7?q?+2AA-?=\r\nContent-Type: text/plain; charset=utf-7\r\n\r\n+2AA-'
    name = make_dead(queue, Envelope('', ('ada@x.example',), content))

    *_, page = pages_of(operator, name)

    assert page.html.h1.get_text().split()[0] == page.html.pre.get_text().strip() == '\\ud800'


@in_a_maildir
@pytest.mark.parametrize('name', NAMES, ids=ascii)
def test_a_file_may_have_any_name(operator, queue, dashboard, name):
    source = queue.put(Envelope('', ('ada@x.example',), b'Subject: hello\r\n\r\nHello\r\n'))
    Path(queue.place('new', source)).rename(Path(queue.place('new'), name))

    _, listed, page = pages_of(operator, name)

    assert 'Hello' in listed.click(href='/messages/', index=0)
    assert page.html.find_all(['script', 'img']) == []
    raw = page.click('Download')
    header = raw.headers['Content-Disposition']
    assert header.startswith('attachment; filename="')
    assert header.isascii()
    assert header.count('"') == 2
    assert 'X-Evil' not in raw.headers
    page.form.submit('action', value='hold', status=303).follow()
    form = operator.get('/mailqueue/messages').forms[1]
    form['id'].checked = True
    assert 'Done: 1 message' in form.submit('action', value='unhold')
    assert dashboard.counts() == {'waiting': 1}


@pytest.mark.parametrize('name', [*NAMES, ODD, '', '1795448044.M09', 'a=b,c'], ids=ascii)
def test_an_id_survives_its_way_through_an_address(name):
    token = token_of(name)

    assert token.isascii()
    assert token.isprintable()
    assert '/' not in token
    assert id_of(token) == name


@in_memory
@pytest.mark.parametrize('token', ['~', '~!', '~_w', 'x/../../etc', '%2e%2e', '0' * 5000])
def test_an_id_that_is_none_is_not_found(operator, queue, token):
    make_dead(queue)

    operator.get(f'/mailqueue/messages/{token}', status=404)


def test_a_token_that_was_not_made_here_stands_for_nothing():
    with pytest.raises(NoSuchMessage):
        id_of('~\xff')


# --- contents -------------------------------------------------------------------


def test_a_content_is_its_header_its_text_and_the_names_of_the_rest():
    message = EmailMessage()
    message['Subject'] = 'Grüße aus Köln, in a subject that is so long that it has to be folded into several lines'
    message.set_content('Hällo,\n\tAda\n')
    message.add_alternative('<p>Hello</p>', subtype='html')
    message.add_attachment(b'12345', maintype='application', subtype='pdf', filename='Übung "1".pdf')
    inner = EmailMessage()
    inner.set_content('inner')
    message.add_attachment(inner)

    contents = read_contents(bytes(message))

    assert ('Subject', message['Subject']) in contents.header
    assert contents.text == ('Hällo,', '        Ada')
    assert [(part.name, part.kind, part.size) for part in contents.parts] == [
        ('', 'text/html', len('<p>Hello</p>\n')),
        ('Übung "1".pdf', 'application/pdf', 5),
        ('', 'message/rfc822', None),
    ]
    assert (contents.is_cut, contents.problem) == (False, '')


def test_a_long_text_is_cut():
    contents = read_contents(b'\r\n' + b'x' * (MOST_TEXT + 1))

    assert contents.is_cut
    assert contents.text == ('x' * MOST_TEXT,)
    assert not read_contents(b'\r\n' + b'x' * MOST_TEXT).is_cut


def test_html_is_never_shown():
    contents = read_contents(b'Content-Type: text/html\r\n\r\n<b>Hello</b>')

    assert contents.text is None
    assert contents.parts[0].kind == 'text/html'


@pytest.mark.parametrize(
    'content',
    [
        b''.join(b'Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n' % (n, n) for n in range(200))
        + b'\r\n' * 200_000,
        b'Subject: lines\r\n\r\n' + b'a\r\n' * 1_000_000,
    ],
    ids=['nested', 'lines'],
)
def test_what_would_take_long_to_take_apart_is_not_taken_apart(content):
    assert read_contents(content).problem == 'This message is too large to be parsed here.'


@pytest.mark.parametrize('codec', ['punycode', 'IDNA', 'idna*en'])
def test_encoded_words_that_would_take_long_are_left_as_they_are(operator, queue, codec):
    word = f'=?{codec}?q?{"a" * 5000}-b?='
    queue.put(Envelope('', ('ada@x.example',), f'Subject: {word}\r\n\r\n'.encode()))

    assert word[:100] in operator.get('/mailqueue/messages')
    assert decoded(f'{word} =?utf-8?q?=41?= ') == f'{word} A '


@in_memory
def test_a_domain_that_no_address_can_hold_breaks_no_page(operator, queue, monkeypatch):
    queue.put(Envelope('', ('ada@x.example',), b'\r\n'))
    stats = queue.admin.stats(('waiting',))
    odd = replace(stats, by_domain={'x\ud800.example': stats.by_domain['x.example']})
    monkeypatch.setattr(type(queue.admin), 'stats', lambda *_: odd)

    assert 'x\\ud800.example' in operator.get('/mailqueue')


@in_a_maildir
def test_what_a_corrupt_file_says_is_for_those_who_may_read_contents(dashboard, queue):
    path = Path(queue.path) / 'new' / '1795448044.M09'
    path.write_bytes(b'Return-path: <>\r\nEnvelope-to: a@x.example\r\nSubject: token=SECRET\r\n\r\n')
    list(queue.claim_due(4_000_000_000))
    assert 'SECRET' in queue.admin.find('1795448044.M09').last_reply

    for user, sees in (('viewer', False), ('mover', False), ('reader', True)):
        for page in pages_of(dashboard.visitor(user), '1795448044.M09')[1:]:
            assert ('SECRET' in page) is sees


def test_what_is_very_large_is_not_taken_apart():
    contents = read_contents(b'Subject: hello\r\n\r\n' + bytes(MOST_OCTETS))

    assert contents.header == (('Subject', 'hello'),)
    assert 'too large' in contents.problem


@pytest.mark.parametrize('charset', ['no-such', 'hex', 'rot13', 'idna', 'punycode', 'utf-7', 'x\0y', '"', 'ascii'])
def test_any_character_set_is_shown_somehow(charset):
    content = f'Content-Type: text/plain; charset={charset}\r\n\r\n'.encode() + b'Hello \xff'

    assert read_contents(content).text[0].startswith('Hello ')


NESTED = b''.join(b'Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n' % (n, n) for n in range(2000))


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'\r\n',
        b'no header at all',
        b'Content-Type: multipart/mixed\r\n\r\nno boundary',
        b'Content-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n--x\r\n\r\n--x',
        b'Content-Type: multipart/mixed; boundary="\r\n\r\n--\r\n',
        b'Content-Type: text/plain\r\nContent-Transfer-Encoding: base64\r\n\r\n!!!!=\xff',
        b'Content-Type: text/plain\r\nContent-Transfer-Encoding: x-uuencode\r\n\r\nbegin 666 x\r\n\xff\r\nend',
        b'Content-Type: message/rfc822\r\n\r\n\xff',
        b"Content-Type: text/plain; name*=\xff''%ff; name*1*=x; name*0=y\r\n\r\nx",
        b"Content-Disposition: attachment; filename*=no-such'x'%ff%00\r\n\r\nx",
        b'Content-Type: ;;;===\xff\r\n\r\nx',
        b'Subject: =?no-such?q?=ff?= =?utf-8?b?!?=\r\n: :\r\n\r\n\x00',
        b'Content-Type: text/plain; ' + b';"' * 500_000 + b'\r\n\r\nx',
        NESTED,
    ],
    ids=lambda content: ascii(content[:50]),
)
@in_memory
def test_malformed_messages_break_no_page(operator, queue, content):
    name = make_dead(queue, Envelope('', ('ada@x.example',), content))

    *_, page = pages_of(operator, name)

    assert page.click('Download').body == queue.admin.content(name)
