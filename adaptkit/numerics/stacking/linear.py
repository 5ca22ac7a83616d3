"""Weighted sum of the changes, at the smallest rank that holds it. Exact.

Task arithmetic adds what the adapters do, Σ w_t Δ_t. It does not add their A matrices and their B matrices, as peft's
``linear`` does, which gives (Σ √w B)(Σ √w A): another matrix, with products of every A with every B in it. mergekit
calls the sum ``task_arithmetic``; its ``linear`` divides by Σ w.
The sum is that of ``cat``; where adapters share directions, or ranks add up to more than the weight has, it is shorter.
"""

from adaptkit.numerics.stacking._core import add_up
from adaptkit.numerics.stacking._method import Method

METHOD = Method(add_up, source="task arithmetic (arXiv:2212.04089) on the changes, never on A and B apart")
