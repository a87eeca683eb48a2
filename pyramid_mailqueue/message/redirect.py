"""
Redirects all mail to one address, for a site that must not send mail to real recipients.

``mailqueue.redirect_all_to`` changes the envelope, which alone decides where a message goes; its header stays as it is,
but for a field that names the original recipients.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyramid_mailqueue.message.encoded_words import encoded_words, looks_encoded
from pyramid_mailqueue.message.envelope import Envelope

__all__ = ['original_recipients', 'redirected']

#: How many characters an encoded word may have after the name of the field (RFC 2047 section 2).
FIRST_WORD = 50

#: Some servers cut off a field that is very long.
MOST_IN_A_FIELD = 100


def redirected(envelope: Envelope, to: str) -> Envelope:
    """Return *envelope* for the one recipient *to*: itself, if it has no other recipient."""
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
    folded = '\r\n '.join(part for word in words for part in _encoded(word))
    return f'X-Original-Recipients: {folded}\r\n'.encode('ascii')


def _encoded(word: str) -> list[str]:
    return [word] if word.isascii() and not looks_encoded(word) else [*encoded_words(word, FIRST_WORD)]
