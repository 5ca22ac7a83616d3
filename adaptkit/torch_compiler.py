"""Torch's compiler, left where it is: it takes 95 MB and half a second, and nothing here is compiled.

torch loads it when something is compiled, or marked for it. transformers marks some of its functions, takes a class
from one of its modules, and builds models on the meta device, where torch marks its own functions when they are first
called; so every process that builds a model has it loaded. Here that module is loaded by itself, and a function that is
marked before the compiler is there stays as it is: without the compiler a mark means nothing. Whoever asks for more
loads it, in the ordinary way.
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
_MARKS = ("disable", "assume_constant_result", "allow_in_graph")
"""Of ``torch.compiler`` and of the compiler itself."""
_TAKEN = "_trace_wrapped_higher_order_op"


def leave_compiler_out() -> None:
    """Do so from here on.

    For processes of adaptkit's own: who imports it as a library may compile what transformers meant to be marked.
    """
    import torch

    if "_dynamo" in vars(torch):  # it is there, or this was asked for before
        return
    absent = _Absent(_COMPILER)
    absent.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
    for name in _MARKS:
        mark = _mark_late(getattr(torch.compiler, name))
        setattr(torch.compiler, name, mark)
        setattr(absent, name, mark)
    torch._dynamo = absent  # until somebody imports the module, which then stands here
    _load_alone(PathFinder.find_spec(f"{_COMPILER}.{_TAKEN}", absent.__path__))


@contextmanager
def without_compiler() -> Iterator[None]:
    """Let torch's own functions stay unmarked while the block runs, if the compiler is left out."""
    import torch

    absent = vars(torch).get("_dynamo")
    if not isinstance(absent, _Absent) or _COMPILER in sys.modules:
        yield
        return
    sys.modules[_COMPILER] = absent  # what they import before they mark themselves
    finder = _Finder(absent)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        absent.give_way()


class _Absent(ModuleType):
    """What torch has in the compiler's place."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python asks of every module
            raise AttributeError(name)
        self.give_way()
        return getattr(importlib.import_module(_COMPILER), name)

    def give_way(self) -> None:
        """Let the compiler be imported."""
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]


class _Finder(MetaPathFinder):
    """Loads the compiler before a module inside it is loaded."""

    def __init__(self, absent: _Absent) -> None:
        self._absent = absent

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        inside = fullname.startswith(f"{_COMPILER}.") and sys.modules.get(_COMPILER) is self._absent
        return ModuleSpec(fullname, _Inside(self._absent)) if inside else None


class _Inside(Loader):
    """Loads a module anew, in the ordinary way, which Python allows within its own loading."""

    def __init__(self, absent: _Absent) -> None:
        self._absent = absent
        self._own: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._absent.give_way()
        module = importlib.import_module(spec.name)
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__spec__"] = self._own


def _mark_late(mark: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(mark)
    def late(fn: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(sys.modules.get(_COMPILER), _Absent | None):
            return mark(fn, *args, **kwargs)
        return fn if fn is not None else lambda function: late(function, *args, **kwargs)

    return late


def _load_alone(spec: ModuleSpec | None) -> None:
    """Load a module of the compiler's without the compiler, if this version has it and that can be done."""
    if spec is None or spec.loader is None:
        return
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError:
        del sys.modules[spec.name]
