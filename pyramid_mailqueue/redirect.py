"""
The mail of a site that must not write to anybody: whoever it is for, it goes to one address.

``mailqueue.redirect_all_to`` changes the envelope, so nothing else decides who gets the message; its header stays as it
is, but for one field that tells whom it would have gone to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from email.header import Header

from pyramid_mailqueue.envelope import Envelope

__all__ = ['original_recipients', 'redirected']

#: Some servers cut off a field that is very long.
MOST_IN_A_FIELD = 100

_PLAIN = re.compile(r'(?!.*=\?)[ -~]+')


def redirected(envelope: Envelope, to: str) -> Envelope:
    """Return *envelope* for the one recipient *to*: itself, if it is for nobody else."""
    if envelope.recipients == (to,):
        return envelope
    return Envelope(envelope.sender, (to,), original_recipients(envelope.recipients) + envelope.content)


def original_recipients(recipients: Sequence[str]) -> bytes:
    """
    Return fields ``X-Original-Recipients`` that name *recipients*, with their line ends.

    They are ASCII, so that a message needs SMTPUTF8 (RFC 6531) no more than before.
    """
    chunks = (recipients[i : i + MOST_IN_A_FIELD] for i in range(0, len(recipients), MOST_IN_A_FIELD))
    return b''.join(_field(chunk) for chunk in chunks)


def _field(recipients: Sequence[str]) -> bytes:
    # The comma goes into the encoded word: there it need not be set apart from it by a blank (RFC 2047 section 5).
    words = [*(f'{recipient},' for recipient in recipients[:-1]), recipients[-1]]
    folded = '\r\n '.join(map(_encoded, words))
    return f'X-Original-Recipients: {folded}\r\n'.encode('ascii')


def _encoded(word: str) -> str:
    return word if _PLAIN.fullmatch(word) else Header(word, 'utf-8').encode(linesep='\r\n')
