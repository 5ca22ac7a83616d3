"""Concatenation: A matrices one under the other, B matrices side by side. Exact; ranks add up.

The factors stay what they were but for the scalings, which move into B and are rounded to float32 once. Only
``--rank`` or ``--energy`` make other factors of them.
"""

from collections.abc import Sequence

from adaptkit.numerics.lora import LowRank, concatenate
from adaptkit.numerics.stacking._method import Method, NoOptions


def combine(terms: Sequence[LowRank], options: NoOptions, module: str) -> LowRank:
    """Concatenate; see ``lora.concatenate``."""
    return concatenate(terms)


METHOD = Method(combine, source="LoRA Soups (arXiv:2410.13025), CAT, with the scalings moved into B", length="as given")
