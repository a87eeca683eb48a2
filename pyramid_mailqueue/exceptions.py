"""
Every error that this package raises on purpose.

The tree, with the standard exception that a branch also is::

    MailqueueError
      x ConfigurationError          (ValueError)    a setting is missing, unknown or contradicts another one
      x MessageError                (ValueError)    this message cannot be sent as it is
        + AddressError                              an address that must not reach an SMTP server
        + NoRecipients
        + MessageTooLarge
        + TooManyRecipients
      x NoActiveTransaction         (RuntimeError)  ``send()`` where nothing will ever commit
      x QueueError                                  the queue said no; nothing was changed
        + QueueFileError            (ValueError)    a queue file that cannot be read
        + NoSuchMessage             (LookupError)   no message has this id, or more than one
        + WrongState                                not while the message is as it is
      x ServerTrouble                               the relay cannot be used now; no message is to blame

``ConfigurationError`` and ``MessageError`` are mistakes of the caller and are raised as early as they can be seen: at
start-up, and in the view.  ``QueueError`` is raised by the first phase of a commit, so that the transaction rolls
back; where a database has rolled it back in favour of others it is also a ``transaction.interfaces.TransientError``
(:mod:`~.queues.sql.session`).  ``ServerTrouble`` never reaches a view: it passes between a transport and the delivery
loop.
"""

from __future__ import annotations

from typing import TypeVar

__all__ = [
    'AddressError',
    'ConfigurationError',
    'MailqueueError',
    'MessageError',
    'MessageTooLarge',
    'NoActiveTransaction',
    'NoRecipients',
    'NoSuchMessage',
    'QueueError',
    'QueueFileError',
    'ServerTrouble',
    'TooManyRecipients',
    'WrongState',
    'described',
    'translated',
]


class MailqueueError(Exception):
    """
    The base of all errors of this package.

    :ivar orig: the exception of a database driver that led to this, as in ``DBAPIError.orig`` of SQLAlchemy; else None.
        Unlike ``__cause__`` it survives a ``raise ... from None``, as that of pyramid_tm.
    """

    orig: BaseException | None = None

    @property
    def sqlstate(self) -> str | None:
        """The code (SQLSTATE) with which a database refused; None if it gave none."""
        # psycopg2 has another name for it.
        return getattr(self.orig, 'sqlstate', None) or getattr(self.orig, 'pgcode', None)


class ConfigurationError(MailqueueError, ValueError):
    """A setting cannot be used.  The text names the full key, the value and what is allowed."""


class MessageError(MailqueueError, ValueError):
    """A message cannot be sent as it is; raised where it is handed in, before anything was written."""


class AddressError(MessageError):
    """An address has no domain, or holds bytes that must not reach an SMTP server (RFC 5321 section 4.1.2)."""


class NoRecipients(MessageError):
    """Neither the arguments nor the header name a recipient."""


class MessageTooLarge(MessageError):
    """The message is larger than ``mailqueue.max_message_size``."""


class TooManyRecipients(MessageError):
    """One message in a queue cannot have so many recipients; several messages can."""


class NoActiveTransaction(MailqueueError, RuntimeError):
    """
    ``send()`` was called where no transaction will ever commit.

    Mail is never lost silently: outside of a transaction call ``send_immediately()`` or ``enqueue()``.
    """


class QueueError(MailqueueError):
    """The queue cannot take or release a message; what was there before is still there."""


class QueueFileError(QueueError, ValueError):
    """A file in the queue directory is not a queue file."""


class NoSuchMessage(QueueError, LookupError):
    """No message in the queue has this id, or several ids begin with it.  The text says which of the two."""


class WrongState(QueueError):
    """The requested action is not possible for a message in this state, or while it is being delivered."""


class ServerTrouble(MailqueueError):
    """
    The relay cannot be used now: no connection, no TLS, no authentication, or it closed the session (421).

    No message is to blame.  The delivery leaves its messages exactly as they were, counts no attempt, and does not try
    the next message at once.

    :param text: what happened, for a person: which server, what it said, what to check
    :param code: the reply code where the server gave one, e.g. ``421``
    :param in_message: it came during a message: the server had been willing to take mail, and may take the next one
    :param at_mail: the server had not accepted the sender of that message
    """

    def __init__(self, text: str, *, code: int | None = None, in_message: bool = False, at_mail: bool = False) -> None:
        super().__init__(text)
        self.code = code
        self.in_message = in_message
        self.at_mail = at_mail


E = TypeVar('E', bound=MailqueueError)


def translated(new: E, error: BaseException) -> E:
    """Return *new*, to be raised because of *error*, with the ``orig`` of that."""
    new.orig = getattr(error, 'orig', None)
    return new


def described(error: BaseException) -> str:
    """Return the text to show for an *error* of foreign code: some errors have no text, but a docstring."""
    text = str(error) or ' '.join((type(error).__doc__ or 'no reason is given').split())
    return f'{type(error).__name__}: {text}'
