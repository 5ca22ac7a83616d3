"""Stand-ins for the norms and gates that the trainer fuses: they save and allocate what its fused ones do.

See ``training.network.fused``, and ``models.recompute`` for outputs that are recomputed instead of saved.
"""

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.models.probing import is_gated, norm_has_offset, norm_parts
from adaptkit.models.recompute import Recipe

_WIDEST = 1 << 16
"""Inputs of the widest module that is probed, since probes allocate memory; those of real models have fewer."""


def fuse_stand_ins(network: Any, linears: Collection[str], full: bool, on_gpu: bool) -> None:
    """Replace the norms and gates that the trainer fuses; the linear layers in them keep their paths.

    Args:
        network: on the meta device, with its own linear layers.
        linears: dotted paths of its linear layers.
        full: whether all weights are trained, so that no norm is fused.
        on_gpu: whether the run uses a GPU, where a norm's output is saved, and norms with factor 1 + w are not fused.
    """
    for name, module in list(network.named_modules()):
        weight, eps = norm_parts(module)
        if weight is not None:
            plus_one = None if full else _norm_has_offset(module, eps)
            if plus_one is not None and not (on_gpu and plus_one):
                network.set_submodule(name, _NormStandIn(weight, is_saved=on_gpu))
        elif f"{name}.gate_proj" in linears and _is_gated(module):
            network.set_submodule(name, _GateStandIn(module))


def _norm_has_offset(module: Any, eps: float) -> bool | None:
    if len(module.weight) > _WIDEST:
        return None
    trial: Any = copy.deepcopy(module).to_empty(device="cpu")
    trial.weight.data = torch.rand(len(trial.weight), generator=torch.Generator().manual_seed(0)).to(trial.weight.dtype)
    return norm_has_offset(trial, trial.weight, eps)


def _is_gated(module: Any) -> bool:
    rows_or_columns = module.gate_proj.weight.shape
    size = rows_or_columns[1 if isinstance(module.gate_proj, nn.Linear) else 0]
    return size <= _WIDEST and is_gated(module, size, torch.device("cpu"))


class _NormStandIn(nn.Module):
    def __init__(self, weight: nn.Parameter, is_saved: bool) -> None:
        super().__init__()
        self.weight, self.is_saved = weight, is_saved

    def forward(self, x: Tensor) -> Tensor:
        recipe = Recipe(torch.empty_like)
        result: Tensor = _Norm.apply(x, recipe)  # type: ignore[no-untyped-call]
        return result if self.is_saved else recipe.attach(result, x)


class _GateStandIn(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = module.gate_proj, module.up_proj, module.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (side(x).contiguous() for side in (self.gate_proj, self.up_proj))
        recipe = Recipe(lambda gate, up: torch.empty_like(gate))
        inner = recipe.attach(_Gate.apply(gate, up, recipe), gate, up)  # type: ignore[no-untyped-call]
        result: Tensor = self.down_proj(inner)
        return result


class _Norm(torch.autograd.Function):
    """Saves its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        ctx.recipe = recipe
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.recipe.forget()
        return torch.empty_like(ctx.saved_tensors[0]), None


class _Gate(torch.autograd.Function):
    """Saves its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.recipe = recipe
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.recipe.forget()
        gate, up = ctx.saved_tensors
        return torch.empty_like(gate), torch.empty_like(up), None
