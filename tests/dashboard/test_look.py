"""The pages that show the queue: what is on them, for whom, and how much of the queue they read."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from pyramid_mailqueue.dashboard.look import LOOKED_AT, PAGE
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.entries import STATES
from pyramid_mailqueue.queues.memory.admin import MemoryAdmin
from pyramid_mailqueue.results import Settlement
from tests.parts.kinds import in_a_maildir, in_memory
from tests.parts.states import ENVELOPE, MAKE, entries, make_dead, make_held

SECRET = Envelope(
    'shop@site.example',
    ('ada@x.example',),
    b'Message-ID: <2@site.example>\r\nSubject: Your code is 4711\r\n\r\nhttps://site.example/new-password/s3cret\r\n',
)


def put(queue, count, recipient='ada@x.example', sender='shop@site.example'):
    return [queue.put(Envelope(sender, (recipient,), ENVELOPE.content)) for _ in range(count)]


def aged(queue, name, age):
    """Let a message in memory be as old as that."""
    queued_at = time.time() - age
    queue._messages.by_id[name] = dataclasses.replace(queue._messages.by_id[name], queued_at=queued_at)


def ids_on(page):
    return [link.get_text() for link in page.html.select('table a.id')]


def text_of(node):
    return ' '.join(node.get_text().split())


def makes_of(kind):
    return {state: make for state, make in MAKE.items() if state != 'in doubt' or kind in ('maildir', 'memory')}


# --- the overview -------------------------------------------------------------


def test_an_empty_queue_is_told_so(operator):
    page = operator.get('/mailqueue')

    assert 'Nothing: no message is dead, in doubt or corrupt' in page
    assert 'Nothing is to be delivered' in page
    assert [row.get_text() for row in page.html.select('td[id^=count-]')] == ['0'] * len(STATES)


def test_the_overview_counts_the_states_and_says_what_is_wrong_first(operator, queue, kind):
    makes = makes_of(kind)
    for make in makes.values():
        make(queue)

    page = operator.get('/mailqueue')

    for state in makes:
        assert page.html.find(id=f'count-{state.replace(" ", "-")}').get_text() == '1'
    trouble = [text_of(heading) for heading in page.html.select('.card.bad h3')]
    assert trouble == [f'1 {state}' for state in ('dead', 'in doubt') if state in makes]
    assert ids_on(page.click('^1 dead$')) == [entry.id for entry in entries(queue, 'dead')]
    assert text_of(page.html.select_one('#domains ~ table tbody tr')).startswith('x.example 2')
    assert len(ids_on(page.click('^x.example$'))) == len(makes)


@in_memory
def test_the_oldest_of_each_state_is_told_with_its_age(operator, queue):
    (name,) = put(queue, 1)
    aged(queue, name, 3.5 * 3600)

    row = operator.get('/mailqueue').html.find(id='count-waiting').find_parent('tr')

    assert text_of(row) == 'waiting 1 3h'


@in_memory
def test_the_domains_of_many_messages_are_counted_only_if_somebody_asks(operator, queue, monkeypatch):
    monkeypatch.setattr('pyramid_mailqueue.dashboard.look.COUNTED', 2)
    put(queue, 3)

    page = operator.get('/mailqueue')

    assert 'x.example' not in page
    assert 'x.example' in page.click('Count them')


@in_memory
def test_only_the_largest_domains_are_shown(operator, queue):
    for number in range(22):
        put(queue, 1 + (number == 21), f'ada@d{number}.example')

    page = operator.get('/mailqueue')

    rows = page.html.select('#domains ~ table tbody tr')
    assert (len(rows), text_of(rows[0].th)) == (20, 'd21.example')
    assert '2 domains more' in page


@in_a_maildir
def test_a_corrupt_file_is_seen_and_can_be_looked_at(operator, queue):
    Path(queue.place('corrupt', 'damaged')).write_bytes(b'not a queue file\xff')

    page = operator.get('/mailqueue').click('^1 corrupt$').click('^damaged$')

    assert 'Problem' in page
    raw = page.click('Download the file')
    assert (raw.body, raw.content_type) == (b'not a queue file\xff', 'application/octet-stream')


# --- lists --------------------------------------------------------------------


def test_a_list_has_what_mq_queue_list_has_oldest_first(operator, queue, kind):
    made = [make(queue) for make in makes_of(kind).values()]

    page = operator.get('/mailqueue/messages')

    assert ids_on(page) == [entry.id for entry in entries(queue)]
    assert set(ids_on(page)) == set(made)
    assert {text_of(row.select_one('.state')) for row in page.html.select('tbody tr')} == set(makes_of(kind))
    row = text_of(page.html.find('input', value=make_dead(queue)) or page.html.find(class_='dead').find_parent('tr'))
    assert 'shop@site.example' in row
    assert 'ada@x.example,bob@x.example' in row
    assert '550 no' in row


@pytest.mark.parametrize('state', STATES)
@in_memory
def test_a_list_may_be_of_one_state(operator, queue, state):
    queue.put_claimed(ENVELOPE)
    for make in MAKE.values():
        make(queue)

    form = operator.get('/mailqueue/messages').forms[0]
    form['state'] = state
    page = form.submit()

    assert ids_on(page) == [entry.id for entry in entries(queue, state)]
    assert page.forms[0]['state'].value == state


@pytest.mark.parametrize(
    ('field', 'text', 'found'),
    [
        ('recipient', '@X.example', {'a', 'b'}),
        ('recipient', '<eve@y.example>', {'c'}),
        ('recipient', 'eve@y.exam>', set()),
        ('sender', 'shop', {'a', 'c'}),
        ('sender', '<>', {'b'}),
        ('older_than', '2h', {'a'}),
        ('newer_than', '90m', {'b', 'c'}),
        ('message_id', '1@site.example', {'a', 'b', 'c'}),
        ('message_id', '<1@site.exam>', set()),
    ],
)
@in_memory
def test_a_list_is_searched_as_mq_queue_searches_it(operator, queue, field, text, found):
    names = {
        'a': put(queue, 1)[0],
        'b': put(queue, 1, 'bob@x.example', sender='')[0],
        'c': put(queue, 1, 'eve@y.example')[0],
    }
    aged(queue, names['a'], 3 * 3600)

    form = operator.get('/mailqueue/messages').forms[0]
    form[field] = text
    page = form.submit()

    assert set(ids_on(page)) == {names[key] for key in found}
    assert page.forms[0][field].value == text


@pytest.mark.parametrize(
    ('search', 'field'), [('older_than=soon', 'older_than'), ('newer_than=-1', 'newer_than'), ('state=lost', 'state')]
)
@in_memory
def test_what_cannot_be_searched_is_told_at_its_field(operator, search, field):
    page = operator.get(f'/mailqueue/messages?{search}', status=400)

    assert page.html.find(id=field)['aria-describedby'] == f'{field}-problem'
    assert page.html.find(id=f'{field}-problem').get_text()


@in_memory
def test_an_address_that_is_not_utf_8_is_told_so(operator):
    assert 'UTF-8' in operator.get('/mailqueue/messages?sender=%ff', status=400)


def test_a_long_list_has_pages(operator, queue):
    names = put(queue, 2 * PAGE + 1)

    first = operator.get('/mailqueue/messages?state=waiting')
    second = first.click('Next page')
    third = second.click('Next page')

    assert [ids_on(page) for page in (first, second, third)] == [names[:100], names[100:200], names[200:]]
    assert 'Next page' not in third
    assert ids_on(third.click('Previous page')) == names[100:200]
    assert ids_on(third.click('First page')) == names[:100]
    assert third.forms[0]['state'].value == 'waiting'


def caption_of(page):
    return text_of(page.html.select_one('caption'))


def test_a_list_tells_of_how_many_messages_it_shows_which(operator, queue):
    put(queue, PAGE + 20)
    put(queue, 3, 'eve@y.example')
    make_dead(queue)

    assert caption_of(operator.get('/mailqueue/messages')) == '1 to 100 of 124 messages, oldest first'
    page = operator.get('/mailqueue/messages?state=waiting')
    assert caption_of(page) == '1 to 100 of 123 messages, oldest first'
    assert caption_of(page.click('Next page')) == '101 to 123 of 123 messages, oldest first'
    assert caption_of(operator.get('/mailqueue/messages?recipient=eve@')) == (
        '3 messages, oldest first: chosen out of 124 of 124 messages'
    )


@in_memory
def test_many_messages_are_told_in_figures_that_can_be_read(operator, queue):
    put(queue, 1234)

    assert caption_of(operator.get('/mailqueue/messages?from=1100')) == '1,101 to 1,200 of 1,234 messages, oldest first'
    assert '1,234 messages' in operator.get('/mailqueue/messages?recipient=ada')


@pytest.mark.parametrize('many', [False, True])
@in_a_maildir
def test_a_damaged_file_is_counted_where_it_is_listed(operator, queue, monkeypatch, many):
    put(queue, 2)
    Path(queue.place('new', 'damaged')).write_bytes(b'not a queue file')
    if many:
        monkeypatch.setattr('pyramid_mailqueue.queues.maildir.queue.LOOKED_INTO', 1)
        monkeypatch.setattr('pyramid_mailqueue.dashboard.look.COUNTED', 1)

    page = operator.get('/mailqueue')

    if many:
        assert 'damaged ones that were never tried' in text_of(page.html)
        page = page.click('Count them')
    assert [page.html.find(id=f'count-{state}').get_text() for state in ('waiting', 'corrupt')] == ['2', '1']
    assert ids_on(operator.get('/mailqueue/messages?state=corrupt')) == ['damaged']
    assert ids_on(page.click('^1 corrupt$')) == ['damaged']


@in_memory
def test_a_page_behind_the_end_says_so(operator, queue):
    put(queue, 1)

    assert 'The queue is empty, after the first 700' in operator.get('/mailqueue/messages?from=700')
    assert len(ids_on(operator.get('/mailqueue/messages?from=-1'))) == 1


@pytest.fixture
def read(monkeypatch):
    """How many messages were read for a list."""
    read = []

    def counting(entries):
        def count(self, states):
            for entry in entries(self, states):
                read.append(entry.id)
                yield entry

        return count

    monkeypatch.setattr(MemoryAdmin, 'entries', counting(MemoryAdmin.entries))
    return read


@in_memory
def test_no_more_is_read_than_a_page_needs(operator, queue, read):
    put(queue, 5 * PAGE)

    operator.get('/mailqueue/messages')

    assert len(read) == PAGE + 1


@in_memory
def test_a_search_for_what_is_rare_ends_and_can_be_continued(operator, queue, read):
    put(queue, LOOKED_AT)
    (last,) = put(queue, 1, 'eve@y.example')

    page = operator.get('/mailqueue/messages?recipient=eve@')

    assert 'None of 5,000 messages is one of these; there are more' in page
    assert ids_on(page.click('Search further')) == [last]


# --- one message --------------------------------------------------------------


def test_a_message_tells_all_there_is_to_know(operator, queue):
    name = make_dead(queue, SECRET, '550 5.1.1 no such user')

    page = operator.get('/mailqueue/messages').click(name)

    facts = {text_of(row.dt): text_of(row.dd) for row in page.html.select('dl.facts')[0].find_all('div')}
    assert facts.keys() == {
        'State', 'Last reply', 'Sender', 'Recipients', 'Queued', 'Attempts', 'Last attempt', 'Message-ID', 'Size',
    }  # fmt: skip
    assert facts['State'].startswith('dead')
    assert facts['Last reply'] == '550 5.1.1 no such user'
    assert (facts['Sender'], facts['Recipients']) == ('<shop@site.example>', '<ada@x.example>')
    assert facts['Attempts'] == '1'
    assert 'UTC' in facts['Last attempt']
    assert facts['Size'] == f'{len(SECRET.content)} octets'
    assert 'https://site.example/new-password/s3cret' in page.html.find('pre').get_text()


@in_memory
def test_a_message_that_waits_for_its_next_attempt_tells_when(operator, queue):
    claim = queue.put_claimed(ENVELOPE)
    claim.settle(Settlement(ENVELOPE.recipients, due=time.time() + 90 * 60))

    page = operator.get(f'/mailqueue/messages/{claim.id}')

    assert text_of(page.html.find('dt', string='Due').find_next('dd')).endswith(' UTC (in 1h)')


@in_memory
def test_the_null_sender_is_shown_as_one(operator, queue):
    (name,) = put(queue, 1, sender='')

    assert text_of(operator.get(f'/mailqueue/messages/{name}').html.find('dt', string='Sender').find_next('dd')) == '<>'


def test_a_download_is_the_message_byte_for_byte(operator, queue):
    content = b'Subject: \xff\r\n\r\n.\r\n\x00\xff no line end'
    name = queue.put(Envelope('', ('ada@x.example',), content))

    raw = operator.get(f'/mailqueue/messages/{name}').click('Download')

    assert raw.body == content
    assert raw.content_type == 'message/rfc822'
    assert raw.headers['Content-Disposition'] == f'attachment; filename="{name}.eml"'
    assert raw.headers['X-Content-Type-Options'] == 'nosniff'


# --- who may see what ---------------------------------------------------------

PATHS = ('', '/messages', '/messages/{id}')


def test_without_the_permission_for_contents_nothing_of_them_is_shown(dashboard, queue):
    name = queue.put(SECRET)

    for path in PATHS:
        page = dashboard.visitor('mover').get(f'/mailqueue{path.format(id=name)}')
        assert '4711' not in page
        assert 's3cret' not in page
        assert 'raw' not in page
    page = dashboard.visitor('mover').get(f'/mailqueue/messages/{name}')
    page = page.form.submit('action', value='delete')
    assert '4711' not in page
    dashboard.visitor('mover').get(f'/mailqueue/messages/{name}/raw', status=403)
    assert '4711' in dashboard.visitor('reader').get('/mailqueue/messages')


@in_memory
def test_who_may_only_look_is_offered_no_buttons(dashboard, queue):
    name = make_held(queue)
    queue.put(ENVELOPE)

    for path in PATHS:
        page = dashboard.visitor('reader').get(f'/mailqueue{path.format(id=name)}')
        assert page.html.select('form[method=post] button') == []
        assert page.html.select('input[type=checkbox]') == []


@in_memory
@pytest.mark.parametrize('path', [*PATHS, '/', '/messages/{id}/raw'])
def test_who_may_nothing_sees_nothing(dashboard, queue, path):
    path = f'/mailqueue{path.format(id=queue.put(SECRET))}'

    assert 'ada@' not in dashboard.visitor('nobody').get(path, status=403)
    assert 'ada@' not in dashboard.visitor('').get(path, status=403)


@in_memory
def test_what_the_browser_is_told(dashboard, queue):
    name = queue.put(SECRET)
    answers = [dashboard.operator.get(f'/mailqueue{path.format(id=name)}') for path in (*PATHS, '/messages/{id}/raw')]
    answers.append(dashboard.operator.get('/mailqueue/messages/nobody', status=404))
    answers.append(answers[2].form.submit('action', value='hold', status=303))
    answers.append(dashboard.operator.post('/mailqueue/flush', status=400))

    for answer in answers:
        assert answer.headers['Cache-Control'] == 'no-store'
        assert answer.headers['Content-Security-Policy'] == (
            "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        )
        assert answer.headers['X-Content-Type-Options'] == 'nosniff'
        assert answer.headers['Referrer-Policy'] == 'same-origin'
        assert '<script' not in answer
        assert 'style=' not in answer


@in_memory
def test_pages_are_made_for_those_who_hear_or_type_them_too(operator, queue):
    name = queue.put(SECRET)
    for path in PATHS:
        html = operator.get(f'/mailqueue{path.format(id=name)}').html
        assert html.html['lang'] == 'en'
        assert len(html.find_all('h1')) == 1
        assert all(cell.has_attr('scope') for cell in html.find_all('th'))
        labelled = {label['for'] for label in html.find_all('label')}
        for field in html.select('input:not([type=hidden]), select'):
            assert field['id'] in labelled or field.has_attr('aria-label')
        ids = [tag['id'] for tag in html.select('[id]')]
        assert len(ids) == len(set(ids))
