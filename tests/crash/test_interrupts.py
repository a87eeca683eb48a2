"""A commit is interrupted at every moment: its mail leaves afterwards in the same process, or is aborted as a whole."""

from __future__ import annotations

import gc
import itertools
import logging
import sys

import pytest
import transaction

from pyramid_mailqueue.delivery.dispatch import BackgroundDispatcher, InlineDispatcher
from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.delivery.runner import Runner
from pyramid_mailqueue.mailer import Mailer
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.transactions import ManagerTransaction
from tests.parts.faults import intercepted, without_sync
from tests.parts.interrupts import Interrupted, interrupting

# Not each moment each time: there are more than a thousand, and most of them lie in the same function.
STRIDE = 7

ALL = ['first', 'second', 'third']


class Process:
    """What delivers in a process, and what has left it."""

    def __init__(self, queue, recorder):
        self.queue = queue
        self.recorder = recorder
        self.handler = MessageHandler([recorder])
        self.background = BackgroundDispatcher(self.handler, queue)
        self.manager = transaction.TransactionManager(explicit=True)
        self.mailer = Mailer(
            queue,
            self.handler,
            {'background': self.background, 'inline': InlineDispatcher(self.handler, queue)},
            Envelope.from_message,
            transactions=ManagerTransaction(self.manager),
        )

    def commit(self, message, delivery, number):
        """Commit three messages, and be interrupted meanwhile; return whether that has happened, and been told."""
        self.manager.begin()
        for subject, way in zip(ALL, (delivery, delivery, 'queue'), strict=True):
            self.mailer.send(message(subject), delivery=way)
        is_told = False
        with interrupting(number) as hit:
            try:
                self.manager.commit()
            except Interrupted:
                is_told = True
        if is_told:
            # As whoever has begun the transaction does.
            self.manager.abort()
        return bool(hit), is_told


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    """Logs, and what pytest notes of interrupted generators, would keep their frames and all that is in there."""
    monkeypatch.setattr(sys, 'unraisablehook', lambda _: None)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    gc.collect()


@pytest.mark.usefixtures('files')
@pytest.mark.parametrize('delivery', ['background', 'inline'])
def test_mail_in_a_directory(tmp_path, recorder, message, delivery):
    told, counts = 0, {0: 0, 3: 0}
    for number in itertools.count(1, STRIDE):
        recorder.subjects.clear()
        with intercepted(without_sync):
            process = Process(MaildirQueue(tmp_path / str(number)), recorder)
            is_hit, is_told = process.commit(message, delivery, number)
            process.background.close()
            # What mq-run does, while the process that was interrupted lives.
            report = Runner(MaildirQueue(tmp_path / str(number)), process.handler).run()
        if not is_hit:
            break
        told += is_told
        left = {*recorder.subjects}
        assert left in (set(), {*ALL}), number
        assert left or is_told, number
        assert report.recovery.in_doubt == (), number
        assert not any(process.queue.counts().values()), number
        counts[len(left)] += 1
    # At all times, and the last one was not interrupted.
    assert told > 10
    assert min(counts.values()) > 10
    assert sorted(recorder.subjects) == ALL
