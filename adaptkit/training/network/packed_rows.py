"""Frozen 4-bit weights in the form that CPU kernels decode row by row, with rows divided among torch's threads."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.numerics.kernels._cpu_decode import level_pairs
from adaptkit.training.fast.cpu_joined import PackedRows, can_decode_rows, widen
from adaptkit.training.network.decode import NestedConstants
from adaptkit.training.network.packed import QuantizedWeight


def packed_rows(weight: QuantizedWeight) -> PackedRows | None:
    """Return a weight's ``PackedRows``; None if it cannot be decoded row by row.

    That is a weight that is not on a CPU, is in 8 bits, or whose rows are not whole blocks (see ``can_decode_rows``).
    """
    book = weight.book
    if weight.codes.device.type != "cpu" or book is None or not can_decode_rows(weight.shape[-1], weight.block_size):
        return None
    nested, offset, constants = torch.empty(0), 0.0, weight.constants
    if isinstance(constants, NestedConstants):
        nested, offset, constants = constants.nested_absmax, constants.offset, constants.codes
    return PackedRows(
        codes=_as_numpy(weight.codes),
        constants=_as_numpy(constants),
        nested=_as_numpy(nested),
        offset=np.float32(offset),
        nested_levels=_as_numpy(weight.levels),
        width=weight.shape[-1],
        block_size=weight.block_size,
        levels=level_pairs(book.levels),
    )


def decoded(weight: QuantizedWeight, dtype: torch.dtype, empty: Callable[..., Tensor] = torch.empty) -> Tensor:
    """Return the weight in its shape, equal to the result of ``QuantizedWeight.dequantize``.

    ``empty``, which is called like ``torch.empty``, allocates it where it is decoded row by row.
    """
    rows = packed_rows(weight)
    if rows is None:
        return weight.dequantize(dtype)
    return decoded_rows(rows, weight.shape, dtype, empty)


def decoded_rows(
    rows: PackedRows, shape: tuple[int, ...], dtype: torch.dtype, empty: Callable[..., Tensor] = torch.empty
) -> Tensor:
    """Return a weight in its shape; see ``decoded``."""
    matrix = empty(shape, dtype=dtype, device="cpu")
    flat = matrix.view(-1, rows.width)
    widen(rows, torch.empty(len(flat), 0), 1.0, rows.width, flat)
    return matrix


def in_dtype(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a part in its original dtype; FSDP gathers parts as floats.

    On a CPU a copy: kernels view tensors as numpy arrays, after which FSDP could not free the gathered memory.
    """
    if not isinstance(part, nn.Parameter):
        return part
    return (part.clone() if part.device.type == "cpu" else part).view(dtype)


def _as_numpy(part: Tensor) -> Any:
    return part.reshape(-1).contiguous().numpy()
