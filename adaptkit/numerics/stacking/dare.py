"""DARE: drop elements at random, rescale the rest to preserve the expectation, and sum.

Each element of w_t Δ_t is kept with probability ``density`` and then divided by it; the sum over the adapters follows.
The paper speaks of the drop rate, 1 − density.

Variant: peft's ``dare_linear_svd``; its ``dare_linear`` drops elements of A and of B. mergekit's ``dare_linear`` does
not divide by the density: it scales what is kept of each matrix to the Σ|δ| that the whole had.

The more is dropped, the less is the result of low rank: the noise has (1 − density) / density times the energy of what
it is added to. The energy kept says how much of it a rank can hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._elements import by_rows
from adaptkit.numerics.stacking._method import Method, check_density, check_seed
from adaptkit.numerics.stacking._random import uniform


@dataclass(frozen=True)
class DareOptions:
    """Options of DARE.

    Attributes:
        density: probability with which an element is kept.
        seed: of the choice.
    """

    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_seed(self.seed)


def drop_and_rescale(changes: Tensor, rows: slice, options: DareOptions, module: str) -> Tensor:
    """Keep elements at random, divided by the probability of that.

    Args:
        changes: (adapters, rows, in) float64.
        rows: which these are.
        options: probability and seed.
        module: name.
    """
    kept = [
        uniform(options.seed, module, adapter, rows, changes.shape[2]) < options.density
        for adapter in range(changes.shape[0])
    ]
    return changes * torch.stack(kept) / options.density


def combine(terms: Sequence[LowRank], options: DareOptions, module: str) -> Tensor:
    """Drop, rescale, add. Returns (out, in) float64."""
    return by_rows(terms, lambda changes, rows: drop_and_rescale(changes, rows, options, module).sum(0))


METHOD = Method(combine, source="DARE (arXiv:2311.03099), summed (dare_linear)", options=DareOptions)
