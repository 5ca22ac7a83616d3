"""Keep each adapter's largest elements and sum them.

The first step of TIES without its election: Σ_t of the largest ``density`` of the elements of w_t Δ_t, by magnitude and
by module, as in peft's ``magnitude_prune_svd``. The remaining elements are not rescaled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._elements import room_for, row_blocks, trim, trimming
from adaptkit.numerics.stacking._method import Method, density
from adaptkit.settings import Settings


@dataclass(frozen=True)
class PruneOptions(Settings):
    """Options of pruning."""

    density: float = density(0.5)


def combine(terms: Sequence[LowRank], options: PruneOptions, module: str) -> Tensor:
    """Trim and sum. Returns (out, in) float64."""
    room = room_for(terms)
    least = trimming(terms, options.density, module, room)
    for rows, changes in row_blocks(terms):
        room[rows] = trim(changes, least).sum(0)
    return room


METHOD = Method(
    combine,
    source="the trimming of TIES-Merging (arXiv:2306.01708), by module, summed, as peft's magnitude_prune",
    options=PruneOptions,
)
