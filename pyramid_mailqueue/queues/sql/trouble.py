"""
Errors of a database that cannot be used: which pass by themselves, and which a person has to repair.

If there is a code (SQLSTATE) it decides, because the text is in the language of the server.  For a refused connection
the drivers return the text only: known texts decide, and for others the server is asked once more for the code
(:func:`code_of_refusal`).
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError, StatementError

if TYPE_CHECKING:
    from pyramid_mailqueue.queues.sql.libpq import Libpq

__all__ = [
    'code_of_refusal',
    'first_line',
    'is_code_of_mistake',
    'is_forbidden',
    'is_of_memory',
    'is_of_statement',
    'is_read_only',
    'is_rolled_back_for_others',
    'is_said_of_mistakes',
    'is_strange_to_driver',
    'said',
]

# Anything else may work in a moment: a server that starts, a lock, a full disk.
_OF_STATEMENTS = (DataError, IntegrityError, ProgrammingError)

# Classes of SQLSTATE: errors of rules, triggers and views.
_OF_RULES = ('09', '0A', '27', '44', 'P0')

# SQLSTATE insufficient_privilege.
_NOT_ALLOWED = '42501'

# The class of SQLSTATE for serialization failures and deadlocks.
_ROLLED_BACK = '40'

# SQLSTATE read_only_sql_transaction.
_READ_ONLY = '25006'

# SQLSTATE out_of_memory, and program_limit_exceeded.
_TOO_LARGE = ('53200', '54000')

# Texts of libpq, which has no codes of its own, and of servers about texts of more than 1 GB.
_SAID_OF_MEMORY = ('out of memory', 'cannot allocate memory for', 'invalid memory alloc request size')

# Classes of SQLSTATE, and a code: a name, a right, an option or a password is wrong, or a database is closed.
_OF_MISTAKES = ('0A', '22', '28', '3D', '3F', '42', '55000')

# Texts about a connection that cannot be made until a person repairs something: of SQLite and the libraries of the
# drivers, which are in English, and of servers in English.
_SAID_OF_MISTAKES = (
    'authentication failed',
    "can't get cancellation key",
    'could not parse',
    'definition of service',
    'does not exist',
    'does not support ssl',
    'file is not a database',
    'invalid ',
    'no password supplied',
    'no such access mode',
    'no such cache mode',
    'no such vfs',
    'not permitted to log in',
    'permission denied',
    'pg_hba.conf',
    'requires a value',
    'unable to open database file',
    'unrecognized configuration parameter',
)


def said(error: Exception) -> str:
    """Return what the database or its driver said, without the statement."""
    return str(error.orig if isinstance(error, StatementError) and error.orig else error).strip()


def first_line(error: Exception) -> str:
    """Return the first line of it, for a sentence."""
    words = said(error)
    return words.splitlines()[0].rstrip('.') if words else type(error).__name__


def is_of_statement(error: SQLAlchemyError) -> bool:
    """Whether the statement, or what is in it, was refused."""
    return isinstance(error, _OF_STATEMENTS) or (_code_of(error) or '').startswith(_OF_RULES)


def is_forbidden(error: SQLAlchemyError) -> bool:
    """Whether the user may not do this."""
    return _code_of(error) == _NOT_ALLOWED


def is_rolled_back_for_others(error: SQLAlchemyError) -> bool:
    """Whether the database has given up this transaction in favour of others: it works when it is repeated."""
    return (_code_of(error) or '').startswith(_ROLLED_BACK)


def is_read_only(error: SQLAlchemyError) -> bool:
    """Whether the server takes no changes: a standby, or a former primary."""
    return _code_of(error) == _READ_ONLY


def is_of_memory(error: SQLAlchemyError) -> bool:
    """Whether a row was too large for the memory of the driver, or of the server."""
    words = said(error)
    return _code_of(error) in _TOO_LARGE or any(known in words for known in _SAID_OF_MEMORY)


def is_strange_to_driver(error: Exception) -> bool:
    """Whether a driver rejected its arguments, with an error that is not one of databases."""
    if isinstance(error, StatementError):
        return not isinstance(error, DBAPIError)
    return isinstance(error, (AttributeError, LookupError, TypeError, ValueError))


def is_said_of_mistakes(error: SQLAlchemyError) -> bool:
    """Whether the text is known to mean an error that does not pass."""
    words = said(error).lower()
    return any(known in words for known in _SAID_OF_MISTAKES)


def is_code_of_mistake(code: str | None) -> bool:
    """Whether *code* is the SQLSTATE of an error that does not pass."""
    return code is not None and code.startswith(_OF_MISTAKES)


def _code_of(error: SQLAlchemyError) -> str | None:
    """The SQLSTATE of an error; psycopg2 has another name for it."""
    orig = getattr(error, 'orig', None)
    return getattr(orig, 'sqlstate', None) or getattr(orig, 'pgcode', None)


def code_of_refusal(error: SQLAlchemyError, libpq: Libpq | None) -> str | None:
    """
    Return the SQLSTATE with which a server refuses connections; None if it is unknown.

    libpq knows it, but returns nothing but text.  It does write each message of the server to the trace of a
    connection: so one more is made, in the same way, with a trace.  psycopg2 cannot do that, and libpq before version
    18 cannot trace a login with a password.

    :param libpq: None without psycopg
    """
    failed = getattr(getattr(error, 'orig', None), 'pgconn', None)
    if libpq is None or failed is None or 'timeout expired' in said(error):
        # A server that has not answered gives no code, and would be waited for once more.
        return _code_of(error)
    # Errors here do not matter: it was only an attempt to find the code.
    with suppress(Exception):
        return libpq.code_of_refusal({it.keyword.decode(): it.val.decode() for it in failed.info if it.val})
    return None
