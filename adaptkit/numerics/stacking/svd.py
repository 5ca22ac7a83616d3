"""The weighted sum of the changes, cut off at the rank of its largest part.

The sum of ``cat``, decomposed in factored form. Without ``--rank`` or ``--energy`` the largest of the adapters' ranks
is kept, as in peft, whose result ours equals up to rounding; at full rank the sum is exact.
"""

from collections.abc import Sequence

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._core import concatenated
from adaptkit.numerics.stacking._method import Method, NoOptions


def combine(terms: Sequence[LowRank], options: NoOptions, module: str) -> LowRank:
    """Add up the changes, in factors of float64."""
    return concatenated(terms)


METHOD = Method(
    combine,
    source="the sum of LoRA Soups (arXiv:2410.13025), CAT, truncated by SVD (Eckart and Young, 1936), as peft's svd",
    length="largest",
)
