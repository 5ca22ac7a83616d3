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
        self._kept: dict[int, Any] = {}  # by size
        self._lent: dict[int, Callable[[], Any]] = {}

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, keeps_every_size: bool = False
    ) -> Tensor:
        """Return an uninitialized tensor, in the memory that is kept for its size unless that is in use.

        Args:
            shape: its shape.
            dtype: its type.
            device: its device; only memory of a CPU is kept.
            keeps_every_size: whether to keep its memory even if it is smaller than that of another tensor.
        """
        size = math.prod(shape) * dtype.itemsize
        is_kept = keeps_every_size or size >= max(self._kept, default=0)
        if device.type != "cpu" or not is_kept or (size in self._lent and self._lent[size]() is not None):
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        if size not in self._kept:
            if not keeps_every_size:
                self._kept.clear()  # freed before the larger memory is allocated
            self._kept[size] = _aligned(size)
        part = self._kept[size][:]  # the tensor's storage holds this object, which dies with it
        self._lent[size] = weakref.ref(part)
        stride = [math.prod(shape[place:]) for place in range(1, len(shape) + 1)]
        return torch.empty(0, dtype=dtype).set_(torch.from_numpy(part).untyped_storage(), 0, tuple(shape), stride)


def _aligned(size: int) -> Any:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]
