"""The state of a queue for monitoring: the output of a Nagios plugin, and metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyramid_mailqueue.display import numbered, printable, span_in_words
from pyramid_mailqueue.queues.entries import STATES

__all__ = ['CRITICAL', 'OK', 'UNKNOWN', 'WARNING', 'Verdict', 'judge', 'prometheus_text']

# The exit statuses of a Nagios plugin.
OK, WARNING, CRITICAL, UNKNOWN = range(4)
WORDS = ('OK', 'WARNING', 'CRITICAL', 'UNKNOWN')

#: What needs attention, although it keeps no other message from being delivered.
_TO_LOOK_AT = {'dead': 'dead letter', 'in doubt': 'message in doubt', 'corrupt': 'corrupt file'}


@dataclass(frozen=True)
class Verdict:
    """
    The state of a queue.

    :param status: the exit status
    :param problems: what is wrong, the worst first
    :param text: the line for Nagios, followed by the performance data
    """

    status: int
    problems: tuple[str, ...]
    text: str

    @property
    def word(self) -> str:
        """``OK``, ``WARNING`` or ``CRITICAL``."""
        return WORDS[self.status]


def judge(
    counts: Mapping[str, int],
    oldest_age: float | None,
    max_age: float | None,
    max_waiting: int | None,
    *,
    misdated: int = 0,
    crashing: Sequence[str] = (),
) -> Verdict:
    """
    Judge a queue: critical if a limit is exceeded, a warning if something needs attention.

    :param counts: the number of messages in each state
    :param oldest_age: the age of the oldest message that is to be delivered, in seconds; None if there is none
    :param max_age: how old it may be, in seconds; None is no limit
    :param max_waiting: how many messages may wait; None is no limit
    :param misdated: how many have a due time that no retry can have given
    :param crashing: the ids of messages that crash the processes delivering them
    """
    waiting = counts.get('waiting', 0)
    critical = []
    if max_age is not None and oldest_age is not None and oldest_age > max_age:
        critical.append(f'the oldest is {span_in_words(oldest_age)} old (limit: {span_in_words(max_age)})')
    if max_waiting is not None and waiting > max_waiting:
        critical.append(f'{waiting} waiting (limit: {max_waiting})')
    warnings = [_counted(counts[state], noun) for state, noun in _TO_LOOK_AT.items() if counts.get(state)]
    if misdated:
        warnings.append(
            f'{numbered(misdated, "message")} with a due time that no retry can have given: a clock is wrong'
        )
    # The text after a bar is performance data.
    warnings += [f'delivery of {printable(id_).replace("|", "?")} crashes repeatedly' for id_ in crashing]
    status = CRITICAL if critical else WARNING if warnings else OK
    problems = (*critical, *warnings)
    summary = f'{waiting} waiting' + (f', oldest {span_in_words(oldest_age)}' if oldest_age is not None else '')
    told = '; '.join(problems) or summary
    return Verdict(
        status,
        problems,
        f'MAILQUEUE {WORDS[status]} - {told} | {_performance_data(counts, oldest_age, max_age, max_waiting)}',
    )


def _counted(number: int, noun: str) -> str:
    # "messages in doubt"
    head, _, tail = noun.partition(' in ')
    return numbered(number, head) + (f' in {tail}' if tail else '')


def _performance_data(
    counts: Mapping[str, int], oldest_age: float | None, max_age: float | None, max_waiting: int | None
) -> str:
    """``label=value[unit];warn;crit;min``, as the guidelines for Nagios plugins have it."""
    limits = {'waiting': f';;{"" if max_waiting is None else max_waiting};0'}
    limits |= dict.fromkeys(_TO_LOOK_AT, ';0;;0')
    data = [f'oldest={max(0, int(oldest_age or 0))}s;;{"" if max_age is None else int(max_age)};0']
    data += [f'{state.replace(" ", "_")}={counts.get(state, 0)}{limits.get(state, ";;;0")}' for state in STATES]
    return ' '.join(data)


def prometheus_text(counts: Mapping[str, int], oldest: Mapping[str, float]) -> str:
    """
    Return the metrics of a queue in the text format of Prometheus.

    :param counts: the number of messages in each state
    :param oldest: for each state that has messages, when the oldest of them came into the queue, in seconds since the
        epoch
    """
    lines = [
        '# HELP mailqueue_messages Messages in the queue, by state.',
        '# TYPE mailqueue_messages gauge',
        *(f'mailqueue_messages{{state="{state}"}} {counts.get(state, 0)}' for state in STATES),
        '# HELP mailqueue_oldest_message_timestamp_seconds When the oldest message of a state came into the queue.',
        '# TYPE mailqueue_oldest_message_timestamp_seconds gauge',
        *(
            f'mailqueue_oldest_message_timestamp_seconds{{state="{state}"}} {seconds:.0f}'
            for state, seconds in oldest.items()
        ),
    ]
    return '\n'.join(lines) + '\n'
