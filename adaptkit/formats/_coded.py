"""Rows of a weight as codes, levels and what their groups share, and weights that can be read so.

a weight      (level of its code - zero point) scale          in float32, rounded once; most have no zero points
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adaptkit.formats._stored import Files, StoredWeight
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.grids import Grid

AT_A_TIME = 1 << 16
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
        step = max(1, AT_A_TIME // columns)
        with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
            for first in range(0, rows, step):
                self._decode(slice(first, first + step), out[first : first + step])
        return out

    def _decode(self, here: slice, out: Array) -> None:
        codes, zeros = self.codes[here], None if self.zeros is None else self.zeros[here]
        if self.groups is None:
            from adaptkit.numerics.kernels import cpu  # here, since it loads numba

            values = out if out.dtype == np.float32 else np.empty(out.shape, np.float32)
            cpu.decode_groups(codes, self.values, self.scales[here], zeros, values)
        else:
            values = self.values.take(codes)
            if zeros is not None:
                values -= self.spread(zeros.astype(np.float32))
            values *= self.spread(self.scales[here])
        if values is not out:
            out[:] = values

    def spread(self, constants: Array) -> Array:
        """Return (rows, groups) constants in a shape that is multiplied with the weights."""
        return constants[:, :, None] if self.groups is None else constants[:, self.groups]


@dataclass(frozen=True, kw_only=True)
class GroupedWeight(StoredWeight):
    """A weight that can be read as ``CodedRows``; its unit is a row.

    Attributes:
        by_row: whether the codes of its rows follow one another in the files, so that they can be written again.
    """

    is_linear: bool = True
    by_row: bool = True

    @property
    def has_rows(self) -> bool:
        """See ``StoredWeight``."""
        return len(self.shape) == 2

    @abstractmethod
    def rows(self, files: Files, first: int, count: int) -> CodedRows:
        """Read some rows."""

    def packed(self, coded: CodedRows) -> Array:
        """Return the codes of rows as bytes of the file, (rows, bytes).

        Of two codes in a byte the earlier is in the low half. Only for codes of 4 and 8 bits that lie by row;
        others override it.
        """
        codes = coded.codes
        return codes if len(coded.values) == 256 else codes[:, 0::2] | codes[:, 1::2] << 4

    def decode(self, files: Files, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Decode whole rows; see ``StoredWeight``."""
        columns = self.shape[-1]
        return self.rows(files, start // columns, count // columns).decode(dtype).reshape(-1)


def nearest(rows: Array, coded: CodedRows, grid: Grid) -> CodedRows:
    """Return rows, (rows, columns) float32, with the codes nearest to them, given what their groups share."""
    shape = (len(rows), coded.scales.shape[1], -1) if coded.groups is None else rows.shape
    scaled = rows.reshape(shape) / coded.spread(coded.scales)
    if coded.zeros is not None:
        scaled += coded.spread(coded.zeros.astype(np.float32))
    return replace(coded, codes=grid.nearest(scaled.reshape(-1)).reshape(rows.shape))
