"""Memory of unpacked stacks of experts on a CPU, kept for the next layer's.

The system clears new memory, which takes longer than decoding 4-bit weights into it. So the memory of stacks is kept
once they are freed. If none of a layer's stacks is trained, that is the memory of every size: all of them are alive at
once when the layer's forward pass ends, so keeping it adds next to nothing to the peak. Otherwise it is the memory of
the largest: the peak is then reached when little else is alive than the largest stack and its gradient.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes; that of torch's own memory, so that matrix products take the same paths."""


class StackMemory:
    """The memory of one network's stacks."""

    def __init__(self) -> None:
        self._largest = 0
        self._kept: Any = np.empty(0, np.uint8)
        self._lent: Callable[[], Any] = lambda: None
        self._by_size: dict[int, StackMemory] = {}

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, keeps_every_size: bool = False
    ) -> Tensor:
        """Return an uninitialized tensor; in the kept memory if it is as large as any before and that is not in use.

        With ``keeps_every_size``, in the memory that is kept for its size, unless that is in use.
        """
        size = math.prod(shape) * dtype.itemsize
        if keeps_every_size:
            return self._by_size.setdefault(size, StackMemory()).empty(shape, dtype, device)
        self._largest = max(self._largest, size)
        if device.type != "cpu" or size < self._largest or self._lent() is not None:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        if size > len(self._kept):
            self._kept = None  # freed before the larger memory is allocated
            self._kept = _aligned(size)
        part = self._kept[:]  # the tensor's storage holds this object, which dies with it
        self._lent = weakref.ref(part)
        stride = [math.prod(shape[place:]) for place in range(1, len(shape) + 1)]
        return torch.empty(0, dtype=dtype).set_(torch.from_numpy(part).untyped_storage(), 0, tuple(shape), stride)


def _aligned(size: int) -> Any:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]
