"""Checks that values are finite. They run on every weight, so they compare bits as integers, which is much faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptkit.errors import NonFiniteError
from adaptkit.lazy import torch
from adaptkit.numerics.arrays import Values, as_array, cast, is_float

if TYPE_CHECKING:
    from torch import Tensor

_INT_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}
"""By size in bytes, the integer dtype that a float's bits are viewed as."""


def all_finite(values: Values) -> bool:
    """Whether no element is NaN or infinite.

    Args:
        values: any shape and dtype; values that are not floats count as finite.
    """
    if not isinstance(values, np.ndarray) and values.device.type != "cpu":
        return not values.is_floating_point() or bool(_finite(values).all())
    array = as_array(values)
    if not is_float(array) or array.size == 0:
        return True
    if array.dtype.itemsize not in _INT_DTYPES:
        return bool(np.isfinite(cast(array, np.float32)).all())
    bits = np.ascontiguousarray(array).view(_INT_DTYPES[array.dtype.itemsize])
    above, below = np.array([np.inf, -np.inf], array.dtype).view(bits.dtype)
    # Positive floats sort highest as signed integers, negative ones as unsigned integers; NaN sorts above infinity.
    unsigned = np.dtype(f"u{bits.itemsize}")
    return bool(bits.max() < above and bits.view(unsigned).max() < below.view(unsigned))


def check_finite(values: Values, start: int = 0, shape: Sequence[int] | None = None, name: str = "") -> None:
    """Raise if any value is NaN or infinite.

    Args:
        values: a weight, or consecutive elements of it in row-major order.
        start: flat index of the first of these elements in the weight.
        shape: shape of the weight; that of ``values`` if None.
        name: name of the weight, for the message.

    Raises:
        NonFiniteError: a value is not finite; gives the first one's index.
    """
    if all_finite(values):
        return
    array = as_array(values)
    first = int(np.argmin(np.isfinite(cast(array, np.float64))))
    where = [int(index) for index in np.unravel_index(start + first, array.shape if shape is None else tuple(shape))]
    raise NonFiniteError(
        f"{name}{': ' if name else ''}the weight at {where} is {float(array.reshape(-1)[first])}",
        hint="download the checkpoint again",
    )


def _finite(values: Tensor) -> Tensor:
    return torch.isfinite(values if values.dtype.itemsize > 1 else values.float())  # isfinite does not take float8
