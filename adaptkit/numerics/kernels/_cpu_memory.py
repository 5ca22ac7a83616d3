"""How the compiled kernels are compiled, and where what they make lies in memory."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from importlib.resources import files
from io import BytesIO
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.runtime import rtsys
from numba.extending import intrinsic

from adaptkit.errors import UsageError

if numba.config.DISABLE_JIT:
    raise UsageError("NUMBA_DISABLE_JIT is set: kernels cannot run uncompiled", hint="unset it")

_VECTOR_BYTES = 64
"""Of the widest vectors that processors have, and of what they fetch at once."""

INLINED = {"error_model": "numpy", "forceinline": True}
"""Options of what is small, and called where a call would keep the compiler from making vectors."""


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a kernel: it is compiled when it is called first, and kept on the disk for the next process.

    Args:
        options: of ``numba.njit``, beside those that all kernels have.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        kernel = numba.njit(**{"nogil": True, "error_model": "numpy", **options})(function)
        kernel._cache = _Kept(function)
        return kernel

    return decorate


class _Kept(NullCache):  # type: ignore[misc]
    """What numba keeps of a kernel on the disk; the disk is not asked before the kernel is called.

    numba's own makes everything ready for compiling first, which takes longer than the loading.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @cached_property
    def _files(self) -> Any:
        try:
            cache = FunctionCache(self._function)
        except RuntimeError:  # no folder that can be written: every process compiles for itself
            return NullCache()
        with contextlib.suppress(AttributeError):  # of another version of numba, which then keeps them in its own way
            # It compiles again what stands in a file that changed, but not what calls that from another file.
            stamp = cache._impl.locator.get_source_stamp(), _sources()
            cache._cache_file = _Sealed(cache._cache_path, cache._impl.filename_base, stamp)
        return cache

    def load_overload(self, signature: Any, target: Any) -> Any:
        """What was kept, or None."""
        rtsys.initialize(target)
        return getattr(self._files, "_load_overload", self._files.load_overload)(signature, target)

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what was compiled, if there is room."""
        with contextlib.suppress(OSError):
            self._files.save_overload(signature, result)


class _Sealed(IndexDataCacheFile):  # type: ignore[misc]
    """numba's files, with a hash behind each: it writes them without a sync, and runs what a power cut left of them."""

    @contextlib.contextmanager
    def _open_for_write(self, path: str) -> Iterator[BytesIO]:
        content = BytesIO()
        yield content
        with super()._open_for_write(path) as file:
            file.write(content.getvalue() + _seal(content.getvalue()))

    def _load_index(self) -> Any:
        return super()._load_index() if _is_whole(self._index_path) else {}

    def _load_data(self, name: str) -> Any:
        if not _is_whole(self._data_path(name)):
            raise FileNotFoundError(name)  # numba takes it for one that was removed
        return super()._load_data(name)


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _is_whole(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return False
    end = len(content) - len(_seal(b""))
    return end >= 0 and _seal(content[:end]) == content[end:]


@cache
def _sources() -> bytes:
    """A hash of this folder's modules, which is all that the kernels are made of."""
    digest = hashlib.sha256()
    modules = [entry for entry in files(__package__).iterdir() if entry.name.endswith(".py")]
    for module in sorted(modules, key=lambda module: module.name):
        digest.update(module.name.encode() + module.read_bytes())
    return digest.digest()


jit = compiled()
inlined = compiled(**INLINED)


@intrinsic
def wide(typingctx):  # type: ignore[no-untyped-def]
    """Let the function that calls this have vectors of 64 bytes where there are any.

    The compiler takes half of that, as the first processors that had them ran slower meanwhile. Where much is computed
    of few numbers from memory, the whole is a quarter faster on later ones.
    """

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite knows other attributes only
        return context.get_dummy_value()

    return types.void(), codegen


def empty(shape: int | Sequence[int], dtype: Any) -> Any:
    """An array of anything that begins where a vector does; numpy's own begin at a multiple of 16 bytes."""
    shape, dtype = (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _VECTOR_BYTES, np.uint8)
    start = -memory.ctypes.data % _VECTOR_BYTES
    return memory[start : start + size].view(dtype).reshape(shape)


def zeros(shape: int | Sequence[int], dtype: Any) -> Any:
    """The same, of zeros."""
    made = empty(shape, dtype)
    made.fill(0)
    return made
