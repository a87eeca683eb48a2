"""
The contracts between the parts of this package, as prose.

A custom transport, queue or retry policy needs no more than this: what calls each method, when, from which thread, and
what may fail.  Classes declare ``@implementer``; the tests check them with ``verifyObject``.  Each contract is also an
annotation: a protocol for type checkers, which any object with its members fits (see :mod:`~.contract`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from pyramid_mailqueue.contract import Contract, Protocol

if TYPE_CHECKING:
    from pyramid_mailqueue.exceptions import QueueError
    from pyramid_mailqueue.message.envelope import Envelope
    from pyramid_mailqueue.queues.entries import QueueEntry, QueueStats
    from pyramid_mailqueue.results import Burial, Dropped, Offer, Recovery, SendResult, Settlement
    from pyramid_mailqueue.transactions import ITransactionSource

__all__ = [
    'IBindableMailer',
    'IClaim',
    'IConnection',
    'IDispatcher',
    'IMailQueue',
    'IMailer',
    'IQueueAdmin',
    'IRetryPolicy',
    'ISender',
    'ISessionQueue',
    'ISessionStaging',
    'IStaging',
    'ITransport',
]


class IMailer(Contract, Protocol):
    """
    Sends the mail of an application: ``request.mailer``, or the utility of this interface.

    An application may register a utility of its own.  It becomes ``request.mailer`` as it is, unless it also provides
    :class:`IBindableMailer`.  The dashboard and ``mq-run --app`` need the ``queue`` and the ``handler`` of a
    :class:`~.mailer.Mailer`.

    A *message* is an :class:`email.message.EmailMessage` (or the older ``Message``), bytes, a binary file, or a
    ``Message`` of pyramid_mailer.  The caller's object is never changed.  The envelope is taken from *sender* and
    *recipients*, else from the header.  All three methods raise :class:`~.exceptions.MessageError` for a message that
    can never be sent, before anything was written.
    """

    def send(
        self,
        message: Any,
        sender: str | None = None,
        recipients: Sequence[str] | str | None = None,
        delivery: str | None = None,
        session: Any = None,
    ) -> str:
        """
        Send *message* if, and only if, the current transaction commits.  Return its Message-ID.

        *delivery* (``'background'``, ``'inline'`` or ``'queue'``) overrides ``mailqueue.delivery`` for this message.
        *session* is the session of the application's database in which a queue in that database stores the message, by
        default that of the request; other queues ignore it.  With a session that takes no part in the current
        transaction the message is sent if, and only if, that session commits, by a later run.

        Raises :class:`~.exceptions.NoActiveTransaction` where nothing will ever commit, and
        :class:`~.exceptions.QueueError` if the session cannot take the message.
        """

    def send_immediately(
        self, message: Any, sender: str | None = None, recipients: Sequence[str] | str | None = None
    ) -> SendResult:
        """
        Try *message* now, outside of any transaction, and queue it if that fails.

        Returns a :class:`~.results.SendResult`.  The message is durable in the queue before the attempt, so
        that a crash cannot lose it.  Raises :class:`~.exceptions.QueueError` if the queue cannot take it.
        """

    def enqueue(self, message: Any, sender: str | None = None, recipients: Sequence[str] | str | None = None) -> str:
        """
        Make *message* durable in the queue now, outside of any transaction, for a later run.  Return its Message-ID.

        Raises :class:`~.exceptions.QueueError` if the queue cannot take it.
        """


class IBindableMailer(IMailer, Contract, Protocol):
    """A mailer that joins the transaction of a request only when bound to it."""

    def bound_to(self, transactions: ITransactionSource) -> IMailer:
        """Return the same mailer, but for the transactions of one request.  Called by ``get_mailer``."""


class IMailQueue(Contract, Protocol):
    """
    Where messages are durable until they are delivered.  Every method may be called from any thread.

    :class:`~.queues.base.MailQueue` has defaults for the optional members.
    """

    def staging(self) -> IStaging:
        """Return a new, empty :class:`IStaging`.  Called once for each transaction; touches nothing yet."""

    def put(self, envelope: Envelope) -> str:
        """
        Make *envelope* durable, waiting, and return its name in the queue.

        Raises :class:`~.exceptions.QueueError`, and has then left nothing behind.
        """

    def put_claimed(self, envelope: Envelope) -> IClaim:
        """The same, but in progress: the message cannot be claimed again until the returned claim ends."""

    def claim_due(self, now: float) -> Iterator[IClaim]:
        """
        Yield a claim for each message whose due time has come, oldest due first.

        A generator; a message is claimed when it is asked for, not before.  Messages claimed elsewhere are skipped,
        damaged ones are put aside and logged.  *now* is in seconds since the epoch.  Raises
        :class:`~.exceptions.QueueError` if the queue itself cannot be read, or if no message can be claimed any more;
        earlier claims are not affected.
        """

    def count_due(self, now: float) -> int:
        """Return how many messages :meth:`claim_due` would yield now.  Used for progress display."""

    def claim(self, id: str) -> IClaim | None:
        """
        Return the claim of one message; None if it is not waiting, not due, or claimed elsewhere.

        Raises :class:`~.exceptions.QueueError` if the queue cannot be used now, and
        :class:`~.exceptions.ConfigurationError` if something has to be fixed by hand first.  The message then waits as
        it was, or (if a database has not answered) until :meth:`recover`.
        """

    def recover(self, now: float) -> Recovery:
        """
        Recover what dead processes left behind; return a :class:`~.results.Recovery`.

        Called at the start of each run of ``mq-run``, never by a web process.  Raises
        :class:`~.exceptions.QueueError` if the queue itself cannot be read.
        """

    def flush(self) -> QueueError | None:
        """
        Make settled claims durable; return the error if the end of one cannot be written (it is logged), else None.

        Called when a run pauses or ends; in between the queue does it in batches.
        """

    def counts(self) -> Mapping[str, int]:
        """
        Return a dict of state to number of messages; the states are those of ``mq-queue``.

        Cheap for any number of messages: in a large queue a damaged one that was never tried may be counted as waiting.
        """

    def count_waiting(self, most: int) -> int:
        """Return how many messages wait, due or not; or *most* + 1, if there are more and counting is slow."""

    def count_misdated(self) -> int:
        """Return how many messages have a due time that no retry can have given: some clock was wrong."""

    def listening(self, on_news: Callable[[], None]) -> AbstractContextManager[object]:
        """
        Return a context manager for waiting for mail.

        Inside it *on_news* is called, from any thread, when unclaimed mail has arrived; a call too many does no harm.
        """

    def hurry(self, seconds: float) -> None:
        """
        From now on wait no longer than *seconds* in total: called when a run, or a process, is about to end.

        What cannot be written by then is left as it is, for :meth:`recover`.  Ends with :meth:`close`, or a call with
        ``math.inf``.
        """

    def close(self) -> None:
        """Close connections.  The queue may be used again."""

    @property
    def admin(self) -> IQueueAdmin:
        """
        What a person may see and do.

        Raises :class:`~.exceptions.ConfigurationError` if the queue offers nothing of it.
        """


class ISessionQueue(IMailQueue, Contract, Protocol):
    """A queue in the application's own database, whose messages commit with the application's data."""

    def staging(self) -> ISessionStaging:
        """Return a new, empty :class:`ISessionStaging`; as in :class:`IMailQueue`."""

    @property
    def session_name(self) -> str:
        """The attribute of a request that is the application's database session."""

    def takes_part(self, session: Any, manager: Any) -> bool:
        """
        Whether *session* commits with the current transaction of *manager*; begins its part in it, if so.

        Raises :class:`~.exceptions.QueueError` if *session* is no session, or writes where this queue does not read.
        """

    def put_in(self, session: Any, envelope: Envelope) -> str:
        """
        Put *envelope* into the transaction of a session that is committed elsewhere; return its name in the queue.

        The message waits for a later run.  Raises :class:`~.exceptions.QueueError`.
        """


class IQueueAdmin(Contract, Protocol):
    """
    What a person may see and do in a queue: the command ``mq-queue``, or a web page.

    Every method may be called from any thread, during deliveries.  A message that is being delivered is never touched.
    *id* is the id of a message, or a unique prefix of it; an :class:`~.queues.entries.ExactId` is always the whole id.
    :data:`~.queues.entries.POSSIBLE` lists the actions and the states for them; a message in doubt from an interrupted
    move can only be moved.

    A method that changes a message returns it as it is then, and the change is durable.  It raises
    :class:`~.exceptions.NoSuchMessage` if there is no message of this id, or more than one,
    :class:`~.exceptions.WrongState` if the message is not in a state in which this can be done, and
    :class:`~.exceptions.QueueError` if the queue cannot be read or written; the message is then as it was before.
    """

    def entries(self, states: Collection[str]) -> Iterator[QueueEntry]:
        """
        Yield a :class:`~.queues.entries.QueueEntry` for each message in one of *states*, oldest first.

        They are read one by one, in little memory.  What arrives or leaves meanwhile may be included or not.  The order
        is that of ``queued_at``: a message that was retried or released sorts like a new one.
        """

    def oldest(self, states: Collection[str]) -> QueueEntry | None:
        """Return the message in one of *states* that has been in the queue for the longest time; None without any."""

    def crashing(self, deaths: int, most: int) -> Sequence[str]:
        """
        Return the ids of undelivered messages with at least so many *deaths*, *most* of them.

        What is counted: see :attr:`IClaim.deaths`.
        """

    def stats(self, domains_of: Collection[str]) -> QueueStats:
        """Return how many messages there are, by state, and by the recipients' domains of those in *domains_of*."""

    def find(self, id: str) -> QueueEntry:
        """Return one message.  Raises :class:`~.exceptions.NoSuchMessage`."""

    def content(self, id: str, start: int = 0, most: int | None = None) -> bytes:
        """
        Return the content of one message, byte for byte; of a corrupt one, what is in its file.

        From *start* on, at most *most* octets, so that a message of any size can be shown.
        """

    def hold(self, id: str) -> QueueEntry:
        """Keep a waiting message from being delivered, until :meth:`unhold`."""

    def unhold(self, id: str) -> QueueEntry:
        """Let a message that is held wait again, as it did before: with its due time, its attempts and its age."""

    def retry(self, id: str) -> QueueEntry:
        """
        Let the next run try a message.

        A waiting one is due now.  A dead letter waits again, as if it had come into the queue now: with no attempts,
        and with its whole lifetime before it.
        """

    def release(self, id: str) -> QueueEntry:
        """Let a message in doubt wait, due now, as if it had come into the queue now."""

    def delete(self, id: str) -> QueueEntry:
        """Remove for good a message that is not being delivered; return it as it was."""

    def flush(self) -> int:
        """Make every waiting message due now; return how many were not."""

    def expire(self, before: float, most: int) -> Sequence[str]:
        """
        Remove for good dead letters that died before *before*; return their ids.

        Called by ``mq-run`` if ``mailqueue.keep_dead`` is set.  Each is logged before it is removed; one that is
        damaged or in use is left.

        :param before: in seconds since the epoch
        :param most: remove no more than that
        """


class IStaging(Contract, Protocol):
    """
    The mail of one transaction on its way into one queue.

    Called by one data manager, in the thread of the transaction.  The order is ``add`` (any number of times),
    ``prepare``, ``publish``; ``discard`` may come at any time, more than once, and after ``publish``.
    """

    def add(self, envelope: Envelope, claimed: bool) -> None:
        """
        Add *envelope*.  If *claimed*, publish it with a claim for delivery by this process, else for a later run.

        Raises :class:`~.exceptions.QueueError`.
        """

    def mark(self) -> object:
        """Return a mark of the present contents, for :meth:`rollback`."""

    def rollback(self, mark: object) -> Sequence[Envelope]:
        """Drop what was added since *mark*; return the dropped envelopes."""

    def prepare(self, alone: bool = False) -> None:
        """
        Write every message durably but invisibly: the "yes" of the first phase.

        If *alone*, nothing else takes part in the transaction, so nothing relies on this "yes" before ``publish``.

        Raises :class:`~.exceptions.QueueError` if one of them cannot be written: the "no" of the first phase, after
        which nothing of this transaction may be left behind, whether or not ``discard`` is still called.
        """

    def publish(self) -> Sequence[IClaim | Dropped | None]:
        """
        Make the prepared messages real; return the claim of each, in their order, None for those added not *claimed*.

        For a message that an `ISessionQueue` has lost with a savepoint of the session there is
        :data:`~.results.DROPPED`.

        This should never fail, and never raises: what goes wrong is logged as CRITICAL, and the message stays
        prepared, in doubt.
        """

    def discard(self) -> Sequence[Envelope]:
        """Drop what is not published, if there is anything; return the dropped envelopes.  Never raises."""

    def leave_in_doubt(self) -> None:
        """
        Release what is prepared and not published: a person has to decide about it.  Never raises.

        Called instead of ``discard`` when the second phase has begun and could not be ended.
        """


class ISessionStaging(IStaging, Contract, Protocol):
    """The staging of an :class:`ISessionQueue`."""

    def join(self, session: Any) -> None:
        """Use *session*, which takes part in the transaction, for what is added from now on."""


class IClaim(Contract, Protocol):
    """
    One message, claimed for delivery: until the claim ends it cannot be claimed again.

    A claim ends by ``settle``, ``release`` or ``abandon``; a second end does nothing.  When the process dies, or drops
    them, its claims end too, and their messages are left to the next run.

    :class:`~.queues.base.Claim` has defaults for the optional members.
    """

    @property
    def id(self) -> str:
        """The name of the message in its queue: text without blanks, the same for all of its attempts."""

    @property
    def queue(self) -> IMailQueue | None:
        """The queue, if the claim may be handed to a handler that was not made for it; None for all others."""

    @property
    def is_over(self) -> bool:
        """Whether the claim is known to have ended: then nothing more is reported about it."""

    @property
    def deaths(self) -> int:
        """
        How many workers have died while they held the message, perhaps because of it.

        Since its last completed attempt, or the last :meth:`keep`.
        """

    def is_valid(self) -> bool:
        """
        Whether the message is still this claim's, and will be for long enough to send it.

        Asked when an attempt begins, and once more before the content goes out.  Never raises; a message that is not
        valid is left alone.
        """

    @property
    def attempts(self) -> int:
        """How many attempts were made before this one."""

    @property
    def queued_at(self) -> float:
        """When the message came into the queue, in seconds since the epoch."""

    @property
    def recipients(self) -> tuple[str, ...]:
        """The recipients of the envelope; does not read the content.  Raises as ``envelope`` does."""

    @property
    def envelope(self) -> Envelope:
        """The Envelope, read on first access.  Reading raises QueueFileError if it is damaged."""

    def begin(self) -> bool:
        """
        Begin work on the message: from here on the death of this process counts in :attr:`deaths`.

        Called before its content is read.  Until then a claim of ``publish`` at most keeps others away; every other
        claim is begun when it is made, and then this does nothing.  False if the message is no longer this claim's, or
        has to wait; errors are logged.  Never raises.
        """

    def settle(self, settlement: Settlement) -> QueueError | None:
        """
        End the claim as *settlement* says: done, wait until a due time, bury, or some of each.

        If the new state cannot be written the message stays as it was; that is logged, not raised, and the reason is
        returned.  No more messages are begun then: their outcome could not be written either.
        """

    def abandon(self) -> None:
        """
        End the claim as the death of this process would, because the message itself is the problem.

        Called where there is not enough memory for the message, or where it makes the program fail.  It waits for a
        while, and a run counts one more death: after too many the message is given up.  Never raises.
        """

    def keep(self, recipients: tuple[str, ...]) -> None:
        """
        Record that only *recipients* are open, and keep the claim: the others have the message.

        Called between two transactions of one message, so that no recipient gets it twice if the process dies.  As the
        message makes progress, deaths are counted anew from here on.  If it cannot be written the message stays as it
        was; that is logged, not raised.
        """

    def release(self) -> None:
        """Release the message exactly as it was: no attempt is counted and nothing is rewritten.  Never raises."""


class ISender(Contract, Protocol):
    """The minimum of a transport: accepted wherever an :class:`ITransport` is."""

    def send(self, sender: str, recipients: tuple[str, ...], content: bytes, /) -> SendResult | bool:
        """
        Try to send one message and return the outcome.

        :param sender: the reverse-path without angle brackets; ``''`` is the null sender
        :param recipients: a tuple of addresses, at least one
        :param content: RFC 5322 bytes with CRLF line ends, not dot-stuffed
        :returns: a :class:`~.results.SendResult`, or True (sent to all recipients) or False (try again later)
        :raises ServerTrouble: the server cannot be used now; this message was neither sent nor refused

        Any other exception is a defect of the transport: it is logged, and the message is tried again later.
        """


class ITransport(ISender, Contract, Protocol):
    """
    Where messages go: a server, a queue or a folder.

    ``send`` is called from several threads at once.  :class:`~.transports.base.Transport` has defaults for everything
    else, and any :class:`ISender` will do: what it lacks is added where it comes in.
    """

    @property
    def name(self) -> str:
        """A short name for logs; the name of the class where there is none."""

    def connect(self, instead_of: IConnection | None = None) -> IConnection | None:
        """
        Return a connection that messages can be sent over; None if there are none, and ``send`` is to be called.

        May take its time: it is called from a thread of its own, before there is a message for the connection, so that
        a slow server keeps no message waiting.

        :param instead_of: the connection that the new one replaces, which :attr:`~IConnection.is_spent`
        :raises ServerTrouble: the server cannot be used now
        """

    def close(self) -> None:
        """Close connections that are not in use.  The transport may be used again afterwards."""

    def abort(self) -> None:
        """Break off what other threads are doing: connecting, and sending over connections."""

    def reload(self) -> None:
        """Read again what may have changed outside, such as the authorities of TLS: called at SIGHUP."""

    def leads_to(self, queue: object) -> bool:
        """Whether this is the way into *queue*: messages of that queue are not offered to it."""

    def bury(self, sender: str, content: bytes, burials: Sequence[Burial]) -> bool:
        """
        Keep dead letters of a message that is in no queue, one for each :class:`~.results.Burial`.

        Return whether that was done: a queue does it.
        """


class IConnection(Contract, Protocol):
    """
    A connection over which messages are sent, one after the other.  Used by one thread, and no method waits.

    :class:`~.transports.base.Connection` is a base class.  Everything is about the offers in hand: those that were
    submitted and have no result yet.
    """

    @property
    def is_spent(self) -> bool:
        """
        Whether this connection takes no more, and another one may.

        Nothing has happened to the offers in hand then, and ``advance`` yields nothing more: they are submitted to a
        new one.
        """

    @property
    def needs_new(self) -> bool:
        """Whether the oldest offer in hand can only be submitted to the new connection: a used one would refuse it."""

    def fileno(self) -> int:
        """Return the descriptor to wait for."""

    @property
    def has_room(self) -> bool:
        """Whether one more offer can be submitted: to be announced while the one before is under way."""

    def submit(self, offer: Offer) -> None:
        """Take *offer* in hand.  Recipients that get no reply, where others get one, are offered again later."""

    def advance(self, events: int = 0) -> Iterator[SendResult | bool]:
        """
        Send and read what is possible at once; yield the result of each offer in hand that has one, in their order.

        The result of an offer is yielded before the content of the next can be with the server.  Trouble is no
        exception but the ``trouble`` of a result, which then is the last one: what was submitted behind it is
        untouched.  The deadline is checked here.  May be left before it has ended.

        :param events: what the descriptor was ready for; 0 for nothing, as after ``submit``
        """

    def wait(self) -> tuple[int, float]:
        """
        Return what the descriptor has to be ready for, as of :func:`select.poll`, and how many seconds to wait at most.

        Called when something is in hand.
        """

    def release(self) -> None:
        """Keep the connection for the next message if that is possible, or else close it.  Called once."""


class IRetryPolicy(Contract, Protocol):
    """Should it try again?  And when?  A pure decision: no clock and no files."""

    def decide(
        self, recipients: Sequence[str], attempts: int, queued_at: float, result: SendResult, now: float
    ) -> Settlement:
        """
        Return the :class:`~.results.Settlement` of one attempt.

        :param recipients: those that were still open before the attempt
        :param attempts: how many attempts were made before this one
        :param queued_at: when the message came into the queue, in seconds since the epoch
        :param result: the :class:`~.results.SendResult` of the attempt
        :param now: seconds since the epoch
        """


class IDispatcher(Contract, Protocol):
    """Delivers the claims of a transaction that has just committed."""

    def dispatch(self, claims: Sequence[IClaim]) -> None:
        """
        Take over *claims*.  Called after the commit, in the thread of the request; must neither raise nor wait.

        (``inline`` does wait: that is what it is for.)
        """

    def close(self) -> None:
        """Stop, and release what is not delivered yet.  Called when the process ends."""
