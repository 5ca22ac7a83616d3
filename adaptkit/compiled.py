"""Loops that numba compiles, kept as machine code and loaded without numba.

numba and what it loads take longer than many a command needs for a gigabyte, and most of that is for compiling. So what
it made of a kernel is kept beside Python's bytecode (or in the user's cache folder, where that cannot be written), for
each list of argument types, and the next process needs nothing but LLVM's loader. ``compiler`` has the other half.

A kernel takes numpy arrays, numbers, None and tuples of those, and gives nothing, a number, or a tuple of numbers. It
allocates nothing. Arguments are passed in cells of eight bytes: an array as where its object is, a number as itself,
None as nothing. Results come back in the first cells.
"""

import contextlib
import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from adaptkit.kept import Kept, Kind, sources_of

_CONTIGUOUS, _ALIGNED, _WRITEABLE = 0x1, 0x100, 0x400
"""Bits of numpy's flags."""

INLINED = {"forceinline": True}
"""Options of what is small, and called where a call would keep the compiler from making vectors."""

_lock = threading.RLock()
_after_loading: list[Callable[[], None]] = []
untold: "list[Overload | Written]" = []
"""What numba has to be told of before it compiles a kernel."""


class Kernel:
    """A function of arrays, in machine code from when it is called first.

    Called by another kernel, it is compiled into that one.

    Args:
        function: what is compiled.
        options: of ``numba.njit``.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self.function, self.options = function, options
        self._entries: dict[tuple[Kind, ...], _Entry] = {}
        sources_of(function)

    def __call__(self, *arguments: Any) -> Any:
        """Run it, while other threads go on."""
        entry, cells = self._prepare(arguments)
        return entry(cells)

    def _prepare(self, arguments: tuple[Any, ...]) -> tuple["_Entry", list[Any]]:
        """The machine code for arguments of such kinds, and what is passed of them."""
        cells: list[Any] = []
        kinds = tuple([_kind(argument, cells) for argument in arguments])
        return self._entries.get(kinds) or self._load(kinds), cells

    def _load(self, kinds: tuple[Kind, ...]) -> "_Entry":
        with _lock:
            entry = self._entries.get(kinds)
            if entry is None:
                kept = Kept(self.function, self.options, kinds)
                content = kept.read()
                if content is None:
                    content = import_module("adaptkit.compiler").compile_kernel(self, kinds)
                    kept.write(content)
                entry = self._entries[kinds] = _Entry(kinds, content)
                for callback in _after_loading:
                    callback()
        return entry


class Written:
    """Stands in kernels for what another module writes in LLVM's own instructions; loaded when one is compiled."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        untold.append(self)

    @property
    def intrinsic(self) -> Any:
        """What the module has."""
        return getattr(import_module(self._module), self._name)


class Overload(NamedTuple):
    """A function, and what chooses the one that kernels run in its place."""

    of: Callable[..., Any]
    choose: Callable[..., Any]


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a kernel.

    Args:
        options: of ``numba.njit``, beside those that all kernels have.
    """
    return lambda function: Kernel(function, options)


def overload(of: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate what chooses, by numba's types of the arguments, what kernels that call a function run in its place."""

    def register(choose: Callable[..., Any]) -> Callable[..., Any]:
        untold.append(Overload(of, choose))
        return choose

    return register


def written(module: str, name: str) -> Any:
    """Stand for an intrinsic of a module that needs numba."""
    return Written(module, name)


@functools.cache
def processor_features() -> frozenset[str] | None:
    """What the processor for which kernels are compiled is known to have; None if numba is told of another one."""
    if os.environ.get("NUMBA_CPU_NAME") or "NUMBA_CPU_FEATURES" in os.environ:
        return None
    from llvmlite import binding

    found = frozenset(name for name, there in binding.get_host_cpu_features().items() if there)
    without = os.environ.get("NUMBA_ENABLE_AVX", "1") == "0"
    return frozenset(name for name in found if not name.startswith("avx")) if without else found


def after_loading(callback: Callable[[], None]) -> None:
    """Have something called whenever a kernel was loaded or compiled."""
    _after_loading.append(callback)


jit = compiled()
inlined = compiled(**INLINED)


def _kind(argument: Any, cells: list[Any]) -> Kind:
    """Say of what kind an argument is, and append what is passed of it."""
    if isinstance(argument, np.ndarray):
        flags = argument.flags.num & (_CONTIGUOUS | _ALIGNED | _WRITEABLE)
        cells.append(id(argument))
        return argument.dtype, argument.ndim, flags
    if isinstance(argument, tuple):
        return type(argument), tuple([_kind(part, cells) for part in argument])
    if argument is None:
        return None
    cells.append(argument)
    if isinstance(argument, np.generic):
        return argument.dtype.char
    return _OF_NUMBERS[type(argument)]


_OF_NUMBERS = {bool: "?", int: "q", float: "d"}
"""The letters that numpy and ``struct`` have for them."""


def _formats(kind: Kind) -> Iterator[str]:
    """How ``struct`` packs what is passed of an argument."""
    if isinstance(kind, str):
        yield f"{kind}{8 - struct.calcsize(kind)}x"
    elif kind is not None and isinstance(kind[0], type):
        for part in kind[1]:
            yield from _formats(part)
    elif kind is not None:
        yield "Q"


class _Entry:
    """Machine code for arguments of some kinds.

    Args:
        kinds: of the arguments.
        content: a line that says what it is called and what it gives, and an object file.

    Attributes:
        address: of the function.
        pack: makes bytes of what is passed of the arguments.
    """

    def __init__(self, kinds: tuple[Kind, ...], content: bytes) -> None:
        head, _, code = content.partition(b"\n")
        name, self._many, *letters = head.decode().split(" ")
        formats = "".join(form for kind in kinds for form in _formats(kind))
        self.pack = struct.Struct(formats).pack
        self._results = struct.Struct("".join(f"{letter}{8 - struct.calcsize(letter)}x" for letter in letters))
        self._engine, self.address = _load_object(code, name)
        pointer = ctypes.c_void_p
        self._function = ctypes.CFUNCTYPE(ctypes.c_int32, pointer, pointer, pointer)(self.address)
        _check_layout()

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
"""Where an array of numpy has the addresses of its data, extents and strides; C programs are compiled to that, too."""

_memory = ctypes.create_string_buffer(8)
_unused = ctypes.addressof(_memory)
"""Where numba would put a result, or an exception."""


@functools.cache
def _check_layout() -> None:
    """Refuse a numpy whose arrays have something else there."""
    array = np.zeros((3, 5), np.int32)[::2, ::3]
    data, *axes = (ctypes.c_void_p.from_address(id(array) + place).value for place in (DATA, EXTENTS, STRIDES))
    found = [tuple((ctypes.c_ssize_t * 2).from_address(address or id(array))) for address in axes]
    if (data, *found) != (array.ctypes.data, array.shape, array.strides):
        raise SystemError(f"numpy {np.__version__} has an unknown array layout")


def _load_object(code: bytes, name: str) -> tuple[Any, int]:
    """Link an object file into this process; what keeps it there, and where a function is."""
    from llvmlite import binding

    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine, engine.get_function_address(name)


def load_text(text: str, name: str) -> tuple[Any, int]:
    """Compile a module in LLVM's language into this process; what keeps it there, and where a function is."""
    from llvmlite import binding

    machine = _machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(text), machine)
    engine.finalize_object()
    return engine, engine.get_function_address(name)


def _machine() -> Any:
    from llvmlite import binding

    with contextlib.suppress(RuntimeError):  # newer versions do so by themselves
        binding.initialize()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine(jit=True)
