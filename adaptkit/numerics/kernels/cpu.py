"""The kernels of ``reference``, compiled by numba for one CPU core each; they release the GIL.

Every function gives the bits of its namesake in ``reference``; read that for what they mean.
"""

from adaptkit.numerics.kernels._cpu_blocks import decode_4bit, decode_8bit, encode_4bit, encode_8bit
from adaptkit.numerics.kernels._cpu_constants import decode_constants, encode_constants
from adaptkit.numerics.kernels._cpu_exact import add_rounded, addition_sums, low_rank_delta, undo, undo_residual

__all__ = [
    "add_rounded",
    "addition_sums",
    "decode_4bit",
    "decode_8bit",
    "decode_constants",
    "encode_4bit",
    "encode_8bit",
    "encode_constants",
    "low_rank_delta",
    "undo",
    "undo_residual",
]
