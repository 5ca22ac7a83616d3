"""Cross-entropy of rows of logits, with its gradient written over the logits.

Logits are bits of bfloat16 or float32 (see ``_cpu_float``); intermediate values are float32, the sum of a row float64.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.kernels._cpu_float import rounded, sortable_bits, value
from adaptkit.numerics.kernels._jit import INLINED, compiled, inlined
from adaptkit.training.fast.cpu_attention import exponential
from adaptkit.training.fast.threads import shared

_PIECE = 1024
"""Number of exponentials that are summed in float32, in any order."""

_INFINITY = np.int32(0x7F800000)
_LEAST = np.int32(-0x7F800001)
"""Sortable bits of negative infinity."""


@inlined
def _largest(logits, row):
    """Return the largest logit of a row; NaN if it is infinite, or if any logit is NaN."""
    largest, magnitude = np.int32(-0x80000000), np.int32(0)
    for i in range(row.size):
        bits = np.float32(value(logits, row[i])).view(np.int32)
        size = np.int32(bits & np.int32(0x7FFFFFFF))
        magnitude = size if size > magnitude else magnitude
        ordered = sortable_bits(bits)
        largest = ordered if ordered > largest else largest
    if magnitude > _INFINITY or largest >= _INFINITY or largest <= _LEAST:
        return np.float32(np.nan)
    return np.int32(sortable_bits(largest)).view(np.float32)


@compiled(fastmath={"reassoc", "nsz"}, **INLINED)
def _piece_sum(logits, piece, largest):
    total = np.float32(0.0)
    for i in range(piece.size):
        total += exponential(value(logits, piece[i]) - largest)
    return total


@shared("logits")
def cross_entropy(logits, wanted, keep, losses, part):
    """Compute the loss of each row.

    Args:
        logits: (rows, vocabulary) bits; if ``keep``, overwritten with the gradient of the losses' sum.
        wanted: (rows,) int64, the target column of each row.
        keep: whether to compute the gradient.
        losses: (rows,) float64, written, in nats; NaN if the row has a NaN or positive infinity, or only negative
            infinities.
        part: rows to compute.
    """
    for r in range(part[1], part[2]):
        row = logits[r]
        largest, right = _largest(logits, row), value(logits, row[wanted[r]])
        if largest != largest:
            losses[r] = np.nan
            if keep:
                row[:] = rounded(logits, np.float32(np.nan))
            continue
        total = 0.0
        for start in range(0, row.size, _PIECE):
            total += _piece_sum(logits, row[start : start + _PIECE], largest)
        losses[r] = np.log(total) + (np.float64(largest) - np.float64(right))
        if keep:
            factor = np.float32(1.0 / total)
            for i in range(row.size):
                row[i] = rounded(logits, exponential(value(logits, row[i]) - largest) * factor)
            row[wanted[r]] = rounded(logits, exponential(right - largest) * factor - np.float32(1.0))
