"""Block-wise formats: a flattened weight is cut into blocks, each with one constant (absmax) of its own.

So an outlier reduces the precision of its own block only. ``nf4`` draws the parts that all of these formats have.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from adaptkit.formats._blockwise_weight import BlockwiseWeight, read_weight, state_bytes, stated_as
from adaptkit.formats._format import EncodedPiece, Encoding, Files, WritableFormat
from adaptkit.numerics.absmax import (
    GROUP,
    DoubleQuantized,
    check_block_size,
    dequantize_absmax,
    dynamic_levels,
    quantize_absmax,
    squared_errors,
)
from adaptkit.numerics.dtypes import Array, cast
from adaptkit.numerics.finite import all_finite, check_finite
from adaptkit.numerics.kernels.codebook import Codebook
from adaptkit.numerics.spec import TensorSpec


@dataclass(frozen=True)
class Blockwise(WritableFormat):
    """A block-wise format.

    Attributes:
        name: in files and on the command line.
        book: level of each 4-bit code, to be multiplied by the block's constant; None if codes are integers.
        owner: whose layout it is, as the name of the state says.
        method: the quantization method that the state's name shows.
    """

    name: str
    book: Codebook | None = None
    owner: ClassVar[str]
    method: ClassVar[str]

    @abstractmethod
    def quantize(self, values: Array, block_size: int, measure: bool) -> tuple[Array, Array, Array | None]:
        """Return codes, absmax and, if ``measure``, moments of a piece of a weight; see ``kernels.reference``."""

    @abstractmethod
    def dequantize(self, codes: Array, absmax: Array, count: int, block_size: int, dtype: np.dtype[Any]) -> Array:
        """Return (count,) weights; see ``kernels.reference``."""

    @property
    def state_suffix(self) -> str:
        """What follows a weight's name in the name of its state."""
        return f".quant_state.{self.owner}__{self.name}"

    def method_shown(self, names: Collection[str]) -> str | None:
        """See ``Format``."""
        return self.method if any(name.endswith(self.state_suffix) for name in names) else None

    def weight_at(self, files: Files, name: str) -> BlockwiseWeight | None:
        """Return the weight whose state a tensor is; see ``Format``."""
        if not name.endswith(self.state_suffix):
            return None
        return read_weight(files, self, name.removesuffix(self.state_suffix))

    def check(self, encoding: Encoding) -> None:
        """See ``WritableFormat``."""
        check_block_size(encoding.block_size)

    def refusal(self, shape: tuple[int, ...], encoding: Encoding) -> str:
        """See ``WritableFormat``: no block may span two matrices of a stack, so that each has whole bytes."""
        straddles = len(shape) == 3 and shape[1] * shape[2] % encoding.block_size != 0
        return "size is not a multiple of the block size" if straddles else ""

    def specs(self, weight: TensorSpec, encoding: Encoding) -> list[TensorSpec]:
        """See ``WritableFormat``."""
        name, blocks = weight.name, -(-weight.count // encoding.block_size)
        packed = ("I8", weight.count) if self.bits == 8 else ("U8", (weight.count + 1) // 2)
        small, floats = [TensorSpec(name, packed[0], (packed[1], 1))], []
        if encoding.double_quant:
            small += [TensorSpec(f"{name}.absmax", "U8", (blocks,))]
            floats += [
                TensorSpec(f"{name}.nested_absmax", "F32", (-(-blocks // GROUP),)),
                TensorSpec(f"{name}.nested_quant_map", "F32", (256,)),
            ]
        else:
            floats += [TensorSpec(f"{name}.absmax", "F32", (blocks,))]
        if self.book is not None:
            floats += [TensorSpec(f"{name}.quant_map", "F32", (len(self.book.levels),))]
        state = len(state_bytes(weight, encoding, 0.0))
        # Pad the whole group to a multiple of eight bytes; the floats in it then begin at a multiple of four.
        state += -(sum(spec.nbytes for spec in small + floats) + state) % 8
        return [*small, TensorSpec(name + self.state_suffix, "U8", (state,)), *floats]

    def encode(self, values: Array, encoding: Encoding, measure: bool = False) -> EncodedPiece:
        """See ``WritableFormat``.

        Returns:
            codes as the file has them, flat; absmax (M,) float32, in the weight's units; moments (M, 3) float32: with x
            a weight and l the level of its code, each block's Σ x², Σ x l and Σ l², since its squared error with any
            constant a is Σ x² - 2 a Σ x l + a² Σ l². Meaningless where the squares overflow or underflow float32, that
            is for weights beyond 1e18 or all below 1e-18.
        """
        codes, absmax, moments = self.quantize(values, encoding.block_size, measure)
        if not all_finite(absmax):  # elements are searched only then
            check_finite(cast(values, np.float32))
        return EncodedPiece(codes, absmax, moments)

    def gather(self, weight: TensorSpec, encoding: Encoding) -> _Constants:
        """See ``WritableFormat``."""
        return _Constants(self, weight, encoding)

    def round_trip(self, values: Array, encoding: Encoding) -> Array:
        """See ``WritableFormat``."""
        piece = self.encode(values, encoding)
        decoded = self.dequantize(piece.codes, piece.constants, values.size, encoding.block_size, np.dtype(np.float32))
        return decoded.reshape(values.shape)

    def constant_parts(
        self, weight: TensorSpec, encoding: Encoding, constants: DoubleQuantized | Array
    ) -> dict[str, Array]:
        """Return all parts of ``specs`` except the codes, by name and in that order.

        Args:
            weight: the 16- or 32-bit weight.
            encoding: how it is quantized.
            constants: of the weight's blocks, doubly quantized or as (M,) float32.
        """
        offset = 0.0
        if isinstance(constants, DoubleQuantized):
            offset = constants.offset
            parts = {
                "absmax": constants.codes,
                "nested_absmax": constants.nested_absmax,
                "nested_quant_map": dynamic_levels(),
            }
        else:
            parts = {"absmax": constants}
        if self.book is not None:
            parts["quant_map"] = np.array(self.book.levels, np.float32)
        named = {f"{weight.name}.{suffix}": part for suffix, part in parts.items()}
        specs = self.specs(weight, encoding)[1:]
        state = next(spec for spec in specs if spec.name.endswith(self.state_suffix))
        text = state_bytes(weight, encoding, offset).ljust(state.nbytes)
        named[state.name] = np.frombuffer(bytearray(text), np.uint8)
        return {spec.name: named[spec.name] for spec in specs}


@dataclass(frozen=True)
class FourBit(Blockwise):
    """A 4-bit format: two codes per byte, and a codebook's levels; bytes as bitsandbytes 0.50 makes them."""

    book: Codebook
    bits = 4
    readers = ("transformers with bitsandbytes", "vLLM", "SGLang", "unsloth")
    owner = "bitsandbytes"
    method = "bitsandbytes (4 bits)"

    def quantize(self, values: Array, block_size: int, measure: bool) -> tuple[Array, Array, Array | None]:
        """Map each weight to its nearest level after scaling its block to [-1, 1]; see ``Blockwise``."""
        from adaptkit.numerics.kernels import cpu  # here, since it loads numba

        return cpu.encode_4bit(values, block_size, self.book, measure)

    def dequantize(self, codes: Array, absmax: Array, count: int, block_size: int, dtype: np.dtype[Any]) -> Array:
        """Return level times absmax in float32, rounded once to ``dtype``; see ``Blockwise``."""
        from adaptkit.numerics.kernels import cpu  # here, since it loads numba

        return cpu.decode_4bit(codes, absmax, count, block_size, self.book, dtype)

    def config_block(self, kept: list[str], encoding: Encoding) -> dict[str, Any]:
        """See ``WritableFormat``; the block size is only in each weight's state."""
        return {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": encoding.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": kept,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        }

    def stated(self, block: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
        """See ``WritableFormat``."""
        if block.get("quant_method") != "bitsandbytes" or block.get("load_in_4bit") is not True:
            return None
        if block.get("bnb_4bit_quant_type", "fp4") != self.name:
            return None
        double_quant, kept = block.get("bnb_4bit_use_double_quant", False), block.get("llm_int8_skip_modules")
        return stated_as(self.name, Encoding.block_size, double_quant, kept)


class _Constants:
    """The constants of a weight's blocks; see ``Gathering``."""

    def __init__(self, form: Blockwise, weight: TensorSpec, encoding: Encoding) -> None:
        self._form, self._weight, self._encoding = form, weight, encoding
        blocks = -(-weight.count // encoding.block_size)
        self._absmax, self._moments = np.empty(blocks, np.float32), np.empty((blocks, 2), np.float32)
        self._done, self._squares = 0, 0.0

    def add(self, piece: EncodedPiece) -> None:
        """See ``Gathering``."""
        if piece.moments is None:
            raise ValueError("the piece was not measured")
        these = slice(self._done, self._done + len(piece.constants))
        self._absmax[these], self._moments[these] = piece.constants, piece.moments[:, 1:]
        self._squares += float(piece.moments[:, 0].sum(dtype=np.float64))
        self._done = these.stop

    def finish(self) -> tuple[dict[str, Array], list[float]]:
        """See ``Gathering``."""
        constants = quantize_absmax(self._absmax) if self._encoding.double_quant else self._absmax
        lost = squared_errors(self._squares, self._moments, dequantize_absmax(constants))
        return self._form.constant_parts(self._weight, self._encoding, constants), [lost, self._squares]
