"""The inner loops, each written more than once with the same bits.

``reference`` (plain torch, any device) is the definition; ``cpu`` (numba) is what runs on a CPU, ``gpu`` (Triton) on a
CUDA device. A property test holds them to the same bits.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

from torch import Tensor, device, dtype

from adaptkit.numerics.kernels._reference_exact import RowsMerged
from adaptkit.numerics.kernels.codebook import Codebook


class Kernels(Protocol):
    """What every kernel module provides; ``reference`` documents each function."""

    def encode_4bit(
        self, weight: Tensor, block_size: int, book: Codebook, measure: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See ``reference.encode_4bit``."""
        ...

    def decode_4bit(
        self, codes: Tensor, absmax: Tensor, count: int, block_size: int, book: Codebook, dtype: dtype
    ) -> Tensor:
        """See ``reference.decode_4bit``."""
        ...

    def encode_8bit(
        self, weight: Tensor, block_size: int, measure: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See ``reference.encode_8bit``."""
        ...

    def decode_8bit(self, codes: Tensor, absmax: Tensor, count: int, block_size: int, dtype: dtype) -> Tensor:
        """See ``reference.decode_8bit``."""
        ...

    def encode_constants(self, absmax: Tensor, lookup: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, float]:
        """See ``reference.encode_constants``."""
        ...

    def decode_constants(self, codes: Tensor, nested_absmax: Tensor, offset: float, levels: Tensor) -> Tensor:
        """See ``reference.decode_constants``."""
        ...

    def low_rank_delta(self, lora_a: Tensor, lora_b: Tensor, ranks: list[int], scales: list[float]) -> Tensor:
        """See ``reference.low_rank_delta``."""
        ...

    def add_rounded(self, weight: Tensor, delta: Tensor, gain: Tensor | None = None) -> Tensor:
        """See ``reference.add_rounded``."""
        ...

    def addition_sums(self, weight: Tensor, merged: Tensor, delta: Tensor) -> tuple[int, float, float, float]:
        """See ``reference.addition_sums``."""
        ...

    def undo_residual(self, weight: Tensor, merged: Tensor, delta: Tensor, gain: Tensor | None = None) -> Tensor:
        """See ``reference.undo_residual``."""
        ...

    def undo(self, merged: Tensor, delta: Tensor, residual: Tensor, gain: Tensor | None = None) -> tuple[Tensor, int]:
        """See ``reference.undo``."""
        ...

    def prepare(self, lora_a: Tensor, lora_b: Tensor, ranks: list[int], scales: list[float]) -> Any:
        """See ``reference.prepare``; what it gives is for the same module's other functions only."""
        ...

    def merge_rows(self, weight: Tensor, factors: Any, start: int, with_undo: bool) -> RowsMerged:
        """See ``reference.merge_rows``."""
        ...

    def unmerge_rows(self, merged: Tensor, factors: Any, start: int, residual: Tensor) -> tuple[Tensor, int]:
        """See ``reference.unmerge_rows``."""
        ...


def kernels_for(where: device) -> Kernels:
    """Choose the kernels for tensors on a device."""
    return _kernels(where.type)


@cache
def _kernels(device_type: str) -> Kernels:
    name = "cpu" if device_type == "cpu" else "reference"
    if device_type == "cuda" and find_spec("triton") is not None:
        name = "gpu"
    return cast(Kernels, import_module(f"adaptkit.numerics.kernels.{name}"))
