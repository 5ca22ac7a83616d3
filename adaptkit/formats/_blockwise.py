"""The formats of bitsandbytes: a flattened weight is cut into blocks, each with one constant (absmax) of its own.

So an outlier reduces the precision of its own block only. ``nf4`` draws the parts that all of these formats have.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptkit.errors import CheckpointError
from adaptkit.formats._blockwise_state import GET_AGAIN, config_block, parse_state, state_bytes, stated_as
from adaptkit.formats._format import EncodedPiece, Encoding, WritableFormat
from adaptkit.formats._stored import Files, StoredWeight
from adaptkit.numerics.absmax import (
    GROUP,
    DoubleQuantized,
    check_block_size,
    dequantize_absmax,
    dynamic_levels,
    quantize_absmax,
    squared_errors,
)
from adaptkit.numerics.dtypes import ARRAY_DTYPES, Array, cast
from adaptkit.numerics.finite import all_finite, check_finite
from adaptkit.numerics.kernels.codebook import NF4, Codebook
from adaptkit.numerics.spec import TensorSpec

if TYPE_CHECKING:
    from adaptkit.numerics.rounding import LinearInputs

_METHOD = "bitsandbytes (4 bits)"
_STORAGE = ("BF16", "F16", "F32")
"""Float types that bitsandbytes may declare for 4-bit codes (``bnb_4bit_quant_storage``)."""


@dataclass(frozen=True)
class Blockwise(WritableFormat):
    """A block-wise format.

    Attributes:
        name: in files and on the command line.
        book: level of each code, to be multiplied by the block's constant.
    """

    name: str
    book: Codebook
    bits = 4
    block_sizes = (64, 32, 128, 256, 512, 1024, 2048, 4096)
    has_double_quant = True
    holds_conv1d = True

    def quantize(self, values: Array, block_size: int, measure: bool) -> tuple[Array, Array, Array | None]:
        """Return codes, absmax and, if ``measure``, moments of a piece of a weight; see ``kernels.reference``."""
        from adaptkit.numerics.kernels import cpu  # here, since it loads numba

        return cpu.encode_4bit(values, block_size, self.book, measure)

    def dequantize(self, codes: Array, absmax: Array, count: int, block_size: int, dtype: np.dtype[Any]) -> Array:
        """Return (count,) weights; see ``kernels.reference``."""
        from adaptkit.numerics.kernels import cpu  # here, since it loads numba

        return cpu.decode_4bit(codes, absmax, count, block_size, self.book, dtype)

    @property
    def state_suffix(self) -> str:
        """What follows a weight's name in the name of its state."""
        return f".quant_state.bitsandbytes__{self.name}"

    def method_shown(self, names: Collection[str]) -> str | None:
        """See ``Format``."""
        return _METHOD if any(name.endswith(self.state_suffix) for name in names) else None

    def weight_at(self, files: Files, name: str) -> BlockwiseWeight | None:
        """Return the weight whose state a tensor is; see ``Format``."""
        if not name.endswith(self.state_suffix):
            return None
        return self.read_weight(files, name.removesuffix(self.state_suffix))

    def part_names(self, files: Files, name: str) -> tuple[str, ...]:
        """Return the names of all tensors that make up a weight."""
        suffixes = ("", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", self.state_suffix)
        return tuple(name + suffix for suffix in suffixes if name + suffix in files.tensors)

    def read_weight(self, files: Files, name: str) -> BlockwiseWeight:
        """Read the state of a weight, and check that the parts fit it.

        Raises:
            CheckpointError: parts are missing or inconsistent, or the state is malformed.
        """
        weight = self.read_outline(files, name)
        _check_parts(files, weight)
        return weight

    def read_outline(self, files: Files, name: str) -> BlockwiseWeight:
        """Read only the state of a weight; its other parts need not fit together.

        Raises:
            CheckpointError: the state is malformed.
        """
        parts, state = self.part_names(files, name), files.read(name + self.state_suffix).tobytes()
        encoding, shape, dtype, offset = parse_state(name, self.name, state, f"{name}.nested_absmax" in parts)
        return BlockwiseWeight(
            name=name,
            shape=shape,
            parts=parts,
            unit=encoding.block_size,
            dtype=dtype,
            form=self,
            encoding=encoding,
            offset=offset,
        )

    def check(self, encoding: Encoding) -> None:
        """See ``WritableFormat``."""
        check_block_size(encoding.block_size)
        super().check(encoding)

    def refusal(self, shape: tuple[int, ...], encoding: Encoding) -> str:
        """See ``WritableFormat``: no block may span two matrices of a stack, so that each has whole bytes."""
        straddles = len(shape) == 3 and shape[1] * shape[2] % encoding.block_size != 0
        return "size is not a multiple of the block size" if straddles else ""

    def unit(self, weight: TensorSpec, encoding: Encoding) -> int:
        """See ``WritableFormat``."""
        return encoding.block_size

    def specs(self, weight: TensorSpec, encoding: Encoding) -> list[TensorSpec]:
        """See ``WritableFormat``."""
        name, blocks = weight.name, -(-weight.count // encoding.block_size)
        small, floats = [TensorSpec(name, "U8", ((weight.count + 1) // 2, 1))], []
        if encoding.double_quant:
            small += [TensorSpec(f"{name}.absmax", "U8", (blocks,))]
            floats += [
                TensorSpec(f"{name}.nested_absmax", "F32", (-(-blocks // GROUP),)),
                TensorSpec(f"{name}.nested_quant_map", "F32", (256,)),
            ]
        else:
            floats += [TensorSpec(f"{name}.absmax", "F32", (blocks,))]
        floats += [TensorSpec(f"{name}.quant_map", "F32", (len(self.book.levels),))]
        state = len(state_bytes(weight, encoding, 0.0))
        # Pad the whole group to a multiple of eight bytes; the floats in it then begin at a multiple of four.
        state += -(sum(spec.nbytes for spec in small + floats) + state) % 8
        return [*small, TensorSpec(name + self.state_suffix, "U8", (state,)), *floats]

    def encode(
        self, values: Array, weight: TensorSpec, encoding: Encoding, top: float = 0.0, measure: bool = False
    ) -> EncodedPiece:
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
        return EncodedPiece(codes, absmax, moments=moments)

    def gather(self, weight: TensorSpec, encoding: Encoding, top: float = 0.0) -> _Constants:
        """See ``WritableFormat``."""
        return _Constants(self, weight, encoding)

    def round_trip(self, values: Array, encoding: Encoding) -> Array:
        """See ``WritableFormat``."""
        codes, absmax, _ = self.quantize(values, encoding.block_size, measure=False)
        decoded = self.dequantize(codes, absmax, values.size, encoding.block_size, np.dtype(np.float32))
        return decoded.reshape(values.shape)

    @property
    def can_be_calibrated(self) -> bool:  # type: ignore[override]
        """See ``WritableFormat``."""
        return self.book is NF4

    def calibrated(
        self, values: Array, weight: TensorSpec, inputs: LinearInputs, encoding: Encoding, top: float = 0.0
    ) -> tuple[dict[str, Array], Array]:
        """See ``WritableFormat``; for NF4 only."""
        from adaptkit.numerics.rounding import calibrated_nf4  # here, since it loads numba

        codes, constants = calibrated_nf4(values, inputs, encoding.block_size, encoding.double_quant)
        absmax, float32 = dequantize_absmax(constants), np.dtype(np.float32)
        decoded = self.dequantize(codes, absmax, values.size, encoding.block_size, float32).reshape(values.shape)
        parts = {weight.name: codes.reshape(-1, 1)} | self.constant_parts(weight, encoding, constants)
        return parts, decoded

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
        parts["quant_map"] = np.array(self.book.levels, np.float32)
        named = {f"{weight.name}.{suffix}": part for suffix, part in parts.items()}
        specs = self.specs(weight, encoding)[1:]
        state = next(spec for spec in specs if spec.name.endswith(self.state_suffix))
        text = state_bytes(weight, encoding, offset).ljust(state.nbytes)
        named[state.name] = np.frombuffer(bytearray(text), np.uint8)
        return {spec.name: named[spec.name] for spec in specs}

    def config_block(self, kept: list[str], encoding: Encoding) -> dict[str, Any]:
        """See ``WritableFormat``; the block size is only in each weight's state."""
        return config_block(self.name, kept, encoding.double_quant)

    def stated(self, block: Mapping[str, Any]) -> tuple[Encoding, list[str] | None] | None:
        """See ``WritableFormat``."""
        return stated_as(self.name, block)


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


@dataclass(frozen=True, kw_only=True)
class BlockwiseWeight(StoredWeight):
    """A weight in a block-wise format.

    Attributes:
        form: the format.
        encoding: how it is quantized.
        dtype: safetensors name of the type that readers decode to: the weight's type before quantization, but bfloat16
            for float32 weights that adaptkit quantized.
        offset: of doubly quantized constants, in the weight's units; 0 without double quantization.
    """

    form: Blockwise
    encoding: Encoding
    dtype: str
    offset: float
    is_linear: bool = True

    def decode(self, files: Files, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """See ``StoredWeight``."""
        codes = files.read_bytes(self.name, start // 2, -(-count // 2))
        return self.form.dequantize(codes, self._constants(files, start, count), count, self.unit, dtype)

    def too_large(self, files: Files, start: int, count: int, values: Array) -> str:
        """See ``StoredWeight``."""
        absmax = self._constants(files, start, count)
        return f"a weight of up to {np.abs(absmax).max():.6g}" if all_finite(absmax) else ""

    def _constants(self, files: Files, start: int, count: int) -> Array:
        """Read and decode the constants of a run's blocks: (M,) float32."""
        first, stop = start // self.unit, -(-(start + count) // self.unit)
        if not self.encoding.double_quant:
            return files.read_flat(f"{self.name}.absmax", first, stop - first)
        before = first % GROUP
        codes = files.read_flat(f"{self.name}.absmax", first - before, stop - first + before)
        groups = first // GROUP, -(-stop // GROUP) - first // GROUP
        nested = DoubleQuantized(codes, files.read_flat(f"{self.name}.nested_absmax", *groups), self.offset)
        levels = f"{self.name}.nested_quant_map"
        known = files.read(levels).reshape(-1) if levels in self.parts else dynamic_levels()
        found: Array = dequantize_absmax(nested, known)[before:]
        return found


def _check_parts(files: Files, weight: BlockwiseWeight) -> None:
    name, encoding = weight.name, weight.encoding
    for part, what in ((name, "codes"), (f"{name}.absmax", "constants")):
        if part not in weight.parts:
            raise CheckpointError(f"{name}: its {what} are missing", hint=GET_AGAIN)
    codes, absmax = files.spec(name), files.spec(f"{name}.absmax")
    levels = TensorSpec("", "F32", (256,))
    if f"{name}.nested_quant_map" in weight.parts:
        levels = files.spec(f"{name}.nested_quant_map")
    code_type = "U8" if codes.dtype in _STORAGE else codes.dtype
    types = (*(ARRAY_DTYPES[dtype].name for dtype in (code_type, absmax.dtype, levels.dtype)), levels.count)
    if types != ("uint8", "uint8" if encoding.double_quant else "float32", "float32", 256):
        raise CheckpointError(f"{name}: its parts have types that do not fit together: {types}", hint=GET_AGAIN)
    count = math.prod(weight.shape)
    blocks = -(-count // encoding.block_size)
    if codes.nbytes != (count + 1) // 2 or absmax.count != blocks:
        found = f"{codes.nbytes} bytes of codes and constants of shape [{absmax.count}]"
        raise CheckpointError(f"{name}: {found} do not make {list(weight.shape)} weights", hint=GET_AGAIN)
    if encoding.double_quant and files.spec(f"{name}.nested_absmax").count != -(-blocks // GROUP):
        raise CheckpointError(
            f"{name}: its nested constants do not fit {blocks} constants in groups of {GROUP}", hint=GET_AGAIN
        )
