"""The two functions of transformers that are replaced while a network trains on a GPU, and put back afterwards.

Each replacement acts only in the thread, and inside the networks, that ask for it; all other callers get the original.

    apply_rotary_pos_emb            every architecture's module has its own. Where its result equals the formula bit for
                                    bit, attention uses one launch where transformers' code takes seven
    find_packed_sequence_indices    asks before the first layer whether positions restart in a row: the host waits for
                                    all work of the GPU. Without positions they are counted from 0, and never do

    y = x ∘ cos + h(x) ∘ sin        h([a | b]) = [-b | a]; both products are rounded, as transformers rounds them

Source: RoFormer (arXiv:2104.09864), in the halves of GPT-NeoX.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from adaptkit.training.triton_needs import has_triton

_ROTARY, _CHECK = "apply_rotary_pos_emb", "find_packed_sequence_indices"

_inside = threading.local()
"""``rotary``: whether this thread is in attention of such a network; ``single``: whether its rows hold one sample."""


def patch_transformers(network: Any) -> ExitStack:
    """Use the replacements inside a network until the result is closed.

    Args:
        network: transformers model.
    """
    from transformers import masking_utils

    undo = ExitStack()
    for module in network.modules():
        home: Any = sys.modules.get(type(module).__module__)
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and _ROTARY in code.co_names and _is_formula(getattr(home, _ROTARY)):
            _replace(undo, home, _ROTARY, _rotating)
            module.forward = _marking(module.forward, "rotary", lambda options: True)
    if hasattr(masking_utils, _CHECK):
        _replace(undo, masking_utils, _CHECK, _checking)
        for called in {network, network.base_model}:
            called.forward = _marking(called.forward, "single", _has_no_positions)
    return undo


def _has_no_positions(options: dict[str, Any]) -> bool:
    return options.get("position_ids") is None


def _replace(undo: ExitStack, home: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace a function of a module unless it is already; several networks may ask, and the last one puts it back."""
    wrapped: Any = getattr(home, name)
    if not hasattr(wrapped, "users"):
        wrapped = functools.wraps(wrapped)(wrapper(wrapped))
        wrapped.users = 0
        setattr(home, name, wrapped)
    wrapped.users += 1

    def put_back() -> None:
        wrapped.users -= 1
        if not wrapped.users:
            setattr(home, name, wrapped.__wrapped__)

    undo.callback(put_back)


def _marking(forward: Callable[..., Any], name: str, applies: Callable[[dict[str, Any]], bool]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def marked(*args: Any, **kwargs: Any) -> Any:
        before = getattr(_inside, name, False)
        setattr(_inside, name, applies(kwargs))
        try:
            return forward(*args, **kwargs)
        finally:
            setattr(_inside, name, before)

    return marked


def _checking(check: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: None if getattr(_inside, "single", False) else check(*args, **kwargs)


def _rotating(function: Callable[..., Any]) -> Callable[..., Any]:
    def rotated(*args: Any, **kwargs: Any) -> Any:
        if getattr(_inside, "rotary", False) and not kwargs and len(args) == 4 and _is_plain(*args):
            return _Rotary.apply(*args)  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)

    return rotated


def _is_plain(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether the kernel supports these arguments: on a GPU, of one dtype, with (batch, heads, tokens, dim).

    Queries and keys are transposed from (batch, tokens, heads, dim) in memory; rows may be slices of a wider matrix.
    """
    if query.dim() != 4 or key.dim() != 4 or query.dtype not in (torch.bfloat16, torch.float32):
        return False
    batch, _, tokens, dim = query.shape
    return (
        all(side.device == query.device and side.dtype == query.dtype for side in (query, key, cos, sin))
        and has_triton(query.device.type)
        and dim % 2 == 0
        and (key.shape[0], *key.shape[2:]) == (batch, tokens, dim)
        and cos.shape == sin.shape
        and cos.shape in ((batch, tokens, dim), (1, tokens, dim))
        and not (cos.requires_grad or sin.requires_grad)
        and all(_lies_in_rows(side.transpose(1, 2)) for side in (query, key))
    )


def _lies_in_rows(side: Tensor) -> bool:
    """Return whether the heads of each row of (batch, tokens, heads, dim) are contiguous in memory."""
    _, tokens, _, dim = side.shape
    return side.stride()[2:] == (dim, 1) and (side.shape[0] == 1 or side.stride(0) == tokens * side.stride(1))


@torch.no_grad()
def _is_formula(function: Callable[..., Any]) -> bool:
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
        return _rotated(query, key, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_rotated(grads[0], grads[1], cos, sin, True), None, None


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    from adaptkit.training.fast import gpu_layers

    sides = (side.detach().transpose(1, 2) for side in (query, key))
    one, two = (side if _lies_in_rows(side) else side.contiguous() for side in sides)
    found = gpu_layers.rotate(one, two, cos.contiguous(), sin.contiguous(), back)
    return found[0].transpose(1, 2), found[1].transpose(1, 2)
