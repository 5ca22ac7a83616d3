"""How the compiled kernels are compiled, and how they see a tensor's memory."""

from typing import Any

import numba
import torch
from torch import Tensor

jit = numba.njit(nogil=True, cache=True, error_model="numpy")

INLINED = {"error_model": "numpy", "forceinline": True}
"""Options of what is small, and called where a call would keep the compiler from making vectors."""

inlined = numba.njit(nogil=True, cache=True, **INLINED)


def as_numpy(tensor: Tensor) -> Any:
    """View a tensor's memory as numpy, bit patterns for the types that numpy lacks."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
