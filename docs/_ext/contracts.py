"""
Shows the contracts to autodoc as type checkers see them: as classes.

At run time a contract is an interface of zope.interface, which has no annotations, and which autodoc cannot read.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import sys
from contextlib import suppress
from importlib import import_module
from types import ModuleType

__all__ = ['show_as_classes']

BASES = {'Contract', 'Protocol'}


def show_as_classes() -> None:
    """Put a class in the place of each contract."""
    package = import_module('pyramid_mailqueue')
    # All modules, before they could find a class where they want an interface; but for those that need an extra.
    for module in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):
        with suppress(ImportError):
            import_module(module.name)
    modules = [module for name, module in sys.modules.items() if name.partition('.')[0] == package.__name__]
    for origin in (package.interfaces, package.transactions):
        for name, class_ in _classes_of(origin).items():
            contract = getattr(origin, name)
            for module in modules:
                if vars(module).get(name) is contract:
                    setattr(module, name, class_)


def _classes_of(module: ModuleType) -> dict[str, type]:
    """Execute the contracts in the source of *module* as classes, with the names that its annotations need."""
    source = ast.parse(inspect.getsource(module)).body
    contracts = [node for node in source if isinstance(node, ast.ClassDef) and BASES & {*map(ast.unparse, node.bases)}]
    for node in contracts:
        node.bases = [base for base in node.bases if ast.unparse(base) not in BASES]
    imports = [node for node in source if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING']
    future = ast.parse('from __future__ import annotations').body
    code = compile(ast.Module([*future, *imports, *contracts], []), str(module.__file__), 'exec')
    namespace = {**vars(module), 'TYPE_CHECKING': True}
    exec(code, namespace)
    return {node.name: namespace[node.name] for node in contracts}
