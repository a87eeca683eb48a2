"""Transports with connections that answer as they are told, and a source of claims."""

from __future__ import annotations

import os
import select

from pyramid_mailqueue.delivery.engine import Engine, Nothing
from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.results import SendResult
from pyramid_mailqueue.transports.base import Connection, Transport


class Answers(Connection):
    """
    A connection that takes two offers in hand, and answers the oldest whenever it is looked at after a wait.

    Exceptions are raised, but a ServerTrouble is that of a result.
    """

    is_spent = False

    def __init__(self, transport, answers):
        self.transport = transport
        self.answers = answers
        self.hand = []
        self.is_released = False
        self._fd = os.open('/dev/null', os.O_RDONLY)

    def fileno(self):
        return self._fd

    @property
    def has_room(self):
        return len(self.hand) < 2

    def submit(self, offer):
        self.hand.append(offer)
        self.transport.offered.append(offer.recipients)

    def advance(self, events=0):
        if not (events and self.hand):
            return
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if self.transport.before:
            self.transport.before(self.hand[0].recipients)
        if answer == 'spent':
            self.answers.append(True)
            self.is_spent = True
            return
        if isinstance(answer, ServerTrouble):
            answer = SendResult(trouble=answer)
        if isinstance(answer, BaseException):
            raise answer
        self.transport.answered.append(self.hand.pop(0).recipients)
        yield answer

    def wait(self):
        return select.POLLIN, 60

    def release(self):
        assert not self.is_released
        self.is_released = True
        os.close(self._fd)


class Streams(Transport):
    """
    A transport with connections.

    :param answers: what they answer; the last one again and again
    :param by_connection: what the second, the third, ... connection answers; an exception is raised where it is opened
    :param before: called with the recipients of each message before it is answered
    """

    name = 'streams'

    def __init__(self, *answers, by_connection=(), before=None):
        self.answers = list(answers)
        self.by_connection = [self.answers, *map(list, by_connection)]
        self.before = before
        self.offered = []
        self.answered = []
        self.connections = []
        self.instead_of = []

    def connect(self, instead_of=None):
        number = len(self.connections)
        answers = self.by_connection[number] if number < len(self.by_connection) else self.answers
        self.connections.append(None)
        self.instead_of.append(instead_of)
        if isinstance(answers[0], BaseException) and number:
            raise answers[0]
        self.connections[-1] = Answers(self, answers)
        return self.connections[-1]

    def send(self, sender, recipients, content):
        raise AssertionError('there are connections')


class Given(Nothing):
    """
    A source of some claims.

    :ivar results: each claim that was settled, with its result
    :ivar released: each claim that was not
    :ivar on_ended: called with each of the former
    """

    def __init__(self, *claims):
        self.claims = list(claims)
        self.results = []
        self.released = []
        self.on_ended = lambda claim, result: None
        self.is_over = False

    def look(self, number):
        return min(number, len(self.claims))

    def next(self):
        return self.claims.pop(0) if self.claims else None

    def ended(self, claim, result):
        if result is None:
            self.released.append(claim)
        else:
            self.results.append((claim, result))
            self.on_ended(claim, result)


def deliver_all(handler, given, **options):
    """Deliver what is *given*; return each claim that was settled, with its result."""
    Engine(handler, **options).run(given)
    return given.results
