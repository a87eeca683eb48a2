from collections.abc import Callable
from typing import TypeVar

_T = TypeVar('_T')

def subscriber(*events: type[_T]) -> Callable[[Callable[[_T], None]], Callable[[_T], None]]: ...
