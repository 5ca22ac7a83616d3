"""Model Breadcrumbs: drop the largest and the smallest elements of each adapter, and sum the rest.

Of the N elements of w_t Δ_t, sorted by magnitude, the ⌊gamma · N⌋ largest are dropped, and as many of the smallest
as needed to leave ⌊density · N⌋. Elements that tie with the smallest or largest kept one are kept, too. The rest is
summed over the adapters and multiplied by λ (the paper's α). Nothing is rescaled, and no signs are elected.

Variant: sorted by module, as in the paper and mergekit; the authors' code sorts by row. The paper gives percentiles:
elements below β = 1 − gamma − density and above γ = 1 − gamma are dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._elements import magnitudes, nth_largest, room_for, row_blocks
from adaptkit.numerics.stacking._method import Method, ScaleOptions, count_kept, density
from adaptkit.settings import refuse, setting


@dataclass(frozen=True)
class BreadcrumbsOptions(ScaleOptions):
    """Options of Model Breadcrumbs."""

    density: float = density(0.9)
    gamma: float = setting(
        "Share of each adapter's elements that is dropped as the largest.", 0.01, at_least=0, below=1
    )

    def validate(self) -> None:
        """See ``Settings``."""
        super().validate()
        if self.density + self.gamma > 1 + 1e-12:
            refuse(self, "gamma", f"must be at most {1 - self.density:g} with density {self.density}")


def _kept_range(term: LowRank, options: BreadcrumbsOptions, module: str, room: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest magnitude that are kept; ``room`` is overwritten."""
    out, columns = term.shape
    elements = out * columns
    above, kept = int(options.gamma * elements), count_kept(options.density, elements, module)
    if kept == elements or term.rank == 0:
        return 0.0, float("inf")
    sizes = magnitudes(term, room)
    largest = nth_largest(sizes, above + 1)
    return nth_largest(sizes, min(above + kept, elements)), largest


def combine(terms: Sequence[LowRank], options: BreadcrumbsOptions, module: str) -> Tensor:
    """Drop elements at both ends and sum. Returns (out, in) float64."""
    room = room_for(terms)
    bounds = torch.tensor([_kept_range(term, options, module, room) for term in terms], dtype=torch.float64)
    least, largest = bounds[:, 0, None, None], bounds[:, 1, None, None]
    for rows, changes in row_blocks(terms):
        sizes = changes.abs()
        room[rows] = (changes * ((sizes >= least) & (sizes <= largest))).sum(0) * options.lambda_
    return room


METHOD = Method(combine, source="Model Breadcrumbs (arXiv:2312.06795), sorted by module", options=BreadcrumbsOptions)
