"""
The ids of messages in addresses and forms.

An id is the name of a file in most queues, and somebody else may have made it: it can hold whatever a file's name can,
even bytes that are no text.  Such a one is encoded; all others stay as people know them.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode

from pyramid_mailqueue.exceptions import NoSuchMessage
from pyramid_mailqueue.interfaces import IQueueAdmin
from pyramid_mailqueue.queues.entries import ExactId, QueueEntry

__all__ = ['find', 'id_of', 'token_of']

_PLAIN = re.compile(r'[A-Za-z0-9][A-Za-z0-9._,=+@-]*')


def token_of(id: str) -> str:
    """Return what stands for *id* in an address, or in a form."""
    if _PLAIN.fullmatch(id):
        return id
    return '~' + urlsafe_b64encode(id.encode('utf-8', 'surrogatepass')).decode('ascii').rstrip('=')


def id_of(token: str) -> ExactId:
    """
    Return the id for which *token* stands.  Raises NoSuchMessage.

    Exactly that: a page was made some time ago, and if its message is gone now its dead letter may be the only one
    whose id begins so, which is not the one somebody has pressed a button for.
    """
    if not token.startswith('~'):
        return ExactId(token)
    encoded = token[1:]
    try:
        return ExactId(urlsafe_b64decode(encoded + '=' * (-len(encoded) % 4)).decode('utf-8', 'surrogatepass'))
    except ValueError as error:
        raise NoSuchMessage(f'{token!a} is not the id of a message.') from error


def find(admin: IQueueAdmin, id: ExactId) -> QueueEntry:
    """Return the message of this very id.  Raises NoSuchMessage, in words for who has pressed a button."""
    try:
        return admin.find(id)
    except NoSuchMessage as error:
        raise NoSuchMessage(
            f'There is no message {str(id)!a} in the queue: it was delivered or deleted, or has a new id.'
        ) from error
