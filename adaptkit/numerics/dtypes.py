"""The types of arrays: numpy's and those of ml_dtypes (bfloat16, 8-bit floats), and their names in safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Array: TypeAlias = NDArray[Any]

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Maps the name that torch and numpy share."""
ARRAY_DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, common, common)) for common, name in _NAMES.items()
}
BFLOAT16 = ARRAY_DTYPES["BF16"]


def dtype_name(dtype: torch.dtype | np.dtype[Any] | str) -> str:
    """Return the safetensors name of a type, given as a dtype or by its common torch and numpy name.

    Raises:
        KeyError: safetensors has no such type.
    """
    return _NAMES[str(dtype).removeprefix("torch.")]


def is_float(array: Array) -> bool:
    """Whether an array's dtype is a float type, including those of ml_dtypes."""
    return array.dtype.kind == "f" or array.dtype.isbuiltin != 1


def cast(array: Array, dtype: Any) -> Array:
    """Convert to another dtype, with infinity for numbers too large for it, and without numpy's warnings about them."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)
