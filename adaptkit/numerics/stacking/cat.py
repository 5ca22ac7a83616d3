"""Concatenation: stack A matrices vertically and B matrices horizontally. Exact; ranks add up.

The factors stay what they were but for the scalings, which move into B and are rounded to float32 once. Only
``--rank`` or ``--energy`` make other factors of them.
"""

from adaptkit.numerics.stacking._core import add_up
from adaptkit.numerics.stacking._method import Method

METHOD = Method(add_up, source="LoRA Soups (arXiv:2410.13025), CAT, with the scalings moved into B", length="as given")
