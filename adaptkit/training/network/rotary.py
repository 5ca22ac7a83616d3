"""Rotary positions on a CPU, in one pass over queries and keys, where transformers takes seven and keeps their results.

Architectures have a function of their own for it, under one name in their modules; one that gives to the bit what the
formula gives is replaced there by one that looks who calls. For the attention of a network that was asked for, it is
one pass; for everybody else in the process it stays what it was.

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

from adaptkit.numerics.kernels._cpu_float import float_bits
from adaptkit.numerics.kernels._cpu_rotary import rotate

_NAME = "apply_rotary_pos_emb"

Rotary = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(network: nn.Module) -> None:
    """Let the attention of a network on a CPU rotate its queries and keys in one pass, where it is known what it does.

    Args:
        network: of transformers.
    """
    for module in network.modules():
        home: Any = sys.modules[type(module).__module__]
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and _NAME in code.co_names and _replace(home):
            module.forward = _calling(module.forward)


_caller = threading.local()
"""Whether what runs now is the attention of such a network."""


def _calling(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def known(*args: Any, **kwargs: Any) -> Any:
        _caller.is_known = True
        try:
            return forward(*args, **kwargs)
        finally:
            _caller.is_known = False

    return known


def _replace(home: Any) -> bool:
    """Replace a module's function if it is the formula; whether it is."""
    function = getattr(home, _NAME, None)
    if isinstance(function, _Known):
        return True
    if function is None or not _is_formula(function):
        return False
    setattr(home, _NAME, _Known(function))
    return True


class _Known:
    """In a function's place.

    Args:
        function: transformers' own.
    """

    def __init__(self, function: Rotary) -> None:
        self._function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys, rotated."""
        if getattr(_caller, "is_known", False) and not kwargs and len(args) == 4 and _is_plain(*args):
            rotated: tuple[Tensor, Tensor] = _Rotary.apply(*args)  # type: ignore[no-untyped-call]
            return rotated
        return self._function(*args, **kwargs)


def _is_plain(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether this is what is computed here: heads side by side in the rows of (batch, tokens), one type, a CPU."""
    wanted = torch.Size((query.shape[0], query.shape[2], query.shape[3]))
    known = (torch.bfloat16, torch.float32)
    return (
        all(side.device.type == "cpu" and side.dtype == query.dtype in known for side in (query, key, cos, sin))
        and all(angles.shape in (wanted, (1, *wanted[1:])) and not angles.requires_grad for angles in (cos, sin))
        and all(side.dim() == 4 and side.transpose(1, 2).is_contiguous() for side in (query, key))
    )


@torch.no_grad()
def _is_formula(function: Rotary) -> bool:
    """Whether a function is the formula of this module's docstring, to the bit."""
    generator = torch.Generator().manual_seed(0)
    query, key, cos, sin = (
        torch.randn(shape, generator=generator).to(torch.bfloat16)
        for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
    )
    try:
        found = function(query, key, cos, sin)
    except (TypeError, ValueError, IndexError, RuntimeError):
        return False
    expected = [x * cos[:, None] + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin[:, None] for x in (query, key)]
    return len(found) == 2 and all(map(torch.equal, found, expected))


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rows = query.shape[0] * query.shape[2]
        ctx.cos, ctx.sin = (angles.expand(len(query), -1, -1).reshape(rows, -1) for angles in (cos, sin))
        return _rotated(query, ctx.cos, ctx.sin, False), _rotated(key, ctx.cos, ctx.sin, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(_rotated(grad, ctx.cos, ctx.sin, True) for grad in grads), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Queries or keys, (batch, heads, tokens, dim), rotated or their gradients rotated back; in memory tokens first."""
    batch, heads, tokens, dim = x.shape
    flat = x.detach().transpose(1, 2).contiguous()
    result = torch.empty_like(flat)
    shape = batch * tokens, heads, dim
    rotate(*(float_bits(side) for side in (flat.view(shape), cos, sin)), back, float_bits(result.view(shape)))
    return result.transpose(1, 2)
