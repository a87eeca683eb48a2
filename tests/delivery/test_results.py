"""What a server said, and what follows from it for each recipient."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.results import Burial, Reply, SendResult, Settlement


@pytest.mark.parametrize(
    ('code', 'lines', 'expected'),
    [
        (250, ['2.1.5 ok'], Reply(250, 'ok', '2.1.5')),
        (550, ['5.1.1 no such user', '5.1.1 ask somebody'], Reply(550, 'no such user ask somebody', '5.1.1')),
        (450, ['4.2.1'], Reply(450, '', '4.2.1')),
        (250, [], Reply(250)),
        (250, ['', '  '], Reply(250)),
        # RFC 2034 section 4: the first digit is that of the code.  This is text that happens to look like one.
        (550, ['4.2.1 is our version'], Reply(550, '4.2.1 is our version')),
        (250, ['2.0.0ok'], Reply(250, '2.0.0ok')),
    ],
)
def test_a_reply_is_read_from_its_lines(code, lines, expected):
    assert Reply.from_lines(code, lines) == expected


def test_a_reply_is_shown_as_a_server_writes_it():
    assert str(Reply(550, 'no such user', '5.1.1')) == '550 5.1.1 no such user'
    assert str(Reply(250)) == '250'


@pytest.mark.parametrize(
    ('code', 'outcome'),
    [(200, 'accepted'), (299, 'accepted'), (400, 'deferred'), (499, 'deferred'), (500, 'refused'), (599, 'refused')]
    # None of these is an outcome.  Nobody is dropped because of it, nor taken for served.
    + [(code, 'deferred') for code in (0, 100, 199, 300, 354, 399, 600, 999)],
)
def test_each_code_is_one_outcome(code, outcome):
    reply = Reply(code)

    assert [name for name in ('accepted', 'deferred', 'refused') if getattr(reply, name)] == [outcome]


OK, LATER, NEVER = Reply(250), Reply(450), Reply(550)
BURIED = Burial(('b',), 'no such user')


@pytest.mark.parametrize(
    ('result', 'failed'),
    [
        (SendResult({'a': OK}), ()),
        (SendResult(queued=True), ()),
        (SendResult({'a': OK, 'b': LATER}, queued=True, settlement=Settlement(waiting=('b',))), ()),
        # Not tried, but it waits.
        (SendResult({'a': OK}, queued=True, settlement=Settlement(waiting=('b',))), ()),
        (SendResult({'a': OK, 'b': NEVER}), ('b',)),
        (SendResult({'a': OK, 'b': LATER}), ('b',)),
        # It waits: but this attempt has not reached them.
        (SendResult({'a': LATER}, settlement=Settlement(waiting=('a', 'b'))), ('a', 'b')),
        (SendResult({'a': OK, 'b': NEVER}, queued=True, settlement=Settlement(burials=(BURIED,))), ('b',)),
        (SendResult({'a': OK}, settlement=Settlement(burials=(BURIED,))), ('b',)),
        (SendResult({'a': LATER, 'b': NEVER}, queued=True, settlement=Settlement(('a',), burials=(BURIED,))), ('b',)),
    ],
)
def test_a_result_is_true_if_everybody_was_sent_to_or_waits(result, failed):
    assert (bool(result), result.failed) == (not failed, failed)


def test_a_result_of_nobody_is_false():
    assert not SendResult()
    assert not SendResult(trouble=ServerTrouble('down'))


def test_a_result_sorts_its_recipients():
    result = SendResult({'a@x.example': Reply(250), 'b@x.example': Reply(450), 'c@x.example': Reply(550)})

    assert (result.accepted, result.deferred, result.refused) == (('a@x.example',), ('b@x.example',), ('c@x.example',))


def test_open_are_the_deferred_and_those_nobody_spoke_of():
    result = SendResult({'a@x.example': Reply(250), 'b@x.example': Reply(450), 'c@x.example': Reply(550)})

    assert result.open_of(['d@x.example', 'c@x.example', 'b@x.example', 'a@x.example']) == (
        'd@x.example',
        'b@x.example',
    )


@given(st.dictionaries(st.sampled_from('abcdef'), st.integers(0, 999).map(Reply)))
def test_everybody_is_either_open_or_has_a_final_reply(replies):
    result = SendResult(replies)

    assert set(result.open_of('abcdef')) == set('abcdef') - set(result.accepted) - set(result.refused)


def test_of_two_attempts_what_was_said_later_holds():
    trouble = ServerTrouble('down')
    first = SendResult({'a': Reply(250), 'b': Reply(450)}, 'one', queued=True, trouble=trouble)
    second = SendResult({'b': Reply(550)}, 'two')

    assert first.merged_with(second) == SendResult({'a': Reply(250), 'b': Reply(550)}, 'two', queued=True)
    assert second.merged_with(first) == SendResult(
        {'b': Reply(450), 'a': Reply(250)}, 'one', queued=True, trouble=trouble
    )
    assert first.merged_with(SendResult()).transport == 'one'
