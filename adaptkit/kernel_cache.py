"""On-disk cache of the machine code of kernels; see ``compiled``."""

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
"""What the machine code depends on for one argument.

For an array or a tensor (numpy dtype, number of axes, flags), for a number the format character of its type, for a
tuple (its type, kinds of its elements), for None None.
"""

_IRRELEVANT_SETTINGS = ("NUMBA_NUM_THREADS=", "NUMBA_THREADING_LAYER", "NUMBA_CACHE_")
"""Environment variables of numba that do not affect the machine code."""


class CacheEntry:
    """The cache entry of a kernel for arguments of some kinds.

    The file ends with a SHA-256 of its content and of everything it was made from: it is written without fsync, and a
    file that a power cut truncated or another version wrote must not be run.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any], kinds: tuple[Kind, ...]) -> None:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        settings = sorted((key, sorted(value) if isinstance(value, set) else value) for key, value in options.items())
        made_for = f"{name}:{function.__code__.co_firstlineno} {settings} "
        made_for += f"{', '.join(map(_described, kinds))} {_processor()}"
        self._name = f"{name}-{hashlib.sha256(made_for.encode()).hexdigest()[:20]}.o"
        self._sources = sources_of(function)
        digest = self._sources.digest() if self._sources else None
        self._folders = [] if digest is None else _folders(Path(function.__code__.co_filename).parent)
        self._made_from = (digest or b"") + made_for.encode()

    def read(self) -> bytes | None:
        """Return the cached content; None if there is no valid file."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                content = (folder / self._name).read_bytes()
                end = len(content) - hashlib.sha256().digest_size
                if end > 0 and self._checksum(content[:end]) == content[end:]:
                    return content[:end]
        return None

    def write(self, content: bytes) -> None:
        """Write the content, atomically, to the first folder where that succeeds, if there is one."""
        if self._sources is None or self._sources.digest() is None:  # they changed while it was compiled
            return
        for folder in self._folders:
            unfinished = folder / f"{self._name}.{os.getpid()}.{threading.get_ident()}"
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    unfinished.write_bytes(content + self._checksum(content))
                    unfinished.replace(folder / self._name)
                finally:
                    unfinished.unlink(missing_ok=True)
                return

    def _checksum(self, content: bytes) -> bytes:
        return hashlib.sha256(self._made_from + content).digest()


class Sources:
    """The source files of the kernels in a folder: its modules, and the modules that compile them.

    A kernel is compiled from the imported module, but a new version may be installed while the process runs. Then this
    process must not load code cached for the new files, nor cache its own code under their hash. So the files are
    stat'ed when the first kernel is defined, and the cache is not used once they differ.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamps = self._stat_files()

    def digest(self) -> bytes | None:
        """Return a hash of the files; None if they have changed or cannot be read (in an archive, for example)."""
        try:
            digest = self._digest
        except OSError:
            return None
        return digest if self._stamps and self._stamps == self._stat_files() else None

    @functools.cached_property
    def _digest(self) -> bytes:
        digest = hashlib.sha256()
        for path in self._paths():
            digest.update(path.name.encode() + path.read_bytes())
        return digest.digest()

    def _stat_files(self) -> list[tuple[Any, ...]]:
        """Return name, inode, modification time and size of each file; an empty list if one cannot be stat'ed."""
        try:
            stats = [(path.name, path.stat()) for path in self._paths()]
        except OSError:
            return []
        return [(name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats]

    def _paths(self) -> Iterator[Path]:
        for name in ("compiled.py", "compiler.py", "kernel_arguments.py", "kernel_cache.py"):
            yield Path(__file__).with_name(name)
        yield from sorted(self._folder.glob("[!.]*.py"))  # an editor's lock is a link to nowhere, .#name.py


def sources_of(function: Callable[..., Any]) -> Sources | None:
    """Return the source files of a kernel; None if it must not be cached.

    Those are kernels of other packages, which may call functions from files not hashed here, and functions defined
    inside another function, which may share a qualified name.
    """
    if not function.__module__.startswith("adaptkit.") or "<locals>" in function.__qualname__:
        return None
    return _sources(os.path.dirname(function.__code__.co_filename))


@functools.cache
def _sources(folder: str) -> Sources:
    return Sources(Path(folder))


@functools.cache
def _folders(source: Path) -> list[Path]:
    """Return the folders where kernels of a source folder are cached, in the order in which they are searched."""
    folders = []
    with contextlib.suppress(NotImplementedError):  # this Python has no bytecode cache
        folders.append(Path(cache_from_source(str(source / "kernels.py"))).parent)
    folder = cache_folder()
    return [*folders, folder / "kernels"] if folder else folders


@functools.cache
def _processor() -> str:
    """Describe what the machine code depends on besides its source.

    That is llvmlite's version, the processor, numba's environment variables, and the size of a Python object's header,
    which precedes an array's fields: free-threaded Python has a larger header and may share the folders.
    """
    import llvmlite
    from llvmlite import binding

    settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
    settings = [setting for setting in settings if not setting.startswith(_IRRELEVANT_SETTINGS)]
    features = binding.get_host_cpu_features().flatten()
    head = f"head={object.__basicsize__}"
    return " ".join([llvmlite.__version__, binding.get_host_cpu_name(), features, head, *settings])


def _described(kind: Kind) -> str:
    """Return a text that is the same in every process and unique to the kind."""
    if kind is None or isinstance(kind, str):
        return str(kind)
    if isinstance(kind[0], type):
        fields = getattr(kind[0], "_fields", "")
        return f"{kind[0].__qualname__}{fields}({', '.join(map(_described, kind[1]))})"
    dtype, axes, flags = kind
    return f"{dtype}:{axes}:{flags}"  # dtype.str is the same for all structures of one size
