"""Weights whose codes are levels of a grid, multiplied by a scale that a run of a row or a block of rows shares.

    a weight      (level of its code - zero point) scale          in float32, rounded once; most have no zero points

Integers, FP8, MXFP4 and NVFP4 are all of these; they differ in their grid, in what their scales can be, and in their
parts. What is read is ``CodedRows``; what is written is encoded by ``Grouped``, some rows at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adaptkit.formats._format import EncodedPiece, Encoding, Files, StoredWeight, WritableFormat
from adaptkit.formats._integers import pack_down
from adaptkit.numerics.dtypes import Array, cast, dtype_name
from adaptkit.numerics.finite import all_finite, check_finite
from adaptkit.numerics.grids import Grid
from adaptkit.numerics.spec import ITEM_BYTES, TensorSpec

_AT_A_TIME = 1 << 16
"""Number of weights encoded or decoded at a time, so that what is computed on the way stays in the cache."""


@dataclass(frozen=True)
class CodedRows:
    """Rows of a weight, as codes and what their groups share.

    Attributes:
        codes: (rows, columns) uint8.
        values: (2 ** bits,) float32, the level of each code.
        scales: (rows, groups) float32.
        zeros: (rows, groups) of a signed integer type, in levels; None if there are none.
        groups: (columns,), the group of each column; None if all have equally many columns, one after the other.
    """

    codes: Array
    values: Array
    scales: Array
    zeros: Array | None = None
    groups: Array | None = None

    def decode(self, dtype: np.dtype[Any]) -> Array:
        """Return the weights, (rows, columns), rounded once to ``dtype``."""
        rows, columns = self.codes.shape
        out = np.empty((rows, columns), dtype)
        step = max(1, _AT_A_TIME // columns)
        with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
            for first in range(0, rows, step):
                here = slice(first, first + step)
                values: Array = self.values.take(self.codes[here])
                by_group = values if self.groups is not None else values.reshape(len(values), self.scales.shape[1], -1)
                if self.zeros is not None:
                    by_group -= self.spread(self.zeros[here].astype(np.float32))
                by_group *= self.spread(self.scales[here])
                out[here] = values
        return out

    def spread(self, constants: Array) -> Array:
        """Return (rows, groups) constants in a shape that is multiplied with the weights."""
        return constants[:, :, None] if self.groups is None else constants[:, self.groups]


@dataclass(frozen=True, kw_only=True)
class GroupedWeight(StoredWeight):
    """A weight that can be read as ``CodedRows``; its unit is a row."""

    is_linear: bool = True

    @property
    def has_rows(self) -> bool:
        """See ``StoredWeight``."""
        return len(self.shape) == 2

    @abstractmethod
    def rows(self, files: Files, first: int, count: int) -> CodedRows:
        """Read some rows."""

    def decode(self, files: Files, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Decode whole rows; see ``StoredWeight``."""
        columns = self.shape[-1]
        return self.rows(files, start // columns, count // columns).decode(dtype).reshape(-1)


class Grouped(WritableFormat):
    """A format of such weights that can be written.

    Attributes:
        grid: its levels.
        codes_dtype: safetensors name of the type of the tensor of codes.
        codes_suffix: what follows the weight's name in the name of its codes.
    """

    grid: Grid
    codes_dtype: str
    codes_suffix: str = "_packed"

    @abstractmethod
    def constants(
        self, low: Array, high: Array, weight: TensorSpec, encoding: Encoding, top: float
    ) -> tuple[Array, Array, Array | None]:
        """Choose what groups share, from their smallest and largest weights, (rows, groups) float32.

        Returns:
            stored: the scales as the file has them.
            scales: the same in float32, not 0.
            zeros: zero points in levels, int8 from -8 to 7; None if there are none.
        """

    def scale_dtype(self, weight: TensorSpec) -> str:
        """Return the safetensors name of the type of the scales: the weight's, but BF16 for F32."""
        return "BF16" if weight.dtype == "F32" else weight.dtype

    def others(self, weight: TensorSpec, top: float) -> dict[str, Array]:
        """Return parts that do not depend on the groups, by what follows the weight's name."""
        return {}

    def size(self, columns: int, encoding: Encoding) -> int:
        """Return the number of columns that share a scale."""
        return encoding.block_size or columns

    def height(self, encoding: Encoding) -> int:
        """Return the number of rows that share a scale."""
        return 1

    def refusal(self, shape: tuple[int, ...], encoding: Encoding) -> str:
        """See ``WritableFormat``."""
        if len(shape) != 2:
            return "not a matrix"
        size = self.size(shape[1], encoding)
        return f"{shape[1]} columns are not a multiple of {size}" if shape[1] % size else ""

    def unit(self, weight: TensorSpec, encoding: Encoding) -> int:
        """See ``WritableFormat``."""
        return weight.shape[-1] * self.height(encoding)

    def specs(self, weight: TensorSpec, encoding: Encoding) -> list[TensorSpec]:
        """See ``WritableFormat``."""
        name, (rows, columns) = weight.name, weight.shape
        codes = columns * self.bits // (8 * ITEM_BYTES[self.codes_dtype])
        across, down = -(-columns // self.size(columns, encoding)), -(-rows // self.height(encoding))
        others = self.others(weight, 1.0).items()
        zeros = [TensorSpec(f"{name}_zero_point", "I32", (-(-rows // 8), across))] if encoding.zero_points else []
        return [
            TensorSpec(name + self.codes_suffix, self.codes_dtype, (rows, codes)),
            *(TensorSpec(name + suffix, dtype_name(part.dtype), part.shape) for suffix, part in others),
            *zeros,
            TensorSpec(f"{name}_scale", self.scale_dtype(weight), (down, across)),
        ]

    def encode(
        self, values: Array, weight: TensorSpec, encoding: Encoding, top: float = 0.0, measure: bool = False
    ) -> EncodedPiece:
        """See ``WritableFormat``.

        Returns:
            codes as bytes of the file; constants (rows, groups) as stored; moments (2,) float64: Σ(w − q)² and Σw².
        """
        columns, unit = weight.shape[-1], self.unit(weight, encoding)
        step = max(1, _AT_A_TIME // unit) * unit
        pieces = (values[first : first + step].reshape(-1, columns) for first in range(0, values.size, step))
        made = [self._encode_rows(piece, weight, encoding, top, measure) for piece in pieces]
        zeros = [piece.zeros for piece in made if piece.zeros is not None]
        moments = [piece.moments for piece in made if piece.moments is not None]
        return EncodedPiece(
            np.concatenate([piece.codes for piece in made]),
            np.concatenate([piece.constants for piece in made]),
            np.concatenate(zeros) if zeros else None,
            np.sum(moments, axis=0) if moments else None,
        )

    def gather(self, weight: TensorSpec, encoding: Encoding, top: float = 0.0) -> GatheredRows:
        """See ``WritableFormat``."""
        return GatheredRows(self, weight, encoding, top)

    def round_trip(self, values: Array, encoding: Encoding) -> Array:
        """See ``WritableFormat``."""
        rows = cast(values, np.float32)
        weight, top = TensorSpec("", "F32", values.shape), float(np.abs(rows).max(initial=0))
        return self._coded(rows, weight, encoding, top)[1].decode(rows.dtype)

    def packed(self, codes: Array) -> Array:
        """Return (rows, columns) codes as bytes of the file, the earlier of two codes of 4 bits in the low half."""
        return codes[:, 0::2] | codes[:, 1::2] << 4 if self.bits == 4 else codes

    def _encode_rows(
        self, values: Array, weight: TensorSpec, encoding: Encoding, top: float, measure: bool
    ) -> EncodedPiece:
        rows = cast(values, np.float32)
        stored, coded = self._coded(rows, weight, encoding, top)
        moments = None
        if measure:
            lost, squares = (coded.decode(rows.dtype) - rows).reshape(-1), rows.reshape(-1)
            moments = np.array([np.dot(lost, lost), np.dot(squares, squares)], np.float64)
        return EncodedPiece(self.packed(coded.codes), stored, coded.zeros, moments)

    def _coded(self, rows: Array, weight: TensorSpec, encoding: Encoding, top: float) -> tuple[Array, CodedRows]:
        """Return the scales of some rows as stored, and the rows with the nearest codes."""
        columns, height = rows.shape[1], self.height(encoding)
        size = self.size(columns, encoding)
        groups = None if columns % size == 0 else np.arange(columns) // size
        low, high = _extremes(rows, size)
        if not all_finite(low) or not all_finite(high):
            check_finite(rows)
        if height > 1:
            down = np.arange(0, len(rows), height)
            low, high = np.minimum.reduceat(low, down), np.maximum.reduceat(high, down)
        stored, scales, zeros = self.constants(low, high, weight, encoding, top)
        if height > 1:
            scales = np.repeat(scales, height, axis=0)[: len(rows)]
        return stored, nearest(rows, CodedRows(rows, self.grid.values, scales, zeros, groups), self.grid)


class GatheredRows:
    """What the groups of all rows share; see ``Gathering``."""

    def __init__(self, form: Grouped, weight: TensorSpec, encoding: Encoding, top: float) -> None:
        self._form, self._weight, self._encoding, self._top = form, weight, encoding, top
        self._scales, self._zeros, self._moments = list[Array](), list[Array](), np.zeros(2)

    def add(self, piece: EncodedPiece) -> None:
        """See ``Gathering``."""
        if piece.moments is None:
            raise ValueError("the piece was not measured")
        self._scales.append(piece.constants)
        self._zeros += [] if piece.zeros is None else [piece.zeros]
        self._moments += piece.moments

    def finish(self) -> tuple[dict[str, Array], list[float]]:
        """See ``Gathering``."""
        name, parts = self._weight.name, self._form.others(self._weight, self._top)
        if self._zeros:
            parts["_zero_point"] = pack_down((np.concatenate(self._zeros) + 8).astype(np.uint8))
        parts["_scale"] = np.concatenate(self._scales)
        return {name + suffix: part for suffix, part in parts.items()}, self._moments.tolist()


def nearest(rows: Array, coded: CodedRows, grid: Grid) -> CodedRows:
    """Return rows, (rows, columns) float32, with the codes nearest to them, given what their groups share."""
    shape = (len(rows), coded.scales.shape[1], -1) if coded.groups is None else rows.shape
    scaled = rows.reshape(shape) / coded.spread(coded.scales)
    if coded.zeros is not None:
        scaled += coded.spread(coded.zeros.astype(np.float32))
    return replace(coded, codes=grid.nearest(scaled.reshape(-1)).reshape(rows.shape))


def _extremes(rows: Array, size: int) -> tuple[Array, Array]:
    """Return the smallest and the largest of each run of so many columns: (rows, ceil(columns / size))."""
    if rows.shape[1] % size:
        starts = np.arange(0, rows.shape[1], size)
        return np.minimum.reduceat(rows, starts, axis=1), np.maximum.reduceat(rows, starts, axis=1)
    groups = rows.reshape(len(rows), -1, size)
    return groups.min(axis=2), groups.max(axis=2)
