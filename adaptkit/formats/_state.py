"""The quantization state of a weight: a tensor of JSON that says how the weight is quantized.

    {"quant_type", "blocksize", "dtype", "shape"}
    {..., "nested_blocksize", "nested_dtype", "nested_offset"}        with double quantization

It is padded with spaces to its maximum length, since its size must be known before the offset is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptkit.errors import CheckpointError, UsageError
from adaptkit.formats._encoding import Encoding
from adaptkit.numerics.absmax import GROUP
from adaptkit.numerics.arrays import Values, as_array
from adaptkit.numerics.dtypes import ARRAY_DTYPES
from adaptkit.numerics.spec import TensorSpec

STATE_NAME = re.compile(r"\.quant_state\.(?:bitsandbytes|adaptkit)__(nf4|fp4|int8)$")
GET_AGAIN = "download or copy the checkpoint again, or quantize the original again"
_OFFSET_WIDTH = 26
"""Maximum length of the decimal form of a float32 converted to float64."""


@dataclass(frozen=True)
class Outline:
    """The properties of a quantized weight, without its data.

    Attributes:
        encoding: how it is quantized.
        shape: of the weight: (out, in), or (experts, out, in).
        dtype_name: safetensors name of the type that readers dequantize to: the weight's type before quantization, but
            bfloat16 for float32 weights that adaptkit quantized.
        offset: of doubly quantized constants, in the weight's units; 0 without double quantization.
    """

    encoding: Encoding
    shape: tuple[int, ...]
    dtype_name: str
    offset: float


def parse_state(name: str, parts: Mapping[str, Values]) -> Outline:
    """Parse the state among a weight's parts.

    Args:
        name: of the weight.
        parts: maps suffixes to the weight's tensors; for tensors other than the state, only the suffix is used.

    Raises:
        CheckpointError: the state is missing or malformed.
    """
    try:
        suffix, match = next((suffix, match) for suffix in parts if (match := STATE_NAME.search(suffix)))
        state: dict[str, Any] = json.loads(as_array(parts[suffix]).tobytes())
        shape, block_size = tuple(int(n) for n in state["shape"]), int(state["blocksize"])
        if len(shape) not in (2, 3) or min(shape) < 1 or block_size < 1:
            raise CheckpointError(
                f"{name}: shape {list(shape)} in blocks of {block_size} is not a matrix", hint=GET_AGAIN
            )
        nested = ".nested_absmax" in parts
        if nested and int(state["nested_blocksize"]) != GROUP:
            raise CheckpointError(
                f"{name}: nested constants are in groups of {state['nested_blocksize']}; expected {GROUP}",
                hint="quantize the original again",
            )
        encoding = Encoding(match[1], block_size, nested)
        dtype = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[state["dtype"]]
        return Outline(encoding, shape, dtype, float(state["nested_offset"]) if nested else 0.0)
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError, StopIteration, UsageError) as error:
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
