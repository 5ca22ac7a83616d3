"""Shared by ``cpu`` and ``gpu``: their kernels encode whole blocks, and ``reference`` encodes a short last block.

A short last block is scaled by another rule. There is at most one per tensor, so it is not worth a second kernel.
"""

from collections.abc import Callable
from typing import Any

from adaptkit.numerics.kernels._reference_blocks import Encoded

Encode = Callable[[Any, Any, Any, Any], None]
"""Called with (weights, codes, absmax, moments or None); writes all but the first."""
Empty = Callable[[tuple[int, ...], str], Any]
"""Called with a shape and the name of a type; returns an array or a tensor."""


def encode(
    flat: Any, block_size: int, bits: int, measure: bool, empty: Empty, whole: Encode, definition: Encode
) -> Encoded:
    """Encode the whole blocks of a weight with ``whole`` and the rest with ``definition``.

    Args:
        flat: (N,) bfloat16, float16 or float32, contiguous.
        block_size: number of weights that share one constant.
        bits: bits per code.
        measure: whether to return the moments too.
        empty: allocates the outputs.
        whole: encodes whole blocks.
        definition: encodes a short last block.
    """
    count = int(flat.shape[0])
    blocks = -(-count // block_size)
    codes = empty(((count * bits + 7) // 8,), "uint8" if bits == 4 else "int8")
    absmax = empty((blocks,), "float32")
    moments = empty((blocks, 3), "float32") if measure else None
    full = count // block_size
    weights, split = full * block_size, full * block_size * bits // 8
    if full:
        whole(flat[:weights], codes[:split], absmax[:full], None if moments is None else moments[:full])
    if full < blocks:
        definition(flat[weights:], codes[split:], absmax[full:], None if moments is None else moments[full:])
    return codes, absmax, moments


def fill(encoded: Encoded, codes: Any, absmax: Any, moments: Any) -> None:
    """Copy the result of a function of ``reference`` to the outputs."""
    codes[:], absmax[:] = encoded[0], encoded[1]
    if moments is not None and encoded[2] is not None:
        moments[:] = encoded[2]
