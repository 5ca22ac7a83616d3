"""Joined matrices for CPUs: [W | 0 | s · B | 0], a decoded weight beside its adapter's B, to be used in one product.

Also the matrix it is multiplied by, and the sum of a factor's gradients, each of which would take torch several calls.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from adaptkit.compiled import inlined
from adaptkit.kernel_arguments import Known
from adaptkit.numerics.kernels._cpu_constants import decode_groups
from adaptkit.numerics.kernels._cpu_float import any_value, canonical_nan, rounded
from adaptkit.numerics.kernels._cpu_lookup import CHUNK, PERMUTATION, decode_block
from adaptkit.team import shared


class PackedRows(NamedTuple):
    """A 4-bit weight, as contiguous numpy arrays.

    Attributes:
        codes: (rows · width / 2,) uint8.
        constants: (rows · width / block_size,) float32, or uint8 codes if they are quantized themselves.
        nested: (groups,) float32, constants of the quantized constants; empty if ``constants`` is float32.
        offset: float32, added to each decoded constant.
        nested_levels: (256,) float32, level of each code of a constant.
        width: columns of the weight.
        block_size: number of weights that share a constant.
        levels: (16,) float32, level of each 4-bit code.
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
    """Return whether rows consist of whole blocks and the processor has the look-up of ``_cpu_lookup``."""
    return PERMUTATION is not None and block_size % CHUNK == 0 and width % block_size == 0


@inlined
def _place(b, scale, left, first, out, row):
    written, inside = row[left:], row[first : first + b.size]
    for j in range(written.size):
        written[j] = 0
    for k in range(inside.size):
        inside[k] = rounded(out, canonical_nan(b[k] * scale))


@shared("out")
def _widen(weight, absmax, b, scale, first, out, part):
    half, block = weight.block_size // 2, part.first * (weight.width // weight.block_size)
    for r in range(part.first, part.last):
        row = out[r]
        for start in range(0, weight.width, weight.block_size):
            codes = weight.codes[block * half : (block + 1) * half]
            decode_block(codes, canonical_nan(absmax[block]), weight.levels, row[start : start + weight.block_size])
            block += 1
        _place(b[r], scale, weight.width, first, out, row)


@shared("out")
def _widen_nested(weight, absmax, b, scale, first, out, part):
    blocks = weight.width // weight.block_size
    nested = weight.nested, weight.offset, weight.nested_levels
    decode_groups(weight.constants, *nested, part.first * blocks, part.last * blocks, absmax)
    _widen(weight, absmax, b, scale, first, out, part)


def widen(weight: Known, lora_b: Tensor, scale: float, first: int, out: Tensor) -> None:
    """Decode a weight into the first columns of a matrix, and write its adapter's scaled B into later ones.

    Args:
        weight: the ``PackedRows`` of a weight with the rows of ``out``; decoded as in ``reference.decode_4bit``.
        lora_b: (rows, rank) float32; scaled in float32 and rounded once.
        scale: factor of ``lora_b``.
        first: first column of ``lora_b`` in ``out``; all remaining columns become zero.
        out: (rows, columns) bfloat16, float16 or float32, contiguous, written.
    """
    factor, rows = (lora_b.contiguous(), np.float32(scale), first, out), weight.argument
    if rows.nested.size:
        _widen_nested(weight, np.empty(rows.constants.size, np.float32), *factor)
    else:
        _widen(weight, rows.constants, *factor)


@shared("x")
def _beside(x, inner, out, part):
    width, ranks = x.shape[1], inner.shape[1]
    for r in range(part.first, part.last):
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
    _beside(x.contiguous(), inner, out)
    return out


@shared("total")
def _add(total, x, scale, part):
    for r in range(part.first, part.last):
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
    _add(total, x, np.float32(scale))
