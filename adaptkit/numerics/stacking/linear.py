"""Weighted sum of the changes, at the smallest rank that holds it. Exact.

Task arithmetic sums the changes, Σ w_t Δ_t. peft's ``linear`` sums A and B matrices separately, which gives
(Σ √w B)(Σ √w A): another matrix, with cross products of different adapters' factors. mergekit calls the sum
``task_arithmetic``; its ``linear`` divides by Σ w.

The sum is that of ``cat``, but at a lower rank if adapters share directions or Σ ranks exceeds min(out, in).
"""

from adaptkit.numerics.stacking._core import add_up
from adaptkit.numerics.stacking._method import Method

METHOD = Method(add_up, source="task arithmetic (arXiv:2212.04089) on the changes, never on A and B apart")
