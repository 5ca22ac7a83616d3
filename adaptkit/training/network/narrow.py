"""16-bit copies of adapter matrices, all made at once before each forward pass on a GPU.

A and B are trained in float32 and multiplied in the activations' type. Cast where they are used, every layer would
launch two kernels in every pass: forward, recomputation, and backward. Cast together, sixty-four matrices take one
launch, and the A matrices of joined layers are already concatenated along rows.

The copies hold the parameters' values at the last call of the network or its body. They are never stale: no code calls
a layer by itself after changing parameters, and a backward pass runs before the next change.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_COPY, _BELOW = "_adaptkit_narrow", "_adaptkit_narrow_below"
_ALIGNED = 64
"""Each matrix begins at a multiple of this many elements, since matrix products read sixteen bytes at a time."""


def keep_narrow(network: Any, dtype: torch.dtype, together: Sequence[Sequence[nn.Parameter]] = ()) -> None:
    """Keep copies of the A and B of a network's linear layers in one non-persistent buffer.

    Args:
        network: transformers model with its adapter, on its device.
        dtype: compute dtype; no copies are made for float32.
        together: groups of matrices of one width that are used concatenated along rows.
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
    network.register_buffer("narrow_adapters", flat, persistent=False)  # so that the memory prediction counts it

    def refresh(*_: Any) -> None:
        with torch.no_grad():
            torch._foreach_copy_(copies, parameters)

    refresh()
    # Both: the loss calls the body directly, and some networks (OPT) bypass their body's forward.
    for called in {network, network.base_model}:
        called.register_forward_pre_hook(refresh)


def narrowed(half: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A or B in ``dtype``: the copy if there is one."""
    copy: Tensor | None = getattr(half, _COPY, None)
    return copy if copy is not None and copy.dtype == dtype else half.to(dtype)


def narrowed_below(halves: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return several A matrices concatenated along rows: (sum of ranks, in), in ``dtype``."""
    below: Tensor | None = getattr(halves[0], _BELOW, None)
    if below is not None and below.dtype == dtype and len(below) == sum(map(len, halves)):
        return below
    return torch.cat(tuple(halves)).to(dtype)
