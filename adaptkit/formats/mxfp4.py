"""Microscaling 4-bit floats (MXFP4): E2M1 codes, of which 32 share a power of two.

    M.weight_packed      U8        [rows, columns / 2]             compressed-tensors, which ``quantize`` writes
    M.weight_scale       U8        [rows, columns / 32]

    M.weight             I8        [..., rows, columns / 2]        DeepSeek-V4's experts
    M.scale              exponents [..., rows, columns / 32]       F8_E8M0, or the same bytes as U8; names: ``_scaled``

    X_blocks             U8        [experts, out, in / 32, 16]     gpt-oss's experts; X itself, the plain weight,
    X_scales             U8        [experts, out, in / 32]         is [experts, in, out]

    a byte of codes      7..4 the later weight, 3..0 the earlier one      s ee m: 0 .5 1 1.5 2 3 4 6
    an exponent e        2 ** (e - 127); 255 is NaN

Both may lie beside FP8 in one checkpoint. 4.25 bits a weight. Source: OCP Microscaling Formats (MX) Specification 1.0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from adaptkit.errors import CheckpointError
from adaptkit.formats._coded import CodedRows, GroupedWeight
from adaptkit.formats._compressed_tensors import METHOD, config_block, stated_weights
from adaptkit.formats._format import Encoding
from adaptkit.formats._grouped import Grouped
from adaptkit.formats._integers import require, spec_of
from adaptkit.formats._scaled import EXPONENTS, described, scales_named, scales_of
from adaptkit.formats._stored import GET_AGAIN, Files, StoredWeight
from adaptkit.numerics.dtypes import Array, cast
from adaptkit.numerics.grids import E2M1
from adaptkit.numerics.spec import TensorSpec

BLOCK = 32
"""Number of weights that share a scale."""
_BIAS, _NAN = 127, 255
_PACKED, _LAYOUT = ".weight_packed", "mxfp4-pack-quantized"
_BLOCKS, _SCALES = "_blocks", "_scales"
"""What gpt-oss appends to the name of its experts' weight."""
_AT_A_TIME = 1 << 15
"""Number of bytes of codes decoded at a time, so that what is computed on the way stays in the cache."""
_READ_AT_A_TIME = 1 << 18
"""Number of bytes of an expert's codes read at a time, so that they stay in the cache."""


class Mxfp4(Grouped):
    """See ``Format`` and ``Grouped``."""

    name, bits = "mxfp4", 4
    released_as = ("fp8", "mxfp4", METHOD)
    block_sizes = (BLOCK,)
    grid, codes_dtype = E2M1, "U8"

    def method_shown(self, names: Collection[str]) -> str | None:
        """See ``Format``."""
        halves = (name.removesuffix(_BLOCKS) for name in names if name.endswith(_BLOCKS))
        return "mxfp4" if any(half + _SCALES in names for half in halves) else None

    def weight_at(self, files: Files, name: str) -> StoredWeight | None:
        """Return the weight whose codes a tensor holds; see ``Format``."""
        codes = files.spec(name)
        if name.endswith(_BLOCKS) and codes.dtype == "U8":
            return _experts(files, name.removesuffix(_BLOCKS))
        if name.endswith(_PACKED) and codes.dtype == "U8":
            return _packed(files, codes)
        if (
            codes.dtype != "I8"
            or f"{name}_scale" in files.tensors
            or not (name.endswith(".weight") or scales_named(files, name))
        ):
            return None
        scales, input_scales = scales_of(files, name, "MXFP4")
        *outer, half = codes.shape or (0,)
        fits = len(codes.shape) > 1 and codes.count and scales.shape == (*outer, 2 * half // BLOCK)
        if not fits or 2 * half % BLOCK or scales.dtype not in EXPONENTS:
            raise CheckpointError(f"{name}: not a weight in MXFP4: {described(codes, scales)}", hint=GET_AGAIN)
        parts = (name, scales.name, *input_scales)
        return Mxfp4Weight(name=name, shape=(*outer, 2 * half), parts=parts, unit=BLOCK, input_scales=input_scales)

    def is_part(self, files: Files, name: str) -> bool:
        """See ``Format``; the scales of M.weight are known to ``fp8``."""
        return name.endswith(_SCALES) and files.spec(name).dtype == "U8"

    def scale_dtype(self, weight: TensorSpec) -> str:
        """See ``Grouped``."""
        return "U8"

    def constants(
        self, low: Array, high: Array, weight: TensorSpec, encoding: Encoding, top: float
    ) -> tuple[Array, Array, Array | None]:
        """See ``Grouped``; the exponent is one more where the largest weight would round to 8, as 7 and more do."""
        mantissa, exponent = np.frexp(np.maximum(high, -low))  # in [0.5, 1) times a power of two
        stored = np.clip(exponent - 3 + (mantissa >= np.float32(0.875)) + _BIAS, 0, _NAN - 1).astype(np.uint8)
        return stored, np.ldexp(np.float32(1), stored.astype(np.int32) - _BIAS), None

    def config_block(self, kept: list[str], encoding: Encoding) -> dict[str, Any]:
        """See ``WritableFormat``."""
        weights = {
            "group_size": BLOCK,
            "num_bits": 4,
            "scale_dtype": "torch.uint8",
            "strategy": "group",
            "symmetric": True,
            "type": "float",
        }
        return config_block(_LAYOUT, weights, kept)

    def stated(self, block: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
        """See ``WritableFormat``."""
        found = stated_weights(block, _LAYOUT)
        return (Encoding(self.name, BLOCK, False), found[1]) if found else None


FORMAT = Mxfp4()


@dataclass(frozen=True, kw_only=True)
class Mxfp4Weight(GroupedWeight):
    """A matrix in MXFP4 in a plain weight's rows, or a stack, as DeepSeek-V4 stores experts."""

    is_linear: bool = False

    def rows(self, files: Files, first: int, count: int) -> CodedRows:
        """Read some rows of a matrix; see ``GroupedWeight``."""
        columns = self.shape[-1]
        raw = files.read_bytes(self.parts[0], first * columns // 2, count * columns // 2)
        codes = np.stack((raw & 15, raw >> 4), axis=-1).reshape(count, columns)
        exponents = files.read_bytes(self.parts[1], first * columns // BLOCK, count * columns // BLOCK)
        scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - _BIAS)
        return CodedRows(codes, E2M1.values, np.where(exponents == _NAN, np.nan, scales).reshape(count, -1))

    def decode(self, files: Files, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Decode whole blocks; see ``StoredWeight``."""
        raw = files.read_bytes(self.parts[0], start // 2, count // 2)
        exponents = files.read_bytes(self.parts[1], start // BLOCK, count // BLOCK)
        return dequantize(raw.reshape(-1, BLOCK // 2), exponents.reshape(-1, 1), dtype).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Mxfp4Experts(StoredWeight):
    """Experts of gpt-oss in MXFP4, whose plain weight, (experts, in, out), is transposed."""

    def decode(self, files: Files, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Decode whole rows, of one expert or of several; see ``StoredWeight``."""
        _, inputs, outputs = self.shape
        values, first, done = np.empty((count // outputs, outputs), dtype), start // outputs, 0
        while done < len(values):
            expert, row = divmod(first + done, inputs)
            here = slice(done, min(len(values), done + inputs - row))
            self._decode_rows(files, expert, row, values[here])
            done = here.stop
        return values.reshape(-1)

    def _decode_rows(self, files: Files, expert: int, row: int, out: Array) -> None:
        """Decode rows of one expert, which are columns in the files; so all its codes are read, though not at once."""
        _, inputs, outputs = self.shape
        (blocks, scales), half, groups = self.parts, inputs // 2, inputs // BLOCK
        stop, step = row + len(out), max(1, _READ_AT_A_TIME // half)
        for first in range(0, outputs, step):
            count, start = min(step, outputs - first), expert * outputs + first
            codes = files.read_bytes(blocks, start * half, count * half).reshape(count, half)
            exponents = files.read_bytes(scales, start * groups, count * groups).reshape(count, groups)
            here = codes[:, row // 2 : stop // 2], exponents[:, row // BLOCK : stop // BLOCK]
            out[:, first : first + count] = dequantize(*here, out.dtype).T


def _packed(files: Files, codes: TensorSpec) -> Mxfp4Weight | None:
    name = codes.name.removesuffix("_packed")
    if f"{name}_global_scale" in files.tensors:  # NVFP4's
        return None
    rows, half = codes.shape if len(codes.shape) == 2 else (0, 0)
    require(codes, ("U8",), (max(rows, 1), max(half // (BLOCK // 2), 1) * (BLOCK // 2)))
    scales = require(spec_of(files, f"{name}_scale"), EXPONENTS, (rows, 2 * half // BLOCK))
    return Mxfp4Weight(name=name, shape=(rows, 2 * half), parts=(codes.name, scales.name), unit=BLOCK, is_linear=True)


def _experts(files: Files, name: str) -> Mxfp4Experts:
    parts = name + _BLOCKS, name + _SCALES
    missing = next((part for part in parts if part not in files.tensors), None)
    if missing is not None:
        raise CheckpointError(f"{files.root}: {missing} is missing", hint=GET_AGAIN)
    blocks, scales = map(files.spec, parts)
    fits = (*scales.shape, BLOCK // 2) == blocks.shape and len(scales.shape) == 3 and scales.count and name
    if not fits or scales.dtype != "U8":
        raise CheckpointError(f"{parts[0]}: not experts in MXFP4: {described(blocks, scales)}", hint=GET_AGAIN)
    model_type = files.config.get("model_type")
    if model_type != "gpt_oss":  # nothing else says whether the 16-bit weight is the transposed one
        raise CheckpointError(
            f"{name}: MXFP4 in a model of type {model_type!r}, which is not supported",
            hint="only gpt_oss is known to be stored so",
        )
    experts, outputs, groups = scales.shape
    shape = experts, groups * BLOCK, outputs  # the codes that share an exponent are rows of the plain weight
    return Mxfp4Experts(name=name, shape=shape, parts=parts, unit=BLOCK * outputs)


def dequantize(codes: Array, exponents: Array, dtype: np.dtype[Any]) -> Array:
    """Return level times 2 ** (exponent - 127) in rows of weights, (rows, columns).

    Args:
        codes: (rows, columns / 2) uint8, the earlier weight in the low half of a byte.
        exponents: (rows, columns / 32) uint8; 255 stands for NaN.
        dtype: of the result. bfloat16 holds every value exactly, but for those that are too large for it.

    Source: OCP Microscaling Formats (MX) Specification 1.0.
    """
    pairs, (rows, half) = _pairs(dtype), codes.shape
    found = np.empty((rows, half), pairs.dtype)
    step = max(1, _AT_A_TIME // half)
    for first in range(0, rows, step):
        here = slice(first, first + step)
        by_block = exponents[here, :, None].astype(np.uint16) << 8 | codes[here].reshape(
            -1, half * 2 // BLOCK, BLOCK // 2
        )
        found[here] = pairs.take(by_block).reshape(-1, half)
    return found.view(dtype)


@cache
def _pairs(dtype: np.dtype[Any]) -> Array:
    """Return the two values that each exponent and byte of codes stand for, as one element: (256 · 256,)."""
    exponents, codes = np.arange(256) - _BIAS, np.arange(256)
    values = np.ldexp(E2M1.values.astype(np.float64), exponents[:, None])
    values[_NAN] = np.nan
    pairs = np.stack((values[:, codes & 15], values[:, codes >> 4]), axis=-1)
    return np.ascontiguousarray(cast(pairs, dtype)).reshape(-1).view(f"u{2 * dtype.itemsize}")
