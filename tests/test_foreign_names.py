"""
Names that belong to others: what our classes may take of their bases, and what we read that is not public.

A class that has a base from elsewhere shares one set of names with it, and the next release of that base may use a name
of ours: ``threading.Thread`` had no ``_context`` before Python 3.14.  So these tests look into the bases as they are in
the Python and in the libraries that run them, at the attributes too that a base gives its instances.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections import defaultdict
from pathlib import Path

import pyramid_mailqueue

PACKAGE = 'pyramid_mailqueue'
ROOT = Path(pyramid_mailqueue.__file__).parent
TREES = {path: ast.parse(path.read_text('utf-8')) for path in sorted(ROOT.rglob('*.py'))}

# Names of a base that a class of ours has on purpose, and why.
OVERRIDES = {
    'cli.config._Parser.optionxform': 'documented: to be set by subclasses',
    'cli.dialog.Dialog.emit': 'documented: what a handler is made of',
    'cli.queue._Parser.error': 'documented: what is done about wrong usage',
    'logs.Log.log': 'documented: what every other method of an adapter goes through',
    'queues.sql.tables.database_time.inherit_cache': 'documented: what an element of SQL says of itself',
    'queues.sql.tables.database_time.type': 'as inherit_cache',
    'testing.outbox.Outbox.clear': 'a list that is emptied as a whole',
}

# Private names of others that are read, and why.
READ = {
    '_asdict': 'of a named tuple: documented, and private by its look only',
    '_parse_tree': 'of a header field of email: it has no other place for what it has read',
    '_payload': 'of a message of email: get_payload() decodes, and so changes, what is to go out as it is',
    '_resources': 'a transaction tells in no other way who takes part; if it does not, the worst is assumed',
}


def test_our_classes_take_no_name_of_a_base_from_elsewhere_unawares():
    found = {f'{name}.{taken}' for name, kind in foreign_classes() for taken in own_names(kind) & names_of_bases(kind)}

    assert found - OVERRIDES.keys() == set()
    assert OVERRIDES.keys() - found == set(), 'no such name is taken any more'


def test_a_name_that_a_base_gives_its_instances_is_found():
    class Base:
        def __init__(self):
            self._context, self.other = None, None

    class Ours(Base):
        def __init__(self):
            self._context = {}
            super().__init__()

    assert own_names(Ours) == {'_context'}
    assert names_in(*sources_of(Base)) == {'_context', 'other'}


def test_nothing_private_of_others_is_used():
    ours = {name for tree in TREES.values() for name in names_defined(tree)}

    found = {
        f'{path.relative_to(ROOT)}:{line} {name}'
        for path, tree in TREES.items()
        for line, name in private_names_used(tree)
        if name not in ours and name not in READ
    }

    assert found == set()


def foreign_classes():
    """The classes of the package that have a base from elsewhere, with their names."""
    for path in TREES:
        *folders, file = path.relative_to(ROOT).with_suffix('').parts
        name = '.'.join([*folders, *([] if file == '__init__' else [file])])
        module = importlib.import_module(f'{PACKAGE}.{name}' if name else PACKAGE)
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == module.__name__ and foreign_bases(kind):
                yield f'{name}.{kind.__qualname__}', kind


def foreign_bases(kind):
    # Some of zope.interface, which are written in C, have no module.
    return [base for base in inspect.getmro(kind)[:-1] if str(base.__module__).partition('.')[0] != PACKAGE]


def own_names(kind):
    """What the source of a class names as its own; not what dataclasses and the like have added."""
    return {name for node in sources_of(kind) for name in names_in(node)}


def names_of_bases(kind):
    """The names of all that others bring into a class, and into its instances; without those of the language."""
    bases = foreign_bases(kind)
    names = {name for base in bases for name in vars(base) if not is_of_the_language(name)}
    return names | {name for base in bases for node in sources_of(base) for name in names_in(node)}


def sources_of(kind):
    """The definition of a class; none if it is written in C, and has no attributes but those that it shows."""
    try:
        path = inspect.getsourcefile(kind)
    except (OSError, TypeError):
        return []
    return definitions(path).get(kind.__name__, []) if path else []


@functools.cache
def definitions(path):
    """The classes that a file defines, by their names."""
    found = defaultdict(list)
    for node in ast.walk(ast.parse(Path(path).read_text('utf-8'))):
        if isinstance(node, ast.ClassDef):
            found[node.name].append(node)
    return found


def names_in(node):
    """The names that the source of a class gives to the class and its instances."""
    names = set()
    for statement in node.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            names |= {it.id for it in ast.walk(statement) if isinstance(it, ast.Name) and isinstance(it.ctx, ast.Store)}
    stored = (it for it in ast.walk(node) if isinstance(it, ast.Attribute) and isinstance(it.ctx, ast.Store))
    names |= {it.attr for it in stored if isinstance(it.value, ast.Name) and it.value.id == 'self'}
    return {name for name in names if not is_of_the_language(name)}


def is_of_the_language(name):
    return name.startswith('__') and name.endswith('__')


def names_defined(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id


def private_names_used(tree):
    """The private names that are read as an attribute, by ``getattr`` or by an import, with their lines."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, 'id', '').endswith('attr'):
            names = [it.value for it in node.args[1:2] if isinstance(it, ast.Constant)]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, 'module', None) or ''
            names = [*module.split('.'), *(part for alias in node.names for part in alias.name.split('.'))]
        yield from ((node.lineno, name) for name in names if name.startswith('_') and not is_of_the_language(name))
