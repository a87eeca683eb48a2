"""
The tables of the queue for an application: :data:`metadata` for Alembic, and mapped classes.

The class tells a session of SQLAlchemy which of its databases has the mail, and that it has changed.
"""

from __future__ import annotations

from sqlalchemy.orm import DeclarativeBase, deferred

from pyramid_mailqueue.queues.sql import tables
from pyramid_mailqueue.queues.sql.tables import CONTENTS, MESSAGES, VERSIONS, metadata

__all__ = ['LargeContent', 'Message', 'SchemaVersion', 'metadata']


class _Base(DeclarativeBase):
    metadata = tables.metadata


class Message(_Base):
    """One message; see :data:`~.sql.tables.MESSAGES`."""

    __table__ = MESSAGES

    content = deferred(MESSAGES.c.content)


class LargeContent(_Base):
    """The content of one message; see :data:`~.sql.tables.CONTENTS`."""

    __table__ = CONTENTS

    content = deferred(CONTENTS.c.content)


class SchemaVersion(_Base):
    """The version of these tables, in one row."""

    __table__ = VERSIONS
