"""Frozen 4-bit weights row by row, as a CPU's kernels take them, which divide the rows among torch's threads."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptkit.checkpoint.quantized import QuantizedWeight
from adaptkit.numerics.formats._double_quant import DoubleQuantized
from adaptkit.numerics.kernels._cpu_joined import PackedRows, can_decode_rows, widen


def packed_rows(weight: QuantizedWeight) -> PackedRows | None:
    """A weight's parts; None if it has to be decoded otherwise: not on a CPU, in 8 bits, rows of no whole blocks."""
    levels = weight.encoding.numerics.levels
    if weight.codes.device.type != "cpu" or levels is None or not can_decode_rows(weight.shape[-1], weight.block_size):
        return None
    nested, offset, constants = torch.empty(0), 0.0, weight.constants
    if isinstance(constants, DoubleQuantized):
        nested, offset, constants = constants.nested_absmax, constants.offset, constants.codes
    return PackedRows(
        codes=_as_numpy(weight.codes),
        constants=_as_numpy(constants),
        nested=_as_numpy(nested),
        offset=np.float32(offset),
        nested_levels=_as_numpy(weight.levels),
        width=weight.shape[-1],
        block_size=weight.block_size,
        levels=np.array(levels, np.float32),
    )


def decoded(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight in its shape, as ``QuantizedWeight.dequantize`` gives it."""
    rows = packed_rows(weight)
    if rows is None:
        found: Tensor = weight.dequantize(dtype)
        return found
    matrix = torch.empty(weight.shape, dtype=dtype)
    flat = matrix.view(-1, rows.width)
    widen(rows, torch.empty(len(flat), 0), 1.0, rows.width, flat)
    return matrix


def _as_numpy(part: Tensor) -> Any:
    return part.reshape(-1).contiguous().numpy()
