"""Weights whose codes are levels of a grid, multiplied by a scale that a run of a row or a block of rows shares.

    a weight      (level of its code - zero point) scale          in float32, rounded once; most have no zero points

Integers, FP8, MXFP4 and NVFP4 are all of these; they differ in their grid, in what their scales can be, and in their
parts. What is read is ``CodedRows``; what is written is encoded by ``Grouped``, some rows at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from adaptkit.formats._coded import AT_A_TIME, CodedRows, nearest
from adaptkit.formats._format import EncodedPiece, Encoding, WritableFormat
from adaptkit.formats._integers import pack_down
from adaptkit.numerics.dtypes import ARRAY_DTYPES, Array, cast, dtype_name
from adaptkit.numerics.finite import all_finite, check_finite
from adaptkit.numerics.grids import StandardGrid
from adaptkit.numerics.spec import ITEM_BYTES, TensorSpec

if TYPE_CHECKING:
    from adaptkit.numerics.rounding import LinearInputs

RANGES = np.linspace(1.0, 0.5, 11).astype(np.float32)
"""Calibration tries these shares of each group's range."""


class Grouped(WritableFormat):
    """A format of such weights that can be written.

    Attributes:
        grid: its levels.
        codes_dtype: safetensors name of the type of the tensor of codes.
        codes_suffix: what follows the weight's name in the name of its codes.
    """

    grid: StandardGrid
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
        from adaptkit.numerics.kernels import cpu  # here, as below, since it loads numba

        rows = values.reshape(-1, weight.shape[-1])
        size, height = self.size(weight.shape[-1], encoding), self.height(encoding)
        stored, scales, zeros = self._chosen(rows, weight, encoding, top)
        is_paired = self.bits == 4
        codes, moments = cpu.encode_groups(rows, scales, zeros, size, height, self.grid.rounding, is_paired, measure)
        return EncodedPiece(codes.view(ARRAY_DTYPES[self.codes_dtype]), stored, zeros, moments)

    def gather(self, weight: TensorSpec, encoding: Encoding, top: float = 0.0) -> GatheredRows:
        """See ``WritableFormat``."""
        return GatheredRows(self, weight, encoding, top)

    def round_trip(self, values: Array, encoding: Encoding) -> Array:
        """See ``WritableFormat``."""
        from adaptkit.numerics.kernels import cpu

        rows = cast(values, np.float32)
        weight, top = TensorSpec("", "F32", values.shape), float(np.abs(rows).max(initial=0))
        size, height = self.size(rows.shape[1], encoding), self.height(encoding)
        _, scales, zeros = self._chosen(rows, weight, encoding, top)
        codes, _ = cpu.encode_groups(rows, scales, zeros, size, height, self.grid.rounding, False, False)
        by_row = np.repeat(scales, height, axis=0)[: len(rows)]
        groups = np.arange(rows.shape[1]) // size if rows.shape[1] % size else None
        return CodedRows(codes, self.grid.values, by_row, zeros, groups).decode(rows.dtype)

    def calibrated(
        self, values: Array, weight: TensorSpec, inputs: LinearInputs, encoding: Encoding, top: float = 0.0
    ) -> tuple[dict[str, Array], Array]:
        """See ``WritableFormat``: constants are those of a narrower or wider range, whichever loses least."""
        from adaptkit.numerics.calibration import prepare
        from adaptkit.numerics.rounding import compensated

        flat, important = prepare(values, inputs.importance)
        rows, step = flat.reshape(values.shape), max(1, AT_A_TIME // values.shape[1])
        step = -(-step // 128) * 128  # a multiple of every unit
        found = [
            self._searched(rows[first : first + step], important, weight, encoding, top)
            for first in range(0, len(rows), step)
        ]
        stored, scales = (np.concatenate([one[place] for one in found]) for place in (0, 1))
        zeros = None if found[0][2] is None else np.concatenate([one[2] for one in found if one[2] is not None])
        size = self.size(values.shape[1], encoding)
        groups = np.arange(values.shape[1]) // size
        coded = CodedRows(rows, self.grid.values, scales, zeros, groups)
        if inputs.compensation is None:
            coded = nearest(rows, coded, self.grid)
        else:
            coded = replace(coded, codes=compensated(rows, scales, zeros, groups, inputs.compensation, self.grid))
        decoded = coded.decode(rows.dtype)
        gathering = self.gather(weight, encoding, top)
        gathering.add(EncodedPiece(coded.codes, stored, zeros, np.zeros(2)))
        codes = self.specs(weight, encoding)[0]
        packed = self._packed(coded.codes).view(ARRAY_DTYPES[codes.dtype]).reshape(codes.shape)
        return {codes.name: packed} | gathering.finish()[0], decoded

    def _searched(
        self, rows: Array, important: Array, weight: TensorSpec, encoding: Encoding, top: float
    ) -> tuple[Array, Array, Array | None]:
        """Return stored scales, scales of each row's groups and zero points with the least weighted error."""
        from adaptkit.numerics.kernels import cpu

        size, height = self.size(rows.shape[1], encoding), self.height(encoding)
        groups = np.arange(rows.shape[1]) // size
        low, high = cpu.group_extremes(rows, size, height)
        best: tuple[Array, Array, Array | None] | None = None
        least = np.full(low.shape, np.inf)
        for factor in RANGES:
            stored, scales, zeros = self.constants(low * factor, high * factor, weight, encoding, top)
            by_row = np.repeat(scales, height, axis=0)[: len(rows)]
            coded = nearest(rows, CodedRows(rows, self.grid.values, by_row, zeros, groups), self.grid)
            lost = np.square(coded.decode(rows.dtype) - rows) * important
            lost = np.add.reduceat(lost, np.arange(0, rows.shape[1], size), axis=1, dtype=np.float64)
            lost = np.add.reduceat(lost, np.arange(0, len(rows), height), axis=0)
            if best is not None:
                is_less = lost < least
                zeros = None if zeros is None or best[2] is None else np.where(is_less, zeros, best[2])
                stored, scales = np.where(is_less, stored, best[0]), np.where(is_less, scales, best[1])
            best, least = (stored, scales, zeros), np.minimum(lost, least)
        return stored, np.repeat(scales, height, axis=0)[: len(rows)], zeros

    def _packed(self, codes: Array) -> Array:
        """Return (rows, columns) codes as bytes of the file, the earlier of two codes of 4 bits in the low half."""
        return codes[:, 0::2] | codes[:, 1::2] << 4 if self.bits == 4 else codes

    def _chosen(
        self, rows: Array, weight: TensorSpec, encoding: Encoding, top: float
    ) -> tuple[Array, Array, Array | None]:
        """Return ``constants`` of some rows.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """
        from adaptkit.numerics.kernels import cpu

        low, high = cpu.group_extremes(rows, self.size(rows.shape[1], encoding), self.height(encoding))
        if not all_finite(low) or not all_finite(high):
            check_finite(rows)
        return self.constants(low, high, weight, encoding, top)


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
