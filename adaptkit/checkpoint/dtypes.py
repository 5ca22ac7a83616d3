"""The safetensors names of torch's and numpy's types; apart from ``header``, which does without either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from adaptkit.lazy import torch

ARRAY_DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in (
        ("F64", np.float64),
        ("F32", np.float32),
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        ("I64", np.int64),
        ("I32", np.int32),
        ("I16", np.int16),
        ("I8", np.int8),
        ("U8", np.uint8),
        ("BOOL", np.bool_),
    )
}
_NAMES = {dtype.name: name for name, dtype in ARRAY_DTYPES.items()}


class _Dtypes(Mapping[str, "torch.dtype"]):
    """torch's types have the names of numpy's."""

    def __getitem__(self, name: str) -> torch.dtype:
        found: torch.dtype = getattr(torch, ARRAY_DTYPES[name].name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(ARRAY_DTYPES)

    def __len__(self) -> int:
        return len(ARRAY_DTYPES)


DTYPES: Mapping[str, torch.dtype] = _Dtypes()


def dtype_name(dtype: torch.dtype | np.dtype[Any]) -> str:
    """The safetensors name of a type.

    Raises:
        KeyError: it has none.
    """
    return _NAMES[str(dtype).removeprefix("torch.")]
