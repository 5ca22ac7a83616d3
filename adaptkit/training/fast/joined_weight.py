"""Packed weights of one kind, concatenated so that a GPU decodes them by one launch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adaptkit.numerics.absmax import GROUP
from adaptkit.training.network.decode import NestedConstants, decode_constants
from adaptkit.training.network.frozen import PackedWeight
from adaptkit.training.network.packed import QuantizedWeight
from adaptkit.training.triton_needs import has_triton


def are_alike(bases: Sequence[Any]) -> bool:
    """Return whether several weights can be joined: 4-bit, of whole blocks, of one encoding, width, device and map."""
    if len(set(bases)) < max(len(bases), 2):
        return False
    if not all(isinstance(base, PackedWeight) and not base.is_divided for base in bases):
        return False
    weights = [base.quantized() for base in bases]
    if any(weight.book is None or weight.count % weight.block_size for weight in weights):
        return False
    kinds = {(weight.encoding, weight.shape[1:], weight.codes.device) for weight in weights}
    return len(kinds) == 1 and all(torch.equal(weights[0].levels, weight.levels) for weight in weights[1:])


class JoinedWeight:
    """Packed weights of one width, concatenated along rows; their own buffers become views of the result.

    Args:
        bases: weights that ``are_alike``.

    Attributes:
        rows: number of rows of each weight.
    """

    def __init__(self, bases: Sequence[PackedWeight]) -> None:
        weights = [base.quantized() for base in bases]
        self.rows = [weight.shape[0] for weight in weights]
        first = weights[0]
        nested = [weight.constants for weight in weights if isinstance(weight.constants, NestedConstants)]
        codes = _concatenated(bases, "codes")
        constants: Any = _concatenated(bases, "absmax")
        if nested:
            offsets = [each.offset for each in nested]
            blocks = [weight.count // weight.block_size for weight in weights]
            groups = [-(-count // GROUP) for count in blocks]
            places = [[sum(counts[:index]) for index in range(len(counts))] for counts in (blocks, groups)]
            self._parts = blocks, groups, offsets  # kept on the host, too, to avoid a synchronization
            self._offsets = torch.tensor(offsets, dtype=torch.float32, device=codes.device)
            self._places = torch.tensor(places, dtype=torch.int64, device=codes.device)
            constants = NestedConstants(constants, _concatenated(bases, "nested_absmax"), float("nan"))
        shape = sum(self.rows), first.shape[1]
        self._weight = QuantizedWeight(first.encoding, first.book, codes, constants, shape, first.dtype, first.levels)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return all rows, (sum of out, in), bit for bit as each weight is dequantized by itself."""
        weight, constants = self._weight, self._weight.constants
        if not isinstance(constants, NestedConstants) or weight.book is None:
            return weight.dequantize(dtype)
        if has_triton(weight.codes.device.type):
            from adaptkit.training.network import decode_gpu

            known = constants.codes, constants.nested_absmax, self._offsets, self._places, weight.levels
            out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
            decode_gpu.decode_parts_4bit(weight.codes, known, weight.block_size, weight.book, out.view(-1))
            return out
        blocks, groups, offsets = self._parts
        parts = torch.split(constants.codes, blocks), torch.split(constants.nested_absmax, groups), offsets
        absmax = [decode_constants(NestedConstants(*part), weight.levels) for part in zip(*parts, strict=True)]
        return replace(weight, constants=torch.cat(absmax)).dequantize(dtype)


def _concatenated(bases: Sequence[PackedWeight], name: str) -> Tensor:
    """Concatenate one buffer of all weights, and make the weights' own buffers views of the result."""
    parts: list[Tensor] = [getattr(base, name) for base in bases]
    whole, start = torch.cat([part.reshape(-1) for part in parts]), 0
    for base, part in zip(bases, parts, strict=True):
        setattr(base, name, whole[start : start + part.numel()].view(part.shape))
        start += part.numel()
    return whole
