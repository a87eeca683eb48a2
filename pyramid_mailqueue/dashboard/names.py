"""
The ids of messages in addresses and forms.

An id is the name of a file in most queues, and another program may have chosen it: it can hold whatever a file name
can, even bytes that are not text.  Such an id is encoded; all others stay readable.
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
    """Return what represents *id* in an address, or in a form."""
    if _PLAIN.fullmatch(id):
        return id
    return '~' + urlsafe_b64encode(id.encode('utf-8', 'surrogatepass')).decode('ascii').rstrip('=')


def id_of(token: str) -> ExactId:
    """
    Return the id that *token* represents.  Raises NoSuchMessage.

    It is matched exactly: a page may be old, and if its message is gone, its dead letter may be the only one whose id
    begins so, and the button was not pressed for that one.
    """
    if not token.startswith('~'):
        return ExactId(token)
    encoded = token[1:]
    try:
        return ExactId(urlsafe_b64decode(encoded + '=' * (-len(encoded) % 4)).decode('utf-8', 'surrogatepass'))
    except ValueError as error:
        raise NoSuchMessage(f'{token!a} is not the id of a message.') from error


def find(admin: IQueueAdmin, id: ExactId) -> QueueEntry:
    """Return the message with exactly this id.  Raises NoSuchMessage, with a text for the page."""
    try:
        return admin.find(id)
    except NoSuchMessage as error:
        raise NoSuchMessage(
            f'There is no message {str(id)!a} in the queue: it was delivered or deleted, or has a new id.'
        ) from error
