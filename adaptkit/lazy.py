"""torch, and modules that load a compiler: loaded when something of them is first asked for.

Most commands read files, run compiled loops over arrays and write files; importing torch would take longer than all of
that for an adapter. A module that may need torch, or names it in annotations only, takes it from here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


class _Late:
    """Stands for a module; what was once asked for is an attribute of its own."""

    def __init__(self, name: str) -> None:
        self.__dict__["__name__"] = name

    def __getattr__(self, name: str) -> Any:
        value = getattr(import_module(self.__name__), name)
        self.__dict__[name] = value
        return value


def late(name: str) -> Any:
    """Stand for a module, by its full name, until something of it is asked for."""
    return _Late(name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = late("torch")
