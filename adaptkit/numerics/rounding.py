"""Error-compensating rounding (GPTQ): the rounding error of each column is compensated by the columns after it.

With H = E[x xᵀ] of a linear's inputs, the expected squared error of its outputs is Σ_rows ΔW H ΔWᵀ. Columns are rounded
from left to right; the error e of column j is subtracted from the later columns, weighted by row j of the upper
Cholesky factor U of H⁻¹:

    e_j = (w_j - q_j) / U_jj,    w_k -= e_j U_jk  for k > j

All products and sums are computed in one fixed order, so the codes depend neither on the machine nor on threads.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np
import torch

from adaptkit.errors import UsageError
from adaptkit.numerics.absmax import GROUP, DoubleQuantized, dequantize_absmax, dynamic_levels
from adaptkit.numerics.calibration import (
    BOUNDS,
    CODES,
    LEAST_SCALE,
    LEVELS,
    Constants,
    best_code,
    nest_scales,
    packed,
    prepare,
    scratch_for,
    search_scales,
)
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.kernels._cpu_blocks import find
from adaptkit.numerics.kernels._jit import jit
from adaptkit.numerics.tensors import as_array, as_tensor

DAMPING = 0.2
"""Share of the mean second moment added to the diagonal of H. With less, rounding overfits the calibration data."""
REACH = 8
"""How many nested codes on either side of the first choice are tried again."""
ROWS = 64
"""Rows processed together, for which the factor is read once."""
PANEL = 64
"""Columns whose errors are collected before the columns after them are updated."""
TILE = 128
"""Columns that are updated together. The factor's tile is copied: where its rows are a large power of two apart, they
displace each other from the caches."""


def damped(second_moment: Array) -> Array:
    """Return H + ``DAMPING`` · mean(diag H) · I, float64; the identity if H is zero.

    Raises:
        UsageError: not a square matrix of finite numbers.
    """
    shape = second_moment.shape
    if len(shape) != 2 or shape[0] != shape[1] or not bool(np.isfinite(second_moment).all()):
        raise UsageError(f"second moments of shape {list(shape)}: must be a square matrix of finite numbers")
    matrix = second_moment.astype(np.float64)
    mean = float(matrix.diagonal().mean())
    if mean <= 0:
        return np.eye(len(matrix))
    matrix[np.diag_indices_from(matrix)] += DAMPING * mean
    return matrix


def compensation_factor(second_moment: Array) -> Array:
    """Return the upper Cholesky factor U of (damped H)⁻¹ = Uᵀ U; linears with the same inputs can share it.

    Args:
        second_moment: (in, in) E[x xᵀ].

    Returns:
        (in, in) float32, computed in float64.
    """
    # Torch inverts by a Cholesky factor, in half of numpy's time. Each matrix may have gigabytes: no name keeps one.
    factor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(as_tensor(damped(second_moment)))), upper=True
    )
    return as_array(factor.float())


def compensated_nf4(
    weight: Array, importance: Array, factor: Array, block_size: int = 64, double_quant: bool = True
) -> tuple[Array, Constants]:
    """Quantize a linear's weight to NF4 with activation-weighted scales and error-compensating rounding.

    Scales are first searched for the original weights. If scales are nested and no block straddles rows, each block's
    nested code is chosen again, near the first choice, once the columns before the block's panel are rounded.

    Args:
        weight: (out, in), floating point.
        importance: (in,) E[x²] of each input, the diagonal of H.
        factor: (in, in) float32, from ``compensation_factor``.
        block_size: weights sharing one scale; a power of two from 32 to 4096.
        double_quant: whether to quantize the scales too.

    Returns:
        codes (ceil(N / 2),) uint8 and constants, as ``calibration.weighted_nf4`` returns them.

    Raises:
        NonFiniteError: a weight or an importance is NaN or infinite.
        UsageError: the shapes do not match, an importance is negative, or the block size is not supported.

    Source: GPTQ (arXiv:2210.17323), without reordering columns (no act-order), and with the same arithmetic as without
    lazy batches; here on the NF4 grid.
    """
    if factor.shape != (weight.shape[-1], weight.shape[-1]):
        raise UsageError(f"factor of shape {list(factor.shape)} does not fit a weight of shape {list(weight.shape)}")
    flat, important = prepare(weight, importance)
    scales = search_scales(flat, important, block_size)
    constants: Constants = scales
    if double_quant:
        constants = nest_scales(flat, important, scales, block_size)
        scales = dequantize_absmax(constants)
    work: Array = flat.reshape(weight.shape).copy()
    codes = np.empty(weight.shape, np.uint8)
    room, tile = scratch_for(block_size), np.empty((PANEL, TILE), np.float32)
    errors = np.empty((ROWS, PANEL), np.float32)
    for top in range(0, len(work), ROWS):
        rows, first = work[top : top + ROWS], top * work.shape[1]
        for left in range(0, work.shape[1], PANEL):
            if isinstance(constants, DoubleQuantized) and work.shape[1] % block_size == 0:
                _choose_scales(
                    rows, left, first // block_size, important, block_size, dynamic_levels(), constants.nested_absmax,
                    np.float32(constants.offset), REACH, room, constants.codes, scales,
                )  # fmt: skip
            _round_panel(rows, left, first, scales, block_size, factor, codes[top : top + ROWS], errors)
            _spread(rows, left, errors, factor, tile)
    return packed(codes), constants


@jit
def _choose_scales(work, left, first_block, importance, block_size, levels, nested, offset, reach, room, codes, scales):
    """Choose the nested codes of the blocks that begin in the panel at ``left``, from the current weights."""
    blocks = work.shape[1] // block_size
    for row in range(len(work)):
        for start in range(left, min(left + PANEL, work.shape[1]), block_size):
            if start % block_size:
                break
            inside = start // block_size
            block = first_block + row * blocks + inside
            group, first = nested[block // GROUP], np.int64(codes[block])
            code = best_code(work[row], importance, inside, block_size, levels, group, offset, first, reach, True, room)
            codes[block] = code
            scales[block] = np.float32(levels[code] * group) + offset


@jit
def _round_panel(work, left, first, scales, block_size, factor, codes, errors):
    """Round the columns of the panel at ``left``; ``first`` is the index of the first weight of ``work``."""
    errors[:] = 0
    right = min(left + PANEL, work.shape[1])
    for row in range(len(work)):
        w = work[row]
        for j in range(left, right):
            scale = scales[(first + row * w.size + j) // block_size]
            if abs(scale) < LEAST_SCALE:
                scale = LEAST_SCALE
            codes[row, j] = find(w[j] / scale, BOUNDS, CODES)
            error = (w[j] - find(w[j] / scale, BOUNDS, LEVELS) * scale) / factor[j, j]
            errors[row, j - left] = error
            for k in range(j + 1, right):
                w[k] -= error * factor[j, k]


@jit
def _spread(work, left, errors, factor, tile):
    """Subtract the errors of the panel at ``left``, times their factors, from the columns after it."""
    for start in range(left + PANEL, work.shape[1], TILE):
        width = min(TILE, work.shape[1] - start)
        for j in range(PANEL):
            for k in range(width):
                tile[j, k] = factor[left + j, start + k]
        for row in range(len(work)):
            w, e = work[row, start : start + width], errors[row]
            for j in range(0, PANEL, 4):
                e0, e1, e2, e3 = e[j], e[j + 1], e[j + 2], e[j + 3]
                f0, f1, f2, f3 = tile[j], tile[j + 1], tile[j + 2], tile[j + 3]
                for k in range(w.size):
                    w[k] = (((w[k] - e0 * f0[k]) - e1 * f1[k]) - e2 * f2[k]) - e3 * f3[k]
