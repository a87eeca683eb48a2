"""
Text in a header: encoded words (RFC 2047) and folds (RFC 5322 section 2.2.3).

The standard library does this too, but what it writes depends on its version and on what the process has done to
:mod:`email.charset`: blanks are lost or added between encoded words, words and lines are longer than RFC 2047 allows,
and long words that machines read become encoded words.  What is written here is read as it was set:

* A word is encoded if it is not ASCII, or if a reader would take it for encoded; any other word goes out as it is.
* A line is folded before white space, and otherwise may be long (RFC 5322 section 2.1.1).
* An encoded word is UTF-8, holds whole characters, and has at most 75 of its own; its line has at most 76.
* White space between two encoded words is not shown (RFC 2047 section 6.2), so it is put inside one of them.
"""

from __future__ import annotations

import codecs
import re
import string
from base64 import b64encode
from binascii import a2b_base64, a2b_qp
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, TypeVar

from pyramid_mailqueue.exceptions import MessageError

__all__ = [
    'LINE_MUST',
    'LINE_SHOULD',
    'SLOW_CODECS',
    'FieldLines',
    'chunks',
    'decoded',
    'encoded_words',
    'is_text',
    'looks_encoded',
    'without_surrogates',
]

# RFC 5322 section 2.1.1; without the CRLF.
LINE_SHOULD, LINE_MUST = 78, 998
# RFC 2047 section 2.
_ENCODED_LINE, _ENCODED_WORD = 76, 75

# If less than this is left of a line, the next encoded word begins a new one.
_LEAST_ROOM = 36
# Characters of an encoded word around its text: "=?utf-8?q?" and "?=".
_FRAME = 12

#: Codecs that take quadratic time; no mail needs them.
SLOW_CODECS = frozenset(('idna', 'punycode'))

_T = TypeVar('_T', str, bytes)
_Test = Callable[[str], object]


# --- reading ----------------------------------------------------------------

_BEGIN = re.compile(r'=\?[^?]*\?[bBqQ]\?')
_ONE_WORD = re.compile(r'=\?[^?]+\?[bBqQ]\?[^?]*\?=')
# With the language of RFC 2231 section 5, and with the blanks that some writers leave in.
_ANY_WORD = re.compile(r'=\?([^?*\s]+)(?:\*[^?\s]*)?\?([bBqQ])\?([^?]*)\?=')


def looks_encoded(text: str) -> bool:
    """Whether a reader may find an encoded word in *text*; some find one that holds blanks, too."""
    begin = _BEGIN.search(text)
    return begin is not None and text.find('?=', begin.end()) >= 0


def decoded(text: str) -> str:
    """
    Return *text* with its encoded words as they are meant; one that cannot be read is left as it is.

    It takes linear time, which the standard library does not.
    """
    runs: list[_Run] = []  # Adjacent words may share a character, whatever the RFC says.
    pieces: list[str] = []
    position = 0
    for match in _ANY_WORD.finditer(text):
        codec, data = _codec(match[1]), _data(match[2], match[3])
        if codec is None or data is None:
            continue
        between = text[position : match.start()]
        if not runs or between.strip(' \t\r\n'):
            pieces += [*map(_run_text, runs), between]
            runs = []
        if not runs or runs[-1].codec != codec:
            runs.append(_Run(codec, [], []))
        runs[-1].data.append(data)
        runs[-1].words.append(match[0])
        position = match.end()
    return ''.join([*pieces, *map(_run_text, runs), text[position:]])


class _Run(NamedTuple):
    codec: str
    data: list[bytes]
    words: list[str]


def _run_text(run: _Run) -> str:
    try:
        return without_surrogates(b''.join(run.data).decode(run.codec))
    except (LookupError, ValueError):
        return ' '.join(run.words)


def without_surrogates(text: str) -> str:
    """Return *text* with its surrogates escaped, which cannot be written anywhere; UTF-7 can spell them."""
    return text.encode('utf-8', 'backslashreplace').decode('utf-8')


def _codec(charset: str) -> str | None:
    """Return the name of the codec of *charset*; None if there is none, or if it is too slow."""
    try:
        name = codecs.lookup(charset).name
    except (LookupError, ValueError):
        return None
    return None if name in SLOW_CODECS else name


def _data(encoding: str, text: str) -> bytes | None:
    if encoding in 'qQ':
        return a2b_qp(text.encode('ascii', 'replace'), header=True)
    try:
        return a2b_base64(text.encode('ascii', 'replace') + b'==')
    except ValueError:
        return None


# --- writing ----------------------------------------------------------------

# RFC 2047 section 5 (3): these may stand in a phrase, too.
_SAFE = frozenset(f'{string.ascii_letters}{string.digits}!*+-/'.encode())
_Q = tuple(chr(octet) if octet in _SAFE else '_' if octet == 0x20 else f'={octet:02X}' for octet in range(256))
_BLANKS = frozenset(('_', b' '))
_SURROGATE = re.compile('[\ud800-\udfff]')
_WORD = re.compile(r'([ \t]*)([^ \t]+)')
_IRREGULAR_BLANKS = re.compile(r'\t|  |\A | \Z')
# Of a phrase, without what a reader may take for encoded.
_ATOM = re.compile(r"(?!.*=\?)[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+")
# Anything but ASCII and the octets that a parser has found and not decoded.
_TEXT = re.compile('[^\x00-\x7f\udc80-\udcff]')


def is_text(text: str) -> bool:
    """Whether there is more in *text* than ASCII and the octets that a parser has found."""
    return _TEXT.search(text) is not None


def chunks(units: Iterable[_T], first: int, most: int) -> Iterator[list[_T]]:
    """
    Yield *units* in their order, as many at a time as have at most *most* characters together; *first* at first.

    A chunk ends after a blank if it has one: some readers show a blank between two encoded words.
    """
    chunk: list[_T] = []
    room, behind_blank = first, 0
    for unit in units:
        while chunk and len(unit) > room:
            end = behind_blank or len(chunk)
            yield chunk[:end]
            chunk, behind_blank = chunk[end:], 0
            room = most - sum(map(len, chunk))
        chunk.append(unit)
        room -= len(unit)
        if unit in _BLANKS:
            behind_blank = len(chunk)
    if chunk:
        yield chunk


def encoded_words(text: str, first: int = _ENCODED_WORD) -> Iterator[str]:
    """Yield *text* as encoded words, the first one with at most *first* characters."""
    characters = [char.encode() for char in _SURROGATE.sub('\ufffd', text)]
    in_q = [''.join(map(_Q.__getitem__, octets)) for octets in characters]
    octets = sum(map(len, characters))
    if sum(map(len, in_q)) < (octets + 2) // 3 * 4 + 5:
        for units in chunks(in_q, first - _FRAME, _ENCODED_WORD - _FRAME):
            yield f'=?utf-8?q?{"".join(units)}?='
    else:
        for data in chunks(characters, (first - _FRAME) // 4 * 3, (_ENCODED_WORD - _FRAME) // 4 * 3):
            yield f'=?utf-8?b?{b64encode(b"".join(data)).decode("ascii")}?='


class FieldLines:
    """
    The lines of one header field, filled word by word.

    :param name: the name of the field
    :param utf8: whether it may hold UTF-8 (RFC 6532); otherwise what is not ASCII is encoded
    """

    def __init__(self, name: str, *, utf8: bool = False) -> None:
        self._name = name
        self._utf8 = utf8
        self._lines = [f'{name}:']
        self._limit = LINE_SHOULD

    def add(self, word: str, blank: str = ' ') -> None:
        """Add *word* as it is, after the white space *blank*, before which the line may be folded."""
        self._add(blank + word, LINE_SHOULD, LINE_MUST)

    def add_encoded(self, text: str, blank: str = ' ') -> None:
        """Add *text* as encoded words, after the white space *blank*."""
        room = min(_ENCODED_LINE - len(self._lines[-1]) - len(blank), _ENCODED_WORD)
        words = [*encoded_words(text)]
        if len(words) > 1 or not self._has_text():
            # One word that fits on a line of its own is not split: not every reader puts it together again.
            words = [*encoded_words(text, room if room >= _LEAST_ROOM else _ENCODED_WORD)]
        for word in words:
            self._add(blank + word, _ENCODED_LINE, _ENCODED_LINE)
            blank = ' '

    def add_phrase(self, text: str) -> None:
        """Add the words of *text*, a name in front of an address, which may hold anything (RFC 5322 section 3.2.5)."""
        self._add_words(text, is_plain=_IRREGULAR_BLANKS.search(text) is None and _ATOM.fullmatch)

    def add_text(self, text: str, *, holds_encoded: bool = False) -> None:
        """
        Add the words of *text*, which has no line ends.

        :param holds_encoded: whether an encoded word in it is meant as one; otherwise it is text that looks like that
        """
        is_plain = (holds_encoded or not looks_encoded(text)) and self._is_plain
        self._add_words(text, is_plain=is_plain, holds_encoded=holds_encoded)

    def _add_words(self, text: str, *, is_plain: _Test | Literal[False], holds_encoded: bool = False) -> None:
        stripped = text.rstrip(' \t')
        run: list[str] = []  # Words to encode, and the white space that is to be read around them.
        separator, after_plain = ' ', False
        for blank, word in _WORD.findall(stripped):
            if not (is_plain and is_plain(word)):
                if not run and after_plain:
                    # One blank sets them apart from the word before; further ones are safe inside only.
                    separator, run = blank[0], [blank[1:], word]
                else:
                    run += [blank, word]
                continue
            is_encoded = holds_encoded and _ONE_WORD.fullmatch(word) is not None
            if run:
                self.add_encoded(''.join([*run, blank if is_encoded else blank[:-1]]), separator)
                separator, run, blank = ' ', [], blank[-1]
            self.add(word, (self._has_text() and blank) or ' ')
            after_plain = not is_encoded
        self._end(''.join(run), separator, text[len(stripped) :])

    def _is_plain(self, word: str) -> bool:
        if word.isascii():
            return True
        if self._utf8:
            return word.isprintable() and len(word.encode('utf-8', 'replace')) <= LINE_MUST // 2
        return not is_text(word)

    def _has_text(self) -> bool:
        return len(self._lines) > 1 or len(self._lines[0]) > len(self._name) + 1

    def _end(self, run: str, separator: str, trailing: str) -> None:
        if run:
            self.add_encoded(run + trailing, separator)
        elif not self._has_text():
            self._lines[-1] += ' '
        elif len(self._lines[-1]) + len(trailing) <= self._limit:
            self._lines[-1] += trailing

    def _add(self, piece: str, most: int, most_on_first: int) -> None:
        """Put *piece*, which begins with white space, on a line of at most *most* characters if that is possible."""
        longer = len(self._lines[-1]) + len(piece)
        if longer <= min(most, self._limit) or (not self._has_text() and longer <= most_on_first):
            self._lines[-1] += piece
            self._limit = min(most, self._limit)
        else:
            self._lines.append(piece)
            self._limit = most

    def text(self) -> str:
        """Return the field with its line ends.  Raises :class:`~.exceptions.MessageError` if a line is too long."""
        longest = max(map(_octets, self._lines))
        if longest > LINE_MUST:
            raise MessageError(
                f'The header field {self._name} has a line of {longest} octets without white space to fold it at; '
                f'a line of a message has at most {LINE_MUST} (RFC 5322 section 2.1.1). Shorten it.'
            )
        return '\r\n'.join([*self._lines, ''])


def _octets(line: str) -> int:
    return len(line.encode('utf-8', 'surrogateescape'))
