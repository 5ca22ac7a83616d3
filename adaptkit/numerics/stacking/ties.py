"""TIES: keep each adapter's largest elements, elect a sign per position, average the elements with that sign.

    1  trim      τ̂_t: the largest ``density`` of the elements of τ_t = w_t Δ_t, by magnitude and by module
    2  elect     γ = the sign of Σ_t τ̂_t; a sum of 0 counts as positive
    3  merge     λ · the mean of τ̂_t over those t whose element has the sign γ

Variant: trimmed by module, as in peft and mergekit; the paper trims over all modules at once. Signs are elected after
weighting, as in mergekit (peft elects before). The mean divides by the number of adapters that agree, as in the paper
and in peft (mergekit divides by the sum of their weights by default). With equal weights the result is peft's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._elements import disjoint_mean, room_for, row_blocks, trim, trimming
from adaptkit.numerics.stacking._method import Method, ScaleOptions, density


@dataclass(frozen=True)
class TiesOptions(ScaleOptions):
    """Options of TIES; the default is the paper's 20 %."""

    density: float = density(0.2)


def combine(terms: Sequence[LowRank], options: TiesOptions, module: str) -> Tensor:
    """Trim, elect, merge; see the module's docstring. Returns (out, in) float64."""
    room = room_for(terms)
    least = trimming(terms, options.density, module, room)
    for rows, changes in row_blocks(terms):
        room[rows] = disjoint_mean(trim(changes, least)) * options.lambda_
    return room


METHOD = Method(
    combine,
    source="TIES-Merging (arXiv:2306.01708), trimmed by module, signs elected after weighting, mean by count",
    options=TiesOptions,
)
