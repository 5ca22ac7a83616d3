"""Aligned allocation of the arrays that compiled kernels write."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_VECTOR_BYTES = 64
"""Bytes of the widest vectors, and of a cache line."""


def empty(shape: int | Sequence[int], dtype: Any) -> Any:
    """Return an uninitialized array aligned to ``_VECTOR_BYTES``; numpy aligns to 16 bytes only."""
    shape, dtype = (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _VECTOR_BYTES, np.uint8)
    start = -memory.ctypes.data % _VECTOR_BYTES
    return memory[start : start + size].view(dtype).reshape(shape)


def zeros(shape: int | Sequence[int], dtype: Any) -> Any:
    """Return an array of zeros aligned to ``_VECTOR_BYTES``."""
    made = empty(shape, dtype)
    made.fill(0)
    return made
