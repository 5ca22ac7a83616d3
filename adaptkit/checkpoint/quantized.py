"""The layout that bitsandbytes gives an NF4 weight in a checkpoint, so that every reader of its files reads ours.

    X.weight                              U8   [(n + 1) // 2, 1]      two codes a byte
    X.weight.absmax                       U8   [M]                    M = ceil(n / block_size)
    X.weight.nested_absmax                F32  [ceil(M / 256)]
    X.weight.nested_quant_map             F32  [256]
    X.weight.quant_map                    F32  [16]
    X.weight.quant_state.bitsandbytes__nf4  U8  JSON: types, block sizes, shape, offset

Without double quantization ``absmax`` is F32 and the nested parts are absent. The parts of a weight are written
floats first and the JSON is padded with spaces to a multiple of eight bytes, so that every tensor is aligned and
every size is known before any weight is read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptkit.checkpoint.header import DTYPES, TensorSpec
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.errors import CheckpointError
from adaptkit.numerics.formats import nf4
from adaptkit.numerics.formats._blockwise import Blockwise
from adaptkit.numerics.formats._double_quant import (
    GROUP,
    DoubleQuantized,
    dequantize_absmax,
    dynamic_map,
    quantize_absmax,
)
from adaptkit.numerics.kernels.reference import NF4_LEVELS

STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"
_OFFSET_WIDTH = 26
"""Room for the longest decimal form of a float32 read as a float64."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One NF4 weight as a file holds it, in memory.

    Attributes:
        codes: (ceil(n / 2),) uint8.
        constants: its absmax constants, doubly quantized or as (M,) float32.
        shape: of the weight, (out, in).
        block_size: weights sharing one constant.
        dtype: that the weight had.
        levels: (256,) float32, the map of the nested codes.
    """

    codes: Tensor
    constants: DoubleQuantized | Tensor
    shape: tuple[int, ...]
    block_size: int
    dtype: torch.dtype
    levels: Tensor

    @property
    def absmax(self) -> Tensor:
        """The constants in float32, (M,)."""
        if isinstance(self.constants, Tensor):
            return self.constants
        return dequantize_absmax(self.constants, self.levels)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as every reader of this layout sees it, (out, in)."""
        return nf4.dequantize(Blockwise(self.codes, self.absmax, self.shape, self.block_size), dtype or self.dtype)


def part_specs(weight: TensorSpec, block_size: int, double_quant: bool) -> list[TensorSpec]:
    """The tensors that a weight becomes, in the order in which they are written.

    Args:
        weight: the 16- or 32-bit weight.
        block_size: weights sharing one constant.
        double_quant: whether the constants are quantized too.
    """
    name, blocks = weight.name, -(-weight.count // block_size)
    specs = [TensorSpec(f"{name}.quant_map", "F32", (16,))]
    if double_quant:
        groups = -(-blocks // GROUP)
        specs = [
            TensorSpec(f"{name}.nested_absmax", "F32", (groups,)),
            TensorSpec(f"{name}.nested_quant_map", "F32", (256,)),
            *specs,
        ]
    specs += [
        TensorSpec(f"{name}.absmax", "U8" if double_quant else "F32", (blocks,)),
        TensorSpec(name, "U8", ((weight.count + 1) // 2, 1)),
    ]
    state = len(_state(weight, block_size, 0.0 if double_quant else None))
    state += -(sum(spec.nbytes for spec in specs) + state) % 8
    return [*specs, TensorSpec(name + STATE_SUFFIX, "U8", (state,))]


def encode(weight: TensorSpec, values: Tensor, block_size: int, double_quant: bool) -> dict[str, Tensor]:
    """Quantize a weight into the tensors of ``part_specs``, by name and in that order.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    quantized = nf4.quantize(values, block_size)
    parts = {"quant_map": torch.tensor(NF4_LEVELS, dtype=torch.float32), "absmax": quantized.absmax}
    offset = None
    if double_quant:
        constants = quantize_absmax(quantized.absmax)
        parts |= {
            "nested_absmax": constants.nested_absmax,
            "nested_quant_map": dynamic_map(),
            "absmax": constants.codes,
        }
        offset = constants.offset
    named = {f"{weight.name}.{suffix}": part for suffix, part in parts.items()}
    named[weight.name] = quantized.codes.view(-1, 1)
    specs = part_specs(weight, block_size, double_quant)
    state = _state(weight, block_size, offset).ljust(specs[-1].nbytes)
    named[weight.name + STATE_SUFFIX] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    return {spec.name: named[spec.name] for spec in specs}


def quantized_names(files: TensorFiles) -> list[str]:
    """The names of the NF4 weights in a checkpoint."""
    return [name.removesuffix(STATE_SUFFIX) for name in files.tensors if name.endswith(STATE_SUFFIX)]


def part_names(files: TensorFiles, name: str) -> list[str]:
    """The names of all tensors that make up one NF4 weight."""
    suffixes = ("", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", STATE_SUFFIX)
    return [name + suffix for suffix in suffixes if name + suffix in files.tensors]


def read_quantized(files: TensorFiles, name: str) -> QuantizedWeight:
    """Read one NF4 weight.

    Raises:
        CheckpointError: parts are missing or disagree.
    """
    parts = {part.removeprefix(name): files.read(part) for part in part_names(files, name)}
    return decode(name, parts)


def decode(name: str, parts: Mapping[str, Tensor]) -> QuantizedWeight:
    """Put together the parts of a weight, given by suffix (the codes' is empty).

    Raises:
        CheckpointError: parts are missing or disagree.
    """
    try:
        state: dict[str, Any] = json.loads(bytes(parts[STATE_SUFFIX].numpy()))
        shape, block_size = tuple(int(n) for n in state["shape"]), int(state["blocksize"])
        dtype = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[state["dtype"]]
        count = torch.Size(shape).numel()
        blocks = -(-count // block_size)
        if len(shape) != 2 or min(shape) < 1 or block_size < 1:
            raise CheckpointError(f"{name}: {list(shape)} in blocks of {block_size} is no matrix")
        levels = parts.get(".nested_quant_map", dynamic_map())
        absmax = parts[".absmax"].reshape(-1)
        constants: DoubleQuantized | Tensor = absmax
        if ".nested_absmax" in parts:
            constants = DoubleQuantized(absmax, parts[".nested_absmax"], float(state["nested_offset"]))
            if int(state["nested_blocksize"]) != GROUP or constants.nested_absmax.numel() != -(-blocks // GROUP):
                raise CheckpointError(f"{name}: nested constants in groups of {state['nested_blocksize']}")
        codes = parts[""].reshape(-1)
        nested = ".nested_absmax" in parts
        types = (codes.dtype, absmax.dtype, levels.dtype, levels.numel())
        if types != (torch.uint8, torch.uint8 if nested else torch.float32, torch.float32, 256):
            raise CheckpointError(f"{name}: its parts have types that do not belong together {types}")
        if codes.numel() != (count + 1) // 2 or parts[".absmax"].numel() != blocks:
            raise CheckpointError(f"{name}: {codes.numel()} bytes of codes do not make {list(shape)} weights")
    except (KeyError, ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise CheckpointError(f"{name}: its quantization state is malformed ({error!r})") from error
    return QuantizedWeight(codes, constants, shape, block_size, DTYPES[dtype], levels)


def quantization_config(kept: list[str], double_quant: bool) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``, in bitsandbytes' terms.

    Args:
        kept: full dotted paths of the linear modules that stay in 16 bits.
        double_quant: whether the constants are quantized too.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _state(weight: TensorSpec, block_size: int, offset: float | None) -> bytes:
    dtype = str(DTYPES[weight.dtype]).removeprefix("torch.")
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": block_size,
        # Readers cast the decoded weight to this type; bitsandbytes' own is never float32 (unsloth cannot read that).
        "dtype": "bfloat16" if weight.dtype == "F32" else dtype,
        "shape": list(weight.shape),
    }
    if offset is None:
        return json.dumps(state).encode()
    nested = {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(state | nested)
    return (text + " " * (_OFFSET_WIDTH - len(repr(offset)))).encode()
