"""The definition of every kernel, in plain numpy.

``_reference_exact`` and ``_reference_blocks`` document the functions; ``cpu``, and the trainer's decoders on other
devices, must give the same bits.
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

__all__ = [
    "add_rounded",
    "addition_sums",
    "decode_4bit",
    "decode_constants",
    "encode_4bit",
    "encode_constants",
    "from_ordinal",
    "low_rank_delta",
    "merge_rows",
    "ordinal",
    "prepare",
    "round_to",
    "undo",
    "undo_residual",
    "unmerge_rows",
]
