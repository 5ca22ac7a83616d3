"""Integers of 1 to 8 bits with a scale for each group of a row (W4A16, W8A16), as compressed-tensors packs them.

    M.weight_packed        I32     [rows, ceil(columns b / 32)]      a row is one stream of bits
    M.weight_scale         float   [rows, columns / group]           by channel: [rows, 1]
    M.weight_shape         I64     [2] = rows, columns
    M.weight_zero_point    I32     [ceil(rows b / 32), columns / group], if there is one: streams run down the rows
    M.weight_g_idx         I32     [columns], in files of before August 2026: the group of each column

    4 bits, a word         31..28 c7 | c6 | c5 | c4 | c3 | c2 | c1 | 3..0 c0
    a weight               (q - z) scale in float32, rounded once; codes and zero points are stored as q + 2^(b - 1)

Decoding only. Source: ``pack_quantized`` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptkit.errors import CheckpointError
from adaptkit.formats._format import GET_AGAIN, Files, Format, StoredWeight
from adaptkit.formats._integers import WORD, multiply, read_scales, require, spec_of, unpack
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.spec import FLOATS

_PACKED = ".weight_packed"
_SCALE = ".weight_scale"
_PARTS = (_PACKED, _SCALE, ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale")
_OTHERS = (".weight_bitmask", ".compressed", ".row_offsets")


class W4a16(Format):
    """See ``Format``."""

    name, bits = "w4a16", 4
    readers = ("transformers", "vLLM", "SGLang", "llama.cpp")
    released_as = ("compressed-tensors",)

    def method_shown(self, names: Collection[str]) -> str | None:
        """See ``Format``."""
        return "compressed-tensors" if any(name.endswith(_PACKED) for name in names) else None

    def weight_at(self, files: Files, name: str) -> PackedIntegers | None:
        """Return the weight whose codes a tensor holds; see ``Format``."""
        codes = files.spec(name)
        if name.endswith(_SCALE):
            _check_layout(files, name)
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
        return PackedIntegers(name=begin, shape=shape, parts=tuple(parts), unit=columns, bits=bits, is_linear=True)

    def is_part(self, files: Files, name: str) -> bool:
        """Whether only compressed-tensors writes a tensor of this name."""
        return name.endswith((*_PARTS, *_OTHERS))


FORMAT = W4a16()


@dataclass(frozen=True, kw_only=True)
class PackedIntegers(StoredWeight):
    """A matrix in ``w4a16``.

    Attributes:
        bits: of a code.
    """

    bits: int

    def decode(self, files: Files, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Decode whole rows; see ``StoredWeight``."""
        columns, first, rows = self.shape[1], start // self.shape[1], count // self.shape[1]
        words, scales = files.spec(self.parts[0]), files.spec(self.parts[1])
        packed = files.read_flat(words.name, first * words.shape[1], rows * words.shape[1]).reshape(rows, -1)
        across = scales.shape[1]
        scale = read_scales(scales, files.read_flat(scales.name, first * across, rows * across).reshape(rows, across))
        out = np.empty((rows, columns), dtype)
        multiply(unpack(packed, self.bits, columns), self._zeros(files, first, rows), scale, self._groups(files), out)
        return out.reshape(-1)

    def _zeros(self, files: Files, first: int, rows: int) -> Array:
        """Return zero points of some rows, as codes are stored: (rows, groups), or (1, 1) if all are the middle."""
        name = f"{self.name}_zero_point"
        if name not in self.parts:
            return np.full((1, 1), 1 << (self.bits - 1), np.int16)
        start, stop = first * self.bits // WORD, -(-(first + rows) * self.bits // WORD)
        across = files.spec(name).shape[1]
        words = files.read_flat(name, start * across, (stop - start) * across).reshape(-1, across)
        skipped = first - start * WORD // self.bits
        if start * WORD % self.bits:  # a word in which no code begins at the first bit: begin with the stream
            words, skipped = files.read_flat(name, 0, stop * across).reshape(-1, across), first
        codes = unpack(np.ascontiguousarray(words.T), self.bits, skipped + rows)
        return codes[:, skipped:].T.astype(np.int16)

    def _groups(self, files: Files) -> Array:
        columns, groups = self.shape[1], files.spec(self.parts[1]).shape[1]
        if f"{self.name}_g_idx" not in self.parts:
            return np.arange(columns) // (columns // groups)
        found = files.read(f"{self.name}_g_idx")
        if found.min() < 0 or found.max() >= groups:
            raise CheckpointError(
                f"{self.name}_g_idx: names group {found.max()} of {groups}, or one below 0", hint=GET_AGAIN
            )
        return found


def _check_layout(files: Files, scales: str) -> None:
    codes = scales.removesuffix(_SCALE) + _PACKED
    if codes not in files.tensors or files.spec(codes).dtype != "I32":
        raise CheckpointError(
            f"{files.root}: {scales} is of a layout of compressed-tensors that is not supported, not pack-quantized",
            hint="use the 16-bit checkpoint",
        )


def _shape(files: Files, begin: str) -> tuple[int, int]:
    spec = require(spec_of(files, f"{begin}_shape"), ("I64", "I32"), (2,))
    rows, columns = map(int, files.read(spec.name))
    if rows < 1 or columns < 1:
        raise CheckpointError(f"{spec.name}: {[rows, columns]} is not the shape of a matrix", hint=GET_AGAIN)
    return rows, columns
