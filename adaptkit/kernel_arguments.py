"""How the arguments of a kernel are passed: in cells of eight bytes (see ``compiled``).

array      the address of its numpy object
tensor     its address, its shape and, unless it is contiguous, its strides in elements
number     its value
None       no cell
tuple      the cells of its elements
"""

import functools
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from adaptkit.kernel_cache import Kind

CONTIGUOUS, ALIGNED, WRITEABLE, IN_CELLS = 0x1, 0x100, 0x400, 0x10000
"""Bits of ``ndarray.flags.num``, and one for tensors, whose shape is in the cells."""


class Known:
    """An argument whose kind and cells are determined once: for arguments of many parts, used in many calls.

    Args:
        argument: arrays, tensors, numbers, and tuples of those; none may be resized or get other memory.

    Attributes:
        argument: the same.
        kind: its kind.
        cells: values of its cells.
    """

    def __init__(self, argument: Any) -> None:
        self.argument = argument
        self.cells: list[Any] = []
        self.kind = kind_of(argument, self.cells)

    def __reduce__(self) -> tuple[Any, ...]:
        return Known, (self.argument,)  # a copy has its own cells: they hold addresses


def kind_of(argument: Any, cells: list[Any]) -> Kind:
    """Return the kind of an argument (see ``kernel_cache.Kind``), and append the values of its cells to ``cells``."""
    number = _NUMBER_FORMATS.get(type(argument))
    if number is not None:
        cells.append(argument)
        return number
    if getattr(argument, "is_cpu", False):
        return _kind_of_tensor(argument, cells)
    if isinstance(argument, np.ndarray):
        flags = argument.flags.num & (CONTIGUOUS | ALIGNED | WRITEABLE)
        cells.append(id(argument))
        return argument.dtype, argument.ndim, flags
    if isinstance(argument, tuple):
        return type(argument), tuple([kind_of(part, cells) for part in argument])
    if isinstance(argument, Known):
        cells += argument.cells
        return argument.kind
    if argument is None:
        return None
    raise TypeError(f"a kernel cannot read {type(argument).__name__}")


def _kind_of_tensor(tensor: Any, cells: list[Any]) -> Kind:
    """Do as ``kind_of``. Making a numpy array of a tensor takes six calls into torch, some microseconds."""
    address, is_contiguous = tensor.data_ptr(), tensor.is_contiguous()
    if not address and tensor.numel():
        raise TypeError(f"a kernel cannot read a {type(tensor).__name__} without memory")
    cells.append(address)
    cells += tensor.shape
    if not is_contiguous:
        cells += tensor.stride()
    dtype, size = _array_dtype(tensor.dtype)
    return dtype, tensor.dim(), _TENSOR_FLAGS[is_contiguous, address % size == 0]


_TENSOR_FLAGS = {
    (is_contiguous, is_aligned): IN_CELLS | WRITEABLE | CONTIGUOUS * is_contiguous | ALIGNED * is_aligned
    for is_contiguous in (False, True)
    for is_aligned in (False, True)
}


@functools.cache
def _array_dtype(dtype: Any) -> tuple[Any, int]:
    """Return the numpy dtype for a torch dtype, and its size in bytes."""
    name = str(dtype).removeprefix("torch.")
    if name in ("uint16", "int16"):
        raise TypeError(f"a kernel would take {name} for bits of a short float")
    found = np.dtype({"bfloat16": "uint16", "float16": "int16"}.get(name, name))
    return found, found.itemsize


_NUMBER_FORMATS: dict[type, str] = {bool: "?", int: "q", float: "d"}
_NUMBER_FORMATS |= {np.dtype(letter).type: np.dtype(letter).char for letter in "?bBhHiIlLqQfd"}
"""Maps number types to format characters, which are the same in numpy and ``struct``."""


def formats(kind: Kind) -> Iterator[str]:
    """Yield the ``struct`` formats of the cells of an argument."""
    if isinstance(kind, str):
        yield f"{kind}{8 - struct.calcsize(kind)}x"
    elif kind is not None and isinstance(kind[0], type):
        for part in kind[1]:
            yield from formats(part)
    elif kind is not None:
        _, axes, flags = kind
        yield f"{1 + (axes if flags & CONTIGUOUS else 2 * axes)}q" if flags & IN_CELLS else "Q"
