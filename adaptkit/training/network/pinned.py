"""Pinned host memory, which a GPU can access directly; systems may allow less of it than they have memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def pinned(make: Callable[..., Tensor], *arguments: Any, **named: Any) -> Tensor | None:
    """Call a torch factory function, such as ``torch.zeros``, with pinned memory; None if it cannot be allocated."""
    try:
        return make(*arguments, **named, pin_memory=True)
    except RuntimeError:
        return None


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from host memory to a device, without waiting for what a GPU has yet to do.

    Copies of more than 64 KiB from pageable memory would wait for it.
    """
    if device.type == "cuda":
        place = pinned(torch.empty_like, tensor)
        tensor = tensor if place is None else place.copy_(tensor)
    return tensor.to(device, non_blocking=True)


class HostMemory:
    """Host memory for tensors that are moved off a device: pinned for a GPU, falling back to pageable memory.

    Copies to and from pageable memory give the same bytes, but the host waits for each.

    Args:
        device: device that the tensors are copied from and to.

    Attributes:
        is_short: whether memory that should have been pinned is pageable.
    """

    def __init__(self, device: torch.device) -> None:
        self._pins = device.type == "cuda"
        self.is_short = False

    def make(self, make: Callable[..., Tensor], *arguments: Any, **named: Any) -> Tensor:
        """Call a torch factory function, such as ``torch.zeros``, with this kind of memory."""
        found = pinned(make, *arguments, **named) if self._pins else None
        if found is not None:
            return found
        self.is_short = self._pins
        return make(*arguments, **named)
