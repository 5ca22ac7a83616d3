"""Common parts of the elementwise methods: row blocks of the dense changes, trimming, and sign election.

The dense changes are the canonical ones (see ``kernels.reference.low_rank_delta``), so that the choice of elements is
the same on every machine. They are float64 and computed in row blocks. There is one whole matrix, ``room_for`` the
elements of one adapter at a time while their thresholds are searched, and then for the result: fresh memory is slow.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from adaptkit.numerics import exact
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._method import count_kept
from adaptkit.numerics.tensors import as_tensor

_BLOCK_ELEMENTS = 1 << 20
"""Large enough that preparing all of A once per block costs little; twice as many elements are no faster."""


def row_blocks(terms: Sequence[LowRank]) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each block, a slice with start and stop, and the changes there: (adapters, rows, in) float64.

    All adapters' elements of a block fit in 8 MiB, unless it is a single row.
    """
    out, columns = terms[0].shape
    step = max(1, _BLOCK_ELEMENTS // (columns * len(terms)))
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        changes = torch.zeros(len(terms), rows.stop - start, columns, dtype=torch.float64)
        for change, term in zip(changes, terms, strict=True):
            if term.rank:
                change.copy_(as_tensor(exact.delta([term], rows)))
        yield rows, changes


def room_for(terms: Sequence[LowRank]) -> Tensor:
    """Return an uninitialized matrix of the shape of the changes, (out, in) float64."""
    return torch.empty(terms[0].shape, dtype=torch.float64)


def magnitudes(term: LowRank, room: Tensor) -> Tensor:
    """Return ``room`` with the magnitudes of the elements of one change."""
    for rows, changes in row_blocks([term]):
        room[rows] = changes[0].abs_()
    return room


def nth_largest(magnitudes: Tensor, count: int) -> float:
    """Return the ``count``-th largest magnitude, counted from 1. The magnitudes are reordered."""
    flat = magnitudes.numpy().reshape(-1)
    place = flat.size - count
    flat.partition(place)  # several times as fast as torch's kthvalue
    return float(flat[place])


def trimming(terms: Sequence[LowRank], density: float, module: str, room: Tensor) -> Tensor:
    """Return, per adapter, the magnitude of the smallest element that is kept, at this density of its matrix.

    These are the ⌊density · N⌋ largest elements, as in peft, and any others that tie with the smallest of them.

    ``room`` is overwritten; see ``room_for``.

    Returns:
        (adapters, 1, 1) float64; 0 if all elements are kept.

    Raises:
        UsageError: no element would be kept.
    """
    out, columns = terms[0].shape
    kept = count_kept(density, out * columns, module)
    if kept == out * columns:
        return torch.zeros(len(terms), 1, 1, dtype=torch.float64)
    least = [nth_largest(magnitudes(term, room), kept) if term.rank else 0.0 for term in terms]
    return torch.tensor(least, dtype=torch.float64)[:, None, None]


def trim(changes: Tensor, least: Tensor) -> Tensor:
    """Set elements of smaller magnitude than ``least`` to zero. ``least`` broadcasts against ``changes``."""
    return changes * (changes.abs() >= least)


def agreeing(changes: Tensor) -> Tensor:
    """Return whether elements of (adapters, ...) have the sign of the sum over the adapters; a sum of 0 is positive.

    Zeros never agree.
    """
    return (changes != 0) & ((changes > 0) == (changes.sum(0) >= 0))


def disjoint_mean(changes: Tensor) -> Tensor:
    """Return the mean over the adapters whose sign is that of the sum (TIES, steps 2 and 3); 0 where none agrees."""
    votes = agreeing(changes)
    return (changes * votes).sum(0) / votes.sum(0).clamp(min=1)
