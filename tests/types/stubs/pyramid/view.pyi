from collections.abc import Callable
from typing import TypeVar

_T = TypeVar('_T')

def view_config(*, route_name: str, request_method: str, renderer: str) -> Callable[[_T], _T]: ...
