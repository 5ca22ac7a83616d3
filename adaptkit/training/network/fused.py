"""Fused norms and gates of a decoder layer: one pass each, with few saved activations.

``models.probing`` recognizes them. The fused forward pass saves only its input, where torch's own saves three or four
tensors of that size. The output is recomputed instead of saved: see ``models.recompute``. ``training.plan`` has
stand-ins that save the same.

    norm       y = x / √(mean x² + eps) · w, or · (1 + w)          needs a frozen w
    gate       y = silu(gate) · up          in a module that computes down(silu(gate(x)) · up(x))
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptkit.models.probing import is_gated, norm_has_offset, norm_parts
from adaptkit.models.recompute import Recipe
from adaptkit.training.fast.bits import tensor_bits
from adaptkit.training.fast.cpu_layers import gate_backward, gate_forward, norm_backward, norm_forward
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.rotary import fuse_rotary
from adaptkit.training.triton_needs import has_triton


def fuse_layers(network: nn.Module, on_gpu: bool = False) -> None:
    """Replace the forward passes of a model's gates and of its norms with frozen weights, and its rotary embedding.

    See ``rotary`` for the latter. On a GPU, norms with factor w use torch's RMS norm kernel: one launch and one
    rounding, where transformers' code takes six launches and float32 intermediates; norms with factor 1 + w stay as
    they are. Gates use a Triton kernel there.
    """
    fuse_rotary(network)
    for module in network.modules():
        weight, eps = norm_parts(module)
        if weight is not None and not weight.requires_grad:
            plus_one = norm_has_offset(module, weight, eps)
            if plus_one is not None and not on_gpu:
                module.forward = _norm(weight, eps, plus_one)
            elif plus_one is False:
                module.forward = _torch_norm(weight, eps)
        elif _is_gate(module) and (not on_gpu or _has_kernel(module)):
            module.forward = _Gated(module)


def fused_gates(network: nn.Module) -> list[Any]:
    """Return the modules whose forward pass ``fuse_layers`` replaced by that of a gate, in their order."""
    return [module for module in network.modules() if isinstance(vars(module).get("forward"), _Gated)]


def _is_gate(module: Any) -> bool:
    gate = getattr(module, "gate_proj", None)
    return isinstance(gate, LoraLinear) and is_gated(module, gate.base.shape[1], gate.device)


def _has_kernel(module: nn.Module) -> bool:
    return has_triton("cuda") and all(tensor.is_cuda for tensor in (*module.parameters(), *module.buffers()))


def _torch_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return functional.rms_norm(x, (len(weight),), weight.to(x.dtype), eps)

    return forward


def _norm(weight: Tensor, eps: float, plus_one: bool) -> Callable[[Tensor], Tensor]:
    def make(x: Tensor) -> Tensor:
        return _normed(x, weight, eps, plus_one)[0]

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return make(x)
        recipe = Recipe(make)
        result: Tensor = _Norm.apply(x, weight, eps, plus_one, recipe)  # type: ignore[no-untyped-call]
        return recipe.attach(result, x)

    return forward


class _Gated:
    """The forward pass of a gate.

    Args:
        module: the module.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = (_contiguous_on_cpu(side(x)) for side in (self._module.gate_proj, self._module.up_proj))
        inner = _product(gate, up) if not torch.is_grad_enabled() else _kept_product(gate, up)
        result: Tensor = self._module.down_proj(inner)
        return result


def _contiguous_on_cpu(side: Tensor) -> Tensor:
    """Return a tensor contiguous for the CPU kernel; the GPU kernel accepts column slices of a matrix."""
    return side if side.is_cuda else side.contiguous()


def _kept_product(gate: Tensor, up: Tensor) -> Tensor:
    recipe = Recipe(_product)
    result: Tensor = _Gate.apply(gate, up, recipe)  # type: ignore[no-untyped-call]
    return recipe.attach(result, gate, up)


def _normed(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    """Return a norm's output, and the factor 1 / √(mean x² + eps) of each row: (rows,) float32."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    # y is not a view: autograd forbids in-place changes of a view that a Function returns
    y, scales = x.new_empty(x.shape), torch.empty(flat.shape[0])
    norm_forward(*_bits(flat, weight), np.float32(eps), plus_one, scales.numpy(), tensor_bits(y.view(flat.shape)))
    return y, scales


def _product(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up."""
    if gate.is_cuda:
        from adaptkit.training.fast import gpu_layers

        return gpu_layers.gate_forward(gate.detach(), up.detach())
    y = torch.empty_like(gate)
    gate_forward(*_bits(*(side.view(-1) for side in (gate, up, y))))
    return y


def _bits(*sides: Tensor) -> list[Any]:
    return [tensor_bits(side) for side in sides]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool, recipe: Recipe) -> Tensor:
        y, scales = _normed(x, weight, eps, plus_one)
        ctx.save_for_backward(x, scales)
        ctx.weight, ctx.plus_one, ctx.recipe = weight, plus_one, recipe
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.recipe.forget()
        x, scales = ctx.saved_tensors
        flat, grad = (side.reshape(-1, x.shape[-1]).contiguous() for side in (x, grads[0]))
        grad_x = torch.empty_like(flat)
        norm_backward(*_bits(flat, ctx.weight), ctx.plus_one, scales.numpy(), *_bits(grad, grad_x))
        return grad_x.view(x.shape), None, None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.recipe = recipe
        return _product(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.recipe.forget()
        gate, up = ctx.saved_tensors
        if gate.is_cuda:
            from adaptkit.training.fast import gpu_layers

            found = gpu_layers.gate_backward(gate, up, grads[0].contiguous())
            # The kernel overwrote gate and up: make autograd raise an error if another node still needs them.
            torch.autograd.graph.increment_version((gate, up))
            return *found, None
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        sides = (gate, up, grads[0].contiguous(), grad_gate, grad_up)
        gate_backward(*_bits(*(side.view(-1) for side in sides)))
        return grad_gate, grad_up, None
