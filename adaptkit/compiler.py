"""Compilation of kernels by numba, needed once for every list of argument types; see ``compiled``."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload, typeof_impl
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import as_dtype, from_dtype

from adaptkit.compiled import (
    DATA,
    EXTENTS,
    INLINED,
    STRIDES,
    Kernel,
    LazyIntrinsic,
    Overload,
    processor_features,
    unregistered,
)
from adaptkit.errors import UsageError
from adaptkit.kernel_arguments import ALIGNED, CONTIGUOUS, IN_CELLS, WRITEABLE
from adaptkit.kernel_cache import Kind

if numba.config.DISABLE_JIT:
    raise UsageError("NUMBA_DISABLE_JIT is set: kernels cannot run uncompiled", hint="unset NUMBA_DISABLE_JIT")
_features = processor_features()
_without_avx = not numba.config.ENABLE_AVX and any(name.startswith("avx512") for name in _features or ())
if _features is not None and (numba.config.CPU_NAME or numba.config.CPU_FEATURES is not None or _without_avx):
    raise UsageError(
        "numba's configuration file makes it compile for another processor than this one",
        hint="set NUMBA_CPU_NAME, NUMBA_CPU_FEATURES or NUMBA_ENABLE_AVX in the environment instead",
    )

_OPTIONS = {
    **{"error_model": "numpy", "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True},
    **{"fastmath": False, "forceinline": False},
}
"""Options of all kernels: no exception for a division by zero, no reference counting, no wrappers for Python or C.

``fastmath`` and ``forceinline`` are set explicitly because a function inherits options it does not set from the caller
that has it compiled first. If a sum that may be reordered called ``exponential`` first, the exponential would be
reordered for every caller in that process, and results would differ between processes.
"""

_LIBC_FUNCTIONS = {"memcpy", "memmove", "memset", "sqrt", "sqrtf", "log", "logf"}
"""Functions of the C library, which kernels may call since they are in every process."""


def compile_kernel(kernel: Kernel, kinds: tuple[Kind, ...]) -> bytes:
    """Compile a kernel for arguments of some kinds; return the content that ``compiled._Entry`` reads."""
    _register_with_numba()
    dispatcher = _dispatcher(kernel)
    arguments = tuple(map(_type_of, kinds))
    entry = numba.njit(**_OPTIONS)(_entry(dispatcher, kinds))
    entry.compile((types.CPointer(types.int64),))
    (made,) = entry.overloads.values()
    if made.library.has_dynamic_globals:
        raise SystemError(f"{kernel.function.__qualname__} cannot be kept: addresses of this process are in its code")
    name = made.fndesc.llvm_func_name
    module = llvm.parse_assembly(made.library.get_llvm_str())
    missing = {function.name for function in module.functions if function.is_declaration} - _LIBC_FUNCTIONS
    missing = {symbol for symbol in missing if not symbol.startswith("llvm.")}
    if missing:
        raise SystemError(f"{kernel.function.__qualname__} cannot be loaded without numba: it calls {sorted(missing)}")
    found = dispatcher.overloads[arguments].signature.return_type
    many = isinstance(found, types.BaseTuple)
    parts = [] if found == types.none else list(found) if many else [found]
    letters = [np.dtype(bool).char if part == types.boolean else as_dtype(part).char for part in parts]
    head = " ".join([name, "tuple" if many else "single", *letters])
    return head.encode() + b"\n" + _emit(module, made.library)


def _emit(module: Any, library: Any) -> bytes:
    """Return an object file of a module that numba optimized, for numba's target processor."""
    triple, processor, features = library.codegen.magic_tuple()
    static = {"reloc": "static"} if triple.startswith("x86") else {}
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=processor, features=features, opt=3, jit=True, codemodel="jitdefault", **static
    )
    code: bytes = machine.emit_object(module)
    return code


def _dispatcher(kernel: Kernel) -> Any:
    """Return numba's dispatcher for a kernel, made on first use."""
    if "dispatcher" not in vars(kernel):
        vars(kernel)["dispatcher"] = numba.njit(**{**_OPTIONS, **kernel.options})(kernel.function)
    return vars(kernel)["dispatcher"]


def _register_with_numba() -> None:
    """Register new overloads and intrinsics with numba, which ignores those registered while it compiles."""
    while unregistered:
        found = unregistered[0]
        if isinstance(found, Overload):
            overload(found.of, jit_options={**_OPTIONS, **INLINED})(found.choose)
        else:
            _ = found.intrinsic  # importing its module registers it
        del unregistered[0]  # only now: an interrupt may come before it is registered


@typeof_impl.register(Kernel)
def _typeof_kernel(kernel, context):
    return numba.typeof(_dispatcher(kernel))


@typeof_impl.register(LazyIntrinsic)
def _typeof_intrinsic(found, context):
    return numba.core.registry.cpu_target.typing_context.resolve_value_type(found.intrinsic)


def _type_of(kind: Kind) -> Any:
    """Return numba's type for an argument."""
    if kind is None:
        return types.none
    if isinstance(kind, str):
        return from_dtype(np.dtype(kind))
    if isinstance(kind[0], type):
        return types.BaseTuple.from_types(tuple(map(_type_of, kind[1])), kind[0])
    dtype, axes, flags = kind
    layout = "C" if flags & CONTIGUOUS else "A"
    return types.Array(from_dtype(dtype), axes, layout, not flags & WRITEABLE, aligned=bool(flags & ALIGNED))


def _entry(dispatcher: Any, kinds: tuple[Kind, ...]) -> Any:
    """Make a function that takes cells and calls a kernel; see ``compiled`` for the cells."""
    whole = types.Tuple(tuple(map(_type_of, kinds)))

    @intrinsic
    def enter(typingctx, cells):
        def codegen(context, builder, signature, values):
            reader = _Reader(context, builder, values[0])
            return context.make_tuple(builder, whole, [reader.read(kind) for kind in kinds])

        return whole(cells), codegen

    @intrinsic
    def leave(typingctx, cells, result):
        def codegen(context, builder, signature, values):
            many = isinstance(result, types.BaseTuple)
            parts = cgutils.unpack_tuple(builder, values[1]) if many else [values[1]]
            kinds = list(result) if many else [] if result == types.none else [result]
            for place, kind in enumerate(kinds):
                cell = builder.gep(values[0], [cgutils.intp_t(place)])
                data = context.get_data_type(kind).as_pointer()
                context.pack_value(builder, kind, parts[place], builder.bitcast(cell, data))
            return context.get_dummy_value()

        return types.void(cells, result), codegen

    def entry(cells):
        leave(cells, dispatcher(*enter(cells)))

    return entry


class _Reader:
    """Emits code that reads arguments from cells, in order."""

    def __init__(self, context, builder, cells):
        self._context, self._builder, self._cells = context, builder, cells
        self._place = 0

    def read(self, kind):
        """Read the next argument, given its ``kernel_cache.Kind``."""
        found = _type_of(kind)
        if isinstance(found, types.BaseTuple):
            return self._context.make_tuple(self._builder, found, [self.read(part) for part in kind[1]])
        if isinstance(found, types.NoneType):
            return self._context.get_dummy_value()
        if not isinstance(found, types.Array):
            return self._number(found)
        return self._array(found, *(self._tensor(found) if kind[2] & IN_CELLS else self._object(found)))

    def _number(self, kind):
        cell = self._builder.gep(self._cells, [cgutils.intp_t(self._place)])
        self._place += 1
        data = self._context.get_data_type(kind).as_pointer()
        return self._context.unpack_value(self._builder, kind, self._builder.bitcast(cell, data))

    def _field(self, place, offset):
        """Load the 64-bit word at an address plus an offset."""
        builder = self._builder
        at = builder.add(place, cgutils.intp_t(offset))
        return builder.load(builder.inttoptr(at, cgutils.intp_t.as_pointer()))

    def _fields(self, place, offset, count):
        """Load the first ``count`` words of the memory that an object's field points to."""
        memory = self._field(place, offset)
        return [self._field(memory, 8 * number) for number in range(count)]

    def _object(self, kind):
        """Return address, shape and strides (in bytes; None if contiguous) of an array passed by its numpy object."""
        place = self._number(types.intp)
        strides = None if kind.layout == "C" else self._fields(place, STRIDES, kind.ndim)
        return self._field(place, DATA), self._fields(place, EXTENTS, kind.ndim), strides

    def _tensor(self, kind):
        """Return the same of a tensor."""
        data, *shape = (self._number(types.intp) for _ in range(1 + kind.ndim))
        if kind.layout == "C":
            return data, shape, None
        steps = [self._number(types.intp) for _ in shape]
        return data, shape, [self._builder.mul(step, self._size_of(kind)) for step in steps]

    def _size_of(self, kind):
        return cgutils.intp_t(self._context.get_abi_sizeof(self._context.get_data_type(kind.dtype)))

    def _array(self, kind, data, shape, strides):
        context, builder, size = self._context, self._builder, self._size_of(kind)
        if strides is None:
            strides = [size]
            for extent in reversed(shape[1:]):
                strides.insert(0, builder.mul(strides[0], extent))
        data = builder.inttoptr(data, context.get_data_type(kind.dtype).as_pointer())
        array = make_array(kind)(context, builder)
        populate_array(array, data=data, shape=shape, strides=strides[: kind.ndim], itemsize=size, meminfo=None)
        return array._getvalue()
