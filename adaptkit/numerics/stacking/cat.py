"""Concatenation: stack A matrices vertically and B matrices horizontally. Exact; ranks add up.

The factors are unchanged, except that the scalings are multiplied into B, which is rounded to float32 once. Only
``--rank`` and ``--energy`` replace them by other factors.
"""

from adaptkit.numerics.stacking._core import add_up
from adaptkit.numerics.stacking._method import Method

METHOD = Method(add_up, source="LoRA Soups (arXiv:2410.13025), CAT, with the scalings moved into B", length="as given")
