"""The table of sign-ups."""

from __future__ import annotations

from datetime import datetime, timezone

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from demo.models.meta import Base


def utcnow():
    """Return the present time in UTC, without a zone, as SQLite keeps it."""
    return datetime.now(timezone.utc).replace(tzinfo=None)


class SignUp(Base):
    """One person on the list; an address can be there once."""

    __tablename__ = 'signup'

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(80))
    email: Mapped[str] = mapped_column(String(254), unique=True)
    created: Mapped[datetime] = mapped_column(default=utcnow)
