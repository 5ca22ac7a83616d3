"""The weighted sum of the changes, cut off at the rank of its largest part.

The sum of ``cat``, decomposed in factored form. Without ``--rank`` or ``--energy`` the largest of the adapters' ranks
is kept, as in peft, whose result ours equals up to rounding; at full rank the sum is exact.
"""

from adaptkit.numerics.stacking._core import add_up
from adaptkit.numerics.stacking._method import Method

METHOD = Method(
    add_up,
    source="the sum of LoRA Soups (arXiv:2410.13025), CAT, truncated by SVD (Eckart and Young, 1936), as peft's svd",
    length="largest",
)
