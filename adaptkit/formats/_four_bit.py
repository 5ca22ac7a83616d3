"""The 4-bit formats of bitsandbytes, which differ in their levels only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptkit.formats._blockwise import Blockwise
from adaptkit.formats._blockwise_state import stated_as
from adaptkit.formats._format import Encoding
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.kernels.codebook import Codebook


@dataclass(frozen=True)
class FourBit(Blockwise):
    """A 4-bit format: two codes per byte, and a codebook's levels; bytes as bitsandbytes 0.50 makes them."""

    book: Codebook
    bits = 4
    readers = ("transformers with bitsandbytes", "vLLM", "SGLang", "unsloth")
    owner = "bitsandbytes"
    method = "bitsandbytes (4 bits)"

    def quantize(self, values: Array, block_size: int, measure: bool) -> tuple[Array, Array, Array | None]:
        """Map each weight to its nearest level after scaling its block to [-1, 1]; see ``Blockwise``."""
        from adaptkit.numerics.kernels import cpu  # here, since it loads numba

        return cpu.encode_4bit(values, block_size, self.book, measure)

    def dequantize(self, codes: Array, absmax: Array, count: int, block_size: int, dtype: np.dtype[Any]) -> Array:
        """Return level times absmax in float32, rounded once to ``dtype``; see ``Blockwise``."""
        from adaptkit.numerics.kernels import cpu  # here, since it loads numba

        return cpu.decode_4bit(codes, absmax, count, block_size, self.book, dtype)

    def config_block(self, kept: list[str], encoding: Encoding) -> dict[str, Any]:
        """See ``WritableFormat``; the block size is only in each weight's state."""
        return {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": encoding.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": kept,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        }

    def stated(self, block: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
        """See ``WritableFormat``."""
        if block.get("quant_method") != "bitsandbytes" or block.get("load_in_4bit") is not True:
            return None
        if block.get("bnb_4bit_quant_type", "fp4") != self.name:
            return None
        double_quant, kept = block.get("bnb_4bit_use_double_quant", False), block.get("llm_int8_skip_modules")
        return stated_as(self.name, Encoding.block_size, double_quant, kept)
