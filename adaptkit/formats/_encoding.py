"""Quantization parameters of a weight, and the ``quantization_config`` that describes them in ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptkit import formats
from adaptkit.discovery import load
from adaptkit.errors import UsageError
from adaptkit.formats._blockwise import Format
from adaptkit.numerics.absmax import check_block_size


@dataclass(frozen=True)
class Encoding:
    """How a weight is quantized.

    Attributes:
        format: name of a module of ``formats``.
        block_size: number of weights that share one constant; a power of two from 32 to 4096.
        double_quant: whether the constants are quantized too.
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        load(formats, self.format, "FORMAT")
        check_block_size(self.block_size)

    @property
    def numerics(self) -> Format:
        """The format's functions."""
        found: Format = load(formats, self.format, "FORMAT")
        return found


def state_suffix(format_name: str) -> str:
    """Return the suffix of the name of a weight's quantization state."""
    owner = "adaptkit" if format_name == "int8" else "bitsandbytes"
    return f".quant_state.{owner}__{format_name}"


def quantization_config(kept: list[str], encoding: Encoding) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``: bitsandbytes' keys for 4 bits, our own for int8.

    Args:
        kept: full dotted paths of the linear modules that stay in 16 bits.
        encoding: of the quantized modules.
    """
    if encoding.numerics.bits == 8:
        return {
            "block_size": encoding.block_size,
            "double_quant": encoding.double_quant,
            "format": encoding.format,
            "modules_to_not_convert": kept,
            "quant_method": "adaptkit",
        }
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": encoding.format,
        "bnb_4bit_use_double_quant": encoding.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def stated_encoding(stated: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
    """Read what ``quantization_config`` returns, or bitsandbytes wrote for 4 bits; None if it is another method's.

    Args:
        stated: may be anybody's, and empty.

    Returns:
        The encoding, with the default block size where bitsandbytes' keys do not tell it, and the paths of the modules
        that stay in 16 bits; None if it names none, for which bitsandbytes keeps the output layer.
    """
    format_name: Any
    block_size: Any
    if stated.get("quant_method") == "bitsandbytes" and stated.get("load_in_4bit") is True:
        format_name, block_size = stated.get("bnb_4bit_quant_type", "fp4"), Encoding.block_size
        double_quant, kept = stated.get("bnb_4bit_use_double_quant", False), stated.get("llm_int8_skip_modules")
    elif stated.get("quant_method") == "adaptkit":
        format_name, block_size = stated.get("format"), stated.get("block_size")
        double_quant, kept = stated.get("double_quant"), stated.get("modules_to_not_convert")
    else:
        return None
    paths = [path for path in kept if isinstance(path, str)] if isinstance(kept, list) else None
    if not isinstance(format_name, str) or not isinstance(block_size, int) or not isinstance(double_quant, bool):
        return None
    try:
        return Encoding(format_name, block_size, double_quant), paths
    except UsageError:  # a later version's
        return None
