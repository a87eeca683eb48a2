"""
How a claim of a :class:`~.sql.SQLQueue` ends: what is written, and that a lost claim writes nothing.

Each statement names the token of its claim.  If that is not in the row any more the lease has run out, and the claim is
lost: nothing is changed then.

Statements that are executed for each message, or for a few, are built once and always have the same text: that is
fastest for SQLAlchemy, the driver and the database.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    Executable,
    SQLColumnExpression,
    Text,
    and_,
    any_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    literal_column,
    not_,
    or_,
    select,
    true,
    update,
)

from pyramid_mailqueue.exceptions import QueueError
from pyramid_mailqueue.queues.entries import STATES
from pyramid_mailqueue.queues.sql.tables import ASIDE, CONTENTS, MESSAGES, has_run_out
from pyramid_mailqueue.results import Burial, Settlement

__all__ = [
    'IS_SEEN',
    'IS_UNKNOWN',
    'UNCHANGED',
    'UNCLAIMED',
    'Claimed',
    'begin',
    'delete_done',
    'in_ascii',
    'named',
    'owned',
    'release',
    'settle',
    'state_is',
    'try_everything',
    'update_recipients',
]

#: The values of a message without a claim.
UNCLAIMED: Mapping[str, None] = {'claim': None, 'claimed_by': None, 'lease': None}

#: The error where a statement has neither an effect nor an error of its own.
UNCHANGED = (
    'the database changes nothing, and gives no reason: a trigger, a rule or row-level security on '
    f'{MESSAGES.name} is in the way'
)

_LITERALS = {state: literal_column(f"'{state}'", Text()) for state in STATES}


class Claimed(Protocol):
    """The part of a claim that is used here."""

    # Whether a death is counted for it in its row.
    has_begun: bool

    @property
    def id(self) -> str:
        """The id of the message."""

    @property
    def token(self) -> str:
        """What is in the row for as long as the claim holds."""

    @property
    def attempts(self) -> int:
        """How many attempts were made before this one."""


def state_is(*states: str) -> ColumnElement[bool]:
    """The states are in the text of the statement: only then the database sees which index is meant."""
    literals = [_LITERALS[state] for state in states]
    meant = MESSAGES.c.state == literals[0] if len(literals) == 1 else MESSAGES.c.state.in_(literals)
    # SQLite does not see that one of them is among those that the index has.
    return and_(meant, state_is(*ASIDE)) if {*states} < {*ASIDE} else meant


#: All but the messages that a move is working on just now (see :mod:`~.sql.moving`).
IS_SEEN = or_(MESSAGES.c.state != 'in doubt', has_run_out())

#: The rows with an unknown state, written by another program.  No index has them.
IS_UNKNOWN = not_(state_is(*STATES))


def owned(dialect: str) -> ColumnElement[bool]:
    """
    The rows of the claims that :func:`named` names, if they are still theirs.

    No two claims have the same token; the ids are there for their index.
    """
    return and_(
        state_is('in progress'), _is_in(MESSAGES.c.id, 'ids', dialect), _is_in(MESSAGES.c.claim, 'tokens', dialect)
    )


def _is_in(column: SQLColumnExpression[Any], name: str, dialect: str) -> ColumnElement[bool]:
    if dialect == 'postgresql':
        # One parameter, however many there are.
        return column == any_(bindparam(name, type_=ARRAY(Text)))
    return column.in_(bindparam(name, expanding=True))


def named(claims: Collection[Claimed]) -> dict[str, list[str]]:
    """Return the parameters of a statement about what is :func:`owned` by *claims*."""
    return {'ids': [claim.id for claim in claims], 'tokens': [claim.token for claim in claims]}


def delete_done(connection: Connection, claims: Collection[Claimed]) -> set[str]:
    """Delete done messages; return the tokens of the claims that still held."""
    return {*connection.scalars(_deletion(connection.dialect.name), named(claims))}


@lru_cache
def _deletion(dialect: str) -> Executable:
    return delete(MESSAGES).where(owned(dialect)).returning(MESSAGES.c.claim)


def release(connection: Connection, claims: Collection[Claimed]) -> set[str]:
    """Release messages exactly as they were; return the tokens of the claims that still held."""
    ids: set[str] = set()
    for has_begun in (True, False):
        if some := [claim for claim in claims if claim.has_begun is has_begun]:
            rows = connection.execute(_release(connection.dialect.name, has_begun), named(some))
            ids.update(row.id for row in rows if row.state == 'waiting')
    return {claim.token for claim in claims if claim.id in ids}


@lru_cache
def _release(dialect: str, has_begun: bool) -> Executable:
    values: dict[str, Any] = {'state': 'waiting', **UNCLAIMED, **(_ALIVE if has_begun else {})}
    return update(MESSAGES).where(owned(dialect)).values(**values).returning(MESSAGES.c.id, MESSAGES.c.state)


# The process that has begun with it did not crash.
_ALIVE: Mapping[str, Any] = {'deaths': case((MESSAGES.c.deaths > 0, MESSAGES.c.deaths - 1), else_=0)}


def begin(connection: Connection, claim: Claimed) -> bool:
    """Count a death, until the claim ends in another way; return whether *claim* still held."""
    return connection.execute(_beginning(connection.dialect.name), named([claim])).rowcount == 1


@lru_cache
def _beginning(dialect: str) -> Executable:
    statement = update(MESSAGES).where(owned(dialect)).values(deaths=MESSAGES.c.deaths + 1)
    if dialect != 'postgresql':
        return statement
    # Not worth waiting for the disk of the server: a crash of this process does not undo it.
    return statement.where(func.set_config('synchronous_commit', 'off', true()).is_not(None))


def update_recipients(connection: Connection, claim: Claimed, recipients: Collection[str]) -> bool:
    """Write the open recipients, and reset the deaths before this claim; return whether *claim* still held."""
    return _update_owned(connection, claim, {'recipients': [*recipients], 'deaths': 1 if claim.has_begun else 0})


def settle(connection: Connection, claim: Claimed, settlement: Settlement, now: float) -> set[str]:
    """
    Write the end of a claim that leaves something of the message; return its token if it still held.

    Called in a transaction.  The recipients that are still open keep the row of the message, or else the first burial
    does.  The other burials get rows of their own.
    """
    attempt: dict[str, Any] = {'attempts': claim.attempts + settlement.counted, **UNCLAIMED}
    if claim.has_begun:
        attempt.update(_ALIVE)
    if settlement.counted or settlement.last_reply:
        attempt['last_attempt'] = now
    burials = [*settlement.burials]
    left = _waiting(settlement, now) if settlement.waiting else _buried(burials.pop(0))
    if not _update_owned(connection, claim, {**attempt, **left}):
        return set()
    for burial in burials:
        _copy(connection, claim.id, {**_buried(burial), **UNCLAIMED})
    return {claim.token}


# How many rows a message with a large content has.
_WITH_CONTENT = 2


@dataclass
class _Probe:
    id: str
    token: str
    attempts: int = 0
    has_begun: bool = True


def try_everything(connection: Connection) -> None:
    """
    Write, change and delete a message as a run does, in a transaction that has to be rolled back.

    Raises SQLAlchemyError, or QueueError where a statement has no effect and no error.
    """
    probe = _Probe(f'probe.{secrets.token_hex(10)}', secrets.token_hex(10))
    row = {'id': probe.id, 'state': 'in progress', 'claim': probe.token, 'due': 0, 'queued_at': 0, 'recipients': []}
    connection.execute(insert(MESSAGES).values(**row, sender='', message_id='', subject=''))
    connection.execute(insert(CONTENTS).values(id=probe.id, content=b''))
    is_whole = _copy(connection, probe.id, {'state': 'dead', **UNCLAIMED}) == _WITH_CONTENT
    if not (is_whole and update_recipients(connection, probe, []) and delete_done(connection, [probe])):
        raise QueueError(UNCHANGED)


def in_ascii(settlement: Settlement) -> Settlement:
    """Return the same end of a claim, with the servers' replies in ASCII."""
    burials = tuple(replace(burial, reason=_ascii(burial.reason)) for burial in settlement.burials)
    return replace(settlement, last_reply=_ascii(settlement.last_reply), burials=burials)


def _ascii(text: str) -> str:
    return text.encode('ascii', 'backslashreplace').decode()


def _waiting(settlement: Settlement, now: float) -> dict[str, Any]:
    values: dict[str, Any] = {'state': 'waiting', 'recipients': [*settlement.waiting]}
    if settlement.last_reply:
        values['last_reply'] = _text(settlement.last_reply)
    if settlement.due is not None:
        values['due'] = settlement.due
    elif settlement.stumbled:
        # After all that is due now.
        values['due'] = now
    if settlement.counted:
        # Its process has survived.
        values['deaths'] = 0
    return values


def _buried(burial: Burial) -> dict[str, Any]:
    return {'state': 'dead', 'deaths': 0, 'recipients': [*burial.recipients], 'last_reply': _text(burial.reason)}


def _text(text: str) -> str:
    # PostgreSQL has no NUL in its texts.
    return text.replace('\0', ' ')


def _copy(connection: Connection, id: str, values: Mapping[str, Any]) -> int:
    """
    Add a copy of the message *id* with other *values*; return how many rows it has.

    Its content never leaves the database.  Raises SQLAlchemyError, or QueueError where nothing is done.
    """
    new = {'id': f'{id}.{secrets.token_hex(4)}', **values}
    rows = 0
    for table in (MESSAGES, CONTENTS):
        selected = [literal(new[c.name], c.type) if c.name in new else c for c in table.c]
        copy = insert(table).from_select([*table.c.keys()], select(*selected).where(table.c.id == id))
        rows += len(connection.scalars(copy.returning(table.c.id)).all())
        if not rows:
            raise QueueError(UNCHANGED)
    return rows


def _update_owned(connection: Connection, claim: Claimed, values: Mapping[str, Any]) -> bool:
    """Return whether *claim* still held.  Raises QueueError if its row is unchanged all the same (a trigger)."""
    statement = update(MESSAGES).where(owned(connection.dialect.name)).values(**values)
    seen = [name for name in ('state', 'claim', 'recipients') if name in values]
    row = connection.execute(statement.returning(*(MESSAGES.c[name] for name in seen)), named([claim])).first()
    if row is not None and [*row] != [values[name] for name in seen]:
        raise QueueError(UNCHANGED)
    return row is not None
