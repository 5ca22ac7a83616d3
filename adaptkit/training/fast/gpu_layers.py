"""Parts of a decoder layer in Triton, in one pass each: computed in float32, then rounded once to the inputs' type.

gate       y = silu(gate) · up                    silu(x) = x σ(x), σ(x) = 1 / (1 + exp(-x))
lookup     y = table[ids]                         the table may be in pinned host memory, which the GPU reads directly
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_AT_A_TIME = 1024


def gate_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up, contiguous; both are (…, width) of one type, and may be columns of one matrix."""
    y = gate.new_empty(gate.shape)
    _launch(_gate, _rows(gate), _rows(up), y)
    return y


def gate_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by gate and up, given ``grad``, the contiguous gradient by ``gate_forward``'s result.

    They overwrite gate and up, unless ``_rows`` has to copy those: these are the largest tensors of a layer's backward
    pass, and the inputs are not needed after it.
    """
    sides = _rows(gate), _rows(up)
    _launch(_gate_gradients, *sides, grad)
    by_gate, by_up = (rows.view(side.shape) for rows, side in zip(sides, (gate, up), strict=True))
    return by_gate, by_up


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """Return rows of a table, on the device of ``ids``.

    Args:
        table: (entries, width), contiguous; on that device, or in pinned host memory (only these rows are read).
        ids: (…) integers; an id out of range gives a row of NaN.

    Returns:
        (…, width), contiguous.
    """
    numbers, (entries, width) = ids.contiguous(), table.shape
    rows = torch.empty((*ids.shape, width), dtype=table.dtype, device=ids.device)
    if rows.numel():
        with torch.cuda.device(ids.device) if ids.is_cuda else nullcontext():
            grid = numbers.numel(), triton.cdiv(width, _AT_A_TIME)
            _look_up[grid](table, numbers, rows, entries, width, _AT_A_TIME, enable_fp_fusion=False)
    return rows


def _launch(kernel: Any, gate: Tensor, up: Tensor, other: Tensor) -> None:
    """Launch one program for each part of each row; ``other`` is contiguous, gate and up may have row strides."""
    (count, width), strides = gate.shape, [side.stride(0) for side in (gate, up)]
    if count and width:
        with torch.cuda.device(gate.device) if gate.is_cuda else nullcontext():
            grid = count, triton.cdiv(width, _AT_A_TIME)
            kernel[grid](gate, up, other, *strides, width, _AT_A_TIME, enable_fp_fusion=True)


def _rows(side: Tensor) -> Tensor:
    """Return (…, width) as (rows, width), copied only if rows are not contiguous or cannot be viewed as a matrix."""
    flat = side.reshape(-1, side.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


@triton.jit
def _look_up(table, numbers, rows, entries, width, block: tl.constexpr):
    """Copy one part of a row."""
    place = tl.program_id(0).to(tl.int64)
    number = tl.load(numbers + place).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    known = tl.where((number >= 0) & (number < entries), width, 0)
    found = tl.load(table + number * width + column, mask=column < known, other=float("nan"))
    tl.store(rows + place * width + column, found, mask=column < width)


@triton.jit
def _gate(gate, up, y, gate_stride, up_stride, width, chunk: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * chunk + tl.arange(0, chunk)
    mask = column < width
    x = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, (x / (1.0 + tl.exp(-x)) * u).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _gate_gradients(gate, up, grad, gate_stride, up_stride, width, chunk: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * chunk + tl.arange(0, chunk)
    mask = column < width
    gate += row * gate_stride + column
    up += row * up_stride + column
    x = tl.load(gate, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + row * width + column, mask=mask, other=0.0).to(tl.float32)
    sigma = 1.0 / (1.0 + tl.exp(-x))
    by_gate = g * u * sigma * (1.0 + x * (1.0 - sigma))
    tl.store(gate, by_gate.to(gate.dtype.element_ty), mask=mask)
    tl.store(up, (g * x * sigma).to(up.dtype.element_ty), mask=mask)
