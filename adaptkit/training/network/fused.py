"""Fused norms and gates of a decoder layer: one pass each, with few saved activations.

A module is recognized by what it computes, not by its name: it is run on a probe, and replaced only if its output
equals the formula's bit for bit. The fused forward pass saves only its input, where torch's own saves three or four
tensors of that size. The output is recomputed instead of saved: see ``recompute``.

    norm       y = x / √(mean x² + eps) · w, or · (1 + w)          needs a frozen w
    gate       y = silu(gate) · up          in a module that computes down(silu(gate(x)) · up(x))
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptkit.numerics.kernels import has_triton
from adaptkit.numerics.kernels._cpu_float import float_bits
from adaptkit.numerics.kernels._cpu_layers import gate_backward, gate_forward, norm_backward, norm_forward
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.probing import exchanged, forked_random
from adaptkit.training.network.recompute import Recipe
from adaptkit.training.network.rotary import fuse_rotary


def fuse_layers(network: nn.Module, on_gpu: bool = False) -> None:
    """Replace the forward passes of a model's gates and of its norms with frozen weights, and its rotary embedding.

    See ``rotary`` for the latter. On a GPU, norms with factor w use torch's RMS norm kernel: one launch and one
    rounding, where transformers' code takes six launches and float32 intermediates; norms with factor 1 + w stay as
    they are. Gates use a Triton kernel there.
    """
    fuse_rotary(network)
    for module in network.modules():
        weight, eps = _norm_parts(module)
        if weight is not None and not weight.requires_grad:
            plus_one = _norm_has_offset(module, weight, eps)
            if plus_one is not None and not on_gpu:
                module.forward = _norm(weight, eps, plus_one)
            elif plus_one is False:
                module.forward = _torch_norm(weight, eps)
        elif _is_gated(module) and (not on_gpu or _has_kernel(module)):
            module.forward = _gated(module)


def _has_kernel(module: nn.Module) -> bool:
    return has_triton("cuda") and all(tensor.is_cuda for tensor in (*module.parameters(), *module.buffers()))


def _torch_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return functional.rms_norm(x, (len(weight),), weight.to(x.dtype), eps)

    return forward


_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
_PROBE_ROWS = 8
"""Rows of the small random matrices that replace a gate's weights in a probe: decoding all weights of a model would
take longer than a training step."""


def _norm_parts(module: nn.Module) -> tuple[Tensor | None, float]:
    """Return weight and epsilon of a module that may be an RMS norm; (None, 0.0) if it cannot be one."""
    parameters = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1 or not isinstance(eps, float):
        return None, 0.0
    if not _takes_one(module):  # a gated norm
        return None, 0.0
    return parameters["weight"], eps


def _takes_one(module: nn.Module) -> bool:
    """Return whether a module's forward takes one argument, so that it can be probed."""
    return len(inspect.signature(module.forward).parameters) == 1


def _probe_output(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return a module's output for (rows, size); None if it needs another shape, as xLSTM's multi-head norms do."""
    try:
        result: Tensor = module(x)
    except (ValueError, IndexError, RuntimeError):
        return None
    return result


def _probe(size: int, dtype: torch.dtype) -> Tensor:
    """Return random rows of very different norms: (3, size)."""
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    return (rows * torch.tensor([[0.01], [1.0], [30.0]])).to(dtype)


@torch.no_grad()
def _norm_has_offset(module: nn.Module, weight: Tensor, eps: float) -> bool | None:
    """Return True for an RMS norm with factor 1 + w, False for factor w, None for any other module."""
    if weight.dtype not in (torch.bfloat16, torch.float32):
        return None
    x = _probe(len(weight), weight.dtype).to(weight.device)
    found, wide = _probe_output(module, x), x.float()
    if found is None:
        return None
    quotient = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if torch.equal(found, weight * quotient.to(x.dtype)):
        return False
    if torch.equal(found, (quotient * (1.0 + weight.float())).to(x.dtype)):
        return True
    return None


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Return whether a module computes down(silu(gate(x)) · up(x)); probed with small random weights."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in _GATED):
        return False
    if not hasattr(module.gate_proj, "base") or not _takes_one(module):
        return False
    device, size = module.gate_proj.device, module.gate_proj.base.shape[1]
    x = _probe(size, torch.float32).to(device)
    shapes = ((size, _PROBE_ROWS), (size, _PROBE_ROWS), (_PROBE_ROWS, size))
    gate, up, down = (_stand_in(*shape, seed).to(device) for seed, shape in enumerate(shapes))
    expected = down(functional.silu(gate(x)) * up(x))
    linears = dict(zip(_GATED, (gate, up, down), strict=False))
    with _training(module), exchanged(module, linears), forked_random(device):  # some have dropout: no match
        found = _probe_output(module, x)
    return found is not None and torch.equal(found, expected)


def _stand_in(columns: int, rows: int, seed: int) -> nn.Linear:
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    linear.weight = nn.Parameter(weight / columns**0.5, requires_grad=False)
    return linear


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    """Put a module in training mode while the block runs, except linear layers: their adapters may have dropout."""
    inside = [part for part in module.modules() if not isinstance(part, LoraLinear)]
    before = [part.training for part in inside]
    for part in inside:
        part.training = True
    try:
        yield
    finally:
        for part, was in zip(inside, before, strict=True):
            part.training = was


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


def _gated(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        gate, up = (_contiguous_on_cpu(side(x)) for side in (module.gate_proj, module.up_proj))
        inner = _product(gate, up) if not torch.is_grad_enabled() else _kept_product(gate, up)
        result: Tensor = module.down_proj(inner)
        return result

    return forward


def _contiguous_on_cpu(side: Tensor) -> Tensor:
    """Return a tensor contiguous for the CPU kernel; the GPU kernel accepts column slices of a matrix."""
    return side if side.is_cuda else side.contiguous()


def _kept_product(gate: Tensor, up: Tensor) -> Tensor:
    recipe = Recipe(_product)
    result: Tensor = _Gate.apply(gate, up, recipe)  # type: ignore[no-untyped-call]
    return recipe.attach(result, gate, up)


def _normed(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    """Return a norm's output, and the factor 1 / √(mean x² + eps) of each row: (rows,) float32."""
    flat = x.detach().reshape(-1, x.shape[-1]).contiguous()
    # y is not a view: autograd forbids in-place changes of a view that a Function returns
    y, scales = x.new_empty(x.shape), torch.empty(len(flat))
    bits = float_bits(flat), float_bits(weight.detach())
    norm_forward(*bits, np.float32(eps), plus_one, scales.numpy(), float_bits(y.view(flat.shape)))
    return y, scales


def _product(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up."""
    if gate.is_cuda:
        from adaptkit.numerics.kernels import _gpu_layers

        return _gpu_layers.gate_forward(gate.detach(), up.detach())
    y = torch.empty_like(gate)
    gate_forward(*(float_bits(side.detach().view(-1)) for side in (gate, up, y)))
    return y


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
        bits = float_bits(flat), float_bits(ctx.weight.detach())
        norm_backward(*bits, ctx.plus_one, scales.numpy(), float_bits(grad), float_bits(grad_x))
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
            from adaptkit.numerics.kernels import _gpu_layers

            found = _gpu_layers.gate_backward(gate, up, grads[0].contiguous())
            # The kernel overwrote gate and up: make autograd raise an error if another node still needs them.
            torch.autograd.graph.increment_version((gate, up))
            return *found, None
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        sides = (gate, up, grads[0].contiguous(), grad_gate, grad_up)
        gate_backward(*(float_bits(side.view(-1)) for side in sides))
        return grad_gate, grad_up, None
