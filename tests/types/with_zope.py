"""A user's file that says of its classes what they implement, also for mypy's plugin for zope.interface."""

from __future__ import annotations

from zope.interface import implementer

from pyramid_mailqueue import ITransport, SendResult
from pyramid_mailqueue.transports.base import Transport


@implementer(ITransport)
class Pigeons(Transport):
    name = 'pigeons'

    def send(self, sender: str, recipients: tuple[str, ...], content: bytes, /) -> SendResult | bool:
        return True

    def close(self) -> None:
        pass


pigeons: ITransport = Pigeons()
