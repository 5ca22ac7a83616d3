"""Sixteen-bit copies of what adapters multiply with, all made at once before each forward pass on a GPU.

A and B are trained in float32 and multiplied in the activations' type. Rounded where they are used, every layer
launches two kernels for that in every pass: forward, forward again where activations are not kept, and backward. All at
once, sixty-four matrices are one launch, and the A of layers that are joined lie one below the other already.

The copies are what the parameters were when the network, or its body, was last called. Nobody calls a layer by itself
after changing them, and a backward pass comes before the next change anyway.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_COPY, _BELOW = "_adaptkit_narrow", "_adaptkit_narrow_below"
_ALIGNED = 64
"""Numbers that a matrix begins at a multiple of: products read sixteen bytes at a time."""


def keep_narrow(network: Any, dtype: torch.dtype, together: Sequence[Sequence[nn.Parameter]] = ()) -> None:
    """Keep copies of the A and B of a network's linear layers, in one buffer that is in no file.

    Args:
        network: of transformers, with its adapter, on its device.
        dtype: that it computes in; nothing is kept in float32.
        together: matrices of one width that are used one below the other.
    """
    halves = [getattr(module, name, None) for module in network.modules() for name in ("lora_a", "lora_b")]
    alone = {half for half in halves if isinstance(half, nn.Parameter) and half.dim() == 2}
    alone.difference_update(*together)
    units = [*together, *([half] for half in dict.fromkeys(halves) if half in alone)]
    if dtype == torch.float32 or not units:
        return
    sizes = [sum(half.numel() for half in unit) for unit in units]
    flat = torch.empty(sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes), dtype=dtype, device=units[0][0].device)
    copies, parameters, start = [], [], 0
    for unit, size in zip(units, sizes, strict=True):
        below = flat[start : start + size].view(-1, unit[0].shape[1])
        setattr(unit[0], _BELOW, below)
        for half, copy in zip(unit, torch.split(below, [len(half) for half in unit]), strict=True):
            setattr(half, _COPY, copy)
            copies.append(copy)
            parameters.append(half)
        start += -(-size // _ALIGNED) * _ALIGNED
    network.register_buffer("narrow_adapters", flat, persistent=False)  # so that it counts in what memory is predicted

    def refresh(*_: Any) -> None:
        with torch.no_grad():
            torch._foreach_copy_(copies, parameters)

    refresh()
    for called in {network, network.base_model}:  # some architectures run a part of their body by itself
        called.register_forward_pre_hook(refresh)


def narrowed(half: Tensor, dtype: torch.dtype) -> Tensor:
    """An A or a B in ``dtype``: its copy, if there is one."""
    copy: Tensor | None = getattr(half, _COPY, None)
    return copy if copy is not None and copy.dtype == dtype else half.to(dtype)


def narrowed_below(halves: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Several A, one below the other: (sum of ranks, in), in ``dtype``."""
    below: Tensor | None = getattr(halves[0], _BELOW, None)
    if below is not None and below.dtype == dtype and len(below) == sum(map(len, halves)):
        return below
    return torch.cat(tuple(halves)).to(dtype)
