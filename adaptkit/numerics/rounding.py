"""Error-compensating rounding (GPTQ): the rounding error of each column is compensated by the columns after it.

With H = E[x xᵀ] of a linear's inputs, the expected squared error of its outputs is Σ_rows ΔW H ΔWᵀ. Columns are rounded
one after the other, in the order of their inputs' size; the error e of column j is subtracted from the later columns,
weighted by row j of the upper Cholesky factor U of H⁻¹:

    e_j = (w_j - q_j) / U_jj,    w_k -= e_j U_jk  for k > j

All products and sums are computed in one fixed order, so the codes depend neither on the machine nor on threads.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from adaptkit.errors import UsageError
from adaptkit.numerics.absmax import dequantize_absmax
from adaptkit.numerics.calibration import (
    LEAST_SCALE,
    Constants,
    nest_scales,
    packed,
    prepare,
    search_scales,
    weighted_nf4,
)
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.grids import NF4, Grid
from adaptkit.numerics.kernels._jit import jit
from adaptkit.numerics.tensors import as_array, as_tensor

DAMPING = 0.2
"""Share of the mean second moment added to the diagonal of H. With less, rounding overfits the calibration data."""
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


@dataclass(frozen=True, eq=False)
class Compensation:
    """What error-compensating rounding needs to know of a linear's inputs.

    Attributes:
        order: (in,) in which columns are rounded, the largest inputs first: their errors find the most columns that
            can compensate them.
        factor: (in, in) float32, ``compensation_factor`` of E[x xᵀ] in that order.
    """

    order: Array
    factor: Array

    @classmethod
    def of(cls, second_moment: Array) -> Self:
        """Compute it from E[x xᵀ], (in, in)."""
        order = np.argsort(-second_moment.diagonal(), kind="stable")
        return cls(order, compensation_factor(second_moment[np.ix_(order, order)]))


@dataclass(frozen=True, eq=False)
class LinearInputs:
    """What calibration knows of a linear's inputs.

    Attributes:
        importance: (in,) E[x²] of each, not negative.
        compensation: for error-compensating rounding; None for the nearest levels.
    """

    importance: Array
    compensation: Compensation | None = None


def compensated(
    weight: Array, scales: Array, zeros: Array | None, groups: Array, compensation: Compensation, grid: Grid
) -> Array:
    """Round a weight to the levels of a grid, given what its groups share; a weight is (level − zero) · scale.

    Args:
        weight: (out, in) float32.
        scales: (out, groups) float32, not 0.
        zeros: (out, groups) in levels, or None.
        groups: (in,), the group of each column.
        compensation: of the inputs.
        grid: the levels.

    Returns:
        codes (out, in) uint8.

    Source: GPTQ (arXiv:2210.17323) with static groups and its activation order, which changes no file.
    """
    order, factor = compensation.order, compensation.factor
    codes, places = np.empty(weight.shape, np.uint8), groups[order]
    tile, errors = np.empty((PANEL, TILE), np.float32), np.empty((ROWS, PANEL), np.float32)
    levels, bounds, known = grid.levels, grid.bounds, grid.codes
    for top in range(0, len(weight), ROWS):
        here = slice(top, top + ROWS)
        rows = np.ascontiguousarray(weight[here, order])
        found, of_rows = np.empty(rows.shape, np.uint8), scales[here]
        shifts = None if zeros is None else zeros[here].astype(np.float32)
        for left in range(0, rows.shape[1], PANEL):
            panel = places[left : left + PANEL]
            shift = None if shifts is None else shifts[:, panel]
            _round_panel(rows, left, of_rows[:, panel], shift, levels, bounds, known, factor, found, errors)
            _spread(rows, left, errors, factor, tile)
        codes[here, order] = found
    return codes


def calibrated_nf4(
    weight: Array, inputs: LinearInputs, block_size: int = 64, double_quant: bool = True
) -> tuple[Array, Constants]:
    """Quantize a linear's weight to NF4 with activation-weighted scales and, if asked for, compensated rounding.

    Args:
        weight: (out, in), floating point.
        inputs: of the layer.
        block_size: weights sharing one scale; a power of two from 32 to 4096.
        double_quant: whether to quantize the scales too.

    Returns:
        codes (ceil(N / 2),) uint8 and constants, as ``calibration.weighted_nf4`` returns them.

    Raises:
        NonFiniteError: a weight or an importance is NaN or infinite.
        UsageError: the shapes do not match, an importance is negative, or the block size is not supported.
    """
    if inputs.compensation is None:
        return weighted_nf4(weight, inputs.importance, block_size, double_quant)
    flat, important = prepare(weight, inputs.importance)
    scales = search_scales(flat, important, block_size)
    constants: Constants = nest_scales(flat, important, scales, block_size) if double_quant else scales
    decoded, columns = dequantize_absmax(constants), np.arange(weight.shape[1])
    if weight.shape[1] % block_size:  # blocks straddle rows
        decoded, block_size = decoded[np.arange(weight.size) // block_size], 1
    by_row = decoded.reshape(len(weight), -1)
    groups = columns // block_size
    codes = compensated(flat.reshape(weight.shape), by_row, None, groups, inputs.compensation, NF4)
    return packed(codes), constants


@jit
def _round_panel(work, left, scales, zeros, levels, bounds, known, factor, codes, errors):
    """Round the columns of the panel at ``left``, of which ``scales`` and ``zeros`` (or None) are."""
    errors[:] = 0
    for row in range(len(work)):
        w = work[row]
        for inside in range(scales.shape[1]):
            j = left + inside
            scale = scales[row, inside]
            if abs(scale) < LEAST_SCALE:
                scale = LEAST_SCALE
            shift = np.float32(0)
            if zeros is not None:  # decided at compile time
                shift = zeros[row, inside]
            level = _count_below(bounds, w[j] / scale + shift)
            codes[row, j] = known[level]
            error = (w[j] - (levels[level] - shift) * scale) / factor[j, j]
            errors[row, inside] = error
            for k in range(j + 1, left + scales.shape[1]):
                w[k] -= error * factor[j, k]


@jit
def _count_below(bounds, value):
    """Return the number of bounds, which ascend, below a value."""
    low, high = 0, bounds.size
    while low < high:
        middle = (low + high) // 2
        if bounds[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


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
