"""Pinned host memory, which a GPU reads and writes by itself; systems may allow less of it than they have."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def pinned(make: Callable[..., Tensor], *arguments: Any, **named: Any) -> Tensor | None:
    """What a function of torch's makes, such as ``torch.zeros``, in pinned memory; None if there is no more of it."""
    try:
        return make(*arguments, **named, pin_memory=True)
    except RuntimeError:
        return None


class HostMemory:
    """Host memory for what leaves a device: beside a GPU pinned, and any other where that cannot be had.

    Copies to and from any other give the same bytes, but the host waits for each.

    Args:
        device: that copies.

    Attributes:
        is_short: whether memory that should be pinned is not.
    """

    def __init__(self, device: torch.device) -> None:
        self._pins = device.type == "cuda"
        self.is_short = False

    def make(self, make: Callable[..., Tensor], *arguments: Any, **named: Any) -> Tensor:
        """What a function of torch's makes, such as ``torch.zeros``."""
        found = pinned(make, *arguments, **named) if self._pins else None
        if found is not None:
            return found
        self.is_short = self._pins
        return make(*arguments, **named)
