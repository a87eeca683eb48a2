"""
How a claim of a :class:`~.sql.SQLQueue` ends: what is written, and that nothing is written by who has lost it.

Each statement names the token of its claim.  If that is not in the row any more the lease has run out, and somebody
else has the message: nothing is changed then.

What is executed for each message, or for each few, is put together once and has always the same text: that is what
SQLAlchemy, the driver and the database are quickest with.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
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
    delete,
    insert,
    literal,
    literal_column,
    not_,
    or_,
    select,
    update,
)

from pyramid_mailqueue.delivery.results import Burial, Settlement
from pyramid_mailqueue.queues.entries import STATES
from pyramid_mailqueue.queues.sql_tables import ASIDE, CONTENTS, MESSAGES, has_run_out

__all__ = [
    'IS_SEEN',
    'IS_UNKNOWN',
    'UNCLAIMED',
    'Claimed',
    'delete_done',
    'in_ascii',
    'named',
    'owned',
    'release',
    'settle',
    'state_is',
    'update_recipients',
]

#: What a message has when nobody holds it.
UNCLAIMED: Mapping[str, None] = {'claim': None, 'claimed_by': None, 'lease': None}

_LITERALS = {state: literal_column(f"'{state}'", Text()) for state in STATES}


class Claimed(Protocol):
    """What has to be known of a claim."""

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
    """The states stand in the text of the statement: only so the database sees which index is meant."""
    literals = [_LITERALS[state] for state in states]
    meant = MESSAGES.c.state == literals[0] if len(literals) == 1 else MESSAGES.c.state.in_(literals)
    # SQLite does not see that one of them is among those that the index has.
    return and_(meant, state_is(*ASIDE)) if {*states} < {*ASIDE} else meant


#: Not the messages that a move has in hand just now (see :mod:`~.moving_sql`).
IS_SEEN = or_(MESSAGES.c.state != 'in doubt', has_run_out())

#: The rows whose state is none: somebody has written it there.  No index has them.
IS_UNKNOWN = not_(state_is(*STATES))


def owned(dialect: str) -> ColumnElement[bool]:
    """
    The rows of the claims that :func:`named` names, if they are still theirs.

    No two claims have the same token; ids are there for their index.
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
    """Delete messages that everybody has; return the tokens of those that were still theirs."""
    return {*connection.scalars(_deletion(connection.dialect.name), named(claims))}


@lru_cache
def _deletion(dialect: str) -> Executable:
    return delete(MESSAGES).where(owned(dialect)).returning(MESSAGES.c.claim)


def release(connection: Connection, claims: Collection[Claimed]) -> set[str]:
    """Give messages back exactly as they were; return the tokens of those that were still theirs."""
    ids = {*connection.scalars(_release(connection.dialect.name), named(claims))}
    return {claim.token for claim in claims if claim.id in ids}


@lru_cache
def _release(dialect: str) -> Executable:
    return update(MESSAGES).where(owned(dialect)).values(state='waiting', **UNCLAIMED).returning(MESSAGES.c.id)


def update_recipients(connection: Connection, claim: Claimed, recipients: Collection[str]) -> bool:
    """Note who is open, and that it is not what kills its deliverers; whether the message was still *claim*'s."""
    return _update_owned(connection, claim, {'recipients': [*recipients], 'deaths': 0})


def settle(connection: Connection, claim: Claimed, settlement: Settlement, now: float) -> set[str]:
    """
    Write the end of a claim after which there is something left; return its token if the message was still its.

    Called in a transaction.  What is left of the message keeps its row: those who are still open, or else the first of
    those who are given up.  The others who are given up get rows of their own.
    """
    attempt: dict[str, Any] = {'attempts': claim.attempts + settlement.counted, **UNCLAIMED}
    if settlement.counted or settlement.last_reply:
        attempt['last_attempt'] = now
    burials = [*settlement.burials]
    left = _waiting(settlement, now) if settlement.waiting else _buried(burials.pop(0))
    if not _update_owned(connection, claim, {**attempt, **left}):
        return set()
    for burial in burials:
        for copy in _copies(claim.id, {**_buried(burial), **UNCLAIMED}):
            connection.execute(copy)
    return {claim.token}


def in_ascii(settlement: Settlement) -> Settlement:
    """Return the same end of a claim, with what servers have said in ASCII."""
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
        # Behind all that is due now.
        values['due'] = now
    if settlement.counted:
        # Its deliverer has lived.
        values['deaths'] = 0
    return values


def _buried(burial: Burial) -> dict[str, Any]:
    return {'state': 'dead', 'deaths': 0, 'recipients': [*burial.recipients], 'last_reply': _text(burial.reason)}


def _text(text: str) -> str:
    # PostgreSQL has no NUL in its texts.
    return text.replace('\0', ' ')


def _copies(id: str, values: Mapping[str, Any]) -> Iterator[Executable]:
    """A new message, as that of *id* is now but for *values*; its content never leaves the database."""
    new = {'id': f'{id}.{secrets.token_hex(4)}', **values}
    for table in (MESSAGES, CONTENTS):
        selected = [literal(new[c.name], c.type) if c.name in new else c for c in table.c]
        yield insert(table).from_select([*table.c.keys()], select(*selected).where(table.c.id == id))


def _update_owned(connection: Connection, claim: Claimed, values: Mapping[str, Any]) -> bool:
    """Whether the message was still *claim*'s."""
    statement = update(MESSAGES).where(owned(connection.dialect.name)).values(**values)
    return connection.execute(statement, named([claim])).rowcount == 1
