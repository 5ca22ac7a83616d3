"""Lazy imports of torch and of modules that load a compiler, on first access to one of their attributes.

Most commands read files, run compiled loops over arrays and write files; importing torch would take longer than all of
that for an adapter. A module that only sometimes needs torch, or only in annotations, imports it from here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


class _Late:
    """A proxy for a module, which caches the attributes that were accessed."""

    def __init__(self, name: str) -> None:
        self.__dict__["__name__"] = name

    def __getattr__(self, name: str) -> Any:
        value = getattr(import_module(self.__name__), name)
        self.__dict__[name] = value
        return value


def lazy_module(name: str) -> Any:
    """Return a proxy that imports a module, given its full name, on first access to an attribute."""
    return _Late(name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = lazy_module("torch")
