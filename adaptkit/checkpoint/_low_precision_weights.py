"""Weights in FP8 and MXFP4 as they lie in files: their parts, and decoding runs of them; see ``low_precision``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.numerics.arrays import Array, cast
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.formats import _fp8, _mxfp4

BLOCKS, SCALES = "_blocks", "_scales"
"""What gpt-oss appends to the name of its experts' weight."""
_AT_A_TIME = 1 << 16
"""Number of bytes of transposed MXFP4 codes decoded at a time: the result then stays in the cache."""


@dataclass(frozen=True)
class Decoded:
    """Some weights, and the bytes of the codes that they were made from."""

    values: Array
    raw: Array


class LowPrecisionWeight(Protocol):
    """A weight that is stored as codes and scales."""

    @property
    def name(self) -> str:
        """Name of the plain weight."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the plain weight."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that it is made of: codes, scales, and any that a plain weight does not need."""
        ...

    @property
    def unit(self) -> int:
        """The fewest consecutive weights that can be decoded."""
        ...

    def decode(self, files: TensorFiles, start: int, count: int, dtype: np.dtype[Any]) -> Decoded:
        """Read and decode ``count`` > 0 weights from the ``start``-th on, both multiples of ``unit``: (count,)."""
        ...

    def is_broken(self, files: TensorFiles, values: Array) -> bool:
        """Whether decoded values that are not finite are so because of their codes and scales, not of their dtype."""
        ...


@dataclass(frozen=True)
class Fp8Weight:
    """A weight in FP8, or a stack of such matrices.

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
    input_scales: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Codes, scales, and scales of inputs."""
        return (self.name, self.scales, *self.input_scales)

    @property
    def unit(self) -> int:
        """A row."""
        return self.shape[-1]

    def decode(self, files: TensorFiles, start: int, count: int, dtype: np.dtype[Any]) -> Decoded:
        """Decode whole rows, of one matrix or of several; see ``LowPrecisionWeight``."""
        rows, columns = self.shape[-2:]
        raw, values = files.read_bytes(self.name, start, count), np.empty((count // columns, columns), dtype)
        codes, first = raw.reshape(-1, columns), start // columns
        done = 0
        while done < len(codes):
            matrix, row = divmod(first + done, rows)
            here = slice(done, done + min(rows - row, len(codes) - done))
            scales = self._scales_of(files, matrix)
            values[here] = _fp8.dequantize(codes[here], scales, self.block, row, dtype)
            done = here.stop
        return Decoded(values.reshape(-1), raw)

    def is_broken(self, files: TensorFiles, values: Array) -> bool:
        """See ``LowPrecisionWeight``."""
        return bool(np.isnan(values).any()) or not all_finite(_as_float32(files.read_array(self.scales)))

    def _scales_of(self, files: TensorFiles, matrix: int) -> Array:
        spec = files.spec(self.scales)
        grid = (1, 1) if spec.count == 1 else spec.shape[-2:]
        start = 0 if spec.count == 1 else matrix * math.prod(grid)
        return _as_float32(files.read_flat_array(self.scales, start, math.prod(grid))).reshape(grid)


@dataclass(frozen=True)
class Mxfp4Weight:
    """A matrix in MXFP4 in the rows of a plain weight, or a stack of such matrices, as DeepSeek-V4 stores experts.

    Attributes:
        name: of the weight, and of the tensor of its codes.
        scales: name of the tensor of its exponents.
        shape: (..., rows, columns).
        input_scales: names of tensors that a plain weight does not need.
    """

    name: str
    scales: str
    shape: tuple[int, ...]
    input_scales: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Codes, exponents, and scales of inputs."""
        return (self.name, self.scales, *self.input_scales)

    @property
    def unit(self) -> int:
        """Weights that share an exponent."""
        return _mxfp4.BLOCK

    def decode(self, files: TensorFiles, start: int, count: int, dtype: np.dtype[Any]) -> Decoded:
        """Decode whole blocks; see ``LowPrecisionWeight``."""
        raw = files.read_bytes(self.name, start // 2, count // 2)
        exponents = files.read_bytes(self.scales, start // _mxfp4.BLOCK, count // _mxfp4.BLOCK)
        values = _mxfp4.dequantize(raw.reshape(-1, _mxfp4.BLOCK // 2), exponents.reshape(-1, 1), dtype)
        return Decoded(values.reshape(-1), raw)

    def is_broken(self, files: TensorFiles, values: Array) -> bool:
        """See ``LowPrecisionWeight``."""
        return bool(np.isnan(values).any())


@dataclass(frozen=True)
class Mxfp4Experts:
    """Experts of gpt-oss in MXFP4, whose plain weight is transposed.

    Attributes:
        name: of the weight.
        shape: (experts, in, out).
    """

    name: str
    shape: tuple[int, int, int]

    @property
    def parts(self) -> tuple[str, ...]:
        """Codes and exponents."""
        return (self.name + BLOCKS, self.name + SCALES)

    @property
    def unit(self) -> int:
        """An expert, since it is transposed."""
        return self.shape[1] * self.shape[2]

    def decode(self, files: TensorFiles, start: int, count: int, dtype: np.dtype[Any]) -> Decoded:
        """Decode whole experts; see ``LowPrecisionWeight``."""
        experts = range(start // self.unit, (start + count) // self.unit)
        found = [self._expert(files, expert, dtype) for expert in experts]
        if len(found) == 1:
            return found[0]
        return Decoded(*(np.concatenate(arrays) for arrays in zip(*((f.values, f.raw) for f in found), strict=True)))

    def is_broken(self, files: TensorFiles, values: Array) -> bool:
        """See ``LowPrecisionWeight``."""
        return bool(np.isnan(values).any())

    def _expert(self, files: TensorFiles, expert: int, dtype: np.dtype[Any]) -> Decoded:
        _, inputs, outputs = self.shape
        half, groups = inputs // 2, inputs // _mxfp4.BLOCK
        blocks, scales = self.parts
        raw = files.read_bytes(blocks, expert * outputs * half, outputs * half)
        exponents = files.read_bytes(scales, expert * outputs * groups, outputs * groups).reshape(outputs, groups)
        codes, values = raw.reshape(outputs, half), np.empty((inputs, outputs), dtype)
        step = max(1, _AT_A_TIME // half)
        for first in range(0, outputs, step):
            rows = slice(first, first + step)
            values[:, rows] = _mxfp4.dequantize(codes[rows], exponents[rows], dtype).T
        return Decoded(values.reshape(-1), raw)


def _as_float32(scales: Array) -> Array:
    """Convert scales, of which bytes are exponents (E8M0)."""
    return cast(scales.view(ml_dtypes.float8_e8m0fnu) if scales.dtype == np.uint8 else scales, np.float32)
