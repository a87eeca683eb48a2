"""
The base of all contracts: a protocol for type checkers, an interface of zope.interface at run time.

So ``mailer: IMailer`` is an annotation that mypy and pyright understand without a plugin: an object with the members of
the contract fits.  And ``@implementer(IMailer)``, ``registry.getUtility(IMailer)`` and ``verifyObject`` work as with
any other interface::

    class IBell(Contract, Protocol):
        @property
        def name(self) -> str:
            \"\"\"A short name for logs.\"\"\"

        def ring(self, times: int) -> None:
            \"\"\"Ring.\"\"\"
"""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

__all__ = ['Contract', 'Protocol']

T = TypeVar('T')

if TYPE_CHECKING:
    from abc import ABCMeta
    from typing import Protocol

    class _Interface(ABCMeta):
        """The questions that an interface of zope.interface answers."""

        def providedBy(cls: type[T], ob: object) -> TypeGuard[T]: ...
        def implementedBy(cls, class_: type) -> bool: ...

    class Contract(Protocol, metaclass=_Interface):
        """The base of all contracts."""

else:
    from zope.interface import Attribute, Interface
    from zope.interface.interface import InterfaceClass, fromFunction

    # What type checkers want to see among the bases of each protocol.
    Protocol = Interface

    class _Contract(InterfaceClass):
        """Makes plain interfaces, so that interfaces derived from them are written as usual: without self."""

        def __new__(cls, name: str, bases: tuple[Any, ...], attrs: dict[str, Any]) -> InterfaceClass:
            return InterfaceClass(name, bases, {key: _member(key, value) for key, value in attrs.items()})

    def _member(name: str, value: Any) -> Any:
        if isinstance(value, property):
            return Attribute(name, value.__doc__)
        # Without its first argument, self.
        return fromFunction(value, imlevel=1, name=name) if isinstance(value, FunctionType) else value

    Contract = InterfaceClass.__new__(_Contract)
    InterfaceClass.__init__(Contract, 'Contract', (Interface,), {}, 'The base of all contracts.', __name__)
