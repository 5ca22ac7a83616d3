"""Frozen weights of linear layers: packed as in the file, or plain 16- or 32-bit."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from adaptkit.training.network.decode import NestedConstants
from adaptkit.training.network.groups import PackedGroups
from adaptkit.training.network.packed import QuantizedWeight
from adaptkit.training.network.probing import with_attribute


class PackedWeight(nn.Module):
    """A frozen weight of a block-wise format, packed as in the file: (out, in), or a stack (experts, out, in).

    Args:
        weight: the weight as it was read.
        release_pages: releases the resident pages of a memory-mapped tensor, ignores others; None if nothing is mapped.

    Attributes:
        is_transient: whether the mapped pages of its codes are released after each decoding, so that only few weights
            are resident at a time.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    levels: Tensor

    def __init__(self, weight: QuantizedWeight, release_pages: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self.shape, self._encoding, self._book, self._dtype = weight.shape, weight.encoding, weight.book, weight.dtype
        self._release, self.is_transient = release_pages, False
        self._offset: float | None = None
        constants, nested_absmax = weight.constants, torch.empty(0)
        if isinstance(constants, NestedConstants):
            absmax, nested_absmax, self._offset = constants.codes, constants.nested_absmax, constants.offset
        else:
            absmax = constants
        self._types = weight.codes.dtype, absmax.dtype
        for name, part in (("codes", weight.codes), ("absmax", absmax), ("nested_absmax", nested_absmax)):
            self.register_buffer(name, part)
        self.register_buffer("levels", weight.levels)

    @property
    def is_divided(self) -> bool:
        """Whether FSDP shards the weight, and gathers it in every pass."""
        return isinstance(self.codes, nn.Parameter)

    @property
    def is_released(self) -> bool:
        """Whether its codes are mapped, and their pages are released after each decoding."""
        return self.is_transient and self._release is not None and not self.is_divided and self.codes.is_cpu

    def quantized(self) -> QuantizedWeight:
        """Return the weight as the file holds it; shares this module's buffers."""
        return self._with(_in_dtype(self.codes, self._types[0]))

    def matrix(self, index: int) -> QuantizedWeight:
        """Return ``QuantizedWeight.matrix`` of a stack; of a divided one, copies only the codes of that matrix."""
        weight = self._with(self.codes.view(self._types[0])).matrix(index)
        return replace(weight, codes=weight.codes.clone()) if self.is_divided else weight

    def _with(self, codes: Tensor) -> QuantizedWeight:
        absmax = _in_dtype(self.absmax, self._types[1])
        constants: NestedConstants | Tensor = absmax
        if self._offset is not None:
            constants = NestedConstants(absmax, self.nested_absmax, self._offset)
        return QuantizedWeight(self._encoding, self._book, codes, constants, self.shape, self._dtype, self.levels)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in its shape, in ``dtype``."""
        weight = self.quantized().dequantize(dtype)
        self.release_pages()
        return weight

    def release_pages(self) -> None:
        """Release the codes' mapped pages if transient; call after decoding the result of ``quantized``."""
        if self.is_transient and self._release is not None:
            self._release(self.codes)


class PlainWeight(nn.Module):
    """A frozen 16- or 32-bit weight, (out, in)."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.register_buffer("weight", weight)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (out, in), in ``dtype``."""
        return self.weight.to(dtype)


FrozenWeight = PackedWeight | PackedGroups | PlainWeight


def transient_weights(network: nn.Module) -> AbstractContextManager[None]:
    """Let all packed weights of a network be transient while a block probes it.

    A probe runs the whole network on a few tokens, and would leave every page of the base resident.
    """
    weights = (module for module in network.modules() if isinstance(module, PackedWeight))
    return with_attribute(weights, "is_transient", True)


def _in_dtype(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a part in its original dtype; FSDP gathers parts as floats.

    On a CPU a copy: kernels view tensors as numpy arrays, after which FSDP could not free the gathered memory.
    """
    if not isinstance(part, nn.Parameter):
        return part
    return (part.clone() if part.device.type == "cpu" else part).view(dtype)
