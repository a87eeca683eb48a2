"""What the samples of the docs have from around them, by its name."""

from __future__ import annotations

from email.message import EmailMessage
from pathlib import Path

from pyramid.config import Configurator
from pyramid.request import Request as PyramidRequest
from pyramid.router import Router
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from webtest import TestApp

from pyramid_mailqueue import IMailer, Mailer, MessageHandler, mailer_from_settings
from pyramid_mailqueue.testing import captured_mail

__all__ = [
    'AsyncSession',
    'Base',
    'IMailer',
    'Mailer',
    'MessageHandler',
    'Request',
    'Session',
    'TestApp',
    'User',
    'app',
    'async_engine',
    'captured_mail',
    'config',
    'engine',
    'first',
    'mailer',
    'mailer_from_settings',
    'main',
    'message',
    'msg',
    'order',
    'request',
    'second',
    'sessionmaker',
    'settings',
    'tmp_path',
    'welcome',
]


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = 'user'

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]


class Request(PyramidRequest):
    mailer: IMailer
    dbsession: Session


def welcome(user: User) -> EmailMessage:
    return EmailMessage()


def order(request: PyramidRequest) -> dict[str, str]:
    return {}


def main(global_config: dict[str, str], **settings: object) -> Router:
    return Router()


config = Configurator()
engine: Engine = create_engine('sqlite://')
settings: dict[str, str] = {}
mailer: Mailer = mailer_from_settings(settings)
msg: bytes = b''
message = first = second = EmailMessage()
request = Request()
app = TestApp(main({}))
tmp_path = Path('/tmp')
async_engine: AsyncEngine = create_async_engine('sqlite+aiosqlite://')
