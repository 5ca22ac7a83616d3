"""Avoid loading torch's compiler (``torch._dynamo``): it takes 95 MB and half a second, and adaptkit compiles nothing.

torch loads it when a function is compiled or decorated for it (with ``torch.compiler.disable``, for example).
transformers decorates some of its functions, imports a class from one of the compiler's modules, and builds models on
the meta device, where torch decorates its own functions on their first call; fake tensors read settings from another
module. So every process that builds a model would load the compiler. Here those two modules are loaded separately, and
the decorators return functions unchanged until the compiler is loaded: without it they have no effect. Any other access
loads the compiler normally.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_DECORATORS = ("disable", "assume_constant_result", "allow_in_graph")
"""Decorators that both ``torch.compiler`` and the compiler itself have."""
_SETTINGS = f"{_COMPILER}.config"
_NEEDED_MODULES = (f"{_COMPILER}._trace_wrapped_higher_order_op", _SETTINGS)
"""The modules from which transformers imports a class and fake tensors read settings."""


def leave_compiler_out() -> None:
    """Avoid loading the compiler from now on.

    Call it only in adaptkit's own processes: a program that imports adaptkit as a library may compile functions that
    transformers decorates.
    """
    import torch

    if "_dynamo" in vars(torch):  # the compiler is loaded, or this was called before
        return
    placeholder = _Placeholder(_COMPILER)
    placeholder.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
    for name in _DECORATORS:
        decorator = _ignore_until_loaded(getattr(torch.compiler, name))
        setattr(torch.compiler, name, decorator)
        setattr(placeholder, name, decorator)
    torch._dynamo = placeholder  # importing the real module replaces it
    for name in _NEEDED_MODULES:
        _load_separately(PathFinder.find_spec(name, placeholder.__path__))


@contextmanager
def without_compiler() -> Iterator[None]:
    """Leave torch's own functions undecorated while the block runs, if ``leave_compiler_out`` was called."""
    import torch

    placeholder = vars(torch).get("_dynamo")
    if not isinstance(placeholder, _Placeholder) or _COMPILER in sys.modules:
        yield
        return
    sys.modules[_COMPILER] = placeholder  # torch's functions import it to decorate themselves
    finder = _Finder(placeholder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        placeholder.remove_placeholder()


class _Placeholder(ModuleType):
    """A placeholder for ``torch._dynamo``."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # attributes that Python looks up in every module
            raise AttributeError(name)
        settings = sys.modules.get(_SETTINGS)
        if settings and name == "config" and sys.modules.get(_COMPILER) is self:
            return settings
        self.remove_placeholder()
        return getattr(importlib.import_module(_COMPILER), name)

    def remove_placeholder(self) -> None:
        """Remove the placeholder from ``sys.modules``, so that the compiler can be imported."""
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]


class _Finder(MetaPathFinder):
    """Finds the compiler's submodules while the placeholder is in ``sys.modules``."""

    def __init__(self, placeholder: _Placeholder) -> None:
        self._placeholder = placeholder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        inside = fullname.startswith(f"{_COMPILER}.") and sys.modules.get(_COMPILER) is self._placeholder
        return ModuleSpec(fullname, _Inside(self._placeholder)) if inside else None


class _Inside(Loader):
    """Loads a submodule by removing the placeholder and importing it normally, which Python allows inside an import."""

    def __init__(self, placeholder: _Placeholder) -> None:
        self._placeholder = placeholder
        self._own: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._placeholder.remove_placeholder()
        module = importlib.import_module(spec.name)
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__spec__"] = self._own


def _ignore_until_loaded(decorator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(decorator)
    def late(fn: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(sys.modules.get(_COMPILER), _Placeholder | None):
            return decorator(fn, *args, **kwargs)
        return fn if fn is not None else lambda function: late(function, *args, **kwargs)

    return late


def _load_separately(spec: ModuleSpec | None) -> None:
    """Load one of the compiler's modules without the compiler, if this version of torch has it and allows that."""
    if spec is None or spec.loader is None:
        return
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError:
        del sys.modules[spec.name]
