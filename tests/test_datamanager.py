"""The data manager among others: every step of a commit and every way to lose mail there, with real transactions."""

from __future__ import annotations

import gc
import logging
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
import transaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transaction.interfaces import (
    DoomedTransaction,
    IDataManager,
    IDataManagerSavepoint,
    InvalidSavepointRollbackError,
    ISavepointDataManager,
)
from zope.interface import implementer
from zope.interface.verify import verifyClass, verifyObject

from pyramid_mailqueue.datamanager import MailDataManager, _FirstToFinish
from pyramid_mailqueue.delivery.dispatch import InlineDispatcher
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.exceptions import NoActiveTransaction, QueueError
from pyramid_mailqueue.mailer import Mailer
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.transactions import ManagerTransaction

# Sort keys of others: their turn comes before ours, or after it.
BEFORE, AFTER = 'other', '~zzz'


class Post:
    """A mailer whose mail is delivered before a commit returns, and what became of it."""

    def __init__(self, path, recorder, manager, message, **other_ways):
        self.queue = MaildirQueue(path)
        self.recorder = recorder
        self.message = message
        handler = MessageHandler([recorder])
        dispatchers = {'inline': InlineDispatcher(handler, self.queue), **other_ways}
        transactions = ManagerTransaction(manager)
        self.mailer = Mailer(
            self.queue, handler, dispatchers, Envelope.from_message, delivery='inline', transactions=transactions
        )

    def send(self, subject, delivery=None):
        return self.mailer.send(self.message(subject), delivery=delivery)

    @property
    def sent(self):
        return self.recorder.subjects

    @property
    def files(self):
        """The folders of the queue that have files, and how many."""
        folders = (path for path in Path(self.queue.path).iterdir() if path.is_dir())
        return {path.name: count for path in folders if (count := len(list(path.iterdir())))}


@pytest.fixture(params=['thread', 'own', 'explicit'])
def tm(request):
    """A transaction manager of each kind, with a transaction begun."""
    if request.param == 'thread':
        manager = transaction.manager
    else:
        manager = transaction.TransactionManager(explicit=request.param == 'explicit')
    manager.begin()
    yield manager
    if not manager.explicit or manager._txn is not None:
        manager.abort()


@pytest.fixture
def post(queue_dir, recorder, tm, message):
    return Post(queue_dir, recorder, tm, message)


@pytest.fixture
def discarded(caplog):
    """The Message-IDs that were logged as discarded."""
    caplog.set_level(logging.INFO, 'mailqueue.queue_log')

    def discarded():
        events = [record.mailqueue for record in caplog.records if hasattr(record, 'mailqueue')]
        return [event['msgid'] for event in events if event['status'] == 'discarded']

    return discarded


class Trouble(Exception):
    pass


@implementer(IDataManager)
class Other:
    """Another resource of the transaction, which does in a step what it is told to; ``steps`` are those it went."""

    def __init__(self, tm, key, **in_steps):
        self.transaction_manager = tm
        self.key = key
        self.steps = []
        self.in_steps = in_steps
        tm.get().join(self)

    def _step(self, name):
        self.steps.append(name)
        self.in_steps.get(name, lambda: None)()

    def sortKey(self):
        return self.key

    def abort(self, txn):
        self._step('abort')

    def tpc_begin(self, txn):
        self._step('tpc_begin')

    def commit(self, txn):
        self._step('commit')

    def tpc_vote(self, txn):
        self._step('tpc_vote')

    def tpc_finish(self, txn):
        self._step('tpc_finish')

    def tpc_abort(self, txn):
        self._step('tpc_abort')


def fail():
    raise Trouble


# --- the simple story -------------------------------------------------------


def test_mail_is_sent_when_the_transaction_commits_and_not_before(tm, post):
    post.send('one')
    post.send('two')
    before = list(post.sent)
    tm.commit()

    assert (before, post.sent, post.files) == ([], ['one', 'two'], {})


def test_mail_of_an_aborted_transaction_never_leaves_and_is_logged_with_its_message_id(tm, post, discarded):
    message_ids = [post.send('one'), post.send('two')]
    tm.abort()

    assert (post.sent, post.files, discarded()) == ([], {}, message_ids)


def test_a_doomed_transaction_takes_mail_and_drops_it(tm, post, discarded):
    tm.doom()
    message_id = post.send('doomed')

    with pytest.raises(DoomedTransaction):
        tm.commit()
    tm.abort()

    assert (post.sent, post.files, discarded()) == ([], {}, [message_id])


def test_mail_is_in_memory_until_the_vote_invisible_until_the_finish_and_then_real(tm, post):
    seen = []
    Other(
        tm,
        AFTER,
        commit=lambda: seen.append(post.files),
        tpc_vote=lambda: seen.append(post.files),
        tpc_finish=lambda: seen.append(post.files),
    )
    post.send('claimed')
    post.send('waiting', delivery='queue')
    tm.commit()

    assert seen == [{}, {'prepared': 2}, {'new': 2}]
    assert (post.sent, post.files) == (['claimed'], {'new': 1})


def test_the_next_transaction_begins_with_nothing(tm, post):
    post.send('one')
    tm.commit()
    tm.begin()
    post.send('two')
    tm.abort()
    tm.begin()
    post.send('three')
    tm.commit()

    assert post.sent == ['one', 'three']


def test_a_manager_is_a_context_manager(tm, post):
    tm.abort()

    with tm:
        post.send('one')
    with suppress(Trouble), tm:
        post.send('two')
        raise Trouble

    assert (post.sent, post.files) == (['one'], {})


def test_a_transaction_that_is_tried_again_sends_once(tm, post, discarded):
    tm.abort()
    tries = []

    def work():
        tries.append(post.send('order'))
        if len(tries) < 3:
            raise transaction.interfaces.TransientError

    tm.run(work, tries=3)

    assert (post.sent, discarded()) == (['order'], tries[:2])


# --- others in the same transaction -----------------------------------------


@pytest.mark.parametrize('key', [BEFORE, AFTER])
@pytest.mark.parametrize('step', ['tpc_begin', 'commit', 'tpc_vote'])
def test_a_no_of_somebody_else_drops_the_mail(tm, post, discarded, key, step):
    Other(tm, key, **{step: fail})
    message_id = post.send('dropped')

    with pytest.raises(Trouble):
        tm.commit()
    files = post.files
    tm.abort()

    assert (post.sent, files, post.files, discarded()) == ([], {}, {}, [message_id])


@pytest.mark.parametrize('error', [Trouble, SystemExit])
def test_after_a_finish_that_failed_before_ours_the_mail_is_in_doubt(tm, post, discarded, caplog, error):
    def fail():
        raise error

    Other(tm, BEFORE, tpc_finish=fail)
    post.send('perhaps')
    post.send('perhaps later', delivery='queue')

    with pytest.raises(error):
        tm.commit()
    tm.abort()

    # Others, such as a database that commits in its vote, may have committed.
    assert (post.sent, post.files, discarded()) == ([], {'prepared': 2}, [])
    assert [record.levelname for record in caplog.records if 'status=in_doubt' in record.message] == ['CRITICAL'] * 2
    assert len(post.queue.recover(time.time()).in_doubt) == 2


def test_mail_that_joined_again_after_a_savepoint_is_in_doubt_too(tm, post):
    savepoint = tm.savepoint()
    post.send('rolled back')
    savepoint.rollback()
    Other(tm, BEFORE, tpc_finish=fail)
    post.send('perhaps')

    with pytest.raises(Trouble):
        tm.commit()

    assert (post.sent, post.files) == ([], {'prepared': 1})


def test_a_finish_that_failed_after_ours_cannot_take_published_mail_back(tm, post, discarded):
    Other(tm, AFTER, tpc_finish=fail)
    post.send('published')
    post.send('waiting', delivery='queue')

    with pytest.raises(Trouble):
        tm.commit()
    tm.abort()

    assert (post.sent, post.files, discarded()) == (['published'], {'new': 1}, [])


@pytest.mark.parametrize('key', [BEFORE, AFTER])
def test_a_queue_that_cannot_write_votes_no_for_everybody(tm, post, queue_dir, discarded, key):
    other = Other(tm, key)
    message_id = post.send('too much')
    (queue_dir / 'tmp').rmdir()

    with pytest.raises(QueueError, match=str(queue_dir)):
        tm.commit()

    assert 'tpc_finish' not in other.steps
    assert other.steps[-1] == 'tpc_abort' or other.steps[-2:] == ['tpc_abort', 'abort']
    assert (post.sent, post.files, discarded()) == ([], {}, [message_id])


def test_a_queue_that_fails_half_way_leaves_nothing_behind(tm, post, queue_dir):
    post.send('one')
    post.send('two')
    (queue_dir / 'prepared').rmdir()
    (queue_dir / 'prepared').write_text('in the way')

    with pytest.raises(QueueError, match=str(queue_dir)):
        tm.commit()

    assert post.files == {}


def test_the_mail_votes_after_others_but_before_a_session_that_commits_in_its_vote(tm, post):
    post.send('one')
    (ours,) = (resource for resource in tm.get()._resources if isinstance(resource, MailDataManager))

    keys = ['~sqlalchemy:140', ours.sortKey(), 'sqlalchemy.twophase:140', '139', 'zodb', '~other']

    assert sorted(keys)[-2:] == [ours.sortKey(), '~sqlalchemy:140']


def test_mail_that_cannot_be_claimed_waits(tm, post, queue_dir, caplog):
    Other(tm, AFTER, tpc_vote=(queue_dir / 'cur').rmdir)
    post.send('waiting')
    tm.commit()

    assert (post.sent, post.files) == ([], {'new': 1})
    assert 'ERROR' in [record.levelname for record in caplog.records]


def test_mail_that_cannot_be_published_stays_in_doubt_and_the_commit_goes_on(tm, post, queue_dir, caplog):
    def vote():
        (queue_dir / 'cur').rmdir()
        (queue_dir / 'new').rmdir()

    other = Other(tm, AFTER, tpc_vote=vote)
    post.send('in doubt')
    tm.commit()

    assert other.steps[-2:] == ['tpc_finish', 'abort']
    assert (post.sent, post.files) == ([], {'prepared': 1})
    assert 'CRITICAL' in [record.levelname for record in caplog.records]


def test_a_queue_that_breaks_its_promise_to_publish_is_no_trouble_for_others(tm, post, caplog):
    other = Other(tm, AFTER)
    post.send('one')
    (ours,) = (resource for resource in tm.get()._resources if isinstance(resource, MailDataManager))
    ours._staging.publish = fail
    tm.commit()

    assert other.steps[-2:] == ['tpc_finish', 'abort']
    assert {record.levelname for record in caplog.records} == {'CRITICAL'}
    assert (post.sent, post.files) == ([], {'prepared': 1})


# --- hooks and synchronizers ------------------------------------------------


def test_mail_survives_the_abort_that_follows_a_commit_with_hooks_of_others(tm, post, discarded):
    hooks = []
    tm.get().addAfterCommitHook(hooks.append)
    tm.get().addBeforeCommitHook(hooks.append, ['before'])
    post.send('published')
    post.send('waiting', delivery='queue')
    tm.commit()

    assert hooks == ['before', True]
    assert (post.sent, post.files, discarded()) == (['published'], {'new': 1}, [])


@pytest.mark.parametrize('end', ['commit', 'abort'])
def test_a_transaction_with_mail_leaves_nothing_to_the_garbage_collector(tm, post, end):
    gc.collect()
    gc.disable()
    try:
        post.send('1')
        manager = weakref.ref(tm.get().data(post.queue))
        getattr(tm, end)()
        assert manager() is None
    finally:
        gc.enable()


@pytest.mark.parametrize('first', ['an earlier message', None])
def test_mail_may_be_sent_in_a_before_commit_hook(tm, post, first):
    if first:
        post.send(first)
    tm.get().addBeforeCommitHook(post.send, ['from the hook'])
    tm.commit()

    assert post.sent == list(filter(None, [first, 'from the hook']))


@pytest.mark.parametrize('first', ['an earlier message', None])
def test_mail_from_an_after_commit_hook_is_refused_with_the_name_of_what_helps(tm, post, first):
    if first:
        post.send(first)
    refusals = []

    def hook(committed):
        with pytest.raises(NoActiveTransaction) as caught:
            post.send('too late')
        refusals.append(str(caught.value))

    tm.get().addAfterCommitHook(hook)
    tm.commit()

    assert post.sent == ([first] if first else [])
    assert 'committed' in refusals[0]
    assert 'send_immediately' in refusals[0]
    assert 'enqueue' in refusals[0]


@pytest.mark.parametrize('first', ['an earlier message', None])
@pytest.mark.parametrize('key', [BEFORE, AFTER])
@pytest.mark.parametrize('step', ['commit', 'tpc_vote'])
def test_mail_that_somebody_sends_while_the_transaction_commits_is_refused(tm, post, first, key, step):
    if first:
        post.send(first)
    Other(tm, key, **{step: lambda: post.send('too late')})

    with pytest.raises(NoActiveTransaction, match=r'committing.*send_immediately.*enqueue'):
        tm.commit()

    assert (post.sent, post.files) == ([], {})


@pytest.mark.parametrize('when', ['addBeforeAbortHook', 'addAfterAbortHook'])
@pytest.mark.parametrize('first', ['an earlier message', None])
def test_mail_that_joins_an_abort_is_dropped_with_it(tm, post, discarded, when, first):
    if first:
        post.send(first)
    message_ids = []
    getattr(tm.get(), when)(lambda: message_ids.append(post.send('from the hook')))
    tm.abort()

    assert (post.sent, post.files) == ([], {})
    assert discarded()[-1:] == message_ids


class Synchronizer:
    def __init__(self, after_completion):
        self.after_completion = after_completion

    def newTransaction(self, txn):
        pass

    def beforeCompletion(self, txn):
        pass

    def afterCompletion(self, txn):
        self.after_completion()


def test_published_mail_is_delivered_even_if_a_synchronizer_keeps_the_hooks_from_running(tm, post):
    synchronizer = Synchronizer(fail)
    tm.registerSynch(synchronizer)
    post.send('published')

    with pytest.raises(Trouble):
        tm.commit()
    tm.unregisterSynch(synchronizer)
    tm.abort()

    assert (post.sent, post.files) == (['published'], {})


def test_a_failed_transaction_takes_no_more_mail_and_the_next_one_does(tm, post):
    other = Other(tm, BEFORE, tpc_vote=fail)
    post.send('one')
    with pytest.raises(Trouble):
        tm.commit()

    with pytest.raises(NoActiveTransaction, match='commit failed'):
        post.send('two')
    with pytest.raises(transaction.interfaces.TransactionFailedError):
        tm.commit()
    tm.abort()
    tm.begin()
    post.send('three')
    tm.commit()

    assert (post.sent, post.files) == (['three'], {})
    assert other.steps.count('tpc_vote') == 1


def test_a_failed_transaction_takes_no_first_mail_either(tm, post):
    Other(tm, BEFORE, tpc_vote=fail)
    with pytest.raises(Trouble):
        tm.commit()

    with pytest.raises(NoActiveTransaction, match=r'commit failed.*send_immediately.*enqueue'):
        post.send('one')


def test_a_transaction_whose_savepoint_failed_takes_no_more_mail(tm, post, discarded):
    message_id = post.send('one')
    Other(tm, BEFORE)
    with pytest.raises(TypeError, match='Savepoints unsupported'):
        tm.savepoint()

    with pytest.raises(NoActiveTransaction, match='commit failed'):
        post.send('two')
    tm.abort()

    assert (post.sent, post.files, discarded()) == ([], {}, [message_id])


# --- savepoints -------------------------------------------------------------


def test_a_savepoint_keeps_what_was_sent_before_it(tm, post, discarded):
    post.send('one')
    savepoint = tm.savepoint()
    message_id = post.send('two')
    savepoint.rollback()
    post.send('three')
    tm.commit()

    assert (post.sent, discarded()) == (['one', 'three'], [message_id])


def test_a_savepoint_can_be_rolled_back_several_times(tm, post):
    post.send('one')
    savepoint = tm.savepoint()
    for subject in ('two', 'three'):
        post.send(subject)
        savepoint.rollback()
    post.send('four')
    tm.commit()

    assert post.sent == ['one', 'four']


def test_mail_after_the_rollback_of_a_savepoint_older_than_the_first_mail_is_not_lost(tm, post, discarded):
    savepoint = tm.savepoint()
    message_ids = []
    for subject in ('one', 'two'):
        message_ids.append(post.send(subject))
        savepoint.rollback()
    post.send('three')
    tm.commit()

    assert (post.sent, post.files, discarded()) == (['three'], {}, message_ids)


def test_a_rollback_that_leaves_no_mail_commits_none(tm, post):
    savepoint = tm.savepoint()
    post.send('one')
    savepoint.rollback()
    tm.commit()

    assert (post.sent, post.files) == ([], {})


def test_nested_savepoints(tm, post):
    oldest = tm.savepoint()
    post.send('one')
    outer = tm.savepoint()
    post.send('two')
    inner = tm.savepoint()
    post.send('three')
    inner.rollback()
    post.send('four')
    outer.rollback()
    with pytest.raises(InvalidSavepointRollbackError):
        inner.rollback()
    post.send('five')
    assert oldest.valid
    tm.commit()

    assert post.sent == ['one', 'five']


def test_the_ways_of_delivery_follow_a_rollback(tm, post):
    post.send('waiting', delivery='queue')
    savepoint = tm.savepoint()
    post.send('dropped', delivery='inline')
    post.send('dropped too', delivery='queue')
    savepoint.rollback()
    post.send('sent', delivery='inline')
    post.send('waiting too', delivery='queue')
    tm.commit()

    assert (post.sent, post.files) == (['sent'], {'new': 2})


# A number rolls back the savepoint of that number, if it is still there.
STEPS = st.lists(
    st.sampled_from(['send', 'send', 'send', 'savepoint', 'savepoint', 'commit', 'abort']) | st.integers(0, 4),
    max_size=25,
)


class Story:
    """What an application does, and what has to come of it: ``expected`` has committed, ``open`` has not yet."""

    def __init__(self, tm, post):
        self.tm = tm
        self.post = post
        self.expected = []
        self.sent = 0
        self._begin()

    def _begin(self):
        self.open = []
        self.savepoints = []

    def take(self, step):
        if isinstance(step, int):
            self.roll_back(step)
        else:
            getattr(self, step)()

    def send(self):
        self.sent += 1
        self.post.send(str(self.sent))
        self.open.append(str(self.sent))

    def savepoint(self):
        self.savepoints.append((self.tm.savepoint(), list(self.open)))

    def roll_back(self, number):
        if number < len(self.savepoints):
            savepoint, self.open = self.savepoints[number][0], list(self.savepoints[number][1])
            savepoint.rollback()
            del self.savepoints[number + 1 :]

    def commit(self):
        self.tm.commit()
        self.expected += self.open
        self._begin()

    def abort(self):
        self.tm.abort()
        self._begin()


# The fixtures are the same for all examples; the recorder is emptied.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whatever_an_application_does_exactly_what_it_commits_is_sent(steps, recorder, message):
    recorder.subjects.clear()
    with tempfile.TemporaryDirectory() as path:
        tm = transaction.TransactionManager()
        post = Post(path, recorder, tm, message)
        story = Story(tm, post)
        for step in steps:
            story.take(step)
        story.commit()

        assert (post.sent, post.files) == (story.expected, {})


# --- several ----------------------------------------------------------------


def test_all_mail_of_a_transaction_is_one_resource(tm, post):
    post.send('one')
    post.send('two')

    # And one before everybody, which notes that the second phase has begun.
    assert [type(resource) for resource in tm.get()._resources] == [_FirstToFinish, MailDataManager]


class Noted:
    """A dispatcher that notes the ids of its claims."""

    def __init__(self):
        self.calls = []

    def dispatch(self, claims):
        self.calls.append([claim.envelope.message_id for claim in claims])
        for claim in claims:
            claim.release()

    def close(self):
        pass


def test_each_way_of_delivery_gets_its_own_claims_and_all_at_once(queue_dir, recorder, tm, message):
    noted = Noted()
    post = Post(queue_dir, recorder, tm, message, background=noted)
    message_ids = [post.send(str(number), delivery='background' if number % 2 else 'inline') for number in range(5)]
    tm.commit()

    assert post.sent == ['0', '2', '4']
    assert noted.calls == [message_ids[1::2]]


def interrupt(sender, recipients, content):
    raise KeyboardInterrupt


def test_mail_that_goes_another_way_outlives_the_interruption_of_a_delivery(queue_dir, recorder, tm, message):
    """The transaction package logs the interruption, and goes on."""
    recorder.send = interrupt
    noted = Noted()
    post = Post(queue_dir, recorder, tm, message, background=noted)
    post.send('interrupted')
    message_id = post.send('goes on', delivery='background')
    tm.commit()

    assert noted.calls == [[message_id]]
    assert post.files == {'new': 2}


def test_several_queues_in_one_transaction_stand_and_fall_together(tm, tmp_path, recorder, message):
    posts = [Post(tmp_path / name, recorder, tm, message) for name in ('one', 'two')]
    for number, post in enumerate(posts):
        post.send(f'message {number}')
    tm.commit()
    assert sorted(recorder.subjects) == ['message 0', 'message 1']

    tm.begin()
    for post in posts:
        post.send('dropped')
    (tmp_path / 'two' / 'tmp').rmdir()
    with pytest.raises(QueueError, match=str(tmp_path / 'two')):
        tm.commit()

    assert [post.files for post in posts] == [{}, {}]
    assert sorted(recorder.subjects) == ['message 0', 'message 1']


def test_threads_with_transactions_of_their_own_do_not_meet(queue_dir, recorder, message):
    post = Post(queue_dir, recorder, transaction.manager, message)
    barrier = threading.Barrier(4)

    def work(number):
        for turn in range(10):
            barrier.wait(30)
            transaction.begin()
            post.send(f'{number}.{turn}')
            transaction.abort() if turn % 2 else transaction.commit()

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(post.sent) == sorted(f'{number}.{turn}' for number in range(4) for turn in range(0, 10, 2))
    assert post.files == {}


# --- the contracts ----------------------------------------------------------


def test_it_is_a_data_manager_with_savepoints(tm, post):
    post.send('one')
    (ours,) = (resource for resource in tm.get()._resources if isinstance(resource, MailDataManager))

    assert verifyClass(ISavepointDataManager, MailDataManager)
    assert verifyObject(ISavepointDataManager, ours)
    assert verifyObject(IDataManagerSavepoint, ours.savepoint())
    assert ours.transaction_manager is tm
