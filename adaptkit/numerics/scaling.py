"""The number that a low-rank product is multiplied by."""

import math


def scaling(alpha: float, rank: int, rslora: bool = False) -> float:
    """What B A is multiplied by: α / r, or α / √r with rsLoRA (arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank
