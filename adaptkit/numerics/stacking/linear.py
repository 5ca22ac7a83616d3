"""The weighted sum of the changes, at the smallest rank that holds it. Exact.

Task arithmetic adds what the adapters do, Σ w_t Δ_t. It does not add their A matrices and their B matrices, as peft's
``linear`` does, which gives (Σ √w B)(Σ √w A): another matrix, with products of every A with every B in it.
The sum is that of ``cat``; where adapters share directions, or ranks add up to more than the weight has, it is shorter.
"""

from collections.abc import Sequence

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._core import concatenated
from adaptkit.numerics.stacking._method import Method, NoOptions


def combine(terms: Sequence[LowRank], options: NoOptions, module: str) -> LowRank:
    """Add up the changes, in factors of float64."""
    return concatenated(terms)


METHOD = Method(combine, source="task arithmetic (arXiv:2212.04089) on the changes, never on A and B apart")
