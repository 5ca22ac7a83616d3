"""Cross-entropy in Triton: one program does a row of logits, which become their gradient where they lie.

A row is read twice and written once, and nothing of its size is made beside it. Exponentials are the GPU's fast ones,
which are within two units in the last place of float32, so bits are not the CPU's.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS_AT_A_TIME = 4096


def cross_entropy(logits: Tensor, wanted: Tensor, keep: bool) -> Tensor:
    """The loss of some rows, and its gradient.

    Args:
        logits: (rows, vocabulary) of any float type, contiguous; with ``keep`` they become the loss's gradient by them.
        wanted: (rows,) int64.
        keep: whether to write the gradient.

    Returns:
        () float32: the sum over the rows, in nats.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    arguments = logits, wanted, losses, logits.shape[1], keep, _COLUMNS_AT_A_TIME
    if len(logits):
        with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
            _row[(len(logits),)](*arguments, num_warps=8, enable_fp_fusion=True)  # some releases warn if it is not said
    return losses.sum()


@triton.jit
def _row(logits, wanted, losses, columns: tl.constexpr, keep: tl.constexpr, chunk: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(wanted + row)
    said = tl.load(logits + target).to(tl.float32)
    # In every place of a chunk the largest so far, which is a number from the start, and the sum beside it.
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
