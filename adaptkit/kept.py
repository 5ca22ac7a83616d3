"""The machine code of kernels on the disk, for the next process; see ``compiled``."""

import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

from adaptkit.cache import cache_folder

Kind = Any
"""Of an argument, all that its machine code depends on; the same for all arrays of a type and a number of axes."""

_OF_NO_CONSEQUENCE = ("NUMBA_NUM_THREADS=", "NUMBA_THREADING_LAYER", "NUMBA_CACHE_")
"""Settings of numba's that change no machine code of ours."""


class Kept:
    """What the disk has of a kernel for arguments of some kinds.

    Behind it stands a hash of it and of all that it was made from: it is written without a sync, and what a power cut
    left of it, or another version wrote, must not be run.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any], kinds: tuple[Kind, ...]) -> None:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        told = sorted((key, sorted(value) if isinstance(value, set) else value) for key, value in options.items())
        made_for = f"{name}:{function.__code__.co_firstlineno} {told} "
        made_for += f"{', '.join(map(_described, kinds))} {_processor()}"
        self._name = f"{name}-{hashlib.sha256(made_for.encode()).hexdigest()[:20]}.o"
        self._sources = sources_of(function)
        digest = self._sources.digest() if self._sources else None
        self._folders = [] if digest is None else _folders(Path(function.__code__.co_filename).parent)
        self._made_from = (digest or b"") + made_for.encode()

    def read(self) -> bytes | None:
        """What was kept, whole; None if nothing was."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                content = (folder / self._name).read_bytes()
                end = len(content) - hashlib.sha256().digest_size
                if end > 0 and self._seal(content[:end]) == content[end:]:
                    return content[:end]
        return None

    def write(self, content: bytes) -> None:
        """Keep it in the first folder that can be written, if there is one with room."""
        if self._sources is None or self._sources.digest() is None:  # they changed while it was compiled
            return
        for folder in self._folders:
            unfinished = folder / f"{self._name}.{os.getpid()}.{threading.get_ident()}"
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    unfinished.write_bytes(content + self._seal(content))
                    unfinished.replace(folder / self._name)
                finally:
                    unfinished.unlink(missing_ok=True)
                return

    def _seal(self, content: bytes) -> bytes:
        return hashlib.sha256(self._made_from + content).digest()


class Sources:
    """All that kernels of a folder are made from: its modules, and those that make them.

    What is compiled is what was imported. A new version may be installed meanwhile: its files must neither choose what
    is run in this process, nor be taken for what this process keeps. So they are looked at when the first kernel is
    defined, and nothing is read or kept once they are others.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamps = self._look()

    def digest(self) -> bytes | None:
        """A hash of them; None where they cannot be read, as in an archive, or are no more what was imported."""
        try:
            digest = self._digest
        except OSError:
            return None
        return digest if self._stamps and self._stamps == self._look() else None

    @functools.cached_property
    def _digest(self) -> bytes:
        digest = hashlib.sha256()
        for path in self._paths():
            digest.update(path.name.encode() + path.read_bytes())
        return digest.digest()

    def _look(self) -> list[tuple[Any, ...]]:
        """What tells one version of a file from another; nothing if one cannot be asked."""
        try:
            stats = [(path.name, path.stat()) for path in self._paths()]
        except OSError:
            return []
        return [(name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats]

    def _paths(self) -> Iterator[Path]:
        for name in ("compiled.py", "compiler.py", "kept.py"):
            yield Path(__file__).with_name(name)
        yield from sorted(self._folder.glob("[!.]*.py"))  # an editor's lock is a link to nowhere, .#name.py


def sources_of(function: Callable[..., Any]) -> Sources | None:
    """What a kernel is made from; None if it is not to be kept.

    What a function of another package calls may lie elsewhere, and change there; and functions that are defined in
    another one may be several of one name.
    """
    if not function.__module__.startswith("adaptkit.") or "<locals>" in function.__qualname__:
        return None
    return _sources(os.path.dirname(function.__code__.co_filename))


@functools.cache
def _sources(folder: str) -> Sources:
    return Sources(Path(folder))


@functools.cache
def _folders(source: Path) -> list[Path]:
    """Where kernels of a folder are kept, in the order in which they are looked for."""
    folders = []
    with contextlib.suppress(NotImplementedError):  # Python itself keeps no bytecode
        folders.append(Path(cache_from_source(str(source / "kernels.py"))).parent)
    folder = cache_folder()
    return [*folders, folder / "kernels"] if folder else folders


@functools.cache
def _processor() -> str:
    """What the machine code depends on beside its source: the processor, what numba was told, and who loads it.

    And how long the head of every object is, behind which an array has its fields: a Python without its global lock has
    a longer one, and may share the folders.
    """
    import llvmlite
    from llvmlite import binding

    told = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
    told = [setting for setting in told if not setting.startswith(_OF_NO_CONSEQUENCE)]
    features = binding.get_host_cpu_features().flatten()
    head = f"head={object.__basicsize__}"
    return " ".join([llvmlite.__version__, binding.get_host_cpu_name(), features, head, *told])


def _described(kind: Kind) -> str:
    """The same in every process, and another one for another kind."""
    if kind is None or isinstance(kind, str):
        return str(kind)
    if isinstance(kind[0], type):
        fields = getattr(kind[0], "_fields", "")
        return f"{kind[0].__qualname__}{fields}({', '.join(map(_described, kind[1]))})"
    dtype, axes, flags = kind
    return f"{dtype}:{axes}:{flags}"  # dtype.str is that of every structure of its size
