"""A new message on its way into the table, and the statements that insert it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Insert, insert

from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.queues.entries import subject_of
from pyramid_mailqueue.queues.sql.claim import ClaimedRow, SQLClaim, new_token, separated, this_process
from pyramid_mailqueue.queues.sql.leases import Leases
from pyramid_mailqueue.queues.sql.schema import LargeContent, Message
from pyramid_mailqueue.queues.sql.tables import database_time

__all__ = ['NewMessage', 'insert_large']


@dataclass(frozen=True)
class NewMessage:
    """
    A message to be put into the table.

    :param statement: inserts it, given *values*
    :param values: its row
    :param large: the row of its content, if that has one of its own; for :func:`insert_large`
    :param claim: the claim that will hold when the row is there; None if it is to wait
    """

    id: str
    envelope: Envelope
    statement: Insert
    values: dict[str, Any]
    claim: SQLClaim | None
    large: dict[str, Any] | None

    @classmethod
    def made_of(cls, envelope: Envelope, leases: Leases, *, claimed: bool, has_begun: bool = False) -> NewMessage:
        """Return a message that is due now; *claimed* by this process, and begun (*has_begun*), or not."""
        now, deadline = leases.clock(), leases.timer() + leases.lease
        name = f'{int(now * 1_000_000):013x}{secrets.token_hex(5)}'
        values = {
            'id': name,
            'state': 'waiting',
            'due': now,
            'queued_at': now,
            'sender': envelope.sender,
            'recipients': [*envelope.recipients],
            'message_id': envelope.message_id,
            'subject': subject_of(envelope.content).replace('\0', '\ufffd'),
            'content': envelope.content,
        }
        large = separated(values)
        if not claimed:
            return cls(name, envelope, _inserting(None), values, None, large)
        token = new_token() + name
        row = ClaimedRow(name, token, now, 0, now, envelope.sender, None)
        claim = SQLClaim(leases, row, deadline, envelope=envelope, has_begun=has_begun)
        values |= {'state': 'in progress', 'claim': token, 'claimed_by': this_process(), 'deaths': int(has_begun)}
        return cls(name, envelope, _inserting(leases.lease), values, claim, large)


@lru_cache
def insert_large() -> Insert:
    """Return a statement that inserts large contents, after their messages."""
    return insert(LargeContent).execution_options(autoflush=False, dml_strategy='raw')


@lru_cache(maxsize=4)
def _inserting(lease: float | None) -> Insert:
    """
    Return a statement that inserts a row, with the end of a lease of this many seconds.

    It names the mapped class: listeners of a session ignore a statement that names the table.  Reusing one statement is
    a third faster than a new one with values in it, and so is ``raw``, which says that values go by names of columns.
    """
    statement = insert(Message).execution_options(autoflush=False, dml_strategy='raw')
    return statement if lease is None else statement.values(lease=database_time() + lease)
