"""Fused rotary position embedding: one pass over queries and keys, where transformers takes seven and saves results.

Each architecture's Python module has its own function for this, always under the same name. If its result equals the
formula bit for bit, it is replaced in that module by a wrapper. The wrapper uses the fused kernel only when called from
the attention of a network that was passed to ``fuse_rotary``; for all other callers it calls the original function.

    y = x ∘ cos + h(x) ∘ sin        h([a | b]) = [-b | a]; both products are rounded, as transformers rounds them

Source: RoFormer (arXiv:2104.09864), in the halves of GPT-NeoX.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.training.fast.bits import tensor_bits
from adaptkit.training.fast.cpu_rotary import rotate
from adaptkit.training.triton_needs import has_triton

_NAME, _MARK = "apply_rotary_pos_emb", "_adaptkit_wrapped_rotary"

Rotary = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(network: nn.Module) -> None:
    """Make a network's attention layers use the fused kernel, where their rotary function equals the formula.

    Args:
        network: transformers model.
    """
    for module in network.modules():
        home: Any = sys.modules.get(type(module).__module__)
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and _NAME in code.co_names and _wrap_rotary(home):
            module.forward = _mark_caller(module.forward)


_caller = threading.local()
"""``is_known``: whether this thread is inside the attention of such a network."""


def _mark_caller(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def marked(*args: Any, **kwargs: Any) -> Any:
        before = getattr(_caller, "is_known", False)
        _caller.is_known = True
        try:
            return forward(*args, **kwargs)
        finally:
            _caller.is_known = before

    return marked


def _wrap_rotary(home: Any) -> bool:
    """Wrap the rotary function of a Python module if it equals the formula; return whether it does."""
    function = getattr(home, _NAME, None)
    if hasattr(function, _MARK):
        return True
    if function is None or not _is_formula(function):
        return False
    setattr(home, _NAME, _wrapper(function))
    return True


def _wrapper(function: Rotary) -> Rotary:
    """Return the wrapper of a rotary function."""

    @functools.wraps(function)
    def rotated(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if getattr(_caller, "is_known", False) and not kwargs and len(args) == 4 and _is_plain(*args):
            result: tuple[Tensor, Tensor] = _Rotary.apply(*args)  # type: ignore[no-untyped-call]
            return result
        return function(*args, **kwargs)

    setattr(rotated, _MARK, True)
    return rotated


def _is_plain(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether the fused kernel supports these arguments.

    Queries and keys must be (batch, heads, tokens, dim) transposed from (batch, tokens, heads, dim) in memory, and all
    tensors of one dtype and device.
    """
    if any(side.dim() != 4 for side in (query, key)) or query.dtype not in (torch.bfloat16, torch.float32):
        return False
    batch, _, tokens, dim = query.shape
    return (
        all(side.device == query.device and side.dtype == query.dtype for side in (query, key, cos, sin))
        and (query.device.type == "cpu" or has_triton(query.device.type))
        and dim % 2 == 0
        and (key.shape[0], *key.shape[2:]) == (batch, tokens, dim)
        and cos.shape == sin.shape
        and cos.shape in ((batch, tokens, dim), (1, tokens, dim))
        and not (cos.requires_grad or sin.requires_grad)
        and all(_lies_in_rows(side.transpose(1, 2)) for side in (query, key))
    )


def _lies_in_rows(side: Tensor) -> bool:
    """Return whether the heads of each row of (batch, tokens, heads, dim) are contiguous in memory.

    On a CPU the whole tensor must be contiguous; on a GPU its rows may be slices of a wider matrix.
    """
    if not side.is_cuda:
        return side.is_contiguous()
    _, tokens, _, dim = side.shape
    return side.stride()[2:] == (dim, 1) and (side.shape[0] == 1 or side.stride(0) == tokens * side.stride(1))


@torch.no_grad()
def _is_formula(function: Rotary) -> bool:
    """Return whether a function equals the formula of this module's docstring, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    query, key, cos, sin = (
        torch.randn(shape, generator=generator).to(torch.bfloat16)
        for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
    )
    expected = [x * cos[:, None] + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin[:, None] for x in (query, key)]
    try:
        found = function(query, key, cos, sin)
        return len(found) == 2 and all(map(torch.equal, found, expected))
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # it needs other shapes
        return False


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _both_rotated(query, key, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_both_rotated(grads[0], grads[1], cos, sin, True), None, None


def _both_rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    if not query.is_cuda:
        return _rotated(query, cos, sin, back), _rotated(key, cos, sin, back)
    from adaptkit.training.fast import gpu_layers

    sides = (side.detach().transpose(1, 2) for side in (query, key))
    one, two = (side if _lies_in_rows(side) else side.contiguous() for side in sides)
    found = gpu_layers.rotate(one, two, cos.contiguous(), sin.contiguous(), back)
    return found[0].transpose(1, 2), found[1].transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Rotate queries or keys, (batch, heads, tokens, dim), or rotate their gradients back.

    The result is a transposed view of a contiguous (batch, tokens, heads, dim) tensor.
    """
    batch, heads, tokens, dim = x.shape
    flat = x.transpose(1, 2).contiguous()
    result = torch.empty_like(flat)
    shape = batch * tokens, heads, dim
    angles = (tensor_bits(side.contiguous().view(-1, dim)) for side in (cos, sin))
    rotate(tensor_bits(flat.view(shape)), *angles, back, tensor_bits(result.view(shape)))
    return result.transpose(1, 2)
