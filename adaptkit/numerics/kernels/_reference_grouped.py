"""The part of ``reference`` for weights that are levels times the scales that runs of a row or blocks share."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from adaptkit.numerics.dtypes import Array, cast

INTEGERS, E4M3, SIXTEEN = range(3)
"""Kinds of levels."""


class Rounding(NamedTuple):
    """How a scaled weight is rounded to levels; beyond them, to the outermost one.

    Attributes:
        kind: integers, the finite values of E4M3 (both: ties to even), or up to sixteen levels (ties to the lower).
        lowest, highest: float32, the integers.
        offset: what is added to an integer to get its code, modulo 256.
        bounds: 15 float32, the midpoints between levels, ascending; infinite ones where there are fewer levels.
        codes: 16 uint8, of the levels in ascending order.
        levels: 16 float32.
    """

    kind: int
    lowest: np.float32 = np.float32(0)
    highest: np.float32 = np.float32(0)
    offset: int = 0
    bounds: tuple[np.float32, ...] = (np.float32(0),) * 15
    codes: tuple[np.uint8, ...] = (np.uint8(0),) * 16
    levels: tuple[np.float32, ...] = (np.float32(0),) * 16


def group_extremes(rows: Array, size: int, height: int = 1) -> tuple[Array, Array]:
    """Return the smallest and the largest weight of each group.

    Args:
        rows: (rows, columns), floating point.
        size: number of columns of a group; the last of a row may have fewer.
        height: number of rows of a group; the last may have fewer.

    Returns:
        low, high: (ceil(rows / height), ceil(columns / size)) float32; one of them is not finite where a weight is not.
    """
    wide, down, across = cast(rows, np.float32), np.arange(0, len(rows), height), np.arange(0, rows.shape[1], size)
    low, high = np.minimum.reduceat(wide, across, axis=1), np.maximum.reduceat(wide, across, axis=1)
    return np.minimum.reduceat(low, down), np.maximum.reduceat(high, down)


def nearest_codes(scaled: Array, rounding: Rounding) -> Array:
    """Return the codes of the levels nearest to scaled weights.

    Args:
        scaled: any shape, float32, not NaN.
        rounding: to which levels.

    Returns:
        the same shape, uint8.
    """
    if rounding.kind == INTEGERS:
        integers = np.clip(np.rint(scaled), rounding.lowest, rounding.highest).astype(np.int32)
        return (integers + rounding.offset).astype(np.uint8)
    if rounding.kind == E4M3:
        return np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    found: Array = np.array(rounding.codes, np.uint8)[np.searchsorted(np.array(rounding.bounds), scaled)]
    return found


@np.errstate(all="ignore")
def encode_groups(
    rows: Array,
    scales: Array,
    zeros: Array | None,
    size: int,
    height: int,
    rounding: Rounding,
    pairs: bool,
    measure: bool,
) -> tuple[Array, Array | None]:
    """Round weights to level = weight / scale + zero point, in float32.

    Args:
        rows: (rows, columns), floating point, finite.
        scales: (ceil(rows / height), ceil(columns / size)) float32, not 0.
        zeros: the same shape, of a signed integer type, in levels; None if there are none.
        size: number of columns that share a scale.
        height: number of rows that do.
        rounding: to which levels.
        pairs: whether two codes of 4 bits share a byte, the earlier in the low half.
        measure: whether to return the moments, too.

    Returns:
        codes: (rows, columns), or (rows, columns / 2) with ``pairs``, uint8.
        moments: (2,) float64 or None: Σ(w - q)² and Σw², q being (level - zero) scale in float32.
    """
    wide = cast(rows, np.float32)
    group = np.arange(len(rows))[:, None] // height, np.arange(rows.shape[1]) // size
    scale, zero = scales[group], np.float32(0) if zeros is None else zeros[group].astype(np.float32)
    codes = nearest_codes(wide / scale + zero, rounding)
    moments = None
    if measure:
        lost = ((levels_of(rounding)[codes] - zero) * scale).astype(np.float64) - wide
        moments = np.array([np.square(lost).sum(), np.square(wide, dtype=np.float64).sum()])
    return codes[:, 0::2] | codes[:, 1::2] << 4 if pairs else codes, moments


def levels_of(rounding: Rounding) -> Array:
    """Return the level of each code: (256,) float32, of those that ``nearest_codes`` returns."""
    if rounding.kind == INTEGERS:
        found = np.zeros(256, np.float32)
        integers = np.arange(rounding.lowest, rounding.highest + 1, dtype=np.float32)
        found[(integers.astype(np.int32) + rounding.offset).astype(np.uint8)] = integers
    elif rounding.kind == E4M3:
        found = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    else:
        found = np.zeros(256, np.float32)
        found[list(rounding.codes)] = rounding.levels
    return found


@np.errstate(all="ignore")
def decode_groups(codes: Array, values: Array, scales: Array, zeros: Array | None, out: Array) -> None:
    """Store (level - zero point) scale.

    Args:
        codes: (rows, columns) uint8.
        values: (2 ** bits,) float32, the level of each code.
        scales: (rows, groups) float32, for groups of equally many columns, one after the other.
        zeros: (rows, groups) of a signed integer type, in levels; None if there are none.
        out: (rows, columns) float32.
    """
    size = codes.shape[1] // scales.shape[1]
    out[:] = values[codes]
    if zeros is not None:
        out -= np.repeat(zeros.astype(np.float32), size, axis=1)
    out *= np.repeat(scales, size, axis=1)
