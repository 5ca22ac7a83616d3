"""Error-compensating rounding (GPTQ): the rounding error of each column is compensated by the columns after it.

With H = E[x xᵀ] of a linear's inputs, the expected squared error of its outputs is Σ_rows ΔW H ΔWᵀ. Columns are rounded
from left to right; the error e of column j is subtracted from the later columns, weighted by row j of the upper
Cholesky factor U of H⁻¹:

    e_j = (w_j - q_j) / U_jj,    w_k -= e_j U_jk  for k > j
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from adaptkit.errors import UsageError
from adaptkit.lazy import lazy_module, torch
from adaptkit.numerics.absmax import DoubleQuantized, dequantize_absmax, dynamic_map
from adaptkit.numerics.calibration import Constants, nest_scales, normalized_importance, search_scales

if TYPE_CHECKING:
    from torch import Tensor

_loops = lazy_module("adaptkit.numerics.kernels._cpu_rounding")

DAMPING = 0.2
"""Share of the mean second moment added to the diagonal of H. With less, rounding overfits the calibration data."""
REACH = 8
"""How many nested codes on either side of the first choice are tried again."""


def damped(second_moment: Tensor) -> Tensor:
    """Return H + ``DAMPING`` · mean(diag H) · I, float64; the identity if H is zero.

    Raises:
        UsageError: not a square matrix of finite numbers.
    """
    shape = second_moment.shape
    if len(shape) != 2 or shape[0] != shape[1] or not bool(torch.isfinite(second_moment).all()):
        raise UsageError(f"second moments of shape {list(shape)}: must be a square matrix of finite numbers")
    matrix = second_moment.to(torch.float64, copy=True)
    mean = float(matrix.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(matrix), dtype=torch.float64)
    matrix.diagonal().add_(DAMPING * mean)
    return matrix


def compensation_factor(second_moment: Tensor) -> Tensor:
    """Return the upper Cholesky factor U of (damped H)⁻¹ = Uᵀ U; linears with the same inputs can share it.

    Args:
        second_moment: (in, in) E[x xᵀ].

    Returns:
        (in, in) float32, computed in float64.
    """
    # Each matrix may have gigabytes: no name keeps one that is no longer needed.
    factor: Tensor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(damped(second_moment))), upper=True
    )
    return factor.float().contiguous()


def compensated_nf4(
    weight: Tensor,
    importance: Tensor,
    factor: Tensor,
    block_size: int = 64,
    double_quant: bool = True,
) -> tuple[Tensor, Constants]:
    """Quantize a linear's weight to NF4 with activation-weighted scales and error-compensating rounding.

    Scales are first searched for the original weights. If scales are nested and no block straddles rows, each block's
    nested code is chosen again, near the first choice, once the columns before the block's panel of 64 are rounded.

    Args:
        weight: (out, in), floating point, on the CPU.
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
    found = search_scales(weight, importance, block_size)
    constants: Constants = found
    nested_codes, nested, offset = np.zeros(1, np.uint8), np.zeros(1, np.float32), 0.0
    if double_quant:
        constants = nest_scales(weight, found, importance, block_size)
        nested_codes, nested, offset = constants.codes.numpy(), constants.nested_absmax.numpy(), constants.offset
    again = double_quant and weight.shape[1] % block_size == 0
    codes = np.empty(weight.shape, np.uint8)
    scales = dequantize_absmax(constants).clone().numpy()
    _loops.round_rows(
        weight.float().contiguous().clone().numpy(), factor.float().contiguous().numpy(),
        normalized_importance(weight, importance), block_size, dynamic_map().numpy(), nested, np.float32(offset),
        REACH if again else 0, _loops.scratch_for_rows(block_size), nested_codes, scales, codes,
    )  # fmt: skip
    if isinstance(constants, DoubleQuantized):
        constants = replace(constants, codes=torch.from_numpy(nested_codes))
    return _packed(torch.from_numpy(codes)), constants


def _packed(codes: Tensor) -> Tensor:
    flat = codes.reshape(-1)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_full((1,), 7)])
    return (flat[::2] << 4) | flat[1::2]
