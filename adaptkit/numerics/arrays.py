"""Conversion between numpy arrays, including ml_dtypes' short floats, and torch tensors that share their memory.

Values that are only read from a file, passed through compiled loops and written again are arrays, so torch need not be
imported. All other computation uses tensors. Functions that accept either return the kind that they were given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adaptkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = NDArray[Any]
Values: TypeAlias = "Array | Tensor"
DType: TypeAlias = "np.dtype[Any] | torch.dtype"
AnyValues = TypeVar("AnyValues", bound="Array | Tensor")
"""For functions that return the same kind, array or tensor, as they are given."""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_VIEW_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16)}
"""By size in bytes, a dtype to view ml_dtypes' types as, since torch cannot exchange those with numpy directly."""


def as_tensor(values: Values) -> Tensor:
    """Return an array's memory as a tensor on the CPU; a tensor, on any device, is returned as it is."""
    if not isinstance(values, np.ndarray):
        return values
    dtype: torch.dtype = getattr(torch, values.dtype.name)
    if values.dtype.isbuiltin != 1:  # a dtype of ml_dtypes
        values = values.view(_VIEW_DTYPES[values.dtype.itemsize])
    found = torch.from_numpy(values)
    return found if found.dtype == dtype else found.view(dtype)


def as_array(values: Values) -> Array:
    """Return a tensor's memory as an array, copied if not contiguous or not on the CPU; an array is returned as is."""
    if isinstance(values, np.ndarray):
        return values
    tensor = values.detach().cpu().contiguous()
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    if dtype.isbuiltin != 1:
        tensor = tensor.view(getattr(torch, _VIEW_DTYPES[dtype.itemsize].name))
    return tensor.numpy().view(dtype)


def like(example: AnyValues, array: Array) -> AnyValues:
    """Return the array as it is if the example is an array, else as a tensor."""
    made: Any = array if isinstance(example, np.ndarray) else as_tensor(array)
    return made  # type: ignore[no-any-return]


def cast(array: Array, dtype: Any) -> Array:
    """Convert to another dtype, with infinity for numbers too large for it, and without numpy's warnings about them."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)


def is_float(array: Array) -> bool:
    """Whether an array's dtype is a float type, including those of ml_dtypes."""
    return array.dtype.kind == "f" or array.dtype.isbuiltin != 1
