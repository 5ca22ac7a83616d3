"""Where what the compiled kernels make lies in memory."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_VECTOR_BYTES = 64
"""Of the widest vectors that processors have, and of what they fetch at once."""


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
