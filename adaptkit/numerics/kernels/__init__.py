"""The inner loops, in several implementations that give the same bits.

``reference`` (plain torch, any device) is the definition; ``cpu`` (numba) runs on CPUs, ``gpu`` (Triton) on CUDA
devices. Property tests check that the bits are the same. ``cpu`` also takes arrays, and then returns arrays.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from adaptkit.numerics.kernels._reference_exact import RowsMerged
from adaptkit.numerics.kernels.codebook import Codebook
from adaptkit.triton_needs import what_triton_lacks

if TYPE_CHECKING:
    from torch import device

    from adaptkit.numerics.arrays import AnyValues, DType, Values


class Kernels(Protocol):
    """The functions that every kernel module provides; ``reference`` documents them."""

    def encode_4bit(
        self, weight: AnyValues, block_size: int, book: Codebook, measure: bool = False
    ) -> tuple[AnyValues, AnyValues, AnyValues | None]:
        """See ``reference.encode_4bit``."""
        ...

    def decode_4bit(
        self, codes: AnyValues, absmax: AnyValues, count: int, block_size: int, book: Codebook, dtype: DType
    ) -> AnyValues:
        """See ``reference.decode_4bit``."""
        ...

    def encode_8bit(
        self, weight: AnyValues, block_size: int, measure: bool = False
    ) -> tuple[AnyValues, AnyValues, AnyValues | None]:
        """See ``reference.encode_8bit``."""
        ...

    def decode_8bit(self, codes: AnyValues, absmax: AnyValues, count: int, block_size: int, dtype: DType) -> AnyValues:
        """See ``reference.decode_8bit``."""
        ...

    def encode_constants(
        self, absmax: AnyValues, lookup: AnyValues, levels: AnyValues
    ) -> tuple[AnyValues, AnyValues, float]:
        """See ``reference.encode_constants``."""
        ...

    def decode_constants(
        self, codes: AnyValues, nested_absmax: AnyValues, offset: float, levels: AnyValues
    ) -> AnyValues:
        """See ``reference.decode_constants``."""
        ...

    def low_rank_delta(self, lora_a: AnyValues, lora_b: AnyValues, ranks: list[int], scales: list[float]) -> AnyValues:
        """See ``reference.low_rank_delta``."""
        ...

    def add_rounded(self, weight: AnyValues, delta: Values, gain: Values | None = None) -> AnyValues:
        """See ``reference.add_rounded``."""
        ...

    def addition_sums(self, weight: Values, merged: Values, delta: Values) -> tuple[int, float, float, float]:
        """See ``reference.addition_sums``."""
        ...

    def undo_residual(
        self, weight: AnyValues, merged: AnyValues, delta: Values, gain: Values | None = None
    ) -> AnyValues:
        """See ``reference.undo_residual``."""
        ...

    def undo(
        self, merged: AnyValues, delta: Values, residual: Values, gain: Values | None = None
    ) -> tuple[AnyValues, int]:
        """See ``reference.undo``."""
        ...

    def prepare(self, lora_a: Values, lora_b: Values, ranks: list[int], scales: list[float]) -> Any:
        """See ``reference.prepare``; only functions of the same module accept the result."""
        ...

    def merge_rows(self, weight: Values, factors: Any, start: int, with_undo: bool) -> RowsMerged:
        """See ``reference.merge_rows``."""
        ...

    def unmerge_rows(self, merged: AnyValues, factors: Any, start: int, residual: Values) -> tuple[AnyValues, int]:
        """See ``reference.unmerge_rows``."""
        ...


def kernels_for(where: Values | device) -> Kernels:
    """Return the kernels for numpy arrays, for tensors on the device of a given tensor, or for a given device."""
    return _kernels("cpu" if isinstance(where, np.ndarray) else getattr(where, "device", where).type)


def has_triton(device_type: str) -> bool:
    """Return whether the Triton kernels can run on a type of device."""
    return device_type == "cuda" and not what_triton_lacks()


@cache
def _kernels(device_type: str) -> Kernels:
    name = "cpu" if device_type == "cpu" else "reference"
    if has_triton(device_type):
        name = "gpu"
    return cast(Kernels, import_module(f"adaptkit.numerics.kernels.{name}"))
