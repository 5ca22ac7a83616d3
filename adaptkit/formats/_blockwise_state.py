"""The state of a weight in a block-wise format: a tensor of JSON that says how it is quantized.

    {"quant_type", "blocksize", "dtype", "shape"}
    {..., "nested_blocksize", "nested_dtype", "nested_offset"}        with double quantization

The state is padded with spaces to its maximum length, since its size must be known before the offset is.
"""

import json
from collections.abc import Mapping
from typing import Any

from adaptkit.errors import CheckpointError, UsageError
from adaptkit.formats._format import Encoding
from adaptkit.numerics.absmax import GROUP
from adaptkit.numerics.dtypes import ARRAY_DTYPES
from adaptkit.numerics.spec import TensorSpec

GET_AGAIN = "download or copy the checkpoint again, or quantize the original again"
_OFFSET_WIDTH = 26
"""Maximum length of the decimal form of a float32 converted to float64."""


def parse_state(name: str, form: str, text: bytes, is_nested: bool) -> tuple[Encoding, tuple[int, ...], str, float]:
    """Parse a state.

    Args:
        name: of the weight, for messages.
        form: name of its format.
        text: content of the state.
        is_nested: whether there are nested constants.

    Returns:
        The fields of ``BlockwiseWeight``: encoding, shape, dtype and offset.

    Raises:
        CheckpointError: the state is malformed.
    """
    try:
        state: dict[str, Any] = json.loads(text)
        shape, block_size = tuple(int(n) for n in state["shape"]), int(state["blocksize"])
        if len(shape) not in (2, 3) or min(shape) < 1 or block_size < 1:
            raise CheckpointError(
                f"{name}: shape {list(shape)} in blocks of {block_size} is not a matrix", hint=GET_AGAIN
            )
        if is_nested and int(state["nested_blocksize"]) != GROUP:
            raise CheckpointError(
                f"{name}: nested constants are in groups of {state['nested_blocksize']}; expected {GROUP}",
                hint="quantize the original again",
            )
        dtype = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[state["dtype"]]
        return Encoding(form, block_size, is_nested), shape, dtype, float(state["nested_offset"]) if is_nested else 0.0
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError, UsageError) as error:
        raise CheckpointError(f"{name}: its quantization state is malformed ({error!r})", hint=GET_AGAIN) from error


def state_bytes(weight: TensorSpec, encoding: Encoding, offset: float) -> bytes:
    """Return the bytes of a weight's state; the length does not depend on the offset.

    Args:
        weight: the 16- or 32-bit weight.
        encoding: how it is quantized.
        offset: of doubly quantized constants.
    """
    dtype = ARRAY_DTYPES[weight.dtype].name
    state: dict[str, Any] = {
        "quant_type": encoding.format,
        "blocksize": encoding.block_size,
        # Readers cast the decoded weight to this type; bitsandbytes' own is never float32 (unsloth cannot read that).
        "dtype": "bfloat16" if weight.dtype == "F32" else dtype,
        "shape": list(weight.shape),
    }
    if not encoding.double_quant:
        return json.dumps(state).encode()
    nested = {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(state | nested)
    return (text + " " * (_OFFSET_WIDTH - len(repr(offset)))).encode()


def config_block(form: str, kept: list[str], double_quant: bool) -> dict[str, Any]:
    """Return the ``quantization_config`` of bitsandbytes; ``kept`` are paths of modules in 16 bits."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": form,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def stated_as(form: str, block: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
    """Return what ``WritableFormat.stated`` does, for a configuration that may be anybody's."""
    if block.get("quant_method") != "bitsandbytes" or block.get("load_in_4bit") is not True:
        return None
    if block.get("bnb_4bit_quant_type", "fp4") != form:
        return None
    double_quant, kept = block.get("bnb_4bit_use_double_quant", False), block.get("llm_int8_skip_modules")
    if not isinstance(double_quant, bool):
        return None
    paths = [path for path in kept if isinstance(path, str)] if isinstance(kept, list) else None
    return Encoding(form, Encoding.block_size, double_quant), paths
