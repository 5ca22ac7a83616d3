"""A weight and, beside it in the same rows, a factor of its adapter: [W | 0 | s · B | 0], which one product takes."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from adaptkit.numerics.kernels._cpu_constants import decode_groups
from adaptkit.numerics.kernels._cpu_float import float_bits, plain, rounded
from adaptkit.numerics.kernels._cpu_lookup import CHUNK, PERMUTATION, decode_block
from adaptkit.numerics.kernels._cpu_memory import jit


class PackedRows(NamedTuple):
    """A weight, as contiguous numpy arrays.

    Attributes:
        codes: (rows · width / 2,) uint8.
        constants: (rows · width / block_size,) float32, or uint8 if they are quantized themselves.
        nested: (groups,) float32, constants of the constants; none if these are float32.
        offset: float32, added to each.
        nested_levels: (256,) float32, what the constants' codes stand for.
        width: columns of the weight.
        block_size: weights that share a constant.
        levels: (16,) float32, what codes stand for.
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
    """Whether a weight's blocks are whole in its rows, and the processor looks levels up."""
    return PERMUTATION is not None and block_size % CHUNK == 0 and width % block_size == 0


@jit
def _decode(weight, absmax, out):
    half, block = weight.block_size // 2, 0
    for r in range(out.shape[0]):
        row = out[r]
        for start in range(0, weight.width, weight.block_size):
            codes = weight.codes[block * half : (block + 1) * half]
            decode_block(codes, plain(absmax[block]), weight.levels, row[start : start + weight.block_size])
            block += 1


@jit
def _decode_nested(weight, out):
    absmax = np.empty(weight.constants.size, np.float32)
    decode_groups(weight.constants, weight.nested, weight.offset, weight.nested_levels, absmax)
    _decode(weight, absmax, out)


def decode_rows(weight: PackedRows, out: Tensor) -> None:
    """Decode a weight into the first columns of a matrix; see ``reference.decode_4bit``.

    Args:
        weight: of as many rows.
        out: (rows, width or more) bfloat16, float16 or float32, contiguous, written.
    """
    if weight.nested.size:
        _decode_nested(weight, float_bits(out))
    else:
        _decode(weight, weight.constants, float_bits(out))


@jit
def _place(b, scale, left, first, out):
    for r in range(out.shape[0]):
        row, factor = out[r], b[r]
        written, inside = row[left:], row[first : first + factor.size]
        for j in range(written.size):
            written[j] = 0
        for k in range(inside.size):
            inside[k] = rounded(out, plain(factor[k] * scale))


def place(lora_b: Tensor, scale: float, left: int, first: int, out: Tensor) -> None:
    """Write a factor of an adapter, scaled in float32 and rounded once, into the last columns, and zeros around it.

    Args:
        lora_b: (rows, rank) float32.
        scale: of it.
        left: column from which on the matrix is written.
        first: column in which the factor begins.
        out: (rows, columns) bfloat16, float16 or float32, contiguous, written.
    """
    _place(lora_b.detach().contiguous().numpy(), np.float32(scale), left, first, float_bits(out))
