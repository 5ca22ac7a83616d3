"""Are all of these numbers? Asked of every weight, so it reads the bits, which is many times faster."""

import torch
from torch import Tensor

from adaptkit.errors import NonFiniteError
from adaptkit.numerics.kernels.reference import FLOAT_INTS


def all_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    Args:
        values: any shape and type; what is no float is finite.
    """
    if not values.is_floating_point() or values.numel() == 0:
        return True
    if values.dtype not in FLOAT_INTS:
        return bool(_finite(values).all())
    infinity = int(torch.tensor(torch.inf, dtype=values.dtype).view(FLOAT_INTS[values.dtype]))
    magnitudes = values.contiguous().view(FLOAT_INTS[values.dtype]) & torch.iinfo(FLOAT_INTS[values.dtype]).max
    return int(magnitudes.max()) < infinity


def check_finite(values: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: names the first one's index.
    """
    if not all_finite(values):
        first = int((~_finite(values)).reshape(-1).nonzero()[0, 0])
        value = float(values.reshape(-1)[first])
        where = [int(index) for index in torch.unravel_index(torch.tensor(first), values.shape)]
        raise NonFiniteError(f"the weight at {where} is {value}", hint="repair or re-download this checkpoint")


def _finite(values: Tensor) -> Tensor:
    return torch.isfinite(values if values.dtype.itemsize > 1 else values.float())  # torch cannot ask float8
