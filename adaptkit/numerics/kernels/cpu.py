"""The kernels of ``reference``, compiled by numba; they run in one thread and release the GIL.

Every function gives the same bits as the function of that name in ``reference``, which documents it.
"""

from adaptkit.numerics.kernels._cpu_blocks import decode_4bit, encode_4bit
from adaptkit.numerics.kernels._cpu_constants import decode_constants, encode_constants
from adaptkit.numerics.kernels._cpu_exact import add_rounded, addition_sums, undo, undo_residual
from adaptkit.numerics.kernels._cpu_factors import low_rank_delta, prepare
from adaptkit.numerics.kernels._cpu_grouped import decode_groups, encode_groups, group_extremes, nearest_codes
from adaptkit.numerics.kernels._cpu_merge import merge_rows, unmerge_rows

__all__ = [
    "add_rounded",
    "addition_sums",
    "decode_4bit",
    "decode_constants",
    "decode_groups",
    "encode_4bit",
    "encode_constants",
    "encode_groups",
    "group_extremes",
    "low_rank_delta",
    "merge_rows",
    "nearest_codes",
    "prepare",
    "undo",
    "undo_residual",
    "unmerge_rows",
]
