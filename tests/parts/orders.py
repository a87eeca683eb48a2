"""The data of an application, whose transactions send mail."""

from __future__ import annotations

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = 'orders'

    name: Mapped[str] = mapped_column(primary_key=True)
