"""
Pages of the docs that show what is typed and what is seen, and how the two are compared with what is seen here.

A block whose first line is ``# name`` is the file of this name.  In a block of the language ``console`` a line with a
prompt (``$``, or ``app$`` for the terminal "app") is typed, and the lines after it are seen.  A block with the class of
a terminal (``:class: app``) is what that terminal shows next; ``^C`` in it is typed there.
"""

from __future__ import annotations

import re
import socket
from typing import NamedTuple

import docutils.core
import docutils.nodes

#: The width of the terminals that the pages show: with their indentation the lines have at most 120 characters.
COLUMNS = 116

_PROMPT = re.compile(r'(?:(\w+))?\$ (.+)')
_FOLD = re.compile(r'\n {4}(?=\S)')
_ANSI = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')

#: What is different each time.
PATTERNS = (
    (re.compile(r'<\d+\.\d+\.\d+@([\w.-]+)>'), r'<MESSAGE-ID@\1>'),
    (re.compile(r'\d{10}\.M\d+P\d+Q\d+R[0-9a-f]{8}\.[\w.-]*\w'), 'ID'),
    (re.compile(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ'), 'TIME'),
    (re.compile(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:,\d{3}|[+-]\d{4})?'), 'TIME'),
    (re.compile(r'\w{3}, \d+ \w{3} \d{4} \d\d:\d\d:\d\d [+-]\d{4}'), 'DATE'),
    (re.compile(r'\bdelay=[\d.]+'), 'delay=SECONDS'),
    (re.compile(r"\('(?:127\.0\.0\.1|::1)', \d+(?:, 0, 0)?\)"), 'PEER'),
    (re.compile(r'\bPID \d+'), 'PID N'),
    (re.compile(r'\b[1-5]?\ds\b'), 'SECONDS'),
    # The columns of a table are as wide as the ids in them.
    (re.compile(r' {2,}'), '  '),
    (re.compile(r'(?m) +$'), ''),
)


class Step(NamedTuple):
    """
    What a page says at one point.

    :param kind: ``file``, ``command`` or ``output``
    :param what: the name of the file, or the command; for an output what is typed before it, if anything
    :param text: the content of the file, or what is seen
    :param terminal: ``''`` is the one without a name
    :param section: the title of the innermost section
    """

    kind: str
    what: str
    text: str
    terminal: str = ''
    section: str = ''


def steps_of(path, terminals=()):
    """Yield a :class:`Step` for each thing that a page shows, in their order."""
    settings = {'report_level': 1, 'halt_level': 1}
    page = docutils.core.publish_doctree(path.read_text('utf-8'), str(path), settings_overrides=settings)
    for block in page.findall(docutils.nodes.literal_block):
        yield from _steps_of_block(block, terminals)


def _steps_of_block(block, terminals):
    text, section = block.astext(), _section_of(block)
    named = re.match(r'# (\S+\.\w+)\n', text)
    (terminal,) = set(terminals) & set(block['classes']) or {''}
    if terminal:
        typed, seen = ('^C', '') if text == '^C' else ('', text)
        yield Step('output', typed, seen, terminal, section)
    elif 'console' in block['classes']:
        yield from _typed(text, section)
    elif named:
        yield Step('file', named[1], f'{text}\n', section=section)


def _section_of(node):
    while not isinstance(node, docutils.nodes.section):
        node = node.parent
        if node is None:
            return ''
    return node.next_node(docutils.nodes.title).astext()


def _typed(text, section):
    step = None
    for line in text.splitlines():
        if prompt := _PROMPT.fullmatch(line):
            if step:
                yield step
            step = Step('command', prompt[2], '', prompt[1] or '', section)
        else:
            assert step, f'output of no command: {line}'
            step = step._replace(text=f'{step.text}{line}\n')
    yield step


def as_patterns(text):
    """Return what is seen, with a word in the place of each thing that is different each time, and without folds."""
    text = _FOLD.sub(' ', _ANSI.sub('', text.replace('\r\n', '\n')).replace(socket.gethostname(), 'shop'))
    for pattern, word in PATTERNS:
        text = pattern.sub(word, text)
    return text.strip()
