"""The layers of the package: imports go down only, and modules keep no state."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pyramid_mailqueue

PACKAGE = 'pyramid_mailqueue'
ROOT = Path(pyramid_mailqueue.__file__).parent

# From the ground up.  A module may import from its own layer and from those above it in this list.  A package stands
# for all of its modules, except for those that are named on their own.
LAYERS = (
    (
        'exceptions', 'contract', 'interfaces', 'display', 'forks', 'hosts', 'version',
        'message.addresses', 'message.encoded_words', 'message.line_ends',
    ),
    ('message', 'settings', 'results', 'logs'),
    ('queues', 'transports', 'delivery', 'events', 'datamanager', 'transactions', 'requests'),
    ('mailer', 'sending', 'sql_wiring'),
    ('wiring',),
    ('application',),
    ('including',),
    ('testing', '__init__', 'cli', 'queue_runner', 'dashboard'),
)  # fmt: skip
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}

# What has to be one per process: signals and plugins find each other through it; and a hook for forks is for ever.
SHARED_STATE = {('delivery.plugins', 'registry'), ('forks', '_inherited')}

MUTABLE_TYPES = {
    'Condition', 'ContextVar', 'Counter', 'Event', 'Lock', 'OrderedDict', 'Queue', 'RLock', 'SimpleQueue',
    'WeakKeyDictionary', 'WeakSet', 'WeakValueDictionary', 'bytearray', 'count', 'defaultdict', 'deque', 'dict', 'list',
    'local', 'set',
}  # fmt: skip
MUTABLE_DISPLAYS = (ast.List, ast.ListComp, ast.Dict, ast.DictComp, ast.Set, ast.SetComp)


def modules():
    """Map the name of each module, without the package's own, to its file."""
    return {name_of(path): path for path in sorted(ROOT.rglob('*.py'))}


def name_of(path):
    *folders, file = path.relative_to(ROOT).with_suffix('').parts
    if file == '__init__' and folders:
        return '.'.join(folders)
    return '.'.join([*folders, file])


def tree_of(path):
    return ast.parse(path.read_text('utf-8'), str(path))


MODULES = modules()
TREES = {name: tree_of(path) for name, path in MODULES.items()}


def layer_of(name):
    """The number of a module's layer, by its own name or by the nearest package around it; -1 if it has none."""
    while name not in LAYER_OF and '.' in name:
        name = name.rpartition('.')[0]
    return LAYER_OF.get(name, -1)


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in {'TYPE_CHECKING', 'typing.TYPE_CHECKING'}


def statements(tree, *, with_type_checking):
    """Every node of *tree*, those inside of functions too."""
    for child in ast.iter_child_nodes(tree):
        if is_type_checking(child) and not with_type_checking:
            continue
        yield child
        yield from statements(child, with_type_checking=with_type_checking)


def imports_of(name):
    """The modules of this package that a module imports, at its top or anywhere inside."""
    # The contracts name the values that pass through them, and need them for the type checker only.
    with_type_checking = name != 'interfaces'
    found = set()
    for node in statements(TREES[name], with_type_checking=with_type_checking):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{name}, line {node.lineno}: imports are absolute here'
            members = {f'{node.module}.{alias.name}' for alias in node.names}
            submodules = {member for member in members if member.removeprefix(f'{PACKAGE}.') in MODULES}
            found |= submodules
            if members - submodules:
                found.add(node.module)
    return {
        target.removeprefix(f'{PACKAGE}.') if target != PACKAGE else '__init__'
        for target in found
        if target == PACKAGE or target.startswith(f'{PACKAGE}.')
    }


def cycle_from(name, path=()):
    """Return a chain of imports that leads from *name* back to itself, or None."""
    for target in sorted(imports_of(name) - set(path[1:])):
        if path and target == path[0]:
            return (*path, name, target)
        chain = cycle_from(target, (*path, name)) if layer_of(target) == layer_of(name) else None
        if chain:
            return chain
    return None


@pytest.mark.parametrize('name', MODULES)
def test_every_module_has_its_place_in_the_layers(name):
    assert layer_of(name) >= 0, (
        f'{PACKAGE}.{name} is in no layer: add it to LAYERS in {Path(__file__).name}, in the lowest layer that has all '
        'it imports, and describe it in docs/architecture.rst.'
    )


@pytest.mark.parametrize('name', MODULES)
def test_imports_go_down_only(name):
    upwards = sorted(target for target in imports_of(name) if layer_of(target) > layer_of(name))

    assert not upwards, f'{PACKAGE}.{name} imports from a layer above its own: {", ".join(upwards)}'


@pytest.mark.parametrize('name', MODULES)
def test_modules_of_one_layer_do_not_import_each_other_in_a_circle(name):
    assert cycle_from(name) is None


@pytest.mark.parametrize('name', MODULES)
def test_modules_keep_no_state(name):
    states = list(map(ast.unparse, mutable_assignments(name)))

    assert not states, (
        f'{PACKAGE}.{name} keeps state: {"; ".join(states)}.  Give it to an object that somebody owns; a constant is '
        'written in CAPITALS and never changed.'
    )


def mutable_assignments(name):
    for node in TREES[name].body:
        targets = targets_of(node)
        if (
            targets
            and is_mutable(node.value)
            and not all(is_constant(target) for target in targets)
            and not {(name, target) for target in targets} <= SHARED_STATE
        ):
            yield node


def targets_of(node):
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return [ast.unparse(node.target)]
    return []


def is_constant(target):
    return target.isupper() or target == '__all__'


def is_mutable(value):
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition('.')[2].partition('[')[0] in MUTABLE_TYPES
    return isinstance(value, MUTABLE_DISPLAYS)


@pytest.mark.parametrize('name', MODULES)
def test_no_function_changes_the_variables_of_its_module(name):
    lines = [node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.Global)]

    assert not lines, f'{PACKAGE}.{name} has a "global" statement in line {lines}'


@pytest.mark.parametrize('name', [name for name in MODULES if name.partition('.')[0] != 'cli'])
def test_only_commands_end_the_process(name):
    ends = [f'line {node.lineno}' for node in ast.walk(TREES[name]) if ends_the_process(node)]

    assert not ends, f'{PACKAGE}.{name} ends the process, which only a command may do: {"; ".join(ends)}'


def ends_the_process(node):
    if isinstance(node, ast.Raise) and node.exc is not None:
        return ast.unparse(node.exc).partition('(')[0] == 'SystemExit'
    return isinstance(node, ast.Call) and ast.unparse(node.func) in {'sys.exit', 'os._exit', 'exit', 'quit'}
