"""Masked softmax of a block of attention scores and its gradient, in one pass over the block each.

Scores and their gradients are bits of bfloat16 or float32 (see ``_cpu_float``); intermediate values are float32. A row
attends to columns ``first <= column < last``; the other columns of the block become zero.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptkit.models.fakes import is_fake
from adaptkit.numerics.kernels._cpu_float import rounded, sortable_bits, value
from adaptkit.numerics.kernels._jit import INLINED, compiled, inlined, jit
from adaptkit.training.network.threads import in_parts, thread_count

_FUSED = {"contract"}
"""Fast-math flag that lets a product and a sum be one instruction, with one rounding."""

_REORDERED = {*_FUSED, "reassoc", "nnan", "nsz"}
"""Fast-math flags that let the sum of a row be vectorized, in any order."""

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SMALLEST = np.float32(-87.0)
_C2, _C3, _C4 = np.float32(0.5), np.float32(1.6666665e-1), np.float32(4.1665796e-2)
_C5, _C6, _C7 = np.float32(8.333452e-3), np.float32(1.3981999e-3), np.float32(1.9875691e-4)


@compiled(fastmath=_FUSED, **INLINED)
def exponential(x):
    """Return exp(x) for float32 x <= 0, to within 2 units in the last place; exp(-87) for x below -87.

    The polynomial is that of Cephes' expf.
    """
    x = x if x > _SMALLEST else _SMALLEST
    whole = np.int32(x * _LOG2_E - np.float32(0.5))  # nearest integer: the conversion truncates, x is negative
    scale = np.float32(whole)
    x = x - scale * _LN2_HIGH
    x = x - scale * _LN2_LOW
    y = _C7
    y = y * x + _C6
    y = y * x + _C5
    y = y * x + _C4
    y = y * x + _C3
    y = y * x + _C2
    y = y * (x * x) + x + np.float32(1.0)
    return y * np.uint32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


@inlined
def _scale(scores, seen, scale, work):
    """Write the scaled scores to ``work``, and return the largest; NaN if one is not finite."""
    largest, magnitude = np.int32(-0x80000000), np.int32(0)
    for j in range(seen.size):
        number = value(scores, seen[j]) * scale
        work[j] = number
        bits = np.float32(number).view(np.int32)
        size = np.int32(bits & np.int32(0x7FFFFFFF))
        magnitude = size if size > magnitude else magnitude
        ordered = sortable_bits(bits)
        largest = ordered if ordered > largest else largest
    if magnitude >= np.int32(0x7F800000):
        return np.float32(np.nan)
    return np.int32(sortable_bits(largest)).view(np.float32)


@compiled(fastmath=_REORDERED, **INLINED)
def _exponentials(row, largest):
    """Replace each element with exp(element - largest), and return the sum."""
    total = np.float32(0.0)
    for i in range(row.size):
        row[i] = exponential(row[i] - largest)
        total += row[i]
    return total


def softmax(scores: Tensor, first: Any, last: Any, scale: Any) -> Any:
    """Turn scores into probabilities in place, and return the logarithm of each row's sum of exponentials.

    A row without columns gets zeros. A row with a score that is not finite gets NaN, explicitly, because the maximum
    and the exponential of this module would hide it.

    Args:
        scores: (heads, rows, columns) bfloat16 or float32, products of queries and keys.
        first: (rows,) int32, the first column that a row attends to; the same for every head.
        last: (rows,) int32, one past the last column.
        scale: float32, multiplies the scores.

    Returns:
        (heads · rows,) float32.
    """
    if is_fake(scores):
        return None
    values = bits(scores)
    sums, room = np.empty(len(values), np.float32), np.empty((thread_count(), values.shape[1]), np.float32)
    given = values, first, last, scale, sums
    in_parts(len(values), values.size, lambda n, start, end: _softmax(*given, room[n], start, end))
    return sums


def gradients(scores: Tensor, changes: Tensor, first: Any, last: Any, scale: Any, log_sums: Any, means: Tensor) -> None:
    """Recompute probabilities from scores, and turn gradients by probabilities into gradients by scores, in place.

    Args:
        scores: as for ``softmax``.
        changes: the gradients, in the shape of ``scores``.
        first: as for ``softmax``.
        last: as for ``softmax``.
        scale: as for ``softmax``.
        log_sums: result of ``softmax``.
        means: (heads, rows, 1) float32, Σ probability · gradient of each row.
    """
    if is_fake(scores):
        return
    given = bits(scores), bits(changes), first, last, scale, log_sums, means.reshape(-1).numpy()
    in_parts(len(given[0]), given[0].size, lambda _, start, end: _gradients(*given, start, end))


def bits(values: Tensor) -> Any:
    """View a contiguous tensor, (…, size), as a numpy array of the bits of its floats, (rows, size) or (size,)."""
    kind = torch.uint16 if values.dtype == torch.bfloat16 else torch.uint32
    return (values.view(-1, values.shape[-1]) if values.dim() > 1 else values).detach().view(kind).numpy()


@jit
def _softmax(scores, first, last, scale, log_sums, room, begin, finish):
    for r in range(begin, finish):
        row, start, end = scores[r], first[r % first.size], last[r % first.size]
        row[:start] = 0
        row[end:] = 0
        log_sums[r] = 0.0
        if start < end:
            seen, work = row[start:end], room[: end - start]
            largest = _scale(scores, seen, scale, work)
            if np.isnan(largest):
                log_sums[r] = np.nan
                seen[:] = rounded(scores, np.float32(np.nan))
                continue
            total = _exponentials(work, largest)
            factor = np.float32(1.0) / total
            for j in range(seen.size):
                seen[j] = rounded(scores, work[j] * factor)
            log_sums[r] = largest + np.float32(np.log(total))


@jit
def _gradients(scores, changes, first, last, scale, log_sums, means, begin, finish):
    for r in range(begin, finish):
        row, change, start, end = scores[r], changes[r], first[r % first.size], last[r % first.size]
        log_sum, mean = log_sums[r], means[r]
        row[:start] = 0
        row[end:] = 0
        change[:start] = 0
        change[end:] = 0
        seen, seen_change = row[start:end], change[start:end]
        for j in range(seen.size):
            power = value(scores, seen[j]) * scale - log_sum
            probability = exponential(power if power < np.float32(0.0) else np.float32(0.0))
            difference = value(changes, seen_change[j]) - mean
            seen[j] = rounded(scores, probability)
            seen_change[j] = rounded(changes, probability * difference * scale)
