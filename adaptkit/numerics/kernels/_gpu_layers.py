"""Parts of a decoder layer in Triton, in one pass each: computed in float32, and rounded once to the type they come in.

gate       y = silu(gate) · up          silu(x) = x σ(x), σ(x) = 1 / (1 + exp(-x))
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
    """silu(gate) · up, of two contiguous tensors of one shape and type."""
    y = torch.empty_like(gate)
    _launch(_gate, gate, up, y)
    return y


def gate_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by both, where that by ``gate_forward``'s result is ``grad``; all are contiguous."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _launch(_gate_gradients, gate, up, grad, grad_gate, grad_up)
    return grad_gate, grad_up


def _launch(kernel: Any, *tensors: Tensor) -> None:
    first, count = tensors[0], tensors[0].numel()
    if count:
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            kernel[(triton.cdiv(count, _AT_A_TIME),)](*tensors, count, _AT_A_TIME, enable_fp_fusion=True)


@triton.jit
def _gate(gate, up, y, count, chunk: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * chunk + tl.arange(0, chunk)
    mask = place < count
    x = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, (x / (1.0 + tl.exp(-x)) * u).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _gate_gradients(gate, up, grad, grad_gate, grad_up, count, chunk: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * chunk + tl.arange(0, chunk)
    mask = place < count
    x = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
    sigma = 1.0 / (1.0 + tl.exp(-x))
    by_gate = g * u * sigma * (1.0 + x * (1.0 - sigma))
    tl.store(grad_gate + place, by_gate.to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_up + place, (g * x * sigma).to(grad_up.dtype.element_ty), mask=mask)
