"""Where the parts of weights lie, as formats need to know it: a checkpoint's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from adaptkit.numerics.arrays import Array
from adaptkit.numerics.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class Tensors(Protocol):
    """Named tensors that are read whole or in runs; ``checkpoint.reader.TensorFiles`` documents the functions."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Maps the tensors' names, in file order, to where they lie."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Return name, type and shape of a tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """Read a whole tensor as a torch tensor."""
        ...

    def read_array(self, name: str) -> Array:
        """Read a whole tensor."""
        ...

    def read_bytes(self, name: str, start: int, count: int) -> Array:
        """Read ``count`` bytes of a tensor from the ``start``-th on: (count,) uint8."""
        ...
