"""Recognition of linear layers."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from adaptkit.models.architecture import BUILD_ERRORS

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module is exactly torch's Linear or transformers' Conv1D; subclasses may do more and do not count."""
    from torch import nn  # here and below: it takes long to load, and most commands build no network

    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def acts_as_linear(module: nn.Module) -> bool:
    """Whether a module computes what a linear layer does; this includes subclasses whose forward does nothing else.

    Falcon's subclass is one; it rounds between product and bias. ``is_linear`` excludes it, since bitsandbytes does not
    quantize it. A subclass that inherits Linear's forward is excluded: it is torch's, in an attention that reads the
    weight directly.
    """
    from torch import nn

    kind: Any = type(module)
    is_other = isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward
    return is_linear(module) or (is_other and _only_multiplies(kind))


@cache
def _only_multiplies(kind: Any) -> bool:
    """Run a class's forward on an object that has only a weight and a bias, and compare with a linear layer."""
    import torch

    x, bias = torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([1.0, 8.0])
    weight = torch.tensor([[1.0, -3.0, 2.0], [5.0, 0.0, -1.0]])

    def gives(added: Tensor | None) -> bool:
        found = kind.forward(SimpleNamespace(weight=weight, bias=added), x)
        return torch.is_tensor(found) and torch.equal(found, torch.nn.functional.linear(x, weight, added))

    try:
        return gives(None) and gives(bias)
    except BUILD_ERRORS:  # it needs other attributes, as routers and decoupled layers do, or other shapes
        return False
