"""The inner loops, each written more than once with the same bits.

``reference`` (plain torch, any device) is the definition; ``cpu`` (numba) is what runs on a CPU.
A property test holds them to the same bits.
"""

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor, device, dtype


class Kernels(Protocol):
    """What every kernel module provides; ``reference`` documents each function."""

    def nf4_encode(self, weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """See ``reference.nf4_encode``."""
        ...

    def nf4_decode(self, codes: Tensor, absmax: Tensor, count: int, block_size: int, dtype: dtype) -> Tensor:
        """See ``reference.nf4_decode``."""
        ...

    def low_rank_delta(self, lora_a: Tensor, lora_b: Tensor, ranks: list[int], scales: list[float]) -> Tensor:
        """See ``reference.low_rank_delta``."""
        ...

    def add_rounded(self, weight: Tensor, delta: Tensor) -> Tensor:
        """See ``reference.add_rounded``."""
        ...

    def addition_sums(self, weight: Tensor, merged: Tensor, delta: Tensor) -> tuple[int, float, float, float]:
        """See ``reference.addition_sums``."""
        ...

    def undo_residual(self, weight: Tensor, merged: Tensor, delta: Tensor) -> Tensor:
        """See ``reference.undo_residual``."""
        ...

    def undo(self, merged: Tensor, delta: Tensor, residual: Tensor) -> tuple[Tensor, int]:
        """See ``reference.undo``."""
        ...


def kernels_for(where: device) -> Kernels:
    """Choose the kernels for tensors on a device."""
    name = "cpu" if where.type == "cpu" else "reference"
    return cast(Kernels, import_module(f"adaptkit.numerics.kernels.{name}"))
