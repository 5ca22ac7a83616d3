"""DELLA: drop elements at random, small ones more often, rescale, elect signs, average the elements with those signs.

In each row of w_t Δ_t, the elements are ranked by magnitude, from 0 to in − 1. The element of rank i is kept with
probability

    p_i = density − epsilon + 2 · epsilon · i / (in − 1)

and divided by it, so that its expectation is unchanged. Steps 2 and 3 are those of ``ties``, in the same variant.

Variant: the paper's MAGPRUNE, ranked by row and rescaled by each element's own probability as in its authors' code
(mergekit now rescales by a norm, see ``dare``). ``epsilon`` is half the width of the window of probabilities, as in
mergekit; the paper's ε is the whole width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptkit.errors import UsageError
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._elements import disjoint_mean, room_for, row_blocks
from adaptkit.numerics.stacking._method import Method, ScaleOptions, density, seed
from adaptkit.numerics.stacking._random import uniform
from adaptkit.settings import setting


@dataclass(frozen=True)
class DellaOptions(ScaleOptions):
    """Options of DELLA."""

    density: float = density(0.5, "Probability with which an element of middle rank is kept.")
    epsilon: float = setting(
        "Difference between ``density`` and the probability of the largest or the smallest element.", 0.15, at_least=0
    )
    seed: int = seed()

    def validate(self) -> None:
        """See ``Settings``."""
        super().validate()
        if self.density - self.epsilon <= 0 or self.density + self.epsilon > 1 + 1e-12:
            room = min(self.density, 1 - self.density)
            raise UsageError(
                f"density ± epsilon: must be above 0 and at most 1, found {self.density} ± {self.epsilon}",
                hint=f"with this density, give an --epsilon from 0 to less than {room:g}",
            )


def probabilities(changes: Tensor, options: DellaOptions) -> Tensor:
    """Return the probability with which each element is kept.

    Args:
        changes: (adapters, rows, in) float64.
        options: density and epsilon.

    Returns:
        The same shape; of equal magnitudes, the one further right counts as larger.
    """
    columns = changes.shape[2]
    if columns == 1:
        return torch.full_like(changes, options.density)
    order = torch.from_numpy(_ascending(changes.abs().numpy().view(np.int64)))
    rank = torch.empty_like(changes).scatter_(2, order, torch.arange(columns).double().expand_as(order))
    return options.density - options.epsilon + 2 * options.epsilon * rank / (columns - 1)


def _ascending(bits: Array) -> Array:
    """Return the indices that sort each row stably, by sorting keys instead of indices, which is much faster.

    A key is an element with its lowest bits replaced by its column. Rows in which these bits matter are sorted again.

    Args:
        bits: (..., columns) int64, not negative: magnitudes, whose order is that of their bits.
    """
    columns = bits.shape[-1]
    low = (1 << (columns - 1).bit_length()) - 1
    keys = bits & ~low | np.arange(columns)
    keys.sort(axis=-1)
    order: Array = keys & low
    found = np.take_along_axis(bits, order, axis=-1)
    wrong = (found[..., 1:] < found[..., :-1]).any(axis=-1)
    order[wrong] = bits[wrong].argsort(axis=-1, kind="stable")
    return order


def combine(terms: Sequence[LowRank], options: DellaOptions, module: str) -> Tensor:
    """Drop by rank, rescale, elect, merge. Returns (out, in) float64."""
    result = room_for(terms)
    for rows, changes in row_blocks(terms):
        kept = probabilities(changes, options)
        drawn = [uniform(options.seed, module, adapter, rows, changes.shape[2]) for adapter in range(len(terms))]
        result[rows] = disjoint_mean(changes * (torch.stack(drawn) < kept) / kept) * options.lambda_
    return result


METHOD = Method(
    combine,
    source="DELLA-Merging (arXiv:2406.11617), MAGPRUNE by row, signs elected after weighting, mean by count",
    options=DellaOptions,
)
