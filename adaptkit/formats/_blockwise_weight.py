"""A weight in a block-wise format as it lies in files, and its state: a tensor of JSON that says how it is quantized.

    {"quant_type", "blocksize", "dtype", "shape"}
    {..., "nested_blocksize", "nested_dtype", "nested_offset"}        with double quantization

The state is padded with spaces to its maximum length, since its size must be known before the offset is.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptkit.errors import CheckpointError, UsageError
from adaptkit.formats._format import Encoding, Files, StoredWeight
from adaptkit.numerics.absmax import GROUP, DoubleQuantized, dequantize_absmax, dynamic_levels
from adaptkit.numerics.dtypes import ARRAY_DTYPES, Array
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.spec import TensorSpec

if TYPE_CHECKING:
    from adaptkit.formats._blockwise import Blockwise

GET_AGAIN = "download or copy the checkpoint again, or quantize the original again"
_STORAGE = ("BF16", "F16", "F32")
"""Float types that bitsandbytes may declare for 4-bit codes (``bnb_4bit_quant_storage``)."""
_OFFSET_WIDTH = 26
"""Maximum length of the decimal form of a float32 converted to float64."""


@dataclass(frozen=True, kw_only=True)
class BlockwiseWeight(StoredWeight):
    """A weight in a block-wise format.

    Attributes:
        form: the format.
        encoding: how it is quantized.
        dtype: safetensors name of the type that readers decode to: the weight's type before quantization, but bfloat16
            for float32 weights that adaptkit quantized.
        offset: of doubly quantized constants, in the weight's units; 0 without double quantization.
    """

    form: Blockwise
    encoding: Encoding
    dtype: str
    offset: float
    is_linear: bool = True

    def decode(self, files: Files, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """See ``StoredWeight``."""
        a_byte = 8 // self.form.bits
        raw = files.read_bytes(self.name, start // a_byte, -(-count // a_byte))
        codes = raw if a_byte == 2 else raw.view(np.int8)
        return self.form.dequantize(codes, self._constants(files, start, count), count, self.unit, dtype)

    def too_large(self, files: Files, start: int, count: int, values: Array) -> str:
        """See ``StoredWeight``."""
        absmax = self._constants(files, start, count)
        return f"a weight of up to {np.abs(absmax).max():.6g}" if all_finite(absmax) else ""

    def _constants(self, files: Files, start: int, count: int) -> Array:
        """Read and decode the constants of a run's blocks: (M,) float32."""
        first, stop = start // self.unit, -(-(start + count) // self.unit)
        if not self.encoding.double_quant:
            return files.read_flat(f"{self.name}.absmax", first, stop - first)
        before = first % GROUP
        codes = files.read_flat(f"{self.name}.absmax", first - before, stop - first + before)
        groups = first // GROUP, -(-stop // GROUP) - first // GROUP
        nested = DoubleQuantized(codes, files.read_flat(f"{self.name}.nested_absmax", *groups), self.offset)
        levels = f"{self.name}.nested_quant_map"
        known = files.read(levels).reshape(-1) if levels in self.parts else dynamic_levels()
        found: Array = dequantize_absmax(nested, known)[before:]
        return found


def read_weight(files: Files, form: Blockwise, name: str) -> BlockwiseWeight:
    """Read the state of a weight in a format, and check that the parts fit it.

    Raises:
        CheckpointError: parts are missing or inconsistent, or the state is malformed.
    """
    weight = read_outline(files, form, name)
    _check_parts(files, weight)
    return weight


def read_outline(files: Files, form: Blockwise, name: str) -> BlockwiseWeight:
    """Read only the state of a weight; its other parts need not fit together.

    Raises:
        CheckpointError: the state is malformed.
    """
    parts = part_names(files, form, name)
    state = files.read(name + form.state_suffix).tobytes()
    encoding, shape, dtype, offset = parse_state(name, form.name, state, f"{name}.nested_absmax" in parts)
    return BlockwiseWeight(
        name=name,
        shape=shape,
        parts=parts,
        unit=encoding.block_size,
        dtype=dtype,
        form=form,
        encoding=encoding,
        offset=offset,
    )


def part_names(files: Files, form: Blockwise, name: str) -> tuple[str, ...]:
    """Return the names of all tensors that make up a weight."""
    suffixes = ("", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", form.state_suffix)
    return tuple(name + suffix for suffix in suffixes if name + suffix in files.tensors)


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


def _check_parts(files: Files, weight: BlockwiseWeight) -> None:
    name, encoding, bits = weight.name, weight.encoding, weight.form.bits
    if name not in weight.parts:
        raise CheckpointError(f"{name}: its codes are missing", hint=GET_AGAIN)
    if f"{name}.absmax" not in weight.parts:
        raise CheckpointError(f"{name}: its constants are missing", hint=GET_AGAIN)
    codes, absmax = files.spec(name), files.spec(f"{name}.absmax")
    levels = TensorSpec("", "F32", (256,))
    if f"{name}.nested_quant_map" in weight.parts:
        levels = files.spec(f"{name}.nested_quant_map")
    code_type = "U8" if bits == 4 and codes.dtype in _STORAGE else codes.dtype
    types = (*(ARRAY_DTYPES[dtype].name for dtype in (code_type, absmax.dtype, levels.dtype)), levels.count)
    code_name = "int8" if bits == 8 else "uint8"
    if types != (code_name, "uint8" if encoding.double_quant else "float32", "float32", 256):
        raise CheckpointError(f"{name}: its parts have types that do not fit together: {types}", hint=GET_AGAIN)
    count = math.prod(weight.shape)
    blocks = -(-count // encoding.block_size)
    if codes.nbytes != (count if bits == 8 else (count + 1) // 2) or absmax.count != blocks:
        found = f"{codes.nbytes} bytes of codes and constants of shape [{absmax.count}]"
        raise CheckpointError(f"{name}: {found} do not make {list(weight.shape)} weights", hint=GET_AGAIN)
    if encoding.double_quant and files.spec(f"{name}.nested_absmax").count != -(-blocks // GROUP):
        raise CheckpointError(
            f"{name}: its nested constants do not fit {blocks} constants in groups of {GROUP}", hint=GET_AGAIN
        )


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


def stated_as(form: str, block_size: Any, double_quant: Any, kept: Any) -> tuple[Encoding, list[str] | None] | None:
    """Return what ``WritableFormat.stated`` does, for values from a configuration that may be of any type."""
    paths = [path for path in kept if isinstance(path, str)] if isinstance(kept, list) else None
    if not isinstance(block_size, int) or not isinstance(double_quant, bool):
        return None
    try:
        return Encoding(form, block_size, double_quant), paths
    except UsageError:  # a later version's
        return None
