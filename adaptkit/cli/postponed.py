"""Let torch's compiler wait until somebody compiles something.

It takes 100 MB and half a second. torch loads it only when it is used (see ``torch.__getattr__``), but transformers
marks some of its functions for it, and so loads it into every process that builds a model. Here it is an empty module
at first, whose body runs when something of it, or a module inside it, is asked for. What is marked before that is not
marked: without the compiler a mark means nothing, and with it only what it may look into.

Only for processes of ``adaptkit``'s own (``cli.main.program``): who imports adaptkit keeps an ordinary torch.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
_ALONE = f"{COMPILER}._trace_wrapped_higher_order_op"
"""A module inside it that does without the rest; transformers takes something from it."""


def postpone_compiler() -> None:
    """Begin; before torch is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _disable(fn: Any = None, *_: Any, **__: Any) -> Any:
    return (lambda marked: marked) if fn is None else fn


def _same(fn: Any) -> Any:
    return fn


_MARKS: dict[str, Callable[..., Any]] = {
    "disable": _disable,
    "assume_constant_result": _same,
    "allow_in_graph": _same,
}
"""What tells the compiler something about a function, and returns it."""


class _Postponed(ModuleType):
    """The compiler while its body has not run to its end."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") or name == "__all__":  # others are asked of every module, by Python itself
            with _Late.turn:
                loader = _late(self)
                if loader is not None and not loader.running and name in _MARKS:
                    return _MARKS[name]
                if loader is None or not loader.running:
                    _wake(self)
                    return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Late(Loader):
    """Makes a module, and leaves it empty until it is told to run its body."""

    turn = threading.RLock()

    def __init__(self, found: Loader, places: Sequence[str] | None, origin: str | None) -> None:
        self._found, self._places, self._origin = found, places, origin
        self.running = False

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Postponed(spec.name)
        module.__file__, module.__path__ = self._origin, list(self._places or ())
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass

    def run(self, module: ModuleType) -> None:
        """Run the body, after which the module is like any other."""
        self.running = True
        try:
            self._found.exec_module(module)
        finally:
            self.running = False
        module.__class__ = ModuleType
        module.__loader__ = self._found
        if module.__spec__ is not None:
            module.__spec__.loader = self._found


def _late(module: ModuleType) -> _Late | None:
    """The loader of a module whose body has not run to its end."""
    loader = module.__spec__.loader if module.__spec__ is not None else None
    return loader if isinstance(loader, _Late) else None


def _wake(module: ModuleType) -> None:
    with _Late.turn:  # another thread may be at it
        loader = _late(module)
        if loader is not None and not loader.running:
            loader.run(module)


class _Finder(MetaPathFinder):
    """Finds the compiler, and runs its body before a module inside it is loaded; all others are found as ever."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(f"{COMPILER}.") and fullname != _ALONE and COMPILER in sys.modules:
            _wake(sys.modules[COMPILER])
        if fullname != COMPILER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Late(spec.loader, spec.submodule_search_locations, spec.origin)
        return spec
