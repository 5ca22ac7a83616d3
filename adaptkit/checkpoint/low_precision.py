"""The layouts of weights in the few-bit floats in which models are released: FP8 with block scales, and MXFP4.

    M.weight             F8_E4M3   [..., rows, columns]
    M.weight_scale_inv   float     [..., ceil(rows / r), ceil(columns / c)], or one number
    M.activation_scale   float     for products in 8 bits, in which a plain weight takes no part; or M.input_scale

A weight is its code times its scale, despite the name. ``weight_block_size`` in the configuration is [r, c]; if it says
nothing, blocks are of equal size. A stack X has X_scale_inv and X_activation_scale.

    X_blocks             U8        [experts, out, in / 32, 16]     two codes a byte
    X_scales             U8        [experts, out, in / 32]         exponents

So gpt-oss stores its experts' weight X, which is [experts, in, out] in a 16-bit checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptkit.checkpoint.foreign import stated_quantization
from adaptkit.checkpoint.header import FLOATS, TensorSpec
from adaptkit.checkpoint.reader import Checkpoint, TensorFiles
from adaptkit.errors import CheckpointError
from adaptkit.numerics.arrays import Array, cast
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.formats import _fp8, _mxfp4

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_OF_INPUTS = ("activation_scale", "input_scale")
_FP8 = "F8_E4M3"
_GET_AGAIN = "download the checkpoint again"
_AT_A_TIME = 1 << 16
"""Number of bytes of MXFP4 codes decoded at a time: the result, which is transposed, then stays in the cache."""


@dataclass(frozen=True)
class Decoded:
    """Some weights, and the bytes of the codes that they were made from."""

    values: Array
    raw: Array


@dataclass(frozen=True)
class Fp8Weight:
    """A weight in FP8.

    Attributes:
        name: of the weight, and of the tensor of its codes.
        scales: name of the tensor of its scales.
        shape: (..., rows, columns).
        block: rows and columns that share a scale.
        input_scales: names of tensors that a plain weight does not need.
    """

    name: str
    scales: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    input_scales: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that it is made of, its codes first."""
        return (self.name, self.scales, *self.input_scales)

    def runs(self, weights: int) -> Iterator[tuple[int, int, int]]:
        """Return (matrix, first row, number of rows) of runs of about so many weights, in order."""
        rows, columns = self.shape[-2:]
        step = max(1, weights // columns)
        for matrix in range(math.prod(self.shape[:-2])):
            for first in range(0, rows, step):
                yield matrix, first, min(step, rows - first)

    def decode(self, files: TensorFiles, run: tuple[int, int, int], dtype: np.dtype[Any]) -> Decoded:
        """Read and decode a run of rows, (rows, columns)."""
        matrix, first, count = run
        rows, columns = self.shape[-2:]
        raw = files.read_bytes(self.name, (matrix * rows + first) * columns, count * columns)
        spec = files.spec(self.scales)
        grid = (1, 1) if spec.count == 1 else spec.shape[-2:]
        start = 0 if spec.count == 1 else matrix * math.prod(grid)
        scales = cast(files.read_flat_array(self.scales, start, math.prod(grid)), np.float32).reshape(grid)
        return Decoded(_fp8.dequantize(raw.reshape(count, columns), scales, self.block, first, dtype), raw)

    def is_broken(self, files: TensorFiles, values: Array) -> bool:
        """Whether decoded values that are not finite are so because of their codes and scales, not of their dtype."""
        return bool(np.isnan(values).any()) or not all_finite(files.read_array(self.scales))


@dataclass(frozen=True)
class Mxfp4Weight:
    """Experts of gpt-oss in MXFP4.

    Attributes:
        name: of the weight.
        shape: (experts, in, out).
    """

    name: str
    shape: tuple[int, int, int]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that it is made of, its codes first."""
        return (self.name + _BLOCKS, self.name + _SCALES)

    def runs(self, weights: int) -> Iterator[int]:
        """Return the indices of the experts; each is decoded whole, since it is transposed."""
        return iter(range(self.shape[0]))

    def decode(self, files: TensorFiles, run: int, dtype: np.dtype[Any]) -> Decoded:
        """Read and decode one expert, (in, out)."""
        _, inputs, outputs = self.shape
        half, groups = inputs // 2, inputs // _mxfp4.BLOCK
        blocks, scales = self.parts
        raw = files.read_bytes(blocks, run * outputs * half, outputs * half)
        exponents = files.read_bytes(scales, run * outputs * groups, outputs * groups).reshape(outputs, groups)
        codes, values = raw.reshape(outputs, half), np.empty((inputs, outputs), dtype)
        step = max(1, _AT_A_TIME // half)
        for first in range(0, outputs, step):
            rows = slice(first, first + step)
            values[:, rows] = _mxfp4.dequantize(codes[rows], exponents[rows], dtype).T
        return Decoded(values, raw)

    def is_broken(self, files: TensorFiles, values: Array) -> bool:
        """Whether decoded values that are not finite are so because of their scales, not of their dtype."""
        return bool(np.isnan(values).any())


LowPrecisionWeight = Fp8Weight | Mxfp4Weight


def low_precision_weights(checkpoint: Checkpoint) -> list[LowPrecisionWeight]:
    """Find the weights of a checkpoint whose method is one of ``foreign.RELEASED``.

    Raises:
        CheckpointError: a weight lacks a part, or they do not fit together; or a part belongs to no weight.
    """
    found: list[LowPrecisionWeight] = []
    block = _stated_block(checkpoint)
    for name, located in checkpoint.tensors.items():
        if _is_half(checkpoint, name, _BLOCKS):
            found.append(_mxfp4_weight(checkpoint, name.removesuffix(_BLOCKS)))
        elif located.spec.dtype.startswith("F8_"):
            found.append(_fp8_weight(checkpoint, located.spec, block))
    used = {part for weight in found for part in weight.parts}
    for name in checkpoint.tensors:
        is_part = name.endswith((_SCALE, *_OF_INPUTS)) or _is_half(checkpoint, name, _SCALES)
        if is_part and name not in used:
            raise CheckpointError(f"{checkpoint.root}: {name} belongs to no quantized weight", hint=_GET_AGAIN)
    return found


def _is_half(checkpoint: Checkpoint, name: str, suffix: str) -> bool:
    return name.endswith(suffix) and checkpoint.spec(name).dtype == "U8"


def _mxfp4_weight(checkpoint: Checkpoint, name: str) -> Mxfp4Weight:
    parts = name + _BLOCKS, name + _SCALES
    missing = next((part for part in parts if part not in checkpoint.tensors), None)
    if missing is not None:
        raise CheckpointError(f"{checkpoint.root}: {missing} is missing", hint=_GET_AGAIN)
    blocks, scales = map(checkpoint.spec, parts)
    fits = (*scales.shape, _mxfp4.BLOCK // 2) == blocks.shape and len(scales.shape) == 3 and scales.count and name
    if not fits or scales.dtype != "U8":
        found = f"codes {blocks.dtype} {list(blocks.shape)}, scales {scales.dtype} {list(scales.shape)}"
        raise CheckpointError(f"{parts[0]}: not experts in MXFP4: {found}", hint=_GET_AGAIN)
    model_type = checkpoint.config.get("model_type")
    if model_type != "gpt_oss":  # nothing else says whether the 16-bit weight is the transposed one
        raise CheckpointError(
            f"{name}: MXFP4 in a model of type {model_type!r}, which is not supported",
            hint="only gpt_oss is known to be stored so",
        )
    experts, outputs, groups = scales.shape
    return Mxfp4Weight(name, (experts, groups * _mxfp4.BLOCK, outputs))


def _fp8_weight(checkpoint: Checkpoint, codes: TensorSpec, stated: tuple[int, int] | None) -> Fp8Weight:
    name, scale = codes.name, codes.name + _SCALE
    if codes.dtype != _FP8 or scale not in checkpoint.tensors:
        problem = f"{codes.dtype} instead of {_FP8}" if codes.dtype != _FP8 else f"{scale} is missing"
        raise CheckpointError(f"{name}: not a weight in FP8: {problem}", hint="use the 16-bit checkpoint")
    scales = checkpoint.spec(scale)
    block = _block(codes.shape, scales, stated)
    if block is None:
        found = f"{scales.dtype} {list(scales.shape)}" + (f" of blocks of {list(stated)}" if stated else "")
        raise CheckpointError(f"{name}: scales {found} do not fit a weight of {list(codes.shape)}", hint=_GET_AGAIN)
    begin = name.removesuffix("weight") if name.endswith("weight") else f"{name}_"
    beside = tuple(begin + suffix for suffix in _OF_INPUTS if begin + suffix in checkpoint.tensors)
    return Fp8Weight(name, scale, codes.shape, block, beside)


def _stated_block(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Return rows and columns that share a scale according to the configuration; None if it says nothing."""
    said = stated_quantization(checkpoint.config).get("weight_block_size")
    if said is None:
        return None
    if not isinstance(said, list) or len(said) != 2 or not all(type(size) is int and size > 0 for size in said):
        raise CheckpointError(
            f"{checkpoint.root}: weight_block_size is {said!r} in config.json; expected two sizes", hint=_GET_AGAIN
        )
    return said[0], said[1]


def _block(shape: tuple[int, ...], scales: TensorSpec, stated: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return rows and columns that share a scale; None if the scales do not fit."""
    if len(shape) < 2 or scales.dtype not in FLOATS or not math.prod(shape):
        return None
    rows, columns = shape[-2:]
    if scales.count == 1 and len(scales.shape) < 2:
        return rows, columns
    if len(scales.shape) != len(shape) or scales.shape[:-2] != shape[:-2]:
        return None
    grid = scales.shape[-2:]
    if stated is not None:
        size = min(stated[0], rows), min(stated[1], columns)
        return size if (-(-rows // size[0]), -(-columns // size[1])) == grid else None
    if 0 in grid or rows % grid[0] or columns % grid[1]:
        return None
    return rows // grid[0], columns // grid[1]
