"""What ``cpu`` and ``gpu`` share: their kernels do whole blocks, and the definition does a short last one.

A last block of fewer weights is scaled by another rule, once in a tensor at most, so it is not worth a second kernel.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from adaptkit.numerics.kernels._reference_blocks import Encoded

Encode = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
"""(weights, codes, absmax, moments): fills all but the first."""


def encode(weight: Tensor, block_size: int, bits: int, measure: bool, whole: Encode, definition: Encode) -> Encoded:
    """Encode the whole blocks of a weight with ``whole`` and what is left with ``definition``."""
    flat = weight.reshape(-1).contiguous()
    if flat.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        flat = flat.float()
    count, blocks = flat.numel(), -(-flat.numel() // block_size)
    code_type = torch.uint8 if bits == 4 else torch.int8
    codes = torch.empty((count * bits + 7) // 8, dtype=code_type, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    moments = torch.empty(blocks, 3, dtype=torch.float32, device=flat.device) if measure else None
    full = count // block_size
    weights, split = full * block_size, full * block_size * bits // 8
    if full:
        whole(flat[:weights], codes[:split], absmax[:full], None if moments is None else moments[:full])
    if full < blocks:
        definition(flat[weights:], codes[split:], absmax[full:], None if moments is None else moments[full:])
    return codes, absmax, moments


def fill(encoded: Encoded, codes: Tensor, absmax: Tensor, moments: Tensor | None) -> None:
    """Copy what the definition returned to where it belongs."""
    codes.copy_(encoded[0])
    absmax.copy_(encoded[1])
    if moments is not None and encoded[2] is not None:
        moments.copy_(encoded[2])
