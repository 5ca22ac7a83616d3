"""Packed linear layers that read the same input, on a CPU: one product multiplies by weight and adapter together.

    Yᵢ = [X | X' Aᵀ] [Wᵢ | 0 | sᵢ Bᵢ | 0]ᵀ        A: all Aᵢ concatenated along rows; sᵢ Bᵢ is in the columns of its Aᵢ
    D = Σ Gᵢ Wᵢ        Iᵢ = sᵢ Gᵢ Bᵢ              Gᵢ: the gradient of Yᵢ; I: all Iᵢ concatenated along columns
    dX = D, dX' = I A        dA = Iᵀ X'        dBᵢ = sᵢ Gᵢᵀ (X' Aᵢᵀ)

Adding an adapter's share to Y would read and write Y once more. As a part of the same product it is summed before Y is
rounded: in bfloat16, a share below the rounding error of W's product would be lost if it were added to the rounded
product. Most shares are that small in the first steps, when B is still close to zero. The backward pass has no such sum
for each layer, and D's width is usually a multiple of what a processor multiplies at a time: wider products, with I
beside D, take longer than separate ones. Products with A are computed once for all layers.

The first layer that is called computes the results of all, and the others take theirs. With dropout the inputs X'
differ, so each layer computes its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptkit.models.recompute import source_of
from adaptkit.training.fast.cpu_joined import beside, widen
from adaptkit.training.network.accumulation import accumulate
from adaptkit.training.network.frozen import PackedWeight
from adaptkit.training.network.groups import groups, join
from adaptkit.training.network.linear import LoraLinear

_ALIGNED = 32
"""Columns are padded to a multiple of this; otherwise products take up to a fifth longer."""


def join_layers(network: Any) -> None:
    """Replace ``LoraLinear.multiply`` of a network's layers on a CPU that have a 4-bit weight and an adapter.

    Layers with DoRA are left unchanged, and so are those whose weight cannot be decoded row by row: see
    ``packed_rows``. The network runs once, on two tokens, to see which layers read the same input.

    Args:
        network: transformers model with its adapter, before its layers are checkpointed or sharded.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, LoraLinear) and _can_join(layer)]
    for group in groups(network, layers):
        join(
            group,
            lambda layers, x: multiplied(layers, x, x),
            lambda layer, x, dropped: multiplied([layer], x, dropped)[0],
        )


def _can_join(layer: LoraLinear) -> bool:
    if layer.lora_a is None or layer.magnitude is not None or not isinstance(layer.base, PackedWeight):
        return False
    return layer.base.rows() is not None


def multiplied(layers: Sequence[LoraLinear], x: Tensor, dropped: Tensor) -> tuple[Tensor, ...]:
    """Return the results of several layers for one input.

    Args:
        layers: the layers.
        x: (…, in).
        dropped: ``x`` after dropout; ``x`` itself without.

    Returns:
        (…, out) of each layer.
    """
    factors = (factor for layer in layers for factor in (layer.lora_a, layer.lora_b))
    results: tuple[Tensor, ...] = _Product.apply(x, dropped, layers, *factors)  # type: ignore[no-untyped-call]
    return results


class _Product(torch.autograd.Function):
    """The module docstring's formulas; saves its input's source (see ``recompute``), X' Aᵀ and adapter, not W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor, layers: Sequence[LoraLinear], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        width, dtype = x.shape[-1], x.dtype
        flat = x.reshape(-1, width)
        a = torch.cat(factors[::2]).to(dtype)
        inner = (flat if dropped is x else dropped.reshape(-1, width)) @ a.T
        columns = _columns(width, inner.shape[1])
        wide = beside(flat, inner, columns) if any(layer.stand_in is None for layer in layers) else flat
        results, first = [], width
        for layer, b in zip(layers, factors[1::2], strict=True):
            rows, rank = b.shape  # several times as fast as len(b), as in all of this module
            shape = (*x.shape[:-1], rows)
            if layer.stand_in is None:
                y = x.new_empty(shape)  # not a view: autograd forbids in-place changes of a returned view
                torch.mm(wide, _widened(layer.base, layer.scaling, b, first, columns, dtype).T, out=y.view(-1, rows))
            else:
                y = x.new_full(shape, layer.stand_in)
            results.append(y)
            first += rank
        ctx.make, kept = source_of(dropped)
        ctx.save_for_backward(inner, a, *factors, *kept)
        ctx.weights, ctx.shape, ctx.shared = [(layer.base, layer.scaling) for layer in layers], x.shape, dropped is x
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inner, a, *saved = ctx.saved_tensors
        count, width = 2 * len(ctx.weights), ctx.shape[-1]
        lora_as, lora_bs, kept = saved[:count:2], saved[1:count:2], saved[count:]
        ranks = [b.shape[1] for b in lora_bs]
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_inner, direct = _input_gradients(ctx.weights, lora_bs, flat, width if ctx.needs_input_grad[0] else None)
        grad_a = grad_inner.T @ ctx.make(*kept).reshape(-1, width)
        by_factors = []
        parts = zip(flat, inner.split(ranks, 1), grad_a.split(ranks), strict=True)
        for a_of_one, b, (_, scale), (grad, part, grad_part) in zip(lora_as, lora_bs, ctx.weights, parts, strict=True):
            by_factors.append(accumulate(a_of_one, grad_part))
            by_factors.append(accumulate(b, grad.T @ part, scale))
        if direct is None:
            return None, None, None, *by_factors
        if ctx.shared:
            return direct.addmm_(grad_inner, a).view(ctx.shape), None, None, *by_factors
        return direct.view(ctx.shape), (grad_inner @ a).view(ctx.shape), None, *by_factors


def _input_gradients(
    weights: Sequence[tuple[Any, float]], lora_bs: Sequence[Tensor], grads: Sequence[Tensor], width: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return I, and D if ``width`` is given: the width of an input that needs a gradient."""
    ranks = [b.shape[1] for b in lora_bs]
    inner = grads[0].new_empty(grads[0].shape[0], sum(ranks))
    direct: Tensor | None = None
    for (base, scale), b, grad, own in zip(weights, lora_bs, grads, inner.split(ranks, 1), strict=True):  # type: ignore[no-untyped-call]
        if width is None:
            torch.mm(grad, (b * scale).to(grad.dtype), out=own)
            continue
        rank = b.shape[1]
        matrix = _widened(base, scale, b, width, _columns(width, rank), grad.dtype)
        torch.mm(grad, matrix[:, width : width + rank], out=own)
        weight = matrix[:, :width]
        direct = torch.mm(grad, weight) if direct is None else direct.addmm_(grad, weight)
    return inner, direct


def _widened(base: Any, scale: float, lora_b: Tensor, first: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return [W | 0 | s B | 0], (out, columns), with B starting at column ``first``."""
    matrix = torch.empty((lora_b.shape[0], columns), dtype=dtype)
    widen(base.rows(), lora_b, scale, first, matrix)
    base.release_pages()
    return matrix


def _columns(width: int, ranks: int) -> int:
    """Return the number of columns of [W | 0 | s B | 0], padded to ``_ALIGNED``."""
    return -(-(width + ranks) // _ALIGNED) * _ALIGNED
