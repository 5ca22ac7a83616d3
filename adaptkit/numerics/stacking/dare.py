"""DARE: drop elements at random, rescale the rest to preserve the expectation, and sum.

Each element of w_t Δ_t is kept with probability ``density`` and then divided by it; the results are summed over the
adapters. The paper's parameter is the drop rate, 1 − density.

Variant: peft's ``dare_linear_svd``; its ``dare_linear`` drops elements of A and of B. mergekit's ``dare_linear`` does
not divide by the density: it rescales the remaining elements of each matrix to the original Σ|δ|.

The more elements are dropped, the further the result is from low rank: dropping adds noise with (1 − density) / density
times the energy of the change. The report's kept energy says how much of the result a rank can hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._elements import room_for, row_blocks
from adaptkit.numerics.stacking._method import Method, density, seed
from adaptkit.numerics.stacking._random import uniform
from adaptkit.settings import Settings


@dataclass(frozen=True)
class DareOptions(Settings):
    """Options of DARE."""

    density: float = density(0.5, "Probability with which an element is kept.")
    seed: int = seed()


def drop_and_rescale(changes: Tensor, rows: slice, options: DareOptions, module: str) -> Tensor:
    """Keep elements of (adapters, rows, in) float64 at random, divided by the probability of being kept."""
    kept = [
        uniform(options.seed, module, adapter, rows, changes.shape[2]) < options.density
        for adapter in range(changes.shape[0])
    ]
    return changes * torch.stack(kept) / options.density


def combine(terms: Sequence[LowRank], options: DareOptions, module: str) -> Tensor:
    """Drop, rescale, sum. Returns (out, in) float64."""
    result = room_for(terms)
    for rows, changes in row_blocks(terms):
        result[rows] = drop_and_rescale(changes, rows, options, module).sum(0)
    return result


METHOD = Method(combine, source="DARE (arXiv:2311.03099), summed (dare_linear)", options=DareOptions)
