"""
What it takes to put one message into the queue in the application's database, in the transaction of the application.

Beside it stands the same transaction with an INSERT that is written by hand: of the same row, with the same bytes.
Each is timed with a row of the application's own, and without; with a message that is bytes already, and with one that
Python has to serialise for both.  All are timed in turns, transaction by transaction; PostgreSQL waits for the disk.
"""

from __future__ import annotations

import itertools
import secrets
import statistics
import time
from collections.abc import Callable
from email import policy
from functools import partial
from typing import Any

import transaction
import zope.sqlalchemy
from sqlalchemy import create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from benchmarks.common import KIB, RECIPIENT, SENDER, Measured, new_message, options, print_table, progress
from benchmarks.databases import TABLE, Sql, queue_tables
from pyramid_mailqueue import mailer_from_settings
from pyramid_mailqueue.message.envelope import Envelope

SIZE = 4 * KIB

#: What is compared: the way, its unit, and how much it may cost in units.
NOTHING = 'a row of the application, and no mail'
PAIRS = {
    f'{what}{row}': (f'INSERT by hand{given}{row}', f'mailer.send(){given}{row}')
    for given, what in (('', 'bytes'), (', a message to serialise', 'message'))
    for row in ('', ', beside a row')
}
LIMIT = 1.3


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = 'orders'

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


_INSERT = text(
    f'INSERT INTO {TABLE} (id, state, due, attempts, deaths, queued_at, last_reply, sender, recipients, '
    "message_id, subject, content) VALUES (:id, 'waiting', :now, 0, 0, :now, '', :sender, CAST(:recipients AS json), "
    ':message_id, :subject, :content)'
)


def main() -> None:
    parser = options(__doc__, rounds=10)
    parser.add_argument('--messages', type=int, default=200, help='in each round (%(default)s)')
    arguments = parser.parse_args()
    ways = [NOTHING, *itertools.chain(*PAIRS.values())]
    measured: Measured[float] = Measured({way: [] for way in ways}, {})
    with queue_tables() as url:
        app = App(url)
        for number in range(1, arguments.rounds + 1):
            app.clear()
            for way, seconds in app.round(arguments.messages).items():
                measured.results[way].append(seconds)
            ratios = (f'{measured.results[ours][-1] / measured.results[hand][-1]:.2f}' for hand, ours in PAIRS.values())
            progress(f'round {number} of {arguments.rounds}: {", ".join(ratios)} of an INSERT by hand')
        app.close()
    units = {ours: hand for hand, ours in PAIRS.values()}

    def cells(way: str) -> tuple[str, ...]:
        ratio = measured.ratio(way, units.get(way, way), float)
        return f'{1000 * measured.median(way, float):.3f} ms', f'{ratio:.2f}' if way in units else ''

    title = (
        f'sql_enqueue: a transaction with one message of {SIZE // KIB} KiB; medians of {arguments.rounds} rounds.\n'
        f'The limit is {LIMIT} of an INSERT by hand.'
    )
    print_table(title, ('p50', 'to by hand'), measured.rows(cells))


class App:
    """An application with a session for each request, and its mail."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        Base.metadata.create_all(self._engine)
        self._factory = sessionmaker(self._engine)
        zope.sqlalchemy.register(self._factory)
        settings = {'mailqueue.queue': 'sql', 'sqlalchemy.url': url, 'mailqueue.smtp_hostname': 'localhost'}
        self._mailer = mailer_from_settings({**settings, 'mailqueue.delivery': 'queue'})
        self._sql = Sql(url)
        self._message = new_message(SIZE)
        # With a Message-ID and a Date: nothing has to be added to it.
        self._content = Envelope.from_message(self._message).content

    def close(self) -> None:
        self._mailer.close()
        self._engine.dispose()
        self._sql.close()

    def clear(self) -> None:
        for table in (TABLE, 'orders'):
            self._sql(f'TRUNCATE {table}')
            self._sql.settle_down(table)

    def round(self, messages: int) -> dict[str, float]:
        """Return the median of the seconds that each way took."""
        mails: dict[str, list[Callable[[Session], Any]]] = {
            'bytes': [partial(self._by_hand, lambda: self._content), partial(self._send, self._content)],
            'message': [partial(self._by_hand, self._serialised), partial(self._send, self._message)],
        }
        ways: dict[str, Callable[[], None]] = {NOTHING: partial(self._transact, lambda session: None, with_row=True)}
        for what, pair in PAIRS.items():
            for way, mail in zip(pair, mails[what.partition(',')[0]], strict=True):
                ways[way] = partial(self._transact, mail, with_row=what.endswith('row'))
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(messages):
            for way, transact in ways.items():
                start = time.perf_counter()
                transact()
                times[way].append(time.perf_counter() - start)
        return {way: statistics.median(seconds) for way, seconds in times.items()}

    def _transact(self, mail: Callable[[Session], Any], *, with_row: bool) -> None:
        with transaction.manager:
            session = self._factory()
            if with_row:
                session.add(Order(name='one'))
            mail(session)

    def _serialised(self) -> bytes:
        return self._message.as_bytes(policy=policy.SMTP)

    def _by_hand(self, content: Callable[[], bytes], session: Session) -> None:
        values = {
            'id': f'{time.time_ns() // 1000:013x}{secrets.token_hex(5)}',
            'now': time.time(),
            'sender': SENDER,
            'recipients': f'["{RECIPIENT}"]',
            'message_id': '<1@site.example>',
            'subject': 'Your order',
            'content': content(),
        }
        session.execute(_INSERT, values)
        zope.sqlalchemy.mark_changed(session)

    def _send(self, message: Any, session: Session) -> None:
        self._mailer.send(message, sender=SENDER, recipients=RECIPIENT, session=session)


if __name__ == '__main__':
    main()
