"""TIES with DARE instead of trimming: drop at random and rescale, elect signs, average the elements with those signs.

Steps 2 and 3 are those of ``ties``, in the same variant: signs are elected after weighting, means divide by the count.

Variant: with equal weights, peft's ``dare_ties_svd``; its ``dare_ties`` does the same to A and to B. mergekit's
``dare_ties`` scales like its ``dare_linear`` (see ``dare``), and sums the elements with the elected sign; it takes a
mean only with ``normalize: true``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._elements import disjoint_mean, room_for, row_blocks
from adaptkit.numerics.stacking._method import Method, ScaleOptions
from adaptkit.numerics.stacking.dare import DareOptions, drop_and_rescale


@dataclass(frozen=True)
class DareTiesOptions(ScaleOptions, DareOptions):
    """Options of DARE with sign election."""


def combine(terms: Sequence[LowRank], options: DareTiesOptions, module: str) -> Tensor:
    """Drop, rescale, elect, merge. Returns (out, in) float64."""
    result = room_for(terms)
    for rows, changes in row_blocks(terms):
        result[rows] = disjoint_mean(drop_and_rescale(changes, rows, options, module)) * options.lambda_
    return result


METHOD = Method(
    combine,
    source="DARE (arXiv:2311.03099), election of TIES-Merging (arXiv:2306.01708) after weighting, mean by count",
    options=DareTiesOptions,
)
