"""Numbers in memory: numpy's arrays, with the short floats of ml_dtypes, or torch's tensors of the same memory.

What is read from a file, run through compiled loops and written again is an array, and torch need not be there. What
is computed otherwise is a tensor. Functions that take either give back what they were given.
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
"""Where what comes out is of the kind of what went in."""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_STAND_INS: dict[int, np.dtype[Any]] = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16)}
"""By size, a type that numpy and torch both have, for those that torch's exchange with numpy does not know."""


def as_tensor(values: Values) -> Tensor:
    """The same memory as a tensor on the CPU; a tensor stays what it is, wherever it is."""
    if not isinstance(values, np.ndarray):
        return values
    dtype: torch.dtype = getattr(torch, values.dtype.name)
    if values.dtype.isbuiltin != 1:  # one of ml_dtypes'
        values = values.view(_STAND_INS[values.dtype.itemsize])
    found = torch.from_numpy(values)
    return found if found.dtype == dtype else found.view(dtype)


def as_array(values: Values) -> Array:
    """The same memory as an array; what is not contiguous, or on no CPU, is copied. An array stays what it is."""
    if isinstance(values, np.ndarray):
        return values
    tensor = values.detach().cpu().contiguous()
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    if dtype.isbuiltin != 1:
        tensor = tensor.view(getattr(torch, _STAND_INS[dtype.itemsize].name))
    return tensor.numpy().view(dtype)


def like(example: AnyValues, array: Array) -> AnyValues:
    """An array as it is, or as a tensor, whichever the example is."""
    made: Any = array if isinstance(example, np.ndarray) else as_tensor(array)
    return made  # type: ignore[no-any-return]


def cast(array: Array, dtype: Any) -> Array:
    """Numbers in another type, infinite where they are too large for it; numpy would warn of that, and of some NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)


def is_float(array: Array) -> bool:
    """Whether an array's numbers are of a float type, ml_dtypes' among them."""
    return array.dtype.kind == "f" or array.dtype.isbuiltin != 1
