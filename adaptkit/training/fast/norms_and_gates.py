"""Norms and gates whose results are made again in the backward pass instead of being saved.

    norm       y = x / √(mean x² + eps) · w, or · (1 + w)     with a frozen w, on a CPU; on a GPU torch's kernel for it
    gate       y = act(gate) · up                             in a module that computes down(act(gate(x)) · up(x))

Only the inputs are saved, where torch saves four to six tensors of their size, and a product that reads y (see
``products``) saves its source, these inputs, instead of y. ``models.probing`` recognizes both by what they compute.
Kernels compute norms on a CPU and SiLU's gates on both devices, in one pass each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptkit.models.fakes import is_fake
from adaptkit.models.probing import is_gated, norm_has_offset, norm_parts
from adaptkit.training.fast import cpu_layers
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.triton_needs import has_triton

_SOURCE = "_adaptkit_source"

Make = Callable[..., Tensor]


def replace_norms_and_gates(network: nn.Module, on_gpu: bool) -> None:
    """Replace the forward passes of a model's gates, and of its norms with frozen weights.

    Args:
        network: modified in place.
        on_gpu: whether it will run on a GPU.
    """
    for module in network.modules():
        weight, eps = norm_parts(module)
        if weight is not None and not weight.requires_grad:
            plus_one = norm_has_offset(module, weight, eps)
            if on_gpu and plus_one is False:
                module.forward = _torch_norm(module, eps)
            elif not on_gpu and plus_one is not None:
                module.forward = _norm(weight, eps, plus_one)
        elif isinstance(gate := getattr(module, "gate_proj", None), LoraLinear):
            size, device, act = gate.base.shape[1], gate.device, getattr(module, "act_fn", None)
            if is_gated(module, size, device, functional.silu):
                module.forward = _gated(module)
            elif not on_gpu and callable(act) and is_gated(module, size, device, act):
                module.forward = _gated_by(module, act)


def source_of(x: Tensor) -> tuple[Make | None, tuple[Tensor, ...]]:
    """Return how a tensor is made again, and from what; None and the tensor itself if nothing says that."""
    make, inputs, versions = getattr(x, _SOURCE, (None, (), []))
    is_known = make is not None and [tensor._version for tensor in (x, *inputs)] == versions
    return (make, inputs) if is_known else (None, (x,))


def _kept(node: Any, make: Make, *inputs: Tensor) -> Tensor:
    """Return a result of a node of autograd that can be made again."""
    if not torch.is_grad_enabled():
        return make(*inputs)
    y: Tensor = node(*inputs)
    setattr(y, _SOURCE, (make, inputs, [tensor._version for tensor in (y, *inputs)]))
    return y


def _norm(weight: Tensor, eps: float, plus_one: bool) -> Make:
    def make(x: Tensor) -> Tensor:
        return cpu_layers.norm_forward(x.contiguous(), weight, eps, plus_one)[0]

    return lambda x: _kept(lambda x: _Norm.apply(x, weight, eps, plus_one), make, x)  # type: ignore[no-untyped-call]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        y, scales = cpu_layers.norm_forward(x.contiguous(), weight, eps, plus_one)
        ctx.save_for_backward(x, scales)
        ctx.weight, ctx.plus_one = weight, plus_one
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scales = ctx.saved_tensors
        grad_x = cpu_layers.norm_backward(x.contiguous(), ctx.weight, ctx.plus_one, scales, grads[0].contiguous())
        return grad_x, None, None, None


def _torch_norm(module: Any, eps: float) -> Make:
    own = module.forward

    def forward(x: Tensor) -> Tensor:
        if is_fake(x):  # torch's kernel saves its input, too, but its parts would run one by one here
            return _Remade.apply(own, x)  # type: ignore[no-any-return, no-untyped-call]
        return functional.rms_norm(x, (len(module.weight),), module.weight.to(x.dtype), eps)

    return forward


def _gated(module: Any) -> Make:
    def forward(x: Tensor) -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        if gate.is_cuda and not has_triton("cuda"):
            return module.down_proj(functional.silu(gate) * up)  # type: ignore[no-any-return]
        gate, up = (gate, up) if gate.is_cuda else (gate.contiguous(), up.contiguous())
        return module.down_proj(_kept(_Gate.apply, _product, gate, up))  # type: ignore[no-any-return]

    return forward


def _product(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up."""
    if not gate.is_cuda:
        return cpu_layers.gate_forward(gate, up)
    from adaptkit.training.fast import gpu_layers

    return gpu_layers.gate_forward(gate.detach(), up.detach())


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if not gate.is_cuda:
            return cpu_layers.gate_backward(gate, up, grads[0].contiguous())
        from adaptkit.training.fast import gpu_layers

        found = gpu_layers.gate_backward(gate, up, grads[0].contiguous())
        # The kernel overwrote gate and up: make autograd raise an error if another node still needs them.
        torch.autograd.graph.increment_version((gate, up))
        return found


def _gated_by(module: Any, act: Make) -> Make:
    def make(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up

    def forward(x: Tensor) -> Tensor:
        made = _kept(lambda *sides: _Remade.apply(make, *sides), make, module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
        return module.down_proj(made)  # type: ignore[no-any-return]

    return forward


class _Remade(torch.autograd.Function):
    """Saves a function's inputs; the backward pass computes the function again, and its gradients."""

    @staticmethod
    def forward(ctx: Any, make: Make, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.make = make
        return make(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            result = ctx.make(*inputs)
        return None, *torch.autograd.grad(result, inputs, grads[0])
