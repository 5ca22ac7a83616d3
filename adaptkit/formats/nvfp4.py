"""4-bit floats with a scale in 8 bits for each 16 weights of a row, and a number for the matrix (NVFP4).

    M.weight_packed          U8        [rows, columns / 2]         compressed-tensors, which ``quantize`` writes
    M.weight_scale           F8_E4M3   [rows, columns / 16]
    M.weight_global_scale    F32       [1]                         a scale is divided by it
    M.input_global_scale     F32       [1]                         of inputs, in which a plain weight takes no part

    M.weight                 U8        [rows, columns / 2]         ModelOpt
    M.weight_scale           F8_E4M3   [rows, columns / 16]
    M.weight_scale_2         F32       []                          a scale is multiplied with it
    M.input_scale            F32       []

    a byte of codes          as in ``mxfp4``
    a weight                 level · (scale / global scale) in float32, rounded once

Servers use one global scale for weights that they fuse, such as those of q, k and v, so that these are written with the
same one: the largest power of two with which no scale exceeds E4M3's 448. 4.5 bits a weight. Source:
``nvfp4_pack_quantized`` of compressed-tensors 0.20; ModelOpt 0.47.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptkit.errors import CheckpointError
from adaptkit.formats._coded import CodedRows, GroupedWeight
from adaptkit.formats._compressed_tensors import METHOD, config_block, stated_weights
from adaptkit.formats._format import Encoding
from adaptkit.formats._grouped import Grouped
from adaptkit.formats._integers import require, spec_of
from adaptkit.formats._scaled import is_nvfp4
from adaptkit.formats._stored import GET_AGAIN, Files
from adaptkit.numerics.dtypes import ARRAY_DTYPES, Array, cast
from adaptkit.numerics.grids import E2M1, E4M3
from adaptkit.numerics.spec import TensorSpec

BLOCK = 16
"""Number of weights that share a scale."""
_LAYOUT, _PACKED, _MODELOPT = "nvfp4-pack-quantized", ".weight_packed", "modelopt"
_SCALE = "F8_E4M3"
_OF_INPUTS = ("input_scale", "input_global_scale")


class Nvfp4(Grouped):
    """See ``Format`` and ``Grouped``."""

    name, bits = "nvfp4", 4
    released_as = (METHOD, _MODELOPT)
    block_sizes = (BLOCK,)
    shares_top = True
    grid, codes_dtype = E2M1, "U8"

    def method_shown(self, names: Collection[str]) -> str | None:
        """See ``Format``."""
        return _MODELOPT if any(name.endswith(".weight_scale_2") for name in names) else None

    def weight_at(self, files: Files, name: str) -> Nvfp4Weight | None:
        """Return the weight whose codes a tensor holds; see ``Format``."""
        codes, weight = files.spec(name), name.removesuffix("_packed")
        is_packed = name.endswith(_PACKED) and f"{weight}_global_scale" in files.tensors
        if codes.dtype != "U8" or not (is_packed or is_nvfp4(files, name)):
            return None
        rows, half = codes.shape if len(codes.shape) == 2 else (0, 0)
        require(codes, ("U8",), (max(rows, 1), max(half // (BLOCK // 2), 1) * (BLOCK // 2)))
        scales = require(spec_of(files, f"{weight}_scale"), (_SCALE,), (rows, 2 * half // BLOCK))
        whole = files.spec(f"{weight}_global_scale" if is_packed else f"{weight}_scale_2")
        require(whole, ("F32",), (1,) if whole.shape else ())
        begin = weight.removesuffix("weight")
        inputs = tuple(begin + end for end in _OF_INPUTS if begin + end in files.tensors)
        return Nvfp4Weight(
            name=weight,
            shape=(rows, 2 * half),
            parts=(name, scales.name, whole.name, *inputs),
            unit=2 * half,
            input_scales=inputs,
            is_divided=is_packed,
        )

    def is_part(self, files: Files, name: str) -> bool:
        """See ``Format``."""
        return name.endswith((".weight_scale_2", ".weight_global_scale", ".input_global_scale"))

    def scale_dtype(self, weight: TensorSpec) -> str:
        """See ``Grouped``."""
        return _SCALE

    def others(self, weight: TensorSpec, top: float) -> dict[str, Array]:
        """See ``Grouped``."""
        return {"_global_scale": np.array([_global_scale(top)], np.float32)}

    def constants(
        self, low: Array, high: Array, weight: TensorSpec, encoding: Encoding, top: float
    ) -> tuple[Array, Array, Array | None]:
        """See ``Grouped``."""
        whole = np.float32(_global_scale(top))
        tops = np.maximum(np.maximum(high, -low), np.float32(0))  # not -0, whose code is not the lowest
        codes = E4M3.nearest((tops / np.float32(E2M1.top) * whole).reshape(-1))
        stored = np.maximum(codes, 1).reshape(low.shape)  # 2 ** -9 is the smallest, for groups of zeros, too
        return stored.view(ARRAY_DTYPES[_SCALE]), E4M3.values[stored] / whole, None

    def config_block(self, kept: list[str], encoding: Encoding) -> dict[str, Any]:
        """See ``WritableFormat``."""
        weights = {
            "group_size": BLOCK,
            "num_bits": 4,
            "scale_dtype": "torch.float8_e4m3fn",
            "strategy": "tensor_group",
            "symmetric": True,
            "type": "float",
        }
        return config_block(_LAYOUT, weights, kept)

    def stated(self, block: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
        """See ``WritableFormat``."""
        found = stated_weights(block, _LAYOUT)
        return (Encoding(self.name, BLOCK, False), found[1]) if found else None


FORMAT = Nvfp4()


@dataclass(frozen=True, kw_only=True)
class Nvfp4Weight(GroupedWeight):
    """A matrix in ``nvfp4``.

    Attributes:
        is_divided: whether scales are divided by the matrix's number.
    """

    is_divided: bool

    def rows(self, files: Files, first: int, count: int) -> CodedRows:
        """Read some rows; see ``GroupedWeight``."""
        columns = self.shape[1]
        raw = files.read_bytes(self.parts[0], first * columns // 2, count * columns // 2)
        codes = np.stack((raw & 15, raw >> 4), axis=-1).reshape(count, columns)
        local = cast(files.read_flat(self.parts[1], first * columns // BLOCK, count * columns // BLOCK), np.float32)
        whole = files.read(self.parts[2]).reshape(-1)[0]
        for name, numbers in ((self.parts[1], local), (self.parts[2], whole)):
            if not np.isfinite(numbers).all() or (name == self.parts[2] and whole == 0):
                bad = whole if name == self.parts[2] else local[~np.isfinite(local)][0]
                raise CheckpointError(f"{name}: a scale is {bad:g}", hint=GET_AGAIN)
        scales = local / whole if self.is_divided else local * whole
        return CodedRows(codes, E2M1.values, scales.reshape(count, -1))


def _global_scale(top: float) -> float:
    """Return the largest power of two by which scales can be multiplied: ``top`` is the largest weight's magnitude."""
    if top == 0:
        return 1.0
    _, exponent = math.frexp(E4M3.top * E2M1.top / top)
    return math.ldexp(1.0, min(max(exponent - 1, -126), 126))
