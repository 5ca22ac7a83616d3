"""The kernels of ``reference``, compiled by numba for one CPU core each; they release the GIL.

Every function gives the bits of its namesake in ``reference``; read that for what they mean.
"""

from adaptkit.numerics.kernels._cpu_exact import add_rounded, addition_sums, low_rank_delta, undo, undo_residual
from adaptkit.numerics.kernels._cpu_nf4 import nf4_decode, nf4_encode

__all__ = ["add_rounded", "addition_sums", "low_rank_delta", "nf4_decode", "nf4_encode", "undo", "undo_residual"]
