"""Parameters that are held in one dtype and seen by their modules in another."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, value: Tensor) -> Tensor:
        return value.to(self.dtype)


def hold(module: nn.Module, name: str, parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Replace a module's parameter by a float32 one, which the module sees cast to ``dtype``."""
    module._parameters[name] = parameter
    if dtype != parameter.dtype:
        parametrize.register_parametrization(module, name, _Cast(dtype), unsafe=True)  # unsafe: it changes the type


def held(module: nn.Module, name: str) -> tuple[nn.Parameter, torch.dtype]:
    """Return a module's parameter, and the dtype that the module sees it in; unlike reading it, this casts nothing."""
    if not parametrize.is_parametrized(module, name):
        parameter: nn.Parameter = getattr(module, name)
        return parameter, parameter.dtype
    casts: Any = module.parametrizations[name]  # type: ignore[index]
    return casts.original, casts[0].dtype
