"""A quantized weight as it lies in files: its parts, and decoding.

a file's tensors  -- weight_at -->  StoredWeight  -- decode(start, count) -->  values
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.spec import TensorSpec

GET_AGAIN = "download the checkpoint again"


class Files(Protocol):
    """A checkpoint as formats see it; ``checkpoint.reader`` documents the functions."""

    root: Path

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Maps the tensors' names, in file order, to where they lie."""

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``."""

    def spec(self, name: str) -> TensorSpec:
        """Return name, type and shape of a tensor."""

    def read(self, name: str) -> Array:
        """Read a whole tensor."""

    def read_flat(self, name: str, start: int, count: int) -> Array:
        """Read ``count`` elements from the ``start``-th on: (count,)."""

    def read_bytes(self, name: str, start: int, count: int) -> Array:
        """Read ``count`` bytes of a tensor from the ``start``-th on: (count,) uint8."""


@dataclass(frozen=True, kw_only=True)
class StoredWeight(ABC):
    """One quantized weight as it lies in files; its parts are known to fit together.

    Attributes:
        name: of the plain weight.
        shape: of the plain weight: a matrix, or a stack of them.
        parts: names of the tensors that it is made of, that of its codes first.
        unit: the fewest consecutive weights that can be decoded.
        dtype: safetensors name of the type to decode to; None if the files do not tell it.
        input_scales: those parts that the plain weight does not depend on: scales of the inputs of products in 8 bits.
        is_linear: whether it is stored as (out, in) even if the plain checkpoint has (in, out), as of the GPT-2 family.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    unit: int
    dtype: str | None = None
    input_scales: tuple[str, ...] = ()
    is_linear: bool = False

    @property
    def has_rows(self) -> bool:
        """Whether it is a matrix whose codes can be read row by row; see ``_grouped``."""
        return False

    @abstractmethod
    def decode(self, files: Files, start: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Read and decode ``count`` > 0 weights from the ``start``-th on, in whole units: (count,) of ``dtype``.

        Products are rounded once, from float32. The last unit of the weight may be short.
        """

    def too_large(self, files: Files, start: int, count: int, values: Array) -> str:
        """Say what of a run is too large for its dtype, given its decoded values, of which some are not finite.

        Returns:
            A noun, such as ``a weight``; empty if a code or a constant in the files is not finite.
        """
        return "" if (values != values).any() else "a weight"


class Format(ABC):
    """A format that can be decoded.

    Attributes:
        name: of the format, which is that of its file.
        bits: of a code.
        released_as: ``quant_method`` of the checkpoints that may hold such weights because models are released so,
            without a 16-bit checkpoint; empty if 16-bit checkpoints are what it is made from.
    """

    name: str
    bits: int
    released_as: tuple[str, ...] = ()

    @abstractmethod
    def method_shown(self, names: Collection[str]) -> str | None:
        """Return the quantization method that the names of a checkpoint's tensors show; None if not this format's."""

    @abstractmethod
    def weight_at(self, files: Files, name: str) -> StoredWeight | None:
        """Return the weight that a tensor shows: the weight's codes, or whichever part tells the format.

        Raises:
            CheckpointError: there is one, but parts are missing or do not fit together.
        """

    def is_part(self, files: Files, name: str) -> bool:
        """Whether a tensor can be nothing but a part of a weight in this format."""
        return False
