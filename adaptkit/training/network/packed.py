"""A quantized weight of the base as tensors, packed as in the file; formats know the parts, and kernels decode them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.formats._find import read_weight
from adaptkit.formats._format import Encoding
from adaptkit.numerics.absmax import GROUP, dynamic_levels
from adaptkit.numerics.kernels.codebook import Codebook
from adaptkit.numerics.tensors import DTYPES, as_tensor
from adaptkit.training.network.decode import Blocks, NestedConstants, decode, decode_constants


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight in a block-wise format.

    Attributes:
        encoding: how it is quantized.
        book: levels of its codes.
        codes: (ceil(n / 2),) uint8.
        constants: absmax constants, doubly quantized or as (M,) float32.
        shape: of the weight: (out, in), or (experts, out, in).
        dtype: type that readers decode to.
        levels: (256,) float32, the values of the codes of doubly quantized constants.
    """

    encoding: Encoding
    book: Codebook
    codes: Tensor
    constants: NestedConstants | Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    levels: Tensor

    @property
    def block_size(self) -> int:
        """Number of weights that share one constant."""
        return self.encoding.block_size

    @property
    def count(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def absmax(self) -> Tensor:
        """The constants in float32, (M,)."""
        return decode_constants(self.constants, self.levels)

    def matrix(self, index: int) -> QuantizedWeight:
        """Return one matrix of a stack, (out, in).

        It shares the stack's memory, but its constants are decoded if their first group begins in another matrix.
        """
        count = math.prod(self.shape[1:])
        blocks, code_bytes = count // self.block_size, len(self.codes) * count // self.count
        first, last = index * blocks, (index + 1) * blocks
        constants = self.constants
        if isinstance(constants, NestedConstants):
            before, groups = first % GROUP, slice(first // GROUP, -(-last // GROUP))
            codes = constants.codes[first - before : last]
            constants = NestedConstants(codes, constants.nested_absmax[groups], constants.offset)
            if before:
                constants = decode_constants(constants, self.levels)[before:]
        else:
            constants = constants[first:last]
        codes = self.codes[index * code_bytes : (index + 1) * code_bytes]
        return QuantizedWeight(self.encoding, self.book, codes, constants, self.shape[1:], self.dtype, self.levels)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight in its shape, rounded once to ``dtype``; None for the type that the file names."""
        blocks = Blocks(self.codes, self.constants, self.levels, self.count, self.block_size, self.book)
        return decode(blocks, dtype or self.dtype).view(self.shape)


def read_quantized(files: Checkpoint, name: str) -> QuantizedWeight:
    """Read one block-wise weight.

    Raises:
        CheckpointError: parts are missing or inconsistent.
    """
    weight = read_weight(files, name)
    codes, constants = (as_tensor(files.read(part)).reshape(-1) for part in (name, f"{name}.absmax"))
    levels = f"{name}.nested_quant_map"
    return QuantizedWeight(
        encoding=weight.encoding,
        book=weight.form.book,
        codes=codes.view(torch.uint8),  # bitsandbytes may declare them as floats
        constants=NestedConstants(constants, as_tensor(files.read(f"{name}.nested_absmax")), weight.offset)
        if weight.encoding.double_quant
        else constants,
        shape=weight.shape,
        dtype=DTYPES[weight.dtype],
        levels=as_tensor(files.read(levels) if levels in weight.parts else dynamic_levels()),
    )
