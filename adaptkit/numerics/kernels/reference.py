"""The definition of every kernel, in plain numpy.

``_reference_exact``, ``_reference_blocks`` and ``_reference_grouped`` document the functions; ``cpu``, and the
trainer's decoders on other devices, must give the same bits.
"""

from adaptkit.numerics.kernels._reference_blocks import (
    decode_4bit,
    decode_constants,
    encode_4bit,
    encode_constants,
)
from adaptkit.numerics.kernels._reference_exact import (
    add_rounded,
    addition_sums,
    from_ordinal,
    low_rank_delta,
    merge_rows,
    ordinal,
    prepare,
    round_to,
    undo,
    undo_residual,
    unmerge_rows,
)
from adaptkit.numerics.kernels._reference_grouped import decode_groups, encode_groups, group_extremes, nearest_codes

__all__ = [
    "add_rounded",
    "addition_sums",
    "decode_4bit",
    "decode_constants",
    "decode_groups",
    "encode_4bit",
    "encode_constants",
    "encode_groups",
    "from_ordinal",
    "group_extremes",
    "low_rank_delta",
    "merge_rows",
    "nearest_codes",
    "ordinal",
    "prepare",
    "round_to",
    "undo",
    "undo_residual",
    "unmerge_rows",
]
