"""8-bit floats with a scale per block, per row or per tensor (FP8), as DeepSeek-V3 is released.

    M.weight             F8_E4M3   [..., rows, columns]                                  s eeee mmm, bias 7
    M.weight_scale_inv   float     [..., ceil(rows / r), ceil(columns / c)], or one number

A weight is its code times its scale, despite the name; ``_scaled`` has the other names of the scales. Scales may be
powers of two: F8_E8M0, or the same bytes as U8. ``weight_block_size`` in the configuration is [r, c]
(``block_structure`` for compressed-tensors); if it says nothing, blocks are of 128 x 128, or else of equal size: with
scales [rows, 1], r is 1 and c all columns. ModelOpt has [rows], and [ceil(rows / r), 1, ceil(columns / c), 1]. The
largest value is 448, and 0x7F and 0xFF are NaN.

``quantize`` writes compressed-tensors' layout, with scales of rows (8.016 bits a weight for rows of 1024) or of blocks
of 128 x 128 (8.001). Servers round the inputs to FP8, too, while the model runs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from adaptkit.errors import CheckpointError
from adaptkit.formats._coded import CodedRows, GroupedWeight
from adaptkit.formats._compressed_tensors import METHOD, config_block, inputs_of, stated_weights
from adaptkit.formats._format import Encoding, stated_quantization
from adaptkit.formats._grouped import Grouped
from adaptkit.formats._integers import stored_scales
from adaptkit.formats._scaled import EXPONENTS, is_nvfp4, is_scale, scales_named, scales_of
from adaptkit.formats._stored import GET_AGAIN, Files
from adaptkit.numerics.dtypes import Array, cast
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.grids import E4M3
from adaptkit.numerics.spec import FLOATS, TensorSpec

_CODES, _LAYOUT, _BLOCK = "F8_E4M3", "float-quantized", 128
_AT_A_TIME = 1 << 16
"""Number of weights decoded at a time, so that what is computed on the way stays in the cache."""
_WORTH_A_TABLE = 1 << 13
"""Number of weights with one scale for which it is faster to round 256 products, and look these up."""


class Fp8(Grouped):
    """See ``Format`` and ``Grouped``."""

    name, bits = "fp8", 8
    released_as = ("fp8", "mxfp4", METHOD, "modelopt")
    block_sizes = (0, _BLOCK)
    grid, codes_dtype, codes_suffix = E4M3, _CODES, ""

    def method_shown(self, names: Collection[str]) -> str | None:
        """See ``Format``."""
        return "fp8" if any(f".{name}".endswith(".weight_scale_inv") for name in names) else None

    def weight_at(self, files: Files, name: str) -> Fp8Weight | None:
        """Return the weight whose codes a tensor holds: any 8-bit float that is no scale; bytes of a weight."""
        codes = files.spec(name)
        if codes.dtype == "U8":
            is_codes = (name.endswith(".weight") or bool(scales_named(files, name))) and not is_nvfp4(files, name)
        elif name.endswith("_scale"):
            is_codes = False
        else:
            is_codes = codes.dtype.startswith("F8_") and codes.dtype != EXPONENTS[0]
        if not is_codes:
            return None
        problem = "" if codes.dtype == _CODES else f"{codes.dtype} instead of {_CODES}"
        scales, input_scales = scales_of(files, name, "FP8", problem)
        grid = _grid(codes.shape, scales.shape)
        stated = _stated_block(files)
        block = _block(codes.shape, replace(scales, shape=grid), stated)
        if block is None:
            text = f"{scales.dtype} {list(scales.shape)}" + (f" of blocks of {list(stated)}" if stated else "")
            raise CheckpointError(f"{name}: scales {text} do not fit a weight of {list(codes.shape)}", hint=GET_AGAIN)
        parts, row = (name, scales.name, *input_scales), codes.shape[-1]
        return Fp8Weight(name=name, shape=codes.shape, parts=parts, unit=row, input_scales=input_scales, block=block)

    def is_part(self, files: Files, name: str) -> bool:
        """See ``Format``."""
        return is_scale(files, name)

    def size(self, columns: int, encoding: Encoding) -> int:
        """See ``Grouped``."""
        return min(columns, encoding.block_size or columns)

    def height(self, encoding: Encoding) -> int:
        """See ``Grouped``."""
        return encoding.block_size or 1

    def refusal(self, shape: tuple[int, ...], encoding: Encoding) -> str:
        """See ``WritableFormat``; blocks at the edges may be smaller."""
        return "" if len(shape) == 2 else "not a matrix"

    def constants(
        self, low: Array, high: Array, weight: TensorSpec, encoding: Encoding, top: float
    ) -> tuple[Array, Array, Array | None]:
        """See ``Grouped``."""
        return *stored_scales(np.maximum(high, -low) / np.float32(E4M3.top), self.scale_dtype(weight)), None

    def config_block(self, kept: list[str], encoding: Encoding) -> dict[str, Any]:
        """See ``WritableFormat``."""
        weights = {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}
        if not encoding.block_size:
            return config_block(_LAYOUT, weights, kept, inputs_of("float"))
        weights |= {"block_structure": [_BLOCK, _BLOCK], "strategy": "block"}
        return config_block(_LAYOUT, weights, kept, inputs_of("float", "group", _BLOCK))

    def stated(self, block: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
        """See ``WritableFormat``."""
        if (found := stated_weights(block, _LAYOUT)) is None:
            return None
        weights, kept = found
        return Encoding(self.name, _BLOCK if weights.get("strategy") == "block" else 0, False), kept


FORMAT = Fp8()


@dataclass(frozen=True, kw_only=True)
class Fp8Weight(GroupedWeight):
    """A weight in FP8, or a stack of such matrices.

    Attributes:
        block: rows and columns that share a scale.
    """

    block: tuple[int, int]
    is_linear: bool = False

    def rows(self, files: Files, first: int, count: int) -> CodedRows:
        """Read some rows of a matrix; see ``GroupedWeight``."""
        (_, columns), (height, width) = self.shape, self.block
        codes = files.read_bytes(self.name, first * columns, count * columns).reshape(count, columns)
        scales = self._scales_of(files, 0, first, first + count)
        by_row = scales[np.arange(first, first + count) // height - first // height]
        groups = np.arange(columns) // width if columns % width else None
        return CodedRows(codes, E4M3.values, by_row, None, groups)

    def decode(self, files: Files, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Decode whole rows, of one matrix or of several; see ``StoredWeight``."""
        rows, columns = self.shape[-2:]
        values = np.empty((count // columns, columns), dtype)
        codes, first = files.read_bytes(self.name, start, count).reshape(values.shape), start // columns
        done = 0
        while done < len(codes):
            matrix, row = divmod(first + done, rows)
            here = slice(done, done + min(rows - row, len(codes) - done))
            scales = self._scales_of(files, matrix, row, row + here.stop - done)
            dequantize(codes[here], scales, self.block, row % self.block[0], values[here])
            done = here.stop
        return values.reshape(-1)

    def too_large(self, files: Files, start: int, count: int, values: Array) -> str:
        """See ``StoredWeight``."""
        has_scales = all_finite(_as_float32(files.read(self.parts[1])))
        return super().too_large(files, start, count, values) if has_scales else ""

    def _scales_of(self, files: Files, matrix: int, row: int, stop: int) -> Array:
        """Read the scales of some rows of a matrix: (blocks that they lie in, blocks beside each other)."""
        spec = files.spec(self.parts[1])
        if spec.count == 1:
            return _as_float32(files.read(spec.name)).reshape(1, 1)
        down, across = _grid(self.shape, spec.shape)[-2:]
        first, last = row // self.block[0], (stop - 1) // self.block[0]
        start, count = (matrix * down + first) * across, (last + 1 - first) * across
        return _as_float32(files.read_flat(spec.name, start, count)).reshape(-1, across)


def _as_float32(scales: Array) -> Array:
    """Convert scales, of which bytes are exponents (E8M0)."""
    return cast(scales.view(ml_dtypes.float8_e8m0fnu) if scales.dtype == np.uint8 else scales, np.float32)


def _stated_block(files: Files) -> tuple[int, int] | None:
    """Return rows and columns that share a scale according to the configuration; None if it says nothing."""
    block = stated_quantization(files.config)
    said, found = block.get("weight_block_size"), stated_weights(block, _LAYOUT)
    if found and found[0].get("strategy") == "block":
        said = found[0].get("block_structure")
    if said is None:
        return None
    if not isinstance(said, list) or len(said) != 2 or not all(type(size) is int and size > 0 for size in said):
        raise CheckpointError(
            f"{files.root}: weight_block_size is {said!r} in config.json; expected two sizes", hint=GET_AGAIN
        )
    return said[0], said[1]


def _block(shape: tuple[int, ...], scales: TensorSpec, stated: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return rows and columns that share a scale; None if the scales do not fit."""
    if len(shape) < 2 or scales.dtype not in (*FLOATS, *EXPONENTS) or not math.prod(shape):
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
    if grid == (-(-rows // _BLOCK), -(-columns // _BLOCK)):  # as DeepSeek's, whose last blocks may be smaller
        return min(_BLOCK, rows), min(_BLOCK, columns)
    if 0 in grid or rows % grid[0] or columns % grid[1]:
        return None
    return rows // grid[0], columns // grid[1]


def _grid(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of scales without ModelOpt's peculiarities."""
    if len(scales) == 4 and scales[1] == scales[3] == 1 and len(shape) == 2:
        return scales[0], scales[2]
    return (*scales, 1) if len(shape) == 2 and scales == shape[:1] and shape[0] > 1 else scales


def dequantize(codes: Array, scales: Array, block: tuple[int, int], first_row: int, out: Array) -> None:
    """Write level times scale in float32, rounded once to the dtype of ``out``, for some rows of a matrix.

    Args:
        codes: (rows, columns) uint8.
        scales: (blocks that the rows lie in, ceil(columns / block[1])) float32.
        block: rows and columns that share a scale, at most those of the matrix.
        first_row: index of the first of the rows in its block.
        out: (rows, columns), of any float dtype.

    Source: ``weight_dequant`` of DeepSeek-V3 (arXiv:2412.19437), which multiplies and rounds in the same order.
    """
    (rows, columns), (height, width) = codes.shape, block
    by_table = height * width >= _WORTH_A_TABLE
    step, start = max(1, _AT_A_TIME // (width if by_table else columns)), 0
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
        while start < rows:
            index, inside = divmod(first_row + start, height)
            stop = min(rows, start + step, start + height - inside if by_table else rows)
            if by_table:
                _look_up(codes[start:stop], scales[index], width, out[start:stop])
            else:
                of_rows = scales[np.arange(first_row + start, first_row + stop) // height]
                _multiply(codes[start:stop], of_rows, width, out[start:stop])
            start = stop


def _multiply(codes: Array, scales: Array, width: int, out: Array) -> None:
    """Decode rows that have scales of their own, one for each ``width`` columns."""
    values: Array = E4M3.values.take(codes)
    values *= np.repeat(scales, width, axis=1)[:, : codes.shape[1]] if scales.shape[1] > 1 else scales
    out[:] = values


def _look_up(codes: Array, scales: Array, width: int, out: Array) -> None:
    """Decode rows that share their scales, one for each ``width`` columns."""
    tables = cast(E4M3.values * scales[:, None], out.dtype)
    for table, first in zip(tables, range(0, codes.shape[1], width), strict=True):
        columns = slice(first, first + width)
        out[:, columns] = table.take(codes[:, columns])
