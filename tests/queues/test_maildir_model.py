"""A queue against a simple model of one: whatever is done in whatever order, and whoever dies in between."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass, field
from unittest import mock

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.maildir import MaildirQueue
from pyramid_mailqueue.queues.maildir import queue as maildir
from pyramid_mailqueue.queues.maildir.claim import MAX_DEATHS
from pyramid_mailqueue.queues.maildir.folders import FOLDERS
from pyramid_mailqueue.results import Burial, Settlement
from tests.parts.faults import intercepted, without_sync
from tests.parts.maildir import CONTENT, dead_recipients, forget, names, stage

which = st.integers(0, 5)


# Functions with names: of a lambda Hypothesis may want to read the source, each time.


def has_stagings(machine):
    return machine.stagings


def has_claims(machine):
    return machine.claims


def has_waiting(machine):
    return machine.model.names('waiting')


def has_held(machine):
    return machine.model.names('held')


def has_in_doubt(machine):
    return machine.model.names('in doubt')


def has_any(machine):
    return machine.model.names('waiting', 'held', 'in doubt', 'orphan')


@dataclass
class Message:
    """What the model knows of a message."""

    recipients: tuple[str, ...]
    due: float
    deaths: int = 0
    attempts: int = 0
    state: str = 'waiting'


@dataclass
class Model:
    messages: dict[str, Message] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)

    def names(self, *states):
        return sorted(name for name, message in self.messages.items() if message.state in states)

    def die(self, name):
        """The process that had claimed the message is dead, and a run has noticed."""
        message = self.messages[name]
        message.deaths += 1
        message.state = 'waiting'
        if message.deaths == MAX_DEATHS:
            self.dead += message.recipients
            del self.messages[name]


class QueueMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.now = 1_000_000
        self.number = 0
        self.model = Model()
        self.claims = []
        self.stagings = []
        self.stack = contextlib.ExitStack()
        self.path = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.stack.enter_context(intercepted(without_sync))

    @initialize(in_doubt=st.sampled_from(['hold', 'send', 'discard']))
    def start(self, in_doubt):
        self.in_doubt = in_doubt
        self.queue = self.open()

    def open(self):
        return MaildirQueue(self.path, in_doubt=self.in_doubt, clock=lambda: self.now)

    def teardown(self):
        self.stack.close()

    def new_envelope(self):
        self.number += 1
        return Envelope('s@x.example', tuple(f'{letter}{self.number}@x.example' for letter in 'abcd'), CONTENT)

    def enter(self, folder, name, envelope, state):
        """A new file is due when it is written, by the clock of the model."""
        os.utime(self.queue.place(folder, name), (self.now, self.now))
        self.model.messages[name] = Message(envelope.recipients, self.now, state=state)

    @rule(seconds=st.integers(1, 1000))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def another_process_starts(self):
        # Its first names are later than the others': what the same moment leaves to chance cannot be played again.
        self.now += 1
        self.queue = self.open()

    @rule()
    def put(self):
        envelope = self.new_envelope()
        self.enter('new', self.queue.put(envelope), envelope, 'waiting')

    @rule()
    def put_claimed(self):
        envelope = self.new_envelope()
        claim = self.queue.put_claimed(envelope)
        self.enter('cur', claim.id, envelope, 'claimed')
        self.claims.append(claim)

    # --- two phases

    @rule(ways=st.lists(st.booleans(), min_size=1, max_size=3), stay_open=st.booleans())
    def vote(self, ways, stay_open):
        messages = [(self.new_envelope(), claimed) for claimed in ways]
        with mock.patch.object(maildir, 'may_stay_open', return_value=stay_open):
            staging = stage(self.queue, *messages)
        staged = [file.name for file in staging._files]
        for name, (envelope, _) in zip(staged, messages, strict=True):
            self.enter('prepared', name, envelope, 'prepared')
        self.stagings.append((staging, staged, ways))

    @precondition(has_stagings)
    @rule(index=which)
    def publish(self, index):
        staging, staged, ways = self.stagings.pop(index % len(self.stagings))
        for name, claimed, claim in zip(staged, ways, staging.publish(), strict=True):
            assert (claim is not None) == claimed
            self.model.messages[name].state = 'claimed' if claimed else 'waiting'
            if claimed:
                assert claim.id == name
                assert claim.begin()
                self.claims.append(claim)
        assert staging.discard() == []

    @precondition(has_stagings)
    @rule(index=which)
    def discard(self, index):
        staging, staged, _ = self.stagings.pop(index % len(self.stagings))
        assert len(staging.discard()) == len(staged)
        for name in staged:
            del self.model.messages[name]

    @precondition(has_stagings)
    @rule(index=which)
    def die_in_doubt(self, index):
        staging, staged, _ = self.stagings.pop(index % len(self.stagings))
        forget(staging)
        for name in staged:
            self.model.messages[name].state = 'in doubt'

    # --- claims

    @rule()
    def claim(self):
        due = [
            (message.deaths, message.due)
            for message in self.model.messages.values()
            if message.state == 'waiting' and message.due <= self.now
        ]
        claims = self.queue.claim_due(self.now)
        claim = next(claims, None)
        claims.close()
        assert (claim is None) == (not due)
        if claim is None:
            return
        message = self.model.messages[claim.id]
        # Which of several that are alike comes first is told by their names.
        assert (message.deaths, message.due) == min(due)
        assert message.state == 'waiting'
        assert (claim.attempts, claim.deaths) == (message.attempts, message.deaths)
        assert claim.envelope == Envelope('s@x.example', message.recipients, CONTENT)
        message.state = 'claimed'
        self.claims.append(claim)

    @precondition(has_claims)
    @rule(
        index=which,
        fates=st.lists(st.sampled_from(['accepted', 'deferred', 'refused', 'forbidden']), min_size=4, max_size=4),
        due=st.none() | st.integers(-1000, 4000),
        counted=st.booleans(),
    )
    def settle(self, index, fates, due, counted):
        claim = self.claims.pop(index % len(self.claims))
        message = self.model.messages[claim.id]
        fate = dict(zip(message.recipients, fates, strict=False))
        group = {word: tuple(who for who, is_ in fate.items() if is_ == word) for word in fates}
        waiting = group.get('deferred', ())
        burials = tuple(Burial(group[word], word) for word in ('refused', 'forbidden') if group.get(word))
        due = None if due is None else self.now + due

        claim.settle(Settlement(waiting, due=due, counted=counted, last_reply='451 later', burials=burials))

        self.model.dead += [who for burial in burials for who in burial.recipients]
        if not waiting:
            del self.model.messages[claim.id]
            return
        if counted or due is not None or waiting != message.recipients:
            message.deaths = 0
        message.recipients = waiting
        message.attempts += counted
        message.due = message.due if due is None else due
        message.state = 'waiting'

    @precondition(has_claims)
    @rule(index=which, number=st.integers(1, 3))
    def keep(self, index, number):
        claim = self.claims[index % len(self.claims)]
        message = self.model.messages[claim.id]
        message.recipients = message.recipients[-number:]
        message.deaths = 0

        claim.keep(message.recipients)

        assert (claim.deaths, claim.envelope.recipients) == (0, message.recipients)

    @precondition(has_claims)
    @rule(index=which)
    def release(self, index):
        claim = self.claims.pop(index % len(self.claims))
        claim.release()
        claim.settle(Settlement())
        self.model.messages[claim.id].state = 'waiting'

    @precondition(has_claims)
    @rule(index=which)
    def die_while_delivering(self, index):
        claim = self.claims.pop(index % len(self.claims))
        forget(claim)
        self.model.messages[claim.id].state = 'orphan'

    @rule()
    def recover(self):
        recovery = self.queue.recover(self.now)

        assert sorted(recovery.orphans + recovery.buried) == self.model.names('orphan')
        for name in self.model.names('orphan'):
            self.model.die(name)
        in_doubt = self.model.names('in doubt')
        found = {'hold': recovery.in_doubt, 'send': recovery.sent, 'discard': recovery.discarded}
        assert sorted(found.pop(self.in_doubt)) == in_doubt
        assert set(found.values()) == {()}
        for name in in_doubt:
            if self.in_doubt == 'send':
                self.model.messages[name].state = 'waiting'
            elif self.in_doubt == 'discard':
                del self.model.messages[name]

    # --- people

    def some(self, index, *states):
        """The name of a message in one of *states*, and the message."""
        found = self.model.names(*states)
        name = found[index % len(found)]
        return name, self.model.messages[name]

    @precondition(has_waiting)
    @rule(index=which)
    def hold(self, index):
        name, message = self.some(index, 'waiting')
        self.queue.admin.hold(name)
        message.state = 'held'

    @precondition(has_held)
    @rule(index=which)
    def unhold(self, index):
        name, message = self.some(index, 'held')
        self.queue.admin.unhold(name)
        message.state = 'waiting'

    @precondition(has_waiting)
    @rule(index=which)
    def retry(self, index):
        name, message = self.some(index, 'waiting')
        self.queue.admin.retry(name)
        message.due = min(message.due, self.now)

    @precondition(has_in_doubt)
    @rule(index=which)
    def release_from_doubt(self, index):
        name, message = self.some(index, 'in doubt')
        self.queue.admin.release(name)
        message.due, message.state = self.now, 'waiting'

    @precondition(has_any)
    @rule(index=which)
    def delete(self, index):
        name, _ = self.some(index, 'waiting', 'held', 'in doubt', 'orphan')
        self.queue.admin.delete(name)
        del self.model.messages[name]

    @rule()
    def flush(self):
        self.queue.admin.flush()
        for name in self.model.names('waiting'):
            message = self.model.messages[name]
            message.due = min(message.due, self.now)

    # --- what holds at all times

    @invariant()
    def every_message_is_where_it_belongs(self):
        others = set(FOLDERS) - {'dead'}
        found = {folder: sorted(name.partition(',')[0] for name in names(self.queue, folder)) for folder in others}
        assert found == {
            'tmp': [],
            'prepared': self.model.names('prepared', 'in doubt'),
            'new': self.model.names('waiting'),
            'cur': self.model.names('claimed', 'orphan'),
            'held': self.model.names('held'),
            'corrupt': [],
        }

    @invariant()
    def everybody_who_is_given_up_is_in_a_dead_letter(self):
        assert dead_recipients(self.open()) == sorted(self.model.dead)

    @invariant()
    def nobody_else_can_have_what_is_held(self):
        other = self.open()
        held = [('cur', name) for name in self.model.names('claimed')]
        held += [('prepared', name) for name in self.model.names('prepared')]
        for folder, name in held:
            (found,) = [file for file in names(other, folder) if file.partition(',')[0] == name]
            assert other.take(folder, found) is None
        assert other.counts()['in doubt'] == len(self.model.names('in doubt'))


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=60, stateful_step_count=40)
