"""Changes that are more than an addition: DoRA's magnitudes, replaced values, and weighted sums of such changes.

An adapter that turns W into E(W), merged with weight w, gives W + w · (E(W) - W). With E(W) = g ⊙ (S + Δ), where S is W
or its replacement, every sum of such changes has the form

    merged = gain ⊙ W + change

computed in float64 and rounded once. ``exact.merge_affine`` does that and ``exact.unmerge_affine`` undoes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptkit.numerics.dtypes import Array


@dataclass(frozen=True)
class Effect:
    """The change that one adapter makes to consecutive rows of a weight W (rows, columns).

    Attributes:
        weight: w, the weight that the adapter is merged with.
        delta: Δ, (rows, columns) float64; None for 0. For a plain addition it is already multiplied by ``weight``.
        gain: g, float64, (rows, 1) or (1, columns); None for 1.
        instead: the replacement of W, (rows, columns) float64; None if W is not replaced.
        where: (rows, 1) bool, true for rows that are replaced; True to replace all of them.
    """

    weight: float
    delta: Array | None = None
    gain: Array | None = None
    instead: Array | None = None
    where: Array | bool = True

    @property
    def is_plain(self) -> bool:
        """Whether the change is only an addition."""
        return self.gain is None and self.instead is None


def combine(effects: Sequence[Effect], rows: int, columns: int) -> tuple[Array | None, Array]:
    """Sum effects on the same rows, in the order given.

    Returns:
        gain, float64, broadcastable to (rows, columns), or None for 1; and change, (rows, columns) float64.
    """
    change = np.zeros((rows, columns))
    others = [effect.weight for effect in effects if not effect.is_plain]
    gain: Array | None = np.full((1, 1), 1.0 - sum(others)) if others else None
    for effect in effects:
        factor = np.ones((1, 1)) if effect.is_plain else np.full((1, 1), effect.weight)
        if effect.gain is not None:
            factor = factor * effect.gain
        kept = factor
        if effect.instead is not None:
            kept = np.where(effect.where, 0.0, factor)
            change += factor * np.where(effect.where, effect.instead, 0.0)
        if effect.delta is not None:
            change += factor * effect.delta
        if gain is not None and not effect.is_plain:
            gain = gain + kept
    return gain, change


def square_sums(values: Array, per_column: bool, before: Array | None = None) -> Array:
    """Return Σ v² of each row or column, summed sequentially so that the bits are the same on every machine.

    Args:
        values: (rows, columns) float64.
        per_column: sum over each column instead of each row.
        before: (columns,) sums of the rows above, to continue from; used only with ``per_column``.

    Returns:
        (rows,) or (columns,) float64.
    """
    axis = 0 if per_column else 1
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.square(values)
        if per_column and before is not None:
            squares = np.concatenate([before[None], squares])
        sums: Array = np.cumsum(squares, axis=axis).take(-1, axis=axis)
    return sums
