"""What a person is shown of a message, and how messages are counted."""

from __future__ import annotations

import pytest

from pyramid_mailqueue.queues.entries import AGE_LIMITS, STATES, UNDELIVERED, QueueEntry, Tally, tally, tell_from_header

MINUTE = 60
NOW = 1_000_000


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        (b'', ('', '')),
        (b'\r\nSubject: in the body\r\n', ('', '')),
        (b'To: a@x.example\r\n\r\nSubject: in the body\r\nMessage-ID: <body@x>\r\n', ('', '')),
        (b'Subject: hello\r\nMessage-ID: <1@x.example>\r\n\r\nbody', ('hello', '<1@x.example>')),
        (b'MESSAGE-ID: <1@x.example>\r\nsubject :hello\r\n', ('hello', '<1@x.example>')),
        (b'Subject: with\n line feeds only\nMessage-ID: <1@x>\n\nbody', ('with line feeds only', '<1@x>')),
        (b'X-Subject: no\r\nSubject:\r\n folded\r\n\ttwice\r\nTo: b\r\n', ('folded\ttwice', '')),
        (b'Subject: cut o', ('cut o', '')),
        (b'this is no field\r\nSubject: behind it\r\n', ('behind it', '')),
        ('Subject: Grüße\r\n'.encode(), ('Grüße', '')),
        (b'Subject: Gr\xfc\xdfe\r\n', ('Gr\\xfc\\xdfe', '')),
        (b'Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?= =?utf-8?b?IQ==?=\r\n', ('Grüße!', '')),
        (b'Subject: =?utf-8?q?a=0Db=1B[2J?=\r\n', ('a\rb\x1b[2J', '')),
        (b'Subject: =?no-such-charset?q?x?=\r\n', ('=?no-such-charset?q?x?=', '')),
        (b'Subject: =?utf-8?b?A?=\r\n', ('=?utf-8?b?A?=', '')),
        (b'Subject: =?ascii?q?=FC?=\r\n', ('=?ascii?q?=FC?=', '')),
    ],
)
def test_subject_and_message_id_are_found_in_any_header(content, expected):
    assert tell_from_header(content) == expected


def entry(state='waiting', recipients=('a@x.example',), minutes=0.0, size=10):
    return QueueEntry('id', state, '', recipients, queued_at=NOW - minutes * MINUTE, size=size)


def test_messages_are_counted_by_their_age_as_qshape_does():
    ages = [0, 5, 5.1, 10, 1280, 1281, 100_000]

    counted = tally([entry(minutes=minutes) for minutes in ages], NOW).by_state['waiting']

    assert counted.by_age == (2, 2, 0, 0, 0, 0, 0, 0, 1, 2)
    assert len(counted.by_age) == len(AGE_LIMITS) + 1
    assert counted.oldest == NOW - 100_000 * MINUTE
    assert (counted.messages, counted.size) == (7, 70)


def test_a_message_of_the_future_is_young():
    assert tally([entry(minutes=-60)], NOW).by_state['waiting'].by_age[0] == 1


def test_every_state_is_counted_also_if_there_is_nothing_in_it():
    assert tally([], NOW).by_state == {state: Tally() for state in STATES}


def test_a_message_is_counted_once_in_each_domain_that_it_is_for():
    two = entry(recipients=('a@X.example', 'b@x.EXAMPLE', 'c@y.example'))

    by_domain = tally([two, entry(recipients=('"@"@y.example',))], NOW).by_domain

    assert [(domain, counted.messages) for domain, counted in by_domain.items()] == [
        ('y.example', 2),
        ('x.example', 1),
    ]


def test_domains_of_equal_size_are_in_the_order_of_their_names():
    entries = [entry(recipients=(f'a@{name}.example',)) for name in 'bca']

    assert list(tally(entries, NOW).by_domain) == ['a.example', 'b.example', 'c.example']


def test_domains_are_those_of_what_is_to_be_delivered_unless_one_asks_for_others():
    entries = [entry(state, recipients=(f'a@{state}',)) for state in STATES]

    assert set(tally(entries, NOW).by_domain) == set(UNDELIVERED)
    assert set(tally(entries, NOW, ['dead']).by_domain) == {'dead'}


def test_what_cannot_be_read_is_counted_and_has_no_age():
    damaged = QueueEntry('id', 'corrupt', size=5)

    assert tally([damaged], NOW).by_state['corrupt'] == Tally(messages=1, size=5)


def test_two_tallies_are_the_tally_of_all_messages():
    entries = [entry(minutes=age, size=age) for age in (3, 7, 7, 9999)]

    tallies = [tally(some, NOW).by_state['waiting'] for some in (entries[:2], [], entries[2:])]

    assert sum(tallies, Tally()) == tally(entries, NOW).by_state['waiting']
