"""The commands of ``mq-queue`` that look at messages and change nothing."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from pyramid_mailqueue.cli.columns import STYLES, Column
from pyramid_mailqueue.cli.common import EX_NOT_DONE, EX_OK, complain
from pyramid_mailqueue.cli.monitor import judge, prometheus_text
from pyramid_mailqueue.cli.output import as_json, print_json, print_json_list, print_table
from pyramid_mailqueue.display import few, numbered, printable, size_in_words, span_in_words, timestamp
from pyramid_mailqueue.exceptions import NoSuchMessage
from pyramid_mailqueue.interfaces import IMailQueue
from pyramid_mailqueue.queues.contents import MOST_OCTETS, pieces_of, read_contents
from pyramid_mailqueue.queues.entries import AGE_LIMITS, STATES, UNDELIVERED, Choice, QueueEntry, Tally, header_lines

__all__ = [
    'check',
    'choice_of',
    'list_messages',
    'print_entries',
    'print_metrics',
    'show_message',
    'show_stats',
]

#: ``check`` reports messages that have ended so many processes; and so many of them, at most.
CRASHES, SOME = 2, 3

#: How long a check waits for a database, in seconds: less than monitoring waits for the check.
CHECK_SECONDS = 8

_WIDE = 160
_LIST = (
    Column('ID', is_whole=True),
    Column('STATE', is_whole=True, styles=STYLES),
    Column('AGE', is_number=True, is_whole=True),
    Column('DUE', is_number=True, is_whole=True),
    Column('TRIES', is_number=True, is_whole=True, from_width=_WIDE),
    Column('SIZE', is_number=True, is_whole=True, from_width=_WIDE),
    Column('SENDER', from_width=_WIDE),
    Column('RECIPIENTS'),
    Column('SUBJECT', from_width=_WIDE),
    Column('LAST REPLY', from_width=120),
)


def list_messages(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Print a line for each message, oldest first; on a terminal their number, too."""
    choice, now, number = choice_of(arguments), time.time(), Counter[str]()

    def counted(what: str, entries: Iterable[QueueEntry]) -> Iterator[QueueEntry]:
        for entry in entries:
            number[what] += 1
            yield entry

    found = counted('all', queue.admin.entries(arguments.states or STATES))
    print_entries(counted('shown', (entry for entry in found if choice.takes(entry, now))), arguments)
    if sys.stdout.isatty() and not arguments.json:
        of_all = '' if choice == Choice() else f'{number["shown"]:,} of '
        print(f'\n{of_all}{numbered(number["all"], "message")}')
    return EX_OK


def choice_of(arguments: argparse.Namespace) -> Choice:
    """Return which messages the options choose, apart from their states."""
    return Choice(
        arguments.sender, arguments.recipient, arguments.older_than, arguments.newer_than, arguments.message_id
    )


def print_entries(entries: Iterable[QueueEntry], arguments: argparse.Namespace) -> None:
    """Print a line for each message, or a list in JSON."""
    now = time.time()
    if arguments.json:
        print_json_list(map(as_json, entries))
    else:
        print_table(_LIST, (_row(entry, now) for entry in entries))


def _row(entry: QueueEntry, now: float) -> tuple[str, ...]:
    return (
        entry.id,
        entry.state,
        '-' if entry.queued_at is None else span_in_words(now - entry.queued_at),
        '-' if entry.due is None else _due(entry.due, now),
        str(entry.retries),
        size_in_words(entry.size),
        _address(entry.sender),
        few(entry.recipients) or '-',
        entry.subject or '-',
        entry.last_reply or '-',
    )


def _due(due: float, now: float) -> str:
    return 'now' if due <= now else span_in_words(due - now)


def _address(sender: str | None) -> str:
    return '-' if sender is None else sender or '<>'


def show_message(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Print all that is known about one message, or the message itself."""
    admin = queue.admin
    try:
        entry = admin.find(arguments.ids[0])
        if arguments.raw:
            _print_raw(pieces_of(admin, entry.id))
            return EX_OK
        content = admin.content(entry.id, most=MOST_OCTETS + 1)
    except NoSuchMessage as error:
        complain(arguments.prog, str(error))
        return EX_NOT_DONE
    if arguments.json:
        header = [] if entry.state == 'corrupt' else header_lines(content)
        print_json({**as_json(entry), 'headers': [_field(line) for line in header]})
        return EX_OK
    for title, value in _facts(entry, time.time()):
        print(f'{title:<13}{printable(value)}'.rstrip())
    if entry.state != 'corrupt':
        for line in _shown(content):
            print(printable(line))
    return EX_OK


def _shown(content: bytes) -> Iterator[str]:
    """Yield a content as lines to read: everything decoded, and parts that are not text only named."""
    contents = read_contents(content)
    for number, (name, value) in enumerate(contents.header):
        yield from ([] if number else [''])
        yield f'{name}: {value}'
    if contents.text is not None:
        yield from ('', *contents.text)
    if contents.is_cut:
        yield from ('', 'There is more of the text: --raw has all of it.')
    for number, part in enumerate(contents.parts):
        yield from ([] if number else [''])
        size = '' if part.size is None else f', {numbered(part.size, "octet")}'
        yield f'[{part.kind}{f", {part.name}" if part.name else ""}{size}]'
    if contents.problem:
        yield from ('', f'{contents.problem} --raw has all of it.')


def _facts(entry: QueueEntry, now: float) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each line about a message."""

    def moment(seconds: float) -> str:
        ago = f'{span_in_words(now - seconds)} ago' if seconds <= now else f'in {span_in_words(seconds - now)}'
        return f'{timestamp(seconds)} ({ago})'

    yield 'ID', entry.id
    yield 'State', entry.state
    if entry.sender is not None:
        yield 'Sender', f'<{entry.sender}>'
    for number, recipient in enumerate(entry.recipients):
        yield '' if number else 'Recipients', f'<{recipient}>'
    if entry.queued_at is not None:
        yield 'Queued', moment(entry.queued_at)
        yield 'Attempts', str(entry.retries)
    if entry.last_attempt is not None:
        yield 'Last attempt', moment(entry.last_attempt)
    if entry.last_reply:
        yield 'Last reply' if entry.sender is not None else 'Problem', entry.last_reply
    if entry.due is not None:
        yield 'Due', moment(entry.due)
    yield 'Size', numbered(entry.size, 'octet')


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(':')
    return name.strip(), value.strip()


def _print_raw(pieces: Iterator[bytes]) -> None:
    if not sys.stdout.isatty():
        sys.stdout.flush()
        sys.stdout.buffer.writelines(pieces)
        return
    # The raw bytes that a pipe gets could do anything to a terminal.
    for line in b''.join(pieces).decode('utf-8', 'backslashreplace').splitlines():
        print(printable(line.expandtabs()))


def show_stats(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Print how many messages there are, by state, domain and age."""
    now = time.time()
    states = tuple(dict.fromkeys(arguments.states or UNDELIVERED))
    stats = queue.admin.stats(states)
    if arguments.json:
        print_json(
            {
                'age_limits_minutes': AGE_LIMITS,
                'states': [{'state': state, **_tally_as_json(tally)} for state, tally in stats.by_state.items()],
                'domains': [{'domain': domain, **_tally_as_json(tally)} for domain, tally in stats.by_domain.items()],
            }
        )
        return EX_OK
    _print_tallies('STATE', stats.by_state.values(), stats.by_state.items(), now)
    largest = list(stats.by_domain.items())[: arguments.top]
    print(f'\nBy domain of the recipients, what is {_or(states)}:\n')
    _print_tallies('DOMAIN', [stats.by_state[state] for state in states], largest, now)
    if len(stats.by_domain) > len(largest):
        print(f'... and {numbered(len(stats.by_domain) - len(largest), "domain")} more')
    return EX_OK


def _or(words: Sequence[str]) -> str:
    *others, last = words
    return f'{", ".join(others)} or {last}' if others else last


def _tally_as_json(tally: Tally) -> dict[str, object]:
    return {
        'messages': tally.messages,
        'size': tally.size,
        'oldest': timestamp(tally.oldest),
        'by_age': tally.by_age,
    }


def _print_tallies(title: str, parts: Iterable[Tally], tallies: Iterable[tuple[str, Tally]], now: float) -> None:
    """Print a line for each of *tallies*, and before them one for the sum of *parts*."""
    ages = [*map(str, AGE_LIMITS), f'{AGE_LIMITS[-1]}+']
    columns = [Column(title), *(Column(name, is_number=True) for name in ('T', *ages, 'OLDEST', 'SIZE'))]
    rows = (
        (
            name,
            str(tally.messages),
            *map(str, tally.by_age),
            '-' if tally.oldest is None else span_in_words(now - tally.oldest),
            size_in_words(tally.size),
        )
        for name, tally in (('TOTAL', sum(parts, Tally())), *tallies)
    )
    print_table(columns, rows)


# --- for monitoring ---------------------------------------------------------


def check(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Print the state of the queue, and return the exit status of a Nagios plugin."""
    queue.hurry(CHECK_SECONDS)
    counts = queue.counts()
    oldest = queue.admin.oldest(('waiting', 'in progress'))
    since = None if oldest is None else oldest.queued_at
    age = None if since is None else time.time() - since
    crashing = queue.admin.crashing(CRASHES, SOME)
    limits = arguments.max_age, arguments.max_waiting
    verdict = judge(counts, age, *limits, misdated=queue.count_misdated(), crashing=crashing)
    if arguments.json:
        print_json(
            {
                'status': verdict.word,
                'problems': verdict.problems,
                'counts': dict(counts),
                'oldest': None if oldest is None else as_json(oldest),
            }
        )
    else:
        print(verdict.text)
    return verdict.status


def print_metrics(queue: IMailQueue, arguments: argparse.Namespace) -> int:
    """Print the metrics for Prometheus."""
    found = ((state, queue.admin.oldest((state,))) for state in STATES if state != 'corrupt')
    oldest = {state: entry.queued_at for state, entry in found if entry is not None and entry.queued_at is not None}
    print(prometheus_text(queue.counts(), oldest), end='')
    return EX_OK
