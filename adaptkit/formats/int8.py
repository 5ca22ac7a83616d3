"""Block-wise int8 absmax quantization: each block is scaled so that its largest magnitude becomes 127.

The parts are those of ``nf4``, but for these:

    X.weight                                I8   [n, 1]
    X.weight.quant_state.adaptkit__int8     since bitsandbytes has no blockwise int8
    X.weight.quant_map                      is absent

    a weight             code · (constant / 127)                  in float32, rounded once

8.127 bits a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptkit.formats._blockwise import Blockwise
from adaptkit.formats._blockwise_state import stated_as
from adaptkit.formats._format import Encoding
from adaptkit.numerics.dtypes import Array


@dataclass(frozen=True)
class Int8(Blockwise):
    """See ``Blockwise``. Source: absmax quantization as in LLM.int8() (arXiv:2208.07339), for blocks, not rows."""

    bits = 8
    readers = ()
    owner = "adaptkit"
    method = "adaptkit (int8)"

    def quantize(self, values: Array, block_size: int, measure: bool) -> tuple[Array, Array, Array | None]:
        """Round ``127 / absmax · weight`` to the nearest integer, ties to even; see ``Blockwise``."""
        from adaptkit.numerics.kernels import cpu  # here, since it loads numba

        return cpu.encode_8bit(values, block_size, measure)

    def dequantize(self, codes: Array, absmax: Array, count: int, block_size: int, dtype: np.dtype[Any]) -> Array:
        """Return code times absmax / 127 in float32, rounded once to ``dtype``; see ``Blockwise``."""
        from adaptkit.numerics.kernels import cpu  # here, since it loads numba

        return cpu.decode_8bit(codes, absmax, count, block_size, dtype)

    def config_block(self, kept: list[str], encoding: Encoding) -> dict[str, Any]:
        """See ``WritableFormat``."""
        return {
            "block_size": encoding.block_size,
            "double_quant": encoding.double_quant,
            "format": self.name,
            "modules_to_not_convert": kept,
            "quant_method": "adaptkit",
        }

    def stated(self, block: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
        """See ``WritableFormat``."""
        if block.get("quant_method") != "adaptkit" or block.get("format") != self.name:
            return None
        kept = block.get("modules_to_not_convert")
        return stated_as(self.name, block.get("block_size"), block.get("double_quant"), kept)


FORMAT = Int8("int8")
