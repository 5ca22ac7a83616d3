"""Name, type and shape of a tensor in a file; a module that needs neither numpy nor torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Maps each supported type to its element size in bytes; see ``dtypes`` for torch's and numpy's names."""
FLOATS = ("F32", "F16", "BF16")
"""The types that weights and adapters may have."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of one tensor; ``dtype`` is the safetensors name of the type."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * ITEM_BYTES[self.dtype]
