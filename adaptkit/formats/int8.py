"""Integers of 8 bits with a scale for each row (W8A8), as compressed-tensors lays them out.

    M.weight               I8      [rows, columns]
    M.weight_scale         float   [rows, 1], or one number
    M.weight_zero_point    I8      the same shape, if there is one

    a weight               (q - z) scale in float32, rounded once

Servers round the inputs to 8 bits, too, while the model runs. 8.016 bits a weight for rows of 1024. Source:
``int_quantized`` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptkit.errors import CheckpointError
from adaptkit.formats._coded import CodedRows, GroupedWeight
from adaptkit.formats._compressed_tensors import METHOD, config_block, inputs_of, stated_weights
from adaptkit.formats._format import Encoding
from adaptkit.formats._grouped import Grouped
from adaptkit.formats._integers import read_scales, require, stored_scales
from adaptkit.formats._stored import GET_AGAIN, Files
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.grids import INT8
from adaptkit.numerics.spec import FLOATS, TensorSpec

_LAYOUT = "int-quantized"


class Int8(Grouped):
    """See ``Format`` and ``Grouped``."""

    name, bits = "int8", 8
    released_as = (METHOD,)
    block_sizes = (0,)
    grid, codes_dtype, codes_suffix = INT8, "I8", ""

    def method_shown(self, names: Collection[str]) -> str | None:
        """See ``Format``; names alone do not tell it from FP8."""
        return None

    def weight_at(self, files: Files, name: str) -> Int8Weight | None:
        """Return the weight whose codes a tensor holds; see ``Format``."""
        codes, scales = files.spec(name), f"{name}_scale"
        if codes.dtype != "I8" or not name.endswith(".weight") or scales not in files.tensors:
            return None
        rows, columns = codes.shape if len(codes.shape) == 2 else (0, 0)
        require(codes, ("I8",), (max(rows, 1), max(columns, 1)))
        spec = files.spec(scales)
        if spec.dtype not in FLOATS or spec.shape not in ((rows, 1), (rows,), (1,), ()):
            raise CheckpointError(
                f"{scales}: is {spec.dtype} {list(spec.shape)}; expected one for each of {rows} rows, or one number",
                hint=GET_AGAIN,
            )
        parts = [name, scales]
        if f"{name}_zero_point" in files.tensors:
            parts.append(require(files.spec(f"{name}_zero_point"), ("I8",), spec.shape).name)
        return Int8Weight(name=name, shape=(rows, columns), parts=tuple(parts), unit=columns)

    def constants(
        self, low: Array, high: Array, weight: TensorSpec, encoding: Encoding, top: float
    ) -> tuple[Array, Array, Array | None]:
        """See ``Grouped``."""
        return *stored_scales(np.maximum(high, -low) / np.float32(127), self.scale_dtype(weight)), None

    def config_block(self, kept: list[str], encoding: Encoding) -> dict[str, Any]:
        """See ``WritableFormat``."""
        weights = {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "int"}
        return config_block(_LAYOUT, weights, kept, inputs_of("int"))

    def stated(self, block: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
        """See ``WritableFormat``."""
        found = stated_weights(block, _LAYOUT)
        return (Encoding(self.name, 0, False), found[1]) if found else None


FORMAT = Int8()


@dataclass(frozen=True, kw_only=True)
class Int8Weight(GroupedWeight):
    """A matrix in ``int8``."""

    def rows(self, files: Files, first: int, count: int) -> CodedRows:
        """Read some rows; see ``GroupedWeight``."""
        columns = self.shape[1]
        codes = files.read_bytes(self.name, first * columns, count * columns).reshape(count, columns)
        scales = read_scales(files.spec(self.parts[1]), self._of_rows(files, self.parts[1], first, count))
        zeros = self._of_rows(files, self.parts[2], first, count) if len(self.parts) > 2 else None
        return CodedRows(codes, INT8.values, scales, zeros)

    def _of_rows(self, files: Files, name: str, first: int, count: int) -> Array:
        found = files.read(name).reshape(-1, 1)
        return np.broadcast_to(found, (count, 1)) if len(found) == 1 else found[first : first + count]
