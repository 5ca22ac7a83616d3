"""Recognition of linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module is exactly torch's Linear or transformers' Conv1D; subclasses may do more and do not count."""
    from torch import nn  # here: it takes long to load, and most commands build no network

    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def acts_as_linear(module: nn.Module) -> bool:
    """Whether a module computes what a linear layer does: also Falcon's subclass, which only rounds in between.

    ``is_linear`` excludes that, since bitsandbytes does not quantize it.
    """
    return is_linear(module) or type(module).__name__ == "FalconLinear"
