"""Changes that are more than an addition: DoRA's magnitudes, replaced values, and weighted sums of such changes.

An adapter that turns W into E(W), merged with weight w, gives W + w · (E(W) - W). With E(W) = g ⊙ (S + Δ), where S is W
or its replacement, every sum of such changes has the form

    merged = gain ⊙ W + change

computed in float64 and rounded once. ``exact.merge_affine`` does that and ``exact.unmerge_affine`` undoes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adaptkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Effect:
    """The change that one adapter makes to consecutive rows of a weight W (rows, columns).

    Attributes:
        weight: w, the weight that the adapter is merged with.
        delta: Δ, (rows, columns) float64; None for 0. For a plain addition it is already multiplied by ``weight``.
        gain: g, float64, (rows, 1) or (1, columns); None for 1.
        instead: the replacement of W, (rows, columns) float64; None if W is not replaced.
        where: (rows, 1) bool, true for rows that are replaced; None to replace all of them.
    """

    weight: float
    delta: Tensor | None = None
    gain: Tensor | None = None
    instead: Tensor | None = None
    where: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the change is only an addition."""
        return self.gain is None and self.instead is None


def combine(effects: Sequence[Effect], rows: int, columns: int) -> tuple[Tensor | None, Tensor]:
    """Sum effects in the order given.

    Args:
        effects: changes of the same rows.
        rows: number of rows.
        columns: number of columns.

    Returns:
        gain, float64, broadcastable to (rows, columns), or None for 1; and change, (rows, columns) float64.
    """
    change = torch.zeros(rows, columns, dtype=torch.float64)
    others = [effect for effect in effects if not effect.is_plain]
    gain: Tensor | None = None
    if others:
        gain = torch.full((1, 1), 1.0 - sum(effect.weight for effect in others), dtype=torch.float64)
    for effect in effects:
        if effect.is_plain:
            if effect.delta is not None:
                change += effect.delta
            continue
        factor = torch.full((1, 1), effect.weight, dtype=torch.float64)
        if effect.gain is not None:
            factor = factor * effect.gain
        kept = factor
        if effect.instead is not None:
            kept = torch.zeros(1, 1, dtype=torch.float64)
            instead = effect.instead
            if effect.where is not None:
                kept = torch.where(effect.where, 0.0, factor)
                instead = torch.where(effect.where, instead, 0.0)
            change += factor * instead
        if effect.delta is not None:
            change += factor * effect.delta
        gain = kept if gain is None else gain + kept
    return gain, change


def square_sums(values: Tensor, per_column: bool, before: Tensor | None = None) -> Tensor:
    """Return Σ v² of each row or column, summed sequentially so that the bits are the same on every machine.

    Args:
        values: (rows, columns) float64.
        per_column: sum over each column instead of each row.
        before: (columns,) sums of the rows above, to continue from; used only with ``per_column``.

    Returns:
        (rows,) or (columns,) float64.
    """
    squares = values.square().numpy()
    if per_column and before is not None:
        squares = np.concatenate([before.numpy()[None], squares])
    axis = 0 if per_column else 1
    return torch.from_numpy(np.cumsum(squares, axis=axis).take(-1, axis=axis).copy())
