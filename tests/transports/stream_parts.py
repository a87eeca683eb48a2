"""A stream of messages over one session, and how it went."""

from __future__ import annotations

from collections import deque
from contextlib import closing, contextmanager
from typing import NamedTuple

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.results import Offer, SendResult
from pyramid_mailqueue.testing import EXTENSIONS
from pyramid_mailqueue.transports.base import run
from pyramid_mailqueue.transports.smtp import SMTPTransport

#: What a server may offer: everything, and without what makes a difference here.
OFFERS = {
    'all': EXTENSIONS,
    'stepwise': tuple(set(EXTENSIONS) - {'PIPELINING'}),
    'plain codes': tuple(set(EXTENSIONS) - {'ENHANCEDSTATUSCODES'}),
    'nothing': (),
}
ACCEPTED = '250 2.0.0 accepted'


def letter(name, *recipients, body='.hello'):
    """An offer whose name is in its sender and its content, to somebody of the same name if nobody else is named."""
    to = tuple(f'{recipient}@x.example' for recipient in recipients or [name])
    return Offer(f'{name}@site.example', to, f'Subject: {name}\r\n\r\n{body}\r\n.\r\n'.encode())


M1, M2, M3 = letter('m1'), letter('m2'), letter('m3')


class Course(NamedTuple):
    """How a stream went: the results, the trouble that was raised in the end, and what was not asked for."""

    results: list[SendResult]
    trouble: ServerTrouble | None
    left: list[Offer]

    @property
    def outcomes(self):
        """For each result, what was said of each recipient."""
        return [{recipient: str(reply) for recipient, reply in it.replies.items()} for it in self.results]


def stream(transport, first, more):
    """
    Let *first* go out, and what *more* gives, over one connection and those that replace it; yield their results.

    Raises trouble that came without a reply.
    """
    connection, hand = transport.connect(), deque([first])
    try:
        connection.submit(first)
        while hand:
            if connection.has_room and (offer := more()) is not None:
                hand.append(offer)
                connection.submit(offer)
            result = run(connection)
            if result is None:
                spent, connection = connection, None
                spent.release()
                connection = transport.connect(spent)
                for offer in hand:
                    connection.submit(offer)
                continue
            hand.popleft()
            if result.trouble is not None and not result.replies:
                raise result.trouble
            yield result
            if result.trouble is not None:
                return
    finally:
        if connection is not None:
            connection.release()


def play(transport, *offers, asked_for_last=None):
    """Let *offers* go out in one stream; set the event *asked_for_last* when the last one is asked for."""
    left, results, trouble = list(offers), [], None

    def more():
        if len(left) == 1 and asked_for_last:
            asked_for_last.set()
        return left.pop(0) if left else None

    try:
        results.extend(stream(transport, left.pop(0), more))
    except ServerTrouble as error:
        trouble = error
    return Course(results, trouble, left)


@contextmanager
def transport_to(server, **options):
    where = {} if server is None else {'hostname': server.host, 'port': server.port}
    options = {**where, 'tls': 'off', 'local_hostname': 'c.example', **options}
    with closing(SMTPTransport(**options)) as transport:
        yield transport


def received(server):
    """What was accepted, as it was offered."""
    return [Offer(message.sender, message.recipients, message.content) for message in server.messages]
