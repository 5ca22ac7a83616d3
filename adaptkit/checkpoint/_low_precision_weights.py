"""Weights in FP8 and MXFP4 as they lie in files: their parts, and decoding runs of them; see ``low_precision``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.formats import _fp8, _mxfp4
from adaptkit.numerics.arrays import Array, cast
from adaptkit.numerics.finite import all_finite

BLOCKS, SCALES = "_blocks", "_scales"
"""What gpt-oss appends to the name of its experts' weight."""
_AT_A_TIME = 1 << 18
"""Number of bytes of an expert's codes read at a time, so that they stay in the cache."""


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

    def decode(self, files: TensorFiles, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Read and decode ``count`` > 0 weights from the ``start``-th on, both multiples of ``unit``: (count,)."""
        ...

    def is_broken(self, files: TensorFiles, values: Array) -> bool:
        """Whether decoded values that are not finite are so because of their codes and scales, not of their dtype."""
        ...


@dataclass(frozen=True)
class _Scaled:
    """A weight that has the name of the tensor of its codes.

    Attributes:
        name: of the weight, and of the tensor of its codes.
        scales: name of the tensor of its scales.
        shape: (..., rows, columns).
        input_scales: names of tensors that a plain weight does not need.
    """

    name: str
    scales: str
    shape: tuple[int, ...]
    input_scales: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Codes, scales, and scales of inputs."""
        return (self.name, self.scales, *self.input_scales)


@dataclass(frozen=True)
class Fp8Weight(_Scaled):
    """A weight in FP8, or a stack of such matrices; see ``_Scaled``.

    Attributes:
        block: rows and columns that share a scale.
    """

    block: tuple[int, int]

    @property
    def unit(self) -> int:
        """A row."""
        return self.shape[-1]

    def decode(self, files: TensorFiles, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Decode whole rows, of one matrix or of several; see ``LowPrecisionWeight``."""
        rows, columns = self.shape[-2:]
        values = np.empty((count // columns, columns), dtype)
        codes, first = files.read_bytes(self.name, start, count).reshape(values.shape), start // columns
        done = 0
        while done < len(codes):
            matrix, row = divmod(first + done, rows)
            here = slice(done, done + min(rows - row, len(codes) - done))
            scales = self._scales_of(files, matrix, row, row + here.stop - done)
            _fp8.dequantize(codes[here], scales, self.block, row % self.block[0], values[here])
            done = here.stop
        return values.reshape(-1)

    def is_broken(self, files: TensorFiles, values: Array) -> bool:
        """See ``LowPrecisionWeight``."""
        return bool(np.isnan(values).any()) or not all_finite(_as_float32(files.read_array(self.scales)))

    def _scales_of(self, files: TensorFiles, matrix: int, row: int, stop: int) -> Array:
        """Read the scales of some rows of a matrix: (blocks that they lie in, blocks beside each other)."""
        spec = files.spec(self.scales)
        if spec.count == 1:
            return _as_float32(files.read_array(self.scales)).reshape(1, 1)
        down, across = spec.shape[-2:]
        first, last = row // self.block[0], (stop - 1) // self.block[0]
        start, count = (matrix * down + first) * across, (last + 1 - first) * across
        return _as_float32(files.read_flat_array(self.scales, start, count)).reshape(-1, across)


@dataclass(frozen=True)
class Mxfp4Weight(_Scaled):
    """A matrix in MXFP4 in the rows of a plain weight, or a stack, as DeepSeek-V4 stores experts; see ``_Scaled``."""

    @property
    def unit(self) -> int:
        """Weights that share an exponent."""
        return _mxfp4.BLOCK

    def decode(self, files: TensorFiles, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Decode whole blocks; see ``LowPrecisionWeight``."""
        raw = files.read_bytes(self.name, start // 2, count // 2)
        exponents = files.read_bytes(self.scales, start // _mxfp4.BLOCK, count // _mxfp4.BLOCK)
        return _mxfp4.dequantize(raw.reshape(-1, _mxfp4.BLOCK // 2), exponents.reshape(-1, 1), dtype).reshape(-1)

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
        """As many rows as codes of the transposed weight that share an exponent."""
        return _mxfp4.BLOCK * self.shape[2]

    def decode(self, files: TensorFiles, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Decode whole rows, of one expert or of several; see ``LowPrecisionWeight``."""
        _, inputs, outputs = self.shape
        values, first, done = np.empty((count // outputs, outputs), dtype), start // outputs, 0
        while done < len(values):
            expert, row = divmod(first + done, inputs)
            here = slice(done, min(len(values), done + inputs - row))
            self._decode_rows(files, expert, row, values[here])
            done = here.stop
        return values.reshape(-1)

    def is_broken(self, files: TensorFiles, values: Array) -> bool:
        """See ``LowPrecisionWeight``."""
        return bool(np.isnan(values).any())

    def _decode_rows(self, files: TensorFiles, expert: int, row: int, out: Array) -> None:
        """Decode rows of one expert, which are columns in the files; so all its codes are read, though not at once."""
        _, inputs, outputs = self.shape
        (blocks, scales), half, groups = self.parts, inputs // 2, inputs // _mxfp4.BLOCK
        stop, step = row + len(out), max(1, _AT_A_TIME // half)
        for first in range(0, outputs, step):
            count, start = min(step, outputs - first), expert * outputs + first
            codes = files.read_bytes(blocks, start * half, count * half).reshape(count, half)
            exponents = files.read_bytes(scales, start * groups, count * groups).reshape(count, groups)
            here = codes[:, row // 2 : stop // 2], exponents[:, row // _mxfp4.BLOCK : stop // _mxfp4.BLOCK]
            out[:, first : first + count] = _mxfp4.dequantize(*here, out.dtype).T


def _as_float32(scales: Array) -> Array:
    """Convert scales, of which bytes are exponents (E8M0)."""
    return cast(scales.view(ml_dtypes.float8_e8m0fnu) if scales.dtype == np.uint8 else scales, np.float32)
