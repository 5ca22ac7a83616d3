"""Which modules are linear layers."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from adaptkit.lazy import torch
from adaptkit.networks.architecture import REFUSALS

if TYPE_CHECKING:
    from torch import nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, in either of transformers' two kinds; subclasses do more, and are not."""
    return type(module) is torch.nn.Linear or type(module).__name__ == "Conv1D"


def acts_as_linear(module: nn.Module) -> bool:
    """Whether a module gives what a linear layer gives: of subclasses, those whose forward does nothing else.

    That is Falcon's, which rounds between product and bias. bitsandbytes packs none of it, so it is not ``is_linear``.
    One that takes over its forward is torch's, inside an attention that reads the weight itself.
    """
    kind: Any = type(module)
    is_other = isinstance(module, torch.nn.Linear) and kind.forward is not torch.nn.Linear.forward
    return is_linear(module) or (is_other and _only_multiplies(kind))


@cache
def _only_multiplies(kind: Any) -> bool:
    """Ask a class's forward, which gets a weight, a bias and nothing else that a module may have."""
    x, bias = torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([1.0, 8.0])
    weight = torch.tensor([[1.0, -3.0, 2.0], [5.0, 0.0, -1.0]])

    def gives(added: torch.Tensor | None) -> bool:
        found = kind.forward(SimpleNamespace(weight=weight, bias=added), x)
        return torch.is_tensor(found) and torch.equal(found, torch.nn.functional.linear(x, weight, added))

    try:
        return gives(None) and gives(bias)
    except REFUSALS:  # it asks for more, as routers and decoupled layers do, or for other shapes
        return False
