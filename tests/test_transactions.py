"""Which transaction mail joins in a request, and where there is none: with pyramid_tm of both kinds, and repoze.tm2."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

import pytest
import repoze.tm
import transaction
from pyramid.events import NewResponse
from pyramid.request import Request
from pyramid.response import Response
from pyramid.scripting import prepare
from pyramid.threadlocal import get_current_request

from pyramid_mailqueue import IMailer, ITransport, NoActiveTransaction, get_mailer

EXPLICIT = {'tm.manager_hook': 'pyramid_tm.explicit_manager'}
KINDS = {
    'thread': {},
    'explicit': {'settings': EXPLICIT},
    'repoze.tm': {'wrap': repoze.tm.TM},
    'repoze.tm without pyramid_tm': {'wrap': repoze.tm.TM, 'include': ()},
    'repoze.tm whatever pyramid_tm would use': {'wrap': repoze.tm.TM, 'settings': EXPLICIT},
}


class Trouble(Exception):
    pass


@pytest.fixture(autouse=True)
def _no_transaction_of_this_thread():
    transaction.abort()
    yield
    transaction.abort()


@pytest.fixture
def app_of(make_app, make_settings, recorder):
    """An app of one view whose mail is delivered, to ``recorder``, before its transaction's commit returns."""

    def app_of(view, kind='thread', configure=None, **own):
        def set_up(config):
            config.registry.registerUtility(recorder, ITransport, 'recorder')
            if configure:
                configure(config)

        options = KINDS[kind]
        settings = make_settings(transports='recorder', delivery='inline') | options.get('settings', {}) | own
        others = {name: value for name, value in options.items() if name != 'settings'}
        return make_app(view, settings, configure=set_up, **others)

    return app_of


@pytest.fixture
def refused(message):
    """Ask a mailer to send where it must not; it has to name what helps."""

    def refused(mailer):
        with pytest.raises(NoActiveTransaction) as caught:
            mailer.send(message('lost'))
        assert 'send_immediately()' in str(caught.value)
        assert 'enqueue()' in str(caught.value)
        return str(caught.value)

    return refused


@pytest.fixture
def discarded(caplog):
    """The Message-IDs that were logged as discarded."""
    caplog.set_level(logging.INFO, 'mailqueue.queue_log')

    def discarded():
        events = [record.mailqueue for record in caplog.records if hasattr(record, 'mailqueue')]
        return [event['msgid'] for event in events if event['status'] == 'discarded']

    return discarded


both_kinds = pytest.mark.parametrize('kind', ['thread', 'explicit'])
every_kind = pytest.mark.parametrize('kind', KINDS)
every_kind_of_repoze = pytest.mark.parametrize('kind', [kind for kind in KINDS if kind.startswith('repoze')])


# --- in the view ------------------------------------------------------------


@every_kind
def test_mail_is_sent_when_the_request_has_committed(app_of, recorder, message, kind):
    in_the_view = []

    def view(request):
        request.mailer.send(message('hello'))
        in_the_view.extend(recorder.subjects)

    app_of(view, kind).get('/')

    assert (in_the_view, recorder.subjects) == ([], ['hello'])


@every_kind
def test_a_view_that_raises_sends_nothing(app_of, recorder, message, discarded, kind):
    message_ids = []

    def view(request):
        message_ids.append(request.mailer.send(message('dropped')))
        raise Trouble

    with pytest.raises(Trouble):
        app_of(view, kind).get('/')

    assert (recorder.subjects, discarded()) == ([], message_ids)


@both_kinds
def test_a_view_that_dooms_its_transaction_sends_nothing(app_of, recorder, message, discarded, kind):
    message_ids = []

    def view(request):
        request.tm.doom()
        message_ids.append(request.mailer.send(message('dropped')))

    app_of(view, kind).get('/', status=200)

    assert (recorder.subjects, discarded()) == ([], message_ids)


@both_kinds
def test_a_commit_veto_drops_the_mail_and_the_log_says_which(app_of, recorder, message, discarded, kind):
    message_ids = []

    def view(request):
        message_ids.append(request.mailer.send(message('dropped')))
        request.response.status = 404

    app_of(view, kind, **{'tm.commit_veto': 'pyramid_tm.default_commit_veto'}).get('/', status=404)

    assert (recorder.subjects, discarded()) == ([], message_ids)


@both_kinds
def test_a_response_that_passes_the_commit_veto_sends(app_of, recorder, message, kind):
    def view(request):
        request.mailer.send(message('hello'))

    app_of(view, kind, **{'tm.commit_veto': 'pyramid_tm.default_commit_veto'}).get('/')

    assert recorder.subjects == ['hello']


@both_kinds
def test_a_view_may_commit_and_begin_again(app_of, recorder, message, kind):
    in_the_view = []

    def view(request):
        request.mailer.send(message('first'))
        request.tm.commit()
        in_the_view.extend(recorder.subjects)
        request.tm.begin()
        request.mailer.send(message('dropped'))
        request.tm.abort()
        request.tm.begin()
        request.mailer.send(message('second'))

    app_of(view, kind).get('/')

    assert (in_the_view, recorder.subjects) == (['first'], ['first', 'second'])


@every_kind_of_repoze
def test_with_repoze_tm_a_view_may_commit_and_begin_again(app_of, recorder, message, kind):
    def view(request):
        request.mailer.send(message('first'))
        transaction.commit()
        transaction.begin()
        request.mailer.send(message('second'))

    app_of(view, kind).get('/')

    assert recorder.subjects == ['first', 'second']


@every_kind
def test_mail_may_be_sent_in_a_before_commit_hook(app_of, recorder, message, kind):
    def view(request):
        manager = transaction.manager if 'repoze' in kind else request.tm
        manager.get().addBeforeCommitHook(lambda: request.mailer.send(message('from the hook')))

    app_of(view, kind).get('/')

    assert recorder.subjects == ['from the hook']


@both_kinds
def test_mail_may_be_sent_in_a_before_commit_hook_of_a_transaction_that_the_view_has_begun(
    app_of, recorder, message, kind
):
    def view(request):
        request.tm.commit()
        request.tm.begin()
        request.mailer.send(message('from the view'))
        request.tm.get().addBeforeCommitHook(lambda: request.mailer.send(message('from the hook')))

    app_of(view, kind).get('/')

    assert recorder.subjects == ['from the view', 'from the hook']


@both_kinds
def test_a_view_may_try_a_commit_again_that_a_hook_had_stopped(app_of, recorder, message, kind):
    def view(request):
        txn = request.tm.get()
        txn.addBeforeCommitHook(fail, [request])
        with suppress(Trouble):
            txn.commit()
        request.mailer.send(message('from the view'))
        txn.addBeforeCommitHook(lambda: request.mailer.send(message('from the hook')))

    app_of(view, kind).get('/')

    assert recorder.subjects == ['from the view', 'from the hook']


@every_kind
def test_mail_from_an_after_commit_hook_is_refused(app_of, recorder, refused, kind):
    told = []

    def view(request):
        manager = transaction.manager if 'repoze' in kind else request.tm
        manager.get().addAfterCommitHook(lambda committed: told.append(refused(request.mailer)))

    app_of(view, kind).get('/')

    assert told


@both_kinds
def test_a_transaction_is_marked_once(app_of, message, kind):
    hooks = []

    def view(request):
        for subject in ('one', 'two'):
            request.mailer.send(message(subject))
        hooks.extend(request.tm.get().getBeforeCommitHooks())

    app_of(view, kind).get('/')

    assert len(hooks) == 1


@both_kinds
def test_get_mailer_is_the_same_for_who_has_a_request(app_of, recorder, message, kind):
    app_of(lambda request: get_mailer(request).send(message('hello')), kind).get('/')

    assert recorder.subjects == ['hello']


@every_kind
def test_the_registered_mailer_joins_the_transaction_of_the_request_in_hand(app_of, recorder, message, discarded, kind):
    message_ids = []

    def view(request):
        message_ids.append(request.registry.getUtility(IMailer).send(message('hello')))
        if 'fail' in request.params:
            raise Trouble

    app = app_of(view, kind)
    app.get('/')
    with pytest.raises(Trouble):
        app.get('/?fail')

    assert (recorder.subjects, discarded()) == (['hello'], message_ids[1:])


def test_the_registered_mailer_joins_the_transaction_of_the_thread_where_there_is_no_request(app_of, recorder, message):
    mailer = app_of(lambda request: None, 'explicit').app.registry.getUtility(IMailer)
    assert get_current_request() is None

    with transaction.manager:
        mailer.send(message('from a script'))

    assert recorder.subjects == ['from a script']


# --- where nobody commits ---------------------------------------------------


def test_without_pyramid_tm(make_app, make_settings, recorder, refused):
    told = []

    def configure(config):
        config.registry.registerUtility(recorder, ITransport, 'recorder')

    app = make_app(
        lambda request: told.append(refused(request.mailer)),
        make_settings(transports='recorder'),
        include=(),
        configure=configure,
    )
    app.get('/')

    assert 'pyramid_tm has to be included' in told[0]


def stay_inactive(request):
    return False


@both_kinds
def test_an_activate_hook_that_says_no(app_of, refused, kind):
    told = []
    app = app_of(
        lambda request: told.append(refused(request.mailer)), kind, **{'tm.activate_hook': f'{__name__}.stay_inactive'}
    )
    app.get('/')

    assert told


@both_kinds
def test_the_registered_mailer_is_refused_in_a_request_that_has_no_transaction(app_of, refused, kind):
    told = []
    app = app_of(
        lambda request: told.append(refused(request.registry.getUtility(IMailer))),
        kind,
        **{'tm.activate_hook': f'{__name__}.stay_inactive'},
    )
    app.get('/')

    assert told


def test_who_manages_an_explicit_manager_alone_can_send(app_of, recorder, message, refused):
    def view(request):
        refused(request.mailer)
        with request.tm:
            request.mailer.send(message('ours'))
        refused(request.mailer)

    app_of(view, 'explicit', **{'tm.activate_hook': f'{__name__}.stay_inactive'}).get('/')

    assert recorder.subjects == ['ours']


def test_an_explicit_manager_after_a_commit_without_a_begin(app_of, recorder, message, refused):
    def view(request):
        request.mailer.send(message('first'))
        request.tm.commit()
        refused(request.mailer)
        request.tm.begin()

    app_of(view, 'explicit').get('/')

    assert recorder.subjects == ['first']


@pytest.fixture
def call_late(app_of):
    """Have a request call something that it is given, with itself, when its transaction is over."""

    def call_late(when, late, kind):
        def view(request):
            if when == 'a response callback':
                request.add_response_callback(lambda request, response: late(request))
            if when == 'a finished callback':
                request.add_finished_callback(late)
            if when == 'the body':
                # Made when the server asks for it.
                return Response(app_iter=(b'' for _ in [1] if not late(request)))
            return None

        def configure(config):
            if when == 'a NewResponse subscriber':
                config.add_subscriber(lambda event: late(event.request), NewResponse)

        app_of(view, kind, configure).get('/')

    return call_late


every_late_moment = pytest.mark.parametrize(
    'when', ['a response callback', 'a NewResponse subscriber', 'a finished callback', 'the body']
)


@both_kinds
@every_late_moment
def test_after_the_commit(call_late, refused, kind, when):
    told = []

    call_late(when, lambda request: told.append(refused(request.mailer)), kind)

    assert told


@every_kind_of_repoze
def test_with_repoze_tm_the_commit_comes_after_the_callbacks(app_of, recorder, message, kind):
    def view(request):
        request.add_response_callback(lambda request, response: request.mailer.send(message('response callback')))
        request.add_finished_callback(lambda request: request.mailer.send(message('finished callback')))

    app_of(view, kind).get('/')

    assert recorder.subjects == ['response callback', 'finished callback']


# --- exception views --------------------------------------------------------


def fail(request):
    raise Trouble


def with_exception_view(view):
    def configure(config):
        config.add_exception_view(view, context=Trouble)

    return configure


@both_kinds
@pytest.mark.parametrize('veto', ['', 'pyramid_tm.default_commit_veto'])
def test_in_an_exception_view_nobody_can_count_on_a_commit(app_of, recorder, refused, kind, veto):
    told = []

    def sorry(context, request):
        told.append(refused(request.mailer))
        return Response('sorry', 200)

    app_of(fail, kind, with_exception_view(sorry), **{'tm.commit_veto': veto}).get('/')

    assert 'exception view' in told[0]
    assert recorder.subjects == []


@both_kinds
def test_an_exception_view_after_a_commit_that_failed(app_of, recorder, refused, queue_dir, message, kind):
    told = []

    def view(request):
        request.mailer.send(message('dropped'))
        (queue_dir / 'tmp').rmdir()

    def sorry(context, request):
        told.append(refused(request.mailer))
        return Response(str(context), 500)

    def configure(config):
        config.add_exception_view(sorry, context=Exception)

    response = app_of(view, kind, configure).get('/', status=500)

    assert told
    assert str(queue_dir) in response.text
    assert recorder.subjects == []


@both_kinds
@pytest.mark.parametrize('first', ['an earlier message', None])
def test_an_exception_view_after_a_before_commit_hook_that_failed(app_of, recorder, refused, message, kind, first):
    """The transaction still calls itself active, but pyramid_tm has left it behind."""
    told = []

    def view(request):
        if first:
            request.mailer.send(message(first))
        request.tm.get().addBeforeCommitHook(fail, [request])

    def sorry(context, request):
        told.append(refused(request.mailer))
        return Response('sorry', 500)

    app_of(view, kind, with_exception_view(sorry)).get('/', status=500)

    assert told
    assert recorder.subjects == []


@every_kind_of_repoze
def test_with_repoze_tm_an_exception_view_is_inside_of_the_transaction(app_of, recorder, message, kind):
    def sorry(context, request):
        request.mailer.send(message('sorry'))
        return Response('sorry', 500)

    app_of(fail, kind, with_exception_view(sorry)).get('/', status=500)

    assert recorder.subjects == ['sorry']


# --- requests in requests, and around them ----------------------------------


def with_inner_view(view):
    def configure(config):
        config.add_route('inner', '/inner')
        config.add_view(view, route_name='inner', renderer='string')

    return configure


def test_a_subrequest_without_tweens_shares_the_transaction_of_the_thread(app_of, recorder, message):
    in_the_view = []

    def view(request):
        request.invoke_subrequest(Request.blank('/inner'))
        in_the_view.extend(recorder.subjects)

    app = app_of(view, 'thread', with_inner_view(lambda request: request.mailer.send(message('inner'))))
    app.get('/')
    app.get('/inner')

    assert (in_the_view, recorder.subjects) == ([], ['inner', 'inner'])


def test_a_subrequest_without_tweens_has_no_transaction_where_each_request_has_its_own_manager(app_of, refused):
    told = []

    def view(request):
        request.invoke_subrequest(Request.blank('/inner'))

    app_of(view, 'explicit', with_inner_view(lambda request: told.append(refused(request.mailer)))).get('/')

    assert told


def test_a_subrequest_with_tweens_has_a_transaction_of_its_own(app_of, recorder, message):
    in_the_view = []

    def view(request):
        request.mailer.send(message('outer'))
        request.invoke_subrequest(Request.blank('/inner'), use_tweens=True)
        in_the_view.extend(recorder.subjects)
        raise Trouble

    app = app_of(view, 'explicit', with_inner_view(lambda request: request.mailer.send(message('inner'))))
    with pytest.raises(Trouble):
        app.get('/')

    assert (in_the_view, recorder.subjects) == (['inner'], ['inner'])


def test_a_subrequest_with_tweens_aborts_the_transaction_of_the_thread_and_takes_its_mail_with_it(
    app_of, recorder, message, discarded
):
    message_ids = []

    def view(request):
        message_ids.append(request.mailer.send(message('aborted by pyramid_tm')))
        request.invoke_subrequest(Request.blank('/inner'), use_tweens=True)
        request.mailer.send(message('outer'))

    app_of(view, 'thread', with_inner_view(lambda request: request.mailer.send(message('inner')))).get('/')

    assert recorder.subjects == ['inner', 'outer']
    assert discarded() == message_ids


def tween_that_ends_the_transaction(handler, registry):
    def tween(request):
        request.tm.commit()
        return handler(request)

    return tween


def test_a_tween_may_end_an_explicit_transaction_before_the_request_begins(app_of, recorder, message):
    def view(request):
        request.tm.begin()
        request.mailer.send(message('hello'))

    def configure(config):
        config.add_tween(f'{__name__}.tween_that_ends_the_transaction', under='pyramid_tm.tm_tween_factory')

    app_of(view, 'explicit', configure).get('/')

    assert recorder.subjects == ['hello']


def test_tests_of_an_application_may_bring_a_transaction_that_they_abort(app_of, recorder, message):
    manager = transaction.TransactionManager(explicit=True)
    manager.begin()
    app = app_of(lambda request: request.mailer.send(message('hello')), 'explicit')
    app.get('/', extra_environ={'tm.active': True, 'tm.manager': manager})
    manager.abort()

    assert recorder.subjects == []


def test_an_environ_that_says_active_where_there_is_no_manager_means_the_one_of_the_thread(
    app_of, make_app, make_settings, recorder, message
):
    def configure(config):
        config.registry.registerUtility(recorder, ITransport, 'recorder')

    settings = make_settings(transports='recorder', delivery='inline')
    app = make_app(lambda request: request.mailer.send(message('hello')), settings, include=(), configure=configure)
    app.get('/', extra_environ={'tm.active': True})
    before = list(recorder.subjects)
    transaction.commit()

    assert (before, recorder.subjects) == ([], ['hello'])


@both_kinds
def test_what_one_request_left_is_not_found_by_the_next_one(app_of, recorder, message, refused, kind):
    """The transaction of a commit that failed stays with its thread, with our mark on it."""

    def view(request):
        if 'fail' in request.params:
            request.tm.get().addBeforeCommitHook(fail, [request])
            request.mailer.send(message('dropped'))
        elif 'inactive' in request.params:
            refused(request.mailer)
        else:
            request.mailer.send(message('hello'))

    def activate(request):
        return 'inactive' not in request.params

    app = app_of(view, kind, **{'tm.activate_hook': activate})
    for query in ('fail', 'inactive', 'fail', ''):
        if query == 'fail':
            with pytest.raises(Trouble):
                app.get('/?fail')
        else:
            app.get(f'/?{query}')

    assert recorder.subjects == ['hello']


# --- where a request begins its own -----------------------------------------

inactive = {'tm.activate_hook': f'{__name__}.stay_inactive'}


def with_block(manager, send):
    with manager:
        send()


def begin_and_commit(manager, send):
    manager.begin()
    send()
    manager.commit()


def attempts(manager, send):
    for attempt in manager.attempts():
        with attempt:
            send()


def run(manager, send):
    manager.run(send)


ways_to_begin = pytest.mark.parametrize('begin', [with_block, begin_and_commit, attempts, run])


@both_kinds
@ways_to_begin
def test_who_begins_a_transaction_can_send_where_pyramid_tm_is_not_active(
    app_of, recorder, message, refused, kind, begin
):
    def view(request):
        refused(request.mailer)
        begin(request.tm, lambda: request.mailer.send(message('by the request')))
        refused(request.mailer)
        begin(request.tm, lambda: request.registry.getUtility(IMailer).send(message('by the mailer')))

    app = app_of(view, kind, **inactive)
    app.get('/')
    app.get('/')

    assert recorder.subjects == ['by the request', 'by the mailer'] * 2


@ways_to_begin
def test_who_begins_a_transaction_of_the_thread_can_send_without_pyramid_tm(
    make_app, make_settings, recorder, message, refused, begin
):
    def view(request):
        refused(request.mailer)
        begin(transaction.manager, lambda: request.mailer.send(message('hello')))

    make_app(
        view,
        make_settings(transports='recorder', delivery='inline'),
        include=(),
        configure=lambda config: config.registry.registerUtility(recorder, ITransport, 'recorder'),
    ).get('/')

    assert recorder.subjects == ['hello']


@both_kinds
@every_late_moment
def test_who_begins_a_transaction_after_the_commit_can_send(call_late, recorder, message, kind, when):
    def late(request):
        with request.tm:
            request.mailer.send(message('late'))

    call_late(when, late, kind)

    assert recorder.subjects == ['late']


def test_a_thread_that_a_view_starts_has_a_transaction_of_its_own(app_of, recorder, message):
    def job(request):
        with transaction.manager:
            request.mailer.send(message('from the job'))
            request.registry.getUtility(IMailer).send(message('from the job, too'))

    def view(request):
        thread = threading.Thread(target=job, args=[request])
        thread.start()
        thread.join()

    app_of(view, 'thread', **inactive).get('/')

    assert recorder.subjects == ['from the job', 'from the job, too']


@both_kinds
def test_who_begins_a_transaction_may_send_in_its_before_commit_hook(app_of, recorder, message, kind):
    def view(request):
        with request.tm as txn:
            txn.addBeforeCommitHook(lambda: request.mailer.send(message('from the hook')))

    app_of(view, kind, **inactive).get('/')

    assert recorder.subjects == ['from the hook']


@both_kinds
def test_a_transaction_that_a_request_has_begun_drops_its_mail_with_its_abort(
    app_of, recorder, message, discarded, kind
):
    message_ids = []

    def view(request):
        with suppress(Trouble), request.tm:
            message_ids.append(request.mailer.send(message('dropped')))
            raise Trouble

    app_of(view, kind, **inactive).get('/')

    assert (recorder.subjects, discarded()) == ([], message_ids)


def test_a_subrequest_without_tweens_shares_the_transaction_that_a_view_has_begun(app_of, recorder, message):
    in_the_view = []

    def view(request):
        with request.tm:
            request.invoke_subrequest(Request.blank('/inner'))
            in_the_view.extend(recorder.subjects)

    inner = with_inner_view(lambda request: request.mailer.send(message('inner')))
    app_of(view, 'thread', inner, **inactive).get('/')

    assert (in_the_view, recorder.subjects) == ([], ['inner'])


@pytest.mark.parametrize('environ_for', [dict, lambda environ: environ], ids=['a copy', 'the same'])
def test_an_application_in_an_application_leaves_the_transaction_of_the_outer_one_alone(
    app_of, recorder, message, environ_for
):
    inner = app_of(lambda request: request.mailer.send(message('inner')), 'thread', **inactive)

    def view(request):
        with request.tm:
            request.mailer.send(message('before'))
            Request(environ_for(request.environ)).get_response(inner.app)
            request.mailer.send(message('after'))

    app_of(view, 'thread', **inactive).get('/')

    assert sorted(recorder.subjects) == ['after', 'before', 'inner']


def test_a_request_that_is_copied_into_a_thread_is_watched_there(app_of, recorder, message, refused):
    def inner_view(request):
        refused(request.mailer)
        with request.tm:
            request.mailer.send(message('from the thread'))

    inner = app_of(inner_view, 'thread', **inactive)

    def view(request):
        thread = threading.Thread(target=request.copy().get_response, args=[inner.app])
        thread.start()
        thread.join()

    app_of(view, 'thread', **inactive).get('/')

    assert recorder.subjects == ['from the thread']


def test_what_somebody_has_only_asked_for_is_not_begun(app_of, refused):
    told = []

    def view(request):
        request.tm.get().note('of nobody')
        told.append(refused(request.mailer))

    app = app_of(view, 'thread', **inactive)
    app.get('/')
    app.get('/')

    assert len(told) == 2
    assert 'with request.tm:' in told[0]


def test_what_one_request_has_begun_and_left_is_not_found_by_the_next_one(app_of, recorder, message, refused):
    told = []

    def view(request):
        if 'begin' in request.params:
            request.tm.begin()
            request.mailer.send(message('left'))
        else:
            told.append(refused(request.mailer))

    app = app_of(view, 'thread', **inactive)
    app.get('/?begin')
    app.get('/')

    assert told
    assert recorder.subjects == []


def test_a_commit_of_its_own_that_failed_leaves_no_transaction_to_a_request(app_of, recorder, message, refused):
    told = []

    def view(request):
        with suppress(Trouble), request.tm as txn:
            request.mailer.send(message('dropped'))
            txn.addBeforeCommitHook(fail, [request])
        told.append(refused(request.mailer))

    app_of(view, 'thread', **inactive).get('/')

    assert told
    assert recorder.subjects == []


def tween_that_begins(handler, registry):
    def tween(request):
        with transaction.manager:
            return handler(request)

    return tween


def test_what_is_begun_around_pyramid_looks_like_what_was_left_there(app_of, refused):
    """For the first request of a thread, and so for all of them: nobody watches the thread before."""
    told = []

    def configure(config):
        config.add_tween(f'{__name__}.tween_that_begins', under='pyramid_tm.tm_tween_factory')

    app = app_of(lambda request: told.append(refused(request.mailer)), 'thread', configure, **inactive)
    app.get('/')
    app.get('/')

    assert ['pyramid_tm.explicit_manager' in text for text in told] == [True, True]


def test_who_commits_around_pyramid_says_so_in_the_environ(app_of, recorder, message):
    app = app_of(lambda request: request.mailer.send(message('hello')), 'thread', **inactive)
    with transaction.manager:
        app.get('/', extra_environ={'tm.active': True})
        before = list(recorder.subjects)

    assert (before, recorder.subjects) == ([], ['hello'])


# --- requests that nobody serves --------------------------------------------


@both_kinds
@ways_to_begin
def test_a_script_can_send_in_the_transaction_of_its_request(app_of, recorder, message, kind, begin):
    registry = app_of(lambda request: None, kind).app.registry

    with prepare(registry=registry) as env:
        request = env['request']
        begin(request.tm, lambda: request.mailer.send(message('by the request')))
        begin(request.tm, lambda: get_mailer(request).send(message('by get_mailer')))
        begin(request.tm, lambda: registry.getUtility(IMailer).send(message('by the mailer')))

    assert recorder.subjects == ['by the request', 'by get_mailer', 'by the mailer']


def test_a_script_can_leave_the_begin_to_the_manager_of_the_thread(app_of, recorder, message):
    with prepare(registry=app_of(lambda request: None).app.registry) as env:
        env['request'].mailer.send(message('hello'))
        before = list(recorder.subjects)
        transaction.commit()

    assert (before, recorder.subjects) == ([], ['hello'])


def test_a_script_that_has_an_explicit_manager_is_told_to_begin(app_of, refused):
    with prepare(registry=app_of(lambda request: None, 'explicit').app.registry) as env:
        told = refused(env['request'].mailer), refused(env['registry'].getUtility(IMailer))

    assert ['with request.tm:' in text and 'pyramid_tm' not in text for text in told] == [True, True]


def test_a_script_that_aborts_drops_its_mail(app_of, recorder, message, discarded):
    with prepare(registry=app_of(lambda request: None).app.registry) as env:
        message_id = env['request'].mailer.send(message('dropped'))
        env['request'].tm.abort()

    assert (recorder.subjects, discarded()) == ([], [message_id])


@pytest.mark.parametrize('settings', [{}, inactive], ids=['active', 'inactive'])
def test_a_request_that_a_view_prepares_is_as_served_as_the_view(app_of, recorder, message, refused, settings):
    told = []

    def view(request):
        with prepare(registry=request.registry) as env:
            if settings:
                told.append(refused(env['request'].mailer))
            else:
                env['request'].mailer.send(message('hello'))

    app_of(view, 'thread', **settings).get('/')

    assert (len(told), recorder.subjects) == ((1, []) if settings else (0, ['hello']))
