"""The part of ``reference`` that merges and unmerges: the canonical change, the rounded addition, its inverse.

A merge is round(gain · W + Δ), where W and the result have one type of at most 32 bits and all else is float64: the
product is rounded to float64, then the sum is, and that is rounded once to the type of W. The gain is 1 unless an
adapter has another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def int_type(dtype: torch.dtype) -> torch.dtype:
    """Return the integer type that holds the bits of a weight type."""
    return {2: torch.int16, 4: torch.int32}[dtype.itemsize]


@dataclass(frozen=True)
class Factors:
    """Low-rank changes of one weight, to be added to it in this order.

    Attributes:
        lora_a: (Σ ranks, in) float32, the adapters' A matrices stacked vertically.
        lora_b: (out, Σ ranks) float32, their B matrices stacked horizontally.
        ranks: rank of each adapter.
        scales: weight · scaling of each adapter.
    """

    lora_a: Tensor
    lora_b: Tensor
    ranks: list[int]
    scales: list[float]


@dataclass(frozen=True)
class RowsMerged:
    """The result of ``merge_rows``.

    Attributes:
        weight: (rows, in) of the original weight's type; an array or a tensor like the original.
        residual: (M,) int64, as from ``undo_residual``; empty if not requested.
        finite: whether all of ``weight`` is finite; if not, the figures below are meaningless.
        moved: number of values that changed.
        squared_delta: Σ Δ².
        squared_weight: Σ W².
        overlap: Σ (merged - W) · Δ, with an error of up to 1e-6 · Σ Δ².
    """

    weight: Any
    residual: Any
    finite: bool
    moved: int
    squared_delta: float
    squared_weight: float
    overlap: float


def low_rank_delta(lora_a: Tensor, lora_b: Tensor, ranks: list[int], scales: list[float]) -> Tensor:
    """Return the canonical change of a weight: Σ over adapters of scale · (B A), the same bits on every machine.

    The inner sum is computed in float64 in ascending order of rank; a product of two float32 is exact there. It is
    scaled, then added to the sum of the adapters before it. No matrix library is used, so the bits depend neither on
    threads nor on the processor.

    Args:
        lora_a: see ``Factors``.
        lora_b: see ``Factors``.
        ranks: see ``Factors``.
        scales: see ``Factors``.

    Returns:
        (out, in) float64.
    """
    a, b = lora_a.double(), lora_b.double()
    delta = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64, device=a.device)
    start = 0
    for rank, scale in zip(ranks, scales, strict=True):
        inner = torch.zeros_like(delta)
        for k in range(start, start + rank):
            inner += b[:, k, None] * a[None, k, :]
        delta += inner * scale
        start += rank
    return delta


def round_to(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 once to a narrower float type, to nearest with ties to even.

    torch converts through float32 and so rounds twice. Here the float32 step rounds to odd, which keeps enough
    information for the second step to be correct (Boldo and Melquiond, 2008).
    """
    nearest = exact.to(torch.float32)
    if dtype == torch.float32:
        return nearest
    lost = exact - nearest.double()
    bits = nearest.view(torch.int32)
    grew = nearest.double().abs() > exact.abs()
    odd = torch.where(grew, bits - 1, bits + 1)
    return torch.where((lost != 0) & (bits % 2 == 0), odd, bits).view(torch.float32).to(dtype)


def add_rounded(weight: Tensor, delta: Tensor, gain: Tensor | None = None) -> Tensor:
    """``gain · weight + delta``, computed in float64 and rounded once to the weight's dtype.

    Args:
        weight: (out, in) bfloat16, float16 or float32.
        delta: (out, in) float64.
        gain: float64, finite, two-dimensional, broadcast to (out, in); None for 1.

    Returns:
        (out, in) of the weight's dtype; not finite where the sum overflows.
    """
    exact = weight.double()
    return round_to((exact if gain is None else exact * gain) + delta, weight.dtype)


def addition_sums(weight: Tensor, merged: Tensor, delta: Tensor) -> tuple[int, float, float, float]:
    """Return figures of an addition for reports; so, unlike elsewhere, the order of the sums is not fixed.

    Args:
        weight: (out, in), before.
        merged: (out, in), after.
        delta: (out, in) float64.

    Returns:
        The number of values that changed, Σ Δ², Σ W², and Σ (merged - W) · Δ.
    """
    exact = weight.double()
    effect = merged.double() - exact
    return int((effect != 0).sum()), float((delta**2).sum()), float((exact**2).sum()), float((effect * delta).sum())


def ordinal(values: Tensor) -> Tensor:
    """Number the floats of a type in order: neighbours differ by one, and -0 comes just before +0.

    Returns:
        int32 of the same shape for 16-bit types, int64 for float32.
    """
    bits = values.view(int_type(values.dtype))
    wide = bits.to(torch.int32 if bits.dtype == torch.int16 else torch.int64)
    top = 1 << (8 * bits.element_size() - 1)
    return torch.where(wide >= 0, wide, -(wide + top) - 1)


def from_ordinal(ordinals: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo ``ordinal``."""
    ints = int_type(dtype)
    top = 1 << (8 * ints.itemsize - 1)
    return torch.where(ordinals >= 0, ordinals, -(ordinals + 1) - top).to(ints).view(dtype)


def _candidate(merged: Tensor, delta: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a guess at the original weight, as an ordinal, and where it is certain.

    The guess is (merged - delta) / gain, rounded, or ``merged`` where that is not finite (as for a gain of 0, where
    merged is delta: a replacement is often close to the original). The result of a merge is monotonic in the weight:
    it rises, falls with a negative gain, or is constant with a gain of 0. So the weights with one result are
    neighbours, and the guess is certainly the original if its result is ``merged`` and that of neither neighbour is.
    """
    exact = merged.double() - delta
    near = round_to(exact if gain is None else exact / gain, merged.dtype)
    guess = ordinal(torch.where(torch.isfinite(near), near, merged))
    certain = torch.ones_like(guess, dtype=torch.bool)
    for step, expected in ((0, True), (1, False), (-1, False)):
        again = add_rounded(from_ordinal(guess + step, merged.dtype), delta, gain)
        certain &= (ordinal(again) == ordinal(merged)) == expected
    return guess, certain


def undo_residual(weight: Tensor, merged: Tensor, delta: Tensor, gain: Tensor | None = None) -> Tensor:
    """Return what must be stored so that ``undo`` restores ``weight`` bit for bit.

    Args:
        weight: (out, in), the original.
        merged: (out, in), ``add_rounded(weight, delta, gain)``, finite.
        delta: (out, in) float64.
        gain: as for ``add_rounded``.

    Returns:
        (M,) int64: for each of the M weights that ``merged``, ``delta`` and ``gain`` do not determine, in row-major
        order, the ordinal of the original minus that of the guess.
    """
    guess, certain = _candidate(merged, delta, gain)
    return (ordinal(weight) - guess)[~certain].long()


def undo(merged: Tensor, delta: Tensor, residual: Tensor, gain: Tensor | None = None) -> tuple[Tensor, int]:
    """Restore the weight that ``add_rounded`` turned into ``merged``.

    Args:
        merged: (out, in).
        delta: (out, in) float64, the same bits as when merging.
        residual: (M,) int64 that begins with the result of ``undo_residual``; more may follow.
        gain: the same bits as when merging.

    Returns:
        The weight, (out, in) of the merged dtype, and how much of the residual was used.

    Raises:
        ValueError: the residual is shorter than this addition requires.
    """
    guess, certain = _candidate(merged, delta, gain)
    used = int((~certain).sum())
    check_length(used, residual.numel())
    guess[~certain] += residual[:used].to(guess.dtype)
    return from_ordinal(guess, merged.dtype), used


def check_length(used: int, length: int) -> None:
    """Raise ``ValueError`` if a residual is too short."""
    if used > length:
        raise ValueError(f"{used} weights are ambiguous, but it holds {length}")


def prepare(lora_a: Tensor, lora_b: Tensor, ranks: list[int], scales: list[float]) -> Factors:
    """Convert changes into the form that ``merge_rows`` and ``unmerge_rows`` take; see ``Factors``."""
    return Factors(lora_a, lora_b, ranks, scales)


def _delta_rows(factors: Factors, start: int, count: int) -> Tensor:
    return low_rank_delta(factors.lora_a, factors.lora_b[start : start + count], factors.ranks, factors.scales)


def merge_rows(weight: Tensor, factors: Factors, start: int, with_undo: bool) -> RowsMerged:
    """Add prepared changes to some rows of a weight.

    Args:
        weight: (rows, in) bfloat16, float16 or float32.
        factors: from ``prepare`` of the same module.
        start: index of the first row in the whole weight.
        with_undo: whether to compute the residual too.
    """
    delta = _delta_rows(factors, start, weight.shape[0])
    merged = add_rounded(weight, delta)
    residual = undo_residual(weight, merged, delta) if with_undo else torch.empty(0, dtype=torch.int64)
    finite = bool(torch.isfinite(merged).all())
    return RowsMerged(merged, residual.to(weight.device), finite, *addition_sums(weight, merged, delta))


def unmerge_rows(merged: Tensor, factors: Factors, start: int, residual: Tensor) -> tuple[Tensor, int]:
    """Restore the rows that ``merge_rows`` was given; see ``undo`` for the return value and errors.

    Args:
        merged: (rows, in).
        factors: the same changes in the same order, from ``prepare`` of the same module.
        start: index of the first row in the whole weight.
        residual: (M,) int64 that begins with the residual from ``merge_rows``.
    """
    return undo(merged, _delta_rows(factors, start, merged.shape[0]), residual)
