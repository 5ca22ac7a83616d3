"""Vectors that need not be anywhere as a whole: in pages, in a file, on a device."""

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
        dtype: of its elements.
        count: of them.
        read: gives the elements from a start on, so many, on the host; to be used before others are asked for.
        piece: how many are best read at a time.
    """

    dtype: torch.dtype
    count: int
    read: Callable[[int, int], Tensor]
    piece: int = _PIECE

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """One that is a tensor: (N,), on any device."""
        return cls(tensor.dtype, tensor.numel(), lambda start, count: tensor.detach()[start : start + count].cpu())

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """All of it, in order: where each piece begins, and the piece."""
        for start in range(0, self.count, self.piece):
            yield start, self.read(start, min(self.piece, self.count - start))

    def copy_to(self, tensor: Tensor) -> Tensor:
        """Write it to a tensor: (N,), on any device, which is returned."""
        for start, piece in self.pieces():
            tensor[start : start + len(piece)].copy_(piece)
        return tensor

    def whole(self) -> Tensor:
        """A copy on the host: (N,)."""
        return self.copy_to(torch.empty(self.count, dtype=self.dtype))
