"""Linear layers that read the same input, on a CPU: their adapters are multiplied along with their weights.

    Yᵢ = [X | X' Aᵀ] [Wᵢ | 0 | sᵢ Bᵢ | 0]ᵀ        A: the Aᵢ one below the other; sᵢ Bᵢ stands in the columns of its Aᵢ
    [D | I] = Σ Gᵢ [Wᵢ | 0 | sᵢ Bᵢ | 0]           Gᵢ: the gradient by Yᵢ
    dX = D, dX' = I A        dA = Iᵀ X'        dBᵢ = sᵢ Gᵢᵀ (X' Aᵢᵀ)

Calling a product with a factor of an adapter takes longer than computing it, and adding its result to another reads and
writes all of that once more. Here most of them are part of a product that is made anyway, and the rest is one for all.
And a sum is rounded once: added to what is rounded already, a change that is smaller than the weight's own rounding is
lost in bfloat16, as all of them are in the first steps, when B has just left zero.

Which layers read the same input is seen once, when two tokens go through the network. The first of them then computes
what all of them give, and the input carries it to the others. With dropout, inputs X' differ, and each is by itself.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.checkpoint.quantized import QuantizedWeight
from adaptkit.numerics.formats._double_quant import DoubleQuantized
from adaptkit.numerics.kernels._cpu_joined import PackedRows, can_decode_rows, decode_rows, place
from adaptkit.training.network.linear import LoraLinear, PackedWeight
from adaptkit.training.network.remade import source_of
from adaptkit.training.network.whole import TrainedWeight

_ATTRIBUTE = "_adaptkit_joined"
_ALIGNED = 32
"""With another number of columns, products take up to a fifth longer."""


def join_layers(network: Any) -> None:
    """Let the linear layers of a network on a CPU that have an adapter multiply as above; DoRA's stay as they are."""
    layers = [layer for layer in network.modules() if isinstance(layer, LoraLinear) and _is_plain(layer)]
    members: dict[nn.Module, _Member] = {layer: _Member(layer) for layer in layers}
    for group in _groups(network, members) if members else ():
        for index, member in enumerate(group):
            layer: Any = member.layer
            layer.multiply = _multiplication(group, index)


def _is_plain(layer: LoraLinear) -> bool:
    return layer.lora_a is not None and layer.magnitude is None and not isinstance(layer.base, TrainedWeight)


class _Member:
    """A layer that has an adapter.

    Args:
        layer: the layer.

    Attributes:
        layer: the layer.
        is_direct: whether the kernel decodes its weight; otherwise torch does, and the result is copied.
    """

    def __init__(self, layer: LoraLinear) -> None:
        self.layer = layer
        self._rows: PackedRows | None = None
        weight = layer.base.quantized() if isinstance(layer.base, PackedWeight) else None
        has_levels = weight is not None and weight.encoding.numerics.levels is not None
        self.is_direct = weight is not None and has_levels and can_decode_rows(weight.shape[-1], weight.block_size)

    def beside(self, lora_b: Tensor, first: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[W | 0 | s B | 0], (out, columns), with B from the ``first``-th column on."""
        base = self.layer.base
        height, width = base.shape
        matrix = torch.empty((height, columns), dtype=dtype)
        if self.is_direct:
            assert isinstance(base, PackedWeight)
            rows = self._rows or _packed_rows(base.quantized())
            self._rows = None if base.is_divided else rows
            decode_rows(rows, matrix)
        else:
            matrix[:, :width] = base.dequantize(dtype)
        place(lora_b, self.layer.scaling, width, first, matrix)
        return matrix


_Group = tuple[_Member, ...]


def _packed_rows(weight: QuantizedWeight) -> PackedRows:
    nested, offset, constants = torch.empty(0), 0.0, weight.constants
    if isinstance(constants, DoubleQuantized):
        nested, offset = constants.nested_absmax, constants.offset
    return PackedRows(
        codes=_as_numpy(weight.codes),
        constants=_as_numpy(constants.codes if isinstance(constants, DoubleQuantized) else constants),
        nested=_as_numpy(nested),
        offset=np.float32(offset),
        map=_as_numpy(weight.levels),
        width=weight.shape[-1],
        block_size=weight.block_size,
        levels=np.array(weight.encoding.numerics.levels, np.float32),
    )


def _as_numpy(part: Tensor) -> Any:
    return part.reshape(-1).contiguous().numpy()


def _groups(network: Any, members: Mapping[nn.Module, _Member]) -> Iterator[_Group]:
    """Layers of one module that are given the very same input; the others alone."""
    parents = {child: module for module in network.modules() for child in module.children()}
    seen: dict[tuple[int, int, nn.Module], list[nn.Module]] = {}
    held = []  # so that no two inputs have the same address

    def note(layer: nn.Module, given: tuple[Any, ...]) -> None:
        if given:
            held.append(given[0])
            seen.setdefault((id(given[0]), given[0]._version, parents[layer]), []).append(layer)

    hooks = [layer.register_forward_pre_hook(note) for layer in members]
    try:
        with torch.no_grad():
            network(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    left = dict(members)
    for together in (*seen.values(), *([layer] for layer in members)):
        group = tuple(left.pop(layer) for layer in together if layer in left)
        if group:
            yield group


def _multiplication(group: _Group, index: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What a layer multiplies by from now on; see ``LoraLinear.multiply``."""

    def multiply(x: Tensor, dropped: Tensor) -> Tensor:
        if dropped is not x or len(group) == 1:
            return _multiplied((group[index],), x, dropped)[0]
        state = id(group), x._version, torch.is_grad_enabled()
        before, left = getattr(x, _ATTRIBUTE, (None, {}))
        if before != state or index not in left:
            left = dict(enumerate(_multiplied(group, x, x)))
            setattr(x, _ATTRIBUTE, (state, left))
        result: Tensor = left.pop(index)
        return result

    return multiply


def _multiplied(group: _Group, x: Tensor, dropped: Tensor) -> tuple[Tensor, ...]:
    factors = (factor for member in group for factor in (member.layer.lora_a, member.layer.lora_b))
    results: tuple[Tensor, ...] = _Joined.apply(x, dropped, group, *factors)  # type: ignore[no-untyped-call]
    return results


class _Joined(torch.autograd.Function):
    """The formulas of the module's docstring; saves what the input was made of, X' Aᵀ and the adapters, never W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor, group: _Group, *factors: Tensor) -> tuple[Tensor, ...]:
        flat, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
        inner = dropped.reshape(-1, width) @ _stacked(factors, x.dtype).T
        columns = _columns(width, inner.shape[1])
        wide = torch.cat((flat, inner, flat.new_zeros(len(flat), columns - width - inner.shape[1])), dim=1)
        results, first = [], width
        for member, b in zip(group, factors[1::2], strict=True):
            y = x.new_empty(*x.shape[:-1], len(b))  # no view, which the network could not change in place
            torch.mm(wide, member.beside(b, first, columns, x.dtype).T, out=y.view(-1, len(b)))
            results.append(y)
            first += b.shape[1]
        ctx.make, kept = source_of(dropped)
        ctx.save_for_backward(inner, *factors, *kept)
        ctx.group, ctx.shape, ctx.shared = group, x.shape, dropped is x
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inner, *saved = ctx.saved_tensors
        factors, kept = tuple(saved[: 2 * len(ctx.group)]), saved[2 * len(ctx.group) :]
        width, ranks = ctx.shape[-1], inner.shape[1]
        columns = _columns(width, ranks)
        both: Tensor | None = None
        spans, grads_b, first = [], [], 0
        for member, b, grad in zip(ctx.group, factors[1::2], grads, strict=True):
            flat, span = grad.reshape(-1, len(b)), slice(first, first + b.shape[1])
            weight = member.beside(b, width + first, columns, flat.dtype)
            both = flat @ weight if both is None else both.addmm_(flat, weight)
            grads_b.append((flat.T @ inner[:, span]).to(b.dtype).mul_(member.layer.scaling))
            spans.append(span)
            first = span.stop
        assert both is not None
        grad_inner = both[:, width : width + ranks].contiguous()
        grad_a = (grad_inner.T @ ctx.make(*kept).reshape(-1, width)).to(factors[0].dtype)
        pairs = zip((grad_a[span] for span in spans), grads_b, strict=True)
        by_factors = (grad for pair in pairs for grad in pair)
        needs_x, needs_dropped, *_ = ctx.needs_input_grad
        grad_x = grad_dropped = None
        if needs_x and ctx.shared:
            grad_x = torch.addmm(both[:, :width], grad_inner, _stacked(factors, both.dtype)).view(ctx.shape)
        elif needs_x:
            grad_x = both[:, :width].reshape(ctx.shape)
        if needs_dropped and not ctx.shared:
            grad_dropped = (grad_inner @ _stacked(factors, both.dtype)).view(ctx.shape)
        return grad_x, grad_dropped, None, *by_factors


def _stacked(factors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """The A's, one below the other, (ranks, in), of A, B of each layer in turn."""
    return (torch.cat(factors[::2]) if len(factors) > 2 else factors[0]).to(dtype)


def _columns(width: int, ranks: int) -> int:
    """Columns of a weight with what is beside it."""
    return -(-(width + ranks) // _ALIGNED) * _ALIGNED
