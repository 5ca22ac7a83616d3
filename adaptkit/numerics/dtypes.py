"""The safetensors names of torch's and numpy's types; a separate module, since ``header`` needs neither library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from adaptkit.lazy import torch

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Maps the name that torch and numpy share; ml_dtypes provides numpy's bfloat16 and 8-bit floats."""
ARRAY_DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, common, common)) for common, name in _NAMES.items()
}


class _Dtypes(Mapping[str, "torch.dtype"]):
    """Maps a safetensors name to torch's type, without importing torch before the first lookup."""

    def __getitem__(self, name: str) -> torch.dtype:
        found: torch.dtype = getattr(torch, ARRAY_DTYPES[name].name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(ARRAY_DTYPES)

    def __len__(self) -> int:
        return len(ARRAY_DTYPES)


DTYPES: Mapping[str, torch.dtype] = _Dtypes()


def dtype_name(dtype: torch.dtype | np.dtype[Any] | str) -> str:
    """Return the safetensors name of a type, given as a dtype or by its common torch and numpy name.

    Raises:
        KeyError: safetensors has no such type.
    """
    return _NAMES[str(dtype).removeprefix("torch.")]
