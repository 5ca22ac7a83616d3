"""The conversion between numpy arrays, of which files are, and torch tensors, of which networks are; no copy is made.

Commands that run no network and need no linear algebra do not import this module, since it loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptkit.numerics.dtypes import ARRAY_DTYPES, Array

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, dtype.name) for name, dtype in ARRAY_DTYPES.items()}
"""Maps a safetensors name to torch's type."""

_VIEW_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16)}
"""By size in bytes, a dtype to view ml_dtypes' types as, since torch cannot exchange those with numpy directly."""


def as_tensor(array: Array) -> Tensor:
    """Return an array's memory as a tensor on the CPU."""
    dtype: torch.dtype = getattr(torch, array.dtype.name)
    if array.dtype.isbuiltin != 1:  # a dtype of ml_dtypes
        array = array.view(_VIEW_DTYPES[array.dtype.itemsize])
    found = torch.from_numpy(array)
    return found if found.dtype == dtype else found.view(dtype)


def as_array(tensor: Tensor) -> Array:
    """Return a tensor's memory as an array, copied if it is not contiguous or not on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    if dtype.isbuiltin != 1:
        tensor = tensor.view(getattr(torch, _VIEW_DTYPES[dtype.itemsize].name))
    return tensor.numpy().view(dtype)
