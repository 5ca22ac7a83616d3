"""Tensors as the compiled loops take them."""

from typing import Any

import torch
from torch import Tensor

_VIEWS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.uint32}


def tensor_bits(values: Tensor) -> Any:
    """View a tensor on the CPU as a numpy array of the integer type that represents its float type.

    See ``numerics.kernels._cpu_float``; strides are kept, and writing to the array writes to the tensor.
    """
    return values.detach().view(_VIEWS[values.dtype]).numpy()
