"""What type checkers have to refuse: each line with a comment is an error, and a comment without one is, too."""

from pyramid_mailqueue import Envelope, IMailer, ITransport, MessageHandler, MQAction, SendResult, get_mailer
from pyramid_mailqueue.interfaces import IClaim


class WithoutSend:
    name = 'x'


class OfOthers:
    def send(self, message: bytes) -> bool:
        return True


class Silent:
    def send(self, sender: str, recipients: tuple[str, ...], content: bytes) -> None: ...


def send(mailer: IMailer) -> None:
    mailer.send()  # type: ignore[call-arg]
    mailer.send(b'', delivery=3)  # type: ignore[arg-type]
    mailer.sent(b'')  # type: ignore[attr-defined]
    number: int = mailer.enqueue(b'')  # type: ignore[assignment]
    result: bool = mailer.send_immediately(b'')  # type: ignore[assignment]
    print(number, result)


def wrong(claim: IClaim) -> SendResult:
    claim.attempts = 3  # type: ignore[misc]
    MessageHandler([WithoutSend()])  # type: ignore[list-item]
    MessageHandler([OfOthers()])  # type: ignore[list-item]
    MessageHandler([Silent()])  # type: ignore[list-item]
    transport: ITransport = OfOthers()  # type: ignore[assignment]
    Envelope('', 'ada@x.example', b'')  # type: ignore[arg-type]
    mailer: ITransport = get_mailer(transport)  # type: ignore[assignment]
    print(mailer)
    print(MQAction.DISCARDED)  # type: ignore[attr-defined]
    return MQAction.DISCARD  # type: ignore[return-value]
