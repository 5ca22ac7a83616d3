"""Joined matrices for CPUs: [W | 0 | s · B | 0], a decoded weight beside its adapter's B, to be used in one product.

Also the matrix it is multiplied by, and the sum of a factor's gradients, each of which would take torch several calls.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from adaptkit.numerics.kernels._cpu_constants import decode_groups
from adaptkit.numerics.kernels._cpu_decode import decode_blocks, scratch_for
from adaptkit.numerics.kernels._cpu_float import any_value, canonical_nan, rounded
from adaptkit.numerics.kernels._jit import inlined
from adaptkit.training.fast.bits import tensor_bits
from adaptkit.training.fast.threads import shared, thread_count


@dataclass(frozen=True)
class PackedRows:
    """A 4-bit weight, as contiguous numpy arrays.

    Attributes:
        codes: (rows · width / 2,) uint8.
        constants: (rows · width / block_size,) float32, or uint8 codes if they are quantized themselves.
        nested: (groups,) float32, constants of the quantized constants; empty if ``constants`` is float32.
        offset: float32, added to each decoded constant.
        nested_levels: (256,) float32, level of each code of a constant.
        width: columns of the weight.
        block_size: number of weights that share a constant.
        levels: (512,) float32, the two levels of each byte, see ``level_pairs``.
    """

    codes: Any
    constants: Any
    nested: Any
    offset: Any
    nested_levels: Any
    width: int
    block_size: int
    levels: Any


def can_decode_rows(width: int, block_size: int) -> bool:
    """Return whether rows consist of whole blocks."""
    return width % block_size == 0


@inlined
def _place(b, scale, left, first, out, row):
    written, inside = row[left:], row[first : first + b.size]
    for j in range(written.size):
        written[j] = 0
    for k in range(inside.size):
        inside[k] = rounded(out, canonical_nan(b[k] * scale))


@shared("out")
def _widen(codes, absmax, nested, width, block_size, levels, room, b, scale, first, out, part):
    count = width // block_size
    if nested is not None:  # decided at compile time
        constants, group_scales, offset, group_levels = nested
        decode_groups(constants, group_scales, offset, group_levels, part[1] * count, part[2] * count, absmax)
    for r in range(part[1], part[2]):
        row, start = out[r], r * width // 2
        packed, scales = codes[start : start + width // 2], absmax[r * count : (r + 1) * count]
        decode_blocks(packed, scales, block_size, levels, room[part[0]], row[:width])
        _place(b[r], scale, width, first, out, row)


def widen(weight: PackedRows, lora_b: Tensor, scale: float, first: int, out: Tensor) -> None:
    """Decode a weight into the first columns of a matrix, and write its adapter's scaled B into later ones.

    Args:
        weight: a weight with the rows of ``out``; decoded as in ``reference.decode_4bit``.
        lora_b: (rows, rank) float32; scaled in float32 and rounded once.
        scale: factor of ``lora_b``.
        first: first column of ``lora_b`` in ``out``; all remaining columns become zero.
        out: (rows, columns) bfloat16, float16 or float32, contiguous, written.
    """
    absmax, nested, bits = weight.constants, None, tensor_bits(out)
    if weight.nested.size:
        absmax = np.empty(weight.constants.size, np.float32)
        nested = weight.constants, weight.nested, weight.offset, weight.nested_levels
    room = scratch_for(bits, thread_count())
    factor = lora_b.detach().contiguous().numpy(), np.float32(scale), first, bits
    _widen(weight.codes, absmax, nested, weight.width, weight.block_size, weight.levels, room, *factor)


@shared("x")
def _beside(x, inner, out, part):
    width, ranks = x.shape[1], inner.shape[1]
    for r in range(part[1], part[2]):
        row, first, second = out[r], x[r], inner[r]
        for j in range(width):
            row[j] = first[j]
        for j in range(ranks):
            row[width + j] = second[j]
        row[width + ranks :] = 0


def beside(x: Tensor, inner: Tensor, columns: int) -> Tensor:
    """Return [x | inner | 0], padded to ``columns`` columns: the other factor of the product with a widened weight.

    Args:
        x: (rows, width) bfloat16, float16 or float32.
        inner: (rows, ranks) of the same type.
        columns: columns of the result.

    Returns:
        (rows, columns).
    """
    out = x.new_empty(x.shape[0], columns)
    _beside(tensor_bits(x.contiguous()), tensor_bits(inner.contiguous()), tensor_bits(out))
    return out


@shared("total")
def _add(total, x, scale, part):
    for r in range(part[1], part[2]):
        row, added = total[r], x[r]
        for i in range(row.size):
            row[i] += any_value(x, added[i]) * scale


def add_scaled(total: Tensor, x: Tensor, scale: float) -> None:
    """Add ``scale`` times x to a matrix in place, computed in float32.

    Args:
        total: (rows, columns) float32, contiguous, changed.
        x: (rows, columns) bfloat16, float16 or float32, need not be contiguous; an infinity in float16 adds NaN.
        scale: factor of x.
    """
    _add(total.detach().numpy(), tensor_bits(x), np.float32(scale))
