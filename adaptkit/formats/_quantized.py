"""The layout of quantized weights in a checkpoint; for 4 bits it is bitsandbytes', so that other tools can read it.

    X.weight                                U8   [(n + 1) // 2, 1]      two codes a byte; I8 [n, 1] in int8
    X.weight.absmax                         U8   [M]                    M = ceil(n / block_size)
    X.weight.quant_state.bitsandbytes__nf4  U8   JSON: types, block sizes, shape, offset
    X.weight.nested_absmax                  F32  [ceil(M / 256)]
    X.weight.nested_quant_map               F32  [256]
    X.weight.quant_map                      F32  [16]                   absent in int8

Without double quantization ``absmax`` is F32 and follows the state, and the nested parts are absent. The state's name
ends in the format: ``bitsandbytes__fp4``, or ``adaptkit__int8``, since bitsandbytes has no blockwise int8. A stack of
matrices (the experts of one layer) is one such weight with a shape of three dimensions; no block spans two matrices.
In other tools' files the tensor of 4-bit codes may have a float type (``bnb_4bit_quant_storage``) with the same bytes.

The codes come first, so that they can be written before the rest is known. The JSON is padded with spaces so that every
tensor is aligned, and so that every size is known before any weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptkit.errors import CheckpointError
from adaptkit.formats._blockwise import Blockwise
from adaptkit.formats._encoding import Encoding, state_suffix
from adaptkit.formats._state import GET_AGAIN, STATE_NAME, Outline, parse_state, state_bytes
from adaptkit.formats._tensors import Tensors
from adaptkit.lazy import torch
from adaptkit.numerics.absmax import (
    GROUP,
    DoubleQuantized,
    dequantize_absmax,
    dynamic_levels,
    dynamic_map,
    quantize_absmax,
)
from adaptkit.numerics.arrays import AnyValues, Array, DType, Values, as_array, like
from adaptkit.numerics.dtypes import ARRAY_DTYPES, DTYPES
from adaptkit.numerics.kernels import kernels_for
from adaptkit.numerics.kernels.codebook import BOOKS
from adaptkit.numerics.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_STORAGE = ("bfloat16", "float16", "float32")
"""Float types that bitsandbytes may declare for 4-bit codes (``bnb_4bit_quant_storage``)."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized weight in memory, as numpy arrays or torch tensors.

    Attributes:
        encoding: how it is quantized.
        codes: (ceil(n / 2),) uint8, or (n,) int8; empty if only the rest was read.
        constants: absmax constants, doubly quantized or as (M,) float32.
        shape: of the weight: (out, in), or (experts, out, in).
        dtype: type that readers dequantize to, as numpy's for arrays, as torch's for tensors; see ``quant_state``.
        levels: (256,) float32, the values of the codes of doubly quantized constants.
    """

    encoding: Encoding
    codes: Any
    constants: Any
    shape: tuple[int, ...]
    dtype: Any
    levels: Any

    @property
    def block_size(self) -> int:
        """Number of weights that share one constant."""
        return self.encoding.block_size

    @property
    def count(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def absmax(self) -> Any:
        """The constants in float32, (M,)."""
        return dequantize_absmax(self.constants, self.levels)

    def matrix(self, index: int) -> QuantizedWeight:
        """Return one matrix of a stack, (out, in).

        It shares the stack's memory, but its constants are decoded if their first group begins in another matrix.
        """
        count = math.prod(self.shape[1:])
        blocks, code_bytes = count // self.block_size, len(self.codes) * count // self.count
        first, last = index * blocks, (index + 1) * blocks
        constants = self.constants
        if isinstance(constants, DoubleQuantized):
            before, groups = first % GROUP, slice(first // GROUP, -(-last // GROUP))
            codes = constants.codes[first - before : last]
            constants = DoubleQuantized(codes, constants.nested_absmax[groups], constants.offset)
            if before:
                constants = dequantize_absmax(constants, self.levels)[before:]
        else:
            constants = constants[first:last]
        codes = self.codes[index * code_bytes : (index + 1) * code_bytes]
        return QuantizedWeight(self.encoding, codes, constants, self.shape[1:], self.dtype, self.levels)

    def dequantize(self, dtype: DType | None = None) -> Any:
        """Return the dequantized weight in its shape; ``dtype`` overrides the type given by the state."""
        nested, book = self.constants, BOOKS.get(self.encoding.format)
        decode = getattr(kernels_for(self.codes), "decode_nested_4bit", None)  # GPU only: saves a kernel launch
        if decode is not None and book is not None and isinstance(nested, DoubleQuantized):
            constants = nested.codes, nested.nested_absmax, nested.offset, self.levels
            flat = decode(self.codes, constants, self.count, self.block_size, book, dtype or self.dtype)
            return flat.view(self.shape)
        packed = Blockwise(self.codes, self.absmax, self.shape, self.block_size)
        return self.encoding.numerics.dequantize(packed, dtype or self.dtype)


def quantization_error(
    weight: Tensor, encoding: Encoding, codes: Tensor, constants: DoubleQuantized | Tensor
) -> Tensor:
    """Return the quantization error W − Q in float32, in the weight's shape; Q is the dequantized weight.

    Args:
        weight: (out, in).
        encoding: how it was quantized.
        codes: of the weight.
        constants: of the weight's blocks, doubly quantized or as (M,) float32.
    """
    packed = QuantizedWeight(encoding, codes, constants, tuple(weight.shape), torch.float32, dynamic_map())
    found: Tensor = weight.float() - packed.dequantize()
    return found


def code_spec(weight: TensorSpec, encoding: Encoding) -> TensorSpec:
    """Return the spec of the tensor that holds a weight's codes."""
    if encoding.numerics.bits == 8:
        return TensorSpec(weight.name, "I8", (weight.count, 1))
    return TensorSpec(weight.name, "U8", ((weight.count + 1) // 2, 1))


def part_specs(weight: TensorSpec, encoding: Encoding) -> list[TensorSpec]:
    """Return the specs of the tensors that a quantized weight consists of, in the order in which they are written.

    Args:
        weight: the 16- or 32-bit weight.
        encoding: how it is quantized.
    """
    name, blocks = weight.name, -(-weight.count // encoding.block_size)
    small, floats = [code_spec(weight, encoding)], []
    if encoding.double_quant:
        small += [TensorSpec(f"{name}.absmax", "U8", (blocks,))]
        floats += [
            TensorSpec(f"{name}.nested_absmax", "F32", (-(-blocks // GROUP),)),
            TensorSpec(f"{name}.nested_quant_map", "F32", (256,)),
        ]
    else:
        floats += [TensorSpec(f"{name}.absmax", "F32", (blocks,))]
    if encoding.numerics.levels is not None:
        floats += [TensorSpec(f"{name}.quant_map", "F32", (len(encoding.numerics.levels),))]
    state = len(state_bytes(weight, encoding, 0.0))
    # Pad the whole group to a multiple of eight bytes; the floats in it then begin at a multiple of four.
    state += -(sum(spec.nbytes for spec in small + floats) + state) % 8
    return [*small, TensorSpec(name + state_suffix(encoding.format), "U8", (state,)), *floats]


def constant_parts(weight: TensorSpec, encoding: Encoding, constants: DoubleQuantized | Values) -> dict[str, Array]:
    """Return all tensors of ``part_specs`` except the codes, by name and in that order.

    Args:
        weight: the 16- or 32-bit weight.
        encoding: how it is quantized.
        constants: of the weight's blocks, doubly quantized or as (M,) float32.
    """
    offset = 0.0
    if isinstance(constants, DoubleQuantized):
        offset = constants.offset
        parts = {
            "absmax": as_array(constants.codes),
            "nested_absmax": as_array(constants.nested_absmax),
            "nested_quant_map": dynamic_levels(),
        }
    else:
        parts = {"absmax": as_array(constants)}
    if encoding.numerics.levels is not None:
        parts["quant_map"] = np.array(encoding.numerics.levels, np.float32)
    named = {f"{weight.name}.{suffix}": part for suffix, part in parts.items()}
    specs = part_specs(weight, encoding)[1:]
    state = next(spec for spec in specs if STATE_NAME.search(spec.name))
    text = state_bytes(weight, encoding, offset).ljust(state.nbytes)
    named[state.name] = np.frombuffer(bytearray(text), np.uint8)
    return {spec.name: named[spec.name] for spec in specs}


def quantize_constants(absmax: Values, encoding: Encoding) -> DoubleQuantized | Values:
    """Quantize the constants if the encoding uses double quantization."""
    return quantize_absmax(absmax) if encoding.double_quant else absmax


def quantized_names(files: Tensors) -> list[str]:
    """Return the names of the quantized weights in a checkpoint."""
    return [STATE_NAME.sub("", name) for name in files.tensors if STATE_NAME.search(name)]


def part_names(files: Tensors, name: str) -> list[str]:
    """Return the names of all tensors that make up one quantized weight."""
    states = [state_suffix(format_name) for format_name in ("nf4", "fp4", "int8")]
    suffixes = ("", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", *states)
    return [name + suffix for suffix in suffixes if name + suffix in files.tensors]


def read_outline(files: Tensors, name: str) -> Outline:
    """Read the state of a quantized weight, but neither its codes nor its constants.

    Raises:
        CheckpointError: the state is missing or malformed.
    """
    nothing = np.empty(0)  # parse_state needs only the names of the other parts
    found = part_names(files, name)
    return parse_state(
        name, {n.removeprefix(name): files.read_array(n) if STATE_NAME.search(n) else nothing for n in found}
    )


def read_quantized(files: Tensors, name: str) -> QuantizedWeight:
    """Read one quantized weight, as torch tensors.

    Raises:
        CheckpointError: parts are missing or inconsistent.
    """
    return decode(name, {part.removeprefix(name): files.read(part) for part in part_names(files, name)})


def read_constants(files: Tensors, name: str) -> QuantizedWeight:
    """Read a quantized weight without its codes, which may be large, as numpy arrays.

    Raises:
        CheckpointError: parts are missing or inconsistent.
    """
    parts = {part.removeprefix(name): files.read_array(part) for part in part_names(files, name) if part != name}
    if name not in files.tensors:
        raise CheckpointError(f"{name}: its codes are missing", hint=GET_AGAIN)
    spec = files.spec(name)
    return _decode(name, parts, np.empty(0, ARRAY_DTYPES[spec.dtype]), spec.nbytes)


def read_run(files: Tensors, name: str, weight: QuantizedWeight, absmax: Array, start: int, count: int) -> Blockwise:
    """Read a run of a quantized weight's codes, with their constants.

    Args:
        files: files that hold the weight.
        name: of the weight.
        weight: the rest of it, from ``read_constants``.
        absmax: all of its constants, ``weight.absmax``.
        start: index of the first element, a multiple of the block size.
        count: number of elements.
    """
    a_byte = 8 // weight.encoding.numerics.bits
    raw = files.read_bytes(name, start // a_byte, -(-count // a_byte))
    first, blocks = start // weight.block_size, -(-count // weight.block_size)
    codes = raw if a_byte == 2 else raw.view(np.int8)
    return Blockwise(codes, absmax[first : first + blocks], (count,), weight.block_size)


def decode(name: str, parts: Mapping[str, Tensor]) -> QuantizedWeight:
    """Assemble a weight from its parts, which are given by suffix (the codes' suffix is empty).

    Raises:
        CheckpointError: parts are missing or inconsistent.
    """
    if "" not in parts:
        raise CheckpointError(f"{name}: its codes are missing", hint=GET_AGAIN)
    codes = parts[""].reshape(-1)
    return _decode(name, parts, codes, codes.nbytes)


def _decode(name: str, parts: Mapping[str, AnyValues], codes: AnyValues, code_bytes: int) -> QuantizedWeight:
    outline = parse_state(name, parts)
    encoding, shape = outline.encoding, outline.shape
    if encoding.numerics.bits == 4 and _type_of(codes) in _STORAGE:
        codes = like(codes, as_array(codes).view(np.uint8))
    try:
        absmax = parts[".absmax"].reshape(-1)
    except KeyError as error:
        raise CheckpointError(f"{name}: its constants are missing", hint=GET_AGAIN) from error
    levels = parts[".nested_quant_map"] if ".nested_quant_map" in parts else like(absmax, dynamic_levels())
    types = (_type_of(codes), _type_of(absmax), _type_of(levels), math.prod(levels.shape))
    code_type = "int8" if encoding.numerics.bits == 8 else "uint8"
    if types != (code_type, "uint8" if encoding.double_quant else "float32", "float32", 256):
        raise CheckpointError(f"{name}: its parts have types that do not fit together: {types}", hint=GET_AGAIN)
    count = math.prod(shape)
    blocks = -(-count // encoding.block_size)
    if code_bytes != (count if encoding.numerics.bits == 8 else (count + 1) // 2) or absmax.shape != (blocks,):
        found = f"{code_bytes} bytes of codes and constants of shape {list(absmax.shape)}"
        raise CheckpointError(f"{name}: {found} do not make {list(shape)} weights", hint=GET_AGAIN)
    constants: Any = absmax
    if encoding.double_quant:
        constants = DoubleQuantized(absmax, parts[".nested_absmax"], outline.offset)
        if math.prod(constants.nested_absmax.shape) != -(-blocks // GROUP):
            raise CheckpointError(
                f"{name}: its nested constants do not fit {blocks} constants in groups of {GROUP}", hint=GET_AGAIN
            )
    dtype = ARRAY_DTYPES[outline.dtype_name] if isinstance(codes, np.ndarray) else DTYPES[outline.dtype_name]
    return QuantizedWeight(encoding, codes, constants, shape, dtype, levels)


def _type_of(values: Values) -> str:
    """Return the name that torch and numpy share for the type of the values."""
    return str(values.dtype).removeprefix("torch.")
