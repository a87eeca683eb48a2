"""
What a refusal is about: the message, or us.

A 5xx reply ends a message, and that is right where it is about the message: its sender, a recipient, its content.  A
server that does not like our name, our login or our session says 5xx too, and to every message.  That is the server's
trouble: the mail waits until it is fixed.

The code and the enhanced code decide where they can (RFC 5321 section 4.2.2, RFC 3463, RFC 4954 section 6, RFC 5248,
RFC 7372, RFC 7504); Postfix and others say some of it in words only.
"""

from __future__ import annotations

import re

from pyramid_mailqueue.results import Reply

__all__ = ['is_about_login', 'is_about_us']

# Not 523 to 525, which RFC 5248 has too: OpenSMTPD says 524 to an unknown recipient.
_LOGIN_CODES = frozenset({530, 534, 535, 538})

_LOGIN_ENHANCED = frozenset({'5.7.8', '5.7.9', '5.7.10', '5.7.11', '5.7.13', '5.7.14', '5.7.57'})

_LOGIN_WORDS = re.compile(
    r'\b(?:auth(?:entication)?|login|starttls|tls|encryption) (?:is )?(?:required|needed)'
    r'|\bissue a starttls|\b(?:please|you must) (?:first )?(?:authenticate|log ?in)\b'
    r'|\bnot (?:yet )?(?:authenticated|logged in)\b',
    re.IGNORECASE,
)

# These authenticate the sender in another way.
_POLICIES = re.compile(r'\b(?:spf|dkim|dmarc)\b', re.IGNORECASE)

# "Command not implemented", "bad sequence of commands".
_SESSION_CODES = frozenset({502, 503})

# The system takes no mail; the account has sent too much; another version of the protocol; no name for our address; no
# connector of ours.
_SESSION_ENHANCED = frozenset({'5.3.2', '5.4.5', '5.5.5', '5.7.25', '5.7.64'})

_SESSION_WORDS = re.compile(
    r'\b(?:helo|ehlo)\b|\bclient host\b|\bfully[- ]qualified (?:host ?name|domain name)\b'
    r'|\byour (?:ip|host|server)\b|\breverse (?:dns|lookup|host ?name)\b|\bptr record\b'
    r'|\btoo many (?:messages|mails|e-?mails|transactions)\b'
    r'|\b(?:per|in this|in one|for this) (?:smtp )?(?:session|connection)\b'
    r'|\b(?:sending|session|connection|message|mail|transaction) (?:limit|quota)\b'
    r'|\bmax(?:imum)? (?:messages|mails|transactions)\b'
    r'|\bnumber of (?:allowed )?(?:outgoing )?(?:messages|mails)\b',
    re.IGNORECASE,
)

# RFC 3463: addressing, mailbox, content.
_MESSAGE_SUBJECTS = ('5.1.', '5.2.', '5.6.')

_MESSAGE_WORDS = re.compile(r'\bmailbox\b|\b(?:sender|recipient) address rejected\b', re.IGNORECASE)


def is_about_us(reply: Reply) -> bool:
    """Whether a refusal of the server (5xx) is about our name, our login or our session, and not about the message."""
    if not (reply.refused and reply.from_server):
        return False
    if is_about_login(reply):
        return True
    if (reply.enhanced or '').startswith(_MESSAGE_SUBJECTS) or _MESSAGE_WORDS.search(reply.text):
        return False
    return (
        reply.code in _SESSION_CODES
        # "Parameter not implemented": Postfix says so of a name that is not fully qualified.
        or reply.code == 504
        or (reply.code, reply.enhanced) in ((500, '5.5.1'), (521, None))
        or reply.enhanced in _SESSION_ENHANCED
        or _SESSION_WORDS.search(reply.text) is not None
    )


def is_about_login(reply: Reply) -> bool:
    """Whether the server (5xx) requires TLS, a login, or another login."""
    if not (reply.refused and reply.from_server):
        return False
    if reply.code in _LOGIN_CODES or reply.enhanced in _LOGIN_ENHANCED:
        return True
    if (reply.enhanced or '').startswith(_MESSAGE_SUBJECTS) or _POLICIES.search(reply.text):
        return False
    return _LOGIN_WORDS.search(reply.text) is not None
