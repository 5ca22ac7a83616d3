"""torch, loaded when something of it is first asked for.

Most commands read files, run compiled loops over arrays and write files; importing torch would take longer than all of
that for an adapter. A module that may need torch, or names it in annotations only, takes it from here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Late:
        """Stands for a module; what was once asked for is an attribute of its own."""

        def __init__(self, name: str) -> None:
            self.__dict__["__name__"] = name

        def __getattr__(self, name: str) -> Any:
            value = getattr(import_module(self.__name__), name)
            self.__dict__[name] = value
            return value

    torch = _Late("torch")
