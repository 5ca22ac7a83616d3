"""Kernels that numba compiles, cached as machine code and loaded without numba.

Importing numba and compiling takes longer than many commands need to process a gigabyte. So the machine code of a
kernel is cached for each list of argument types, beside Python's bytecode or, if that folder is not writable, in the
user's cache folder. The next process needs only LLVM's loader. ``compiler`` has the part that needs numba.

A kernel takes numpy arrays, torch tensors on the CPU, numbers, None and tuples of those, and returns nothing, a number,
or a tuple of numbers. It allocates nothing. A tensor is an array to it, with bfloat16 as uint16 and float16 as int16.
See ``kernel_arguments`` for how they are passed. Results are written to the first cells.
"""

import contextlib
import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from adaptkit.kernel_arguments import formats, kind_of
from adaptkit.kernel_cache import CacheEntry, Kind, sources_of

INLINED = {"forceinline": True}
"""Options for small functions called in loops that would not be vectorized around a real call."""

_lock = threading.RLock()
_after_loading: list[Callable[[], None]] = []
unregistered: "list[Overload | LazyIntrinsic]" = []
"""What must be registered with numba before it compiles the next kernel."""


class Kernel:
    """A function that is compiled, or loaded from the cache, when it is first called with arguments of some types.

    If another kernel calls it, it is compiled into that kernel.

    Args:
        function: the Python function to compile.
        options: options of ``numba.njit``.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self.function, self.options = function, options
        self._entries: dict[tuple[Kind, ...], _Entry] = {}
        sources_of(function)

    def __call__(self, *arguments: Any) -> Any:
        """Run the kernel without holding the GIL."""
        entry, cells = self._prepare(arguments)
        return entry(cells)

    def _prepare(self, arguments: tuple[Any, ...], *more: Kind) -> tuple["_Entry", list[Any]]:
        """Return the machine code for arguments of these kinds and ``more``, and the values of the former's cells."""
        cells: list[Any] = []
        kinds = (*[kind_of(argument, cells) for argument in arguments], *more)
        return self._entries.get(kinds) or self._load(kinds), cells

    def _load(self, kinds: tuple[Kind, ...]) -> "_Entry":
        with _lock:
            entry = self._entries.get(kinds)
            if entry is None:
                kept = CacheEntry(self.function, self.options, kinds)
                content = kept.read()
                if content is None:
                    content = import_module("adaptkit.compiler").compile_kernel(self, kinds)
                    kept.write(content)
                entry = self._entries[kinds] = _Entry(kinds, content)
                _report_loading()
        return entry


class LazyIntrinsic:
    """A reference to a numba intrinsic for use in kernels; its module is imported only to compile a kernel."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        unregistered.append(self)

    @property
    def intrinsic(self) -> Any:
        """The intrinsic, from its module, which imports numba."""
        return getattr(import_module(self._module), self._name)


class Overload(NamedTuple):
    """A function, and ``choose``, which returns the implementation that kernels run instead; see ``overload``."""

    of: Callable[..., Any]
    choose: Callable[..., Any]


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a kernel.

    Args:
        options: options of ``numba.njit``, in addition to those of all kernels.
    """
    return lambda function: Kernel(function, options)


def overload(of: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function that returns the implementation of ``of`` in kernels for numba's types of its arguments.

    numba's decorator of that name does the same, but needs numba when the module is imported.
    """

    def register(choose: Callable[..., Any]) -> Callable[..., Any]:
        unregistered.append(Overload(of, choose))
        return choose

    return register


def lazy_intrinsic(module: str, name: str) -> Any:
    """Refer to an intrinsic of a module that imports numba; see ``LazyIntrinsic``."""
    return LazyIntrinsic(module, name)


@functools.cache
def processor_features() -> frozenset[str] | None:
    """Return LLVM's names of the features of this processor; None if numba is set to compile for another one."""
    if os.environ.get("NUMBA_CPU_NAME") or "NUMBA_CPU_FEATURES" in os.environ:
        return None
    from llvmlite import binding

    found = frozenset(name for name, there in binding.get_host_cpu_features().items() if there)
    without = os.environ.get("NUMBA_ENABLE_AVX", "1") == "0"
    return frozenset(name for name in found if not name.startswith("avx")) if without else found


def after_loading(callback: Callable[[], None]) -> None:
    """Register a callback that is called after each kernel, or other code, that is loaded or compiled."""
    _after_loading.append(callback)


def _report_loading() -> None:
    for callback in _after_loading:
        callback()


jit = compiled()
inlined = compiled(**INLINED)


class _Entry:
    """Machine code for arguments of some kinds.

    Args:
        kinds: kinds of the arguments.
        content: a header line (name of the function, "tuple" or "single", formats of the results), then an object file.

    Attributes:
        address: address of the function.
        pack: packs the values of the cells into bytes.
        returns: whether the kernel returns anything.
    """

    def __init__(self, kinds: tuple[Kind, ...], content: bytes) -> None:
        head, _, code = content.partition(b"\n")
        name, self._many, *letters = head.decode().split(" ")
        cells = "".join(form for kind in kinds for form in formats(kind))
        self.pack = struct.Struct(cells).pack
        self._results = struct.Struct("".join(f"{letter}{8 - struct.calcsize(letter)}x" for letter in letters))
        self.returns = self._results.size > 0
        self._engine, self.address = _load_object(code, name)
        pointer = ctypes.c_void_p
        self._function = ctypes.CFUNCTYPE(ctypes.c_int32, pointer, pointer, pointer)(self.address)
        _check_layout()

    def run(self, cells: list[Any]) -> None:
        """Run a kernel that returns nothing."""
        status = self._function(_unused, _unused, self.pack(*cells))
        if status:
            raise SystemError(f"a kernel failed ({status})")

    def __call__(self, cells: list[Any]) -> Any:
        packed: Any = self.pack(*cells)
        if self._results.size:
            packed = ctypes.create_string_buffer(packed, max(len(packed), self._results.size))
        status = self._function(_unused, _unused, packed)
        if status:
            raise SystemError(f"a kernel failed ({status})")
        if self._many == "tuple":
            return self._results.unpack_from(packed)
        return self._results.unpack_from(packed)[0] if self._results.size else None


DATA = object.__basicsize__
EXTENTS, STRIDES = DATA + 16, DATA + 24
"""Offsets in a numpy array object of its pointers to data, shape and strides; part of numpy's C ABI."""

_memory = ctypes.create_string_buffer(8)
_unused = ctypes.addressof(_memory)
"""Address passed for the result and the exception in numba's calling convention; kernels use neither."""


@functools.cache
def _check_layout() -> None:
    """Raise ``SystemError`` if numpy's arrays do not have this layout."""
    array = np.zeros((3, 5), np.int32)[::2, ::3]
    data, *axes = (ctypes.c_void_p.from_address(id(array) + place).value for place in (DATA, EXTENTS, STRIDES))
    found = [tuple((ctypes.c_ssize_t * 2).from_address(address or id(array))) for address in axes]
    if (data, *found) != (array.ctypes.data, array.shape, array.strides):
        raise SystemError(f"numpy {np.__version__} has an unknown array layout")


def _load_object(code: bytes, name: str) -> tuple[Any, int]:
    """Link an object file into this process; return the engine that keeps it loaded, and the address of a function."""
    from llvmlite import binding

    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine, engine.get_function_address(name)


def load_text(text: str, name: str) -> tuple[Any, int]:
    """Compile LLVM IR into this process; return the engine that keeps it loaded, and the address of a function."""
    from llvmlite import binding

    machine = _machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(text), machine)
    engine.finalize_object()
    address = engine.get_function_address(name)
    _report_loading()
    return engine, address


def _machine() -> Any:
    from llvmlite import binding

    with contextlib.suppress(RuntimeError):  # newer versions of llvmlite initialize LLVM themselves
        binding.initialize()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine(jit=True)
