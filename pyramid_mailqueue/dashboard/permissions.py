"""The three permissions that the security policy of an application grants or denies."""

from __future__ import annotations

__all__ = ['CHANGE', 'CONTENT', 'VIEW']

#: To see counts, lists, envelopes and replies.
VIEW = 'mailqueue.view'

#: To see the header and the body of a message, its subject too: there may be a link in it that sets a password.
CONTENT = 'mailqueue.content'

#: To retry, hold, unhold, release, delete and flush messages.
CHANGE = 'mailqueue.change'
