"""SCE: select elements where the adapters differ, weight each adapter by its energy there, erase minority signs.

    1  select     the ``density`` with the largest variance, of the elements whose variance over the adapters is not 0
    2  calculate  η_t = Σ τ̂_t² / Σ_t Σ τ̂_t², a coefficient for each adapter and module
    3  erase      elements whose sign is not that of Σ_t τ̂_t; a sum of 0 counts as positive

The result is λ · Σ η_t τ̂_t / Σ η_t over the remaining elements. An adapter of weight 0, or without the module, counts
in the variance as a change of zero.

Variant: mergekit's, which came from the authors; its ``select_topk`` is ``density``, and 1 (its default) selects
everything. mergekit has no weights here; ours are part of τ_t = w_t Δ_t. It sets all η_t equal if the mean squares of
all τ̂_t sum to less than 1e-6, as they do for many adapters; here η_t follows the paper however small they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._elements import agreeing, nth_largest, room_for, row_blocks
from adaptkit.numerics.stacking._method import Method, ScaleOptions, count_kept, density


@dataclass(frozen=True)
class SceOptions(ScaleOptions):
    """Options of SCE."""

    density: float = density(1.0, "Share of the elements that is selected.")


def _least_variance(terms: Sequence[LowRank], density: float, module: str, room: Tensor) -> float:
    """Return the smallest variance of an element that is selected, infinity if none is; ``room`` is overwritten."""
    for rows, changes in row_blocks(terms):
        room[rows] = changes.var(0, correction=0)
    differing = int(room.count_nonzero())
    return nth_largest(room, count_kept(density, differing, module)) if differing else math.inf


def _selected(changes: Tensor, least: float | None) -> Tensor:
    return changes if least is None else changes * (changes.var(0, correction=0) >= least)


def combine(terms: Sequence[LowRank], options: SceOptions, module: str) -> Tensor:
    """Select, calculate, erase. Returns (out, in) float64."""
    room = room_for(terms)
    least = None if options.density == 1 else _least_variance(terms, options.density, module, room)
    energies = torch.zeros(len(terms), dtype=torch.float64)
    for _, changes in row_blocks(terms):
        energies += _selected(changes, least).square().sum((1, 2))
    coefficients = (energies / energies.sum().clamp(min=torch.finfo(torch.float64).tiny))[:, None, None]
    for rows, changes in row_blocks(terms):
        chosen = _selected(changes, least)
        left = coefficients * agreeing(chosen)
        total = left.sum(0)
        room[rows] = (chosen * left).sum(0) / torch.where(total == 0, 1.0, total) * options.lambda_
    return room


METHOD = Method(combine, source="SCE of FuseChat (arXiv:2408.07990), as mergekit has it", options=SceOptions)
