"""Checks that values are finite. They run on every weight, so they compare bits as integers, which is much faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptkit.errors import NonFiniteError
from adaptkit.numerics.dtypes import Array, cast, is_float

_INT_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}
"""By size in bytes, the integer dtype that a float's bits are viewed as."""


def all_finite(values: Array) -> bool:
    """Whether no element is NaN or infinite, in an array of any shape and dtype; integers are always finite."""
    if not is_float(values) or values.size == 0:
        return True
    if values.dtype.itemsize not in _INT_DTYPES:
        return bool(np.isfinite(cast(values, np.float32)).all())
    bits = np.ascontiguousarray(values).view(_INT_DTYPES[values.dtype.itemsize])
    above, below = np.array([np.inf, -np.inf], values.dtype).view(bits.dtype)
    # Positive floats sort highest as signed integers, negative ones as unsigned integers; NaN sorts above infinity.
    unsigned = np.dtype(f"u{bits.itemsize}")
    return bool(bits.max() < above and bits.view(unsigned).max() < below.view(unsigned))


def check_finite(values: Array, start: int = 0, shape: Sequence[int] | None = None, name: str = "") -> None:
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
    first = int(np.argmin(np.isfinite(cast(values, np.float64))))
    where = [int(index) for index in np.unravel_index(start + first, tuple(values.shape if shape is None else shape))]
    raise NonFiniteError(
        f"{name}{': ' if name else ''}the weight at {where} is {float(values.reshape(-1)[first])}",
        hint="download the checkpoint again",
    )
