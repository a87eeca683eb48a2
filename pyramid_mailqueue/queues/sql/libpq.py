"""What psycopg can do, and no other driver: cancel a statement, and trace a connection.  Imported beside psycopg."""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Mapping
from typing import Any

from psycopg import Connection, capabilities
from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn, PollingStatus

__all__ = ['Libpq']

#: How long a server may take to refuse a connection for the second time, in seconds.
PATIENCE = 10

# What libpq writes of such a message; old servers and poolers leave out the severity that is not translated (V).
_REFUSAL = re.compile(rb'\tErrorResponse\t S "[^"\n]*"(?: V "[^"\n]*")? C "([0-9A-Z]{5})"')

_EVENTS = {PollingStatus.READING: select.POLLIN, PollingStatus.WRITING: select.POLLOUT}


class Libpq:
    """See the module.  Whatever psycopg raises comes out."""

    def cancel(self, raw: Any, seconds: float) -> None:
        """
        Ask the server to end the statement of a connection; it has so many seconds to answer.

        Before version 17 nothing is done: all other threads would be blocked until the server has answered.
        """
        if isinstance(raw, Connection) and capabilities.has_cancel_safe():
            raw.cancel_safe(timeout=seconds)

    def code_of_refusal(self, parameters: Mapping[str, str]) -> str | None:
        """Return the SQLSTATE with which the server refuses a connection with *parameters*, if it says one."""
        connection = PGconn.connect_start(make_conninfo(**parameters).encode())
        # A file that no other process sees: there may be a password in it.
        with os.fdopen(os.memfd_create('mailqueue'), 'rb') as trace:
            try:
                connection.trace(trace.fileno())
                _finish(connection)
                connection.untrace()
            finally:
                connection.finish()
            codes = _REFUSAL.findall(os.pread(trace.fileno(), 65536, 0))
        return codes[-1].decode() if codes else None


def _finish(connection: Any) -> None:
    """Wait until a connection is made, or has failed."""
    end = time.monotonic() + PATIENCE
    while (event := _EVENTS.get(connection.connect_poll())) and (rest := end - time.monotonic()) > 0:
        poll = select.poll()
        poll.register(connection.socket, event)
        poll.poll(rest * 1000)
