"""Integers of 1 to 8 bits with a scale for each group of a row (W4A16, W8A16), as compressed-tensors packs them.

    M.weight_packed        I32     [rows, ceil(columns b / 32)]      a row is one stream of bits
    M.weight_scale         float   [rows, columns / group]           by channel: [rows, 1]
    M.weight_shape         I64     [2] = rows, columns
    M.weight_zero_point    I32     [ceil(rows b / 32), columns / group], if there is one: streams run down the rows
    M.weight_g_idx         I32     [columns], in files of before August 2026: the group of each column

    4 bits, a word         31..28 c7 | c6 | c5 | c4 | c3 | c2 | c1 | 3..0 c0
    a weight               (q - z) scale in float32, rounded once; codes and zero points are stored as q + 2^(b - 1)

``quantize`` writes 4 bits: 4.125 a weight in groups of 128, with zero points 4.156.

Source: ``pack_quantized`` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptkit.errors import CheckpointError
from adaptkit.formats._coded import CodedRows, GroupedWeight
from adaptkit.formats._compressed_tensors import METHOD, config_block, stated_weights
from adaptkit.formats._format import Encoding
from adaptkit.formats._grouped import Grouped
from adaptkit.formats._integers import (
    WORD,
    levels,
    pack,
    read_groups,
    read_scales,
    require,
    spec_of,
    stored_scales,
    unpack,
)
from adaptkit.formats._stored import GET_AGAIN, Files
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.grids import INT4
from adaptkit.numerics.spec import FLOATS, TensorSpec

_PACKED = ".weight_packed"
_PARTS = (_PACKED, ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale")
_OTHERS = (".weight_bitmask", ".compressed", ".row_offsets")


class W4a16(Grouped):
    """See ``Format`` and ``Grouped``."""

    name, bits = "w4a16", 4
    released_as = (METHOD,)
    block_sizes = (128, 64, 32)
    has_zero_points = True
    grid, codes_dtype = INT4, "I32"

    def unit(self, weight: TensorSpec, encoding: Encoding) -> int:
        """See ``WritableFormat``; a word has the zero points of eight rows."""
        return weight.shape[-1] * (8 if encoding.zero_points else 1)

    def others(self, weight: TensorSpec, top: float) -> dict[str, Array]:
        """See ``Grouped``."""
        return {"_shape": np.array(weight.shape, np.int64)}

    def constants(
        self, low: Array, high: Array, weight: TensorSpec, encoding: Encoding, top: float
    ) -> tuple[Array, Array, Array | None]:
        """See ``Grouped``; a range with zero points includes 0."""
        if not encoding.zero_points:
            return *stored_scales(np.maximum(high, -low) / np.float32(INT4.top), self.scale_dtype(weight)), None
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        stored, scales = stored_scales((high - low) / np.float32(15), self.scale_dtype(weight))
        return stored, scales, np.clip(np.rint(-8 - low / scales), -8, 7).astype(np.int8)

    def config_block(self, kept: list[str], encoding: Encoding) -> dict[str, Any]:
        """See ``WritableFormat``."""
        weights = {
            "group_size": encoding.block_size,
            "num_bits": 4,
            "strategy": "group",
            "symmetric": not encoding.zero_points,
            "type": "int",
        }
        return config_block("pack-quantized", weights, kept)

    def stated(self, block: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
        """See ``WritableFormat``."""
        if (found := stated_weights(block, "pack-quantized")) is None:
            return None
        weights, kept = found
        size, symmetric = weights.get("group_size"), weights.get("symmetric", True)
        if weights.get("num_bits") != 4 or size not in self.block_sizes or not isinstance(symmetric, bool):
            return None
        return Encoding(self.name, int(size), False, not symmetric), kept

    def method_shown(self, names: Collection[str]) -> str | None:
        """See ``Format``."""
        return METHOD if any(name.endswith(_PACKED) for name in names) else None

    def weight_at(self, files: Files, name: str) -> PackedIntegers | None:
        """Return the weight whose codes a tensor holds; see ``Format``."""
        codes = files.spec(name)
        if name.endswith(_OTHERS):
            raise CheckpointError(
                f"{files.root}: {name} is of a layout of compressed-tensors that is not supported",
                hint="use the 16-bit checkpoint",
            )
        if not name.endswith(_PACKED) or codes.dtype != "I32":
            return None
        begin = name.removesuffix("_packed")
        shape = _shape(files, begin)
        rows, columns = shape
        bits = codes.shape[-1] * WORD // columns
        if not 1 <= bits <= 8 or codes.shape != (rows, -(-columns * bits // WORD)):
            raise CheckpointError(
                f"{name}: {list(codes.shape)} words do not hold {list(shape)} codes of 1 to 8 bits", hint=GET_AGAIN
            )
        scales = spec_of(files, f"{begin}_scale")
        groups = scales.shape[-1] if scales.shape else 0
        require(scales, FLOATS, (rows, groups))
        parts = [name, scales.name, f"{begin}_shape"]
        if f"{begin}_zero_point" in files.tensors:
            zeros = require(files.spec(f"{begin}_zero_point"), ("I32",), (-(-rows * bits // WORD), groups))
            parts.append(zeros.name)
        if f"{begin}_g_idx" in files.tensors:
            parts.append(require(files.spec(f"{begin}_g_idx"), ("I32",), (columns,)).name)
        elif not groups or columns % groups:
            raise CheckpointError(f"{scales.name}: {groups} groups do not divide {columns} columns", hint=GET_AGAIN)
        return PackedIntegers(name=begin, shape=shape, parts=tuple(parts), unit=columns, bits=bits)

    def is_part(self, files: Files, name: str) -> bool:
        """Whether only compressed-tensors writes a tensor of this name."""
        return name.endswith(_PARTS)


FORMAT = W4a16()


@dataclass(frozen=True, kw_only=True)
class PackedIntegers(GroupedWeight):
    """A matrix in ``w4a16``.

    Attributes:
        bits: of a code.
    """

    bits: int

    def rows(self, files: Files, first: int, count: int) -> CodedRows:
        """Read some rows; see ``GroupedWeight``."""
        columns, half = self.shape[1], 1 << (self.bits - 1)
        words, scales = files.spec(self.parts[0]), files.spec(self.parts[1])
        packed = files.read_flat(words.name, first * words.shape[1], count * words.shape[1]).reshape(count, -1)
        across = scales.shape[1]
        scale = read_scales(scales, files.read_flat(scales.name, first * across, count * across).reshape(-1, across))
        groups = read_groups(files, f"{self.name}_g_idx", columns, across)
        codes, zeros = unpack(packed, self.bits, columns), self._zeros(files, first, count)
        return CodedRows(codes, levels(self.bits, half), scale, zeros, groups)

    def packed(self, coded: CodedRows) -> Array:
        """See ``GroupedWeight``."""
        return pack(coded.codes, self.bits)

    def _zeros(self, files: Files, first: int, rows: int) -> Array | None:
        """Return zero points of some rows, in levels: (rows, groups); None if all are 0."""
        name = f"{self.name}_zero_point"
        if name not in self.parts:
            return None
        start, stop = first * self.bits // WORD, -(-(first + rows) * self.bits // WORD)
        across = files.spec(name).shape[1]
        words = files.read_flat(name, start * across, (stop - start) * across).reshape(-1, across)
        skipped = first - start * WORD // self.bits
        if start * WORD % self.bits:  # a word in which no code begins at the first bit: begin with the stream
            words, skipped = files.read_flat(name, 0, stop * across).reshape(-1, across), first
        codes = unpack(np.ascontiguousarray(words.T), self.bits, skipped + rows)
        return codes[:, skipped:].T.astype(np.int16) - (1 << (self.bits - 1))


def _shape(files: Files, begin: str) -> tuple[int, int]:
    spec = require(spec_of(files, f"{begin}_shape"), ("I64", "I32"), (2,))
    rows, columns = map(int, files.read(spec.name))
    if rows < 1 or columns < 1:
        raise CheckpointError(f"{spec.name}: {[rows, columns]} is not the shape of a matrix", hint=GET_AGAIN)
    return rows, columns
