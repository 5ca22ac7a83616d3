"""Fake tensors, which have a shape and no values: ``plan`` runs the trainer's modules on them."""

from contextlib import AbstractContextManager

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has no values; without importing torch's module of fake tensors, which takes a second."""
    return type(tensor).__name__ == "FakeTensor"


def real_tensors() -> AbstractContextManager[None]:
    """Let a block compute with values, wherever it runs."""
    return _disable_current_modes()
