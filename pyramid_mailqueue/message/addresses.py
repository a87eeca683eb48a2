"""
Mail addresses: what may stand in an SMTP envelope, and how addresses are read out of a header.

An address that passes :func:`check_address` cannot break out of ``MAIL FROM:<…>``, ``RCPT TO:<…>`` or a line of the
queue file: it holds no control, and no blank, comma or angle bracket outside of a quoted local part.  Beyond that the
check is as liberal as mail is in real life; only its server knows whether a mailbox exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from pyramid_mailqueue.exceptions import AddressError, NoRecipients
from pyramid_mailqueue.hosts import is_ip_address, to_a_labels

__all__ = [
    'AddressGroup',
    'at_least_one',
    'check_address',
    'needs_smtputf8',
    'parse_address_list',
    'parse_header_addresses',
    'parse_mailbox',
    'split_addresses',
]

# RFC 5321 section 4.5.3.1.3: a path has at most 256 octets, two of them are the angle brackets.
MAX_ADDRESS_OCTETS = 254

_LABEL = r'[A-Za-z0-9_-]{1,63}'
_DOMAIN = re.compile(rf'{_LABEL}(?:\.{_LABEL})*')
_ORDINARY_ADDRESS = re.compile(rf"[A-Za-z0-9!#$%&'*+/=?^_`{{|}}~.-]+@{_DOMAIN.pattern}")

_CONTROL_OR_SURROGATE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]')
_QUOTED_LOCAL_PART = re.compile(r'"(?:[^"\\]|\\[ -~])+"(?=@)')
_NEEDS_QUOTES = re.compile(r'[ ()<>\[\]:;,\\"]')
# What may be one is enough: readers differ in how liberal they are.
_ENCODED_WORD = re.compile(r'\A"?=\?|=\?.*\?=')
_LITERAL = re.compile(r'\[(?:([0-9.]+)|IPv6:([0-9A-F.]*:[0-9A-F:.]*))\]', re.IGNORECASE)


def check_address(address: str) -> str:
    """
    Return *address* as it may stand in an SMTP envelope; a domain in other scripts becomes A-labels (RFC 5891).

    An address is one mailbox, ``local-part@domain`` (RFC 5321 section 4.1.2), without a display name or angle
    brackets.  Raises :class:`~.exceptions.AddressError` for anything else.
    """
    if not isinstance(address, str):
        raise AddressError(f'An address must be a str, not {type(address).__name__}: {_shown(repr(address))}.')
    return _check(address)


# Cached: the addresses of a message are checked at each place where they may enter.
@lru_cache(maxsize=1024)
def _check(address: str) -> str:
    if len(address) <= MAX_ADDRESS_OCTETS and _ORDINARY_ADDRESS.fullmatch(address) and '=?' not in address:
        return address
    return _check_unusual(address)


def needs_smtputf8(address: str) -> bool:
    """Whether the local part is not ASCII, so that every server on the way needs SMTPUTF8 (RFC 6531)."""
    return not address.rpartition('@')[0].isascii()


def _check_unusual(address: str) -> str:
    if len(address) > MAX_ADDRESS_OCTETS:
        raise _too_long(address)
    if _CONTROL_OR_SURROGATE.search(address):
        raise AddressError(
            f'The address {_shown(address)} holds a control character or a byte that is not text. '
            'If it came out of a form or a database, check it there.'
        )
    if address != address.strip():
        raise AddressError(f'The address {_shown(address)} begins or ends with a blank; remove it.')
    local_part, domain = _split(address)
    normalised = f'{local_part}@{_check_domain(domain, address)}'
    if len(normalised.encode()) > MAX_ADDRESS_OCTETS:
        raise _too_long(address)
    return normalised


def _split(address: str) -> tuple[str, str]:
    """Return the local part, checked, and the domain, not yet checked."""
    quoted = _QUOTED_LOCAL_PART.match(address)
    local_part, at, domain = (quoted.group(), '@', address[quoted.end() + 1 :]) if quoted else address.partition('@')
    if not at:
        raise AddressError(f'The address {_shown(address)} has no domain; write it as local-part@domain.')
    if not local_part:
        raise AddressError(f'The address {_shown(address)} has nothing before the "@".')
    if not quoted and _NEEDS_QUOTES.search(local_part):
        raise AddressError(
            f'The address {_shown(address)} holds a character that is only allowed between double quotes. '
            'Pass one address for each recipient, and nothing but the address.'
        )
    if _ENCODED_WORD.search(local_part):
        # RFC 2047 section 5: in an address there is none.  The email package decodes it all the same, so that one
        # address in a header field becomes several.
        raise AddressError(f'The address {_shown(address)} holds an encoded word (RFC 2047), or begins like one.')
    if not local_part.isprintable():
        raise AddressError(f'The address {_shown(address)} holds an invisible character before the "@"; remove it.')
    return local_part, domain


def _check_domain(domain: str, address: str) -> str:
    if domain.startswith('['):
        return _check_literal(domain, address)
    if not domain.isascii():
        domain = _to_a_labels(domain, address)
    if not _DOMAIN.fullmatch(domain):
        raise AddressError(f'The address {_shown(address)} does not end in the name of a domain such as "example.org".')
    return domain


def _check_literal(domain: str, address: str) -> str:
    literal = _LITERAL.fullmatch(domain)
    if not (literal and is_ip_address(literal[1] or literal[2])):
        raise AddressError(
            f'The address {_shown(address)} does not end in an IP address; these are written '
            '[192.0.2.1] or [IPv6:2001:db8::1].'
        )
    return domain


def _to_a_labels(domain: str, address: str) -> str:
    try:
        return to_a_labels(domain)
    except UnicodeError as exc:
        raise AddressError(f'The domain of the address {_shown(address)} cannot exist: {_shown(str(exc))}.') from exc


def _too_long(address: str) -> AddressError:
    return AddressError(
        f'The address {_shown(address)} is longer than {MAX_ADDRESS_OCTETS} octets, which no mail server has to accept.'
    )


def _shown(text: str) -> str:
    """Return *text* for an error message: short, ASCII and in quotes, so that it cannot garble a log or a terminal."""
    return ascii(text if len(text) <= 100 else f'{text[:97]}...')


# --- lists of addresses -----------------------------------------------------

# A quoted string that is never closed runs to the end of the text.
_LIST_ITEM = re.compile(r'(?:[^",]+|"(?:[^"\\]+|\\.)*(?:"|\\?\Z))+', re.DOTALL)


def split_addresses(text: str) -> list[str]:
    """Split the comma list of a queue file; a comma in a quoted local part does not count.  Nothing is checked."""
    items = _LIST_ITEM.findall(text) if '"' in text else text.split(',')
    return [stripped for item in items if (stripped := item.strip(' \t'))]


def at_least_one(recipients: Iterable[str]) -> tuple[str, ...]:
    """Return *recipients*, each once.  Raises :class:`~.exceptions.NoRecipients` if there are none."""
    unique = tuple(dict.fromkeys(recipients))
    if not unique:
        raise NoRecipients('The message has no recipients: give it a To, Cc or Bcc, or pass recipients=.')
    return unique


# --- addresses in header fields ---------------------------------------------

_TOKEN = re.compile(
    r"""
    (?P<blank>  [ \t]+ )
  | (?P<atom>   [^\x00- \x7f()<>\[\]:;@\\,"]+ )
  | (?P<quoted> "(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[\t -~])*" )
  | (?P<literal>\[[^\[\]\\\x00-\x1f\x7f]*\] )
  | (?P<special>[<>@,:;] )
  | (?P<open>   \( )
    """,
    re.VERBOSE,
)
_QUOTED_PAIR = re.compile(r'\\(.)')
_COMMENT_PIECE = re.compile(r'(?:[^()\\]|\\.)*([()])', re.DOTALL)
_FOLD = re.compile(r'\r?\n(?=[ \t])')

# An address list (RFC 5322 section 3.4), one letter for each token: an *a*tom, a *q*uoted string, a domain *l*iteral, a
# special as itself.  In a list of this shape each "@" stands between the two halves of one address.
_MAILBOX = r'(?:[aq]*<[aq]@[al]>|[aq]@[al])'
_MAILBOXES = rf',*(?:{_MAILBOX}(?:,+{_MAILBOX})*,*)?'
_ADDRESS = rf'(?:{_MAILBOX}|[aq]+:{_MAILBOXES};)'
_MAILBOX_SHAPE = re.compile(_MAILBOX)
_ITEM = re.compile('[^,:;]*')
_SEPARATOR = re.compile('[,; \t]')
_ADDRESS_LIST = re.compile(rf',*(?:{_ADDRESS}(?:,+{_ADDRESS})*,*)?')


def parse_header_addresses(values: Iterable[str]) -> list[str]:
    """
    Return the addresses in the *values* of header fields such as ``To`` (RFC 5322 section 3.4), each of them once.

    The members of a group count, its name does not.  Encoded words stay encoded, so that a display name cannot turn
    into an address.  Raises :class:`~.exceptions.AddressError` for a value that can be read in more than one way:
    mail for the wrong person is worse than an error.
    """
    return list(dict.fromkeys(address for value in values for address in _parse_value(value)))


def parse_mailbox(text: str) -> str:
    """
    Return the address of one mailbox, written ``a@example.org`` or ``Display Name <a@example.org>``.

    Raises :class:`~.exceptions.AddressError`.
    """
    try:
        if not (isinstance(text, str) and text.endswith('>')):
            return check_address(text)
        addresses = list(_parse_value(text))
    except AddressError:
        if isinstance(text, str) and _seem_several(text):
            raise _not_one(text) from None
        raise
    if len(addresses) != 1:
        raise _not_one(text)
    return addresses[0]


def _seem_several(text: str) -> bool:
    return sum('@' in item for item in _SEPARATOR.split(text)) > 1


def _not_one(text: str) -> AddressError:
    return AddressError(
        f"{_shown(text)} is not exactly one address. Give a list with an item for each, ['a@example.org', "
        "'b@example.org']; an address that came out of a form may be an attack."
    )


class AddressGroup(NamedTuple):
    """
    A group (RFC 5322 section 3.4), or one mailbox that is in none.

    :param name: of the group; None without one
    :param mailboxes: the display name, ``''`` without one, and the address of each
    """

    name: str | None
    mailboxes: list[tuple[str, str]]


def parse_address_list(value: str) -> list[AddressGroup]:
    """
    Return what is in the *value* of a header field such as ``To``.  Encoded words in names stay encoded.

    A mailbox without a name takes the comment beside it, as in old mail: ``ada@example.org (Ada)``.

    Raises :class:`~.exceptions.AddressError` as :func:`parse_header_addresses`.
    """
    _address_tokens(value)
    groups: list[AddressGroup] = []
    group: AddressGroup | None = None
    words: list[str] = []
    comments: list[str] = []
    local_part = address = ''
    for kind, text in [*_tokens(_FOLD.sub('', value), value), (',', ',')]:
        if kind == 'c':
            comments.append(text)
        elif kind == ':':
            group = AddressGroup(_plain(words), [])
            groups.append(group)
            words, comments = [], []
        elif kind in ',;':
            if address:
                mailbox = (_plain(words or comments), address)
                group.mailboxes.append(mailbox) if group else groups.append(AddressGroup(None, [mailbox]))
            words, comments, address = [], [], ''
            group = None if kind == ';' else group
        elif kind == '@':
            local_part = words.pop()
        elif local_part:
            address, local_part = _check_token_pair(local_part, text, value), ''
        elif kind in 'aq':
            words.append(text)
    return groups


def _plain(words: list[str]) -> str:
    """Return the text of *words*, some of which are quoted."""
    return ' '.join(_QUOTED_PAIR.sub(r'\1', word[1:-1]) if word.startswith('"') else word for word in words)


def _parse_value(value: str) -> Iterator[str]:
    tokens = _address_tokens(value)
    for index, (kind, _) in enumerate(tokens):
        if kind == '@':
            yield _check_token_pair(tokens[index - 1][1], tokens[index + 1][1], value)


def _address_tokens(value: str) -> list[tuple[str, str]]:
    tokens = [token for token in _tokens(_FOLD.sub('', value), value) if token[0] != 'c']
    shape = ''.join(kind for kind, _ in tokens)
    if not _ADDRESS_LIST.fullmatch(shape):
        raise _unreadable(value, _what_is_wrong(tokens))
    return tokens


def _what_is_wrong(tokens: list[tuple[str, str]]) -> str:
    """Return what to correct in *tokens*, which are not a list of addresses."""
    shape = ''.join(kind for kind, _ in tokens)
    for match in _ITEM.finditer(shape):
        item = match[0]
        if not item or _MAILBOX_SHAPE.fullmatch(item) or shape.startswith(':', match.end()):
            continue
        text = _shown(' '.join(text for _, text in tokens[match.start() : match.end()]))
        if '@' not in item:
            return f'{text} has no domain; an address is local-part@domain, and a name with a comma needs double quotes'
        if item.count('@') > 1:
            return f'{text} is more than one address, or a name that needs double quotes'
        return f'{text} is not one address'
    return 'its groups are not complete'


def _check_token_pair(local_part: str, domain: str, value: str) -> str:
    # RFC 2047 section 5: there are no encoded words in an address.  This one was torn apart, or its writer made an
    # encoded word of a local part that needs SMTPUTF8.
    if local_part.startswith('=?'):
        raise _unreadable(value, f'{_shown(local_part)} before an "@" is an encoded word')
    try:
        return check_address(f'{local_part}@{domain}')
    except AddressError as exc:
        raise AddressError(f'{exc} It stands in the header field value {_shown(value)}.') from exc


def _tokens(text: str, value: str) -> Iterator[tuple[str, str]]:
    """Yield the letter and the text of each token, without blanks; a *c*omment without its parentheses."""
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise _unreadable(value, f'the character {_shown(text[position])} has no meaning there')
        position = match.end()
        if match.lastgroup == 'open':
            begin, position = position, _end_of_comment(text, position, value)
            yield 'c', text[begin : position - 1].strip(' \t')
        elif match.lastgroup == 'special':
            yield match.group(), match.group()
        elif match.lastgroup != 'blank':
            yield str(match.lastgroup)[0], match.group()


def _end_of_comment(text: str, position: int, value: str) -> int:
    depth = 1
    while depth:
        match = _COMMENT_PIECE.match(text, position)
        if not match:
            raise _unreadable(value, 'a parenthesis is not closed')
        depth += 1 if match.group(1) == '(' else -1
        position = match.end()
    return position


def _unreadable(value: str, why: str) -> AddressError:
    return AddressError(
        f'The header field value {_shown(value)} is not a list of addresses that can be read in one way only: {why}. '
        'Correct it, or pass sender= and recipients= explicitly.'
    )
