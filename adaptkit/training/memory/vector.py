"""Vectors that are read piece by piece and need not exist as one tensor: in pages, in a file, or on a device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_PIECE = 1 << 20


@dataclass(frozen=True)
class Vector:
    """A vector that is read piece by piece.

    Attributes:
        dtype: dtype of its elements.
        count: number of elements.
        read: called with start and count; returns these elements on the host, valid until the next call.
        piece: preferred number of elements per read.
    """

    dtype: torch.dtype
    count: int
    read: Callable[[int, int], Tensor]
    piece: int = _PIECE

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Wrap a tensor: (N,), on any device."""
        return cls(tensor.dtype, tensor.numel(), lambda start, count: tensor.detach()[start : start + count].cpu())

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Iterate over all pieces in order: the start of each, and its elements."""
        for start in range(0, self.count, self.piece):
            yield start, self.read(start, min(self.piece, self.count - start))

    def copy_to(self, tensor: Tensor) -> Tensor:
        """Copy all elements to a tensor, (N,), on any device, and return the tensor."""
        for start, piece in self.pieces():
            tensor[start : start + len(piece)].copy_(piece)
        return tensor

    def whole(self) -> Tensor:
        """Return a copy on the host: (N,)."""
        return self.copy_to(torch.empty(self.count, dtype=self.dtype))
