"""Integers of 4 bits with zero points, transposed (AWQ, version ``gemm``). Decoding only.

    M.qweight    I32   [columns, rows / 8]           a word: eight rows (outputs) of one column (input)
    M.qzeros     I32   [columns / group, rows / 8]   the same
    M.scales     F16   [columns / group, rows]

    a word       31..28 r7 | r5 | r3 | r1 | r6 | r4 | r2 | 3..0 r0
    a weight     (q - z) scale in float32, rounded once; q and z from 0 to 15

Source: ``pack_quantized`` weights of AutoAWQ 0.2.9, ``WQLinear_GEMM``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from adaptkit.errors import CheckpointError
from adaptkit.formats._coded import CodedRows, GroupedWeight
from adaptkit.formats._format import stated_quantization
from adaptkit.formats._integers import levels, read_columns, read_scales, require, spec_of, unpack
from adaptkit.formats._stored import GET_AGAIN, Files, Format
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.spec import FLOATS

_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in a word each of its eight rows is, lowest bits first."""
_ROWS = len(_ORDER)
_BITS = 4


class Awq(Format):
    """See ``Format``."""

    name, bits = "awq", _BITS
    released_as = ("awq",)

    def method_shown(self, names: Collection[str]) -> str | None:
        """See ``Format``; names alone do not tell AWQ from GPTQ."""
        return None

    def weight_at(self, files: Files, name: str) -> AwqWeight | None:
        """Return the weight whose codes a tensor holds; see ``Format``."""
        if not name.endswith(".qweight"):
            return None
        stated = stated_quantization(files.config)
        version, bits = str(stated.get("version", "gemm")).lower(), stated.get("bits", stated.get("w_bit", _BITS))
        if version != "gemm" or bits != _BITS:
            raise CheckpointError(
                f"{files.root}: AWQ of version {version!r} with {bits!r} bits is not supported",
                hint="use a checkpoint of version gemm with 4 bits, or the 16-bit checkpoint",
            )
        begin, codes = name.removesuffix("qweight"), files.spec(name)
        columns, words = codes.shape if len(codes.shape) == 2 else (0, 0)
        require(codes, ("I32",), (max(columns, 1), max(words, 1)))
        scales = spec_of(files, f"{begin}scales")
        groups = scales.shape[0] if scales.shape else 0
        require(scales, FLOATS, (groups, words * _ROWS))
        zeros = require(spec_of(files, f"{begin}qzeros"), ("I32",), (groups, words))
        if not groups or columns % groups:
            raise CheckpointError(f"{scales.name}: {groups} groups do not divide {columns} columns", hint=GET_AGAIN)
        parts = (name, zeros.name, scales.name)
        return AwqWeight(name=f"{begin}weight", shape=(words * _ROWS, columns), parts=parts, unit=columns)

    def is_part(self, files: Files, name: str) -> bool:
        """See ``Format``."""
        return name.endswith((".qzeros", ".scales"))


FORMAT = Awq()


@dataclass(frozen=True, kw_only=True)
class AwqWeight(GroupedWeight):
    """A matrix in AWQ's layout."""

    by_row: bool = False

    def rows(self, files: Files, first: int, count: int) -> CodedRows:
        """Read some rows, which are columns in the files; see ``GroupedWeight``."""
        codes, zeros = (_read_codes(files, part, first, count) for part in self.parts[:2])
        spec = files.spec(self.parts[2])
        scales = read_scales(spec, files.read(spec.name)[:, first : first + count].T)
        return CodedRows(codes, levels(_BITS), scales, zeros)


def _read_codes(files: Files, name: str, first: int, rows: int) -> Array:
    """Return the codes in some rows of the plain weight: (rows, file's rows) uint8."""
    start, stop = first // _ROWS, -(-(first + rows) // _ROWS)
    words = read_columns(files, files.spec(name), start, stop)
    by_word = unpack(words.reshape(-1, 1), _BITS, _ROWS)[:, _ORDER].reshape(len(words), -1)
    skipped = first - start * _ROWS
    return by_word[:, skipped : skipped + rows].T
