"""Cross-entropy in Triton: one program computes a row of logits and overwrites it with the gradient.

A row is read twice and written once, without temporary memory of its size. The GPU's fast exponential is used, which is
accurate to two units in the last place of float32, so the bits differ from the CPU's.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS_AT_A_TIME = 4096


def cross_entropy(logits: Tensor, wanted: Tensor, keep: bool) -> Tensor:
    """Return the loss of some rows, and write its gradient over the logits if requested.

    Args:
        logits: (rows, vocabulary) of any float type, contiguous; with ``keep`` overwritten with the loss's gradient.
        wanted: (rows,) int64, the target column of each row.
        keep: whether to write the gradient.

    Returns:
        () float32: the sum over the rows, in nats.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    arguments = logits, wanted, losses, logits.shape[1], keep, _COLUMNS_AT_A_TIME
    if len(logits):
        with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
            _row[(len(logits),)](*arguments, num_warps=8, enable_fp_fusion=True)  # some releases warn if it is not set
    return losses.sum()


@triton.jit
def _row(logits, wanted, losses, columns: tl.constexpr, keep: tl.constexpr, chunk: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(wanted + row)
    said = tl.load(logits + target).to(tl.float32)
    # Each position of a chunk has a running maximum, finite from the start, and a running sum relative to it.
    largest, sums = tl.full((chunk,), -3.0e38, tl.float32), tl.zeros((chunk,), tl.float32)
    for start in range(0, columns, chunk):
        place = start + tl.arange(0, chunk)
        x = tl.load(logits + place, mask=place < columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        sums = sums * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    top = tl.max(largest, axis=0)
    total = tl.sum(sums * tl.exp(largest - top), axis=0)
    tl.store(losses + row, tl.log(total) + top - said)
    if keep:
        for start in range(0, columns, chunk):
            place = start + tl.arange(0, chunk)
            x = tl.load(logits + place, mask=place < columns, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - top) / total - tl.where(place == target, 1.0, 0.0)
            tl.store(logits + place, gradient.to(logits.dtype.element_ty), mask=place < columns)
