"""Weighted sum of the changes, truncated to the largest rank of any adapter.

The sum of ``cat``, decomposed in factored form. Without ``--rank`` or ``--energy``, every module gets the largest rank
of any adapter in any module, as in peft, and the result equals peft's up to rounding. At full rank the sum is exact.
"""

from adaptkit.numerics.stacking._core import add_up
from adaptkit.numerics.stacking._method import Method

METHOD = Method(
    add_up,
    source="the sum of LoRA Soups (arXiv:2410.13025), CAT, truncated by SVD (Eckart and Young, 1936), as peft's svd",
    length="largest",
)
