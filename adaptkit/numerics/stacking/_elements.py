"""What the methods that look at single elements share: row blocks of the dense changes, trimming, electing signs.

The dense changes are the canonical ones (see ``kernels.reference.low_rank_delta``), so that which element is kept is
the same on every machine. They are float64 and exist in row blocks; besides them one whole matrix, the result, and
while a threshold over a whole matrix is looked for two more.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaptkit.numerics import lora
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._method import count_kept

Rule = Callable[[Tensor, slice], Tensor]
"""(the changes (adapters, rows, in) float64, which rows of the matrix they are) -> (rows, in)."""

_BLOCK_ELEMENTS = 1 << 20
"""So few blocks that what each prepares of A, all of it, costs little; twice as many elements are no faster."""


def changes_in(terms: Sequence[LowRank], rows: slice) -> Tensor:
    """The dense changes of some rows: (adapters, rows, in) float64; rows are given from start to stop."""
    changes = torch.zeros(len(terms), rows.stop - rows.start, terms[0].shape[1], dtype=torch.float64)
    for change, term in zip(changes, terms, strict=True):
        if term.rank:
            change.copy_(lora.delta([term], rows))
    return changes


def row_blocks(terms: Sequence[LowRank]) -> list[slice]:
    """Consecutive rows of the matrix; all adapters' elements of one block fit in 8 MiB, or it is a single row."""
    out, columns = terms[0].shape
    step = max(1, _BLOCK_ELEMENTS // (columns * len(terms)))
    return [slice(first, min(first + step, out)) for first in range(0, out, step)]


def by_rows(terms: Sequence[LowRank], rule: Rule) -> Tensor:
    """Apply a rule to all changes, block by block.

    Args:
        terms: of one module, one per adapter.
        rule: looks at no more than the block.

    Returns:
        (out, in) float64.
    """
    result = torch.empty(terms[0].shape, dtype=torch.float64)
    for rows in row_blocks(terms):
        result[rows] = rule(changes_in(terms, rows), rows)
    return result


def nth_largest(magnitudes: Tensor, count: int) -> float:
    """The ``count``-th largest of some magnitudes, counted from 1."""
    flat = magnitudes.reshape(-1)
    return float(flat.kthvalue(flat.numel() - count + 1).values)


def trimming(terms: Sequence[LowRank], density: float, module: str) -> Tensor:
    """The magnitude from which on each adapter's elements are among the largest ``density`` of its matrix.

    Elements of equal magnitude are kept or dropped together; that of the rest is by count as in peft: ⌊density · N⌋.

    Returns:
        (adapters, 1, 1) float64; 0 where all are kept.

    Raises:
        UsageError: none would be kept.
    """
    out, columns = terms[0].shape
    kept = count_kept(density, out * columns, module)
    if kept == out * columns:
        return torch.zeros(len(terms), 1, 1, dtype=torch.float64)
    least = [nth_largest(lora.delta([term]).abs_(), kept) if term.rank else 0.0 for term in terms]
    return torch.tensor(least, dtype=torch.float64)[:, None, None]


def trim(changes: Tensor, least: Tensor) -> Tensor:
    """Zero what is smaller than a magnitude. ``least`` broadcasts against ``changes``."""
    return changes * (changes.abs() >= least)


def agreeing(changes: Tensor) -> Tensor:
    """Which elements have the sign of the sum over the adapters, as 1 or 0; a sum of 0 counts as positive.

    Args:
        changes: (adapters, ...). Zeros agree with nobody.
    """
    elected = torch.where(changes.sum(0) >= 0, 1.0, -1.0).to(changes.dtype)
    return (changes.sign() == elected).to(changes.dtype)


def disjoint_mean(changes: Tensor) -> Tensor:
    """The mean over those adapters whose sign is that of the sum (TIES, steps 2 and 3).

    Args:
        changes: (adapters, ...).

    Returns:
        (...); 0 where all are 0.
    """
    votes = agreeing(changes)
    return (changes * votes).sum(0) / votes.sum(0).clamp(min=1)
