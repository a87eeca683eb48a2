"""A transport as the handler sees it: answers in one form, no exceptions, and a rest after its server's trouble."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from pyramid_mailqueue.delivery.pause import Pause
from pyramid_mailqueue.delivery.waiting import ABOUT_TO_BLOCK, Wait
from pyramid_mailqueue.exceptions import ServerTrouble, described
from pyramid_mailqueue.interfaces import ISender
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.message.envelope import Envelope
from pyramid_mailqueue.results import Burial, Offer, Reply, SendResult

__all__ = ['MAX_STUMBLES', 'Route', 'Stumbles']

log = Log('mailqueue.delivery')

#: So often in a row a server may break off in the midst of a message before its transport rests.  One message that it
#: cannot stand must not keep all others from it.
MAX_STUMBLES = 2

#: What is understood where a transport that is not in trouble leaves somebody out.  Silence is no success.
_SILENCE = Reply(451, 'the transport said nothing of this recipient', '4.3.0', from_server=False)

#: How many times in a row the server of each route has broken off in the midst of a message of one thread, or of one
#: share of a run: a server that restarts breaks off the sessions of all of them at once.
Stumbles = dict['Route', int]


class Route:
    """May be used by any number of threads at once."""

    def __init__(self, transport: ISender, pause: Pause) -> None:
        self.transport = transport
        self.name: str = getattr(transport, 'name', None) or type(transport).__name__
        self.pause = pause

    @property
    def can_open(self) -> bool:
        """Whether the transport can get ready before there is a message for it."""
        return hasattr(self.transport, 'open_stream')

    def stream(self, first: Offer | None, more: Callable[[], Offer | None]) -> Generator[SendResult | Wait]:
        """
        Offer *first*, and what *more* gives for as long as it gives something; yield the outcomes in their order.

        Yields a wait where one has to wait.

        Without *first*, a session is opened before *more* is asked.  If it cannot be, that is the only thing that is
        yielded: a result with ``trouble``, for no offer.

        The outcome of an offer is yielded before the content of the next one can be with the server.  After one with
        ``trouble`` the stream ends, and what was offered after it is as it was.  Raises no Exception.

        :param more: must not wait, and must not raise
        """
        under_way = deque() if first is None else deque([first])
        is_open = first is not None
        may_go_on = hasattr(self.transport, 'stream')
        try:
            with closing(self._answers(first, _noting(more, under_way))) as answers:
                for answer in answers:
                    if isinstance(answer, Wait):
                        yield answer
                        continue
                    is_open = True
                    result = self._read(answer, under_way.popleft().recipients, may_go_on=may_go_on)
                    yield result
                    if result.trouble is not None:
                        return
            if under_way and under_way[0] is first:
                # Else it would be offered again, for ever.
                yield self._deferred(first.recipients, 'the transport said nothing of this message')
        except ServerTrouble as trouble:
            if under_way or not is_open:
                yield SendResult(transport=self.name, trouble=trouble)
        except Exception as error:
            # A defect of the transport.  The message may be what it stumbles over, so this counts as an attempt.
            log.exception('The transport %s failed', self.name)
            if under_way:
                text = f'the transport failed: {described(error)}'
                yield self._deferred(under_way.popleft().recipients, text)

    def _answers(
        self, first: Offer | None, more: Callable[[], Offer | None]
    ) -> Generator[SendResult | bool | Any | Wait]:
        # It connects, if it has to.
        yield ABOUT_TO_BLOCK
        says_when_it_waits = False
        if first is None:
            # Asked for by whoever knows that it is there: see can_open.
            stream = self.transport.open_stream(more)  # type: ignore[attr-defined]
        else:
            stream = (getattr(self.transport, 'stream', None) or self._one_by_one)(first, more)
        with closing(stream) as answers:
            for answer in answers:
                yield answer
                if isinstance(answer, Wait):
                    says_when_it_waits = True
                elif not says_when_it_waits:
                    # Who knows how it goes on?
                    yield ABOUT_TO_BLOCK

    def _one_by_one(self, offer: Offer | None, more: Callable[[], Offer | None]) -> Generator[SendResult | bool | Any]:
        while offer is not None:
            yield self.transport.send(offer.sender, offer.recipients, offer.content)
            offer = more()

    def _read(self, answer: SendResult | bool | Any, recipients: tuple[str, ...], *, may_go_on: bool) -> SendResult:
        """
        A transport may also answer with a plain bool, or with any object that is true if the message was sent.

        :param may_go_on: who is left out is to be offered again
        """
        if isinstance(answer, SendResult):
            if answer.transport and answer.replies.keys() == set(recipients):
                return answer
            replies = {r: answer.replies[r] for r in recipients if r in answer.replies}
            # Who has said nothing of anybody here would not be heard of next time either.
            if answer.trouble is None and not (may_go_on and replies):
                replies = {r: replies.get(r, _SILENCE) for r in recipients}
            return replace(answer, replies=replies, transport=answer.transport or self.name)
        if not answer:
            return self._deferred(recipients, 'the transport did not take the message')
        queued = bool(getattr(answer, 'queued', False))
        reply = Reply(250, 'queued' if queued else 'sent', from_server=False)
        return SendResult(dict.fromkeys(recipients, reply), self.name, queued)

    def _deferred(self, recipients: tuple[str, ...], text: str) -> SendResult:
        return SendResult(dict.fromkeys(recipients, Reply(451, text, '4.3.0', from_server=False)), self.name)

    # --- trouble ---

    def worked(self, stumbles: Stumbles) -> None:
        """Note that the server took or refused a message as servers do."""
        stumbles.pop(self, None)
        self.pause.end()

    def forgives(self, trouble: ServerTrouble, stumbles: Stumbles) -> bool:
        """Whether the next message may be tried at once: the server broke off in the midst of one, and that is rare."""
        count = stumbles.pop(self, 0)
        if not trouble.in_message or count >= MAX_STUMBLES:
            return False
        stumbles[self] = count + 1
        return True

    def still_resting(self, trouble: ServerTrouble) -> SendResult:
        """The answer of a transport that is not asked."""
        if trouble.in_message:
            # In the midst of another one.
            trouble = ServerTrouble(str(trouble), code=trouble.code)
        return SendResult(transport=self.name, trouble=trouble)

    # --- queues as transports ---

    def leads_to(self, queue: object) -> bool:
        """Whether what is sent here ends up in *queue*."""
        leads_to = getattr(self.transport, 'leads_to', None)
        return leads_to is not None and bool(leads_to(queue))

    def bury(self, envelope: Envelope, burials: Sequence[Burial]) -> bool:
        """Keep dead letters of a message here, if that can be done."""
        bury = getattr(self.transport, 'bury', None)
        if bury is None:
            return False
        try:
            bury(envelope.sender, envelope.content, burials)
        except Exception:
            log.exception('The transport %s cannot keep a dead letter', self.name)
            return False
        return True

    # --- the end ---

    def close(self) -> None:
        """See `ITransport`."""
        self._call('close')

    def abort(self) -> None:
        """See `ITransport`."""
        self._call('abort')

    def reload(self) -> None:
        """See `ITransport`."""
        self._call('reload')

    def make_room(self) -> None:
        """See `ITransport`."""
        self._call('make_room')

    def abort_opening(self) -> None:
        """See `ITransport`."""
        self._call('abort_opening')

    def _call(self, name: str) -> None:
        method = getattr(self.transport, name, None)
        if method is not None:
            method()


def _noting(more: Callable[[], Offer | None], offers: deque[Offer]) -> Callable[[], Offer | None]:
    """Return *more*, which adds what it gives to *offers*."""

    def more_and_note() -> Offer | None:
        offer = more()
        if offer is not None:
            offers.append(offer)
        return offer

    return more_and_note
