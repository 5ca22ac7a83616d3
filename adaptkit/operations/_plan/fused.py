"""Stand-ins for the norms and gates that the trainer fuses: they save and allocate what its fused ones do.

See ``training.network.fused``, and ``networks.recompute`` for outputs that are recomputed instead of saved.
"""

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.networks.probing import is_gated, norm_has_offset, norm_parts
from adaptkit.networks.recompute import Recipe

_WIDEST = 1 << 16
"""Inputs of the widest module that is probed, since probes allocate memory; those of real models have fewer."""


def fuse_stand_ins(network: Any, linears: Collection[str], full: bool, on_gpu: bool) -> None:
    """Replace the forward passes of the norms and gates that the trainer fuses.

    Args:
        network: on the meta device, with its own linear layers.
        linears: dotted paths of its linear layers.
        full: whether all weights are trained, so that no norm is fused.
        on_gpu: whether the run uses a GPU, where a norm's output is saved, and norms with factor 1 + w are not fused.
    """
    for name, module in network.named_modules():
        weight, eps = norm_parts(module)
        if weight is not None:
            plus_one = None if full else _norm_has_offset(module, eps)
            if plus_one is not None and not (on_gpu and plus_one):
                module.forward = _norm_forward(is_saved=on_gpu)
        elif f"{name}.gate_proj" in linears and _is_gated(module):
            module.forward = _gate_forward(module)


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


def _norm_forward(is_saved: bool) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        recipe = Recipe(torch.empty_like)
        result: Tensor = _Norm.apply(x, recipe)  # type: ignore[no-untyped-call]
        return result if is_saved else recipe.attach(result, x)

    return forward


def _gate_forward(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        gate, up = (side(x).contiguous() for side in (module.gate_proj, module.up_proj))
        recipe = Recipe(lambda gate, up: torch.empty_like(gate))
        inner = recipe.attach(_Gate.apply(gate, up, recipe), gate, up)  # type: ignore[no-untyped-call]
        result: Tensor = module.down_proj(inner)
        return result

    return forward


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
