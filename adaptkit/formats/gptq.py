"""Integers of 2, 3, 4 or 8 bits with a group for each column, transposed (GPTQ). Decoding only.

    M.qweight    I32   [columns b / 32, rows]     a column of the file is one stream of bits, of one row (output)
    M.qzeros     I32   [groups, rows b / 32]      a row of the file is one stream
    M.scales     F16   [groups, rows]
    M.g_idx      I32   [columns]                  the group of each column (input); in order unless ``desc_act``

    4 bits, a word of codes    31..28 c7 | c6 | c5 | c4 | c3 | c2 | c1 | 3..0 c0
    a weight                   (q - z) scale in float32, rounded once
    checkpoint_format          "gptq_v2": z as stored; "gptq": z = (stored + 1) modulo 2^b

Source: AutoGPTQ, GPTQModel 7.7.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from adaptkit.errors import CheckpointError
from adaptkit.formats._coded import CodedRows, GroupedWeight
from adaptkit.formats._format import stated_quantization
from adaptkit.formats._integers import WORD, levels, read_columns, read_groups, read_scales, require, spec_of, unpack
from adaptkit.formats._stored import GET_AGAIN, Files, Format
from adaptkit.numerics.spec import FLOATS

_BITS = (2, 3, 4, 8)
_STORED_AS = {"gptq": 1, "gptq_v2": 0}
"""What is to be added to zero points, by ``checkpoint_format``."""


class Gptq(Format):
    """See ``Format``."""

    name, bits = "gptq", 4
    released_as = ("gptq",)

    def method_shown(self, names: Collection[str]) -> str | None:
        """See ``Format``; nothing but the configuration says what zero points mean."""
        return None

    def weight_at(self, files: Files, name: str) -> GptqWeight | None:
        """Return the weight whose codes a tensor holds; see ``Format``."""
        if not name.endswith(".qweight"):
            return None
        begin, codes = name.removesuffix("qweight"), files.spec(name)
        words, rows = codes.shape if len(codes.shape) == 2 else (0, 0)
        require(codes, ("I32",), (max(words, 1), max(rows, 1)))
        zeros, scales = spec_of(files, f"{begin}qzeros"), spec_of(files, f"{begin}scales")
        groups = scales.shape[0] if scales.shape else 0
        require(scales, FLOATS, (groups, rows))
        bits = zeros.shape[-1] * WORD // rows if zeros.shape else 0
        if bits not in _BITS:
            raise CheckpointError(f"{zeros.name}: {list(zeros.shape)} zero points do not fit {rows} rows", GET_AGAIN)
        require(zeros, ("I32",), (groups, rows * bits // WORD))
        columns, parts = words * WORD // bits, [name, zeros.name, scales.name]
        stated = stated_quantization(files.config)
        if f"{begin}g_idx" in files.tensors:
            parts.append(require(files.spec(f"{begin}g_idx"), ("I32",), (columns,)).name)
        elif stated.get("desc_act") is True or not groups or columns % groups:
            raise CheckpointError(f"{files.root}: {begin}g_idx is missing", hint=GET_AGAIN)
        form = stated.get("checkpoint_format", "gptq")
        if form not in _STORED_AS:
            raise CheckpointError(
                f"{files.root}: checkpoint_format is {form!r} in config.json; expected gptq or gptq_v2",
                hint="use the 16-bit checkpoint",
            )
        return GptqWeight(
            name=f"{begin}weight",
            shape=(rows, columns),
            parts=tuple(parts),
            unit=columns,
            bits=bits,
            added=_STORED_AS[form],
        )

    def is_part(self, files: Files, name: str) -> bool:
        """See ``Format``."""
        return name.endswith((".qzeros", ".scales", ".g_idx"))


FORMAT = Gptq()


@dataclass(frozen=True, kw_only=True)
class GptqWeight(GroupedWeight):
    """A matrix in GPTQ's layout.

    Attributes:
        bits: of a code.
        added: to zero points as they are stored.
    """

    bits: int
    added: int
    by_row: bool = False

    def rows(self, files: Files, first: int, count: int) -> CodedRows:
        """Read some rows, which are columns in the files; see ``GroupedWeight``."""
        columns, stop, mask = self.shape[1], first + count, (1 << self.bits) - 1
        codes = unpack(read_columns(files, files.spec(self.parts[0]), first, stop).T, self.bits, columns)
        stored = unpack(files.read(self.parts[1]), self.bits, self.shape[0])[:, first:stop].T
        spec = files.spec(self.parts[2])
        scales = read_scales(spec, files.read(spec.name)[:, first:stop].T)
        groups = read_groups(files, self.name.removesuffix("weight") + "g_idx", columns, spec.shape[0])
        zeros = stored.astype(np.int16) + self.added & mask
        return CodedRows(codes, levels(self.bits), scales, zeros, groups)
