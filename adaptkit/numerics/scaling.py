"""The scaling of a LoRA."""

import math


def scaling(alpha: float, rank: int, rslora: bool = False) -> float:
    """Return the factor of B A: α / r, or α / √r with rsLoRA (arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank
